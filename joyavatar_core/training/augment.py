"""Sound as microphones hear it: the same speech in another key, room, noise or channel, still in time with the mouth.

Every change keeps the length and the place of each sound: the pitch shift stretches and resamples by one fraction, the
room keeps its direct path at time 0, the filters have zero phase.

Shape legend: n sound samples, W windows of the phase vocoder, Q spectrum bins, m samples of the room's response.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Rng = np.random.Generator

UNTOUCHED = 0.25  # share of clips returned as they came
_FFT, _HOP = 1024, 256  # phase vocoder: 64 ms windows at 16 kHz, three quarters overlapping
_QUIET = 0.02  # deviation taken for a clip without speech, so that noise has a level there too


def augment(seed: int, audio: Array, sample_rate: int) -> Array:
    """One random combination of changes to mono sound [n] in [-1, 1]: float32 [n] in [-1, 1], aligned with the input.

    A quarter of the seeds leaves the sound as it is. The rest draws from: pitch (+-3 semitones), room (RT60 0.1..0.6
    s), noise (10..40 dB below the speech), music (12..30 dB below), telephone band, soft clipping; then a peak of
    -24..0 dB. The same seed makes the same changes. Raises ValueError for sound that is not one-dimensional and a
    sample_rate below 8000 Hz.
    """
    if audio.ndim != 1 or sample_rate < 8000:
        raise ValueError(f"audio of shape {audio.shape} at {sample_rate} Hz: give mono sound [n] at 8000 Hz or more")
    rng = np.random.default_rng((seed, 0xA06))
    sound = np.clip(audio, -1, 1).astype(np.float32)
    if rng.random() < UNTOUCHED or not len(sound):
        return sound
    for odds, change in _CHANGES:
        if rng.random() < odds:
            sound = change(rng, sound, sample_rate)
    return _peak(sound, -rng.uniform(0, 24))


def _peak(sound: Array, decibels: float) -> Array:
    """Scaled to a peak of `decibels` below full scale; silence stays silence."""
    peak = float(np.abs(sound).max())
    gain = 10 ** (decibels / 20) / peak if peak > 0 else 0.0
    return np.clip(sound * np.float32(gain), -1, 1)


def _loudness(sound: Array, rate: int) -> float:
    """Deviation of the speech itself: over the windows of 20 ms within 30 dB of the loudest one."""
    size = max(1, rate // 50)
    count = max(1, len(sound) // size)
    power = np.square(sound[: count * size].reshape(count, -1)).mean(1)
    loud = float(power[power >= 1e-3 * power.max()].mean()) ** 0.5
    return loud if loud > 1e-4 else _QUIET


def _pitch(rng: Rng, sound: Array, rate: int) -> Array:
    return shift_pitch(sound, rng.uniform(-3, 3))


def shift_pitch(sound: Array, semitones: float) -> Array:
    """Sound [n] with every frequency times 2 ** (semitones / 12), length and timing kept."""
    from scipy.signal import resample_poly

    ratio = Fraction(2.0 ** (semitones / 12)).limit_denominator(40)
    if ratio == 1 or len(sound) < _FFT:
        return sound
    stretched = _stretch(sound, float(ratio))
    out = resample_poly(stretched, ratio.denominator, ratio.numerator).astype(np.float32)
    return np.pad(out, (0, max(0, len(sound) - len(out))))[: len(sound)]


def _stretch(sound: Array, ratio: float) -> Array:
    """Phase vocoder: [n * ratio], the same frequencies at another pace (Flanagan and Golden 1966)."""
    window = np.hanning(_FFT + 1)[:-1].astype(np.float32)
    steps = np.arange(0, len(sound), _HOP / ratio)  # where in the input each output window stands
    padded = np.pad(sound, (_FFT // 2 + _HOP, _FFT + 2 * _HOP))
    views = np.lib.stride_tricks.sliding_window_view(padded, _FFT)
    starts = np.round(steps).astype(np.int64) + _HOP
    here = np.fft.rfft(views[starts] * window, axis=1)
    before = np.fft.rfft(views[starts - _HOP] * window, axis=1)
    # The phase gained over one hop of the input is what one hop of the output must gain.
    turn = np.angle(here * np.conj(before))
    turn[0] = np.angle(here[0])
    phase = np.cumsum(turn, axis=0)
    frames = np.fft.irfft(np.abs(here) * np.exp(1j * phase), axis=1) * window
    return _overlap(frames.astype(np.float32))[: round(len(sound) * ratio)]


def _overlap(frames: Array) -> Array:
    """Sum of windows [W, _FFT] one hop apart, from the middle of the first one on."""
    blocks = _FFT // _HOP
    out = np.zeros((len(frames) + blocks, _HOP), np.float32)
    for k in range(blocks):
        out[k : k + len(frames)] += frames[:, k * _HOP : (k + 1) * _HOP]
    out /= 1.5  # what squared Hann windows a quarter apart add up to
    return out.reshape(-1)[_FFT // 2 :]


def _room(rng: Rng, sound: Array, rate: int) -> Array:
    """Convolved with a room: direct path at time 0, then noise that decays by 60 dB in 0.1..0.6 s."""
    from scipy.signal import fftconvolve

    decay = rng.uniform(0.1, 0.6)
    times = np.arange(round(decay * rate)) / rate
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / decay)
    tail[: round(rng.uniform(0.001, 0.008) * rate)] = 0  # until the first wall answers
    tail *= 10 ** (-rng.uniform(3, 15) / 20) / np.sqrt(np.square(tail).sum())
    tail[0] = 1
    return fftconvolve(sound, tail.astype(np.float32))[: len(sound)].astype(np.float32)


def _under(rng: Rng, sound: Array, rate: int, other: NDArray, softest: float, loudest: float) -> Array:
    """`other` added `softest`..`loudest` dB below the speech."""
    level = _loudness(sound, rate) * 10 ** (-rng.uniform(loudest, softest) / 20)
    return sound + (other * (level / max(float(other.std()), 1e-9))).astype(np.float32)


def _noise(rng: Rng, sound: Array, rate: int) -> Array:
    kind = rng.integers(4)
    other = _hum(rng, len(sound), rate) if kind == 3 else _coloured(rng, len(sound), rate, (0.0, 0.5, 1.0)[kind])
    return _under(rng, sound, rate, other, 40, 10)


def _coloured(rng: Rng, count: int, rate: int, slope: float) -> NDArray:
    """Noise [n] with amplitude falling as frequency ** -slope above 30 Hz: 0 white, 0.5 pink, 1 brown."""
    size = -(-count // 4096) * 4096  # a quick size for the transform
    spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
    hertz = np.arange(len(spectrum), dtype=np.float32) * (rate / size)
    return np.fft.irfft(spectrum * np.maximum(hertz, 30) ** -slope, size)[:count]


def _hum(rng: Rng, count: int, rate: int) -> NDArray:
    """Mains [n]: 50 or 60 Hz and its overtones, over a little hiss."""
    phase = 2 * np.pi * rng.choice((50, 60)) * np.arange(count) / rate
    hum = sum(rng.random() / k * np.sin(k * phase + rng.uniform(0, 6.28)) for k in (1, 2, 3, 4, 6))
    return hum + 0.1 * rng.standard_normal(count)


def _music(rng: Rng, sound: Array, rate: int) -> Array:
    return _under(rng, sound, rate, _song(rng, len(sound), rate), 30, 12)


def _song(rng: Rng, count: int, rate: int) -> NDArray:
    """A chord a bar, held or broken into single notes, with or without drums: [n]."""
    beat = 60 / rng.uniform(70, 140)
    key, broken, drums = rng.uniform(110, 220), rng.random() < 0.5, rng.random() < 0.5
    out, chord = np.zeros(count), [0]
    for number in range(int(count / rate / beat) + 1):
        if number % 4 == 0:
            root = rng.choice((0, 5, 7, 9, -3))
            chord = [root, root + rng.choice((3, 4)), root + 7, root + 12]
        pitches = [chord[number % 4]] if broken else chord[:3] if number % 4 == 0 else []
        for pitch in pitches:
            _add(out, number * beat, rate, _note(key * 2 ** (pitch / 12), beat * (1.5 if broken else 4), rate))
        if drums:
            _add(out, number * beat, rate, _drum(rng, number % 2 == 1, rate))
    return out


def _add(out: NDArray, start: float, rate: int, part: NDArray) -> None:
    first = round(start * rate)
    room = max(0, len(out) - first)
    out[first : first + len(part)] += part[:room]


def _note(hertz: float, seconds: float, rate: int) -> NDArray:
    """A plucked string: five overtones that die away, the high ones first."""
    times = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * k * hertz * times) * np.exp(-k * times / seconds) / k for k in range(1, 5))
    return wave * np.minimum(times / 0.01, 1) * np.clip((seconds - times) / 0.02, 0, 1)


def _drum(rng: Rng, snare: bool, rate: int) -> NDArray:
    times = np.arange(round(0.15 * rate)) / rate
    if snare:
        return rng.standard_normal(len(times)) * np.exp(-times / 0.03)
    return 2 * np.sin(2 * np.pi * (50 * times + 3 * (1 - np.exp(-times / 0.03)))) * np.exp(-times / 0.06)


def _telephone(rng: Rng, sound: Array, rate: int) -> Array:
    """Only 300..3400 Hz, with slopes of 24 dB an octave and no delay."""
    size = -(-(len(sound) + rate // 10) // 4096) * 4096
    hertz = np.maximum(np.arange(size // 2 + 1, dtype=np.float32) * (rate / size), 1)
    gain = 1 / np.sqrt((1 + (300 / hertz) ** 8) * (1 + (hertz / 3400) ** 8))
    return np.fft.irfft(np.fft.rfft(sound, size) * gain, size)[: len(sound)].astype(np.float32)


def _clip(rng: Rng, sound: Array, rate: int) -> Array:
    """An overdriven input: the peaks bend over."""
    return np.tanh(_peak(sound, 0) * np.float32(rng.uniform(1, 4))).astype(np.float32)


_CHANGES: tuple[tuple[float, Callable[[Rng, Array, int], Array]], ...] = (
    (0.25, _pitch),
    (0.40, _room),
    (0.50, _noise),
    (0.25, _music),
    (0.10, _telephone),
    (0.10, _clip),
)
