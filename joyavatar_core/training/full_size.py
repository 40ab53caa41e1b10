"""The stages of the full size: the same losses and rollouts as the embedded model's, on shards and over all processes.

    torchrun --nproc-per-node 8 -m joyavatar_core.cli.main train bidirectional --config bidirectional-1.3b \
        --data SHARDS --initial wan_i2v_1.3b.safetensors --out DIR

`bidirectional` starts from Wan2.1 image-to-video, whose audio and face branches may be missing. `flow` trains such a
model on under a block-causal mask, every block at a noise level of its own (diffusion forcing): a causal start without
pairs. `ode` lets the teacher follow its flow from noise to clip (files in `pairs-*` of DIR, those there are skipped)
and trains the generator, under that mask, to say from every level of PSB where the trajectory ends. `dmd` distils.
Data is what `joyavatar prepare` wrote.

Shape legend: B batch, C latent channels, F latent frames of a clip, h w latent size, L tokens, n levels of PSB.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import checkpoint, flow
from ..attention import sdpa
from ..autoencoder import TEMPORAL
from ..avatar import load_autoencoder, takes_reference_tokens
from ..conditioning import ImageChannels, reference_tokens
from ..config import MODELS
from ..model import JoyAvatarDiT
from ..policy import policy as policy_named
from ..schedule import levels, warp
from . import distributed, dmd, flow_matching, ode_regression, parallel, trainer
from .batches import weighted_mean
from .bidirectional import sample_timesteps, timestep_weights
from .common import check_start
from .inputs import Inputs, guided, velocity
from .presets import Stage
from .shards import BatchStream, Sample, ShardBatch, ShardIndex

log = logging.getLogger(__name__)

_UNUSED = {
    "bidirectional": (),
    "flow": (),
    "ode": ("flow_share", "voices", "lip_weight", "shut"),
    "dmd": ("drop_audio", "guidance_elsewhere", "new_speech", "regression", "lip_weight", "shut"),
}
"""Values of the recipes that only the embedded model's trainers know, by stage, beside _NOWHERE."""
_NOWHERE = ("tokens", "past", "held_out", "mixture", "framing", "first_clips", "told")


@dataclass(frozen=True)
class Files:
    """Where a training reads and writes. data: prepared folders; initial: of the model in training, read as one;
    teacher: of the frozen one; critic: of the fake score, None: as the generator.
    """

    out: Path
    data: tuple[Path, ...]
    initial: tuple[Path, ...] = ()
    teacher: tuple[Path, ...] = ()
    critic: tuple[Path, ...] = ()
    autoencoder: Path | None = None


@dataclass(frozen=True)
class Given:
    """What a batch of clips gives: inputs of the models, the clean latents [B, C, F, h, w] and the weights
    [B, F, h, w] of a loss on them.
    """

    inputs: Inputs
    latents: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Source:
    """The clips of every step, for a model of `config`, on the device of a mesh."""

    stream: BatchStream
    model: JoyAvatarDiT
    device: torch.device
    mouth: float
    eyes: float

    def at(self, step: int, count: int) -> Given:
        """The first `count` latents of the clips of a step. ValueError where something the model takes is missing."""
        return self.given(self.stream.index.batch(self.stream.samples_at(step)), count)

    def given(self, batch: ShardBatch, count: int) -> Given:
        clips, config, rows = batch.clips, self.model.config, torch.arange(len(batch.keys))
        if clips.latents.shape[1] < count:
            raise ValueError(f"clips of {clips.latents.shape[1]} latents: {count} are needed; prepare longer ones")
        if clips.latents.shape[2] != config.out_channels:
            raise ValueError(f"latents of {clips.latents.shape[2]} channels, the model's have {config.out_channels}")
        channels = clips.image_channels(rows, torch.arange(count).expand(len(rows), -1), TEMPORAL)
        text = negative = None
        if config.text_dim:
            text = _there("text", batch.text).float()
            negative = _there("negative prompt", batch.negative)[None].float().expand(len(rows), -1, -1)
        valid = batch.audio_valid[:, :count].any(0)
        inputs = Inputs(
            picture=self._picture(batch),
            channels=ImageChannels(channels.to(self.device)) if config.has_image_channels else None,
            audio=clips.audio[:, :count].float().to(self.device) if config.audio else None,
            text=None if text is None else text.to(self.device),
            face=batch.face.to(self.device) if config.face else None,
            valid=None if bool(valid.all()) else valid.to(self.device),
            negative=None if negative is None else negative.to(self.device),
        )
        weights = (
            1 + (self.mouth - 1) * clips.mouth[:, :count].float() + (self.eyes - 1) * clips.eyes[:, :count].float()
        )
        latents = clips.latents[:, :count].float().transpose(1, 2)
        return Given(inputs, latents.to(self.device), (weights / weights.mean()).to(self.device))

    def _picture(self, batch: ShardBatch) -> Tensor | None:
        config = self.model.config
        if not config.image_dim:
            return None
        if takes_reference_tokens(config):
            return reference_tokens(batch.clips.image[:, 0].float(), config.patch).to(self.device)
        return _there("CLIP-vision tokens", batch.clip_vision).float().to(self.device)


