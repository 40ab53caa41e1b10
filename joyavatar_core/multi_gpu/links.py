"""Latents on their way from one rank to another, in order, one tensor a block.

They travel by way of the host (gloo), also between GPUs: a block of Live Avatar is 0.8 MB, a millisecond against the
hundreds of a forward; no kernel spins on a GPU for a neighbour that is late, and a lost rank is an error at once.

Shape legend: B batch, C latent channels, n latents of a block, h w latent size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .members import Member, reaching

BLOCKS, REFERENCE = 0, 1
"""Tags: clean or noisy blocks, and the latent that the reference is made again of."""


@dataclass(frozen=True)
class Outlet:
    """To one other rank. most: tensors on their way at a time; a sender that is further ahead waits."""

    member: Member
    to: int
    tag: int = BLOCKS
    most: int = 2
    _sent: deque[tuple[Any, Tensor]] = field(default_factory=deque)

    def send(self, latents: Tensor) -> None:
        """Hand over [B, C, n, h, w]; returns at once unless `most` are on their way."""
        self.settle(self.most - 1)
        kept = latents.detach().to("cpu", copy=True).contiguous()
        with reaching(f"{self.member.name}, to rank {self.to}"):
            self._sent.append((dist.isend(kept, self.to, tag=self.tag), kept))

    def settle(self, left: int = 0) -> None:
        """Wait until no more than so many are on their way."""
        while len(self._sent) > left:
            work, _ = self._sent.popleft()
            with reaching(f"{self.member.name}, to rank {self.to}"):
                work.wait(timedelta(seconds=self.member.patience))


@dataclass(frozen=True)
class Inlet:
    """From one other rank: tensors of one shape and type."""

    member: Member
    source: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    tag: int = BLOCKS

    def receive(self) -> Tensor:
        """The next tensor, on the CPU. RankLostError when the other is gone, or silent for longer than patience."""
        latents = torch.empty(self.shape, dtype=self.dtype)
        with reaching(f"{self.member.name}, from rank {self.source}"):
            work = dist.irecv(latents, self.source, tag=self.tag)
            assert work is not None
            work.wait(timedelta(seconds=self.member.patience))
        return latents
