"""A loss of what is seen: the frames that a decoder makes of the latents of a window, against those of the true ones.

Latents weigh all they hold alike, and what a head does within four frames is little of it. So a regression to latents
makes heads that stand within a latent and jump where the next begins, and smear where they move fast. Frames say it:
how much they change from one to the next, and how sharp their edges are, place by place. Not by the errors of their
pixels: who is asked for those and is not sure draws the mean, a ghost between two places.

Shape legend: B batch, C latent channels, F latents, T pixel frames, H W pixel size, h w latent size, s side of the
crop in cells, n m places.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoder import TEMPORAL, LightAutoencoder
from . import autoencoder
from .batches import Batch
from .common import autocast
from .encoded import middle

_PLACE = 16  # pixels: how far a thing may be from where it is to be and still be there
_FLAT = 2 / 255  # change or edge, in half the range, beside which a place counts as still or flat


@dataclass(frozen=True)
class SeenLoss:
    """weight: of the loss beside others. blocks: of the window, from its start, that are looked at: the first is shown
    next, the others are still far from clean. cells: side of the square that is looked at. edges: what the sharpness
    counts beside the changes. mouth, eyes: weights of their cells, 1 elsewhere.
    """

    decoder: LightAutoencoder
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
        shown, true = (_cut(latents, crops) for latents in (shown, batch.true[:, :, run]))
        weights = _of_frames(_cut(cells[:, None], crops), self.decoder.spatial)
        with torch.no_grad():
            video = self._decoded(true)
        return self.weight * liveliness_error(self._decoded(shown), video, weights, self.edges)

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


def liveliness_error(made: Tensor, true: Tensor, weights: Tensor, edges: float = 1.0) -> Tensor:
    """How far frames [B, 3, T, H, W] are from true ones in how much they change and in how sharp they are.

    Mean over B of the absolute differences of two levels about each place, under weights [B, 1, T, H, W] and in shares
    of the true levels: of the mean absolute difference in time and, `edges` of it, of the root mean square difference
    along either side of the picture. The square tells a blurred edge and two half ones from the edge they add up to.
    """
    error = _share(_changes(made), _changes(true), _about(weights[:, 0, 1:]))
    counts = _about(weights[:, 0])
    for axis in (3, 4):
        error = error + edges / 2 * _share(_edges(made, axis), _edges(true, axis), counts)
    return error


def _changes(video: Tensor) -> Tensor:
    return _about(video.diff(dim=2).abs().mean(1))


def _edges(video: Tensor, axis: int) -> Tensor:
    return (_about(video.diff(dim=axis).square().mean(1)) + _FLAT**2).sqrt()


def _share(made: Tensor, true: Tensor, counts: Tensor) -> Tensor:
    """Levels [B, T, n, m] about places that count so much."""
    of = (1, 2, 3)
    return ((counts * (made - true).abs()).sum(of) / (counts * (true + _FLAT)).sum(of)).mean()


def _about(values: Tensor) -> Tensor:
    """Means [B, T, n, m] over the overlapping squares of values [B, T, H, W], which may lack a last row or column."""
    height, width = (-(-size // _PLACE) * _PLACE for size in values.shape[2:])
    padded = F.pad(values, (0, width - values.shape[3], 0, height - values.shape[2]))
    return F.avg_pool2d(padded, _PLACE, _PLACE // 2)


def _of_frames(cells: Tensor, spatial: int) -> Tensor:
    """Weights of cells [B, 1, F, s, s] -> of the pixels of the decoded frames [B, 1, T, H, W], their mean 1."""
    frames = cells.repeat_interleave(TEMPORAL, dim=2)[:, :, TEMPORAL - 1 :]
    pixels = frames.repeat_interleave(spatial, dim=3).repeat_interleave(spatial, dim=4)
    return pixels / pixels.mean()


def load_seen_loss(path: Path, weight: float) -> SeenLoss:
    """The loss by the decoder of a light autoencoder's file."""
    return SeenLoss(autoencoder.frozen(path), weight)
