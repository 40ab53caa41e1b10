"""Trains the embedded transformer's first weights by flow matching on drawn clips, within a budget of wall-clock time.

    python -m joyavatar_core.training.clips --out CLIPS
    python -m joyavatar_core.training.listening --out LISTENING
    python -m joyavatar_core.training.flow_matching --autoencoder FILE --projector FILE --clips CLIPS \
        --out DIR --minutes 90 [--resume]

Teacher forcing under the policy's own schedule: every sequence is one forward that inference could make, with the
true past behind a mask (`sequences`). In DIR: transformer.safetensors (averaged weights, bfloat16, ready to use),
train.pt (what --resume reads), curve.jsonl and preview.png (true above generated).

Shape legend: B batch, N clips, C latent channels, F latent frames of a sequence, h w latent size, P tokens of a
latent, W audio tokens of a latent.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..avatar import load_light_autoencoder, load_model
from ..config import MODELS
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from ..policy import policy as policy_named
from . import parallel, preview, trainer
from .batches import (
    Batch,
    Framing,
    by_level,
    loss_weights,
    make_batch,
    measured_batch,
    predict,
    some_deaf,
    squared_error,
    weighted_mean,
)
from .clips import list_clips
from .common import training_dtype
from .encoded import EncodedClips, LatentStore
from .listening import load_projector
from .sequences import Layout, attend, sample_layout, steady

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe(trainer.Recipe):
    """The recipe of flow matching.

    model: its name in config.MODELS. first_clips: clips encoded before training starts. drop_audio: odds that a
    sequence goes without its sound, so that guidance has something to go away from. told: the true readings of the
    frames stand in place of what is heard (`acting`).
    """

    model: str = "tiny"
    first_clips: int = 300
    drop_audio: float = 0.1
    told: bool = False
    framing: Framing = field(default_factory=Framing)


RecipeT = TypeVar("RecipeT", bound=Recipe)


@dataclass(kw_only=True)
class Training(trainer.Supervised[RecipeT]):
    """Flow matching on `data`, clips of one size in each part."""

    data: tuple[EncodedClips, ...]
    held_out: EncodedClips

    def batch(self) -> Batch:
        """Sequences of one layout and one size."""
        common, own = self.draws()
        layout, patch = sample_layout(common, self.policy, self.recipe.mixture), self.model.config.patch
        data, clips = self.recipe.framing.draw(self.data, layout, self.tokens, patch, (common, own))
        seed = own.randrange(2**31)
        batch = make_batch(data, layout, clips, patch, self.recipe.mixture, seed, self.recipe.told)
        return some_deaf(batch, self.recipe.drop_audio, torch.Generator().manual_seed(seed))

    def loss(self, batch: Batch) -> Tensor:
        """Of the velocity."""
        return flow_loss(batch, predict(self.model, batch), self.recipe)

    def measure(self) -> dict[str, float]:
        """See `evaluate`."""
        return evaluate(self.averaged(), self.policy, self.held_out, self.recipe)

    def clips(self) -> int:
        return sum(len(part) for part in self.data)


def flow_loss(batch: Batch, v: Tensor, recipe: trainer.Recipe) -> Tensor:
    """Weighted mean of the squared error of the velocity."""
    weights = loss_weights(batch, recipe.mouth, recipe.eyes, recipe.past)
    return weighted_mean(squared_error(batch, v), weights)


def hold_out(data: tuple[EncodedClips, ...], count: int) -> tuple[tuple[EncodedClips, ...], EncodedClips]:
    """Clips to train on, and the first `count` of the most frequent size. ValueError when there are too few."""
    if not data or len(data[0]) <= count:
        found = len(data[0]) if data else 0
        raise ValueError(f"{found} clips of one size: more than the {count} held out are needed; draw more")
    return (data[0].select(slice(count, None)), *data[1:]), data[0].select(slice(0, count))


def begin(
    recipe: Recipe,
    out: Path,
    data: tuple[EncodedClips, ...],
    projector: Path | None = None,
    start: Path | None = None,
) -> Training[Recipe]:
    """A training at step 0, from random weights or from those of a finished training (`start`).

    A projector that has learned to listen stays as it is: the given one, or that of `start`.
    """
    data, held_out = hold_out(data, recipe.held_out)
    model = load_model(start, attention=attend) if start else _fresh(recipe)
    if projector:
        load_projector(projector, model.proj_model)
    if projector or start:
        model.proj_model.requires_grad_(False)
    return Training(
        recipe=recipe,
        out=out,
        learner=trainer.learner(model.to(training_dtype()), recipe),
        data=data,
        held_out=held_out,
        policy=policy_named(recipe.policy),
    )


def _fresh(recipe: Recipe) -> JoyAvatarDiT:
    model = JoyAvatarDiT(MODELS[recipe.model], attention=attend)
    trainer.initialise(model, recipe.seed)
    return model


@torch.no_grad()  # not inference_mode: RoPE tables are kept, and training uses them too
def evaluate(model: JoyAvatarDiT, policy: RolloutPolicy, clips: EncodedClips, recipe: Recipe) -> dict[str, float]:
    """Error of the velocity on clips, `batches.by_level` in the steady state; `start` is the very first forward."""
    first = Layout(policy, 0, policy.window_steps(0)[0].timesteps)
    steady_batch, start = (
        measured_batch(clips, layout, model.config.patch, recipe.mixture, recipe.told)
        for layout in (steady(policy), first)
    )
    scores = by_level(model, steady_batch, squared_error)
    return scores | {"start": round(float(squared_error(start, predict(model, start)).mean()), 4)}


def grow(state: Training[Any], store: LatentStore) -> None:
    """Take in the clips encoded since; not beside rehearsals, of which these have none."""
    if any(part.own is not None for part in state.data):
        return
    if len(store.ready()) > state.recipe.held_out + state.clips():
        state.data, _ = hold_out(store.load(), state.recipe.held_out)
        log.info("training on %d clips", state.clips())


def train(
    recipe: Recipe,
    out: Path,
    clips: Path,
    autoencoder: Path,
    start: Callable[[tuple[EncodedClips, ...]], Training[Any]],
    again: bool = False,
) -> None:
    """Train for recipe.minutes of wall-clock time, or for recipe.steps (all sessions together).

    start: makes the training at step 0 on the clips there are. By the clock it begins with the first clips encoded
    and a worker encodes the rest meanwhile; by steps all are encoded before, so that the run can be repeated.
    """
    out.mkdir(parents=True, exist_ok=True)
    decoder, patch = load_light_autoencoder(autoencoder), MODELS[recipe.model].patch
    store = LatentStore(list_clips(clips), clips, autoencoder, patch)
    if not parallel.rank():
        store.encode(None if recipe.steps else recipe.held_out + recipe.first_clips)
    parallel.wait()
    state = start(store.load())
    if again:
        trainer.resume(state)
    show = preview.choose(state.held_out, clips, decoder, patch)
    with contextlib.nullcontext() if parallel.rank() or recipe.steps else store.worker():
        trainer.loop(state, show, lambda: grow(state, store))
    trainer.finish(state, show)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train the embedded transformer on drawn clips.")
    trainer.add_options(parser)
    parser.add_argument("--projector", type=Path, help="projector.safetensors of training.listening")
    parser.add_argument("--initial", type=Path, help="transformer to go on from, e.g. the one in the package")
    parser.add_argument("--drop-audio", type=float)
    options, recipe = trainer.parse(parser, Recipe, arguments)
    train(
        recipe,
        options.out,
        options.clips,
        options.autoencoder,
        lambda data: begin(recipe, options.out, data, options.projector, options.initial),
        options.resume,
    )


if __name__ == "__main__":
    main()