def _there(what: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"the model takes {what}, the shards have none: prepare them again with its encoder")
    return tensor


def dropped(inputs: Inputs, odds: float, generator: torch.Generator) -> Inputs:
    """The inputs with zeros for the sound, the text and the face of some clips, each by itself."""

    def drop(tensor: Tensor | None) -> Tensor | None:
        keep = torch.rand(inputs.batch, generator=generator) >= odds
        return None if tensor is None else tensor * keep.to(tensor).reshape(-1, *(1,) * (tensor.dim() - 1))

    return replace(inputs, audio=drop(inputs.audio), text=drop(inputs.text), face=drop(inputs.face))


# Flow matching


@dataclass(kw_only=True)
class OnShards(trainer.Training[trainer.RecipeT]):
    """A training on shards."""

    source: Source

    def clips(self) -> int:
        return len(self.source.stream.index)

    def measure(self) -> dict[str, float]:
        """Nothing: the saved files are measured, with joyavatar evaluate."""
        return {}


@dataclass(kw_only=True)
class FlowMatching(OnShards[flow_matching.Recipe]):
    """Flow matching of clips of `latents`: in `parts` equal parts, each at a timestep of its own.

    One part is the bidirectional model. Blocks as parts, each of which sees itself and earlier ones at their levels,
    are diffusion forcing (Chen et al. 2024; Live Avatar 4.2, stage 1).
    """

    latents: int
    parts: int = 1

    def step(self) -> dict[str, float]:
        _, own = self.draws()
        given = self.source.at(self.steps, self.latents)
        generator = torch.Generator().manual_seed(own.randrange(2**31))
        x0 = given.latents
        timesteps = self.timesteps(generator, len(x0)).to(x0)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        inputs = dropped(given.inputs, self.recipe.drop_audio, generator)
        mask = None if self.parts == 1 else torch.ones(self.parts, self.parts, dtype=torch.bool).tril()
        v = velocity(self.model, flow.add_noise(x0, noise, timesteps), timesteps, inputs, mask)
        weights = given.weights * timestep_weights(self.model, timesteps)
        loss = weighted_mean((v - flow.velocity(x0, noise)).square().mean(dim=1), weights)
        loss.backward()
        norm = self.learner.update(self.recipe, self.rate_scale, self.steps)
        return {"loss": loss.item(), "norm": norm, "latents": float(_latents(x0))}

    def timesteps(self, generator: torch.Generator, clips: int) -> Tensor:
        """[clips, latents], the same within a part."""
        drawn = sample_timesteps(generator, clips * self.parts, self.policy.shift).view(clips, self.parts)
        return drawn.repeat_interleave(self.latents // self.parts, 1)


def _latents(x: Tensor) -> int:
    """Latents of all processes."""
    return x.shape[0] * x.shape[2] * parallel.world()


# ODE start


def block_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """An attention.AttentionFn: under a lower triangular mask [blocks, blocks] each block sees itself and earlier ones.

    Half the work of a mask of tokens, and no such mask in memory. q, k, v [B, L, heads, D].
    """
    if mask is None or mask.dim() != 2:  # that of audio tokens has four dimensions
        return sdpa(q, k, v, mask)
    n = q.shape[1] // len(mask)
    return torch.cat([sdpa(q[:, i : i + n], k[:, : i + n], v[:, : i + n]) for i in range(0, q.shape[1], n)], dim=1)


@dataclass(kw_only=True)
class Regression(OnShards[ode_regression.Recipe]):
    """Regression on pairs: every block at a level of its own, the clean end among them, sees its past at theirs."""

    pairs: Path
    latents: int

    def step(self) -> dict[str, float]:
        _, own = self.draws()
        samples = self.source.stream.samples_at(self.steps)
        given = self.source.given(self.source.stream.index.batch(samples), self.latents)
        paths = [pair_path(self.pairs, sample) for sample in samples]
        states = torch.stack([checkpoint.read(path)[0]["states"] for path in paths]).to(
            given.latents
        )  # [B, n + 1, ...]
        n, end = self.policy.block_latents, states[:, -1]
        generator = torch.Generator().manual_seed(own.randrange(2**31))
        count = states.shape[1]
        chosen = torch.randint(count, (len(states), self.latents // n), generator=generator).repeat_interleave(n, 1)
        here = torch.tensor([*(warp(t, self.policy.shift) for t in levels(self.policy.timesteps)), 0.0])[chosen].to(end)
        index = chosen.to(end.device)[:, None, None, :, None, None].expand(-1, 1, *end.shape[1:])
        x_t = states.gather(1, index)[:, 0]
        mask = torch.ones(self.latents // n, self.latents // n, dtype=torch.bool).tril()
        x0 = flow.to_x0(x_t, velocity(self.model, x_t, here, given.inputs, mask), here)
        weights = given.weights * (here > 0)[:, :, None, None]
        loss = weighted_mean((x0 - end).square().mean(dim=1), weights.clamp(min=1e-9))
        loss.backward()
        norm = self.learner.update(self.recipe, self.rate_scale, self.steps)
        return {"loss": loss.item(), "norm": norm, "latents": float(_latents(end))}


def pairs_folder(stage: Stage, recipe: ode_regression.Recipe, files: Files) -> Path:
    """Where trajectories lie: another teacher, policy, length, number of steps or guidance has another place."""
    made = 0
    if not parallel.rank():  # the teacher's file may be large
        teacher = [checkpoint.sha256_of(path) for path in files.teacher]
        facts = f"{teacher} {policy_named(recipe.policy)} {stage.clip.latents} {recipe.ode_steps} {recipe.guidance}"
        made = int(hashlib.sha256(facts.encode()).hexdigest()[:12], 16)  # 48 bits: a float64 holds them
    return files.out / f"pairs-{int(parallel.agreed(made)):012x}"


def pair_path(folder: Path, sample: Sample) -> Path:
    """Where the trajectory of a sample lies. Prepared folders may have samples of one key: a video in two sizes."""
    home = hashlib.sha256(str(sample.shard.parent.resolve()).encode()).hexdigest()[:8]
    return folder / f"{sample.key}-{home}.safetensors"


@torch.no_grad()
def make_pairs(teacher: JoyAvatarDiT, source: Source, folder: Path, recipe: ode_regression.Recipe, count: int) -> None:
    """Trajectories of recipe.pairs samples, `count` latents long, from noise that the sample's key decides.

    All processes work at once, each on samples of its own. Levels as float16: [n + 1, C, F, h, w], the last one clean.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = [sample for group in _first(source.stream.index, recipe.pairs).groups for sample in group]
    parallel.wait()
    left = [sample for sample in samples if not pair_path(folder, sample).exists()]
    parallel.wait()  # before anybody writes: all must see the same
    world, rank = parallel.world(), parallel.rank()
    for first in range(0, len(left), world):
        sample = left[min(first + rank, len(left) - 1)]  # the last round may have too few: they work in vain
        given = source.given(source.stream.index.batch([sample]), count)
        states = trajectory(teacher, given, recipe, _seed(sample.key))
        if first + rank < len(left):
            checkpoint.write(pair_path(folder, sample), {"states": states.half()}, {"key": sample.key})
    parallel.wait()


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


def trajectory(teacher: JoyAvatarDiT, given: Given, recipe: ode_regression.Recipe, seed: int) -> Tensor:
    """States [n + 1, C, F, h, w] of one clip at the levels of PSB and at its end: Euler steps, all latents together."""
    rules = policy_named(recipe.policy)
    every, x = recipe.ode_steps // len(levels(rules.timesteps)), given.latents
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    steps = [warp(1000 - 1000 * i / recipe.ode_steps, rules.shift) for i in range(recipe.ode_steps + 1)]
    kept = []
    for i, (here, there) in enumerate(pairwise(steps)):
        if i % every == 0:
            kept.append(x)
        at, after = (x.new_full((1, x.shape[2]), t) for t in (here, there))
        x = flow.euler_step(x, guided(teacher, x, at, given.inputs, recipe.guidance), at, after)
    return torch.cat([*kept, x])


# Distillation


@dataclass(kw_only=True)
class Distillation(dmd.Training):
    """`dmd.Training` on shards."""

    source: Source

    def clips(self) -> int:
        return len(self.source.stream.index)

    def measure(self) -> dict[str, float]:
        """Nothing: the saved files are measured, with joyavatar evaluate."""
        return {}

    def _given(self, latents: int, common: random.Random, own: random.Random) -> dmd.Given:
        given = self.source.at(self.steps, latents)
        return dmd.Given(given.inputs, given.weights)


# Commands


def run(name: str, stage: Stage, recipe: Any, files: Files, again: bool) -> None:
    """Train a stage to its end; with `again` from its newest state. ValueError, OSError for what cannot be used."""
    stages = {"bidirectional": _bidirectional, "flow": _flow, "ode": _ode, "dmd": _dmd}
    if name not in stages:
        raise ValueError(f"{name} is a stage of the embedded model alone: set sharded = false in its scale")
    check_start(files.out, bool(distributed.states(files.out)), again)
    for value in (*_NOWHERE, *_UNUSED[name]):
        if getattr(recipe, value, None) != getattr(type(recipe)(), value, None):
            raise ValueError(f"{value} is for the trainers of the embedded model: leave it out of {name}.recipe")
    index, mesh = ShardIndex(files.data), distributed.join()
    files.out.mkdir(parents=True, exist_ok=True)
    stream = BatchStream(index, stage.clip.batch, recipe.seed, parallel.rank(), parallel.world())
    state = stages[name](stage, recipe, files, stream, mesh)
    if again:
        distributed.resume(state)
    distributed.loop(state)


def _learner(
    stage: Stage, recipe: Any, files: Sequence[Path], mesh: DeviceMesh, rate: float | None = None, causal: bool = False
) -> distributed.ShardedLearner:
    attention = block_causal if causal else sdpa
    model = distributed.build(MODELS[stage.model], files, stage.scale, mesh, recipe.seed, attention=attention)
    return distributed.learner(model, recipe, stage.scale, rate)


def _frozen(stage: Stage, files: Sequence[Path], mesh: DeviceMesh) -> JoyAvatarDiT:
    if not files:
        raise ValueError("this stage needs a teacher: give its file with --teacher")
    scale = replace(stage.scale, lora_rank=0, lora_alpha=0, checkpointing=False)
    return distributed.build(MODELS[stage.teacher or stage.model], files, scale, mesh, trained=False)


def _first(index: ShardIndex, count: int) -> ShardIndex:
    """The first samples alone, in the order of folders and shards."""
    some = copy(index)
    ends = [0, *accumulate(len(group) for group in index.groups)]
    some.groups = tuple(g[: max(0, count - start)] for g, start in zip(index.groups, ends, strict=False))
    return some


def _source(stream: BatchStream, model: JoyAvatarDiT, recipe: Any, mesh: DeviceMesh) -> Source:
    return Source(stream, model, distributed.device_of(mesh), recipe.mouth, recipe.eyes)


def _shared(recipe: Any, files: Files, learner: distributed.ShardedLearner, source: Source) -> dict[str, Any]:
    rules = policy_named(recipe.policy)
    return {"recipe": recipe, "out": files.out, "learner": learner, "policy": rules, "source": source}


def _bidirectional(stage: Stage, recipe: Any, files: Files, stream: BatchStream, mesh: DeviceMesh) -> FlowMatching:
    if not files.initial:
        log.warning("no --initial: the model begins with random weights")
    learner = _learner(stage, recipe, files.initial, mesh)
    shared = _shared(recipe, files, learner, _source(stream, learner.model, recipe, mesh))
    return FlowMatching(**shared, latents=recipe.latents)


def _flow(stage: Stage, recipe: Any, files: Files, stream: BatchStream, mesh: DeviceMesh) -> FlowMatching:
    n = policy_named(recipe.policy).block_latents
    if stage.clip.latents % n:
        raise ValueError(f"clips of {stage.clip.latents} latents: must be a multiple of the {n} of a block")
    learner = _learner(stage, recipe, _needed(files.initial), mesh, causal=True)
    shared = _shared(recipe, files, learner, _source(stream, learner.model, recipe, mesh))
    return FlowMatching(**shared, latents=stage.clip.latents, parts=stage.clip.latents // n)


def _needed(initial: tuple[Path, ...]) -> tuple[Path, ...]:
    if not initial:
        raise ValueError("this stage goes on with a trained model: give its file with --initial")
    return initial


def _ode(stage: Stage, recipe: Any, files: Files, stream: BatchStream, mesh: DeviceMesh) -> Regression:
    """The pairs are made first, while nothing but the teacher is in memory."""
    index, count = stream.index, stage.clip.latents
    if recipe.ode_steps % len(levels(policy_named(recipe.policy).timesteps)):
        raise ValueError(f"ode_steps {recipe.ode_steps}: must be a multiple of 8, or the PSB levels are missed")
    if len(index) < recipe.pairs:
        raise ValueError(f"{recipe.pairs} pairs need as many samples, the shards have {len(index)}: prepare more")
    initial, folder = _needed(files.initial), pairs_folder(stage, recipe, files)
    teacher = _frozen(stage, files.teacher, mesh)
    make_pairs(teacher, _source(stream, teacher, recipe, mesh), folder, recipe, count)
    del teacher
    stream = BatchStream(_first(index, recipe.pairs), stage.clip.batch, recipe.seed, parallel.rank(), parallel.world())
    learner = _learner(stage, recipe, initial, mesh, causal=True)
    shared = _shared(recipe, files, learner, _source(stream, learner.model, recipe, mesh))
    return Regression(**shared, pairs=folder, latents=count)


def _dmd(stage: Stage, recipe: Any, files: Files, stream: BatchStream, mesh: DeviceMesh) -> Distillation:
    if files.autoencoder is None:
        raise ValueError("dmd encodes frames anew: give the autoencoder's file with --autoencoder")
    learner = _learner(stage, recipe, _needed(files.initial), mesh)
    critic = _learner(stage, recipe, files.critic or files.initial, mesh, recipe.critic_rate)
    decoder = load_autoencoder(files.autoencoder).to(distributed.device_of(mesh)).requires_grad_(False)
    return Distillation(
        **_shared(recipe, files, learner, _source(stream, learner.model, recipe, mesh)),
        data=(),
        held_out=cast(Any, None),  # nothing is measured here
        critic=critic,
        real=_frozen(stage, files.teacher, mesh),
        autoencoder=cast(Any, decoder),
    )
