"""A video file as the measures see it: frames in pieces, its blocks, its sound.

Shape legend: T pixel frames, H W pixel size, n sound samples. Frames are uint8 [T, H, W, 3] RGB.

Frames are read in order and a few at a time, so a long video costs no more memory than a short one. Our own videos
say in their metadata how they were laid out; of a frame that was repeated to reach another rate only the first showing
counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..media import MediaError

if TYPE_CHECKING:
    from ..media.mp4 import Layout

log = logging.getLogger(__name__)

Frames = NDArray[np.uint8]

ENDINGS = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
SOUNDS = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"})
_PIECE = 32


@dataclass(frozen=True)
class Blocks:
    """Frames of the first block and of each later one (the causal Wan autoencoder: 9, then 12)."""

    first: int
    later: int

    def __post_init__(self) -> None:
        if min(self.first, self.later) < 2:
            raise ValueError(f"blocks of {self.first} and {self.later} frames: both must be at least 2")

    @classmethod
    def parse(cls, text: str) -> Blocks:
        """ "N" (the first is shorter by 3, as one latent frame holds one pixel frame) or "FIRST,N"."""
        parts = text.split(",")
        if not all(part.strip().isdigit() for part in parts) or len(parts) > 2:
            raise ValueError(f"--block-frames {text!r}: write it as N or FIRST,N, e.g. 12 or 9,12")
        later = int(parts[-1])
        return cls(int(parts[0]) if len(parts) == 2 else later - 3, later)

    def seams(self, frames: int) -> NDArray[np.int64]:
        """Index of the first frame of each block but the first, in a video of so many frames."""
        return np.arange(self.first, frames, self.later)


@dataclass(frozen=True)
class Video:
    """A video that was opened once to see that it can be read.

    fps: of the frames that `pieces` gives. stated: seconds the file says it lasts, or None. blocks: where the file
    says so. complete: not a part file or a cancelled video of ours.
    """

    path: Path
    width: int
    height: int
    fps: float
    stated: float | None
    blocks: Blocks | None
    complete: bool
    layout: Layout | None

    def pieces(self, frames: int | None = None) -> Iterator[Frames]:
        """[T, H, W, 3] of up to 32 frames, in order; of the first `frames` only. Raises MediaError as `open_video`.

        A file that breaks off gives what could be decoded, and one warning.
        """
        held: list[Frames] = []
        for index, frame in enumerate(self._frames()):
            if index == frames:
                break
            held.append(frame)
            if len(held) == _PIECE:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)

    def _frames(self) -> Iterator[Frames]:
        import av
        from av.error import FFmpegError

        with av.open(str(self.path.absolute()), metadata_errors="replace") as file:
            shown, wanted = 0, 0
            try:
                for frame in file.decode(video=0):
                    if self.layout is None or shown == self.layout.outputs(wanted):
                        wanted += 1
                        yield self._rgb(frame)
                    shown += 1
            except FFmpegError as error:
                log.warning("%s: damaged (%s); %d frames are used", self.path, error.strerror, wanted)

    def _rgb(self, frame: Any) -> Frames:
        if self.layout is None:
            rgb = frame.to_ndarray(format="rgb24")
        else:
            rgb = frame.reformat(format="rgb24", src_colorspace="ITU709", src_color_range="MPEG").to_ndarray()
        if rgb.shape[:2] != (self.height, self.width):
            raise MediaError(f"{self.path}: changes its picture size on the way; convert it to one size")
        return rgb

    def at(self, indices: Sequence[int]) -> Frames:
        """The frames with these indices, ascending and inside: [len(indices), H, W, 3]."""
        wanted, found, start = set(indices), [], 0
        for piece in self.pieces(max(wanted) + 1):
            found += [frame for i, frame in enumerate(piece, start) if i in wanted]
            start += len(piece)
        return np.stack(found)


def open_video(path: str | Path) -> Video:
    """Raises MediaError for what is missing, not a video, without a video track, or under two frames."""
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; name a video file in it")
    if not path.exists():
        raise MediaError(f"{path}: no such file; check the path of the video")
    if not path.stat().st_size:
        raise MediaError(f"{path}: the file is empty; make or download it again")
    video = _opened(path)
    count = sum(len(piece) for piece in video.pieces(2))
    if count < 2:
        raise MediaError(f"{path}: {'no frame' if not count else '1 frame'} could be read, at least 2 are needed")
    return video


def _opened(path: Path) -> Video:
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path.absolute()), metadata_errors="replace") as file:
            if not file.streams.video:
                raise MediaError(f"{path}: has no video track; name a video")
            stream, tags = file.streams.video[0], dict(file.metadata)
            layout = _layout(tags)
            rate = stream.average_rate or stream.guessed_rate
            stated = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
            size = stream.codec_context.width, stream.codec_context.height
    except (FFmpegError, OSError) as error:
        reason = " ".join(str(error.strerror or error).split())
        raise MediaError(f"{path}: not a video file that can be read ({reason}); make or download it again") from None
    fps = float(layout.source_fps if layout else rate or 0)
    if fps <= 0 or min(size) < 1:
        raise MediaError(f"{path}: says neither its frame rate nor its size; convert it to MP4")
    blocks = Blocks(layout.first_segment_frames, layout.segment_frames) if layout else None
    return Video(path, *size, fps, stated, blocks, tags.get("complete", "true") == "true", layout)


def _layout(tags: dict[str, str]) -> Layout | None:
    """Of a video of ours; None for others."""
    from ..media.mp4 import Layout

    try:
        return Layout.from_json(tags["joyavatar_layout"])
    except (KeyError, TypeError, ValueError):
        return None


def read_sound(path: Path) -> tuple[NDArray[np.float32], int]:
    """Mono samples [n] and their rate, of a sound file or the sound track of a video. Raises MediaError without one."""
    from ..media.sound import SoundFile

    sound = SoundFile(path)
    return np.concatenate([chunk.mean(0) for chunk in sound]), sound.sample_rate


def resampled(samples: NDArray[np.float32], rate: int, to: int) -> NDArray[np.float32]:
    """Mono samples [n] at another rate."""
    if rate == to:
        return samples
    from scipy.signal import resample_poly

    ratio = Fraction(to, rate)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def files_in(folder: Path, endings: frozenset[str], what: str) -> list[Path]:
    """Files of these endings, by name. Raises MediaError for no such folder, or none in it.

    Unfinished videos of ours (NAME.part.mp4) are left out.
    """
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder; check the path")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and ".part" not in p.suffixes)
    if not found:
        raise MediaError(
            f"{folder}: has no {what} ({', '.join(sorted(endings))}); put one there or name another folder"
        )
    return found
