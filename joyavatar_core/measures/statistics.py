"""Statistics of curves and pictures: agreement with a truth, intervals over clips, and what loudness alone can tell.

Nothing here knows a model. Curves are one number a pixel frame; a clip is the unit that is resampled, for frames of
one clip are not independent of one another.

Shape legend: T pixel frames, n sound samples, C clips, K taps, H W pixel size, N pixels of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.floating]
Span = tuple[float, float]
"""Start and end in seconds."""

LAGS = range(-4, 5)
TAPS = 12  # frames of loudness the predictor hears: three quarters of a second at 16 fps
_FLOOR_DB = -60.0
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, over n clips."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], clips: int, seed: int = 0) -> Interval:
    """A statistic of clips, given by their indices, and the 2.5 and 97.5 % quantiles of it over resampled clips.

    Efron's percentile bootstrap, 2000 resamples. ValueError without clips.
    """
    if clips < 1:
        raise ValueError("an interval needs at least one clip")
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(clips, size=clips)) for _ in range(_RESAMPLES)] if clips > 1 else []
    whole = statistic(np.arange(clips))
    kept = np.array([value for value in drawn if np.isfinite(value)] or [whole])
    low, high = np.quantile(kept, (0.025, 0.975))
    return Interval(float(whole), float(low), float(high), clips)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of one value a clip; values that are not finite (a clip without the thing measured) are left out."""
    kept = np.array([value for value in values if np.isfinite(value)])
    return bootstrap(lambda rows: float(kept[rows].mean()), len(kept), seed)


def ratio_interval(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval:
    """Sum of one value a clip over the sum of another: for rates, and for ratios of rare things."""
    top, bottom = np.array(above, float), np.array(below, float)
    return bootstrap(lambda rows: _ratio(top[rows].sum(), bottom[rows].sum()), len(top), seed)


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else float("nan")


# Curves


def correlation(a: Curve, b: Curve) -> float:
    """Pearson's; 0 where one of them does not vary."""
    a, b = a - np.mean(a), b - np.mean(b)
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum() / size) if size > 1e-12 else 0.0


def correlations(read: Curve, truth: Curve, lags: Sequence[int] = LAGS) -> NDArray[np.float64]:
    """Correlation at each lag, in frames: at lag 1 what is read comes a frame later than the truth."""
    return np.array([correlation(*_shifted(read, truth, lag)) for lag in lags])


def _shifted(read: Curve, truth: Curve, lag: int) -> tuple[Curve, Curve]:
    count = min(len(read), len(truth))
    if count <= abs(lag) + 1:
        raise ValueError(f"curves of {count} frames are too short for a lag of {lag} frames")
    read, truth = read[:count], truth[:count]
    return (read[lag:], truth[: count - lag]) if lag >= 0 else (read[:lag], truth[-lag:])


def best_lag(table: NDArray[np.float64], lags: Sequence[int] = LAGS) -> int:
    """The lag at which the mean over clips of `correlations` [C, lags] is largest."""
    return int(lags[int(np.argmax(table.mean(0)))])


def r_squared(read: Curve, truth: Curve) -> float:
    """Share of the variance of the truth that the reading explains: 1 - mean squared error / variance."""
    spread = float(np.square(truth - np.mean(truth)).sum())
    return 1 - float(np.square(read - truth).sum()) / spread if spread else float("nan")


def pooled_r_squared(read: Sequence[Curve], truth: Sequence[Curve], seed: int = 0) -> Interval:
    """R2 over the frames of all clips together, about their common mean; the interval resamples clips."""
    sums = np.array(
        [(len(t), t.sum(), np.square(t).sum(), np.square(r - t).sum()) for r, t in zip(read, truth, strict=True)]
    )

    def statistic(rows: NDArray[np.int64]) -> float:
        count, total, squares, wrong = sums[rows].sum(0)
        return 1 - _ratio(wrong, squares - total * total / count)

    return bootstrap(statistic, len(sums), seed)


# What loudness alone tells


def loudness(audio: Curve, sample_rate: int, fps: float, frames: int) -> NDArray[np.float64]:
    """Level of the sound [n] in each frame [T], in dB below the loud frames of the clip (95 % quantile), at least -60.

    Knowing the level of the whole clip is a favour to whoever predicts from it.
    """
    edges = np.round(np.arange(frames + 1) * sample_rate / fps).astype(int)
    power = np.concatenate([[0.0], np.cumsum(np.square(np.asarray(audio, np.float64)))])
    at = np.minimum(edges, len(audio))
    rms = np.sqrt(np.diff(power[at]) / np.maximum(np.diff(edges), 1))
    loud = max(float(np.quantile(rms, 0.95)), 1e-6)
    return np.maximum(20 * np.log10(np.maximum(rms / loud, 1e-6)), _FLOOR_DB)


