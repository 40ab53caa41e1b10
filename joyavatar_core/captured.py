"""A forward of the transformer that is played again instead of being launched anew: one captured CUDA graph a shape.

In steady state every forward has the same shapes and the same places: keys and values of the conditions and of the
ring lie where they lay. What differs is copied into buffers before the graph is played: latents, timesteps, the table
of positions, the audio of the window. On a CPU the same buffers are filled and the forward is run on them as it is, so
that what a graph needs is proved without one.

Shape legend: x [B, C, F, h, w] a window of latents, timesteps [F], table [P + L, head_dim / 2] complex.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import EVERY, KV, Excerpt, KVCache
from .model import AudioKV, ConditionKV, Context, JoyAvatarDiT, Past, Table, WithReference

_LOG = logging.getLogger(__name__)

Made = tuple[Tensor, list[KV]]
"""Velocity, and keys and values per layer: what a forward gives."""
SIGHTINGS = 2
"""Forwards of a shape that are run as they are before it is captured: ramp-up and tail have shapes that come once, or
twice with a sub-step, and would pay for a capture that is never played."""


class Recording(Protocol):
    """A forward over buffers that stay where they are; what it gives stays there too, until it is played again."""

    def play(self) -> Made: ...


class Graph:
    """A recording on CUDA. pool: memory that all graphs of a stream share, since they are played one after another."""

    def __init__(self, call: Callable[[], Made], device: torch.device, pool: Any) -> None:
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # libraries make their workspaces at the first call, which cannot be captured
            call()
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # threads that hear and write beside the rollout may use the device meanwhile: what they do is not captured
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.made = call()

    def play(self) -> Made:
        """See Recording."""
        self.graph.replay()
        return self.made


class Rerun:
    """The same where there are no graphs: the forward is run over the buffers, its results copied to their places."""

    def __init__(self, call: Callable[[], Made]) -> None:
        self.call, self.made = call, call()

    def play(self) -> Made:
        """See Recording."""
        for place, new in zip(_tensors(self.made), _tensors(self.call()), strict=True):
            place.copy_(new)
        return self.made


@dataclass
class Buffers:
    """What changes from forward to forward, at places that do not. window: rows of the table that are the window's."""

    x: Tensor
    timesteps: Tensor
    table: Tensor
    audio: AudioKV | None
    window: int

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        heard = [] if self.audio is None else [t for layer in self.audio.layers for t in layer]
        valid = [] if self.audio is None or self.audio.valid is None else [self.audio.valid]
        return [self.x, self.timesteps, self.table, *heard, *valid]

    def placed(self) -> Buffers:
        """Places for the same."""
        audio = self.audio
        if audio is not None:
            valid = None if audio.valid is None else audio.valid.clone()
            audio = AudioKV(tuple(tuple(t.clone() for t in layer) for layer in audio.layers), valid)
        return Buffers(self.x.clone(), self.timesteps.clone(), self.table.clone(), audio, self.window)

    def fill(self, given: Buffers) -> None:
        """Bring other values to the places."""
        for place, new in zip(self.tensors(), given.tensors(), strict=True):
            place.copy_(new, non_blocking=True)


@dataclass
class Captured:
    """The recordings of one stream: of a state, whose keys and values they read where they lie, and go with it.

    seen: how often forwards of a key came. recordings: key -> buffers and what plays over them; constants are held, so
    that nothing else comes to lie at their places.
    """

    seen: Counter[Hashable] = field(default_factory=Counter)
    recordings: dict[Hashable, tuple[Buffers, Recording, object]] = field(default_factory=dict)
    pool: Any = None

    def __call__(
        self,
        model: JoyAvatarDiT,
        x: Tensor,
        timesteps: Tensor,
        positions: range,
        condition: ConditionKV,
        audio: AudioKV | None,
        past: Past | None,
        kept: slice = EVERY,
    ) -> Made:
        """As the model's forward. What comes back is good until the next forward of the same shape and past."""
        table = model.table(tuple(positions), past, (x.shape[3], x.shape[4]), x.device)
        given = Buffers(x, timesteps, table.all, audio, len(table.window))
        constants = [*_constants(condition), *_read(past and past.context)]
        key = (
            *((t.shape, t.dtype) for t in given.tensors()),
            *((t.shape, t.data_ptr()) for t in constants),
            audio is None or audio.valid is None,
            (kept.start, kept.stop),
        )
        self.seen[key] += 1
        if self.seen[key] <= SIGHTINGS:
            return model.denoise(x, timesteps, table, condition, audio, past and past.context, kept=kept)
        if key not in self.recordings:
            self.recordings[key] = self._record(model, given, condition, past, kept, constants)
        buffers, recording, _ = self.recordings[key]
        buffers.fill(given)
        return recording.play()

    def _record(
        self,
        model: JoyAvatarDiT,
        given: Buffers,
        condition: ConditionKV,
        past: Past | None,
        kept: slice,
        constants: list[Tensor],
    ) -> tuple[Buffers, Recording, object]:
        start, places = time.perf_counter(), given.placed()
        context = past and past.context
        table = Table(places.table[len(places.table) - places.window :], places.table)

        def call() -> Made:
            return model.denoise(places.x, places.timesteps, table, condition, places.audio, context, kept=kept)

        device = places.x.device
        if device.type == "cuda":
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            recording: Recording = Graph(call, device, self.pool)
        else:
            recording = Rerun(call)
        seen = len(places.table) - places.window
        _LOG.info(
            "captured a forward of %d tokens beside %d in %.2f s", places.window, seen, time.perf_counter() - start
        )
        return places, recording, (constants, context, condition)


def _constants(condition: ConditionKV) -> Iterator[Tensor]:
    for part in (condition.text, condition.image, condition.face):
        if part:
            yield from part[0]


def _read(context: Context | None) -> Iterator[Tensor]:
    """Where a context lies, as far as it is read. ValueError for one of another kind, which may move."""
    if isinstance(context, WithReference):
        yield from context.reference
        yield from _read(context.before)
    elif isinstance(context, Excerpt):
        yield from (t[:, :, p.start : p.stop] for p in context.pieces for t in context.cache.tensors().values())
    elif isinstance(context, KVCache):
        used = len(context.blocks) * context.block_tokens
        yield from (t[:, :, :used] for t in context.tensors().values())
    elif context is not None:
        raise ValueError(f"a context of kind {type(context).__name__} cannot be captured: run with capture off")


def _tensors(made: Made) -> list[Tensor]:
    return [made[0], *(t for pair in made[1] for t in pair)]
