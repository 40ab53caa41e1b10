"""One run from picture and sound to a file that grows: stream, writer, saved states, cancel and resume.

The command line and the nodes both call `generate`; it knows neither.

Shape legend: T pixel frames, H W pixels, m sound samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import CheckpointError
from .overlap import Lane, Overlap, Shown, ahead, hearing_context, lane_of
from .sinks import BlockSink, FrameSink, Written, block_sink
from .stream import AvatarStream, Ear, Heard, LatentBlock, StreamState, checksum
from .types import StreamTensors

logger = logging.getLogger(__name__)

Chunks = Iterable[tuple[np.ndarray, int]]
"""Sound in pieces: float32 [channels, m] in [-1, 1] and its sample rate."""


@dataclass
class Progress:
    """Figures of what is in the sink so far. blocks_total is None while live sound has not ended.

    moment: when the newest block was written (time.perf_counter).
    """

    blocks: int = 0
    frames: int = 0
    blocks_total: int | None = None
    started: float = field(default_factory=time.perf_counter)
    first_frame_s: float | None = None
    moment: float = 0.0

    def add(self, block: Written) -> None:
        """Another block is written."""
        if self.first_frame_s is None:
            self.first_frame_s = block.shown - self.started
        self.blocks, self.moment = block.index + 1, block.moment
        self.frames += block.frames

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def fps(self) -> float:
        return self.frames / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Resume:
    """Where a run keeps its state.

    path: file of the saved StreamState; it lives as long as the unfinished video it belongs to.
    every: blocks between two saves, 0 for none; fewer are made where saving would take more than a twentieth of the
    time. go_on: whether to start from the file. shelf: where states are kept for retakes.
    """

    path: Path
    every: int = 8
    go_on: bool = False
    shelf: StateShelf | None = None


@dataclass
class StateShelf:
    """States kept at regular blocks, so that a part of a finished video can be made again.

    folder: of the files, made when there is one. every: blocks between two of them; it doubles, and every other file
    goes, when there are more than `most`. Files of an earlier run are replaced or, where they do not fit, refused when
    they are loaded.
    """

    folder: Path
    every: int
    most: int = 32

    def kept(self) -> dict[int, Path]:
        """Finished blocks of each state -> its file, in order."""
        found = {int(p.stem.removeprefix("block_")): p for p in self.folder.glob("block_*.safetensors")}
        return dict(sorted(found.items()))

    def before(self, blocks: int) -> Path | None:
        """The latest state with at most so many finished blocks."""
        return next((path for done, path in reversed(self.kept().items()) if done <= blocks), None)

    def clear(self) -> None:
        """Forget all of it."""
        for path in self.kept().values():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def takes(self, blocks: int) -> bool:
        """Whether the state after so many blocks is kept."""
        return bool(self.every) and blocks % self.every == 0

    def keep(self, state: StreamState, blocks: int) -> None:
        """After a block: save the state if its turn has come. Raises OSError where it cannot be written."""
        if not self.takes(blocks):
            return
        state.save(self.folder / f"block_{blocks:07d}.safetensors")
        kept = self.kept()
        if len(kept) > self.most:
            self.every *= 2
            for done, path in kept.items():
                if done % self.every:
                    path.unlink()


def generate(
    stream: AvatarStream,
    sound: Chunks,
    open_sink: Callable[[int], FrameSink],
    resume: Resume | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    overlap: Overlap | None = None,
) -> Progress:
    """Run a stream over a sound, writing frames as they come.

    Args:
        sound: its pieces may have any length. To resume it is read twice: not an iterator then.
        open_sink: from the number of pixel frames written in an earlier run (0: none) to the sink.
        resume: where the state is saved, and whether to go on from it.
        on_progress: called after every block that is written; may raise to stop (the frames so far are in the sink).
        overlap: which stages work beside the rollout (none). Frames and saved states are the same.

    Raises ValueError if the sound is empty.
    """
    overlap = overlap or Overlap()
    frames_done = _load(stream, resume, sound)
    latents, lane = stream.latents, lane_of(overlap, stream.latents.rollout.device)
    saver = _Saver(stream, resume) if resume else None
    progress = Progress(blocks=latents.blocks_done)
    sink, skip = block_sink(open_sink(frames_done), overlap), stream.state.track.source_samples

    def tell() -> None:
        for block in sink.written():
            progress.add(block)
            if on_progress:
                on_progress(progress)

    try:
        with sink, hearing(latents.ear(overlap.hear), sound, overlap, latents.rollout.device, skip) as heard:
            for now in heard:
                if not isinstance(now, Heard):
                    sink.write_audio(now)
                    continue
                for block in latents.follow([now]):
                    sink.write(block.index, frames_of(stream.decode, stream.frames.state, block, lane))
                    progress.blocks_total = latents.blocks_total
                    if saver:
                        saver.after_block(block.index + 1, progress.blocks_total, sink)
                    tell()
        tell()
    finally:
        for block in sink.written():  # of a run that was stopped: the figures are those of the file
            progress.add(block)
    return progress


class _Saver:
    """Saves the state of a stream between blocks; a disk too full for it is no reason to end the run."""

    SHARE = 20.0  # time between two saves, in times of what a save takes

    def __init__(self, stream: AvatarStream, resume: Resume) -> None:
        self.stream, self.resume = stream, resume
        self.every, self.not_before, self.shelf = resume.every, 0.0, resume.shelf
        self.stale = not resume.go_on  # a state of an earlier run may lie at the path

    def after_block(self, blocks: int, total: int | None, sink: BlockSink) -> None:
        """Call when a block was given to the sink, which is waited for before a state says that it is there.

        The last block has no state: it is not in the file before the end.
        """
        if self.stale:
            sink.drain()
            self.resume.path.unlink(missing_ok=True)
            self.stale = False
        if total is not None and blocks >= total:
            return
        if self.shelf and self.shelf.takes(blocks):
            sink.drain()
            self._keep(blocks)
        if not self.every or blocks % self.every or time.perf_counter() < self.not_before:
            return
        sink.drain()
        start = time.perf_counter()
        try:
            self.stream.state.save(self.resume.path)
        except OSError as error:
            logger.warning("no state is saved from now on, the run cannot be resumed: %s", error)
            self.every = 0
        now = time.perf_counter()
        self.not_before = now + self.SHARE * (now - start)

    def _keep(self, blocks: int) -> None:
        assert self.shelf
        try:
            self.shelf.keep(self.stream.state, blocks)
        except OSError as error:
            logger.warning("no states are kept from now on, later parts cannot be retaken: %s", error)
            self.shelf = None


def to_uint8(frames: Tensor) -> np.ndarray:
    """[1, 3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return _pixels(frames).cpu().numpy()


def _pixels(frames: Tensor) -> Tensor:
    """The same where the frames are."""
    pixels = frames[0].float().mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8)  # cut off: halves go up
    return pixels.permute(1, 2, 3, 0).contiguous()


