"""The mouth of speech: the shapes of the sounds of the International Phonetic Alphabet and the curves between them.

A sound is a label of IPA letters with a start and an end. Its letters name shapes (a diphthong names two, one after
the other); the shapes blend by weighted smoothing, where the weight says how much a sound insists: lips always shut
for m, but for k they take the shape of the vowels around it. Dominance of targets: Cohen and Massaro, "Modeling
coarticulation in synthetic visual speech", 1993. Closures are then held, however fast the speech is.

Shape legend: n sound samples, K control points (200 a second), S sounds, T pixel frames.
"""

# ruff: noqa: RUF001 (letters of the phonetic alphabet that look like Latin ones)

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

CONTROL_RATE = 200
ANTICIPATION = 0.03  # seconds by which lips lead the sound
KINDS = ("silence", "bilabial", "labiodental", "rounded", "spread", "open", "sibilant", "other")
# Full widths at half height of the smoothing kernels, in seconds: rounding spreads further than the jaw.
_WIDTHS = np.array([0.065, 0.100, 0.060])
_HOLD, _RAMP = 0.066, 0.030  # a closure lasts longer than a frame of 1/16 s; lips take the ramp to shut and to part
_LIP_TEETH_GAP = 0.05  # opening while the lip is on the teeth


@dataclass(frozen=True)
class TimedPhone:
    """One sound of a clip: IPA label ("" for silence), start and end in seconds, and one of `KINDS`."""

    label: str
    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Speech:
    """Sound and the mouth that makes it.

    audio: [n] float32 in [-1, 1], mono, `sample_rate` Hz.
    open: [T] 0 (lips closed) .. 1 (a). wide: [T] -1 (round: u) .. 1 (spread: i). teeth: [T] 0 .. 1 (s).
    stress: [T] 0..1, for brows and head. Curves are read at the middle of each frame, (t + 0.5) / fps seconds.
    phones: the sounds in order, silences included, from 0 to the end of the clip without gaps.
    source: who spoke, such as "espeak-ng en-us+f3" or "babble".
    """

    audio: Array
    sample_rate: int
    fps: Fraction
    open: Array
    wide: Array
    teeth: Array
    stress: Array
    phones: tuple[TimedPhone, ...]
    source: str


@dataclass(frozen=True)
class Shape:
    """Target of one IPA letter: open, wide and teeth as in `Speech`, its kind, and how much it insists on each."""

    open: float
    wide: float
    teeth: float
    kind: str
    weights: tuple[float, float, float]


