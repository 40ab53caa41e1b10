"""The live preview's server side: which runs go on, how far they are, and their growing files over HTTP.

A browser follows a run by an id of 32 random hex digits; no path ever leaves or enters. What is served is the part file
that the writer appends to, read from its beginning, so a late, second or reloaded page sees everything.
"""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import struct
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..joyavatar_core.generate import Progress
from ..joyavatar_core.geometry import Geometry
from ..joyavatar_core.media.mp4 import boxes
from ..joyavatar_core.media.writer import part_path

logger = logging.getLogger(__name__)

EVENT = "joyavatar.progress"
MOST_SESSIONS, KEPT_SECONDS = 32, 3600.0
MOST_VIEWERS = 8  # of one run
BETWEEN_EVENTS = 0.1  # seconds
_PIECE = 1 << 20
_STEP = 32768
"""Chromium hands media on in blocks of this size: what is sent is filled up to it after every fragment."""


@dataclass
class Session:
    """One run as a browser sees it. node: the execution id. workflow: the front end's id of the graph, if known."""

    node: str
    path: Path | None
    geometry: Geometry
    size: tuple[int, int]
    window: int
    total_frames: int
    sid: str = field(default_factory=lambda: secrets.token_hex(16))
    state: str = "running"
    progress: Progress = field(default_factory=Progress)
    workflow: str | None = None
    retake: bool = False
    file: dict[str, str] | None = None
    message: str | None = None
    ended: float | None = None
    before: int = 0  # frames in the file from an earlier run
    first_blocks: int = 0
    elapsed: float = 0.0
    viewers: int = 0
    _sent: float = 0.0

    def tell(self, progress: Progress) -> None:
        """After a block."""
        if not self.progress.frames:
            self.first_blocks = progress.blocks - 1
        self.progress, self.elapsed = progress, progress.seconds
        now = time.monotonic()
        if now - self._sent >= BETWEEN_EVENTS:
            self._sent = now
            self.send()

    def end(self, state: str, file: dict[str, str] | None = None, message: str | None = None) -> None:
        """The run is over: "done", "cancelled" or "failed"."""
        self.state, self.file, self.message, self.ended = state, file, message, time.monotonic()
        self.elapsed = self.progress.seconds
        self.send()

    def send(self) -> None:
        from server import PromptServer

        if getattr(PromptServer, "instance", None):
            PromptServer.instance.send_sync(EVENT, self.detail())

    def detail(self) -> dict[str, Any]:
        """What the browser is told: figures, no paths."""
        progress, fps = self.progress, float(self.geometry.fps)
        first = progress.first_frame_s
        made, elapsed = progress.frames / fps, self.elapsed
        in_file = self.total_frames if self.state == "done" else self.before + progress.frames
        left = None if not progress.blocks_total else progress.blocks_total - progress.blocks
        pace = elapsed / max(1, progress.blocks - self.first_blocks)
        return {
            "node": self.node,
            "workflow": self.workflow,
            "sid": self.sid,
            "state": self.state,
            "blocks": progress.blocks,
            "blocks_total": progress.blocks_total or self.geometry.blocks_of_frames(self.total_frames),
            "window": self.window,
            "block_seconds": len(self.geometry.frames_of_block(1)) / fps,
            "first_block_seconds": len(self.geometry.frames_of_block(0)) / fps,
            "frames": in_file,
            "made": progress.frames,
            "total_seconds": self.total_frames / fps,
            "fps": round(progress.frames / max(elapsed, 1e-6), 2),
            "source_fps": fps,
            "width": self.size[0],
            "height": self.size[1],
            "first_frame_s": None if first is None else round(first, 3),
            "elapsed_s": round(elapsed, 2),
            "ahead_s": 0.0 if first is None else round(made - (elapsed - first), 2),
            "eta_s": None if left is None or not progress.frames else round(left * pace, 1),
            "part": self.path is not None and self.state == "running",
            "file": self.file,
            "retake": self.retake,
            "message": self.message,
        }


