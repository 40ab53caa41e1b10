"""Teaches the transformer its own flow in few steps: regression on ODE trajectories at the levels of PSB.

    python -m joyavatar_core.training.ode_regression --teacher FILE --autoencoder FILE --clips CLIPS --out DIR
        --pairs 300 --minutes 20 [--lips FILE] [--initial FILE] [--resume]

The stage between `flow_matching` and distillation (CausVid; Self-Forcing's ODE start; JoyAvatar-Flash section 4.1).
The teacher, a transformer of `flow_matching`, rolls out every clip in many Euler steps (`trajectories`; files beside
the clips, those that are there are skipped). The student begins with the teacher's weights and learns to say from
every level, in one step, where the trajectory ends. A judge of lips (`lips`) may have a say: then what the student
shows of a mouth also has to read as the sound asks, whatever the teacher made of it. In DIR the files of every training
(`trainer`).

Shape legend: B batch, C latent channels, F latent frames of a sequence, h w latent size.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..avatar import load_light_autoencoder, load_model
from ..policy import policy as policy_named
from . import parallel, preview, trainer
from .batches import (
    Batch,
    Framing,
    by_level,
    clean,
    draw_clips,
    make_batch,
    measured_batch,
    other_voices,
    predict,
    regression_loss,
    x0_error,
)
from .clips import list_clips
from .common import record, training_dtype
from .encoded import EncodedClips, LatentStore
from .flow_matching import hold_out
from .lips import LipLoss, load_lip_loss
from .listening import load_projector
from .sequences import Layout, attend, sample_layout, steady
from .trajectories import Pairs, PairStore


@dataclass(frozen=True)
class Recipe(trainer.Recipe):
    """The recipe of the regression.

    pairs: trajectories, one of each of the first clips. ode_steps: Euler steps of a trajectory, a multiple of the
    number of PSB levels. guidance: of the trajectories, from deaf to hearing, 1: not beyond; the student has it for
    nothing. flow_share: odds that a batch is one of true clips, against drift; of all clips that are encoded.
    voices: how far the spectra of the sound are stretched, `batches.other_voices`; for log-mel tokens alone.
    lip_weight: of the judge's loss; shut: how much more frames count in which lips touch (`lips.LipLoss`).
    """

    minutes: float = 20.0
    learning_rate: float = 3e-4
    pairs: int = 300
    ode_steps: int = 24
    guidance: float = 2.0
    flow_share: float = 0.1
    framing: Framing = field(default_factory=lambda: Framing(close_ups=0.0))
    voices: float = 0.0
    lip_weight: float = 0.05
    shut: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.flow_share <= 1:
            raise ValueError(f"flow_share {self.flow_share} must be in 0..1")


@dataclass(kw_only=True)
class Training(trainer.Supervised[Recipe]):
    """Regression on `pairs`, and a little flow matching on the true clips, `data`; a part for each size.

    judge: of the lips, if there is one.
    """

    data: tuple[EncodedClips, ...]
    pairs: tuple[Pairs, ...]
    held_out: Pairs
    judge: LipLoss | None = None

    def batch(self) -> Batch:
        """Sequences of one layout and one size, on the trajectories or, now and then, as in flow matching."""
        batch, audio = self._batch(), self.model.config.audio
        if not self.recipe.voices or audio is None:
            return batch
        _, own = self.draws()
        generator = torch.Generator().manual_seed(random.Random(f"voices {own.random()}").randrange(2**31))
        return other_voices(batch, audio.columns, self.recipe.voices, generator)

    def _batch(self) -> Batch:
        (common, own), mixture = self.draws(), self.recipe.mixture
        truth = common.random() < self.recipe.flow_share
        layout, patch = sample_layout(common, self.policy, mixture), self.model.config.patch
        if truth:
            data, clips = self.recipe.framing.draw(self.data, layout, self.tokens, patch, (common, own))
            return make_batch(data, layout, clips, patch, mixture, own.randrange(2**31))
        (pairs,) = common.choices(self.pairs, [len(part) for part in self.pairs])
        seed = own.randrange(2**31)
        clips = draw_clips(own, layout, [1.0] * len(pairs), self.tokens, pairs.clips.tokens(patch))
        return pairs.on_trajectory(make_batch(pairs.clips, layout, clips, patch, replace(mixture, exact=1.0), seed))

    def loss(self, batch: Batch) -> Tensor:
        """Of the clean latents, and of the lips in the window."""
        v = predict(self.model, batch)
        loss = regression_loss(batch, v, self.recipe.mouth, self.recipe.eyes, self.recipe.past)
        return loss if self.judge is None else loss + self.judge.of_window(batch, clean(batch, v))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Error of the clean latents on held-out trajectories, `batches.by_level` at all levels of PSB."""
        model, policy, scores = self.averaged(), self.policy, {}
        bootstrapped = policy.window_steps(policy.lead_blocks)[-1].timesteps
        for layout in (Layout(policy, 0, bootstrapped), steady(policy)):
            batch = measured_batch(self.held_out.clips, layout, model.config.patch, self.recipe.mixture)
            scores |= by_level(model, self.held_out.on_trajectory(batch), x0_error)
        return scores

    def clips(self) -> int:
        return sum(len(part) for part in self.pairs)


