"""Several avatars at a time: pictures of one size, each with its sound, seed and file, through one rollout.

Weights are read once for all of them, and the products are larger; keys and values are each avatar's own. All enter a
window together; what comes out clean is decoded avatar by avatar. Whose sound ends first leaves with its last blocks,
which it finishes by itself as it would have alone, while the others go on. So every file is what a run of its own would
have made, but for the rounding of larger products.

Shape legend: B avatars, C latent channels, n latents of a block, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from .audio import AudioFrontEnd, AudioTokens, AudioTrack
from .generate import Chunks, Progress, frames_of, hearing
from .overlap import Lane, Overlap, lane_of
from .rollout import Rollout, RolloutState
from .sinks import FrameSink, block_sink
from .stream import Ear, FrameStream, Heard, LatentBlock
from .types import VideoAutoencoder


@dataclass(frozen=True)
class Speaker:
    """One of the avatars.

    rollout: what it would be made by alone. sink: where its frames and sound go. seconds: of the sound, as far as it
    is known beforehand: it decides who stands beside whom, not what comes out.
    """

    rollout: Rollout
    front_end: AudioFrontEnd
    decoder: VideoAutoencoder
    sound: Chunks
    sink: FrameSink
    seconds: float = 0.0


def generate_together(
    speakers: Sequence[Speaker],
    on_progress: Callable[[int, Progress], None] | None = None,
    overlap: Overlap | None = None,
) -> list[Progress]:
    """Run all of them, writing frames as they come; returns their figures, in their order.

    on_progress: called after every block that is written, with the avatar's place among `speakers`; may raise to stop.
    overlap: as in `generate`. No states are saved.

    Raises ValueError for avatars that cannot stand side by side (see Rollout.together), and for an empty sound.
    """
    overlap = overlap or Overlap()
    runs = [_Run(i, speaker, on_progress) for i, speaker in enumerate(speakers)]
    lined_up = sorted(runs, key=lambda run: -run.speaker.seconds)  # so that those who leave stand at the end
    rollout = Rollout.together([run.speaker.rollout for run in lined_up])
    lane = lane_of(overlap, rollout.device)
    with ExitStack() as stack:
        for run in runs:
            run.open(stack, overlap)
        groups = [_Group(rollout, rollout.start(), lined_up)]
        while groups:
            groups = [left for group in groups for left in group.advance(lane)]
        for run in runs:
            run.sink.drain()
            run.tell()
    return [run.progress for run in runs]


class _Run:
    """One avatar while it is made: what it has heard, its decoder, its file."""

    def __init__(self, place: int, speaker: Speaker, on_progress: Callable[[int, Progress], None] | None) -> None:
        self.place, self.speaker, self.on_progress = place, speaker, on_progress
        self.geometry = speaker.rollout.geometry
        self.frames = FrameStream.of(speaker.rollout, speaker.decoder)
        self.tokens: dict[int, AudioTokens] = {}
        self.frames_total: int | None = None
        self.progress = Progress()

    def open(self, stack: ExitStack, overlap: Overlap) -> None:
        """Begin to hear and to write, until the stack is closed."""
        speaker = self.speaker
        ear = Ear(speaker.front_end, self.geometry, AudioTrack(), 0, 0)
        stack.callback(self._count)
        self.sink = stack.enter_context(block_sink(speaker.sink, overlap))
        device = speaker.rollout.device
        self.heard: Iterator[np.ndarray | Heard] = stack.enter_context(hearing(ear, speaker.sound, overlap, device))

    def listen(self, window: int) -> None:
        """Hear on until the block that enters the window is heard, or it is known that none does."""
        while window not in self.tokens and not self.ends_before(window):
            now = next(self.heard)
            if not isinstance(now, Heard):
                self.sink.write_audio(now)
                continue
            if now.tokens is not None:
                self.tokens[now.block] = now.tokens
            if now.track.finished:
                self.frames_total = self.geometry.frames_of_duration(now.track.duration)
                self.progress.blocks_total = self.geometry.blocks_of_frames(self.frames_total)

    def ends_before(self, window: int) -> bool:
        """Whether no block of this avatar enters the window."""
        total = self.progress.blocks_total
        return total is not None and total <= window

    def write(self, block: LatentBlock, lane: Lane) -> None:
        """Decode a clean block of this avatar, and give it to the sink."""
        self.sink.write(block.index, frames_of(self.frames.decode, self.frames.state, block, lane))
        self.tell()

    def shown(self, block: int) -> int:
        """Pixel frames of a block that are shown."""
        frames = self.geometry.frames_of_block(block)
        return len(frames) if self.frames_total is None else min(len(frames), self.frames_total - frames.start)

    def tell(self) -> None:
        """Of all blocks that have come into the file."""
        for block in self.sink.written():
            self.progress.add(block)
            if self.on_progress:
                self.on_progress(self.place, self.progress)

    def _count(self) -> None:
        """Of a run that was stopped: the figures are those of the file."""
        for block in self.sink.written():
            self.progress.add(block)


@dataclass
class _Group:
    """Avatars in step: B of them, in the order of the batch."""

    rollout: Rollout
    state: RolloutState
    runs: list[_Run]

    def advance(self, lane: Lane) -> list[_Group]:
        """The next window. Returns who goes on: this group, its parts where some have come to their end, or none."""
        window = self.state.window
        for run in self.runs:
            run.listen(window)
        parts = self._parts(window)
        if len(parts) > 1:
            return [left for part in parts for left in part.advance(lane)]
        end = self._end(self.runs[0], window)
        if end is not None and window >= self.rollout.policy.num_windows(end):
            return []
        if end is None:
            self.state.audio[window] = AudioTokens.stack([run.tokens.pop(window) for run in self.runs])
        with torch.inference_mode():
            finished = self.rollout.run_window(self.state, end)
        for clean in finished:
            for run, latents in zip(self.runs, clean.latents.split(1), strict=True):
                run.write(LatentBlock(clean.index, latents, run.shown(clean.index)), lane)
        return [self]

    def _parts(self, window: int) -> list[_Group]:
        """Neighbours with the same number of blocks in the window."""
        parts, start = [], 0
        for _, same in groupby(self.runs, lambda run: self._end(run, window)):
            items = slice(start, start + len(list(same)))
            start = items.stop
            parts.append(items)
        if len(parts) == 1:
            return [self]
        return [_Group(self.rollout.part(items), self.state.part(items), self.runs[items]) for items in parts]

    @staticmethod
    def _end(run: _Run, window: int) -> int | None:
        """Blocks of the clip, once it has none left to enter."""
        return run.progress.blocks_total if run.ends_before(window) else None
