"""FID and FVD: the Frechet distance of two clouds of features (Heusel et al. 2017; Unterthiner et al. 2018).

The networks are TorchScript files that the user supplies, in the form in which both are passed on: called with the
pictures and `return_features=True`. Figures are comparable only with the same file, and mean little for few clips.

Shape legend: N pictures or clips, D features, T pixel frames, H W pixel size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .video import Frames

CLIP_FRAMES = 16  # of an FVD clip
_SIDE = 224
_BATCH = 16

Features = NDArray[np.float64]


def distance(made: Features, true: Features) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features [N, D] each.

    Raises ValueError for less than two rows in one of them.
    """
    if min(len(made), len(true)) < 2:
        raise ValueError(f"{len(made)} and {len(true)} pictures: a Frechet distance needs at least 2 on each side")
    shift = np.square(made.mean(0) - true.mean(0)).sum()
    a, b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (made, true))
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2): symmetric, so it is safe for fewer rows than features
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(min=0)).sum()
    return float(max(0.0, shift + np.trace(a) + np.trace(b) - 2 * common))


def load_network(path: Path) -> Any:
    """A TorchScript network. Raises ValueError for another file."""
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a TorchScript file ({str(error).splitlines()[0]})") from None


@torch.inference_mode()
def picture_features(network: Any, frames: Frames) -> Features:
    """[N, D] of frames uint8 [N, H, W, 3], for FID: the network takes uint8 [N, 3, H, W]."""
    pieces = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).split(_BATCH)
    return torch.cat([network(piece.contiguous(), return_features=True) for piece in pieces]).double().numpy()


@torch.inference_mode()
def clip_features(network: Any, frames: Frames) -> Features:
    """[N, D] of a video [T, H, W, 3] cut into clips of 16 frames, for FVD.

    The network takes float [N, 3, 16, 224, 224] in [-1, 1], with `rescale` and `resize` off. T must be at least 16.
    """
    count = len(frames) // CLIP_FRAMES
    pixels = torch.from_numpy(np.ascontiguousarray(frames[: count * CLIP_FRAMES])).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels / 127.5 - 1, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
    clips = small.unflatten(0, (count, CLIP_FRAMES)).transpose(1, 2)
    options = {"rescale": False, "resize": False, "return_features": True}
    return torch.cat([network(clip[None].contiguous(), **options) for clip in clips]).double().numpy()
