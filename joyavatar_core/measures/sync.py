"""Mouth against sound without a network that was trained on recorded people.

Shape legend: n sound samples, T pixel frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import statistics

Curve = NDArray[np.float64]

REACH = 0.4  # seconds by which a mouth may be early or late
_TURNS = 16  # other times at which chance is looked at
_APART = 2.0  # seconds between the true time and those


@dataclass(frozen=True)
class Relation:
    """Correlation at the best lag; lag in seconds (positive: the mouth is late); chance: the same with sound from
    other times of the video, mean over 16 of them (nan where the video is too short for that)."""

    correlation: float
    lag: float
    chance: float


def envelope(audio: NDArray[np.floating], rate: int, fps: float, frames: int) -> Curve:
    """Amplitude [T] of the sound [n] in each frame, 1 for the loud ones of the clip (their 95 % quantile).

    Not in decibels: silence is digital in synthesised speech and noise in recordings.
    """
    return 10 ** (statistics.loudness(audio, rate, fps, frames) / 20)


def relation(mouth: Curve, sound: Curve, fps: float) -> Relation:
    """How a curve of the mouth [T] follows the envelope [T], at the best lag within 0.4 seconds.

    Raises ValueError for curves under a second.
    """
    count = min(len(mouth), len(sound))
    if count < max(fps, 4):
        raise ValueError(f"{count / fps:.2f} s are too short to set a mouth against its sound: at least 1 s is needed")
    mouth, sound = mouth[:count], sound[:count]
    reach = min(round(REACH * fps), count // 3)
    lags = range(-reach, reach + 1)
    table = statistics.correlations(mouth, sound, lags)
    best = int(np.argmax(table))
    first, last = round(_APART * fps), count - round(_APART * fps)
    turns = np.linspace(first, last, _TURNS).round().astype(int) if last - first >= fps else []
    others = [float(statistics.correlations(mouth, np.roll(sound, turn), lags).max()) for turn in turns]
    chance = float(np.mean(others)) if others else float("nan")
    return Relation(float(table[best]), lags[best] / fps, chance)
