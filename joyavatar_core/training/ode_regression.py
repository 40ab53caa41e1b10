"""Teaches the transformer its own flow in few steps: regression on ODE trajectories at the levels of PSB.

    python -m joyavatar_core.training.ode_regression --teacher FILE --autoencoder FILE --clips CLIPS --out DIR
        --pairs 300 --minutes 20 [--resume]

The stage between `flow_matching` and distillation (CausVid; Self-Forcing's ODE start; JoyAvatar-Flash section 4.1).
The teacher, a transformer of `flow_matching`, rolls out every clip in many Euler steps (`trajectories`; files beside
the clips, those that are there are skipped). The student begins with the teacher's weights and learns to say from
every level, in one step, where the trajectory ends. In DIR the files of every training (`trainer`).

Shape legend: B batch, C latent channels, F latent frames of a sequence, h w latent size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..avatar import load_light_autoencoder, load_model
from ..geometry import Geometry
from ..policy import policy as policy_named
from . import parallel, preview, trainer
from .batches import (
    Batch,
    by_level,
    draw_clips,
    loss_weights,
    make_batch,
    measured_batch,
    predict,
    weighted_mean,
    x0_error,
)
from .clips import list_clips
from .common import record
from .encoded import EncodedClips, LatentStore
from .flow_matching import hold_out
from .sequences import Layout, attend, sample_layout
from .trajectories import Pairs, PairStore


@dataclass(frozen=True)
class Recipe(trainer.Recipe):
    """The recipe of the regression.

    pairs: trajectories, one of each of the first clips. ode_steps: Euler steps of a trajectory, a multiple of the
    number of PSB levels. guidance: of the trajectories, from deaf to hearing, 1: not beyond; the student has it for
    nothing. flow_share: odds that a batch is one of flow matching on the true clips, against drift.
    """

    minutes: float = 20.0
    learning_rate: float = 3e-4
    pairs: int = 300
    ode_steps: int = 24
    guidance: float = 2.0
    flow_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.flow_share <= 1:
            raise ValueError(f"flow_share {self.flow_share} must be in 0..1")


@dataclass(kw_only=True)
class Training(trainer.Supervised[Recipe]):
    """Regression on `pairs`, and a little flow matching on the clips they were made of.

    data and pairs have the same clips, one part for each size.
    """

    data: tuple[EncodedClips, ...]
    pairs: tuple[Pairs, ...]
    held_out: Pairs

    def batch(self) -> Batch:
        """Sequences of one layout and one size, on the trajectories or, now and then, as in flow matching."""
        (common, own), mixture = self.draws(), self.recipe.mixture
        truth = common.random() < self.recipe.flow_share
        layout, patch = sample_layout(common, self.policy, mixture), self.model.config.patch
        (part,) = common.choices(range(len(self.data)), [len(data) for data in self.data])
        data, pairs, seed = self.data[part], self.pairs[part], own.randrange(2**31)
        clips = draw_clips(own, layout, len(data), self.tokens, data.tokens(patch))
        if truth:
            return make_batch(data, layout, clips, patch, mixture, seed)
        return pairs.on_trajectory(make_batch(pairs.clips, layout, clips, patch, replace(mixture, exact=1.0), seed))

    def loss(self, batch: Batch) -> Tensor:
        """Of the clean latents."""
        return regression_loss(batch, predict(self.model, batch), self.recipe)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Error of the clean latents on held-out trajectories, `batches.by_level` at all levels of PSB."""
        model, policy, scores = self.averaged(), self.policy, {}
        context = policy.context_blocks
        steady = policy.window_steps(context + policy.lead_blocks)[-1].timesteps
        bootstrapped = policy.window_steps(policy.lead_blocks)[-1].timesteps
        for layout in (Layout(policy, 0, bootstrapped), Layout(policy, context, steady)):
            batch = measured_batch(self.held_out.clips, layout, model.config.patch, self.recipe.mixture)
            scores |= by_level(model, self.held_out.on_trajectory(batch), x0_error)
        return scores

    def clips(self) -> int:
        return sum(len(part) for part in self.pairs)


def regression_loss(batch: Batch, v: Tensor, recipe: trainer.Recipe) -> Tensor:
    """Weighted mean of the squared error of the clean latents."""
    return weighted_mean(x0_error(batch, v), loss_weights(batch, recipe.mouth, recipe.eyes, recipe.past))


def begin(recipe: Recipe, out: Path, data: tuple[EncodedClips, ...], store: PairStore) -> Training:
    """A student at step 0, with the teacher's weights; the pairs of all clips must be there.

    What the teacher hears, its audio projector, stays as it is.
    """
    data, held_out = hold_out(data, recipe.held_out)
    model = load_model(store.teacher, attention=attend).bfloat16()
    model.proj_model.requires_grad_(False)
    return Training(
        recipe=recipe,
        out=out,
        learner=trainer.learner(model, recipe),
        policy=store.policy,
        data=data,
        pairs=tuple(store.load(part) for part in data),
        held_out=store.load(held_out),
    )


def make_pairs(store: PairStore, data: tuple[EncodedClips, ...], spatial: int) -> None:
    """The trajectories of all clips; spatial: pixels of a latent cell."""
    model = load_model(store.teacher).bfloat16().eval().requires_grad_(False)
    for clips in data:
        height, width = (cells * spatial for cells in clips.latents.shape[-2:])
        geometry = Geometry(
            width, height, block_latents=store.policy.block_latents, spatial=spatial, patch=model.config.patch
        )
        store.make(model, clips, geometry)


def train(recipe: Recipe, out: Path, clips: Path, autoencoder: Path, teacher: Path, again: bool = False) -> None:
    """Make the pairs that are missing, then train for recipe.minutes of wall-clock time (all sessions together).

    The policy is the teacher's. ValueError when there are fewer clips than pairs wanted.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = list_clips(clips)
    if len(paths) < recipe.pairs:
        raise ValueError(f"{recipe.pairs} pairs need as many clips, {clips} has {len(paths)}: draw more or take fewer")
    recipe = replace(recipe, policy=checkpoint.read(teacher)[1].get("policy", recipe.policy))
    decoder, patch = load_light_autoencoder(autoencoder), load_model(teacher).config.patch
    latents = LatentStore(paths[: recipe.pairs], clips, autoencoder, patch)
    if not parallel.rank():
        latents.encode()
    parallel.wait()
    data, store = (
        latents.load(),
        PairStore(clips, teacher, policy_named(recipe.policy), recipe.ode_steps, recipe.guidance),
    )
    make_pairs(store, data, decoder.spatial)
    parallel.wait()
    state = begin(recipe, out, data, store)
    if again:
        trainer.resume(state)
    elif not parallel.rank():
        record(out / "curve.jsonl", {"step": 0, "minutes": 0.0, **state.measure()})
    show = preview.choose(state.held_out.clips, clips, decoder, patch)
    trainer.loop(state, show, lambda: None)
    trainer.finish(state, show)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Regress a transformer on the ODE trajectories of its teacher.")
    trainer.add_options(parser)
    parser.add_argument("--teacher", type=Path, required=True, help="transformer.safetensors of flow_matching")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--ode-steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--flow-share", type=float)
    options, recipe = trainer.parse(parser, Recipe, arguments)
    train(recipe, options.out, options.clips, options.autoencoder, options.teacher, options.resume)


if __name__ == "__main__":
    main()
