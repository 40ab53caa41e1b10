"""Sound as float32 chunks, from a file of any container that PyAV opens or from a pipe of PCM.

Shape legend: a chunk is float32 [channels, n], 1.0 = full scale, at the source's own rate; n varies from chunk to
chunk. Nothing here holds more than a few chunks, so an hour costs no more memory than a second.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from . import MediaError

logger = logging.getLogger(__name__)

LIMIT = 8.0
"""Samples beyond full scale are kept (a clipped source is its own matter), but only up to this."""

CHUNK_SAMPLES = 8192
"""Decoded frames are joined to at least this many samples before they are handed on."""

SHORTFALL_SECONDS = 0.1
"""A file that ends this much before its own stated duration is called truncated."""

_SCALE = {"u8": 128.0, "s16": 32768.0, "s32": 2147483648.0, "s64": 9223372036854775808.0, "flt": 1.0, "dbl": 1.0}
_GUESSED_DURATION = {"mp3", "aac", "adts", "ac3"}


def clean_samples(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """(float32 samples without NaN or infinity and within +-LIMIT, whether any were not finite)."""
    samples = np.asarray(samples, np.float32)
    finite = bool(np.isfinite(samples).all())
    if not finite:
        samples = np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)
    return np.ascontiguousarray(np.clip(samples, -LIMIT, LIMIT)), not finite


class SoundFile:
    """The first audio track of a file. Iterating decodes it from the start, each time anew.

    `sample_rate` in Hz and `channels` are those of the decoded sound; `duration` is what the file states, in seconds,
    or None. NaN and infinity become 0, with one warning. A file that breaks off or holds damaged parts gives what
    could be decoded and a warning that says how many seconds that was.

    Raises MediaError when the file is missing, a directory, not sound, or holds no sample that can be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        reader = _Reader(self.path)
        try:
            first = next(reader.frames(), None)
        finally:
            reader.close()
        if first is None:
            problem = f"nothing could be decoded ({reader.damage})" if reader.damage else "holds no sound (0 samples)"
            raise MediaError(f"{self.path}: {problem}; export the sound again, for example as WAV")
        self.sample_rate: int = first.sample_rate
        self.channels: int = first.layout.nb_channels
        self.duration: float | None = reader.duration
        self._layout = first.layout

    def __iter__(self) -> Iterator[np.ndarray]:
        """float32 [channels, n] chunks, in order."""
        reader = _Reader(self.path)
        total, dirty = 0, False
        try:
            for chunk in _joined(map(self._to_float, reader.frames())):
                chunk, bad = clean_samples(chunk)
                if bad and not dirty:
                    logger.warning("%s: samples that are not finite numbers were replaced by silence", self.path)
                dirty |= bad
                total += chunk.shape[1]
                yield chunk
        finally:
            reader.close()
        self._report(reader, total / self.sample_rate)

    def _to_float(self, frame: av.AudioFrame) -> np.ndarray:
        unchanged = frame.sample_rate == self.sample_rate and frame.layout.nb_channels == self.channels
        # PyAV (14 to 18) reads past the end of a planar frame of 8 channels or more and takes the process with it
        if unchanged and (not frame.format.is_planar or self.channels < 8):
            return _frame_to_float(frame)
        # a track that changes its rate or channels on the way (chained Ogg, spliced MP3) is brought to its beginning
        resampler = av.AudioResampler(format="flt", layout=self._layout.name, rate=self.sample_rate)
        parts = [_frame_to_float(out) for out in (*resampler.resample(frame), *resampler.resample(None))]
        return np.concatenate([np.zeros((self.channels, 0), np.float32), *parts], axis=1)

    def _report(self, reader: _Reader, seconds: float) -> None:
        stated = f" of {reader.duration:.2f}" if reader.duration else ""
        if reader.damage:
            logger.warning("%s: damaged (%s); %.2f%s s of sound are used", self.path, reader.damage, seconds, stated)
        elif reader.duration and reader.duration - seconds > SHORTFALL_SECONDS:
            logger.warning("%s: ends early; %.2f%s s of sound are used", self.path, seconds, stated)


