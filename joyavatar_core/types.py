"""Small value types and protocols shared by the layers of the engine.

Shape legend: B batch, F latent frames, T pixel frames, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

StreamTensors = dict[str, Tensor]
"""What a streaming layer remembers: named tensors, so that it can be counted, saved and loaded without the layer."""


def nbytes(tensors: StreamTensors) -> int:
    """Bytes held by the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def batched(change: Callable[..., Tensor], *same: Any) -> Any:
    """`change` of the tensors in values of one shape (dataclasses, dicts, tuples); all else is that of the first."""
    first = same[0]
    if isinstance(first, Tensor):
        return change(*same)
    if isinstance(first, tuple):
        return tuple(batched(change, *parts) for parts in zip(*same, strict=True))
    if isinstance(first, dict):
        return {key: batched(change, *(value[key] for value in same)) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        parts = {f.name: batched(change, *(getattr(value, f.name) for value in same)) for f in fields(first)}
        return type(first)(**parts)
    return first


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, brought there without the host's waiting where that is safe: CUDA copies it from
    page-locked memory. Its type is changed there: a copy that changes it on the way waits.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type in ("cuda", "meta")).to(dtype or tensor.dtype)


class VideoAutoencoder(Protocol):
    """What a rollout asks of an autoencoder; WanVAE and LightAutoencoder are the two."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def spatial(self) -> int:
        """Pixels per latent cell along each axis."""
        ...

    @property
    def settled_latents(self) -> int:
        """Latents after which the encoding of a picture followed by grey no longer changes."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1], T = 1 + 4 (F - 1) -> normalised latents [B, C, F, h, w]."""
        ...

    def decode_stream(self, latents: Tensor, state: StreamTensors | None) -> tuple[Tensor, StreamTensors]:
        """Decode the next latents of a stream (state None: the first) -> pixel frames, next state."""
        ...
