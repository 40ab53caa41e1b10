"""Trajectories of a teacher: where its flow takes the noise of every block, kept at the levels of PSB.

The teacher was trained on the staircase of levels that a rolling window has, so the flow is followed there: the
engine's own rollout with every main step cut into small Euler steps. Each block then passes the main steps and the
sub-steps of the policy (1000, 875, ... 125) beside neighbours at theirs, which is where the student will meet it.
(CausVid and Self-Forcing let all blocks go down together, as their bidirectional teachers were trained to.)

Shape legend: B batch, L levels, C latent channels, F latent frames, h w latent size.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import checkpoint, flow
from ..cache import KV
from ..geometry import Geometry
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from ..rollout import Rollout, RolloutState
from ..schedule import DenoiseStep, levels
from . import parallel
from .batches import Batch
from .clips import clip_path
from .encoded import EncodedClips
from .preview import condition, sound
from .sequences import commit_level

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinePolicy(RolloutPolicy):
    """A policy without sub-steps whose every step is cut into `parts`, even before the warp."""

    parts: int = 6

    def window_steps(self, window: int, num_blocks: int | None = None) -> tuple[DenoiseStep, ...]:
        steps = super().window_steps(window, num_blocks)
        return tuple(part for step in steps for part in _cut(step, self.parts))


def _cut(step: DenoiseStep, parts: int) -> Iterator[DenoiseStep]:
    ends = tuple(zip(step.timesteps, step.next_timesteps, strict=True))
    cuts = [tuple(here + (there - here) * i / parts for here, there in ends) for i in range(parts)]
    for i, (here, there) in enumerate(zip(cuts, [*cuts[1:], step.next_timesteps], strict=True)):
        passes = tuple(p * parts + i for p in step.passes)
        yield replace(step, timesteps=here, next_timesteps=there, passes=passes)


def refine(policy: RolloutPolicy, ode_steps: int) -> FinePolicy:
    """The policy with `ode_steps` Euler steps a block. ValueError if they would miss a level of `levels`."""
    count = len(levels(policy.timesteps))
    if ode_steps < count or ode_steps % count:
        raise ValueError(f"ode_steps {ode_steps}: must be a multiple of {count}, or the PSB levels are missed")
    if policy.kv_level == "per_step":
        raise ValueError("kv_level per_step: has no keys and values for the steps in between; use last_step or clean")
    options = {f.name: getattr(policy, f.name) for f in fields(RolloutPolicy)}
    return FinePolicy(**{**options, "bootstrap": 0, "update": "euler", "parts": ode_steps // len(policy.timesteps)})


@dataclass(frozen=True, kw_only=True)
class Trace(Rollout):
    """A rollout of a FinePolicy that keeps the blocks at the levels of the policy it refines.

    coarse: that policy. manner: what no sound tells of its latents [F, T, K] (`manner`), None: nothing. guidance: how
    far the flow goes from deaf to hearing, 1: not beyond. states: (block, index of the level) -> [B, C, n, h, w].
    kept: block -> keys and values for the cache.
    """

    policy: FinePolicy
    coarse: RolloutPolicy
    manner: Tensor | None = None
    guidance: float = 1.0
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    kept: dict[int, list[KV]] = field(default_factory=dict)

    def step(self, state: RolloutState, step: DenoiseStep):
        """As in Rollout; what stands at a level is kept first."""
        every = self.policy.parts // 2
        for block, passed in zip(step.blocks, step.passes, strict=True):
            if passed % every == 0:
                self.states[block, passed // every] = self._noisy(state, block)
        return super().step(state, step)

    def _denoise(self, state: RolloutState, step: DenoiseStep, x: Tensor, here: Tensor) -> tuple[Tensor, list[KV]]:
        """As in Rollout, but a block enters the cache as the teacher knows it: at the level of the coarse policy."""
        v, kv = super()._denoise(state, step, x, here)
        oldest = step.blocks[0]
        if step.timesteps[0] == commit_level(self.coarse, oldest):
            self.kept[oldest] = kv
        return v, self.kept.get(oldest, kv)

    def _manner(self, block: int) -> Tensor | None:
        """That of the clip, which whoever learns from the trajectory is told too."""
        if self.manner is None:
            return None
        latents = self.geometry.latents_of_block(block)
        return self.manner[None, latents.start : latents.stop].to(self.device, self.dtype)

    def _forward(self, state: RolloutState, *args: Any, **kwargs: Any) -> tuple[Tensor, list[KV]]:
        """As in Rollout, with the velocity under guidance (Ho and Salimans 2022); what is cached was heard."""
        v, kv = super()._forward(state, *args, **kwargs)
        if self.guidance != 1 and self._hears(state):
            unheard = super()._forward(_deaf(state), *args, **kwargs)[0]
            v = unheard + self.guidance * (v - unheard)
        return v, kv


def _deaf(state: RolloutState) -> RolloutState:
    """The state with zeros for sound, as training leaves it out."""
    silent = {block: replace(heard, tokens=torch.zeros_like(heard.tokens)) for block, heard in state.audio.items()}
    return replace(state, audio=silent, audio_kv={})


@dataclass(frozen=True)
class Trajectory:
    """states [L, F, C, h, w] of a clip at `levels`, end [F, C, h, w]."""

    states: Tensor
    end: Tensor


@torch.no_grad()  # not inference_mode: RoPE tables are kept, and training uses them too
def trace(
    model: JoyAvatarDiT,
    policy: RolloutPolicy,
    ode_steps: int,
    clips: EncodedClips,
    clip: int,
    geometry: Geometry,
    seed: int,
    guidance: float = 1.0,
) -> Trajectory:
    """The teacher's trajectory for the picture and the sound of one of the clips."""
    every = torch.arange(clips.latents.shape[1])[None]
    told = clips.manner(torch.tensor([clip]), every)
    rollout = Trace(
        manner=None if told is None else told[0],
        model=model,
        policy=refine(policy, ode_steps),
        coarse=policy,
        guidance=guidance,
        geometry=geometry,
        condition=condition(model, clips, clip, geometry),
        seed=seed,
        device=torch.device("cpu"),
        dtype=next(model.parameters()).dtype,
    )
    state = rollout.start()
    state.audio = sound(clips, clip, geometry)
    return follow(rollout, state, len(state.audio))


