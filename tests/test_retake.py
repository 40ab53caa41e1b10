"""A part of a finished video made again: what changes, what stays, and from where it starts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from joyavatar_core.avatar import Avatar, random_embedded
from joyavatar_core.generate import Resume, StateShelf, from_uint8, generate
from joyavatar_core.geometry import Geometry
from joyavatar_core.media import MediaError
from joyavatar_core.media.mp4 import finished_video
from joyavatar_core.media.writer import VideoWriter
from joyavatar_core.policy import policy
from joyavatar_core.retake import Part, earliest_state, part_of, retake
from joyavatar_core.rollout import Reseed

RATE, SECONDS, SIZE = 16000, 6, 32
POLICY = policy("joyavatar-flash")
GEOMETRY = Geometry(SIZE, SIZE, spatial=16)
SOUND = (np.sin(np.arange(RATE * SECONDS) / 20).astype(np.float32) * 0.3)[None]
PIECES = [(piece, RATE) for piece in np.array_split(SOUND, SECONDS, axis=1)]


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return random_embedded(dtype=torch.float32)


@pytest.fixture(scope="module")
def finished(avatar: Avatar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished video with states kept after every second block."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    writer = open_writer(path)
    shelf = StateShelf(path.with_suffix(".states"), 2)
    generate(stream(avatar), PIECES, lambda done: writer, Resume(path.with_suffix(".state"), every=0, shelf=shelf))
    assert writer.close() == path
    return path


def open_writer(path: Path, base: Path | None = None, fps: int = 16) -> VideoWriter:
    return VideoWriter(
        path, SIZE, SIZE, source_fps=Fraction(16), output_fps=Fraction(fps), audio_rate=RATE, audio_channels=1,
        settings={"seed": "0"}, first_segment_frames=9, segment_frames=12, crf=1, base=base,
    )  # fmt: skip


def stream(avatar: Avatar, reseed: Reseed | None = None):
    picture = np.full((SIZE, SIZE, 3), 90, np.uint8)
    picture[8:24, 8:24] = 200
    return avatar.stream(from_uint8(picture), POLICY, 0, reseed=reseed)


def again(avatar: Avatar, base: Path, path: Path, part: Part, seed: int, blend: int = 2) -> int:
    """Retake; returns the blocks that were made."""
    shelf = StateShelf(base.with_suffix(".states"), 2)
    state = earliest_state(part, POLICY, shelf)
    writer = open_writer(path, base)
    writer.start_at(part.frames.start)
    first = 0 if state is None else int(state.stem[6:])
    progress = retake(stream(avatar, Reseed(part.blocks, seed)), PIECES, part, state, writer, base, blend)
    assert writer.close() == path
    return progress.blocks - first


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def packets_of(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux() if p.stream.type == kind and p.dts is not None]


def test_only_the_part_changes_and_the_sound_stays(avatar: Avatar, finished: Path, tmp_path: Path) -> None:
    part = part_of(3.0, 4.0, GEOMETRY, SECONDS * 16)
    made = again(avatar, finished, tmp_path / "b.mp4", part, seed=7)
    before, after = frames_of(finished), frames_of(tmp_path / "b.mp4")
    changed = np.flatnonzero((before != after).any((1, 2, 3)))
    assert changed.min() >= part.frames.start and changed.max() < part.frames.stop
    assert len(changed) >= len(part.frames) - 2, "a new seed makes other frames"
    assert packets_of(finished, "audio") == packets_of(tmp_path / "b.mp4", "audio")
    assert made < GEOMETRY.blocks_of_frames(SECONDS * 16), "a kept state saves the blocks before it"
    assert finished_video(tmp_path / "b.mp4").frames == SECONDS * 16


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (2.0, 2.1), (5.0, 6.0), (0.0, 6.0)])
def test_the_same_seed_gives_the_same_frames(
    avatar: Avatar, finished: Path, tmp_path: Path, start: float, end: float
) -> None:
    part = part_of(start, end, GEOMETRY, SECONDS * 16)
    again(avatar, finished, tmp_path / "b.mp4", part, seed=0, blend=0)
    old, new = frames_of(finished), frames_of(tmp_path / "b.mp4")
    differing = np.flatnonzero((old != new).any((1, 2, 3)))
    assert not len(differing), (
        f"frames {differing.tolist()} differ by up to {np.abs(old.astype(int) - new).max()}; "
        f"{torch.get_num_threads()} threads, part {part.frames}"
    )


def test_starting_from_a_state_or_from_the_beginning_is_the_same(
    avatar: Avatar, finished: Path, tmp_path: Path
) -> None:
    part = part_of(4.0, 5.0, GEOMETRY, SECONDS * 16)
    again(avatar, finished, tmp_path / "b.mp4", part, seed=3)
    alone = tmp_path / "alone.mp4"
    alone.write_bytes(finished.read_bytes())  # no states beside it
    again(avatar, alone, tmp_path / "c.mp4", part, seed=3)
    assert (frames_of(tmp_path / "b.mp4") == frames_of(tmp_path / "c.mp4")).all()


def test_parts_are_whole_blocks_of_the_video() -> None:
    part = part_of(1.0, 1.2, GEOMETRY, 96)
    assert part.blocks == range(1, 2) and part.frames == range(9, 21)
    assert part_of(0, 100, GEOMETRY, 96).frames == range(96)
    for start, end in ((2.0, 2.0), (3.0, 1.0), (7.0, 8.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match=r"give a start before the end, both in the video's 6\.00 s"):
            part_of(start, end, GEOMETRY, 96)


def test_a_state_is_taken_before_the_part_enters_the_window(finished: Path) -> None:
    shelf = StateShelf(finished.with_suffix(".states"), 2)
    assert list(shelf.kept()) == [2, 4, 6, 8]
    for first, expected in ((0, None), (4, None), (5, 2), (6, 2), (7, 4)):
        state = earliest_state(Part(range(first, first + 1), GEOMETRY, 96), POLICY, shelf)
        assert (state and int(state.stem[6:])) == expected


def test_a_shelf_thins_out_and_clears(avatar: Avatar, tmp_path: Path) -> None:
    shelf, state = StateShelf(tmp_path / "s", 1, most=3), stream(avatar).state
    for blocks in range(1, 9):
        shelf.keep(state, blocks)
    assert list(shelf.kept()) == [4, 8] and shelf.every == 4
    shelf.clear()
    assert not (tmp_path / "s").exists()
    StateShelf(tmp_path / "never", 0).keep(state, 3)
    assert not (tmp_path / "never").exists()


def test_other_layouts_and_files_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="was made with output_fps 16, not 25"):
        open_writer(tmp_path / "b.mp4", finished, fps=25)
    with pytest.raises(MediaError, match="not a finished video of this program"):
        open_writer(tmp_path / "b.mp4", tmp_path / "missing.mp4")
    with pytest.raises(MediaError, match="not the end of a segment"):
        open_writer(tmp_path / "b.mp4", finished).start_at(10)
    with pytest.raises(MediaError, match="not the end of a segment"):
        open_writer(tmp_path / "b.mp4").start_at(9)
    assert sorted(p.name for p in tmp_path.iterdir()) == []


def test_cancelled_retake_leaves_no_file(finished: Path, tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "b.mp4", finished)
    writer.start_at(21)
    writer.write(np.zeros((13, SIZE, SIZE, 3), np.uint8))
    assert writer.cancel() is None
    assert not list(tmp_path.iterdir())
