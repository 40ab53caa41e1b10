"""What the live preview's server sends of a growing file, without a host: whole fragments, and how long it will be."""

from __future__ import annotations

import asyncio
import importlib
import io
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from joyavatar_core.media.mp4 import boxes
from joyavatar_core.media.writer import VideoWriter, part_path

ROOT = Path(__file__).parent.parent
FPS, RATE, SEGMENTS, TOTAL = 16, 16000, 3, 160


@pytest.fixture(scope="module")
def preview() -> Any:
    """nodes/preview.py; nodes/__init__.py would ask for ComfyUI."""
    for name, folder in (("preview_alone", ROOT), ("preview_alone.nodes", ROOT / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    yield importlib.import_module("preview_alone.nodes.preview")
    for name in [name for name in sys.modules if name.split(".")[0] == "preview_alone"]:
        del sys.modules[name]


@pytest.fixture
def part(tmp_path: Path) -> bytes:
    """Some segments of a video that will be longer."""
    path = tmp_path / "made.mp4"
    with VideoWriter(
        path, 64, 64, source_fps=Fraction(FPS), audio_rate=RATE, audio_channels=1, settings={}, segment_frames=12
    ) as writer:
        writer.write_audio(np.zeros((1, SEGMENTS * 12 * RATE // FPS), np.float32))
        writer.write(np.random.default_rng(0).integers(0, 255, (SEGMENTS * 12, 64, 64, 3), np.uint8))
        return part_path(path).read_bytes()


def session(preview: Any, path: Path) -> Any:
    return preview.Session("1", path, types.SimpleNamespace(fps=FPS), (64, 64), 4, TOTAL)


def test_a_fragment_is_sent_with_its_data(preview: Any, part: bytes, tmp_path: Path) -> None:
    """The writer puts a fragment down in one go, but a reader may see the file grow: half of a `mdat`, here."""
    found = list(boxes(io.BytesIO(part)))
    moof = next(i for i, box in enumerate(found) if box.kind == b"moof" and i > 4)
    half = (found[moof + 1].start + found[moof + 1].end) // 2
    run = session(preview, tmp_path / "grows.mp4")
    file = part_path(run.path)
    file.write_bytes(part[:half])

    async def read() -> list[bytes]:
        stream = preview.growing(run, every=0.001)
        first = await anext(stream)
        file.write_bytes(part)
        pieces = [first, await anext(stream)]
        run.state = "done"
        return pieces + [piece async for piece in stream]

    pieces = asyncio.run(read())
    assert all(len(piece) % 32768 == 0 for piece in pieces)
    kinds = [box.kind for box in boxes(io.BytesIO(b"".join(pieces)))]
    assert kinds.count(b"moof") == kinds.count(b"mdat") == SEGMENTS
    assert all(kinds[i + 1] == b"mdat" for i, kind in enumerate(kinds) if kind == b"moof")


def test_the_stream_says_how_long_the_video_will_be(preview: Any, part: bytes, tmp_path: Path) -> None:
    run = session(preview, tmp_path / "whole.mp4")
    run.state = "done"
    part_path(run.path).write_bytes(part)

    async def read() -> bytes:
        return b"".join([piece async for piece in preview.growing(run)])

    sent = asyncio.run(read())
    with av.open(io.BytesIO(sent)) as container:
        assert container.duration == TOTAL / FPS * av.time_base
        assert sum(1 for _ in container.decode(video=0)) == SEGMENTS * 12, "the pictures are those of the file"
