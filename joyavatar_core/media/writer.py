"""The output video: H.264 and AAC in MP4, playable at any moment while it grows, and resumable to the bit.

Shape legend: frames uint8 [T, H, W, 3] RGB; sound float32 [channels, n], 1.0 = full scale.

While it runs the writer appends to NAME.part.mp4, a fragmented MP4: an opening (`ftyp`, `moov`), then one fragment
(`moof`, `mdat`) for each segment of the video, put down in one piece when the segment is complete. A segment is a
closed group of pictures from an encoder of its own, so its bytes depend on its frames only; a part that was left by a
kill is cut back to a whole number of segments and continued, and the frames come out as if nothing had happened.
`close` copies the packets once, without coding them again, into an ordinary NAME.mp4.

Sound is coded at once and held, coded, until the video has reached its time. AAC gives out its first packet 1024
samples before time zero; the edit list in both files says so, and players start at the first real sample.

Output frame rates above the source's repeat frames: output frame j shows the source frame in whose time its middle
lies, ceil((j + 1/2) * source / output) - 1. So n source frames fill exactly round(n * output / source) output frames
for every n (halves rounded up), which is what lets any source frame be the end of a segment or of the video.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from . import MediaError
from .mp4 import AudioTrack, CodedSound, Layout, Part, Segment, copy_packets, finished_video, opening_of, splice_packets
from .sound import clean_samples

logger = logging.getLogger(__name__)

COMMENT = "AI-generated video (ComfyUI-JoyAvatar)"
MAX_AHEAD_SECONDS = 3600
"""Coded sound that waits for its video takes about 10 kB a second; more than an hour of it is a caller's mistake."""


def part_path(path: str | Path) -> Path:
    """NAME.part.mp4 for NAME.mp4."""
    return _sibling(Path(path), "part")


def cancelled_path(path: str | Path) -> Path:
    """NAME.cancelled.mp4 for NAME.mp4."""
    return _sibling(Path(path), "cancelled")


def resumable_frames(path: str | Path) -> int:
    """Source frames in whole segments of the part file left for `path`: what `VideoWriter.resume` can keep at most.

    0 where there is no part file, or one without a whole segment. Raises MediaError for a file of another program.
    """
    part = part_path(path)
    if not part.exists():
        return 0
    found = Part.read(part)
    return found.layout.end_of(found.whole_segments)


