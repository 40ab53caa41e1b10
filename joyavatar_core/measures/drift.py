"""What changes over a video: slopes a minute, and windows at its start and its end.

Shape legend: T values of a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import statistics
from .statistics import Interval

WINDOW = 30.0  # seconds
_PIECE = 5.0  # seconds that are resampled together
LEAST = 2.0  # seconds: under this a slope says nothing

Curve = NDArray[np.float64]


def slope(values: Curve, minutes: Curve) -> Interval:
    """Least-squares slope a minute of values [T]; the interval resamples pieces of five seconds."""
    seconds = float(minutes[-1] - minutes[0]) * 60
    count = max(1, min(round(seconds / _PIECE), len(values) // 2))
    pieces = np.array_split(np.stack([minutes, values]), count, axis=1)

    def growth(rows: NDArray[np.int64]) -> float:
        if count > 1 and len(set(rows)) == 1:  # one piece many times over: no line through the whole
            return float("nan")
        times, curve = np.concatenate([pieces[i] for i in rows], axis=1)
        return statistics.slope(curve, times)

    return statistics.bootstrap(growth, count)


def windows(values: Curve, seconds: float) -> tuple[float, float]:
    """Means over the first and the last 30 seconds (or halves, if the video is shorter than a minute)."""
    share = min(WINDOW, seconds / 2) / seconds
    count = max(1, round(share * len(values)))
    return float(values[:count].mean()), float(values[-count:].mean())


@dataclass(frozen=True)
class Change:
    """Mean change from start to end over clips, and the same in standard errors (nan for one clip)."""

    change: Interval
    standard_errors: float


def change(starts: Sequence[float], ends: Sequence[float]) -> Change:
    """Paired: the difference within each clip. Standard error: sample deviation over the root of the clips."""
    steps = np.array(ends) - np.array(starts)
    error = float(steps.std(ddof=1) / np.sqrt(len(steps))) if len(steps) > 1 else float("nan")
    away = abs(float(steps.mean()))
    sigma = away / error if error > 0 else (0.0 if away == 0 and len(steps) > 1 else float("nan"))
    return Change(statistics.mean_interval(list(steps)), sigma)
