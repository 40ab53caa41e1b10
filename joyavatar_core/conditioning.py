"""The reference picture as the model sees it: image-to-video channels and, for the embedded model, image tokens.

Wan2.1 I2V concatenates [mask 4 | image latents] to the noisy latents: the mask is one for pixel frame 0, the image
latents encode [picture, grey, grey, ...]. The causal autoencoder forgets the picture after a while: the encoding of
such a clip is exactly constant from some latent on (29 for Wan2.1), so an endless clip encodes the first latents once
(30 for Wan2.1: `settled_latents` of the autoencoder) and reuses the last.

OmniAvatar concatenates [image latent | mask 1] instead: the picture's own latent beside every latent frame, and a mask
that is zero for latent frame 0 and one for all others.

Shape legend: B batch, C latent channels, n latent frames, h w latent size, H W pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import VideoAutoencoder


@dataclass(frozen=True)
class ImageChannels:
    """Mask and image channels of a stream of any length: [B, 4 + C, n, h, w], the last one repeated for ever.

    mask_last: the layout of OmniAvatar, [B, C + 1, n, h, w].
    """

    channels: Tensor
    mask_last: bool = False

    def at(self, latents: Sequence[int]) -> Tensor:
        """Channels of consecutive latent frames: [B, 4 + C, len(latents), h, w]. By slices: an index would be sent."""
        last = self.channels.shape[2] - 1
        there = self.channels[:, :, min(latents[0], last) : latents[-1] + 1]
        beyond = self.channels[:, :, last:].expand(-1, -1, len(latents) - there.shape[2], -1, -1)
        return torch.cat([there, beyond], dim=2)

    @property
    def picture(self) -> Tensor:
        """Latent of the picture itself, [B, C, h, w]."""
        return self.channels[:, :-1, 0] if self.mask_last else self.channels[:, 4:, 0]


def image_channels(autoencoder: VideoAutoencoder, picture: Tensor, temporal: int = 4) -> ImageChannels:
    """Encode a picture [B, 3, H, W] in [-1, 1] into image-to-video channels."""
    batch, _, height, width = picture.shape
    latents = autoencoder.settled_latents
    clip = picture.new_zeros(batch, 3, 1 + temporal * (latents - 1), height, width)
    clip[:, :, 0] = picture
    encoded = autoencoder.encode(clip)  # [B, C, n, h, w]
    mask = encoded.new_zeros(batch, temporal, *encoded.shape[2:])
    mask[:, :, 0] = 1
    return ImageChannels(torch.cat([mask, encoded], dim=1))


def repeated_picture(autoencoder: VideoAutoencoder, picture: Tensor) -> ImageChannels:
    """A picture [B, 3, H, W] in [-1, 1] as OmniAvatar's channels: two latent frames, of which the second repeats."""
    encoded = autoencoder.encode(picture.unsqueeze(2)).expand(-1, -1, 2, -1, -1)  # [B, C, 2, h, w]
    mask = torch.cat([torch.zeros_like(encoded[:, :1, :1]), torch.ones_like(encoded[:, :1, 1:])], dim=2)
    return ImageChannels(torch.cat([encoded, mask], dim=1), mask_last=True)


def reference_tokens(latent: Tensor, patch: tuple[int, int]) -> Tensor:
    """Image tokens of the embedded model: the picture's latent in patches, with a sine-cosine place.

    latent [B, C, h, w] -> [B, (h / p)(w / q), p q C]; stands where Wan2.1 I2V has CLIP-vision tokens.
    """
    p, q = patch
    x = latent.unflatten(2, (-1, p)).unflatten(4, (-1, q))  # [B, C, rows, p, columns, q]
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3)  # [B, rows, columns, (p q C)]
    rows, columns, dim = x.shape[1:]
    place = torch.cat(
        [
            _sine_cosine(rows, dim // 2)[:, None].expand(-1, columns, -1),
            _sine_cosine(columns, dim - dim // 2)[None].expand(rows, -1, -1),
        ],
        dim=-1,
    )
    return (x + place.to(x)).flatten(1, 2)


def _sine_cosine(length: int, dim: int) -> Tensor:
    """[length, dim]: places in [0, 1] so that a token means the same spot at every picture size."""
    place = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    frequency = 2.0 ** torch.linspace(0, 6, dim // 2, dtype=torch.float64)
    angles = torch.outer(place, frequency) * torch.pi
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(length, dim % 2, dtype=torch.float64)], dim=-1)