_FIRM, _VOWEL, _TONGUE, _BACK = (1.0, 0.5, 1.0), (1.0, 1.0, 1.0), (0.8, 0.25, 0.8), (0.35, 0.15, 0.3)
SILENCE = Shape(0.0, 0.0, 0.0, "silence", _VOWEL)
NEUTRAL = Shape(0.30, 0.05, 0.15, "other", _TONGUE)
_ROWS: tuple[tuple[str, float, float, float, str, tuple[float, float, float]], ...] = (
    ("m b p ɓ ʙ ɸ β", 0.0, 0.0, 0.0, "bilabial", _FIRM),
    ("f v ɱ ʋ ⱱ", _LIP_TEETH_GAP, 0.10, 0.80, "labiodental", _FIRM),
    ("s z ɕ ʑ ʂ ʐ", 0.14, 0.45, 1.0, "sibilant", (1.0, 0.5, 1.0)),
    ("ʃ ʒ ɧ", 0.20, -0.45, 0.75, "sibilant", (1.0, 0.9, 1.0)),
    ("t d ʈ ɖ ɗ", 0.20, 0.15, 0.45, "other", _TONGUE),
    ("n ɳ", 0.22, 0.15, 0.40, "other", _TONGUE),
    ("l ɫ ɭ ɬ ɮ ɺ ɾ ɽ r", 0.32, 0.10, 0.30, "other", _TONGUE),
    ("θ ð", 0.20, 0.15, 0.60, "other", (1.0, 0.3, 1.0)),
    ("ɹ ɻ ɚ ɝ", 0.30, -0.30, 0.15, "other", (0.8, 0.7, 0.8)),
    ("j ʝ ç c ɟ ɲ ʎ ʄ", 0.24, 0.60, 0.40, "other", (0.8, 0.5, 0.8)),
    ("k ɡ g ŋ x ɣ ɠ q ɢ ɴ χ ʁ ʀ ʛ ɰ ʟ", 0.32, 0.0, 0.10, "other", _BACK),
    ("h ɦ ħ ʕ ʔ ʜ ʢ ʡ", 0.35, 0.0, 0.05, "other", (0.15, 0.05, 0.1)),
    ("w ɥ ʍ ʷ", 0.14, -1.0, 0.0, "rounded", _VOWEL),
    ("u ɯᵝ", 0.24, -1.0, 0.0, "rounded", _VOWEL),
    ("ʉ y ʏ", 0.24, -0.85, 0.05, "rounded", _VOWEL),
    ("ʊ", 0.32, -0.70, 0.0, "rounded", _VOWEL),
    ("o ɵ ɤ", 0.52, -0.75, 0.0, "rounded", _VOWEL),
    ("ø œ ɞ", 0.48, -0.60, 0.05, "rounded", _VOWEL),
    ("ɔ", 0.65, -0.55, 0.0, "rounded", _VOWEL),
    ("ɒ ɶ", 0.80, -0.35, 0.0, "open", _VOWEL),
    ("i", 0.26, 0.95, 0.50, "spread", _VOWEL),
    ("ɪ ɨ ᵻ", 0.32, 0.65, 0.35, "spread", _VOWEL),
    ("ɯ", 0.28, 0.35, 0.30, "other", _VOWEL),
    ("e ɘ", 0.50, 0.65, 0.25, "spread", _VOWEL),
    ("ɛ", 0.65, 0.45, 0.20, "spread", _VOWEL),
    ("ə ɜ", 0.42, 0.05, 0.10, "other", (0.8, 0.7, 0.8)),
    ("ʌ ɐ", 0.72, 0.05, 0.10, "open", _VOWEL),
    ("æ", 0.90, 0.30, 0.15, "open", _VOWEL),
    ("a ɑ", 1.0, 0.10, 0.10, "open", _VOWEL),
)
SHAPES = {letter: Shape(*row[1:]) for row in _ROWS for letter in row[0].split()}


@cache
def shapes(label: str) -> tuple[Shape, ...]:
    """Shapes of an IPA label in order; marks are skipped, an unknown label is a neutral mouth, "" is silence.

    Accented letters that are not letters of the alphabet themselves count as their base letter (a with two dots: a).
    """
    if not label:
        return (SILENCE,)
    if label in SHAPES:
        return (SHAPES[label],)
    known = tuple(SHAPES[c] for c in unicodedata.normalize("NFC", label) for c in _letters(c) if c in SHAPES)
    return known or (NEUTRAL,)


def _letters(letter: str) -> str:
    return letter if letter in SHAPES else unicodedata.normalize("NFD", letter)[0]


@cache
def kind(label: str) -> str:
    """The kind of `KINDS` that a viewer would name first: that of the first letter with one of its own."""
    kinds = [shape.kind for shape in shapes(label)]
    return next((k for k in kinds if k != "other"), "other")


def timed(labels: Sequence[str], starts: Sequence[float], seconds: float) -> tuple[TimedPhone, ...]:
    """Sounds from their starts (rising, in seconds), each lasting until the next, the last until `seconds`."""
    ends = [*starts[1:], seconds]
    spans = zip(labels, starts, ends, strict=True)
    return tuple(TimedPhone(k, float(a), float(min(b, seconds)), kind(k)) for k, a, b in spans if a < min(b, seconds))


