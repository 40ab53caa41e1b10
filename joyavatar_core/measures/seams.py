"""The jump of a video where one block ends and the next begins.

Shape legend: T pixel frames.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from . import statistics
from .statistics import Interval


def change(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean absolute difference [T] of frames [T, H, W, 3] from the frame before, in grey levels; the first is 0."""
    steps = [np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)]
    return np.array([0.0, *steps])


def jump(change: NDArray[np.float64], seams: NDArray[np.int64]) -> Interval:
    """Mean change at the seams over the mean change at all other frames; 1: a seam is like any other frame.

    change [T]: see `change`; its first value is left out. seams: indices of the first frames of blocks. The interval
    resamples blocks, each with its seam and the frames up to the next one. Raises ValueError without a seam inside.
    """
    seams = seams[(seams > 0) & (seams < len(change))]
    if not len(seams):
        raise ValueError(f"a video of {len(change)} frames has no seam between blocks")
    ends = np.append(seams[1:], len(change))
    inside = [change[a + 1 : b] for a, b in zip(seams, ends, strict=True)]
    sums, counts = np.array([part.sum() for part in inside]), np.array([len(part) for part in inside])
    first = change[1 : seams[0]]  # before the first seam: part of the whole, not of any block with a seam
    at = change[seams]

    def ratio(rows: NDArray[np.int64]) -> float:
        elsewhere = (sums[rows].sum() + first.sum()) / max(counts[rows].sum() + len(first), 1)
        return float(at[rows].mean() / elsewhere) if elsewhere > 0 else float("nan")

    return statistics.bootstrap(ratio, len(seams))
