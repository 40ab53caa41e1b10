"""Small value types and protocols shared by the layers of the engine.

Shape legend: B batch, F latent frames, T pixel frames, C latent channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

StreamTensors = dict[str, Tensor]
"""What a streaming layer remembers: named tensors, so that it can be counted, saved and loaded without the layer."""


def nbytes(tensors: StreamTensors) -> int:
    """Bytes held by the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


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
