"""Processes that share independent pieces of work on a CPU, one thread each.

Shape legend: no tensors.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
C = TypeVar("C")


@contextmanager
def pool(workers: int) -> Iterator[Executor | None]:
    """Worker processes, or None for none. What they still do is dropped when it is left by an error."""
    if not workers:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    processes = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield processes
    finally:
        processes.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """One thread each; Ctrl-C is the main process's affair, and its end is the end of the workers."""
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    """A main process that is killed says nothing to its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def in_order(
    executor: Executor | None, calls: Iterable[tuple[C, Callable[[], T]]], ahead: int, remedy: str = ""
) -> Iterator[tuple[C, T]]:
    """(context, result) of each call in the order given, at most `ahead` of them at work or waiting.

    Raises what a call raises, and ChildProcessError, with the remedy, where a process died.
    """
    waiting: deque[tuple[C, Future[T]]] = deque()
    for context, call in calls:
        if executor is None:
            yield context, call()
            continue
        waiting.append((context, _submitted(executor, call, remedy)))
        if len(waiting) > ahead:
            yield _result(waiting, remedy)
    while waiting:
        yield _result(waiting, remedy)


def _submitted(executor: Executor, call: Callable[[], T], remedy: str) -> Future[T]:
    try:
        return executor.submit(call)
    except BrokenProcessPool as error:
        raise _died("", remedy) from error


def _result(waiting: deque[tuple[Any, Future[T]]], remedy: str) -> tuple[Any, T]:
    context, future = waiting.popleft()
    try:
        return context, future.result()
    except BrokenProcessPool as error:
        raise _died(getattr(context, "name", ""), remedy) from error


def _died(name: str, remedy: str) -> ChildProcessError:
    at = f" at {name} or soon after it" if name else ""
    return ChildProcessError(f"a worker process died{at}, probably for want of memory: use fewer --workers{remedy}")
