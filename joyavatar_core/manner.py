"""What a person does that no sound tells: where they look, how the head sways, a blink in the middle of a sentence.

The embedded model is told a few readings of every pixel frame. Ears give some of them (`HEARD`); what they cannot know
is drawn here as a function of (seed, pixel frame), whatever the chunking of the sound, a resume or the length. A model
that is told all that moves draws it sharply; one that is left to guess draws the mean of what might be.

Shape legend: T pixel frames, K readings, HEARD first and DRAWN behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from .noise import gaussian

HEARD = ("open", "wide", "teeth", "brow", "blink", "head_y")
"""Readings of the sound: opening, width and teeth of the mouth, brows, lids, the head's nod."""

DRAWN = ("gaze_x", "gaze_y", "head_x", "roll", "scale")
"""Readings that are drawn, in usual deviations from their means."""

USUAL = ((0.0, 0.2), (0.0, 0.2), (0.0, 0.02), (0.0, 0.012), (1.0, 0.007))
"""Mean and deviation of DRAWN: gaze in -1 .. 1, head in half face heights, roll in radians, size in shares."""

LIMITS = ((-0.25, 1.2), (-1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.0, 1.0), (-0.07, 0.12), *((-5.0, 5.0),) * len(DRAWN))
"""Least and most of each reading: where ears say more, no face goes. Of the opening a little more: lips that are asked
to press close better."""

_HEARD_USUAL = (0.25, 0.4, 0.25, 0.25, 0.25, 0.02)

_SWAY = {"head_x": (1.8, 0.8), "roll": (2.2, 0.8), "scale": (2.6, 0.8), "head_y": (1.8, 0.006)}
"""Correlation time in seconds, and deviation: of what is heard as well this much is drawn besides."""
_SINES = 6
_GLANCE, _GLANCE_ODDS = 1.6, 0.3  # seconds that a gaze rests; odds that it goes aside
_AWAY, _REST = 2.5, 0.3  # deviations of a gaze aside and at the viewer
_BLINK, _BLINK_EVERY, _BLINK_ODDS = 0.3, 4.0, 0.3  # seconds from open to open; one in so many seconds, at these odds
_FALL, _RISE = 0.07, 0.10  # seconds


def manner(seed: int, frames: Sequence[int], fps: Fraction) -> Tensor:
    """What is drawn of these pixel frames, to be added to what is heard: [T, K] float32.

    Columns HEARD hold what a stream adds to its ears: now and then a blink, some sway of the head. Motion is that of
    the drawn clips: heads sway by 0.02 half face heights, gazes rest for 1.6 s, lids fall four times a minute more
    than in the pauses that ears know of.
    """
    time = torch.tensor([float(frame / fps) for frame in frames], dtype=torch.float64)
    columns: dict[str, Tensor] = {name: torch.zeros_like(time) for name in (*HEARD, *DRAWN)}
    for name, (_, deviation) in _SWAY.items():
        columns[name] = deviation * _sway(time, *_waves(seed, name))
    columns["gaze_x"], columns["gaze_y"] = _gaze(seed, time)
    columns["blink"] = _blinks(seed, time)
    return torch.stack(list(columns.values()), dim=1).float()


def usual_deviations() -> tuple[float, ...]:
    """[K] how far each reading usually is from its mean."""
    return (*_HEARD_USUAL, *(1.0 for _ in DRAWN))


def as_told(columns: Tensor) -> Tensor:
    """True columns [*, K] in the units of a drawn pose, HEARD and DRAWN, as a model is told them."""
    mean, deviation = columns.new_tensor([*((0.0, 1.0) for _ in HEARD), *USUAL]).unbind(1)
    return (columns - mean) / deviation


@lru_cache(maxsize=64)  # a host lives long and meets many seeds
def _waves(seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Angular frequencies and phases [_SINES] of a sway of _SWAY."""
    draws = _even(seed, (*HEARD, *DRAWN).index(name), 2 * _SINES, "sway")
    return 2 * torch.pi * (0.25 + 0.75 * draws[:_SINES]) / _SWAY[name][0], 2 * torch.pi * draws[_SINES:]


def _sway(time: Tensor, speed: Tensor, phase: Tensor) -> Tensor:
    """[T] smooth noise of unit deviation."""
    return torch.sin(time[:, None] * speed + phase).sum(1) * (2 / _SINES) ** 0.5


def _gaze(seed: int, time: Tensor) -> tuple[Tensor, Tensor]:
    """[T] gaze to the side and up, in usual deviations: it rests, and jumps where a rest ends."""
    rests = [_rest(seed, int(cell)) for cell in (time / _GLANCE).floor()]
    return torch.stack([x for x, _ in rests]), torch.stack([y for _, y in rests])


def _rest(seed: int, cell: int) -> tuple[Tensor, Tensor]:
    aside = cell > 0 and bool(_even(seed, cell, 1, "glance")[0] < _GLANCE_ODDS)  # the picture itself looks at one
    place = gaussian(seed, cell, 1, (2,), "manner").double() * (_AWAY if aside else _REST)
    x, y = place.clamp(-4.0, 4.0)
    return x, y


def _blinks(seed: int, time: Tensor) -> Tensor:
    """[T] lids of the blinks that no pause foretells, 0 open .. 1 shut."""
    shut = torch.zeros_like(time)
    for cell in (time / _BLINK_EVERY).floor().unique().tolist():
        comes, place = _even(seed, int(cell), 2, "blink")
        since = time - _BLINK_EVERY * cell - place * (_BLINK_EVERY - _BLINK)
        if comes < _BLINK_ODDS:
            shut = torch.maximum(shut, torch.minimum(since / _FALL, (_BLINK - since) / _RISE).clamp(0, 1))
    return shut


_KINDS = ("sway", "glance", "blink")


def _even(seed: int, place: int, count: int, kind: str) -> Tensor:
    """[count] evenly drawn numbers in 0 .. 1 that belong to the arguments."""
    return torch.special.ndtr(gaussian(seed, place, 2 + _KINDS.index(kind), (count,), "manner").double())
