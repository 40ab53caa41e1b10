"""A part of a finished video made again with another seed: all else in the file stays as it is, packet by packet.

The run starts from the newest kept state in which the first block of the part has not entered the window yet, so the
cost is that of the part and of the blocks since that state. Blocks of the part draw their noise from the other seed;
at both ends the old frames fade into the new ones and back, inside the part.

Shape legend: T pixel frames, H W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .generate import Chunks, FrameSink, Progress, Resume, StateShelf, generate
from .geometry import Geometry
from .media.mp4 import source_frames
from .media.writer import VideoWriter
from .policy import RolloutPolicy
from .stream import AvatarStream


@dataclass(frozen=True)
class Part:
    """Whole blocks of a video of `total` pixel frames."""

    blocks: range
    geometry: Geometry
    total: int

    @property
    def frames(self) -> range:
        """Pixel frames of the blocks."""
        last = self.geometry.frames_of_block(self.blocks[-1]).stop
        return range(self.geometry.frames_of_block(self.blocks.start).start, min(last, self.total))


def part_of(start: float, end: float, geometry: Geometry, total: int) -> Part:
    """The blocks that hold the seconds start .. end. ValueError for seconds outside the video."""
    first, stop = round(start * geometry.fps), min(round(end * geometry.fps), total)
    if not 0 <= first < stop:
        raise ValueError(
            f"seconds {start:g} to {end:g}: give a start before the end, both in the video's "
            f"{float(total / geometry.fps):.2f} s"
        )
    last = geometry.blocks_of_frames(stop)
    return Part(range(_block_of(first, geometry), last), geometry, total)


def _block_of(frame: int, geometry: Geometry) -> int:
    return geometry.blocks_of_frames(frame + 1) - 1


def earliest_state(part: Part, policy: RolloutPolicy, shelf: StateShelf) -> Path | None:
    """The state to start from; None: the beginning."""
    return shelf.before(part.blocks.start - policy.lead_blocks)


def retake(
    stream: AvatarStream,
    sound: Chunks,
    part: Part,
    state: Path | None,
    writer: VideoWriter,
    base: Path,
    blend: int,
    finished: Callable[[np.ndarray], np.ndarray] = lambda frames: frames,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Write the frames of the part into `writer`, which replaces them in the finished video `base`.

    stream: with Rollout.reseed for the part's blocks. blend: frames that fade, at each end that is not an end of the
    video. finished: from the model's frames to those of the video.
    """
    old = list(source_frames(base, writer.layout, part.frames))
    sink = _Replacing(part, writer, old, blend, finished)
    progress = Progress()

    def open_sink(frames_done: int) -> FrameSink:
        sink.position = frames_done
        return sink

    def tell(now: Progress) -> None:
        nonlocal progress
        progress = now
        if on_progress:
            on_progress(now)
        if sink.position >= part.frames.stop:
            raise _Enough

    with contextlib.suppress(_Enough):
        generate(stream, sound, open_sink, Resume(state, every=0, go_on=True) if state else None, tell)
    return progress


class _Enough(Exception):  # noqa: N818 (nothing went wrong)
    """The part is complete."""


@dataclass
class _Replacing:
    """A sink that keeps the frames of the part, faded into the old ones at its ends."""

    part: Part
    writer: VideoWriter
    old: list[np.ndarray]
    blend: int
    finished: Callable[[np.ndarray], np.ndarray]
    position: int = 0

    def write(self, frames: np.ndarray) -> None:
        span = self.part.frames
        for frame in frames:
            if self.position in span:
                self.writer.write(self._faded(self.finished(frame[None]), self.position - span.start))
            self.position += 1

    def write_audio(self, samples: np.ndarray) -> None:
        """The video keeps its sound."""

    def _faded(self, frame: np.ndarray, index: int) -> np.ndarray:
        span = self.part.frames
        new = 1.0
        if span.start > 0:
            new = min(new, (index + 1) / (self.blend + 1))
        if span.stop < self.part.total:
            new = min(new, (len(span) - index) / (self.blend + 1))
        if new >= 1:
            return frame
        mixed = new * frame.astype(np.float32) + (1 - new) * self.old[index]
        return np.rint(mixed).astype(np.uint8)
