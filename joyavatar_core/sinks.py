"""Where frames and sound of a run go, block by block: at once, or by a thread behind the rollout.

Shape legend: T pixel frames, H W pixels, m sound samples.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .overlap import Overlap, Shown, Worker


class FrameSink(Protocol):
    """Where frames and sound go; media.VideoWriter is one. After a crash it can go on from the end of any block."""

    def write(self, frames: np.ndarray) -> None:
        """uint8 [T, H, W, 3] RGB."""
        ...

    def write_audio(self, samples: np.ndarray) -> None:
        """float32 [channels, m]."""
        ...


@dataclass(frozen=True)
class Written:
    """A block that is in the sink: its index and pixel frames; the moments (time.perf_counter) its frames came to the
    host, and it was written.
    """

    index: int
    frames: int
    shown: float
    moment: float


class BlockSink:
    """Blocks into a FrameSink at once, in the caller's thread. A context manager, for those that have a thread."""

    def __init__(self, sink: FrameSink) -> None:
        self.sink = sink
        self._written: deque[Written] = deque()

    def write(self, index: int, frames: Shown) -> None:
        """A block of the stream."""
        array = frames()
        shown = time.perf_counter()
        self.sink.write(array)
        self._written.append(Written(index, len(array), shown, time.perf_counter()))

    def write_audio(self, samples: np.ndarray) -> None:
        """float32 [channels, m]"""
        self.sink.write_audio(samples)

    def drain(self) -> None:
        """Until all that was given is in the sink."""

    def written(self) -> Iterator[Written]:
        """Each block once, since the last call."""
        while self._written:
            yield self._written.popleft()

    def __enter__(self) -> BlockSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...


class SinkBehind(BlockSink):
    """The same by a thread: `write` returns when fewer than `most` blocks are on their way.

    What the thread runs into is raised by the next call. On leaving, also by an error or Ctrl-C, what was given is
    written and the thread ends; so the file holds all that was made.
    """

    def __init__(self, sink: FrameSink, most: int) -> None:
        super().__init__(sink)
        self.most = most
        self._worker = Worker("file")
        self._waiting: deque[Future[None]] = deque()

    def write(self, index: int, frames: Shown) -> None:
        super_write = super().write
        self._waiting.append(self._worker.do(lambda: super_write(index, frames)))
        self._settle(self.most - 1)

    def write_audio(self, samples: np.ndarray) -> None:
        super_write = super().write_audio
        self._worker.do(lambda: super_write(samples))

    def drain(self) -> None:
        self._settle(0)
        self._worker.do(lambda: None).result()  # raises what writing sound ran into

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._worker.close()

    def _settle(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting[0].result()
            self._waiting.popleft()


def block_sink(sink: FrameSink, overlap: Overlap) -> BlockSink:
    """Blocks into a sink, as the overlap says."""
    return SinkBehind(sink, overlap.most) if overlap.write else BlockSink(sink)
