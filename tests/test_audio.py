"""Resampling, the buffer and log-mel tokens: results depend on absolute positions, never on the cutting."""

import logging
from fractions import Fraction
from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joyavatar_core.audio import SAMPLE_RATE, AudioTrack, LogMel, Resampler, SampleBuffer
from joyavatar_core.geometry import Geometry

from .sound import noise, stream_features, track_of

GEOMETRY = Geometry(256, 256)


# resampler


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 44100, 44101, 48000, 96000, 384000])
def test_resampler_equals_filtering_the_whole(rate):
    signal = pytest.importorskip("scipy.signal")
    samples = noise(rate + 123)
    resampler = Resampler(rate)
    out = torch.cat([resampler.push(samples[:777]), resampler.push(samples[777:]), resampler.finish()])
    common = gcd(rate, SAMPLE_RATE)
    whole = signal.resample_poly(samples.double().numpy(), SAMPLE_RATE // common, rate // common)
    assert len(out) == len(whole) == -(-len(samples) * SAMPLE_RATE // rate)
    torch.testing.assert_close(out, torch.from_numpy(whole).float(), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8000, 16000, 22050, 44100, 48000, 44101]),
    seconds=st.floats(0, 0.4),
    cuts=st.lists(st.floats(0, 1), max_size=12),
)
def test_resampler_does_not_see_the_cutting(rate, seconds, cuts):
    samples = noise(int(rate * seconds))
    once, cut = Resampler(rate), Resampler(rate)
    expected = torch.cat([once.push(samples), once.finish()])
    pieces = torch.tensor_split(samples, sorted(int(c * len(samples)) for c in cuts))
    assert torch.equal(torch.cat([cut.push(p) for p in pieces] + [cut.finish()]), expected)
    assert len(expected) == -(-len(samples) * SAMPLE_RATE // rate)


@pytest.mark.parametrize("rate", [8000, 44100, 192000])
def test_sine_keeps_frequency_and_level(rate):
    sine = torch.sin(2 * torch.pi * 1000 * torch.arange(rate) / rate)
    track = track_of(sine, rate)
    spectrum = torch.fft.rfft(track.read(0, SAMPLE_RATE)).abs() / (SAMPLE_RATE / 2)
    assert int(spectrum.argmax()) == 1000
    assert float(spectrum[1000]) == pytest.approx(1.0, abs=0.01)


def test_tone_above_8_khz_does_not_fold_back():
    sine = torch.sin(2 * torch.pi * 12000 * torch.arange(48000) / 48000)
    assert float(track_of(sine, 48000).read(100, 15900).abs().max()) < 1e-2


def test_resampling_delays_less_than_a_pixel_frame():
    track = track_of(noise(44100), 44100, finish=False)
    assert SAMPLE_RATE - track.end < SAMPLE_RATE / 16


def test_odd_rate_stays_small():
    resampler = Resampler(44101)
    for _ in range(20):
        resampler.push(torch.zeros(22050))
    assert resampler.nbytes() < 2**20


# buffer and track


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 12000)), max_size=20))
def test_buffer_is_a_slice_of_the_signal(steps):
    signal, buffer = torch.arange(200_000.0), SampleBuffer()
    for size, keep in steps:
        buffer.append(signal[buffer.end : buffer.end + size])
        buffer.drop(buffer.end - keep)
        assert torch.equal(buffer.read(buffer.start, buffer.end), signal[buffer.start : buffer.end])
        assert buffer.nbytes() <= 4 * max(4096, 8 * (buffer.end - buffer.start))


@pytest.mark.parametrize(("rate", "channels"), [(8000, 2), (16000, 1), (44100, 2), (48000, 8)])
@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.0])
def test_track_does_not_see_the_cutting(rate, channels, seconds):
    samples = noise(channels, int(1.3 * rate))
    whole, cut = track_of(samples, rate), track_of(samples, rate, int(rate * seconds))
    assert cut.end == whole.end and cut.duration == whole.duration == Fraction(int(1.3 * rate), rate)
    assert torch.equal(cut.read(-10, cut.end + 10), whole.read(-10, whole.end + 10))


def test_channels_are_averaged_and_padding_is_zero():
    track = track_of(torch.stack([torch.full((100,), 0.5), torch.full((100,), -0.1)]))
    assert torch.allclose(track.read(0, 100), torch.tensor(0.2))
    assert track.read(-50, 0).count_nonzero() == track.read(100, 5000).count_nonzero() == 0
    assert track.read(-3, 103).numel() == 106


