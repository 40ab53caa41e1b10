"""A loss of what is seen: the frames that a decoder makes of the latents of a window, against those of the true ones.

Latents weigh all they hold alike, and what a head does within four frames is little of it. So a regression to latents
makes heads that stand within a latent and jump where the next begins. Frames say it: their pixels, their changes from
one to the next, and how even these are (`autoencoder.picture_loss`).

Shape legend: B batch, C latent channels, F latents, T pixel frames, h w latent size, s side of the crop in cells.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..autoencoder import TEMPORAL, LightAutoencoder
from . import autoencoder
from .batches import Batch
from .common import autocast
from .lips import middle


@dataclass(frozen=True)
class SeenLoss:
    """weight: of the loss beside others. blocks: of the window, from its start, that are looked at: the first is shown
    next, the others are still far from clean. cells: side of the square that is looked at. picture: weights of the
    kinds of error. mouth, eyes: weights of their cells, 1 elsewhere.
    """

    decoder: LightAutoencoder
    weight: float
    blocks: int = 2
    cells: int = 8
    picture: autoencoder.Recipe = field(
        default_factory=lambda: autoencoder.Recipe(square_weight=12.0, motion_weight=3.0, evenness_weight=0.2)
    )
    mouth: float = 4.0
    eyes: float = 3.0

    def of_window(self, batch: Batch, made: Tensor, random_: random.Random) -> Tensor:
        """Of the clean latents [B, C, F, h, w] that a model makes of a batch; the frame before the window is given."""
        lead, motion = batch.layout.lead, batch.layout.motion
        end = lead + self.blocks * batch.layout.policy.block_latents
        before = batch.x0[:, :, lead - motion : lead]
        run = slice(lead - motion, min(end, batch.layout.latents))
        shown = torch.cat([before, made[:, :, lead : run.stop]], dim=2)
        cells = 1 + (self.mouth - 1) * batch.mouth[:, run] + (self.eyes - 1) * batch.eyes[:, run]
        crops = [self._crop(share, random_) for share in batch.mouth[:, run]]
        shown, true = (_cut(latents, crops) for latents in (shown, batch.true[:, :, run]))
        weights = _of_frames(_cut(cells[:, None], crops), self.decoder.spatial)
        with torch.no_grad():
            video = self._decoded(true)
        return self.weight * autoencoder.picture_loss(self.picture, self._decoded(shown), video, weights)

    def _decoded(self, latents: Tensor) -> Tensor:
        with autocast():
            return self.decoder.decode_unclamped(latents.float())[0].float()

    def _crop(self, mouth: Tensor, random_: random.Random) -> tuple[slice, slice]:
        """A square of cells at random about the mouth [F, h, w], rows and columns."""
        share, slices = mouth.mean(0), []
        for axis, size in enumerate(share.shape):
            centre, side = float(middle(share.sum(1 - axis)[None])), min(self.cells, size)
            start = min(max(0, round(random_.gauss(centre - side / 2, side / 3))), size - side)
            slices.append(slice(start, start + side))
        return slices[0], slices[1]


def _cut(latents: Tensor, crops: list[tuple[slice, slice]]) -> Tensor:
    """[B, C, F, h, w] -> [B, C, F, s, s]."""
    return torch.stack([one[..., rows, columns] for one, (rows, columns) in zip(latents, crops, strict=True)])


def _of_frames(cells: Tensor, spatial: int) -> Tensor:
    """Weights of cells [B, 1, F, s, s] -> of the pixels of the decoded frames [B, 1, T, H, W], their mean 1."""
    frames = cells.repeat_interleave(TEMPORAL, dim=2)[:, :, TEMPORAL - 1 :]
    pixels = frames.repeat_interleave(spatial, dim=3).repeat_interleave(spatial, dim=4)
    return pixels / pixels.mean()


def load_seen_loss(path: Path, weight: float) -> SeenLoss:
    """The loss by the decoder of a light autoencoder's file."""
    return SeenLoss(autoencoder.frozen(path), weight)
