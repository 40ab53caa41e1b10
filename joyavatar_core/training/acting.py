"""Teaches a transformer to act as it is told: the truth of every frame stands where its ears' readings will.

    python -m joyavatar_core.training.acting --initial TRANSFORMER --autoencoder FILE --clips CLIPS --out DIR
        --minutes 90 [--resume]

Ears err, and of a glance or a sway they know nothing. A transformer that learns from them learns to doubt them: lips
open half, lids and eyes smear. Here it is told the true opening, lids, gaze and head of every pixel frame (`manner`),
so that there is nothing left to guess, and a regression at the levels of the rollout, with the true past behind a mask
(`sequences`), says all there is to say. Later its ears tell it, as good as they are; what they cannot know is drawn.
In DIR the files of every training (`trainer`).

Shape legend: B batch, F latent frames of a sequence, T pixel frames of a latent, K readings, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..avatar import load_model
from ..config import AudioConfig
from ..manner import LIMITS, usual_deviations
from ..model import JoyAvatarDiT
from ..policy import policy as policy_named
from . import flow_matching, trainer
from .batches import Batch, Framing, by_level, measured_batch, predict, regression_loss, x0_error
from .common import training_dtype
from .encoded import EncodedClips
from .sequences import Layout, attend


@dataclass(frozen=True)
class Recipe(flow_matching.Recipe):
    """The recipe of flow matching. doubt: how far from the truth it is told, in usual deviations, for ears err."""

    minutes: float = 90.0
    learning_rate: float = 1e-3
    drop_audio: float = 0.0
    told: bool = True
    eyes: float = 6.0
    framing: Framing = field(default_factory=lambda: Framing(close_ups=0.4, close_up=(12,), small_mouths=0.5))
    doubt: float = 0.1


@dataclass(kw_only=True)
class Training(flow_matching.Training[Recipe]):
    """Regression to true clips whose truth is told."""

    def batch(self) -> Batch:
        """As in flow matching, and told."""
        batch = super().batch()
        assert batch.told is not None
        generator = torch.Generator().manual_seed(self.draws()[1].randrange(2**31))
        wrong = torch.randn(batch.told.shape, generator=generator) * torch.tensor(usual_deviations())
        return replace(batch, told=batch.told + self.recipe.doubt * wrong)

    def loss(self, batch: Batch) -> Tensor:
        """Squared error of the clean latents."""
        return regression_loss(batch, predict(self.model, batch), self.recipe.mouth, self.recipe.eyes, self.recipe.past)

    def measure(self) -> dict[str, float]:
        """Error of the clean latents on held-out clips, `batches.by_level` in the steady state."""
        context = self.policy.context_blocks
        window = self.policy.window_steps(context + self.policy.lead_blocks)[-1]
        steady = Layout(self.policy, context, window.timesteps)
        batch = measured_batch(self.held_out, steady, self.model.config.patch, self.recipe.mixture, told=True)
        return by_level(self.averaged(), batch, x0_error)


def to_be_told(model: JoyAvatarDiT) -> JoyAvatarDiT:
    """The model with places for what is drawn beside what it hears; these are without effect at first.

    ValueError for a model that does not hear by readings.
    """
    audio = model.config.audio
    if audio is None or audio.kind != "window":
        raise ValueError("only a model with a projector of log-mel windows can be told readings: give one of those")
    if audio.limits:
        return model
    wider = JoyAvatarDiT(replace(model.config, audio=replace(audio, limits=LIMITS)), attention=attend)
    weights = model.state_dict()
    weights["proj_model.proj.weight"] = _with_drawn(weights["proj_model.proj.weight"], audio)
    wider.load_state_dict(weights)
    return wider


def _with_drawn(weight: Tensor, audio: AudioConfig) -> Tensor:
    """[D, T K heard] -> [D, T K], zero for what is drawn."""
    heard = weight.unflatten(1, (audio.frames_read, audio.readings))
    return F.pad(heard, (0, len(LIMITS) - audio.readings)).flatten(1)


def begin(recipe: Recipe, out: Path, data: tuple[EncodedClips, ...], start: Path) -> Training:
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
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Teach a transformer to act as it is told.")
    trainer.add_options(parser)
    parser.add_argument("--initial", type=Path, required=True, help="transformer to go on from, e.g. the packaged one")
    options, recipe = trainer.parse(parser, Recipe, arguments)
    flow_matching.train(
        recipe,
        options.out,
        options.clips,
        options.autoencoder,
        lambda data: begin(recipe, options.out, data, options.initial),
        options.resume,
    )


if __name__ == "__main__":
    main()
