"""Teaches a transformer to act as it is told: the truth of every frame stands where its ears' readings will.

    python -m joyavatar_core.training.acting --initial TRANSFORMER --autoencoder FILE --clips CLIPS --out DIR
        --minutes 90 [--rehearse] [--lips FILE] [--resume]

Ears err, and of a glance or a sway they know nothing. A transformer that learns from them learns to doubt them: lips
open half, lids and eyes smear. Here it is told the true opening, lids, gaze and head of every pixel frame (`manner`),
so that there is nothing left to guess, and a regression at the levels of the rollout, with the true past behind a mask
(`sequences`), says all there is to say. Later its ears tell it, as good as they are; what they cannot know is drawn.
--rehearse lets the transformer make all the clips first and puts what it made in the place of the true latents in some
of the sequences (`rehearsal`); what it is to make of them are the true ones. Nobody can know what a mouth that was
never seen open looks like inside, and the mean of what it may look like is a lip that neither closes nor opens; a judge
(--lips, `lips`) has what is shown read as the truth is read. Nor do latents say how evenly a head moves: with
"seen_weight" in the recipe their decoded frames count too (`seen`). In DIR the files of every training (`trainer`).

Shape legend: B batch, F latent frames of a sequence, T pixel frames of a latent, K readings, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..avatar import load_model
from ..manner import HEARD, usual_deviations
from ..policy import policy as policy_named
from . import flow_matching, trainer
from .batches import Batch, Framing, by_level, clean, loss_weights, measured_batch, predict, weighted_mean, x0_error
from .common import training_dtype
from .encoded import EncodedClips
from .lips import LipLoss, load_lip_loss
from .rehearsal import to_be_told, with_rehearsals
from .seen import SeenLoss, load_seen_loss
from .sequences import attend, steady

_TOUCH, _PART, _SHUT = 0.08, 0.15, 0.4  # openings of lips that touch and that are apart; lids that are falling


@dataclass(frozen=True)
class Recipe(flow_matching.Recipe):
    """The recipe of flow matching.

    doubt: how far from the truth it is told, in usual deviations, for ears err. own: odds of a sequence that stands on
    a rehearsal, where there are any. rare: how much more mouths count in latents whose lips both touch and part, and
    eyes in those whose lids fall: they are few, and what one looks for. lip_weight: of the judge's loss; shut: how
    much more frames count there in which lips touch (`lips.LipLoss`). seen_weight: of the loss of decoded frames
    (`seen`).
    """

    minutes: float = 90.0
    learning_rate: float = 1e-3
    drop_audio: float = 0.0
    told: bool = True
    eyes: float = 6.0
    framing: Framing = field(default_factory=lambda: Framing(close_ups=0.4, close_up=(12,), small_mouths=0.5))
    doubt: float = 0.1
    own: float = 0.7
    rare: float = 2.5
    lip_weight: float = 0.15
    shut: float = 3.0
    seen_weight: float = 0.0


@dataclass(kw_only=True)
class Training(flow_matching.Training[Recipe]):
    """Regression to true clips whose truth is told. judge: of the lips, if there is one; seen: of decoded frames."""

    judge: LipLoss | None = None
    seen: SeenLoss | None = None

    def batch(self) -> Batch:
        """As in flow matching, and told."""
        batch = super().batch()
        assert batch.told is not None
        generator = torch.Generator().manual_seed(self.draws()[1].randrange(2**31))
        wrong = torch.randn(batch.told.shape, generator=generator) * torch.tensor(usual_deviations())
        batch = replace(batch, told=batch.told + self.recipe.doubt * wrong)
        if batch.own is None:
            return batch
        stands = torch.rand(len(batch.x0), 1, 1, 1, 1, generator=generator) < self.recipe.own
        return replace(batch, x0=torch.where(stands, batch.own, batch.x0))

    def loss(self, batch: Batch) -> Tensor:
        """Squared error of the clean latents that the velocity implies from the true ones, of the lips in the window
        as the judge sees them, and what is seen of it."""
        recipe, made = self.recipe, clean(batch, predict(self.model, batch))
        weights = loss_weights(batch, recipe.mouth, recipe.eyes, recipe.past) * rare_weights(batch, recipe.rare)
        loss = weighted_mean((made - batch.true).square().mean(dim=1), weights)
        if self.judge is not None:
            loss = loss + self.judge.of_window(batch, made)
        return loss if self.seen is None else loss + self.seen.of_window(batch, made, self.draws()[1])

    def measure(self) -> dict[str, float]:
        """Error of the clean latents on held-out clips, `batches.by_level` in the steady state."""
        layout, patch = steady(self.policy), self.model.config.patch
        batch = measured_batch(self.held_out, layout, patch, self.recipe.mixture, told=True)
        return by_level(self.averaged(), batch, x0_error)


def rare_weights(batch: Batch, rare: float) -> Tensor:
    """[B, F, h, w]: `rare` at mouths whose lips touch and part within a latent and at eyes whose lids fall, else 1."""
    assert batch.told is not None
    opening, lids = (batch.told[..., HEARD.index(name)] for name in ("open", "blink"))  # [B, F, T]
    closing = (opening.amin(-1) < _TOUCH) & (opening.amax(-1) > _PART)
    falling = lids.amax(-1) > _SHUT
    cells = closing[..., None, None] * batch.mouth + falling[..., None, None] * batch.eyes
    return 1 + (rare - 1) * cells.clamp(max=1.0)


def begin(
    recipe: Recipe,
    out: Path,
    data: tuple[EncodedClips, ...],
    start: Path,
    judge: LipLoss | None = None,
    seen: SeenLoss | None = None,
) -> Training:
    """A training at step 0. The ears stay as they are; how readings are laid out over the tokens may change."""
    data, held_out = flow_matching.hold_out(data, recipe.held_out)
    model = to_be_told(load_model(start, attention=attend)).to(training_dtype())
    model.proj_model.requires_grad_(False)
    model.proj_model.proj.requires_grad_(True)
    return Training(
        recipe=recipe,
        out=out,
        learner=trainer.learner(model, recipe),
        data=data,
        held_out=held_out,
        policy=policy_named(recipe.policy),
        judge=judge,
        seen=seen,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Teach a transformer to act as it is told.")
    trainer.add_options(parser)
    parser.add_argument("--initial", type=Path, required=True, help="transformer to go on from, e.g. the packaged one")
    parser.add_argument("--rehearse", action="store_true", help="let it make all clips first, and learn from that too")
    parser.add_argument("--lips", type=Path, metavar="FILE", help="lips.safetensors of training.lips")
    options, recipe = trainer.parse(parser, Recipe, arguments)
    chosen = policy_named(recipe.policy)

    def start(data: tuple[EncodedClips, ...]) -> Training:
        if options.rehearse:
            data = with_rehearsals(data, options.clips, options.initial, options.autoencoder, chosen)
        judge = load_lip_loss(options.lips, recipe.lip_weight, recipe.shut) if options.lips else None
        weight = recipe.seen_weight
        seen = load_seen_loss(options.autoencoder, weight, options.clips) if weight else None
        return begin(recipe, options.out, data, options.initial, judge, seen)

    flow_matching.train(recipe, options.out, options.clips, options.autoencoder, start, options.resume)


if __name__ == "__main__":
    main()
