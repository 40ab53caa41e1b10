"""The K/V cache of a rollout: preallocated, fixed size, sink plus a ring of local blocks, keys before RoPE.

Two verbs: denoising reads (`context`), finishing a block writes (`commit`). Softmax does not know order, so the ring
is never shifted; order lives in the indices the policy assigns to each slot (URCR, JoyAvatar-Flash 3.5).

Shape legend: B batch, S tokens of a block, heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import StreamTensors

KV = tuple[Tensor, Tensor]
"""Keys (before RoPE) and values of one layer, each [B, L, heads, D]."""
EVERY = slice(None)


def kept_of(x: Tensor, tokens: slice) -> Tensor:
    """Some tokens of [B, L, heads, D], as a copy: a view would keep all of them alive."""
    return x if tokens == EVERY else x[:, tokens].clone()


class KVCache:
    """Keys and values of the finished blocks that later blocks may see.

    Args:
        layers, batch, block_tokens, heads, head_dim: sizes of what a block leaves behind.
        sink_blocks: first blocks, kept for ever.
        local_blocks: newest blocks, kept in a ring.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        block_tokens: int,
        heads: int,
        head_dim: int,
        sink_blocks: int,
        local_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sink_blocks, self.local_blocks = sink_blocks, local_blocks
        self.block_tokens = block_tokens
        self.committed = 0
        shape = (layers, batch, (sink_blocks + local_blocks) * block_tokens, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Block held by each valid slot, in the order of `context`."""
        sink = range(min(self.committed, self.sink_blocks))
        newest = range(max(self.sink_blocks, self.committed - self.local_blocks), self.committed)
        return (*sink, *sorted(newest, key=self._slot))

    def context(self, layer: int) -> KV:
        """Keys (before RoPE) and values of all valid slots, [B, len(blocks) * S, heads, D]; views, not copies."""
        used = len(self.blocks) * self.block_tokens
        return self.keys[layer, :, :used], self.values[layer, :, :used]

    def commit(self, block: int, kv: Sequence[KV]) -> None:
        """Store the keys (before RoPE) and values of a finished block, per layer [B, S, heads, D]."""
        if block != self.committed:
            raise ValueError(f"block {block} committed out of order: block {self.committed} is next")
        self.committed += 1
        if block >= self.sink_blocks and not self.local_blocks:
            return
        start = self._slot(block) * self.block_tokens
        for layer, (k, v) in enumerate(kv):
            assert k.shape[1] == self.block_tokens, k.shape
            self._store(layer, slice(start, start + self.block_tokens), k.detach(), v.detach())

    def _store(self, layer: int, tokens: slice, keys: Tensor, values: Tensor) -> None:
        self.keys[layer, :, tokens] = keys
        self.values[layer, :, tokens] = values

    def part(self, items: slice) -> KVCache:
        """Of some items of the batch: a view of the same memory, with a count of its own."""
        part = copy(self)
        part.keys, part.values = self.keys[:, items], self.values[:, items]
        return part

    def tensors(self) -> StreamTensors:
        """All that must be saved; `committed` is known to the rollout."""
        return {"keys": self.keys, "values": self.values}

    def restore(self, tensors: StreamTensors, committed: int) -> None:
        """Take over saved contents; shapes must agree."""
        for name, mine in self.tensors().items():
            if tensors[name].shape != mine.shape:
                raise ValueError(f"saved cache {tuple(tensors[name].shape)} does not fit {tuple(mine.shape)}")
            mine.copy_(tensors[name])
        self.committed = committed

    def _slot(self, block: int) -> int:
        if block < self.sink_blocks:
            return block
        return self.sink_blocks + (block - self.sink_blocks) % self.local_blocks


@dataclass(frozen=True)
class Excerpt:
    """Some of the tokens of a cache: those in `pieces`, which follow each other in the order of its `context`."""

    cache: KVCache
    pieces: tuple[range, ...]

    @staticmethod
    def of(cache: KVCache, skipped: Mapping[int, int]) -> Excerpt:
        """The blocks in `skipped`, each without so many of its first tokens."""
        pieces: list[range] = []
        for slot, block in enumerate(cache.blocks):
            if block not in skipped:
                continue
            start, stop = slot * cache.block_tokens + skipped[block], (slot + 1) * cache.block_tokens
            if pieces and pieces[-1].stop == start:
                start = pieces.pop().start
            pieces.append(range(start, stop))
        return Excerpt(cache, tuple(pieces))

    def context(self, layer: int) -> KV:
        """As KVCache.context; views where it is one piece, else copies."""
        keys, values = self.cache.context(layer)
        return self._cut(keys), self._cut(values)

    def _cut(self, tokens: Tensor) -> Tensor:
        parts = [tokens[:, piece.start : piece.stop] for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
