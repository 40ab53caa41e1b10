"""A video file as pictures at a steady rate, and as 16 kHz sound, from any moment on.

Picture j at `fps` is the one that is on show at second (j + 1/2) / fps after the first: so a variable frame rate, a
change of rate and a start in the middle all give the same pictures. Sound is placed by its own time stamps, which keeps
lips and voice together where the two tracks begin at different times.

Shape legend: H W pixel size; a picture is uint8 [H, W, 3] RGB, upright; sound is float32 [n] at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...audio import SAMPLE_RATE, AudioTrack

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

Picture = NDArray[np.uint8]

_NOT_VIDEO = ("image2", "_pipe", "tty", "gif", "lrc", "srt", "ass", "webvtt")
_LEAD = Fraction(1, 2)  # seconds decoded ahead of a cut of sound: coders need some to find their feet


class SourceError(ValueError):
    """A video that cannot be used, with the reason in a few words."""


@dataclass(frozen=True)
class Track:
    """What a file says of its pictures. start: time of the first one; width, height: upright; seconds: of the video."""

    width: int
    height: int
    start: Fraction
    seconds: float


def pyav() -> ModuleType:
    """PyAV, or a plain ImportError."""
    try:
        import av
    except ImportError as error:
        raise ImportError("preparing videos needs PyAV: pip install av") from error
    return av


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    av_ = pyav()
    options: Any = {"container_options": {"protocol_whitelist": "file"}, "metadata_errors": "replace"}
    try:
        # a file, not a name: playlists in it must not reach out to a network
        with path.open("rb") as file, av_.open(file, "r", **options) as container:
            yield container
    except (av_.FFmpegError, OSError) as error:
        raise SourceError(f"not a video that can be read ({_reason(error)})") from error


def probe(path: Path) -> Track:
    """Size and start of a video. SourceError for a file that is none, has no sound, or holds nothing to decode."""
    with _opened(path) as container:
        if any(part in name for name in container.format.name.split(",") for part in _NOT_VIDEO):
            raise SourceError("not a video")
        if not container.streams.video:
            raise SourceError("no pictures in it")
        if not container.streams.audio:
            raise SourceError("no sound track")
        stream = container.streams.video[0]
        frame = next(_frames(container, stream, Damage()), None)
        if frame is None:
            raise SourceError("no picture could be decoded")
        height, width = _as_picture(frame).shape[:2]
        return Track(width, height, _time(frame, 0, stream), _seconds(container, stream))


class Damage:
    """What went wrong while reading; `first` is "" if nothing did."""

    def __init__(self) -> None:
        self.first = ""

    def note(self, error: BaseException) -> None:
        self.first = self.first or _reason(error)


def pictures(
    path: Path, track: Track, fps: int, first: int = 0, longest: int = 0, damage: Damage | None = None
) -> Iterator[Picture | None]:
    """Pictures `first`, first + 1, ... at `fps`; None for one that is damaged.

    longest: bring the longer side to this many pixels at most; 0: as it is.
    """
    for seek in (True, False) if first else (False,):
        with _opened(path) as container:
            sought = seek and _seek(container, _moment(track, first, fps), container.streams.video[0])
            done = yield from _shown(container, track, fps, first, longest, damage or Damage(), sought)
        if done:  # else the file's index led past the moment: go there frame by frame
            return


def _shown(
    container: InputContainer, track: Track, fps: int, first: int, longest: int, damage: Damage, sought: bool
) -> Generator[Picture | None, None, bool]:
    """The picture on show at each moment; returns False, and gives nothing, if a seek led past the first one."""
    stream = container.streams.video[0]
    held: av.VideoFrame | None = None
    held_at, index, picture = Fraction(0), first, None
    for count, frame in enumerate(_frames(container, stream, damage)):
        at = _time(frame, count, stream)
        if held is None and sought and at > _moment(track, first, fps):
            return False
        if held is not None and at <= held_at:
            continue  # time stamps that run backwards
        while held is not None and _moment(track, index, fps) < at:
            picture = _as_picture(held, longest) if picture is None else picture
            yield None if held.is_corrupt else picture
            index += 1
        held, held_at, picture = frame, at, None
    end = held_at + 1 / _rate(stream)
    while held is not None and _moment(track, index, fps) < end:
        yield None if held.is_corrupt else _as_picture(held, longest)
        index += 1
    return True


def _moment(track: Track, index: int, fps: int) -> Fraction:
    return track.start + Fraction(2 * index + 1, 2 * fps)


def _seek(container: InputContainer, moment: Fraction, stream: Any) -> bool:
    """Go to the last key frame of a track before a moment; whether the file can."""
    av_ = pyav()
    if stream.time_base is None or moment <= 0:
        return False
    try:
        container.seek(int(moment / stream.time_base), stream=stream)
    except av_.FFmpegError:
        return False
    return True


def _frames(container: InputContainer, stream: Any, damage: Damage) -> Iterator[Any]:
    """Decoded frames of a track; damaged packets are noted and passed over."""
    av_ = pyav()
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av_.FFmpegError as error:
            damage.note(error)
            return
        try:
            yield from stream.decode(packet)
        except av_.FFmpegError as error:
            damage.note(error)


def _time(frame: Any, count: int, stream: Any) -> Fraction:
    """When a frame is shown, seconds on the file's clock; by counting where it does not say."""
    if frame.pts is None or frame.time_base is None:
        return count / _rate(stream)
    return frame.pts * Fraction(frame.time_base)


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _seconds(container: InputContainer, stream: Any) -> float:
    """Stated length, 0 where the file does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


def _as_picture(frame: Any, longest: int = 0) -> Picture:
    """A frame as it is meant to be seen: square pixels, upright."""
    width, height = frame.width, frame.height
    if longest and max(width, height) > longest:
        scale = longest / max(width, height)
        width, height = max(16, round(width * scale)), max(16, round(height * scale))
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
    turns = round(frame.rotation / 90) % 4  # counterclockwise, as rot90 turns
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


# Sound


def sound(path: Path, start: Fraction, stop: Fraction, damage: Damage | None = None) -> NDArray[np.float32]:
    """Sound of the seconds [start, stop) of the file's clock: float32 [n], 16 kHz, mono; silence where there is none.

    SourceError when the file cannot be read.
    """
    for seek in (True, False) if start > _LEAD else (False,):
        with _opened(path) as container:
            stream = container.streams.audio[0]
            sought = seek and _seek(container, start - _LEAD, stream)
            pieces = list(_sound_pieces(container, stream, stop, damage or Damage()))
        if not sought or (pieces and pieces[0][0] <= start):
            return _placed(pieces, start, stop)
    return _placed([], start, stop)


def _sound_pieces(
    container: InputContainer, stream: Any, stop: Fraction, damage: Damage
) -> Iterator[tuple[Fraction, int, NDArray[np.float32]]]:
    """(time, rate, mono samples) of the decoded frames before `stop`."""
    av_ = pyav()
    resampler, counted = None, 0
    for frame in _frames(container, stream, damage):
        at = frame.pts * Fraction(frame.time_base) if frame.pts is not None else Fraction(counted, frame.sample_rate)
        if at >= stop:
            return
        if resampler is None or resampler.rate != frame.sample_rate:
            resampler = av_.AudioResampler(format="flt", layout="mono", rate=frame.sample_rate)
        for mono in resampler.resample(frame):
            samples = mono.to_ndarray().reshape(-1)
            yield at, frame.sample_rate, np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)
            counted += len(samples)


def _placed(
    pieces: list[tuple[Fraction, int, NDArray[np.float32]]], start: Fraction, stop: Fraction
) -> NDArray[np.float32]:
    """Pieces laid on the time line at their own rate, then brought to 16 kHz as the engine does it."""
    line, rate = np.zeros(0, np.float32), 0
    for at, rate_now, samples in pieces:
        if rate_now != rate:
            if rate and line.any():
                raise SourceError(f"the sound changes from {rate} to {rate_now} Hz")
            rate, line = rate_now, np.zeros(round((stop - start) * rate_now), np.float32)
        first = round((at - start) * rate)
        low, high = max(0, first), min(len(line), first + len(samples))
        if low < high:
            line[low:high] = samples[low - first : high - first]
    count = round((stop - start) * SAMPLE_RATE)
    if not rate:
        return np.zeros(count, np.float32)
    track = AudioTrack()
    track.push(torch.from_numpy(line), rate)
    track.finish()
    return track.read(0, count).numpy()


def _reason(error: BaseException) -> str:
    """The words of an error without the file's name, in one line."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
