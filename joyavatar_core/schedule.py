"""A schedule is data: which blocks are denoised together, at which timesteps, in which order (JoyAvatar-Flash 3.3).

Timesteps here are indices on the 1000 .. 0 scale *before* the warp; `warp` maps them to what the model sees.
Blocks are numbered from 0 (the paper's B1 is block 0). No torch in this file: a schedule is tested in milliseconds.

Main branch (`rolling_schedule`): one new block enters per window at 1000, the oldest leaves clean. While the first
`bootstrap_windows` windows run, every main step is followed by a sub-step of the whole window at the midpoints
(Progressive Step Bootstrapping): 8, 7, 6, 5, then 4 steps a block.
Auxiliary branch and one-block policies (`blockwise_schedule`): one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class DenoiseStep:
    """One forward of the model over a window of blocks, oldest block first.

    window: index of the window; a window may hold a main step and a sub-step.
    blocks: block indices, consecutive.
    timesteps: noise level of each block before the step (index, before the warp).
    next_timesteps: level each block is brought to afterwards; 0 is clean.
    passes: how many steps each block had before this one (the noise of a step is drawn for (block, pass)).
    """

    window: int
    blocks: tuple[int, ...]
    timesteps: tuple[float, ...]
    next_timesteps: tuple[float, ...]
    passes: tuple[int, ...]

    @property
    def finishes(self) -> bool:
        """Whether the oldest block is clean after this step."""
        return self.next_timesteps[0] == 0


def warp(timestep: float, shift: float) -> float:
    """Timestep the model sees for a schedule index, both 1000 .. 0: 1000 s u / (1 + (s - 1) u), u = index / 1000."""
    u = timestep / 1000
    return 1000 * shift * u / (1 + (shift - 1) * u)


def midpoints(main: Sequence[float]) -> tuple[float, ...]:
    """Sub-step of each main step: halfway to the next one, (1000, 750, 500, 250) -> (875, 625, 375, 125)."""
    return tuple((here + there) / 2 for here, there in zip(main, (*main[1:], 0), strict=True))


def levels(main: Sequence[float]) -> tuple[float, ...]:
    """Main steps and sub-steps, descending, before the warp: what PSB may ask of a block."""
    return tuple(level for pair in zip(main, midpoints(main), strict=True) for level in pair)


def rolling_schedule(
    main: Sequence[float], bootstrap_windows: int, num_blocks: int | None = None
) -> Iterator[DenoiseStep]:
    """All steps of a rolling rollout; endless for num_blocks None, with the ramp-down at the end of a finite clip.

    Args:
        main: main-step timesteps, descending; the window holds as many blocks as there are main steps.
        bootstrap_windows: windows in which every main step is followed by a sub-step; 0 turns PSB off.
        num_blocks: blocks in the clip, None for an endless stream.
    """
    for window in count() if num_blocks is None else range(num_windows(len(main), num_blocks)):
        yield from rolling_window(main, bootstrap_windows, window, num_blocks)


def num_windows(window_blocks: int, num_blocks: int) -> int:
    """Windows needed until `num_blocks` blocks are clean."""
    return num_blocks + window_blocks - 1 if num_blocks > 0 else 0


def rolling_window(
    main: Sequence[float], bootstrap_windows: int, window: int, num_blocks: int | None = None
) -> tuple[DenoiseStep, ...]:
    """The steps of one window: a function of its index, so that a stream may stop, resume and learn its end late."""
    last = window if num_blocks is None else min(window, num_blocks - 1)
    blocks = tuple(range(max(0, window - len(main) + 1), last + 1))
    if not blocks:
        return ()
    levels = (*main, 0)
    here = tuple(levels[window - b] for b in blocks)
    after = tuple(levels[window - b + 1] for b in blocks)
    passes = tuple(window - b + max(0, min(window, bootstrap_windows) - b) for b in blocks)
    if window >= bootstrap_windows:
        return (DenoiseStep(window, blocks, here, after, passes),)
    sub = midpoints(main)
    middle = tuple(sub[window - b] for b in blocks)
    return (
        DenoiseStep(window, blocks, here, middle, passes),
        DenoiseStep(window, blocks, middle, after, tuple(p + 1 for p in passes)),
    )


def blockwise_schedule(
    main: Sequence[float], bootstrap_blocks: int, num_blocks: int | None = None
) -> Iterator[DenoiseStep]:
    """All steps of a one-block rollout (Self-Forcing, Live Avatar, the auxiliary branch of PSB training)."""
    for block in count() if num_blocks is None else range(num_blocks):
        yield from blockwise_window(main, bootstrap_blocks, block, num_blocks)


def blockwise_window(
    main: Sequence[float], bootstrap_blocks: int, block: int, num_blocks: int | None = None
) -> tuple[DenoiseStep, ...]:
    """The steps of one block; the first `bootstrap_blocks` blocks take the sub-steps too."""
    if num_blocks is not None and block >= num_blocks:
        return ()
    levels = list(main)
    if block < bootstrap_blocks:
        levels = [t for pair in zip(main, midpoints(main), strict=True) for t in pair]
    pairs = zip(levels, [*levels[1:], 0], strict=True)
    return tuple(DenoiseStep(block, (block,), (here,), (there,), (i,)) for i, (here, there) in enumerate(pairs))
