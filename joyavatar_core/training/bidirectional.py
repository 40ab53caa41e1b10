"""Trains the bidirectional model, which sees a whole clip at one noise level: the teacher of `dmd`, its real score.

    python -m joyavatar_core.training.bidirectional --initial FILE --autoencoder FILE --clips CLIPS --out DIR
        --minutes 20 [--resume]

Flow matching on whole clips (JoyAvatar-Flash 4.1: an audio-driven Wan2.1; Self-Forcing's real and fake scores): all
latents at one timestep, no mask, no cache. Audio is left out of some clips, so that guidance has something to go
away from; the loss is weighted at the mouth. In DIR the files of every training (`trainer`), but no rollout: a
bidirectional model cannot stream; its preview is made by Euler steps over a whole clip.

Shape legend: B batch, C latent channels, F latent frames of a clip, h w latent size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .. import flow
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from ..schedule import warp
from . import flow_matching, preview, trainer
from .batches import Batch, loss_weights, make_batch, predict, some_deaf, squared_error, weighted_mean, without_sound
from .encoded import EncodedClips
from .sequences import Layout

LOWEST, HIGHEST = 20.0, 980.0
"""Timesteps, after the warp, that a score is asked at (Self-Forcing)."""
_EVEN = 400.0


@dataclass(frozen=True)
class Recipe(flow_matching.Recipe):
    """The recipe of the bidirectional model.

    latents: length of a clip, whole blocks.
    """

    minutes: float = 20.0
    learning_rate: float = 1e-3
    latents: int = 21


def sample_timesteps(generator: torch.Generator, batch: int, shift: float) -> Tensor:
    """One timestep for each clip, [B], after the warp: even before it, kept within LOWEST .. HIGHEST."""
    index = 1000 * torch.rand(batch, generator=generator)
    return warp(index, shift).clamp(LOWEST, HIGHEST)  # pyright: ignore  (arithmetic: tensors pass too)


def timestep_weights(model: JoyAvatarDiT, timesteps: Tensor) -> Tensor:
    """Weights [B, F, 1, 1] of a velocity's squared error at timesteps [B, F].

    Where the model predicts clean latents its velocity is off by their error over sigma: below _EVEN the weight falls
    with sigma squared, or a few nearly clean clips would be all of the loss. 1 elsewhere.
    """
    weights = torch.ones_like(timesteps)
    if model.config.prediction == "x0":
        weights = (timesteps / _EVEN).clamp(max=1).square()
    return weights[..., None, None]


def whole_clips(policy: RolloutPolicy, latents: int) -> Layout:
    """The layout of clips without a past. ValueError when they are no whole blocks."""
    if latents % policy.block_latents:
        raise ValueError(f"latents {latents}: must be a multiple of the {policy.block_latents} of a block")
    return Layout(policy, 0, (1000.0,) * (latents // policy.block_latents))


def at_timesteps(batch: Batch, timesteps: Tensor) -> Batch:
    """The batch with one timestep [B] for all latents of each clip."""
    return replace(batch, timesteps=timesteps[:, None].expand(-1, batch.layout.latents))


@dataclass(kw_only=True)
class Training(flow_matching.Training[Recipe]):
    """Flow matching of whole clips."""

    def batch(self) -> Batch:
        """Clips from their first frame, at one timestep each, some of them without their sound."""
        common, own = self.draws()
        layout, patch = whole_clips(self.policy, self.recipe.latents), self.model.config.patch
        data, clips = self.recipe.framing.draw(self.data, layout, self.tokens, patch, (common, own))
        seed = own.randrange(2**31)
        batch = make_batch(data, layout, clips, patch, self.recipe.mixture, seed)
        generator = torch.Generator().manual_seed(seed)
        batch = at_timesteps(batch, sample_timesteps(generator, len(clips), self.policy.shift))
        return some_deaf(batch, self.recipe.drop_audio, generator)

    def loss(self, batch: Batch) -> Tensor:
        """Of the velocity, weighted at mouth and eyes."""
        v = predict(self.model, batch)
        weights = loss_weights(batch, self.recipe.mouth, self.recipe.eyes, self.recipe.past)
        weights = weights * timestep_weights(self.model, batch.timesteps)
        return weighted_mean(squared_error(batch, v), weights)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Error of the velocity on held-out clips by timestep; `deaf`: in the mouth, without sound."""
        model, clips, patch = self.averaged(), self.held_out, self.model.config.patch
        layout, scores = whole_clips(self.policy, self.recipe.latents), {}
        batch = make_batch(clips, layout, torch.arange(len(clips)), patch, self.recipe.mixture, seed=1)
        for timestep in (250.0, 500.0, 750.0, 950.0):
            heard = at_timesteps(batch, torch.full((len(clips),), timestep))
            deaf = without_sound(heard, torch.ones(len(clips), dtype=torch.bool))
            here, there = (squared_error(b, predict(model, b)) for b in (heard, deaf))
            mouth = batch.mouth.reshape_as(here)
            scores[f"all_{timestep:.0f}"] = float(here.mean())
            scores[f"mouth_{timestep:.0f}"] = float(weighted_mean(here, mouth))
            scores[f"deaf_{timestep:.0f}"] = float(weighted_mean(there, mouth))
        return {name: round(value, 4) for name, value in scores.items()}

    def show(self, model: JoyAvatarDiT, what: preview.Preview, clip: int) -> Tensor:
        """A clip of the trained length by Euler steps, without guidance."""
        return sample(model, self.policy, self.recipe, what.clips.select(slice(clip, clip + 1)))


@torch.no_grad()  # not inference_mode: RoPE tables are kept, and training uses them too
def sample(model: JoyAvatarDiT, policy: RolloutPolicy, recipe: Recipe, clip: EncodedClips, steps: int = 24) -> Tensor:
    """Latents [1, C, F, h, w] for the picture and the sound of one clip."""
    layout = whole_clips(policy, recipe.latents)
    batch = make_batch(clip, layout, torch.zeros(1, dtype=torch.long), model.config.patch, recipe.mixture, seed=0)
    x, levels = batch.noise, [warp(1000 - 1000 * i / steps, policy.shift) for i in range(steps + 1)]
    for here, there in pairwise(torch.tensor(levels)[:, None]):
        v = predict(model, at_timesteps(replace(batch, x0=x, noise=x), here))
        x = flow.euler_step(x, v, here.expand(layout.latents), there.expand(layout.latents))
    return x


def begin(recipe: Recipe, out: Path, data: tuple[EncodedClips, ...], start: Path | None = None) -> Training:
    """A training at step 0, from random weights or from a transformer's, causal or not, whose ears stay as they are."""
    state = flow_matching.begin(recipe, out, data, start=start)
    return Training(**{**vars(state), "recipe": recipe})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train the bidirectional model, the teacher, on drawn clips.")
    trainer.add_options(parser)
    parser.add_argument("--initial", type=Path, help="transformer to go on from, e.g. the one in the package")
    parser.add_argument("--drop-audio", type=float)
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
