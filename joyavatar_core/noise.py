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

Purpose = Literal["latents", "motion"]


def gaussian(seed: int, block: int, forward: int, shape: Sequence[int], purpose: Purpose = "latents") -> Tensor:
    """Standard normal float32 noise.

    Args:
        seed: of the stream, 0 <= seed < 2**64.
        block: block the noise belongs to.
        forward: how many denoising steps that block had before.
        purpose: "latents" for a block's own noise, "motion" for the motion frame before it.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must lie in 0 .. 2**64 - 1")
    key = struct.pack("<QQQ", seed, block, forward) + purpose.encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
