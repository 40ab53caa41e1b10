"""Teaches a finished generator to shape its mouths as it hears them, and to leave all else as it was.

    python -m joyavatar_core.training.articulation --initial GENERATOR --autoencoder FILE --clips CLIPS --out DIR
        --minutes 60 [--resume]

What lips do follows almost wholly from the sound, once the ears are good (`listening`): about the mouth a regression
to true clips, at the levels of the rollout and with the true past behind a mask (`sequences`), says all there is to
say. Heads and lids are not settled by the sound, and a regression would still them: there the generator is held to its
own answers of before. In DIR the files of every training (`trainer`).

Shape legend: B batch, C latent channels, F latent frames of a sequence, h w latent size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model import JoyAvatarDiT
from . import flow_matching, trainer
from .batches import Batch, clean, loss_weights, predict, weighted_mean
from .encoded import EncodedClips


@dataclass(frozen=True)
class Recipe(flow_matching.Recipe):
    """The recipe of flow matching. mouth: weight of the truth there against that of the answers of before elsewhere."""

    minutes: float = 60.0
    optimiser: str = "adamw"
    learning_rate: float = 3e-4
    average: float = 0.995
    drop_audio: float = 0.0


@dataclass(kw_only=True)
class Training(flow_matching.Training[Recipe]):
    """before: the generator as it was."""

    before: JoyAvatarDiT

    def loss(self, batch: Batch) -> Tensor:
        """Squared error of the clean latents: of the true ones about the mouth, of those of before elsewhere."""
        with torch.no_grad():
            kept = clean(batch, predict(self.before, batch))
        made = clean(batch, predict(self.model, batch))
        wrong, moved = ((made - target).square().mean(dim=1) for target in (batch.x0, kept))
        error = self.recipe.mouth * batch.mouth * wrong + (1 - batch.mouth) * moved
        return weighted_mean(error, loss_weights(batch, 1.0, 1.0, self.recipe.past))


def begin(recipe: Recipe, out: Path, data: tuple[EncodedClips, ...], start: Path) -> Training:
    """A training at step 0. The ears stay as they are; how their readings are laid out over the tokens may change."""
    state = flow_matching.begin(recipe, out, data, start=start)
    before = state.averaged()
    state.model.proj_model.proj.requires_grad_(True)
    return Training(**{**vars(state), "recipe": recipe}, before=before)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Teach a generator to shape its mouths as it hears them.")
    trainer.add_options(parser)
    parser.add_argument("--initial", type=Path, required=True, help="generator, e.g. the one in the package")
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
