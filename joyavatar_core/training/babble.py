"""Speech-like sound with a known mouth: a source-filter (formant) synthesiser in numpy.

It babbles: random phones in syllables, syllables in phrases, phrases between pauses. What a talking face must learn
from sound is present (voicing, formants, noise bands, closures, silence) and the shape of the mouth is known for
every frame, so that lip sync can be measured and not guessed. Method: Klatt's cascade of resonances ("Software for a
cascade/parallel formant synthesizer", 1980), applied as short-time spectra in place of a recursive filter, which
leaves no loop over samples.

Shape legend: n sound samples, K control points (200 a second), S phones, R spectrum frames, Q spectrum bins,
T pixel frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .mouth import CONTROL_RATE, Array, Speech, frames, hold_closures, smooth, timed

SAMPLE_RATE = 16_000
_HOP = SAMPLE_RATE // CONTROL_RATE
_FFT = 512
_LIP_WIDTH, _TRACT_WIDTH = 0.060, 0.030  # full width at half height of the smoothing kernels, in seconds


@dataclass(frozen=True)
class Phone:
    """Targets of one speech sound. Formants and noise band in Hz (adult, middle voice), the rest 0..1, wide -1..1."""

    formants: tuple[float, float, float]
    voice: float
    noise: float
    band: tuple[float, float]
    open: float
    wide: float
    teeth: float


_NO_BAND = (1500.0, 800.0)
SILENCE = Phone((500, 1500, 2500), 0.0, 0.0, _NO_BAND, 0.0, 0.0, 0.0)
VOWELS = {
    "a": Phone((780, 1250, 2600), 1.0, 0.0, _NO_BAND, 1.0, 0.10, 0.10),
    "e": Phone((480, 1900, 2600), 1.0, 0.0, _NO_BAND, 0.55, 0.60, 0.25),
    "i": Phone((290, 2300, 3000), 0.9, 0.0, _NO_BAND, 0.28, 0.95, 0.55),
    "o": Phone((480, 850, 2500), 1.0, 0.0, _NO_BAND, 0.55, -0.75, 0.0),
    "u": Phone((320, 750, 2300), 0.9, 0.0, _NO_BAND, 0.28, -1.0, 0.0),
}
BILABIALS = {
    "m": Phone((260, 1000, 2200), 0.35, 0.0, _NO_BAND, 0.0, 0.0, 0.0),
    "b": Phone((220, 900, 2200), 0.12, 0.0, (800, 700), 0.0, 0.0, 0.0),
    "p": Phone((300, 900, 2200), 0.0, 0.02, (900, 800), 0.0, 0.0, 0.0),
}
FRICATIVES = {
    "s": Phone((350, 1700, 2600), 0.0, 0.55, (6000, 1300), 0.14, 0.45, 1.0),
    "ʃ": Phone((350, 1800, 2500), 0.0, 0.60, (3300, 1000), 0.22, -0.50, 0.75),
    "f": Phone((350, 1100, 2400), 0.0, 0.25, (5000, 3500), 0.07, 0.10, 0.70),
}
OTHERS = {
    "t": Phone((380, 1800, 2700), 0.0, 0.20, (4500, 1500), 0.22, 0.15, 0.45),
    "n": Phone((280, 1600, 2500), 0.35, 0.0, _NO_BAND, 0.22, 0.15, 0.40),
    "l": Phone((360, 1300, 2800), 0.55, 0.0, _NO_BAND, 0.32, 0.10, 0.30),
    "k": Phone((320, 1500, 2300), 0.0, 0.18, (1900, 700), 0.32, 0.05, 0.10),
    "r": Phone((380, 1200, 1700), 0.50, 0.0, _NO_BAND, 0.28, -0.30, 0.15),
}
_LABELS = {phone: label for group in (VOWELS, BILABIALS, FRICATIVES, OTHERS) for label, phone in group.items()}
_CONSONANTS = (list(BILABIALS.values()), list(FRICATIVES.values()), list(OTHERS.values()))
_CONSONANT_ODDS = (0.38, 0.27, 0.35)


@dataclass(frozen=True)
class _Voice:
    pitch: float  # Hz
    scale: float  # formants, against the middle voice
    breath: float  # aspiration under the voice
    tilt: float  # glottal slope, dB an octave
    rate: float  # syllables a second


def babble(seed: int, seconds: float, fps: Fraction) -> Speech:
    """Babble of one random voice: round(seconds * 16000) samples and round(seconds * fps) frames of mouth.

    The same seed gives the same speech. The peak is at -20..0 dB.
    """
    rng = np.random.default_rng(seed)
    voice = _random_voice(rng)
    phones, lengths, stress = _script(rng, voice, seconds)
    points = round(seconds * CONTROL_RATE) + 1
    tracks = _tracks(phones, lengths, stress, points)
    audio = _sound(rng, voice, tracks, lengths, round(seconds * SAMPLE_RATE))
    starts = (np.cumsum(lengths) - lengths) / CONTROL_RATE
    sounds = timed([_LABELS.get(phone, "") for phone in phones], list(starts), seconds)
    hold_closures(tracks.mouth, sounds)
    curves = frames(tracks.mouth, round(seconds * float(fps)), float(fps))
    return Speech(_level(rng, audio), SAMPLE_RATE, fps, *curves, sounds, "babble")


def _random_voice(rng: np.random.Generator) -> _Voice:
    pitch = float(np.exp(rng.uniform(np.log(85), np.log(270))))
    scale = 0.85 + 0.3 * (np.log(pitch / 85) / np.log(270 / 85)) + rng.normal(0, 0.04)
    return _Voice(pitch, float(scale), rng.uniform(0.01, 0.08), rng.uniform(-9, -5), rng.uniform(3, 6))


def _consonant(rng: np.random.Generator) -> Phone:
    kind = _CONSONANTS[rng.choice(3, p=_CONSONANT_ODDS)]
    return kind[rng.integers(len(kind))]


def _syllable(rng: np.random.Generator, rate: float, stress: float) -> list[tuple[Phone, float, float]]:
    """(phone, seconds, stress) of one syllable: consonant, vowel, sometimes another consonant."""
    length = rng.uniform(0.75, 1.3) / rate * (1 + 0.25 * stress)
    vowel = list(VOWELS.values())[rng.choice(5, p=(0.28, 0.2, 0.18, 0.19, 0.15))]
    onset = max(0.075, length * rng.uniform(0.22, 0.36))
    parts = [(_consonant(rng), onset, stress)] if rng.random() < 0.9 else []
    parts.append((vowel, max(0.07, length - onset), stress))
    if rng.random() < 0.2:
        parts.append((_consonant(rng), max(0.07, 0.3 * length), 0.0))
    return parts


def _script(rng: np.random.Generator, voice: _Voice, seconds: float) -> tuple[list[Phone], NDArray[np.int64], Array]:
    """S phones, their lengths in control points and their stress, at least `seconds` long."""
    parts: list[tuple[Phone, float, float]] = [(SILENCE, rng.uniform(0.0, 0.5), 0.0)]
    total = parts[0][1]
    while total <= seconds + 0.1:
        rate = float(np.clip(voice.rate * rng.uniform(0.85, 1.15), 3, 6))
        phrase = [p for _ in range(rng.integers(3, 11)) for p in _syllable(rng, rate, float(rng.random() < 0.3))]
        phrase.append((SILENCE, rng.uniform(0.2, 0.8), 0.0))
        total += sum(length for _, length, _ in phrase)
        parts += phrase
    ends = np.round(np.cumsum([length for _, length, _ in parts]) * CONTROL_RATE).astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    return [phone for phone, _, _ in parts], lengths, np.array([s for _, _, s in parts], np.float32)


@dataclass(frozen=True)
class _Tracks:
    """Targets at control rate. tract [7,K]: F1 F2 F3 voice noise centre width. mouth [4,K]: open wide teeth stress."""

    tract: NDArray[np.float64]
    mouth: NDArray[np.float64]


def _tracks(phones: list[Phone], lengths: NDArray[np.int64], stress: Array, points: int) -> _Tracks:
    tract = np.array([[*p.formants, p.voice, p.noise, *p.band] for p in phones]).T
    mouth = np.array([[p.open, p.wide, p.teeth, s] for p, s in zip(phones, stress, strict=True)]).T
    # A stressed vowel is louder and opens wider; closures stay closed because the gain multiplies.
    mouth[0] *= 0.82 + 0.18 * mouth[3]
    tract[3] *= 0.75 + 0.25 * mouth[3]
    tract, mouth = (np.repeat(x, lengths, axis=1)[:, :points] for x in (tract, mouth))
    return _Tracks(smooth(tract, _TRACT_WIDTH), smooth(mouth, _LIP_WIDTH))


def _pitch(rng: np.random.Generator, voice: _Voice, tracks: _Tracks, phrase_place: NDArray[np.float64]) -> NDArray:
    """[K] Hz, 80..300: falls over the phrase, rises on stress, wanders and jitters."""
    points = tracks.tract.shape[1]
    wander = smooth(rng.standard_normal((1, points)), 0.25)[0] * 3.0
    jitter = smooth(rng.standard_normal((1, points)), 0.015)[0]
    octaves = 0.18 - 0.36 * phrase_place + 0.22 * tracks.mouth[3] + 0.10 * wander + 0.012 * jitter
    return np.clip(voice.pitch * 2.0**octaves, 80, 300)


def _phrase_place(voice_track: NDArray[np.float64], noise_track: NDArray[np.float64]) -> NDArray[np.float64]:
    """[K] 0 at the start of a phrase .. 1 after 2.5 seconds of it; pauses start anew."""
    silent = smooth((voice_track + noise_track < 0.02)[None].astype(float), 0.15)[0] > 0.9
    index = np.arange(len(silent))
    start = np.maximum.accumulate(np.where(silent, index, 0))
    return np.minimum((index - start) / (2.5 * CONTROL_RATE), 1.0)


def _pulses(pitch: NDArray, samples: int) -> NDArray[np.float64]:
    """[n] glottal pulses, unit energy a period, split between two samples so that pitch is not quantised."""
    grid = np.arange(len(pitch)) * _HOP
    phase = np.cumsum(np.interp(np.arange(samples), grid, pitch)) / SAMPLE_RATE
    beats = np.flatnonzero(np.diff(np.floor(phase))) + 1
    step = phase[beats] - phase[beats - 1]
    late = (phase[beats] - np.floor(phase[beats])) / step
    out = np.zeros(samples)
    gain = np.sqrt(1 / step)
    out[beats] = (1 - late) * gain
    out[beats - 1] += late * gain
    return out


def _resonances(formants: NDArray[np.float64], scale: float) -> NDArray[np.float32]:
    """[K,Q] magnitude of the vocal tract: a cascade of five resonances with unit gain at 0 Hz."""
    hz = (np.arange(_FFT // 2 + 1) * (SAMPLE_RATE / _FFT)).astype(np.float32)
    fixed = np.tile(np.array([[3500.0], [4500.0]]), (1, formants.shape[1]))
    power = np.ones((formants.shape[1], len(hz)), np.float32)
    for centre in (np.concatenate([formants, fixed]) * scale).astype(np.float32):
        width = (50 + 0.06 * centre)[:, None]
        square = (centre * centre)[:, None]
        power *= square * square / ((square - hz * hz) ** 2 + (width * hz) ** 2)
    return np.sqrt(power)


def _noise_bands(tract: NDArray[np.float64], scale: float) -> NDArray[np.float32]:
    """[K,Q] magnitude of the frication band."""
    hz = (np.arange(_FFT // 2 + 1) * (SAMPLE_RATE / _FFT)).astype(np.float32)
    level, centre, width = (x.astype(np.float32)[:, None] for x in tract[4:7])
    return level * np.exp(-0.5 * ((hz - centre * np.float32(scale)) / width) ** 2)


def _spectra(signal: NDArray[np.float64], count: int) -> NDArray[np.complex64]:
    """[K,Q] windowed spectra, frame k centred on control point k."""
    need = (count - 1) * _HOP + _FFT
    padded = np.zeros(need, np.float32)
    body = signal[: need - _FFT // 2]
    padded[_FFT // 2 : _FFT // 2 + len(body)] = body
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    return np.fft.rfft(frames * np.hanning(_FFT).astype(np.float32), axis=1).astype(np.complex64)


def _overlap(spectra: NDArray[np.complex64], samples: int) -> NDArray[np.float64]:
    """[n] inverse of `_spectra`."""
    frames = np.fft.irfft(spectra, _FFT, axis=1)
    count = len(frames)
    blocks = -(-_FFT // _HOP)
    padded = np.zeros((count, blocks * _HOP))
    padded[:, :_FFT] = frames
    out = np.zeros((count + blocks, _HOP))
    for k in range(blocks):
        out[k : k + count] += padded[:, k * _HOP : (k + 1) * _HOP]
    return out.reshape(-1)[_FFT // 2 : _FFT // 2 + samples]


def _bursts(lengths: NDArray[np.int64], voice: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """[K] short noise where a closure opens into a voice: the release of b, p, t and k."""
    ends = np.cumsum(lengths)
    ends = ends[(ends > 1) & (ends + 4 < len(voice))]
    opens = ends[(voice[ends - 2] < 0.5) & (voice[ends + 4] > 0.5) & (noise[ends - 2] < 0.25)]
    out = np.zeros_like(voice)
    out[opens] = 0.35
    return smooth(out[None], 0.012)[0]


def _sound(
    rng: np.random.Generator, voice: _Voice, tracks: _Tracks, lengths: NDArray[np.int64], samples: int
) -> NDArray[np.float64]:
    """[n] the voice through its tract and the noise through its band."""
    tract, points = tracks.tract, tracks.tract.shape[1]
    pitch = _pitch(rng, voice, tracks, _phrase_place(tract[3], tract[4]))
    tube = _resonances(tract[:3], voice.scale)
    octave = np.log2(np.maximum(np.arange(_FFT // 2 + 1) * SAMPLE_RATE / _FFT, 62.5) / 125)
    glottis = (10 ** (voice.tilt * octave / 20)).astype(np.float32)
    loud = tract[3].astype(np.float32)[:, None]
    hiss = _noise_bands(tract, voice.scale)
    hiss += (_bursts(lengths, tract[3], tract[4]).astype(np.float32)[:, None] + voice.breath * loud) * tube * 0.05
    pulse = _spectra(_pulses(pitch, samples), points) * (tube * glottis * loud)
    breath = _spectra(rng.standard_normal(samples), points) * (hiss * np.float32(0.35))
    return _overlap(pulse + breath, samples)


def _level(rng: np.random.Generator, audio: NDArray[np.float64]) -> Array:
    """[n] float32, peak at -20..0 dB."""
    peak = float(np.abs(audio).max())
    gain = 10 ** (-rng.uniform(0, 20) / 20) / peak if peak > 0 else 0.0
    return np.clip(audio * gain, -1, 1).astype(np.float32)