@dataclass(frozen=True)
class LoudnessPredictor:
    """The best linear guess of a curve from the loudness of this and earlier frames, and from shapes of it.

    weights [3 K + 1]: of level in decibels, of amplitude and of squared level in K frames, and of one.
    """

    weights: NDArray[np.float64]

    @staticmethod
    def fit(levels: Sequence[Curve], truth: Sequence[Curve], ridge: float = 1e-3) -> LoudnessPredictor:
        """Ridge regression over clips: levels (see `loudness`) and truth, [T] each."""
        x = np.concatenate([_taps(level) for level in levels])
        y = np.concatenate(list(truth))
        gram = x.T @ x
        return LoudnessPredictor(np.linalg.solve(gram + ridge * len(x) * np.eye(len(gram)), x.T @ y))

    def predict(self, level: Curve) -> NDArray[np.float64]:
        """The guess [T] for the levels [T] of a clip."""
        return _taps(level) @ self.weights


def _taps(level: Curve) -> NDArray[np.float64]:
    """[T, 3 K + 1]; before the clip it is silent."""
    padded = np.concatenate([np.full(TAPS - 1, _FLOOR_DB), level])
    past = np.lib.stride_tricks.sliding_window_view(padded, TAPS) / -_FLOOR_DB  # -1 (silent) .. about 0
    amplitude = 10 ** (past * -_FLOOR_DB / 20)
    return np.concatenate([1 + past, amplitude, (1 + past) ** 2, np.ones((len(level), 1))], axis=1)


# Speech


def closest(opening: Curve, spans: Sequence[Span], fps: float) -> NDArray[np.float64]:
    """The smallest opening within one frame of each span; spans that no frame is near to are left out.

    A frame is near when its middle lies at most one frame before the start or after the end.
    """
    middle = (np.arange(len(opening)) + 0.5) / fps
    near = [(middle >= start - 1 / fps) & (middle <= end + 1 / fps) for start, end in spans]
    return np.array([opening[rows].min() for rows in near if rows.any()])


def closure_threshold(smallest: Curve, low: float = 0.08, high: float = 0.15) -> float:
    """The opening under which lips count as closed: what 19 of 20 closures of true frames reach, within limits."""
    return float(np.clip(np.quantile(smallest, 0.95), low, high)) if len(smallest) else low


def moved(spans: Sequence[Span], seconds: float, by: float) -> list[Span]:
    """The spans at other times of the clip, those past its end from its start: what chance would give."""
    starts = [((start + by) % seconds, end - start) for start, end in spans]
    return [(start, min(start + length, seconds)) for start, length in starts]


def mean_inside(curve: Curve, spans: Sequence[Span], fps: float, margin: float) -> float:
    """Mean of the curve over frames whose middle lies inside a span, `margin` seconds from its ends; nan if none."""
    middle = (np.arange(len(curve)) + 0.5) / fps
    inside = np.zeros(len(curve), bool)
    for start, end in spans:
        inside |= (middle >= start + margin) & (middle <= end - margin)
    return float(curve[inside].mean()) if inside.any() else float("nan")


def count_blinks(blink: Curve, shut: float = 0.5, opened: float = 0.25) -> int:
    """Blinks of a curve: one begins where it rises to `shut` and ends where it falls under `opened`."""
    count, inside = 0, False
    for value in blink:
        if not inside and value >= shut:
            count, inside = count + 1, True
        elif inside and value < opened:
            inside = False
    return count


def head_deviation(place: NDArray[np.floating], smooth: int = 5) -> float:
    """How far the head moves: deviation of its place over time, in half face heights, both axes together.

    place [T, 4]: x, y, half the face's height, roll. A mean over `smooth` frames takes out what is no motion.
    """
    middle = place[:, :2] / np.median(place[:, 2])
    width = min(smooth, len(middle))
    kernel = np.ones(width) / width
    calm = np.stack([np.convolve(axis, kernel, mode="valid") for axis in middle.T])
    return float(np.sqrt(calm.var(axis=1).sum()))


def slope(values: Curve, times: Curve) -> float:
    """Least-squares slope of values over times."""
    centred = times - np.mean(times)
    return float((centred * (values - np.mean(values))).sum() / np.square(centred).sum())