def follow(rollout: Trace, state: RolloutState, blocks: int) -> Trajectory:
    """Run a fresh rollout over `blocks` blocks; the trajectory of the first of its batch."""
    end = torch.cat([block.latents for block in rollout.run(state, blocks)], dim=2)
    rungs = range(len(levels(rollout.coarse.timesteps)))
    rows = [torch.cat([rollout.states[b, i] for b in range(blocks)], dim=2) for i in rungs]
    return Trajectory(torch.stack([row[0] for row in rows]).transpose(1, 2), end[0].transpose(0, 1))


# On disk


@dataclass(frozen=True)
class Pairs:
    """Trajectories of N clips: `clips` with the ends in place of their latents, the true latents [N, F, C, h, w], and
    the files of the states."""

    clips: EncodedClips
    true: Tensor
    paths: tuple[Path, ...]
    policy: RolloutPolicy

    def __len__(self) -> int:
        return len(self.paths)

    def on_trajectory(self, batch: Batch) -> Batch:
        """A batch of `clips` whose window stands on the trajectories, at the levels of its layout.

        The noise becomes the one that leads from the end to the state there; the batch knows the true latents.
        """
        window, n = slice(batch.layout.lead, None), batch.layout.policy.block_latents
        rungs = [levels(self.policy.timesteps).index(t) for t in batch.layout.timesteps for _ in range(n)]
        states = [
            self._states(int(c), rungs, f.tolist()) for c, f in zip(batch.clips, batch.frames[:, window], strict=True)
        ]
        x_t, end = torch.stack(states).float().transpose(1, 2), batch.x0[:, :, window]
        noise = batch.noise.clone()
        noise[:, :, window] = end + flow.to_velocity(x_t, end, batch.timesteps[:, window])
        true = self.true[batch.clips[:, None], batch.frames].float().transpose(1, 2)
        return replace(batch, noise=noise, true=true)

    def _states(self, clip: int, rungs: list[int], frames: list[int]) -> Tensor:
        """[F, C, h, w]"""
        with safe_open(self.paths[clip], "pt") as file:
            states = file.get_slice("states")
            return torch.stack([states[rung, frame] for rung, frame in zip(rungs, frames, strict=True)])


@dataclass(frozen=True)
class PairStore:
    """Trajectories beside the clips of a folder: another teacher, policy, step count or guidance has another place."""

    folder: Path
    teacher: Path
    policy: RolloutPolicy
    ode_steps: int
    guidance: float = 1.0

    @property
    def teacher_hash(self) -> str:
        """SHA-256 of the teacher's file."""
        return checkpoint.sha256_of(self.teacher)

    @property
    def home(self) -> Path:
        """Where they lie."""
        # the last words: earlier trajectories were told another manner than their clips'
        key = f"{self.teacher_hash} {self.policy} {self.ode_steps} {self.guidance} told their manner"
        return self.folder / f"pairs-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def make(self, model: JoyAvatarDiT, clips: EncodedClips, geometry: Geometry) -> None:
        """One trajectory of each clip that has none yet; the clip's seed decides the noise. Processes share them."""
        home, teacher = self.home, self.teacher_hash
        home.mkdir(parents=True, exist_ok=True)
        facts = {"teacher": teacher, "levels": list(levels(self.policy.timesteps)), "ode_steps": self.ode_steps}
        facts |= {"guidance": self.guidance}
        seeds = clips.seed.tolist()
        for clip in range(parallel.rank(), len(seeds), parallel.world()):
            path = clip_path(home, seeds[clip])
            if path.exists():
                continue
            made = trace(model, self.policy, self.ode_steps, clips, clip, geometry, seeds[clip], self.guidance)
            tensors = {"states": made.states.half(), "end": made.end.half()}
            own = facts | {"seed": seeds[clip]}
            checkpoint.write(path, tensors, {name: str(value) for name, value in own.items()})
            if clip % 10 == 9:
                log.info("%d of %d trajectories", clip + 1, len(clips))

    def load(self, clips: EncodedClips) -> Pairs:
        """The pairs of clips that all have one. OSError names the first that has none."""
        paths = tuple(clip_path(self.home, seed) for seed in clips.seed.tolist())
        ends = []
        for seed, path in zip(clips.seed.tolist(), paths, strict=True):
            if not path.exists():
                raise OSError(f"no trajectory of clip {seed} in {self.home}: make the pairs first")
            with safe_open(path, "pt") as file:
                ends.append(file.get_tensor("end"))
        return Pairs(replace(clips, latents=torch.stack(ends)), clips.latents, paths, self.policy)
