"""Stages of a run beside the rollout: sound is heard ahead of it, files are written behind it, each on a thread of its
own; frames are made on a CUDA stream of their own.

The caller's thread alone gives work to transformer and decoder, so nothing about a model need be safe for threads, and
a host's rules of memory hold. What waits between two stages is bounded; an error of a stage is raised in the caller's
thread; whoever leaves, however, leaves no thread behind.

Shape legend: B batch, T pixel frames, H W pixels.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Overlap:
    """Which stages work beside the rollout; none by default, which takes the least memory.

    hear: sound is read and heard by a thread, up to `most` blocks ahead. Not for live sound: a thread that waits for
        what may never come cannot be told to stop.
    decode: frames are made on a CUDA stream of its own; where there is none, nothing changes.
    write: sinks are written to by a thread, with fewer than `most` blocks between rollout and file as a window begins.
    """

    hear: bool = False
    decode: bool = False
    write: bool = False
    most: int = 2

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most {self.most} must be at least 1: a block must be somewhere")

    @staticmethod
    def suited(device: torch.device) -> Overlap:
        """All of them beside a CUDA device; on a CPU the stages would only take each other's cores."""
        whole = device.type == "cuda"
        return Overlap(hear=whole, decode=whole, write=whole)


class Worker:
    """One thread that does what it is given, in order; after a failure nothing more, and everybody is told of it."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"joyavatar {name}")
        self._error: BaseException | None = None

    def do(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call. Its future raises what the call raised, or what an earlier one did."""
        return self._pool.submit(self._run, call)

    def close(self, drop: bool = False) -> None:
        """Wait for the thread to end; drop: what it has not begun is not done.

        A second Ctrl-C meanwhile is the same wish as the first, which brought us here.
        """
        while True:
            try:
                return self._pool.shutdown(wait=True, cancel_futures=drop)
            except KeyboardInterrupt:
                continue

    def _run(self, call: Callable[[], T]) -> T:
        if self._error is not None:
            raise self._error
        try:
            return call()
        except BaseException as error:
            self._error = error
            raise


def ahead(
    items: Iterator[T], most: int, counts: Callable[[T], bool], around: Callable[[], Any]
) -> Generator[T, None, None]:
    """The same items, made by a thread up to `most` of those that count ahead of whoever takes them.

    around: makes a context manager that the thread makes items in. Close the iterator to end the thread.
    """

    def some() -> list[T]:
        """Up to the next that counts; nothing at the end."""
        made: list[T] = []
        with around():
            for item in items:
                made.append(item)
                if counts(item):
                    break
        return made

    worker = Worker("sound")
    try:
        waiting = deque(worker.do(some) for _ in range(most))
        while made := waiting.popleft().result():
            waiting.append(worker.do(some))
            yield from made
    finally:
        worker.close(drop=True)


Shown = Callable[[], np.ndarray]
"""Waits until frames are on the host; uint8 [T, H, W, 3] RGB."""


class Lane:
    """Where frames are made of latents: where the rollout is, behind it."""

    @contextlib.contextmanager
    def after(self, *given: Tensor) -> Iterator[None]:
        """Around work on tensors of the rollout, or of the lane itself, and around `to_host` of what comes of it."""
        yield

    def to_host(self, pixels: Tensor) -> Shown:
        """uint8 [T, H, W, 3] on its way to the host; from a CUDA device by way of pinned memory, so that nobody waits
        but who asks for the array.
        """
        if pixels.device.type != "cuda":
            array = pixels.cpu().numpy()
            return lambda: array
        host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        host.copy_(pixels, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(pixels.device))

        def waited() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return waited


class CudaLane(Lane):
    """A CUDA stream beside the rollout: the next window does not wait for the frames of the last one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    @contextlib.contextmanager
    def after(self, *given: Tensor) -> Iterator[None]:
        """After all that the rollout was given so far. Memory of what is given stays until this lane has read it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for tensor in given:
            if tensor.device.type == "cuda":
                tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield


def lane_of(overlap: Overlap, device: torch.device) -> Lane:
    """The lane for frames beside a rollout on a device."""
    return CudaLane(device) if overlap.decode and device.type == "cuda" else Lane()


def hearing_context(device: torch.device) -> Callable[[], Any]:
    """For `ahead`: work on a CUDA device goes to a stream of its own, so that asking for its result waits for nothing
    of the rollout.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # the weights are there
    return lambda: torch.cuda.stream(stream)
