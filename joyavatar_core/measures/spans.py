"""What the mouth does during certain sounds.

Shape legend: T pixel frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import statistics
from .statistics import Curve, Interval, Span


def near(spans: Sequence[Span], fps: float, frames: int, margin: float) -> NDArray[np.bool_]:
    """[T] whether the middle of a frame lies within `margin` seconds of one of the spans."""
    middle = (np.arange(frames) + 0.5) / fps
    found = np.zeros(frames, bool)
    for start, end in spans:
        found |= (middle >= start - margin) & (middle <= end + margin)
    return found


def correlation_near(read: Curve, truth: Curve, rows: NDArray[np.bool_], lag: int, least: int = 8) -> float:
    """Correlation over the frames `rows` [T] of the truth, the reading `lag` frames later; nan for under `least`."""
    at = np.flatnonzero(rows)
    at = at[(at + lag >= 0) & (at + lag < len(read)) & (at < len(truth))]
    return statistics.correlation(read[at + lag], truth[at]) if len(at) >= least else float("nan")


def largest(curve: Curve, spans: Sequence[Span], fps: float) -> NDArray[np.float64]:
    """The largest value within one frame of each span (see `statistics.closest`, which takes the smallest)."""
    return -statistics.closest(-np.asarray(curve, np.float64), spans, fps)


def outside(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Those spans that touch none of the others."""
    return [(a, b) for a, b in spans if all(b <= start or a >= end for start, end in others)]


def f1(yes: Sequence[NDArray[np.bool_]], no: Sequence[NDArray[np.bool_]]) -> Interval:
    """F1 = 2 TP / (2 TP + FP + FN) over all clips together.

    yes: for each clip, whether the thing was seen where it should be; no: whether it was seen where it should not.
    """
    hits = np.array([float(one.sum()) for one in yes])
    below = [float(len(y) + n.sum()) for y, n in zip(yes, no, strict=True)]  # TP + FN + FP, one TP short
    return statistics.ratio_interval(list(2 * hits), [h + b for h, b in zip(hits, below, strict=True)])
