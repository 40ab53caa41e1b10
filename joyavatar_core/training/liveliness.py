"""How lively and how sharp frames are against true ones, place by place.

For what cannot be right pixel by pixel: who is asked for the pixels of what is not known draws the mean, a ghost
between two places.

Shape legend: B batch, T pixel frames, H W pixel size, n m places.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_PLACE = 16  # pixels: how far a thing may be from where it is to be and still be there
_FLAT = 2 / 255  # change or edge, in half the range, beside which a place counts as still or flat


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