def test_length_in_frames_is_exact_at_the_source_rate():
    track = track_of(noise(44100 * 2), 44100)
    assert (track.source_samples, track.source_rate, track.duration) == (88200, 44100, 2)
    assert GEOMETRY.frames_of_duration(track.duration) == 32


def test_reading_outside_what_is_held_is_an_error():
    track = track_of(noise(1000), finish=False)
    with pytest.raises(ValueError, match="have come"):
        track.read(0, 1001)
    track.drop(500)
    assert track.start == 500
    with pytest.raises(ValueError, match="dropped"):
        track.read(499, 600)
    with pytest.raises(ValueError, match="dropped"):
        track.read(-5, 600)
    assert track.read(-5, 0).numel() == 5 and track.read(500, 1000).numel() == 500
    track.drop(10**9)
    track.finish()
    assert track.read(2000, 2010).count_nonzero() == 0


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (torch.zeros(10), 3999, "sample rate"),
        (torch.zeros(10), 400_000, "sample rate"),
        (torch.zeros(10), 0, "sample rate"),
        (torch.zeros(10, dtype=torch.int16), 16000, "floating point"),
        (torch.zeros(1, 2, 10), 16000, "shape"),
        (torch.zeros(0, 10), 16000, "shape"),
        (torch.zeros(48000, 2), 16000, "shape"),
    ],
)
def test_bad_input_is_one_clear_error(samples, rate, message):
    with pytest.raises(ValueError, match=message) as error:
        AudioTrack().push(samples, rate)
    assert "\n" not in str(error.value)


def test_rate_change_and_push_after_the_end():
    track = track_of(torch.zeros(10), 44100, finish=False)
    with pytest.raises(ValueError, match="44100"):
        track.push(torch.zeros(10), 48000)
    track.finish()
    track.finish()
    with pytest.raises(ValueError, match="finished"):
        track.push(torch.zeros(10), 44100)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_no_samples_at_all(rate):
    track = track_of(torch.zeros(2, 0), rate)
    assert track.end == 0 and track.duration == 0 and GEOMETRY.frames_of_duration(track.duration) == 0
    assert LogMel(GEOMETRY).features(track, range(3)).tokens.eq(-1).all()
    empty = AudioTrack()
    empty.finish()
    assert empty.end == 0 and empty.duration == 0


def test_not_finite_samples_become_silence_with_one_warning(caplog):
    samples = torch.tensor([0.5, float("nan"), float("inf"), -float("inf"), 0.25, 1e30])
    with caplog.at_level(logging.WARNING):
        track = track_of(samples, chunk=1)
    assert track.read(0, 5).tolist() == [0.5, 0, 0, 0, 0.25]
    assert len(caplog.records) == 1
    assert LogMel(GEOMETRY).features(track, range(1)).tokens.isfinite().all()


@pytest.mark.parametrize(("rate", "cut"), [(16000, 5000), (44100, 12345), (44101, 60000), (8000, 1)])
def test_saved_track_goes_on_bit_for_bit(rate, cut):
    samples = noise(2, 2 * rate)
    track = track_of(samples[:, :cut], rate, finish=False)
    track.drop(300)
    resumed = AudioTrack()
    resumed.load_state({name: tensor.clone() for name, tensor in track.state().items()})
    for t in (track, resumed):
        t.push(samples[:, cut:], rate)
        t.finish()
    first = track.start
    assert resumed.start == first and resumed.end == track.end and resumed.duration == track.duration == 2
    assert torch.equal(resumed.read(first, track.end), track.read(first, track.end))
    assert torch.equal(track.read(first, track.end), track_of(samples, rate).read(first, track.end))


def test_state_of_a_finished_and_of_an_empty_track():
    for track in (AudioTrack(), track_of(noise(100), 44100)):
        resumed = AudioTrack()
        resumed.load_state(track.state())
        assert resumed.finished == track.finished and resumed.end == track.end
        assert all(torch.equal(a, b) for a, b in zip(resumed.state().values(), track.state().values(), strict=True))
    with pytest.raises(ValueError, match="counters"):
        AudioTrack().load_state({"samples": torch.zeros(1)})


