"""Noise as a function of (seed, block, forward), whatever the chunking of the audio, a resume, or the device.

Shape legend: any shape the caller gives; always drawn on the CPU in float32.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Purpose = Literal["latents", "motion", "reference", "manner"]


def gaussian(seed: int, block: int, forward: int, shape: Sequence[int], purpose: Purpose = "latents") -> Tensor:
    """Standard normal float32 noise.

    Args:
        seed: of the stream, 0 <= seed < 2**64.
        block: block the noise belongs to.
        forward: how many denoising steps that block had before.
        purpose: "latents" for a block's own noise, "motion" for the motion frame before it, "manner" for what a person
            does that no sound tells (there block and forward are places of its own).
    """
    generator = torch.Generator().manual_seed(_number(seed, block, forward, purpose) >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


class Draw(NamedTuple):
    """Noise that is wanted: arguments of `gaussian`. seeds: one for a batch, or one for each item."""

    seeds: tuple[int, ...]
    block: int
    forward: int
    shape: tuple[int, ...]
    purpose: Purpose = "latents"

    def made(self) -> Tensor:
        """The noise."""
        shape = self.shape if len(self.seeds) == 1 else (1, *self.shape[1:])
        return torch.cat([gaussian(s, self.block, self.forward, shape, self.purpose) for s in self.seeds])


@dataclass
class Ahead:
    """Noise drawn before it is asked for, while a device is busy; the numbers are those of `gaussian`."""

    drawn: dict[Draw, Tensor] = field(default_factory=dict)

    def foresee(self, draws: Iterable[Draw]) -> None:
        """Draw what is not there yet; what is not among `draws` is forgotten."""
        self.drawn = {d: self.drawn[d] if d in self.drawn else d.made() for d in draws}

    def take(self, draw: Draw) -> Tensor:
        """The noise, which is then no longer kept."""
        return self.drawn.pop(draw) if draw in self.drawn else draw.made()


def integer(seed: int, block: int, forward: int, bounds: tuple[int, int]) -> int:
    """An evenly drawn integer with least <= it <= most; seed, block and forward as in `gaussian`."""
    least, most = bounds
    return least + _number(seed, block, forward, "reference") % (most - least + 1)


def _number(seed: int, block: int, forward: int, purpose: Purpose) -> int:
    """64 bits that belong to the arguments."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must lie in 0 .. 2**64 - 1")
    key = struct.pack("<QQQ", seed, block, forward) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
