"""Sound files of every kind, good and bad, and PCM from a pipe. All files are made here."""

from __future__ import annotations

import io
import os
import struct
import threading
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joyavatar_core.media import MediaError
from joyavatar_core.media.sound import LIMIT, PcmPipe, SoundFile


def tone(rate: int, channels: int, seconds: float = 1.0) -> np.ndarray:
    """[channels, n]; each channel has a loudness of its own."""
    wave_ = np.sin(np.arange(int(rate * seconds)) * 2 * np.pi * 220 / rate)
    return (wave_ * np.linspace(0.5, 0.1, channels)[:, None]).astype(np.float32)


def wav_bytes(samples: np.ndarray, rate: int, bits: int, tag: int = 1) -> bytes:
    """A plain WAV file. samples [channels, n], floats; tag 1 is PCM, 3 is float."""
    flat = samples.T.reshape(-1)
    if tag == 3:
        data = flat.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = np.rint(flat * 127 + 128).astype(np.uint8).tobytes()
    else:
        wide = (np.rint(flat * (2.0 ** (bits - 1) - 1)).astype("<i8") << (64 - bits)).astype("<i8")
        data = wide.view(np.uint8).reshape(-1, 8)[:, 8 - bits // 8 :].tobytes()
    channels = len(samples)
    step = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, channels, rate, rate * step, step, bits)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def encoded(path: Path, samples: np.ndarray, rate: int, kind: str, codec: str, layout: str) -> Path:
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout
        packed = np.ascontiguousarray(samples.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        stages = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=rate, frame_size=1024)
        for part in (*stages.resample(frame), *stages.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def heard(source: SoundFile | PcmPipe) -> np.ndarray:
    chunks = list(source)
    assert all(chunk.dtype == np.float32 and chunk.flags.c_contiguous for chunk in chunks)
    return np.concatenate([np.zeros((source.channels, 0), np.float32), *chunks], axis=1)


FORMATS = [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)]


@pytest.mark.parametrize("bits, tag", FORMATS)
@pytest.mark.parametrize("rate, channels", [(8000, 1), (44100, 2), (192000, 8)])
def test_wav_of_every_width_rate_and_channel_count(tmp_path, bits, tag, rate, channels):
    data = wav_bytes(tone(rate, channels, 0.1), rate, bits, tag)
    (tmp_path / "a.wav").write_bytes(data)
    for source in (SoundFile(tmp_path / "a.wav"), PcmPipe(io.BytesIO(data))):
        assert (source.sample_rate, source.channels) == (rate, channels)
        assert np.abs(heard(source) - tone(rate, channels, 0.1)).max() < (0.01 if bits == 8 else 1e-4)


@pytest.mark.parametrize(
    "name, kind, codec, layout",
    [
        ("a.flac", "flac", "flac", "stereo"),
        ("a.mp3", "mp3", "libmp3lame", "stereo"),
        ("a.ogg", "ogg", "libopus", "mono"),
        ("a.m4a", "ipod", "aac", "stereo"),
        ("a.m4a", "ipod", "aac", "7.1"),
        ("b.flac", "flac", "flac", "7.1"),
    ],
)
def test_compressed_sound(tmp_path, name, kind, codec, layout):
    channels = {"mono": 1, "stereo": 2, "7.1": 8}[layout]
    sound = SoundFile(encoded(tmp_path / name, tone(48000, channels), 48000, kind, codec, layout))
    assert (sound.sample_rate, sound.channels) == (48000, channels)
    samples = heard(sound)
    assert abs(samples.shape[1] - 48000) <= 2048
    loudness = np.abs(samples[:, 4000:40000]).max(axis=1)
    if (codec, layout) == ("aac", "7.1"):
        assert loudness.max() > 0.3  # AAC spends little on eight channels, and its versions order them differently
    else:
        assert np.allclose(loudness, np.abs(tone(48000, channels)).max(axis=1), atol=0.05)
    assert np.array_equal(samples, heard(sound)), "a file can be read again"


def test_video_with_an_audio_track_and_odd_names(tmp_path):
    path = tmp_path / "видео и 音.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16)
        audio = container.add_stream("aac", rate=16000)
        video.width = video.height = 64
        video.pix_fmt, audio.codec_context.layout = "yuv420p", "mono"
        for _ in range(16):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1024), 0.1, np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    assert heard(SoundFile(path)).shape[1] >= 10 * 1024


def test_not_finite_becomes_silence_with_one_warning_and_loud_is_kept(tmp_path, caplog):
    samples = tone(16000, 1, 2.0)
    samples[0, [5, 20000]] = np.nan, np.inf
    samples[0, 100:102] = 3.0, 1e9
    data = wav_bytes(samples, 16000, 32, 3)
    (tmp_path / "a.wav").write_bytes(data)
    for source in (SoundFile(tmp_path / "a.wav"), PcmPipe(io.BytesIO(data))):
        caplog.clear()
        got = heard(source)
        assert got[0, [5, 20000, 100, 101]].tolist() == [0, 0, 3, LIMIT]
        assert len(caplog.records) == 1 and "not finite" in caplog.text


