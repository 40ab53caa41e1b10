"""Starts the processes of a run and watches over them: one error, one line; nobody is left behind.

A rank that is gone closes its connections, so its neighbours end at once, theirs after them, and the one that writes
finishes the file with the frames so far. Who does not end by itself is ended after `GRACE` seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch.distributed as dist
from torch import multiprocessing

from .members import MEETING, Member, RankLostError, met

logger = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that the other ranks have, after one is gone or all shall stop, to finish their files."""
_LOST, _CANCELLED, _FAILED = 75, 130, 1
_EXPECTED = (ValueError, OSError, MemoryError, ImportError, RuntimeError)

Work = Callable[[Member], Any]
"""What a rank does; picklable: a function of a module, or functools.partial of one. Its result must be picklable."""


@dataclass
class _Child:
    """A process as its parent sees it. said: ("done", result) or ("failed", error in words).

    Who has said that it is done has done its part, however it ends: libraries may abort a process at its very end.
    """

    rank: int
    process: BaseProcess
    ear: Connection
    said: tuple[str, Any] | None = None
    ended: bool = field(default=False)  # by the parent

    @property
    def done(self) -> bool:
        return self.said is not None and self.said[0] == "done"

    def listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            if self.said is None and self.ear.poll():
                self.said = self.ear.recv()


def launch(work: Work, world: int, patience: float = 600.0, poll: Callable[[], None] = lambda: None) -> list[Any]:
    """Run `work` in `world` new processes of this machine; returns what they return, in the order of ranks.

    Args:
        patience: see Member.
        poll: called a few times a second; may raise to stop (as Ctrl-C does): the ranks then get a SIGTERM, which is a
            KeyboardInterrupt to them, and time to finish their files.

    Raises:
        RankLostError: a process was killed, or failed in a way of its own; named.
        ValueError, OSError: of the first rank that said so.
    """
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed: several processes need it")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MEETING)  # pyright: ignore[reportPrivateImportUsage]
    children = [_start(work, Member(rank, world, rank, patience), store.port) for rank in range(world)]
    try:
        first = _watch(children, poll)
    except BaseException:
        _end(children, at_once=True)
        raise
    if first is None:
        return [child.said[1] if child.said else None for child in children]
    _end(children, at_once=False)
    raise _error(first, children)


def _start(work: Work, member: Member, port: int) -> _Child:
    context = multiprocessing.get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    process = context.Process(target=_rank, args=(work, member, port, mouth), name=f"joyavatar {member.name}")
    process.start()
    mouth.close()
    return _Child(member.rank, process, ear)


def _watch(children: list[_Child], poll: Callable[[], None]) -> _Child | None:
    """Until all have ended well (None), or one has not (that one)."""
    left, odd = list(children), []
    while left:
        poll()
        connection.wait([c.process.sentinel for c in left] + [c.ear for c in left if c.said is None], timeout=0.2)
        for child in left:
            child.listen()
        codes = [(c, c.process.exitcode) for c in left]  # read once: it may change at any moment
        left = [c for c, code in codes if code is None]
        odd += [c for c, code in codes if code]
        for child in odd:
            child.listen()  # to its last word
        if not all(c.done for c in odd):
            return _culprit(odd, left)
    for child in odd:
        logger.warning("rank %d had done its part, then ended with status %s", child.rank, child.process.exitcode)
    return None


def _culprit(bad: list[_Child], left: list[_Child]) -> _Child:
    """Who went first: others only say that somebody is gone, so where they were quicker look for a moment longer."""
    until = time.monotonic() + 2.0
    while True:
        guilty = [c for c in bad if c.process.exitcode not in (_LOST, _CANCELLED)]
        if guilty or not left or time.monotonic() > until:
            return (guilty or bad)[0]
        connection.wait([c.process.sentinel for c in left], timeout=0.1)
        codes = [(c, c.process.exitcode) for c in left]
        bad += [c for c, code in codes if code]
        left = [c for c, code in codes if code is None]


def _error(first: _Child, children: list[_Child]) -> OSError | ValueError:
    """What to tell of the rank that went first."""
    for child in children:
        child.listen()
    code = first.process.exitcode or 0
    if first.said and first.said[0] == "failed":
        kind, words = first.said[1]
        return ValueError(words) if kind == "value" else OSError(words)
    if code < 0:
        return RankLostError(f"rank {first.rank} of {len(children)} was killed ({signal.Signals(-code).name})")
    if code == _LOST:
        return RankLostError(f"rank {first.rank} of {len(children)} lost another one")
    return RankLostError(f"rank {first.rank} of {len(children)} failed (exit status {code}); its error stands above")


def _end(children: list[_Child], at_once: bool) -> None:
    """Wait for all to end by themselves, as they do when one is gone; at_once: ask them to. Then force them."""
    steps = [("terminate", GRACE), ("kill", 5.0)]
    if not at_once:
        _join(children, GRACE)
    for how, seconds in steps:
        for child in children:
            if child.process.is_alive():
                getattr(child.process, how)()
        _join(children, seconds)


def _join(children: list[_Child], seconds: float) -> None:
    until = time.monotonic() + seconds
    for child in children:
        child.process.join(max(0.0, until - time.monotonic()))


# In the new process


def _rank(work: Work, member: Member, port: int, mouth: Connection) -> None:
    faulthandler.enable()  # a rank that aborts says where
    interruptible()
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=MEETING)  # pyright: ignore[reportPrivateImportUsage]
        with met(member, store):
            mouth.send(("done", work(member)))
        _leave(0)  # what libraries do at a process's end has aborted a finished run
    except RankLostError as error:
        logger.info("%s", error)
        _leave(_LOST)
    except KeyboardInterrupt:
        _leave(_CANCELLED)
    except _EXPECTED as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        mouth.send(("failed", ("value" if isinstance(error, ValueError) else "other", words)))
        _leave(_FAILED)


def interruptible() -> None:
    """SIGINT and SIGTERM are a KeyboardInterrupt, once: what follows them is the same wish."""
    asked: list[int] = []

    def interrupt(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _follow_parent() -> None:
    """Nobody is left behind when the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(status: int) -> NoReturn:
    """End without waiting for connections to ranks that are gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