def smooth(tracks: NDArray[np.floating], width: float) -> NDArray[np.float64]:
    """Gaussian along the last axis of [*, K], `width` seconds at half height, edges held."""
    sigma = width * CONTROL_RATE / 2.355
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(tracks, ((0, 0), (reach, reach)), mode="edge")
    return np.stack([np.convolve(row, kernel, mode="valid") for row in padded])


def frames(tracks: NDArray[np.floating], count: int, fps: float) -> tuple[Array, Array, Array, Array]:
    """Open, wide, teeth and stress, [4, K], read at the middles of `count` frames, as early as lips are: [T] each."""
    times = (np.arange(count) + 0.5) / fps + ANTICIPATION
    grid = np.arange(tracks.shape[1]) / CONTROL_RATE
    open_, wide, teeth, stress = (np.interp(times, grid, row).astype(np.float32) for row in tracks)
    return open_, wide, teeth, stress


def curves(phones: Sequence[TimedPhone], loudness: NDArray[np.floating]) -> NDArray[np.float64]:
    """[3, K] open, wide and teeth of sounds that cover the clip, before anticipation.

    loudness: [K] 0..1, a loud vowel opens wider. In silence all are 0.
    """
    values, weights = _targets(phones, len(loudness))
    values[0] *= 0.8 + 0.2 * loudness
    tracks = np.empty_like(values)
    for row, width in enumerate(_WIDTHS):
        total = smooth(np.stack([values[row] * weights[row], weights[row]]), width)
        tracks[row] = total[0] / total[1]
    hold_closures(tracks, phones)
    return tracks


def _targets(phones: Sequence[TimedPhone], points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([3, K] targets, [3, K] weights): every sound divided evenly among its shapes."""
    parts = [(shape, p, k, len(shapes(p.label))) for p in phones for k, shape in enumerate(shapes(p.label))]
    starts = np.array([p.start + (p.end - p.start) * k / count for _, p, k, count in parts])
    edges = np.append(np.round(starts * CONTROL_RATE).astype(np.int64), points).clip(0, points)
    lengths = np.diff(edges)
    values = np.array([(s.open, s.wide, s.teeth) for s, *_ in parts]).T
    weights = np.array([s.weights for s, *_ in parts]).T
    return np.repeat(values, lengths, axis=1), np.repeat(weights, lengths, axis=1)


def hold_closures(tracks: NDArray[np.float64], phones: Sequence[TimedPhone]) -> None:
    """Change [open, wide, teeth, ...] so that lips shut for m b p and lie on the teeth for f v, for at least a frame.

    Time that the sound itself does not give is taken before it.
    """
    times = np.arange(tracks.shape[1]) / CONTROL_RATE
    for phone in phones:
        if phone.kind not in ("bilabial", "labiodental"):
            continue
        end = _release(phone)
        start = min(phone.start, end - _HOLD)
        first, last = np.searchsorted(times, (start - _RAMP, end + _RAMP))
        near = times[first:last]
        away = np.clip(np.maximum(start - near, near - end) / _RAMP, 0, 1)
        free = 0.5 - 0.5 * np.cos(np.pi * away)  # 0 while held, 1 a ramp away
        floor = 0.0 if phone.kind == "bilabial" else _LIP_TEETH_GAP
        tracks[0, first:last] = floor + (tracks[0, first:last] - floor) * free
        teeth = 0.0 if phone.kind == "bilabial" else SHAPES["f"].teeth
        tracks[2, first:last] = teeth + (tracks[2, first:last] - teeth) * free


def _release(phone: TimedPhone) -> float:
    """When the lips part: before the end of a sound that goes on after its closure (the breath of p, the s of ps)."""
    share = 0.75 if phone.label[:1] in ("b", "p") else 1.0
    return phone.start + (phone.end - phone.start) * share / len(shapes(phone.label))