def test_truncated_sound_is_used_as_far_as_it_goes(tmp_path, caplog):
    whole = {
        "a.wav": wav_bytes(tone(16000, 1, 3.0), 16000, 16),
        "a.flac": encoded(tmp_path / "w.flac", tone(16000, 1, 3.0), 16000, "flac", "flac", "mono").read_bytes(),
    }
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        caplog.clear()
        samples = heard(SoundFile(tmp_path / name))
        assert 0.8 < samples.shape[1] / 16000 < 2.2
        assert len(caplog.records) == 1
        assert f"{samples.shape[1] / 16000:.2f}" in caplog.text and "s of sound are used" in caplog.text


def test_damage_in_the_middle_is_passed_over(tmp_path, caplog):
    data = bytearray(encoded(tmp_path / "w.flac", tone(16000, 1, 5.0), 16000, "flac", "flac", "mono").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    (tmp_path / "a.flac").write_bytes(data)
    assert heard(SoundFile(tmp_path / "a.flac")).shape[1] > 2 * 16000
    assert "s of sound are used" in caplog.text


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    with wave.open(str(folder / "zero.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is not sound\n" * 50)
    m4a = encoded(folder / "w.m4a", tone(16000, 1), 16000, "ipod", "aac", "mono").read_bytes()
    (folder / "cut.m4a").write_bytes(m4a[:2000])
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/a.ts\n")
    with av.open(str(folder / "mute.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=16)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    problems = {
        "zero.wav": "0 samples",
        "empty.wav": "is empty",
        "text.wav": "not a sound file",
        "cut.m4a": "not a sound file",
        "list.m3u8": "not a sound file",
        "mute.mp4": "no audio track",
        "missing.wav": "no such file",
        "": "is a folder",
    }
    return {name: (folder / name, words) for name, words in problems.items()}


def test_bad_files_end_in_one_clear_line(tmp_path):
    for path, words in bad_files(tmp_path).values():
        with pytest.raises(MediaError, match=words) as caught:
            SoundFile(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message and ";" in message


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 5))
def test_pipe_gives_the_same_however_it_arrives(sizes, channels, odd):
    """Bytes in any portions, with a tail that is not a whole sample frame."""
    samples = np.arange(3000 * channels, dtype="<i2").reshape(-1, channels)
    data = samples.tobytes() + bytes(min(odd, 2 * channels - 1))

    class Portions(io.RawIOBase):
        """Hands out at most the next of `sizes` bytes, as a pipe may."""

        at = calls = 0

        def read(self, size: int = -1) -> bytes:
            take = min(size, sizes[self.calls % len(sizes)])
            self.calls += 1
            self.at += take
            return data[self.at - take : self.at]

    got = heard(PcmPipe(Portions(), channels=channels))
    assert np.array_equal(got, samples.T.astype(np.float32) / 32768)


def test_pipe_does_not_wait_for_more_than_there_is():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        os.write(writing, b"\0\1" * 50)
        # a test that waits for ever says little: the end comes by itself after a while
        stop = threading.Timer(10, os.close, [writing])
        stop.start()
        chunks = iter(PcmPipe(source))
        count = 0
        while count < 50:
            count += next(chunks).shape[1]
        assert stop.is_alive()
        os.write(writing, b"\0\1" * 7)
        assert next(chunks).shape[1] == 7
        stop.cancel()
        os.close(writing)
        assert next(chunks, None) is None


def test_pipe_with_wav_of_unknown_length_and_with_something_after_the_sound():
    data = wav_bytes(tone(24000, 2, 0.2), 24000, 16)
    at = data.index(b"data") + 4
    endless = data[:at] + struct.pack("<I", 0xFFFFFFFF) + data[at + 4 :]
    longer = data + b"LIST" + struct.pack("<I", 400) + bytes(400)
    for stream in (endless, longer):
        pipe = PcmPipe(io.BytesIO(stream), sample_rate=16000)
        assert pipe.sample_rate == 24000
        assert np.abs(heard(pipe) - tone(24000, 2, 0.2)).max() < 1e-4


def test_pipe_refuses_what_it_cannot_read():
    data = wav_bytes(tone(16000, 1, 0.1), 16000, 16)
    cases = [
        (lambda: PcmPipe(io.BytesIO(b""), format="mp3"), "'mp3' is unknown"),
        (lambda: PcmPipe(io.BytesIO(b""), channels=0), "at least 1"),
        (lambda: PcmPipe(io.BytesIO(data[:30])), "cut off"),
        (lambda: PcmPipe(io.BytesIO(data.replace(b"fmt \x10\0\0\0\1", b"fmt \x10\0\0\0\7"))), "coding 7"),
    ]
    for make, words in cases:
        with pytest.raises(MediaError, match=words):
            make()
    assert heard(PcmPipe(io.BytesIO(b""))).shape == (1, 0)
