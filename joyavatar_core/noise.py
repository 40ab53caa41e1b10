"""Noise as a function of (seed, block, forward), whatever the chunking of the audio, a resume, or the device.

Shape legend: any shape the caller gives; always drawn on the CPU in float32.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal["latents", "motion", "reference"]


def gaussian(seed: int, block: int, forward: int, shape: Sequence[int], purpose: Purpose = "latents") -> Tensor:
    """Standard normal float32 noise.

    Args:
        seed: of the stream, 0 <= seed < 2**64.
        block: block the noise belongs to.
        forward: how many denoising steps that block had before.
        purpose: "latents" for a block's own noise, "motion" for the motion frame before it.
    """
    generator = torch.Generator().manual_seed(_number(seed, block, forward, purpose) >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


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