class VideoWriter:
    """Writes NAME.mp4, by way of NAME.part.mp4.

    path: NAME.mp4. Missing folders are made. Files already there stay until they are replaced: NAME.mp4 at the very
    end, in one step, an older NAME.part.mp4 when the first segment is complete.
    width, height: pixels, even. source_fps: rate of the frames that are fed; output_fps: of the file (same or higher).
    audio_rate, audio_channels: of the sound that is fed; kept, save for rates AAC lacks, which become 48 kHz.
    settings: go into the metadata as JSON under `settings`; `seed` also by itself. tags: further metadata as it is.
    crf, preset: of x264. segment_frames, first_segment_frames: see Layout; the end of a segment is where a file can be
    resumed, and what a kill leaves is the video up to the last such end.

    base: a finished video of the same layout. The frames that are written, from `start_at` on, take the place of its
    own, all else is copied from it; sound is not written then. `cancel` leaves no file.
    cancelled_by: exceptions that mean that somebody wants no more.

    As a context manager a normal exit closes and an exception of `cancelled_by` cancels; any other leaves the part,
    which plays and can be resumed. A writer that was given no frame leaves no file. Raises MediaError, before any
    work, for a path that cannot be written, or for what `Layout` refuses; later on for a full disk, and then
    NAME.part.mp4 stays and plays.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        *,
        source_fps: Fraction,
        output_fps: Fraction | None = None,
        audio_rate: int,
        audio_channels: int,
        settings: Mapping[str, str],
        tags: Mapping[str, str] | None = None,
        crf: int = 18,
        preset: str = "veryfast",
        segment_frames: int = 12,
        first_segment_frames: int | None = None,
        base: Path | None = None,
        cancelled_by: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
    ) -> None:
        source = Fraction(source_fps)
        self.layout = Layout(
            width=width,
            height=height,
            source_fps=source,
            output_fps=source if output_fps is None else Fraction(output_fps),
            audio_rate=audio_rate,
            audio_channels=audio_channels,
            crf=crf,
            preset=preset,
            segment_frames=segment_frames,
            first_segment_frames=segment_frames if first_segment_frames is None else first_segment_frames,
        )
        self.path = checked_path(path)
        self.part = part_path(self.path)
        self._tags = _tags(settings, tags or {}, self.layout)
        self._start = opening_of(self.layout, {**self._tags, "complete": "false"})
        self._reformat = VideoReformatter()
        self._audio = AudioTrack(self.layout)
        self._segment = Segment(self.layout, 0)
        self._file: BinaryIO | None = None
        self._offset = 0
        self._written = 0
        self._safe = 0
        self._interrupted = False
        self._cancelled_by = cancelled_by
        self._closed = False
        self._base, self._first = base, 0
        if base:
            finished_video(base).check(self.layout, base)

    @classmethod
    def resume(cls, path: str | Path, width: int, height: int, *, frames_done: int, **options: Any) -> VideoWriter:
        """A writer that goes on after the first `frames_done` source frames of an existing NAME.part.mp4.

        frames_done: 0 (start anew) or the end of a segment; what lies behind it in the file is cut off. The caller
        feeds frames from there, and the sound from its beginning again: sound that the file has is passed over.
        Other arguments as for VideoWriter, and the same as in the run that was broken off.
        Raises MediaError when there is no part file, it was made otherwise, or it holds too few frames.
        """
        writer = cls(path, width, height, **options)
        if frames_done:
            writer._take_over(frames_done)
        return writer

    def start_at(self, frame: int) -> None:
        """Begin at a source frame, the end of a segment: for videos that replace a part of `base`."""
        segments = self.layout.segments_in(frame)
        if frame != self.layout.end_of(segments) or self._written or not self._base:
            raise MediaError(f"cannot begin at frame {frame}: it is not the end of a segment of a finished video")
        self._first = self._written = self._safe = frame
        self._segment = Segment(self.layout, segments)

    @property
    def frames_written(self) -> int:
        """Source frames taken so far."""
        return self._written

    @property
    def frames_safe(self) -> int:
        """Source frames that a kill would leave in NAME.part.mp4: those of the segments that are complete."""
        return self._safe

    def write(self, frames: np.ndarray) -> None:
        """Add frames uint8 [T, height, width, 3] RGB.

        Raises ValueError for other arrays, MediaError for a full disk.
        """
        expected = (self.layout.height, self.layout.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected:
            raise ValueError(f"frames of shape {frames.shape} and type {frames.dtype}: must be uint8 [T, *{expected}]")
        with self._working():
            for frame in frames:
                self._write_frame(frame)

    def write_audio(self, samples: np.ndarray) -> None:
        """Add sound float32 [channels, n], from the time where the last call ended.

        It may run ahead of the video by up to an hour. NaN and infinity become 0. Raises ValueError for another shape.
        """
        if samples.ndim != 2 or samples.shape[0] != self.layout.audio_channels:
            raise ValueError(f"sound of shape {samples.shape}: must be [{self.layout.audio_channels}, n]")
        with self._working():
            self._audio.write(clean_samples(samples)[0])
            ahead = self._audio.seconds_held
            if ahead > MAX_AHEAD_SECONDS:
                raise MediaError(
                    f"{self.path}: {ahead:.0f} s of sound wait for their video, the limit is {MAX_AHEAD_SECONDS}; "
                    "feed sound and frames in step"
                )

    def close(self) -> Path | None:
        """Finish NAME.mp4, with all the sound that was fed, and remove the part. None if there was no frame.

        After a write that was broken off half way (Ctrl-C) this is a `cancel`.
        Raises MediaError when the disk is full or the file cannot be replaced: then the part stays.
        """
        return self._end(self.path, complete=True)

    def cancel(self) -> Path | None:
        """Finish what there is as NAME.cancelled.mp4, with the sound up to the end of its video."""
        return self._end(cancelled_path(self.path), complete=False)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not issubclass(kind, self._cancelled_by):
            if not self._closed:
                self._abandon()
        else:
            try:
                self.cancel()
            except MediaError as second:  # the first error is the one to tell
                logger.error("%s", second)

    def _write_frame(self, rgb: np.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        # names, not numbers: PyAV 14 takes only these, later ones both
        frame = self._reformat.reformat(
            frame,
            format="yuv420p",
            dst_colorspace="ITU709",  # pyright: ignore[reportArgumentType]
            dst_color_range="MPEG",
        )
        for index in range(self.layout.outputs(self._written), self.layout.outputs(self._written + 1)):
            self._segment.encode(frame, index)
        self._written += 1
        if self._written == self.layout.end_of(self.layout.segments_in(self._written)):
            self._commit(self._audio.due(self._video_end))

    @property
    def _video_end(self) -> Fraction:
        """Seconds."""
        return self.layout.outputs(self._written) / self.layout.output_fps

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Marks work that was broken off half way, of which `cancel` must not use the open segment."""
        if self._closed:
            raise MediaError(f"{self.path}: is finished already; start another writer")
        was, self._interrupted = self._interrupted, True
        yield
        self._interrupted = was

    def _commit(self, sound: list[CodedSound]) -> None:
        """Put the open segment, with this sound, at the end of the part, and open the next."""
        if not (self._segment.frames or sound):
            return
        data = self._segment.finish(sound)
        if not self._offset:
            data = self._start + data
        self._append(data)
        # nothing that a Ctrl-C could come between: `cancel` relies on these two being of one moment
        self._offset += len(data)
        self._safe = self._written
        self._audio.drop(len(sound))
        self._segment = Segment(self.layout, self._segment.number + 1)

    def _append(self, data: bytes) -> None:
        try:
            if self._file is None:
                if self.part.exists():
                    logger.warning("%s: replaced, it was left by a run that did not end", self.part)
                self._file = self.part.open("wb", buffering=0)
            _write_at(self._file, self._offset, data)
        except OSError as error:
            self._abandon()
            raise MediaError(
                f"{self.part}: cannot be written ({error.strerror}); it plays up to source frame {self._safe}: make "
                "room and resume, or choose another folder"
            ) from error

    def _abandon(self) -> None:
        """Close the part as it is; it is cut to whole fragments, and removed if it holds none."""
        self._closed = True
        if self._file is None:
            return
        try:
            self._file.truncate(self._offset)
        except OSError as error:
            logger.warning("%s: cannot be cut to its last whole fragment (%s)", self.part, error.strerror)
        self._file.close()
        if not self._offset:
            self.part.unlink(missing_ok=True)

    def _take_over(self, frames_done: int) -> None:
        segments = self.layout.segments_in(frames_done)
        if frames_done != self.layout.end_of(segments):
            raise MediaError(f"cannot resume after frame {frames_done}: it is not the end of a segment")
        found = Part.read(self.part)
        found.check(self.layout, self._start)
        if found.whole_segments < segments:
            have = self.layout.end_of(found.whole_segments)
            raise MediaError(f"{self.part}: holds {have} whole frames, not {frames_done}; resume from an earlier frame")
        kept = found.fragments[:segments]
        try:
            self._file = self.part.open("r+b", buffering=0)
            self._file.truncate(kept[-1].end)
        except OSError as error:
            raise MediaError(f"{self.part}: cannot be written ({error.strerror}); check its permissions") from error
        self._offset = kept[-1].end
        self._written = self._safe = frames_done
        self._audio.skip(sum(fragment.sound for fragment in kept))
        self._segment = Segment(self.layout, segments)

    def _end(self, target: Path, complete: bool) -> Path | None:
        if self._closed:
            return None
        if self._interrupted:
            complete, target = False, cancelled_path(self.path)
            self._written = self._safe
        elif self._written:
            self._audio.finish()
            self._commit(self._audio.due(None if complete else self._video_end))
        self._closed = True
        if self._file is None:
            return None
        self._file.truncate(self._offset)
        self._file.close()
        if self._base and not complete:
            self.part.unlink()
            return None
        frames = finished_video(self._base).frames if self._base else self._written
        counts = {"frames": str(self.layout.outputs(frames)), "source_frames": str(frames)}
        self._remux(target, {**self._tags, "complete": "true" if complete else "false", **counts})
        try:
            self.part.unlink()
        except OSError as error:  # Windows, while somebody watches it
            logger.warning("%s: cannot be removed (%s)", self.part, error.strerror)
        return target

    def _remux(self, target: Path, tags: dict[str, str]) -> None:
        unfinished = _sibling(self.path, "finishing")
        try:
            if self._base:
                splice_packets(self._base, self.part, self._first, self._written, unfinished, self.layout, tags)
            else:
                copy_packets(self.part, unfinished, self.layout, tags)
            os.replace(unfinished, target)
        except (OSError, FFmpegError) as error:
            raise MediaError(
                f"{target}: cannot be written ({error.strerror}); {self.part.name} in the same folder holds the "
                "whole video and plays: make room for a second copy of it and resume, or choose another folder"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)