@pytest.mark.parametrize("rate", [16000, 44100])
def test_memory_is_bounded_over_an_hour(rate):
    track, front, sizes = AudioTrack(), LogMel(GEOMETRY), []
    chunk = torch.zeros(rate * 3 // 4)  # one block of sound
    blocks = 4800 if rate == SAMPLE_RATE else 200  # resampling an hour takes seconds
    for block in range(blocks):
        track.push(chunk, rate)
        track.drop(front.keeps(3 * block))
        sizes.append(track.nbytes())
    assert track.duration == Fraction(3, 4) * blocks
    assert max(sizes[blocks // 2 :]) <= max(sizes[: blocks // 4]) < 2**20


# log-mel


@settings(max_examples=8, deadline=None)
@given(source=st.sampled_from([(8000, 2), (44100, 1), (48000, 1)]), cuts=st.lists(st.floats(0, 1), max_size=8))
def test_log_mel_does_not_see_the_cutting(source, cuts):
    rate, channels = source
    samples, front = noise(channels, int(1.6 * rate)), LogMel(GEOMETRY)
    whole = front.features(track_of(samples, rate), range(9)).tokens
    tokens, _ = stream_features(front, samples, rate, [int(c * samples.shape[1]) for c in cuts], 9)
    assert torch.equal(tokens, whole)


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.0])
def test_log_mel_of_regular_chunks(seconds):
    samples, front = noise(2, 44100), LogMel(GEOMETRY)
    whole = front.features(track_of(samples, 44100), range(6)).tokens
    tokens, valid = stream_features(front, samples, 44100, range(0, 44100, int(44100 * seconds)), 6)
    assert torch.equal(tokens, whole) and valid.all()


def test_any_range_of_latents_gives_the_same_tokens():
    front, track = LogMel(GEOMETRY), track_of(noise(32000))
    whole = front.features(track, range(8)).tokens
    assert whole.shape == (8, front.tokens_per_latent, front.channels) == (8, 16, 256)
    assert torch.equal(front.features(track, range(3, 6)).tokens, whole[3:6])
    assert front.features(track, range(2, 2)).tokens.shape == (0, 16, 256)


def test_silence_is_one_constant_vector():
    front = LogMel(GEOMETRY)
    assert front.features(track_of(torch.zeros(32000)), range(8)).tokens.eq(-1).all()
    beyond = front.features(track_of(noise(16000)), range(20, 23)).tokens
    assert beyond.eq(-1).all()


def test_speech_like_sound_has_about_unit_range():
    front = LogMel(GEOMETRY)
    tokens = front.features(track_of(noise(32000) / 3), range(1, 6)).tokens
    assert tokens.min() >= -1 and -0.5 < float(tokens.mean()) < 2 and float(tokens.std()) < 1.5


@pytest.mark.parametrize("fps", [Fraction(16), Fraction(25), Fraction(30000, 1001)])
def test_impulse_lights_exactly_the_columns_over_it(fps):
    """Column k of frame f covers 400 samples about (f + (k + 1/2) / 4) / fps; Hann's first weight is 0."""
    front, at = LogMel(Geometry(256, 256, fps=fps)), 20_011
    samples = torch.zeros(32000)
    samples[at] = 1.0
    lit = front.features(track_of(samples), range(12)).tokens.view(12, 16, 4, 64).gt(-1).any(-1)
    for latent in range(12):
        for token, frame in enumerate(range(4 * latent - 3 - 6, 4 * latent + 6 + 1)):
            for hop in range(4):
                centre = round(SAMPLE_RATE * (frame + Fraction(2 * hop + 1, 8)) / fps)
                covered = abs(at - centre) < 190
                if covered or abs(at - centre) > 200:
                    assert bool(lit[latent, token, hop]) == covered, (latent, frame, hop)


def test_needs_and_keeps_are_tight():
    front, samples = LogMel(GEOMETRY), noise(64000)
    whole = front.features(track_of(samples), range(12)).tokens
    needs = front.needs(6)
    track = track_of(samples[:needs], finish=False)
    track.drop(front.keeps(3))
    assert torch.equal(front.features(track, range(3, 6)).tokens, whole[3:6])
    with pytest.raises(ValueError, match="have come"):
        front.features(track_of(samples[: needs - 1], finish=False), range(3, 6))
    track.drop(front.keeps(3) + 1)
    with pytest.raises(ValueError, match="dropped"):
        front.features(track, range(3, 6))
    end_of_block = SAMPLE_RATE * GEOMETRY.frames_of_latents(6) // 16
    assert 0 < needs - end_of_block <= SAMPLE_RATE * 6 // 16 + 200
    assert front.needs(0) == front.keeps(0) == front.keeps(1) == 0


def test_filters_may_come_from_a_checkpoint():
    own = LogMel(GEOMETRY)
    front = LogMel(GEOMETRY, filters=own.filters.clone())
    track = track_of(noise(8000))
    assert torch.equal(front.features(track, range(2)).tokens, own.features(track, range(2)).tokens)
    with pytest.raises(ValueError, match="filters"):
        LogMel(GEOMETRY, mels=32, filters=own.filters)
    with pytest.raises(ValueError, match="mels 0"):
        LogMel(GEOMETRY, mels=0)
