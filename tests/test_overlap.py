"""Stages beside the rollout: the same bits, bounded, one error for whoever fails, nobody left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from joyavatar_core import checkpoint
from joyavatar_core.cli.main import main
from joyavatar_core.generate import Progress, Resume, _Saver, generate
from joyavatar_core.media import MediaError, writer
from joyavatar_core.media.writer import VideoWriter
from joyavatar_core.overlap import Lane, Overlap, Worker, ahead, lane_of
from joyavatar_core.sinks import SinkBehind

from .test_cli import frames_of, picture, words, write_sound  # noqa: F401
from .test_stream import RATE, make_stream, sound

SECONDS = 5.3
BOTH = Overlap(hear=True, decode=True, write=True)
WAYS = [Overlap(), Overlap(hear=True), Overlap(write=True), BOTH, Overlap(hear=True, write=True, most=1)]


class StopError(Exception):
    """Somebody wants no more."""


class Kept:
    """A sink that keeps all it is given, and may fail or wait at a block."""

    def __init__(self, at_block: dict[int, Callable[[], None]] | None = None) -> None:
        self.frames: list[np.ndarray] = []
        self.sound: list[np.ndarray] = []
        self.at_block = at_block or {}

    def write(self, frames: np.ndarray) -> None:
        self.at_block.get(len(self.frames), lambda: None)()
        self.frames.append(frames)

    def write_audio(self, samples: np.ndarray) -> None:
        self.sound.append(samples)

    @property
    def video(self) -> np.ndarray:
        return np.concatenate(self.frames)


def pieces(length: int = 8192, seconds: float = SECONDS) -> list[tuple[np.ndarray, int]]:
    return [(piece.numpy(), RATE) for piece in sound(seconds).split(length, dim=1)]


def nobody_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("joyavatar")]


@pytest.fixture(scope="module")
def serial() -> Kept:
    kept = Kept()
    generate(make_stream(), pieces(), lambda _: kept)
    return kept


@pytest.mark.parametrize("overlap", WAYS[1:], ids=str)
@pytest.mark.parametrize("length", [1500, 60_000])
def test_the_same_frames_in_the_same_order(serial: Kept, overlap: Overlap, length: int) -> None:
    kept, told = Kept(), []

    def tell(progress: Progress) -> None:
        told.append((progress.blocks, progress.frames))

    progress = generate(make_stream(), iter(pieces(length)), lambda _: kept, None, tell, overlap)
    assert np.array_equal(kept.video, serial.video) and [len(f) for f in kept.frames] == [len(f) for f in serial.frames]
    assert np.array_equal(np.concatenate(kept.sound, 1), np.concatenate(serial.sound, 1))
    assert [b for b, _ in told] == list(range(1, 9)), "every block is told of once, in order"
    assert told[-1][1] == progress.frames == round(SECONDS * 16) and progress.blocks_total == 8
    assert nobody_left()


@pytest.mark.parametrize("overlap", WAYS, ids=str)
@pytest.mark.parametrize("block", [1, 4, 7])
def test_stopped_at_a_block_and_resumed(
    serial: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: Overlap, block: int
) -> None:
    """The state on disk is that of the serial path, and the file is never behind it."""
    monkeypatch.setattr(_Saver, "SHARE", 0.0)
    path, kept, rest = tmp_path / "s.safetensors", Kept(), Kept()
    with pytest.raises(StopError):
        generate(make_stream(), pieces(), lambda _: kept, Resume(path, every=1), stop_at(block), overlap)
    assert len(kept.frames) == block and nobody_left()
    reference = tmp_path / "r.safetensors"
    with pytest.raises(StopError):
        generate(make_stream(), pieces(), lambda _: Kept(), Resume(reference, every=1), stop_at(block))
    mine, theirs = checkpoint.read(path), checkpoint.read(reference)
    assert mine[1] == theirs[1] and mine[0].keys() == theirs[0].keys()
    assert all(torch.equal(mine[0][k], theirs[0][k]) for k in mine[0])
    starts: list[int] = []

    def open_rest(frames_done: int) -> Kept:
        starts.append(frames_done)
        return rest

    generate(make_stream(), pieces(), open_rest, Resume(path, go_on=True), None, overlap)
    assert starts == [len(kept.video)] and np.array_equal(np.concatenate([kept.video, rest.video]), serial.video)


def stop_at(block: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.blocks == block:
            raise StopError

    return stop


def failing_sound() -> Iterator[tuple[np.ndarray, int]]:
    yield from itertools.islice(pieces(), 12)
    raise OSError("the sound broke off")


def fails(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("overlap", WAYS, ids=str)
def test_an_error_of_any_stage_is_the_error_of_the_run(serial: Kept, overlap: Overlap) -> None:
    """Sound, rollout, sink and caller: the caller gets the error itself, the sink has the first blocks."""

    def run(kept: Kept, given: object = None, stop: Callable[[Progress], None] | None = None, after: int = 0) -> None:
        stream, count = make_stream(), itertools.count(1)
        if after:
            cancel = fails(KeyboardInterrupt())
            object.__setattr__(
                stream.latents.rollout, "before_forward", lambda: cancel() if next(count) == after else None
            )
        generate(stream, given or pieces(), lambda _: kept, None, stop, overlap)  # pyright: ignore

    full = OSError(errno.ENOSPC, "No space left on device")
    cases = [
        (OSError, {"given": failing_sound()}, Kept()),
        (ValueError, {"given": [(np.zeros((1, 0), np.float32), RATE)]}, Kept()),
        (KeyboardInterrupt, {"after": 12}, Kept()),
        (StopError, {"stop": stop_at(3)}, Kept()),
        (OSError, {}, Kept({2: fails(full)})),
    ]
    for kind, options, kept in cases:
        with pytest.raises(kind):
            run(kept, **options)
        done = kept.video if kept.frames else serial.video[:0]
        assert np.array_equal(done, serial.video[: len(done)]), "no block is missing between others"
        assert nobody_left()
    assert len(cases[-1][2].frames) == 2 and len(cases[3][2].frames) >= 3


def test_what_waits_is_bounded() -> None:
    """While the sink stands still the rollout stops, and the sound is not read to its end."""
    hold, entered, taken, windows = threading.Event(), threading.Event(), [], []

    def stand_still() -> None:
        entered.set()
        assert hold.wait(60)

    def given() -> Iterator[tuple[np.ndarray, int]]:
        for piece in pieces(2000, 20.0):
            taken.append(piece)
            yield piece

    stream, kept = make_stream(), Kept({2: stand_still})
    object.__setattr__(stream.latents.rollout, "before_forward", lambda: windows.append(stream.state.rollout.window))
    thread = threading.Thread(target=generate, args=(stream, given(), lambda _: kept, None, None, BOTH))
    thread.start()
    assert entered.wait(60)
    seen = (-1, -1)
    while seen != (seen := (len(taken), len(windows))):
        time.sleep(0.3)
    # block 2 is being written and block 3 made: it came out of the window that block 6 entered
    assert max(windows) <= 2 + BOTH.most - 1 + 3
    heard = 2000 * len(taken) / RATE
    assert heard < (max(windows) + 1 + BOTH.most + 1) * 0.75 + 0.5
    hold.set()
    thread.join(60)
    assert len(kept.video) == 320 and nobody_left()


def test_a_full_disk_ends_the_run_and_leaves_a_file_that_plays(
    serial: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = writer._write_at, itertools.count()

    def full(file: object, offset: int, data: bytes) -> None:
        if next(count) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, offset, data)  # pyright: ignore

    monkeypatch.setattr(writer, "_write_at", full)
    with pytest.raises(MediaError, match="make room"), opened(tmp_path / "a.mp4") as sink:
        generate(make_stream(), pieces(), lambda _: sink, None, None, BOTH)
    assert nobody_left() and [p.name for p in tmp_path.iterdir()] == ["a.part.mp4"]
    assert len(frames_of(tmp_path / "a.part.mp4")) == 9 + 12 + 12


def opened(path: Path) -> VideoWriter:
    return VideoWriter(
        path, 32, 32, source_fps=Fraction(16), audio_rate=RATE, audio_channels=2, settings={}, first_segment_frames=9
    )


def test_the_same_file(tmp_path: Path) -> None:
    for name, overlap in (("a.mp4", Overlap()), ("b.mp4", BOTH)):
        with opened(tmp_path / name) as sink:
            generate(make_stream(), pieces(), lambda _, sink=sink: sink, None, None, overlap)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_second_ctrl_c_does_not_leave_the_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the blocks that are made are still being written."""
    kept = Kept({0: lambda: time.sleep(0.05)})
    sink = SinkBehind(kept, most=3)
    shutdown, count = sink._worker._pool.shutdown, itertools.count()

    def impatient(wait: bool, cancel_futures: bool) -> None:
        if next(count) == 0:
            raise KeyboardInterrupt
        shutdown(wait=wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(sink._worker._pool, "shutdown", impatient)
    with pytest.raises(KeyboardInterrupt), sink:
        for i in range(2):
            sink.write(i, lambda: np.zeros((1, 2, 2, 3), np.uint8))
        raise KeyboardInterrupt
    assert len(kept.frames) == 2 and nobody_left()


def test_a_worker_does_nothing_after_a_failure() -> None:
    worker, done = Worker("test"), []
    worker.do(fails(StopError()))
    after = worker.do(lambda: done.append(1))
    with pytest.raises(StopError):
        after.result()
    worker.close()
    assert not done and nobody_left()


def test_a_generator_that_is_left_early_ends_its_thread() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            yield i

    items = ahead(numbers(), 2, lambda i: i % 10 == 9, contextlib.nullcontext)
    assert list(itertools.islice(items, 25)) == list(range(25))
    items.close()
    assert nobody_left() and len(made) <= 50


def test_who_overlaps_what() -> None:
    assert Overlap.suited(torch.device("cpu")) == Overlap() and Overlap.suited(torch.device("cuda")) == BOTH
    assert type(lane_of(BOTH, torch.device("cpu"))) is Lane
    with pytest.raises(ValueError, match="most 0 must be at least 1"):
        Overlap(most=0)


def test_overlap_on_the_command_line(picture: Path, tmp_path: Path) -> None:  # noqa: F811
    voice = write_sound(tmp_path / "s.wav", 1.6)
    for way in ("on", "off"):
        assert main(words(picture, voice, tmp_path / f"{way}.mp4", "--overlap", way, "--checkpoint-blocks", "1")) == 0
    assert (tmp_path / "on.mp4").read_bytes() == (tmp_path / "off.mp4").read_bytes() and nobody_left()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_of_its_own_gives_the_same_frames() -> None:
    """The embedded model: its frames are made on a CUDA stream beside the rollout."""
    from joyavatar_core.avatar import load_embedded
    from joyavatar_core.policy import RolloutPolicy

    avatar = load_embedded("cuda")
    shown = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    videos = []
    for overlap in (Overlap(), BOTH, BOTH):
        kept = Kept()
        generate(avatar.stream(shown, RolloutPolicy(), 0), pieces(), lambda _, k=kept: k, None, None, overlap)
        videos.append(kept.video)
    assert np.array_equal(videos[0], videos[1]) and np.array_equal(videos[0], videos[2])