def _tags(settings: Mapping[str, str], tags: Mapping[str, str], layout: Layout) -> dict[str, str]:
    seed = {"seed": settings["seed"]} if "seed" in settings else {}
    own = {
        "comment": COMMENT,
        "ai_generated": "true",
        "settings": json.dumps(dict(settings), ensure_ascii=False, sort_keys=True),
        "joyavatar_layout": layout.to_json(),
    }
    return {key: str(value) for key, value in {**tags, **seed, **own}.items()}


def _write_at(file: BinaryIO, offset: int, data: bytes) -> None:
    file.seek(offset)
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _sibling(path: Path, word: str) -> Path:
    return path.with_name(f"{path.stem}.{word}.mp4")


def checked_path(path: str | Path) -> Path:
    """The path, if a file of the longest name used can be made there. Makes missing folders."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise MediaError(f"{path}: the output must be named NAME.mp4")
    for name in (path, part_path(path), cancelled_path(path)):
        if os.path.isdir(name):  # unlike Path.is_dir, says no to a name that is too long
            raise MediaError(f"{name}: is a folder; name a file")
    probe = _sibling(path, "finishing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.open("wb").close()
        probe.unlink(missing_ok=True)  # another rank of the run may look at the same moment
    except OSError as error:
        raise MediaError(
            f"{path}: cannot be written there ({error.strerror}); choose another folder or check its permissions"
        ) from None
    return path
