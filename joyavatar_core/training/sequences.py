"""Training sequences: [sink | local blocks | motion frame | window], the picture of one inference forward.

At inference the past comes from a cache; here it stands in the same forward, behind a mask (teacher forcing). What
the policy says of a forward (which blocks, which noise levels, which RoPE indices) is asked of the policy, so that
training and inference cannot drift apart.

Shape legend: B batch, F latent frames of a sequence, P tokens of a latent, n latents of a block.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import sdpa
from ..policy import RolloutPolicy
from ..schedule import warp

_LEAST = 80.0  # jittered levels stay above this timestep (index, before the warp)


@dataclass(frozen=True)
class Layout:
    """What all sequences of a batch share.

    context: finished blocks in sight, sink first. timesteps: level of each block of the window, before the warp.
    """

    policy: RolloutPolicy
    context: int
    timesteps: tuple[float, ...]

    @property
    def motion(self) -> int:
        """Latents of the motion frame: 1, or 0 where nothing is finished yet."""
        return int(self.policy.motion_frame and self.context > 0)

    @property
    def lead(self) -> int:
        """Latents before the window."""
        return self.context * self.policy.block_latents + self.motion

    @property
    def latents(self) -> int:
        return self.lead + len(self.timesteps) * self.policy.block_latents

    def positions(self) -> tuple[int, ...]:
        """RoPE index of every latent frame."""
        n, start = self.policy.block_latents, self.policy.window_start(self.context)
        context = [self.policy.context_start(b, self.context) + i for b in range(self.context) for i in range(n)]
        return (*context, *range(start - self.motion, start + len(self.timesteps) * n))

    def mask(self, tokens: int) -> Tensor | None:
        """[F P, F P], True: may attend. A finished block sees itself and earlier ones, the window sees everything."""
        if not self.context:
            return None
        n = self.policy.block_latents
        group = torch.arange(self.context).repeat_interleave(n)
        group = torch.cat([group, torch.full((self.latents - len(group),), self.context)]).repeat_interleave(tokens)
        return group[:, None] >= group[None]


def steady(policy: RolloutPolicy) -> Layout:
    """The last forward of a full window with as many finished blocks in sight as there ever are."""
    context = policy.context_blocks
    return Layout(policy, context, policy.window_steps(context + policy.lead_blocks)[-1].timesteps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """An attention.AttentionFn for `Layout.mask`: only the past needs a mask, the window sees everything.

    A quarter less work than under one mask. q, k, v [B, L, heads, D], mask [L, L].
    """
    past = 0 if mask is None else int((~mask[:, -1]).sum())
    if mask is None or not past:
        return sdpa(q, k, v)
    before = sdpa(q[:, :past], k[:, :past], v[:, :past], mask[:past, :past])
    return torch.cat([before, sdpa(q[:, past:], k, v)], dim=1)


@dataclass(frozen=True)
class Mixture:
    """Odds of the kinds of sequences.

    start: a window at the very start, main step or sub-step. end: a window that shrinks because the clip ends.
    context: odds of 1, 2, ... blocks in sight. exact: levels as the schedule has them, in place of random ones
    up to a whole step below. clean_motion: motion frame without noise (MCI). sink_late: sink at the level of its
    own last step (with PSB a sub-step), in place of the level of all others. gap: blocks left out after the sink.
    """

    start: float = 0.25
    end: float = 0.05
    context: tuple[float, ...] = (0.3, 0.2, 0.1, 0.1, 0.3)
    exact: float = 0.5
    clean_motion: float = 0.3
    sink_late: float = 0.75
    gap: float = 0.5


def sample_layout(random_: random.Random, policy: RolloutPolicy, mixture: Mixture) -> Layout:
    """A forward that inference could make under the policy."""
    kind = random_.random()
    if kind < mixture.start:
        window = random_.randrange(policy.window_blocks)
        steps = policy.window_steps(window)
        return Layout(policy, 0, random_.choice(steps).timesteps)
    limit = min(policy.context_blocks, len(mixture.context))
    context = random_.choices(range(1, limit + 1), mixture.context[:limit])[0]
    window, total = context + policy.lead_blocks, None
    if kind < mixture.start + mixture.end and policy.lead_blocks:
        total = window + 1 - random_.randint(1, policy.lead_blocks)
    return Layout(policy, context, random_.choice(policy.window_steps(window, total)).timesteps)


def sample_latents(random_: random.Random, layout: Layout, clip_blocks: int, gap: float) -> list[int]:
    """Which latent frames of a clip of `clip_blocks` blocks fill a sequence: [F].

    The sink is the clip's first block; the rest follows at once or, with odds `gap`, later.
    """
    n, later = layout.policy.block_latents, max(0, layout.context - 1)
    if not layout.context:
        return list(range(len(layout.timesteps) * n))
    room = clip_blocks - 1 - later - len(layout.timesteps)
    if room < 0:
        needed = clip_blocks - room
        raise ValueError(f"clips of {clip_blocks} blocks are too short: {needed} are needed; draw longer ones")
    first = (1 + (random_.randint(0, room) if random_.random() < gap else 0)) * n
    window = first + later * n
    stop = window + len(layout.timesteps) * n
    return [*range(n), *range(first, window), *range(window - layout.motion, stop)]


def sample_levels(generator: torch.Generator, layout: Layout, batch: int, mixture: Mixture) -> Tensor:
    """Timesteps after the warp, [B, F]."""
    policy = layout.policy
    window = _window_levels(generator, layout, batch, mixture.exact)
    parts = [window]
    if layout.motion:
        clean = torch.rand(batch, 1, generator=generator) < mixture.clean_motion
        parts.insert(0, window[:, :1].masked_fill(clean, 0.0))
    if layout.context:
        parts.insert(0, _context_levels(generator, layout, batch, mixture.sink_late))
    return warp(torch.cat(parts, dim=1), policy.shift)  # pyright: ignore  (arithmetic: tensors pass too)


def commit_level(policy: RolloutPolicy, block: int) -> float:
    """Level, before the warp, at which the keys and values of a finished block were made."""
    if policy.kv_level == "clean":
        return 0.0
    return policy.window_steps(block + policy.lead_blocks)[-1].timesteps[0]


def _window_levels(generator: torch.Generator, layout: Layout, batch: int, exact: float) -> Tensor:
    """[B, F of the window] before the warp: the schedule's, or anything down to the next main step."""
    levels = torch.tensor(layout.timesteps).expand(batch, -1)
    step = 1000 / len(layout.policy.timesteps)
    below = levels - step * torch.rand(levels.shape, generator=generator)
    keep = torch.rand(batch, 1, generator=generator) < exact
    levels = torch.where(keep, levels, below.clamp(min=_LEAST))
    return levels.repeat_interleave(layout.policy.block_latents, dim=1)


def _context_levels(generator: torch.Generator, layout: Layout, batch: int, sink_late: float) -> Tensor:
    """[B, F of the context] before the warp."""
    policy = layout.policy
    later = commit_level(policy, policy.bootstrap)
    levels = torch.full((batch, layout.context), later)
    late = torch.rand(batch, generator=generator) < sink_late
    levels[:, 0] = torch.where(late, torch.tensor(commit_level(policy, 0)), levels[:, 0])
    return levels.repeat_interleave(policy.block_latents, dim=1)
