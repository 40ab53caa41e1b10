"""How a rollout is run: a frozen set of orthogonal options, and the published systems as presets of it.

JoyAvatar-Flash (2512.11423 section 3), Rolling-Forcing, Self-Forcing and Live Avatar differ in these values, not in
code. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypedDict

from . import schedule
from .schedule import DenoiseStep

Update = Literal["renoise", "euler"]
KVLevel = Literal["last_step", "clean", "per_step"]
SinkPosition = Literal["adjacent", "absolute"]
CleanSight = Literal["window", "own", "newest"]


@dataclass(frozen=True)
class Seen:
    """A finished block in sight of a forward: all its latents but the `skipped` first ones.

    index: temporal RoPE index of the first that is seen; the others follow it.
    """

    block: int
    skipped: int
    index: int


class BlockSizes(TypedDict):
    """The sizes of a Geometry that a policy decides."""

    block_latents: int
    first_latent: int


@dataclass(frozen=True)
class RolloutPolicy:
    """Options of a rollout.

    timesteps: main steps on the 1000 .. 0 scale, before the warp.
    shift: the warp of the flow schedule (schedule.warp); 1 leaves timesteps as they are (explicit lists).
    bootstrap: PSB: windows (or, one block at a time, blocks) whose main steps are followed by a sub-step.
    block_latents: latent frames in a block.
    window_blocks: 1, or len(timesteps) for a rolling window.
    update: "renoise" draws fresh noise to the next level (consistency sampler); "euler" follows the velocity.
    kv_level: noise level at which keys and values enter the cache: "last_step" keeps those of the block's final
        denoising forward (no extra pass), "clean" runs the finished block once more at timestep 0, "per_step" keeps
        one cache per step (needs window_blocks 1).
    sink_blocks: first blocks that stay in the cache for ever.
    local_blocks: most recent finished blocks that a full window sees beside the sink.
    constant_span: a window of fewer blocks, at the end of a clip, sees as many more local ones, so that every window
        spans sink, local blocks and a full window (Rolling-Forcing: 21 latents).
    local_latents: of these only the newest so many latents are seen; None: all.
    clean_sight: what the pass over a finished block sees (kv_level "clean"): "window" as much as a full window does;
        "own" the same, but sink and reference at the indices they were made at (AvatarForcing); "newest" as many of the
        newest blocks as fill the same span, each at its own index, the sink only while it is one of them
        (Rolling-Forcing).
    sink_position: "adjacent" puts the sink right before the local blocks (relative, URCR); "absolute" leaves it at
        its own index (the paper's ablation without URCR).
    rope_limit: URCR's N: temporal indices stay below it; None lets them grow.
    motion_frame: MCI: prepend the last finished latent, noised to the level of the window's first block.
    motion_noise: whether it is noised; without, it stands at timestep 0 (the paper's ablation "w/o add-noise").
    given_first: OmniAvatar's children: the first latent of the stream is the picture's own, at every step and in what
        comes out, though its timestep is that of its block.
    picture_alone: AvatarForcing: that first latent is no part of a block: it comes out as given, is seen as reference
        sink only, and block 0 begins with the second latent.
    reference_sink: Live Avatar: the picture, run once through the model at timestep 0 before the first block, stays in
        the cache for ever, beside whatever other sink there is.
    reference_ahead: (least, most): how many latents it lies after the first latent of the window; where the two differ
        it is drawn from the run's seed for every forward. None: it lies right before the past that is seen.
    reference_floor: index it is made at, and below which it never lies ahead of a window.
    reference_refresh: AAS: after so many finished blocks it is made again from the first latent of the first block,
        as generated; None: never.
    reference_reach: the most that tokens of a still past which the model adds to the picture (motion tokens of
        Wan2.2-S2V, at negative indices) may lie behind the window, in latents; None: they stay and fall ever further
        behind.
    """

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    bootstrap: int = 4
    block_latents: int = 3
    window_blocks: int = 4
    update: Update = "renoise"
    kv_level: KVLevel = "last_step"
    sink_blocks: int = 1
    local_blocks: int = 4
    sink_position: SinkPosition = "adjacent"
    rope_limit: int | None = 27
    motion_frame: bool = True
    motion_noise: bool = True
    # newer than the first saved streams, whose identity is a repr: see `newer_options`
    constant_span: bool = field(default=False, repr=False)
    local_latents: int | None = field(default=None, repr=False)
    clean_sight: CleanSight = field(default="window", repr=False)
    picture_alone: bool = field(default=False, repr=False)
    given_first: bool = field(default=False, repr=False)
    reference_sink: bool = field(default=False, repr=False)
    reference_ahead: tuple[int, int] | None = field(default=(30, 30), repr=False)
    reference_floor: int = field(default=30, repr=False)
    reference_refresh: int | None = field(default=None, repr=False)
    reference_reach: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(problem)

    @property
    def context_blocks(self) -> int:
        """Finished blocks that a full window can see."""
        return self.sink_blocks + self.local_blocks

    @property
    def kept_blocks(self) -> int:
        """Newest finished blocks kept beside the sink: those a full window sees, or what sees most."""
        if self.kv_level == "clean" and self.clean_sight == "newest":
            return self.context_blocks + self.window_blocks - 1
        return self.local_blocks + (self.window_blocks - 1 if self.constant_span else 0)

    @property
    def span_latents(self) -> int:
        """Latents a full forward can see: sink, local blocks and window (27 for JoyAvatar-Flash)."""
        local = self.local_blocks * self.block_latents
        local = local if self.local_latents is None else min(local, self.local_latents)
        return (self.sink_blocks + self.window_blocks) * self.block_latents + local

    @property
    def first_latent(self) -> int:
        """Latent of the stream with which block 0 begins."""
        return int(self.picture_alone)

    def start_of(self, block: int) -> int:
        """Latent of the stream with which a block begins."""
        return self.first_latent + block * self.block_latents

    @property
    def block_sizes(self) -> BlockSizes:
        """What a Geometry has to know of the blocks."""
        return {"block_latents": self.block_latents, "first_latent": self.first_latent}

    @property
    def lead_blocks(self) -> int:
        """Blocks that enter the window before the first one leaves it: the look-ahead of live audio."""
        return self.window_blocks - 1

    def window_steps(self, window: int, num_blocks: int | None = None) -> tuple[DenoiseStep, ...]:
        """Steps of one window; empty past the end of the clip."""
        make = schedule.blockwise_window if self.window_blocks == 1 else schedule.rolling_window
        return make(self.timesteps, self.bootstrap, window, num_blocks)

    def num_windows(self, num_blocks: int) -> int:
        """Windows until `num_blocks` blocks are clean."""
        return schedule.num_windows(self.window_blocks, num_blocks)

    def first_block(self, window: int) -> int:
        """Oldest block of a window: the number of blocks finished, and committed, before it."""
        return max(0, window - self.window_blocks + 1)

    @property
    def newer_options(self) -> dict[str, object]:
        """Options that repr leaves out, by name, where they are not as they were before there were any."""
        return {f.name: value for f in fields(self) if not f.repr and (value := getattr(self, f.name)) != f.default}

    def reference_position(self, start: int, ahead: int) -> int:
        """RoPE index of the reference beside a window that starts at index `start` (Live Avatar's rolling RoPE)."""
        return max(self.reference_floor, start + ahead)

    def reference_before(self, start: int, seen: int, clean: bool) -> int:
        """RoPE index of a reference that lies before so many latents seen of the past (AvatarForcing's style anchor).

        clean: whether it is for the pass over a finished block.
        """
        return self.reference_floor if clean and self.clean_sight == "own" else start - seen - 1

    def reference_shift(self, start: int) -> int:
        """By how much the tokens of the still past move along with a window that starts at index `start`."""
        return 0 if self.reference_reach is None else max(0, start - self.reference_reach)

    def window_start(self, finished: int) -> int:
        """RoPE index of the window's first latent after `finished` blocks (URCR, engine note 5.1).

        The index grows by a block per finished block. When the window would end beyond rope_limit it falls back to
        where the sink has index 0; since only differences of indices reach the attention, nothing else changes.
        """
        excess = finished - self.context_blocks
        if self.rope_limit is None or excess <= 0:
            return self.start_of(finished)
        period = (self.rope_limit - self.span_latents) // self.block_latents + 1
        return (self.context_blocks + excess % period) * self.block_latents

    def sight(self, finished: int, blocks: int, clean: bool = False) -> tuple[Seen, ...]:
        """What a forward sees of the past, the oldest block first.

        Args:
            finished: blocks finished before it; block `finished` is the first it works on.
            blocks: how many it works on.
            clean: whether it is the pass over a finished block (kv_level "clean").
        """
        if clean and self.clean_sight == "newest":
            return tuple(self._at_its_own(b, finished) for b in range(max(0, finished - self.kept_blocks), finished))
        more = self.window_blocks - blocks if self.constant_span and not clean else 0
        sink = min(self.sink_blocks, finished)
        local = [self._at_its_own(b, finished) for b in range(max(sink, finished - self.local_blocks - more), finished)]
        local = [seen for seen in local if seen.skipped < self.block_latents]
        absolute = self.sink_position == "absolute" or (clean and self.clean_sight == "own")
        before = self.window_start(finished) - sum(self.block_latents - seen.skipped for seen in local)
        start = self.first_latent if absolute else before - sink * self.block_latents
        return (*(Seen(block, 0, start + block * self.block_latents) for block in range(sink)), *local)

    def seen_latents(self, finished: int, blocks: int, clean: bool = False) -> int:
        """How many latents of the past that are; the reference is not one of them."""
        return sum(self.block_latents - seen.skipped for seen in self.sight(finished, blocks, clean))

    def _at_its_own(self, block: int, finished: int) -> Seen:
        """What is seen of a local block, at its own distance from the window."""
        behind = (finished - block) * self.block_latents
        hidden = 0 if self.local_latents is None else max(0, behind - self.local_latents)
        skipped = min(hidden, self.block_latents)
        return Seen(block, skipped, self.window_start(finished) - behind + skipped)

    def context_start(self, block: int, finished: int) -> int:
        """RoPE index of the first latent of a block in sight of a full window after `finished` blocks."""
        sight = self.sight(finished, self.window_blocks)
        return next(seen.index - seen.skipped for seen in sight if seen.block == block)


def _problems(p: RolloutPolicy) -> list[str]:
    """What is wrong with a policy, in words; empty when it can run."""
    found = []
    steps = p.timesteps
    if not steps or any(not 0 < t <= 1000 for t in steps) or list(steps) != sorted(set(steps), reverse=True):
        found.append(f"timesteps {steps}: give a descending list of values in (0, 1000]")
    if p.window_blocks not in (1, len(steps)):
        found.append(f"window_blocks {p.window_blocks}: must be 1 or the number of timesteps ({len(steps)})")
    if p.kv_level == "per_step" and (p.window_blocks != 1 or p.bootstrap):
        found.append("kv_level per_step: needs window_blocks 1 and bootstrap 0")
    if min(p.sink_blocks, p.local_blocks, p.bootstrap) < 0 or p.block_latents < 1 or p.shift <= 0:
        found.append("sink_blocks, local_blocks and bootstrap must be >= 0, block_latents >= 1 and shift > 0")
    if p.update not in ("renoise", "euler") or p.kv_level not in ("last_step", "clean", "per_step"):
        found.append(f"update {p.update!r} or kv_level {p.kv_level!r} is not known")
    if p.sink_position not in ("adjacent", "absolute"):
        found.append(f"sink_position {p.sink_position!r}: use adjacent or absolute")
    if p.clean_sight not in ("window", "own", "newest"):
        found.append(f"clean_sight {p.clean_sight!r}: use window, own or newest")
    if p.local_latents is not None and p.local_latents < 0:
        found.append(f"local_latents {p.local_latents}: must be at least 0, or none for all of the local blocks")
    if p.picture_alone and (p.given_first or not p.reference_sink):
        found.append("picture_alone: the picture is seen as reference_sink only, and given_first is for one in a block")
    if p.rope_limit is not None and not p.span_latents <= p.rope_limit:
        found.append(f"rope_limit {p.rope_limit}: must be at least {p.span_latents}, the latents one forward can see")
    return found + (_reference_problems(p) if p.reference_sink else [])


def _reference_problems(p: RolloutPolicy) -> list[str]:
    found = []
    least, most = p.reference_ahead or (0, 0)
    if not 0 <= least <= most:
        found.append(f"reference_ahead {p.reference_ahead}: give (least, most) with 0 <= least <= most")
    if p.rope_limit is not None:
        found.append(f"rope_limit {p.rope_limit}: a reference lies ahead of the window, its index grows; use none")
    for name, least in (("reference_floor", 0), ("reference_refresh", 1), ("reference_reach", 0)):
        value = getattr(p, name)
        if value is not None and value < least:
            found.append(f"{name} {value}: must be at least {least}")
    return found


_FLASH = RolloutPolicy()
POLICIES: dict[str, RolloutPolicy] = {
    "joyavatar-flash": _FLASH,
    # Window of five, sink and one local block (21 latents in all, whatever the window holds), and a clean pass over
    # every finished block that sees the six before it.
    "rolling-forcing": replace(
        _FLASH,
        timesteps=(1000, 800, 600, 400, 200),
        bootstrap=0,
        window_blocks=5,
        kv_level="clean",
        local_blocks=1,
        rope_limit=None,
        motion_frame=False,
        constant_span=True,
        clean_sight="newest",
    ),
    # One block at a time beside 18 latents of clean history, no sink.
    "self-forcing": replace(
        _FLASH,
        bootstrap=0,
        window_blocks=1,
        kv_level="clean",
        sink_blocks=0,
        local_blocks=6,
        rope_limit=None,
        motion_frame=False,
    ),
    # As Self-Forcing, with the first block as sink at its own index and attention over 12 latents in all.
    "longlive": replace(
        _FLASH,
        bootstrap=0,
        window_blocks=1,
        kv_level="clean",
        local_blocks=2,
        sink_position="absolute",
        rope_limit=None,
        motion_frame=False,
    ),
    # One block at a time over 15 latents in all: the first nine as sink at their own indices, and one block.
    "livetalk": replace(
        _FLASH,
        bootstrap=0,
        window_blocks=1,
        kv_level="clean",
        sink_blocks=3,
        local_blocks=1,
        sink_position="absolute",
        rope_limit=None,
        motion_frame=False,
        given_first=True,
    ),
    # Rolling windows of four blocks of four latents beside the picture's latent, which was run by itself, and the two
    # latents before the window. The clean pass sees that latent at index 0 however far the stream has come, as the
    # release has it.
    "avatarforcing": replace(
        _FLASH,
        timesteps=(1000, 800, 400, 200),
        bootstrap=0,
        block_latents=4,
        kv_level="clean",
        sink_blocks=0,
        local_blocks=1,
        local_latents=2,
        clean_sight="own",
        rope_limit=None,
        motion_frame=False,
        picture_alone=True,
        reference_sink=True,
        reference_ahead=None,
        reference_floor=0,
    ),
    # One block at a time, Euler steps, keys of every step beside those of the same step, the picture as sink. The
    # timesteps are those of four steps after a warp of 3 that the release applies twice: hence no shift here. The
    # release draws the reference's place from 4 .. 30 without a seed; 30 is where the base model was trained to find
    # it, and the one choice that never moves against the window.
    "live-avatar": replace(
        _FLASH,
        timesteps=(1000, 1000 * 223 / 260, 1000 * 56 / 93, 1000 / 112),
        shift=1.0,
        bootstrap=0,
        window_blocks=1,
        update="euler",
        kv_level="per_step",
        sink_blocks=0,
        local_blocks=3,
        rope_limit=None,
        motion_frame=False,
        reference_sink=True,
        reference_refresh=4,
    ),
}


def policy(name: str) -> RolloutPolicy:
    """A preset by name; ValueError names the known ones."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is not known; known: {', '.join(POLICIES)}")
    return POLICIES[name]


def changed(chosen: RolloutPolicy, changes: Mapping[str, object]) -> RolloutPolicy:
    """The policy with other values; a larger context moves the smallest possible rope_limit along.

    Raises ValueError for values that cannot go together.
    """
    wider = "rope_limit" not in changes and not changes.keys().isdisjoint(("sink_blocks", "local_blocks", "timesteps"))
    if wider and chosen.rope_limit is not None:
        free = replace(chosen, **{**changes, "rope_limit": None})  # pyright: ignore[reportArgumentType]
        changes = {**changes, "rope_limit": max(chosen.rope_limit, free.span_latents)}
    return replace(chosen, **changes)  # pyright: ignore[reportArgumentType]


def with_steps(chosen: RolloutPolicy, steps: int) -> RolloutPolicy:
    """The policy with so many evenly spaced main steps; a rolling window gets as many blocks. ValueError below 1."""
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    timesteps = tuple(1000 - 1000 * i / steps for i in range(steps))
    window = 1 if chosen.window_blocks == 1 else steps
    return changed(chosen, {"timesteps": timesteps, "window_blocks": window})
