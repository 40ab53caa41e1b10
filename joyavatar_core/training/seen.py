"""A loss of what is seen: the frames that a decoder makes of the latents of a window, against the true ones.

Latents weigh all they hold alike, and what a head does within four frames is little of it. So a regression to latents
makes heads that stand within a latent and jump where the next begins, and smear where they move fast. Frames say it:
how much they change from one to the next, and how sharp their edges are (`liveliness`). The true ones are those of the
clips and not what the decoder makes of their latents: that flickers where one latent ends.

Shape legend: B batch, C latent channels, F latents, T pixel frames, H W pixel size, h w latent size, s side of the
crop in cells.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..autoencoder import TEMPORAL, LightAutoencoder
from . import autoencoder
from .batches import Batch
from .clips import clip_path, read_frames
from .common import autocast
from .encoded import as_video, middle
from .liveliness import liveliness_error

Crops = list[tuple[slice, slice]]
"""A square of cells for each sequence of a batch, rows and columns."""

Truth = Callable[[Batch, slice, Crops], Tensor]
"""True frames [B, 3, T, s, s] of these latents of a batch, the last frame of the first one and all of the others."""


@dataclass(frozen=True)
class SeenLoss:
    """truth: tells the true frames. weight: of the loss beside others. blocks: of the window, from its start, that are
    looked at: the first is shown next, the others are still far from clean. cells: side of the square that is looked
    at. edges: what the sharpness counts beside the changes. mouth, eyes: weights of their cells, 1 elsewhere.
    """

    decoder: LightAutoencoder
    truth: Truth
    weight: float
    blocks: int = 1
    cells: int = 12
    edges: float = 0.5
    mouth: float = 2.0
    eyes: float = 2.0

    def of_window(self, batch: Batch, made: Tensor, random_: random.Random) -> Tensor:
        """Of the clean latents [B, C, F, h, w] that a model makes of a batch; the frame before the window is given."""
        lead, motion = batch.layout.lead, batch.layout.motion
        end = lead + self.blocks * batch.layout.policy.block_latents
        before = batch.x0[:, :, lead - motion : lead]
        run = slice(lead - motion, min(end, batch.layout.latents))
        shown = torch.cat([before, made[:, :, lead : run.stop]], dim=2)
        cells = 1 + (self.mouth - 1) * batch.mouth[:, run] + (self.eyes - 1) * batch.eyes[:, run]
        crops = [self._crop(share, random_) for share in batch.mouth[:, run]]
        weights = _of_frames(_cut(cells[:, None], crops), self.decoder.spatial)
        with autocast():
            video = self.decoder.decode_unclamped(_cut(shown, crops).float())[0].float()
        return self.weight * liveliness_error(video, self.truth(batch, run, crops), weights, self.edges)

    def _crop(self, mouth: Tensor, random_: random.Random) -> tuple[slice, slice]:
        """A square of cells at random about the mouth [F, h, w], rows and columns."""
        share, slices = mouth.mean(0), []
        for axis, size in enumerate(share.shape):
            centre, side = float(middle(share.sum(1 - axis)[None])), min(self.cells, size)
            start = min(max(0, round(random_.gauss(centre - side / 2, side / 3))), size - side)
            slices.append(slice(start, start + side))
        return slices[0], slices[1]


def _cut(latents: Tensor, crops: Crops) -> Tensor:
    """[B, C, F, h, w] -> [B, C, F, s, s]."""
    return torch.stack([one[..., rows, columns] for one, (rows, columns) in zip(latents, crops, strict=True)])


def _of_frames(cells: Tensor, spatial: int) -> Tensor:
    """Weights of cells [B, 1, F, s, s] -> of the pixels of the decoded frames [B, 1, T, H, W], their mean 1."""
    frames = cells.repeat_interleave(TEMPORAL, dim=2)[:, :, TEMPORAL - 1 :]
    pixels = frames.repeat_interleave(spatial, dim=3).repeat_interleave(spatial, dim=4)
    return pixels / pixels.mean()


@dataclass(frozen=True)
class StoredFrames:
    """A `Truth`: the frames of the clips of a folder, of `spatial` pixels a cell."""

    folder: Path
    spatial: int

    def __call__(self, batch: Batch, run: slice, crops: Crops) -> Tensor:
        """OSError for a clip that is not there."""
        return torch.cat([self._one(batch, i, run, crop) for i, crop in enumerate(crops)])

    def _one(self, batch: Batch, i: int, run: slice, crop: tuple[slice, slice]) -> Tensor:
        latents = batch.frames[i, run].tolist()
        shown = slice(TEMPORAL * latents[0], TEMPORAL * latents[-1] + 1)
        rows, columns = (
            slice((int(first) + side.start) * self.spatial, (int(first) + side.stop) * self.spatial)
            for first, side in zip(batch.corner[i], crop, strict=True)
        )
        frames = read_frames(clip_path(self.folder, int(batch.seeds[i])), shown)
        return as_video(frames[:, rows, columns])


def load_seen_loss(path: Path, weight: float, clips: Path) -> SeenLoss:
    """The loss by the decoder of a light autoencoder's file, against the frames of a folder of clips."""
    decoder = autoencoder.frozen(path)
    return SeenLoss(decoder, StoredFrames(clips, decoder.spatial), weight)
