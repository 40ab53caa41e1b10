"""Self-forcing: the engine's own rollout, with gradient through one forward of every block.

Student and inference run the same loop (Self-Forcing; Rolling-Forcing for the rolling window; JoyAvatar-Flash 3.3 and
3.4). A rollout is of one of two branches, and which forwards carry gradient is data (`carriers`):

- main: the rolling windows of the policy. Of T windows in a row one carries gradient, so that every block has its
  clean latents from exactly one such forward, at whatever level it stands in that window.
- auxiliary: one block at a time down the main steps and some of the sub-steps (PSB), until the exit level, whose
  clean latents are the block.

All else runs without gradient and goes on with detached latents, keys and values. `block_gradients` gives the same
gradients with only one such forward in memory at a time (Live Avatar, algorithm 2).

Shape legend: B batch, C latent channels, F latent frames, n latents of a block, h w latent size, L tokens, W audio
tokens of a latent, S tokens of a block, heads, D head dimension.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import flow
from ..cache import KV, KVCache
from ..geometry import Geometry
from ..model import AudioKV, JoyAvatarDiT
from ..policy import RolloutPolicy
from ..rollout import Rollout, RolloutState
from ..schedule import DenoiseStep, blockwise_window, levels
from .inputs import Inputs, hear
from .sequences import commit_level

Branch = Literal["main", "auxiliary"]
History = Literal["policy", "clean", "exit"]


@dataclass(frozen=True)
class Draw:
    """All that is random in a training rollout; every process takes the same, or their numbers of forwards differ.

    branch: "main" or "auxiliary". blocks: length of the clip.
    exit: main: of which windows carry gradient, 0 .. T - 1; auxiliary: the level that does, an index into main steps
        and sub-steps in their order, 0 .. 2 T - 1.
    bootstrap: main: whether the first windows take their sub-steps; in such a window `substep` says which of its two
        forwards carries gradient.
    substeps: auxiliary: for each main step, whether its sub-step is run on the way to the exit.
    noisy_motion: for each window (auxiliary: block), whether its motion frame is noised.
    seed: of the noise. Processes with clips of their own may replace it: it changes no count.
    """

    branch: Branch
    blocks: int
    exit: int
    bootstrap: bool
    substep: bool
    substeps: tuple[bool, ...]
    noisy_motion: tuple[bool, ...]
    seed: int


@dataclass(frozen=True)
class Odds:
    """How rollouts are drawn (engine note 7.3, 7.4 and 6).

    main: the main branch. bootstrap: sub-steps in the main branch. substep: each sub-step of the auxiliary branch;
    in the main branch, gradient through the sub-step of a window that has one. noisy_motion: noise on the motion frame
    (the paper's p = 0.7). blocks: shortest and longest clip.
    """

    main: float = 0.5
    bootstrap: float = 0.5
    substep: float = 0.5
    noisy_motion: float = 0.7
    blocks: tuple[int, int] = (7, 9)

    def __post_init__(self) -> None:
        for name in ("main", "bootstrap", "substep", "noisy_motion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: odds must be in 0 .. 1")
        if not 1 <= self.blocks[0] <= self.blocks[1]:
            raise ValueError(f"blocks {self.blocks}: give the shortest and the longest clip, at least 1 block")


def draw(random_: random.Random, policy: RolloutPolicy, odds: Odds) -> Draw:
    """A rollout under the policy, all exits of its branch alike.

    Without a rolling window there is no main branch; without bootstrap the auxiliary branch has no sub-steps.
    """
    steps, bootstraps = len(policy.timesteps), policy.bootstrap > 0
    main = random_.random() < odds.main and policy.window_blocks > 1
    blocks = random_.randint(*odds.blocks)
    windows = policy.num_windows(blocks) if main else blocks
    last = random_.randrange(policy.window_blocks if main else 2 * steps)
    return Draw(
        branch="main" if main else "auxiliary",
        blocks=blocks,
        exit=last if main or bootstraps else last // 2 * 2,
        bootstrap=random_.random() < odds.bootstrap and bootstraps,
        substep=random_.random() < odds.substep,
        substeps=tuple(random_.random() < odds.substep and bootstraps for _ in range(steps)),
        noisy_motion=tuple(random_.random() < odds.noisy_motion for _ in range(windows)),
        seed=random_.getrandbits(63),
    )


@dataclass(frozen=True)
class Sample:
    """Clean latents of a clip [B, C, F, h, w], and the timestep after the warp at which each was said: levels [F]."""

    latents: Tensor
    levels: Tensor


def roll_out(
    model: JoyAvatarDiT,
    policy: RolloutPolicy,
    geometry: Geometry,
    inputs: Inputs,
    draw: Draw,
    *,
    gradient: bool = True,
    history: History = "policy",
    dtype: torch.dtype,
) -> Sample:
    """A clip as the student makes it: every block once, from the one forward that carries its gradient.

    Args:
        gradient: False, or a caller under no_grad: the same clip without a graph.
        history: level at which a block of the auxiliary branch enters the cache. "policy": as at inference; where that
            keeps keys and values of the last step, they are of the block noised anew to that step's level. "clean":
            timestep 0. "exit": those of the exit forward, without another one (Live Avatar's history corruption).
            The main branch always does as the policy says.
        dtype: of the cache and the audio tokens: what the model computes in.

    Raises:
        ValueError: the draw fits neither the policy nor the inputs.
    """
    rollout = _begin(model, policy, geometry, inputs, draw, history, dtype)
    rollout.finish(gradient and torch.is_grad_enabled())
    return rollout.sample()


def block_gradients(
    model: JoyAvatarDiT,
    policy: RolloutPolicy,
    geometry: Geometry,
    inputs: Inputs,
    draw: Draw,
    *,
    history: History = "policy",
    dtype: torch.dtype,
) -> Iterator[Sample]:
    """The clip of `roll_out` again and again, with gradient through one forward at a time, the last block first.

    A rollout without gradient keeps what each of those forwards was given; then each is run once more. Backpropagate
    every clip before the next is asked for: the gradients add up to those of `roll_out` for a loss whose derivative
    by the clip is the same each time (same noise and timestep), with the activations of one forward in memory.
    Live Avatar, algorithm 2; in the main branch a window at a time in place of a block.
    """
    rollout = _begin(model, policy, geometry, inputs, draw, history, dtype)
    given: list[Forward] = []
    rollout.finish(False, given)
    while given:
        alone = replace(rollout, clean=dict(rollout.clean))
        alone.carry(given.pop(), True)
        yield alone.sample()


# The schedule of a branch


@dataclass(frozen=True)
class OneBlock(RolloutPolicy):
    """The auxiliary branch: a block at a time down `passed`, at the positions and with the cache of the policy."""

    passed: tuple[float, ...] = ()

    def window_steps(self, window: int, num_blocks: int | None = None) -> tuple[DenoiseStep, ...]:
        return blockwise_window(self.passed, 0, window, num_blocks)

    def num_windows(self, num_blocks: int) -> int:
        return num_blocks

    def first_block(self, window: int) -> int:
        return window


def branch_policy(policy: RolloutPolicy, draw: Draw, history: History = "policy") -> RolloutPolicy:
    """The policy as a branch runs it."""
    if draw.branch == "main":
        return policy if draw.bootstrap else replace(policy, bootstrap=0)
    options: dict[str, Any] = {f.name: getattr(policy, f.name) for f in fields(RolloutPolicy)}
    options["kv_level"] = {"policy": policy.kv_level, "clean": "clean", "exit": "last_step"}[history]
    way = levels(policy.timesteps)[: draw.exit + 1]
    passed = tuple(t for i, t in enumerate(way) if i in (draw.exit, i // 2 * 2) or draw.substeps[i // 2])
    return OneBlock(**options, passed=passed)


def carriers(policy: RolloutPolicy, draw: Draw) -> tuple[DenoiseStep, ...]:
    """The forwards that carry gradient, in their order; together they hold every block once. policy: of the branch."""
    if draw.branch == "auxiliary":
        return tuple(policy.window_steps(block, draw.blocks)[-1] for block in range(draw.blocks))
    windows = range(draw.exit, policy.num_windows(draw.blocks), policy.window_blocks)
    return tuple(policy.window_steps(w, draw.blocks)[-1 if draw.substep else 0] for w in windows)


# The rollout


class Shelf(KVCache):
    """A KVCache that never writes into a tensor: what a forward was given stays so until its backward.

    A ring would be overwritten before activation checkpointing reads it again. A shallow copy is a snapshot.
    """

    def __init__(self, sink_blocks: int, local_blocks: int, block_tokens: int, dtype: torch.dtype) -> None:
        super().__init__(
            layers=0,
            batch=0,
            block_tokens=block_tokens,
            heads=0,
            head_dim=0,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        self.held: dict[int, list[KV]] = {}

    def context(self, layer: int) -> KV:
        keys, values = zip(*(self.held[block][layer] for block in self.blocks), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def commit(self, block: int, kv: Sequence[KV]) -> None:
        if block != self.committed:
            raise ValueError(f"block {block} committed out of order: block {self.committed} is next")
        self.committed += 1
        dtype = self.keys.dtype  # copies: a view would keep its whole window alive
        new = {block: [(k.detach().to(dtype, copy=True), v.detach().to(dtype, copy=True)) for k, v in kv]}
        self.held = {b: (self.held | new)[b] for b in self.blocks}


@dataclass(frozen=True)
class Forward:
    """All that one forward of the model is given. x [B, C, F, h, w] at the timesteps `here` [F]."""

    state: RolloutState
    step: DenoiseStep
    x: Tensor
    here: Tensor


@dataclass(frozen=True, kw_only=True)
class SelfForcing(Rollout):
    """A rollout that keeps the clean latents of the forwards in `carrying`.

    origin: the policy whose branch this is. clean: block -> latents [B, C, n, h, w] and their timesteps [n].
    gradient: whether those forwards have a graph. given: takes note of them, if a list.
    """

    inputs: Inputs
    draw: Draw
    history: History
    origin: RolloutPolicy
    carrying: tuple[DenoiseStep, ...]
    gradient: bool = False
    given: list[Forward] | None = None
    clean: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def finish(self, gradient: bool, given: list[Forward] | None = None) -> None:
        """Run a fresh rollout as far as the last forward of `carrying`."""
        rollout = replace(self, gradient=gradient, given=given)
        state = rollout.start()
        while state.window <= self.carrying[-1].window:
            rollout.run_window(state, self.draw.blocks)

    def sample(self) -> Sample:
        """The clip, once every block is there."""
        latents, timesteps = zip(*(self.clean[block] for block in range(self.draw.blocks)), strict=True)
        return Sample(torch.cat(latents, dim=2), torch.cat(timesteps))

    def carry(self, forward: Forward, gradient: bool) -> tuple[Tensor, list[KV]]:
        """Run a forward of `carrying`, and keep its clean latents. The condition is made anew, it has gradient too."""
        with torch.set_grad_enabled(gradient):
            live = replace(self, condition=self.inputs.condition(self.model)) if gradient else self
            v, kv = Rollout._denoise(live, forward.state, forward.step, forward.x, forward.here)
            x0 = flow.to_x0(forward.x, v, forward.here)
            n = self.policy.block_latents
            parts = zip(forward.step.blocks, x0.split(n, dim=2), forward.here.split(n), strict=True)
            self.clean.update({block: (latents, timesteps) for block, latents, timesteps in parts})
        return v.detach(), kv

    def _denoise(self, state: RolloutState, step: DenoiseStep, x: Tensor, here: Tensor) -> tuple[Tensor, list[KV]]:
        if step not in self.carrying:
            return super()._denoise(state, step, x, here)
        forward = Forward(replace(state, caches=tuple(copy(cache) for cache in state.caches)), step, x, here)
        if self.given is not None:
            self.given.append(forward)
        return self.carry(forward, self.gradient)

    def _kept(self, state: RolloutState, block: int, latents: Tensor, kv: list[KV]) -> list[KV]:
        """As in Rollout; an auxiliary block that left early goes back to the level it would have been committed at."""
        if block == self.draw.blocks - 1:
            return kv  # nobody will look at the last block
        level, policy = commit_level(self.origin, block), self.policy
        noised_anew = self.history == "policy" and policy.kv_level == "last_step"
        if not noised_anew or not isinstance(policy, OneBlock) or policy.passed[-1] == level:
            return super()._kept(state, block, latents, kv)
        step = DenoiseStep(block, (block,), (level,), (0,), (len(policy.passed),))
        here = self._levels(step.timesteps, latents)
        x = flow.add_noise(latents, self._gaussian(state, self._draw(block, step.passes[0])), here)
        return super()._denoise(state, step, x, here)[1]

    def _motion(self, state: RolloutState, step: DenoiseStep, here: Tensor) -> tuple[Tensor, Tensor] | None:
        """MCI in training (section 3.4): now and then without noise, and the model is told so."""
        if state.motion is None or self.draw.noisy_motion[step.window]:
            return super()._motion(state, step, here)
        return state.motion, torch.zeros_like(here[:1])

    def _cache(self) -> KVCache:
        tokens = self.geometry.tokens_per_latent * self.policy.block_latents
        return Shelf(self.policy.sink_blocks, self.policy.kept_blocks, tokens, self.dtype)

    def _hears(self, state: RolloutState) -> bool:
        return self.inputs.audio is not None and self.model.config.audio is not None

    def _audio_kv(self, state: RolloutState, block: int) -> AudioKV:
        """Of every clip its own; kept for other forwards only without gradient."""
        live = torch.is_grad_enabled()
        if block in state.audio_kv and not live:
            return state.audio_kv[block]
        n = self.policy.block_latents
        inputs = self.inputs.part(slice(block * n, (block + 1) * n))
        assert inputs.audio is not None
        valid = None if inputs.valid is None or bool(inputs.valid.all()) else inputs.valid.to(self.device)
        kv = hear(self.model, inputs.audio.to(self.device, self.dtype), inputs.manner, valid)
        if not live:
            state.audio_kv[block] = kv
        return kv


def _begin(
    model: JoyAvatarDiT,
    policy: RolloutPolicy,
    geometry: Geometry,
    inputs: Inputs,
    draw: Draw,
    history: History,
    dtype: torch.dtype,
) -> SelfForcing:
    for problem in _problems(policy, inputs, draw, history):
        raise ValueError(problem)
    branch = branch_policy(policy, draw, history)
    with torch.no_grad():
        condition = inputs.condition(model)
    return SelfForcing(
        model=model,
        policy=branch,
        geometry=geometry,
        condition=condition,
        seed=draw.seed,
        device=next(model.parameters()).device,
        dtype=dtype,
        batch=inputs.batch,
        inputs=inputs,
        draw=draw,
        history=history,
        origin=policy,
        carrying=carriers(branch, draw),
    )


def _problems(policy: RolloutPolicy, inputs: Inputs, draw: Draw, history: History) -> Iterator[str]:
    """Why a rollout cannot be run, in words."""
    main, steps = draw.branch == "main", len(policy.timesteps)
    if policy.picture_alone:
        yield "picture_alone: clips are trained in whole blocks; choose a policy without it"
    if main and policy.window_blocks == 1:
        yield "the main branch needs a rolling window and window_blocks is 1: draw the auxiliary branch"
    exits = policy.window_blocks if main else 2 * steps
    if not 0 <= draw.exit < exits:
        yield f"exit {draw.exit} of the {draw.branch} branch: must be in 0 .. {exits - 1}; draw under the same policy"
    windows = policy.num_windows(draw.blocks) if main else draw.blocks
    if draw.blocks < 1 or len(draw.noisy_motion) < windows or len(draw.substeps) < steps:
        yield (
            f"{draw.blocks} blocks with {len(draw.noisy_motion)} noisy_motion and {len(draw.substeps)} substeps: "
            f"at least 1, {windows} and {steps} are needed; draw under the same policy"
        )
    if policy.kv_level == "per_step" and history == "policy" and (draw.exit % 2 or any(draw.substeps)):
        yield 'kv_level per_step has no cache for sub-steps: draw without them, or use history "exit" or "clean"'
    latents = draw.blocks * policy.block_latents
    if inputs.audio is not None and inputs.audio.shape[1] < latents:
        yield f"audio of {inputs.audio.shape[1]} latents: {latents} are needed; draw fewer blocks or take longer clips"