class Sessions:
    """Runs by id; the oldest ended ones go when there are too many, all after an hour."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Session] = {}

    def open(self, session: Session) -> Session:
        with self._lock:
            self._expire()
            self._known[session.sid] = session
        return session

    def get(self, sid: str) -> Session | None:
        with self._lock:
            return self._known.get(sid)

    def details(self) -> list[dict[str, Any]]:
        with self._lock:
            self._expire()
            known = list(self._known.values())
        return [session.detail() for session in known]

    def _expire(self) -> None:
        now = time.monotonic()
        ended = [s for s in self._known.values() if s.ended is not None]
        old = [s for s in ended if now - (s.ended or now) > KEPT_SECONDS]
        crowd = sorted(ended, key=lambda s: s.ended or now)[: max(0, len(self._known) + 1 - MOST_SESSIONS)]
        for session in {s.sid: s for s in (*old, *crowd)}.values():
            del self._known[session.sid]


SESSIONS = Sessions()


def register_routes() -> None:
    """Add the two routes to the host's server."""
    from aiohttp import web
    from server import PromptServer

    routes = PromptServer.instance.routes

    @routes.get("/joyavatar/sessions")
    async def sessions(_request: web.Request) -> web.Response:
        return web.json_response(SESSIONS.details())

    @routes.get("/joyavatar/stream/{sid:[0-9a-f]{32}}")
    async def stream(request: web.Request) -> web.StreamResponse:
        session = SESSIONS.get(request.match_info["sid"])
        if session is None or session.path is None or session.viewers >= MOST_VIEWERS:
            raise web.HTTPNotFound()
        response = web.StreamResponse(headers={"Content-Type": "video/mp4", "Cache-Control": "no-store"})
        session.viewers += 1
        try:
            await response.prepare(request)
            async for data in growing(session):
                await response.write(data)
            await response.write_eof()
        except (ConnectionResetError, ConnectionError):
            logger.debug("a viewer of run %s has left", session.sid)
        finally:
            session.viewers -= 1
        return response


async def growing(session: Session, every: float = 0.05) -> AsyncIterator[bytes]:
    """The bytes of a run's part file as they come, padded after each piece, until the run has ended.

    Whole boxes only: the writer puts a fragment down in one piece, but a reader may come in between.
    """
    assert session.path
    part, file, sent = part_path(session.path), None, 0
    try:
        while True:
            over = session.state != "running"
            if file is None and part.exists():
                file = part.open("rb")
            data = _whole_boxes(file, sent) if file else b""
            if data:
                told = with_length(data, session.total_frames / float(session.geometry.fps)) if not sent else data
                sent += len(data)
                yield told + padding(len(data))
            elif over:
                return
            else:
                await asyncio.sleep(every)
    finally:
        if file:
            file.close()


def _whole_boxes(file: BinaryIO, start: int) -> bytes:
    """The next bytes of an MP4 file that are whole boxes, about a megabyte at most; empty when none is whole yet.

    A `moof` waits for its `mdat`: it says how far off the data lie, so no padding may come between the two.
    """
    end = start
    for box in boxes(file, start):
        if box.kind != b"moof":
            end = box.end
        if end - start >= _PIECE:
            break
    file.seek(start)
    return file.read(end - start)


def with_length(data: bytes, seconds: float) -> bytes:
    """The beginning of a part file, with the length of the finished video in its `moov`.

    Where no length is told, Chromium takes what it has read for all: a viewer who has caught up with the making is sent
    back to the beginning when the next fragment comes, or told that the video has ended.
    """
    told, file = bytearray(data), io.BytesIO(data)

    def tell(start: int, end: int) -> None:
        for box in boxes(file, start, end):
            if box.kind in (b"moov", b"trak", b"mdia"):
                tell(box.body, box.end)
            elif box.kind in (b"mvhd", b"mdhd") and not data[box.body]:  # version 0: flags, two dates, scale, length
                (scale,) = struct.unpack_from(">I", data, box.body + 12)
                struct.pack_into(">I", told, box.body + 16, min(round(seconds * scale), 0xFFFFFFFF))

    tell(0, len(data))
    return bytes(told)


def padding(length: int) -> bytes:
    """A `free` box that fills `length` bytes up to whole blocks of Chromium's reader."""
    fill = -length % _STEP
    if fill and fill < 8:
        fill += _STEP
    return struct.pack(">I4s", fill, b"free") + bytes(fill - 8) if fill else b""