def from_uint8(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def frames_of(
    decode: Callable[[LatentBlock], Tensor], held: StreamTensors | None, block: LatentBlock, lane: Lane
) -> Shown:
    """Frames of a block on their way to the host. held: what the decoder remembers."""
    with lane.after(block.latents, *(held or {}).values()):
        return lane.to_host(_pixels(decode(block)))


def hearing(
    ear: Ear, sound: Chunks, overlap: Overlap, device: torch.device, skip: int = 0
) -> AbstractContextManager[Iterator[np.ndarray | Heard]]:
    """Pieces of sound for the sink, and what an ear hears of them, while the context lasts.

    With overlap.hear the ear must have a track of its own. skip: samples heard before a resume.
    """
    heard = _heard(ear, sound, skip)
    if not overlap.hear:
        return nullcontext(heard)
    return closing(ahead(_apart(heard), overlap.most, _is_tokens, hearing_context(device)))


def _heard(ear: Ear, sound: Chunks, skip: int) -> Iterator[np.ndarray | Heard]:
    """The whole sound; the first `skip` samples, heard before a resume, only reach the sink."""
    for samples, rate in sound:
        yield samples
        fresh = samples[:, min(skip, samples.shape[1]) :]
        skip -= samples.shape[1] - fresh.shape[1]
        if fresh.shape[1]:
            yield from ear.feed(torch.from_numpy(fresh), rate)
    if skip:
        raise ValueError("the sound ended before the place to resume from")
    yield from ear.finish()


def _apart(heard: Iterator[np.ndarray | Heard]) -> Iterator[np.ndarray | Heard]:
    """What a rollout needs that lags behind: blocks, and the end, each with the track as it was then."""
    for now in heard:
        if not isinstance(now, Heard):
            yield now
        elif now.tokens is not None or now.track.finished:
            yield Ear.apart(now)


def _is_tokens(item: Any) -> bool:
    return isinstance(item, Heard) and item.tokens is not None


def _load(stream: AvatarStream, resume: Resume | None, sound: Chunks) -> int:
    """Take up a saved state; returns the pixel frames that were written before it.

    Raises CheckpointError if there is no such state, or it belongs to other settings or another sound.
    """
    if not resume or not resume.go_on:
        return 0
    if not resume.path.is_file():
        raise CheckpointError(f"nothing to resume: {resume.path} does not exist; start without resuming")
    if iter(sound) is sound:
        raise ValueError("an iterator of sound cannot be resumed: it can be read only once")
    stream.load_state(resume.path)
    if _checksum(sound, stream.state.track.source_samples) != stream.state.heard:
        raise CheckpointError("the sound is not that of the run to resume: give the same file, or do not resume")
    done = stream.latents.blocks_done
    logger.info("resuming after block %d", done)
    return stream.latents.rollout.geometry.frames_of_block(done).start


def _checksum(sound: Chunks, samples: int) -> int:
    """Checksum of the first samples of a sound."""
    heard = 0
    for piece, _ in sound:
        heard = checksum(torch.from_numpy(piece[:, :samples]), heard)
        samples -= min(samples, piece.shape[1])
        if not samples:
            break
    return heard
