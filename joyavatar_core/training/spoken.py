"""Clips spoken by espeak-ng: sentences of many languages and voices between pauses, with the mouth of every sound.

The starts that the library reports are exact to a few milliseconds, with one turn: p, t, k and their like are dated
at their release, so that the silence before it is counted to the sound in front. It is given back here, measured in
the sound, because lips are shut in it.

Shape legend: n sound samples, K control points (200 a second), S sounds, T pixel frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .espeak import Espeak, Utterance, Voice
from .mouth import CONTROL_RATE, Array, Speech, TimedPhone, curves, frames, smooth, timed
from .texts import sentence

SAMPLE_RATE = 16_000
# Voices of a language, the first part of its texts' name; English and German are drawn more often.
LANGUAGES = {
    "en": ("en-us", "gmw/en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc"),
    "de": ("de",),
    "fr": ("fr", "fr-be"),
    "es": ("es", "es-419"),
    "it": ("it",),
    "pt": ("pt", "pt-br"),
    "nl": ("nl",),
    "pl": ("pl",),
    "ru": ("ru",),
    "tr": ("tr",),
    "sv": ("sv",),
    "cmn": ("cmn-latn-pinyin",),
    "ja": ("ja",),
    "hi": ("hi",),
    "fi": ("fi",),
    "cs": ("cs",),
}
_ODDS = {"en": 6.0, "de": 2.5}
_WOMEN = ("f1", "f2", "f3", "f4", "Alicia", "Andrea", "belinda", "linda", "steph", "anika", "grandma")
_MEN = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m8", "adam", "Alex", "Andy", "boris", "caleb", "david", "Denis", "ed"),
    *("edward", "Gene", "Henrique", "john", "kaukovalta", "Lee", "Mario", "max", "michael", "michel", "miguel"),
    *("pablo", "pedro", "quincy", "rob", "robert", "sandro", "shelby", "travis", "zac", "norbert", "klatt"),
    *("klatt2", "grandpa"),
)
_HELD_OUT_WOMEN, _HELD_OUT_MEN = ("f5", "Annie", "aunty"), ("m7", "Mike", "benjamin", "victor")
_QUIET = 10 ** (-50 / 20)  # espeak-ng's own silence is digital
_LONGEST_CLOSURE, _SHORTEST_CLOSURE = 0.09, 0.025  # seconds of silence before a release
_STOPS = frozenset("ptkqcʈʔʡ")  # noqa: RUF001 (letters of the phonetic alphabet)


@dataclass(frozen=True)
class _Part:
    """A stretch of the clip at the library's rate: [n] samples and the sounds in it, seconds from its own start."""

    audio: Array
    rate: int
    labels: tuple[str, ...]
    starts: tuple[float, ...]
    stressed: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return len(self.audio) / self.rate


