"""Augmented sound: same length, same timing, safe range, one result a seed."""

from __future__ import annotations

import numpy as np
import pytest

from joyavatar_core.training import augment as module
from joyavatar_core.training.augment import UNTOUCHED, augment, shift_pitch

RATE = 16_000


def bursts(seconds: float = 3.0) -> np.ndarray:
    """Buzz of 150 Hz that is on for 0.2 s and off for 0.2 s."""
    times = np.arange(round(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * 150 * k * times) / k for k in range(1, 12))
    return (0.3 * buzz * (times % 0.4 < 0.2)).astype(np.float32)


def loudness(sound: np.ndarray, step: int = 160) -> np.ndarray:
    return np.sqrt(np.square(sound[: len(sound) // step * step].reshape(-1, step)).mean(1))


def lag(first: np.ndarray, second: np.ndarray) -> int:
    """By how many windows of 10 ms the loudness of `second` is late."""
    a, b = loudness(first), loudness(second)
    return max(range(-8, 9), key=lambda k: float(np.corrcoef(a[10:-10], np.roll(b, -k)[10:-10])[0, 1]))


@pytest.mark.parametrize("count", [0, 1, 700, 16_000, 16_001])
def test_length_type_and_range_hold_for_every_seed(count: int) -> None:
    sound = (np.random.default_rng(3).standard_normal(count) * 0.2).astype(np.float32)
    for seed in range(30):
        out = augment(seed, sound, RATE)
        assert out.shape == sound.shape and out.dtype == np.float32
        assert np.isfinite(out).all() and (np.abs(out) <= 1).all()


def test_a_seed_decides_everything_and_the_input_stays() -> None:
    sound = bursts(1.0)
    before = sound.copy()
    assert all(np.array_equal(augment(s, sound, RATE), augment(s, sound, RATE)) for s in range(20))
    assert np.array_equal(sound, before)
    different = {augment(s, sound, RATE).tobytes() for s in range(40)}
    assert len(different) > 20


def test_about_a_quarter_is_untouched() -> None:
    sound = bursts(0.3)
    share = np.mean([np.array_equal(augment(s, sound, RATE), sound) for s in range(400)])
    assert abs(share - UNTOUCHED) < 0.08


def test_sound_stays_in_time() -> None:
    sound = bursts()
    late = [lag(sound, augment(s, sound, RATE)) for s in range(60)]
    assert max(abs(k) for k in late) <= 1


@pytest.mark.parametrize("change", [change for _, change in module._CHANGES])
def test_every_change_does_something_and_keeps_time(change) -> None:
    sound = bursts()
    out = change(np.random.default_rng(5), sound, RATE)
    assert out.shape == sound.shape and not np.allclose(out, sound, atol=1e-4)
    assert abs(lag(sound, out)) <= 1


@pytest.mark.parametrize("semitones", [-3.0, -1.0, 1.5, 3.0])
def test_pitch_moves_by_the_semitones_asked(semitones: float) -> None:
    times = np.arange(2 * RATE) / RATE
    out = shift_pitch(np.sin(2 * np.pi * 440 * times).astype(np.float32), semitones)
    peak = np.argmax(np.abs(np.fft.rfft(out * np.hanning(len(out))))) / 2  # two seconds: half a hertz a bin
    assert peak == pytest.approx(440 * 2 ** (semitones / 12), rel=0.01)
    assert np.std(out[4000:-4000]) == pytest.approx(0.707, rel=0.1)


def test_the_telephone_takes_lows_and_highs() -> None:
    sound = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    power = np.abs(np.fft.rfft(module._telephone(np.random.default_rng(0), sound, RATE)))
    assert power[:150].mean() < 0.1 * power[500:3000].mean() > 10 * power[6000:].mean() * 0.1


def test_noise_is_heard_in_silence() -> None:
    out = module._noise(np.random.default_rng(1), np.zeros(RATE, np.float32), RATE)
    assert 0 < out.std() < 0.02


@pytest.mark.parametrize(("shape", "rate"), [((2, 100), RATE), ((100,), 400)])
def test_wrong_sound_is_refused(shape: tuple[int, ...], rate: int) -> None:
    with pytest.raises(ValueError, match="give mono sound"):
        augment(0, np.zeros(shape, np.float32), rate)