class _Reader:
    """One pass over a file's first audio track. `damage` says what went wrong on the way, "" if nothing did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage = ""
        self._file = _open_file(path)
        self._cut_short = _is_cut_wav(self._file)
        try:
            self._container = self._open_container()
        except MediaError:
            self._file.close()
            raise

    def _open_container(self) -> InputContainer:
        try:
            # playlists and the like may name other files; they must not reach out to a network
            options = {"protocol_whitelist": "file"}
            container = av.open(self._file, "r", container_options=options, metadata_errors="replace")
        except (FFmpegError, ValueError) as error:
            reason = _reason(error)
            raise MediaError(
                f"{self.path}: not a sound file that can be read ({reason}); use WAV, FLAC, MP3, OGG or M4A"
            ) from None
        if not container.streams.audio:
            container.close()
            raise MediaError(f"{self.path}: has no audio track; name a file with sound")
        self._stream = container.streams.audio[0]
        return container

    @property
    def duration(self) -> float | None:
        stream, formats = self._stream, set(self._container.format.name.split(","))
        if self._cut_short or stream.duration is None or stream.time_base is None or formats & _GUESSED_DURATION:
            return None
        return float(stream.duration * stream.time_base)

    def frames(self) -> Iterator[av.AudioFrame]:
        if self._cut_short:
            self.damage = "the file is shorter than its header says"
        for packet in self._packets():
            try:
                decoded = self._stream.decode(packet)
            except FFmpegError as error:
                self.damage = self.damage or _reason(error)
                continue
            yield from (frame for frame in decoded if frame.samples)

    def _packets(self) -> Iterator[av.Packet]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                yield next(packets)
            except StopIteration:
                return
            except FFmpegError as error:
                self.damage = self.damage or _reason(error)
                return

    def close(self) -> None:
        self._container.close()
        self._file.close()


def _open_file(path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except IsADirectoryError:
        raise MediaError(f"{path}: is a folder; name a sound file in it") from None
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file; check the path of the sound") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise MediaError(f"{path}: cannot be read ({reason}); check the file and its permissions") from None
    if not file.read(1):
        file.close()
        raise MediaError(f"{path}: the file is empty; export or download it again")
    file.seek(0)
    return file


def _is_cut_wav(file: BinaryIO) -> bool:
    """Whether a RIFF file is shorter than it says itself: for these PyAV takes the shorter length without a word."""
    head = file.read(8)
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    if head[:4] != b"RIFF" or len(head) < 8:
        return False
    stated = int.from_bytes(head[4:], "little")
    return stated < 0x7FFFFFFF and stated + 8 > length + 1  # +1: writers differ on the last padding byte


def _frame_to_float(frame: av.AudioFrame) -> np.ndarray:
    """A decoded frame of any sample format as float32 [channels, n]."""
    kind = frame.format.name.removesuffix("p")
    if kind not in _SCALE:
        raise MediaError(f"sample format {frame.format.name} is unknown; convert the sound to WAV")
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if kind in ("flt", "dbl"):
        return values.astype(np.float32)
    offset = 128 if kind == "u8" else 0
    return ((values.astype(np.float64) - offset) / _SCALE[kind]).astype(np.float32)


def _joined(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(part.shape[1] for part in held) >= CHUNK_SAMPLES:
            yield np.concatenate(held, axis=1)
            held = []
    if held:
        yield np.concatenate(held, axis=1)


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, FFmpegError) else None
    return " ".join((text or str(error)).split())


@dataclass(frozen=True)
class _Pcm:
    """How raw samples lie in bytes."""

    dtype: str
    width: int
    scale: float

    def to_float(self, data: bytes, channels: int) -> np.ndarray:
        """Whole sample frames, interleaved, as float32 [channels, n]."""
        if self.width == 3:
            raw = np.zeros((len(data) // 3, 4), np.uint8)
            raw[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            values = raw.view("<i4")[:, 0]
        else:
            values = np.frombuffer(data, self.dtype)
        offset = 128.0 if self.width == 1 else 0.0
        return np.ascontiguousarray(((values - offset) / self.scale).astype(np.float32).reshape(-1, channels).T)


PCM_FORMATS = {
    "u8": _Pcm("u1", 1, 128.0),
    "s16le": _Pcm("<i2", 2, 32768.0),
    "s24le": _Pcm("<i4", 3, 2147483648.0),
    "s32le": _Pcm("<i4", 4, 2147483648.0),
    "f32le": _Pcm("<f4", 4, 1.0),
    "f64le": _Pcm("<f8", 8, 1.0),
}
_WAV_FORMATS = {(1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le", (3, 32): "f32le", (3, 64): "f64le"}


class PcmPipe:
    """PCM as it arrives on a binary stream, such as standard input. Iterate once; ends with the stream.

    `format` is one of PCM_FORMATS. A stream that starts with a WAV header is taken at its word instead: then
    `sample_rate`, `channels` and the format are the header's. The constructor waits for the first 12 bytes.
    Bytes after the last whole sample frame are dropped. NaN and infinity become 0, with one warning.

    Raises MediaError for an unknown format, a rate or channel count below 1, or a WAV header that is cut off or
    tells of another coding than plain PCM.
    """

    def __init__(self, stream: BinaryIO, sample_rate: int = 16000, channels: int = 1, format: str = "s16le") -> None:
        if format not in PCM_FORMATS:
            raise MediaError(f"PCM format {format!r} is unknown; use one of {', '.join(PCM_FORMATS)}")
        if sample_rate < 1 or channels < 1:
            raise MediaError(f"PCM of {sample_rate} Hz and {channels} channels: both must be at least 1")
        self.sample_rate = sample_rate
        self.channels = channels
        self._stream = stream
        self._pcm = PCM_FORMATS[format]
        self._left: int | None = None
        self._head = _read_fully(stream, 12)
        if self._head[:4] in (b"RIFF", b"RF64") and self._head[8:] == b"WAVE":
            self._head = b""
            self._read_wav_header()

    def __iter__(self) -> Iterator[np.ndarray]:
        """float32 [channels, n] chunks, as soon as they arrive."""
        step = self._pcm.width * self.channels
        held, self._head, dirty = self._head, b"", False
        while True:
            whole = len(held) // step * step
            if whole:
                chunk, bad = clean_samples(self._pcm.to_float(held[:whole], self.channels))
                if bad and not dirty:
                    logger.warning("samples on the pipe that are not finite numbers were replaced by silence")
                dirty |= bad
                held = held[whole:]
                yield chunk
            data = self._read_some()
            if not data:
                break
            held += data
        if held:
            logger.warning("the pipe ended within a sample; its last %d bytes are dropped", len(held))

    def _read_some(self) -> bytes:
        wanted = CHUNK_SAMPLES * self._pcm.width * self.channels
        if self._left is not None:
            wanted = min(wanted, self._left)
        data = _read_available(self._stream, wanted) if wanted else b""
        if self._left is not None:
            self._left -= len(data)
        return data

    def _read_wav_header(self) -> None:
        known = False
        while True:
            head = _read_fully(self._stream, 8)
            if len(head) < 8:
                raise MediaError("the WAV header on the pipe is cut off; send the whole file, or raw PCM")
            size = struct.unpack("<I", head[4:])[0]
            if head[:4] == b"data" and known:
                # a program that writes into a pipe cannot know the length and puts one of these
                self._left = None if size in (0, 0xFFFFFFFF, 0x7FFFFFFF) else size
                return
            body = _read_fully(self._stream, size + size % 2)
            if head[:4] == b"fmt ":
                self._read_wav_format(body)
                known = True

    def _read_wav_format(self, body: bytes) -> None:
        if len(body) < 16:
            raise MediaError("the WAV header on the pipe is cut off; send the whole file, or raw PCM")
        tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
        if tag == 0xFFFE and len(body) >= 26:
            tag = struct.unpack("<H", body[24:26])[0]
        if (tag, bits) not in _WAV_FORMATS or not channels or not rate:
            raise MediaError(
                f"WAV on the pipe with coding {tag}, {bits} bits, {channels} channels, {rate} Hz; send plain PCM of "
                "8, 16, 24 or 32 bits or float"
            )
        self.sample_rate, self.channels = rate, channels
        self._pcm = PCM_FORMATS[_WAV_FORMATS[tag, bits]]


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < size:
        more = stream.read(min(size - len(data), 65536))
        if not more:
            break
        data += more
    return data


def _read_available(stream: BinaryIO, size: int) -> bytes:
    """At most `size` bytes without waiting for all of them; b"" at the end only."""
    if isinstance(stream, io.BufferedIOBase):
        return stream.read1(size)
    return stream.read(size) or b""