def begin(
    recipe: Recipe,
    out: Path,
    data: tuple[EncodedClips, ...],
    paired: tuple[EncodedClips, ...],
    store: PairStore,
    start: Path | None = None,
    projector: Path | None = None,
) -> Training:
    """A student at step 0, with the teacher's weights or those of `start`.

    data: true clips; paired: the clips whose pairs are there. Of each the same are held out. What the student hears
    with, its audio projector or the given one, stays as it is.
    """
    (data, _), (paired, held_out) = (hold_out(clips, recipe.held_out) for clips in (data, paired))
    model = load_model(start or store.teacher, attention=attend)
    if projector:
        load_projector(projector, model.proj_model)
    model = model.to(training_dtype())
    model.proj_model.requires_grad_(False)
    return Training(
        recipe=recipe,
        out=out,
        learner=trainer.learner(model, recipe),
        policy=store.policy,
        data=data,
        pairs=tuple(store.load(part) for part in paired),
        held_out=store.load(held_out),
    )


def make_pairs(store: PairStore, data: tuple[EncodedClips, ...], spatial: int) -> None:
    """The trajectories of all clips; spatial: pixels of a latent cell."""
    model = load_model(store.teacher).to(training_dtype()).eval().requires_grad_(False)
    for clips in data:
        store.make(model, clips, clips.geometry(spatial, model.config.patch, store.policy.block_latents))


def train(
    recipe: Recipe,
    out: Path,
    clips: Path,
    autoencoder: Path,
    teacher: Path,
    again: bool = False,
    *,
    lips: Path | None = None,
    start: Path | None = None,
    projector: Path | None = None,
) -> None:
    """Make the pairs that are missing, then train for recipe.minutes of wall-clock time (all sessions together).

    The policy is the teacher's. lips: file of a judge; start: student to go on from; projector: other ears for it.
    ValueError when there are fewer clips than pairs wanted.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = list_clips(clips)
    if len(paths) < recipe.pairs:
        raise ValueError(f"{recipe.pairs} pairs need as many clips, {clips} has {len(paths)}: draw more or take fewer")
    recipe = replace(recipe, policy=checkpoint.read(teacher)[1].get("policy", recipe.policy))
    decoder, patch = load_light_autoencoder(autoencoder), load_model(teacher).config.patch
    latents = LatentStore(paths, clips, autoencoder, patch)
    if not parallel.rank():
        latents.encode(recipe.pairs)
    parallel.wait()
    data, paired = latents.load(), replace(latents, paths=paths[: recipe.pairs]).load()
    store = PairStore(clips, teacher, policy_named(recipe.policy), recipe.ode_steps, recipe.guidance)
    make_pairs(store, paired, decoder.spatial)
    parallel.wait()
    state = begin(recipe, out, data, paired, store, start, projector)
    if lips:
        state.judge = load_lip_loss(lips, recipe.lip_weight, recipe.shut)
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
    parser.add_argument("--initial", type=Path, help="student to go on from, in place of the teacher's weights")
    parser.add_argument("--projector", type=Path, help="projector.safetensors of training.listening, other ears for it")
    parser.add_argument("--lips", type=Path, metavar="FILE", help="lips.safetensors of training.lips")
    options, recipe = trainer.parse(parser, Recipe, arguments)
    folders = (options.out, options.clips, options.autoencoder, options.teacher)
    train(recipe, *folders, options.resume, lips=options.lips, start=options.initial, projector=options.projector)


if __name__ == "__main__":
    main()