def variants(held_out: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(women, men): the variants of espeak-ng's voices that one side speaks with."""
    return (_HELD_OUT_WOMEN, _HELD_OUT_MEN) if held_out else (_WOMEN, _MEN)


def speak(seed: int, seconds: float, fps: Fraction, held_out: bool) -> Speech:
    """A clip of one voice: a rest of 0..0.6 s, then sentences with pauses, cut to round(seconds * 16000) samples.

    The same seed gives the same speech on the same version of espeak-ng. Silence is digital silence, the peak is at
    -12..-1 dB. held_out: speak with the voices and texts that training never hears. Raises OSError without espeak-ng.
    """
    rng = np.random.default_rng((seed, 0xE5))
    with Espeak(seed) as espeak:
        language, voice = _voice(rng, espeak, held_out)
        rate, parts = espeak.sample_rate, [_pause(rng.uniform(0, 0.6), espeak.sample_rate)]
        while sum(len(part.audio) for part in parts) <= seconds * rate:
            said = espeak.say(voice, sentence(rng, language, held_out))
            parts += [_trimmed(said), _pause(_pause_length(rng), rate)]
    track = _joined(parts)
    audio = _resampled(track.audio, rate)[: round(seconds * SAMPLE_RATE)]
    peak = max(float(np.abs(audio).max()), 1e-6)
    sounds, mouth = _mouth(audio, track, seconds)
    read = frames(mouth, round(seconds * float(fps)), float(fps))
    audio *= np.float32(10 ** (-rng.uniform(1, 12) / 20) / peak)
    return Speech(audio, SAMPLE_RATE, fps, *read, sounds, f"espeak-ng {voice.name}")


def _voice(rng: np.random.Generator, espeak: Espeak, held_out: bool) -> tuple[str, Voice]:
    """(language, voice). A voice that this espeak-ng does not have gives way to English without a variant."""
    odds = np.array([_ODDS.get(language, 1.0) for language in LANGUAGES])
    language = str(rng.choice(list(LANGUAGES), p=odds / odds.sum()))
    accents, group = LANGUAGES[language], variants(held_out)[rng.integers(2)]
    name = f"{accents[rng.integers(len(accents))]}+{group[rng.integers(len(group))]}"
    pace, pitch, pitch_range = rng.integers(130, 221), rng.integers(20, 81), rng.integers(20, 81)
    if not espeak.has(name):
        language, name = "en", "en"
    return language, Voice(name, int(pace), int(pitch), int(pitch_range))


def _pause_length(rng: np.random.Generator) -> float:
    return rng.uniform(1.0, 2.5) if rng.random() < 0.12 else rng.uniform(0.15, 0.9)


def _pause(seconds: float, rate: int) -> _Part:
    return _Part(np.zeros(round(seconds * rate), np.float32), rate, ("",), (0.0,), (0.0,))


def _trimmed(said: Utterance) -> _Part:
    """The utterance without the silence at its ends, its closures given back, its pauses told from nameless sounds."""
    loud = np.flatnonzero(np.abs(said.audio) > _QUIET / 4)
    if not len(loud):
        return _Part(said.audio[:0], said.sample_rate, (), (), ())
    audio = said.audio[: loud[-1] + 1]
    level = _level(audio, said.sample_rate)
    labels, starts, stressed = [], [], []
    for label, start, stress in zip(said.labels, said.starts, said.stressed, strict=True):
        if start * said.sample_rate >= len(audio):
            break
        pause = not label and level[round(start * CONTROL_RATE) :][:8].max(initial=0) < _QUIET
        if (not label and not pause) or label.startswith("("):
            continue  # a nameless glide or a change of language: part of the sound before
        labels.append(label)
        starts.append(_closed_since(label, start, starts, level))
        stressed.append(stress)
    return _Part(audio, said.sample_rate, tuple(labels), tuple(starts), tuple(stressed))


def _closed_since(label: str, start: float, earlier: list[float], level: NDArray) -> float:
    """The start of a stop: where the silence before its release begins. Other sounds start where they say."""
    if label[:1] not in _STOPS:
        return start
    release = round(start * CONTROL_RATE)
    quiet = level[max(0, release - round(_LONGEST_CLOSURE * CONTROL_RATE)) : release] < _QUIET
    run = len(quiet) - (np.flatnonzero(~quiet)[-1] + 1 if (~quiet).any() else 0)
    closure = max(run / CONTROL_RATE, _SHORTEST_CLOSURE)
    least = earlier[-1] + 0.015 if earlier else 0.0
    return max(start - closure, min(least, start))


def _level(audio: Array, rate: int) -> NDArray[np.float64]:
    """[K] deviation around each control point."""
    power = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    centres = np.arange(int(len(audio) / rate * CONTROL_RATE) + 1) * (rate / CONTROL_RATE)
    reach = rate / CONTROL_RATE / 2
    first, last = (np.clip(np.round(centres + s), 0, len(audio)).astype(np.int64) for s in (-reach, reach))
    return np.sqrt((power[last] - power[first]) / np.maximum(last - first, 1))


def _joined(parts: list[_Part]) -> _Part:
    """One after the other."""
    begins = np.cumsum([0.0, *(part.seconds for part in parts[:-1])])
    return _Part(
        np.concatenate([part.audio for part in parts]),
        parts[0].rate,
        tuple(label for part in parts for label in part.labels),
        tuple(float(begin) + start for part, begin in zip(parts, begins, strict=True) for start in part.starts),
        tuple(stress for part in parts for stress in part.stressed),
    )


def _resampled(audio: Array, rate: int) -> Array:
    from scipy.signal import resample_poly

    ratio = Fraction(SAMPLE_RATE, rate)
    return resample_poly(audio, ratio.numerator, ratio.denominator).astype(np.float32)


def _mouth(audio: Array, track: _Part, seconds: float) -> tuple[tuple[TimedPhone, ...], NDArray[np.float64]]:
    """(sounds, [4, K] open, wide, teeth and stress) of a clip."""
    sounds = timed(track.labels, track.starts, seconds)
    level = smooth(_level(audio, SAMPLE_RATE)[None], 0.05)[0]
    loudness = np.clip(level / max(float(np.quantile(level, 0.95)), 1e-6), 0, 1)
    points = round(seconds * CONTROL_RATE) + 1
    loudness = np.pad(loudness, (0, max(0, points - len(loudness))), mode="edge")[:points]
    return sounds, np.concatenate([curves(sounds, loudness), _stress(track, loudness)[None]])


def _stress(track: _Part, loudness: NDArray) -> NDArray[np.float64]:
    """[K] 0..1: the peaks of the sound, twice as high where the dictionary has its mark.

    Mostly loudness, because the marks themselves can hardly be heard in synthesised speech.
    """
    edges = np.array([*track.starts, np.inf]).clip(0, len(loudness) / CONTROL_RATE)
    edges = np.round(edges * CONTROL_RATE).astype(np.int64)
    marks = np.zeros(len(loudness))
    for value, first, last in zip(track.stressed, edges[:-1], edges[1:], strict=True):
        marks[first:last] = value
    peaks = np.clip(1.8 * smooth(loudness[None], 0.16)[0] - 0.6, 0, 1)
    return peaks * (0.5 + 0.5 * smooth(marks[None], 0.16)[0])
