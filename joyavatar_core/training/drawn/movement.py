"""Motion of head, gaze, lids and brows that goes with a speech.

Most of it can be heard, so that it can be learnt: heads nod and brows rise with stress, heads settle at pauses, lids
fall where a phrase ends. The rest is slow sway and chance.

Shape legend: T pixel frames.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from ..mouth import Speech
from .avatar import Pose

Track = NDArray[np.float64]

_PAUSE = 0.14  # seconds of silence that end a phrase
_LEAST_GAP = 1.4  # seconds between blinks
_BLINK = 0.30  # seconds from open to open
_BLINK_AFTER = 0.25  # seconds from the start of a pause that lasts so long


def motion(seed: int, speech: Speech, frames: int) -> tuple[Pose, ...]:
    """Poses of `frames` frames: lips from the speech (its last frame is held), the rest from its stress and pauses.

    The head's motion follows the smoothed stress by 40 ms; its sway has a deviation of about 0.025 half face heights.
    """
    rng = np.random.default_rng((seed, 3))
    fps = float(speech.fps)
    at = np.minimum(np.arange(frames), len(speech.open) - 1)
    stress, pauses = _smooth(speech.stress[at].astype(float), 0.11 * fps), _pauses(speech, frames)
    talking = _smooth(1.0 - _inside(pauses, frames, fps), 0.25 * fps)
    lively = rng.uniform(0.6, 1.3)
    sway = lively * np.stack([_sway(rng, frames, fps, s) for s in (1.8, 1.8, 2.2, 2.6, 1.5)])
    nod, lean = lively * rng.uniform(0.14, 0.22), lively * rng.choice((-1, 1)) * rng.uniform(0.06, 0.12)
    breath = np.sin(2 * np.pi * (rng.uniform(0.2, 0.3) * np.arange(frames) / fps + rng.random()))
    gaze = _glances(rng, pauses, frames, fps)
    columns = np.stack(
        [
            *(speech.open[at], speech.wide[at], speech.teeth[at], _blinks(rng, speech, pauses, frames)),
            *(gaze[:, 0], gaze[:, 1], np.clip(0.2 * sway[4] + 0.95 * stress - 0.1, -1, 1)),
            np.clip(0.012 * sway[0] + lean * (stress - 0.3), -0.13, 0.13),
            np.clip(0.006 * sway[1] + nod * stress - 0.035 * talking + 0.006 * breath, -0.07, 0.12),
            np.clip(0.009 * sway[2] + 0.5 * lean * (stress - 0.3), -0.09, 0.09),
            np.clip(1 + 0.006 * sway[3] + 0.014 * (talking - 0.7), 0.965, 1.035),
        ],
        axis=1,
    )
    assert columns.shape[1] == len(fields(Pose))
    return tuple(Pose(*map(float, row)) for row in columns)


def _smooth(curve: Track, width: float) -> Track:
    """[T] under a Gaussian of this deviation in frames, the ends held."""
    reach = max(1, int(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    return np.convolve(np.pad(curve, reach, "edge"), kernel / kernel.sum(), "valid").astype(np.float64)


def _pauses(speech: Speech, frames: int) -> list[tuple[float, float]]:
    """(start, end) in seconds of the silences that separate phrases."""
    end = frames / float(speech.fps)
    silences = [(p.start, p.end) for p in speech.phones if p.kind == "silence" and p.start < end]
    return [(a, b) for a, b in silences if b - a >= _PAUSE]


def _inside(spans: list[tuple[float, float]], frames: int, fps: float) -> Track:
    """[T] 1 where the middle of a frame lies in a span."""
    time = (np.arange(frames) + 0.5) / fps
    return np.any([(time >= a) & (time < b) for a, b in spans] or [np.zeros(frames, bool)], axis=0).astype(float)


def _sway(rng: np.random.Generator, frames: int, fps: float, seconds: float) -> Track:
    """[T] smooth noise of unit deviation with this correlation time; sums of sines do not depend on T."""
    time = np.arange(frames) / fps
    hz = rng.uniform(0.25, 1.0, 6) / seconds
    phase = rng.uniform(0, 2 * np.pi, 6)
    return np.sin(2 * np.pi * hz * time[:, None] + phase).sum(1) / np.sqrt(3)


def _blinks(rng: np.random.Generator, speech: Speech, pauses: list[tuple[float, float]], frames: int) -> Track:
    """[T] 10 to 25 blinks a minute, the lids shut for two frames or more at 16 a second.

    They fall early in the pauses, and at random where there was none for long.
    """
    fps = float(speech.fps)
    wanted = [a + _BLINK_AFTER for a, b in pauses if b - a > _BLINK_AFTER]
    at, chance = 0.0, rng.uniform(6.0, 12.0)
    while at < frames / fps:
        at += 1.0 + rng.exponential(chance)
        wanted.append(at)
    out, last = np.zeros(frames), -_LEAST_GAP
    time = np.arange(frames) / fps
    for begin in sorted(wanted):
        if begin - last >= _LEAST_GAP:
            # Lids fall in 70 ms, stay shut and rise in 100 ms.
            rise = np.minimum((time - begin) / 0.07, (begin + _BLINK - time) / 0.10)
            out, last = np.maximum(out, np.clip(rise, 0, 1)), begin
    return out


def _glances(rng: np.random.Generator, pauses: list[tuple[float, float]], frames: int, fps: float) -> Track:
    """[T, 2] gaze that rests and jumps: at the viewer, with a glance aside now and then, most of them in pauses."""
    out = np.zeros((frames, 2))
    at = 0.0
    while at < frames / fps:
        pausing = any(a <= at < b for a, b in pauses)
        away = rng.random() < (0.5 if pausing else 0.2)
        out[int(at * fps) :] = np.clip(rng.normal(0, 0.5 if away else 0.06, 2), -1, 1)
        at += rng.uniform(0.4, 1.1) if away else rng.uniform(0.8, 2.6)
    return out
