"""Measures of pictures that need no network: errors, colours, a feature of who is shown, and noise.

Shape legend: T pixel frames, H W pixel size, D feature. Pictures are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
Box = NDArray[np.floating]

_BINS = 8  # of the histogram, along each colour
_SIDE = 64  # of the face region in the feature
_CELLS = 8
_ANGLES = 8


def box_errors(made: Pictures, true: Pictures, boxes: Box | None = None) -> NDArray[np.float64]:
    """Mean squared error [T] of pictures [T, H, W, 3] in their boxes [T, 4] (x0 y0 x1 y1), or as a whole."""
    height, width = true.shape[1:3]
    whole = np.tile(np.array([0.0, 0.0, width, height]), (len(true), 1))
    errors = []
    for a, b, box in zip(made, true, whole if boxes is None else boxes, strict=True):
        rows, columns = region(box, (height, width))
        errors.append(np.square(a[rows, columns].astype(np.float64) - b[rows, columns]).mean())
    return np.array(errors)


def region(box: Box, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box x0 y0 x1 y1 in a picture of size (H, W): at least one pixel, none outside."""
    height, width = size
    x0, y0 = int(np.clip(np.floor(box[0]), 0, width - 1)), int(np.clip(np.floor(box[1]), 0, height - 1))
    return slice(y0, max(y0 + 1, min(height, int(np.ceil(box[3]))))), slice(
        x0, max(x0 + 1, min(width, int(np.ceil(box[2]))))
    )


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures; 99 for none."""
    return float(min(99.0, 10 * np.log10(255.0**2 / max(mean_squared_error, 1e-9))))


def colour_histogram(pictures: Pictures) -> NDArray[np.float64]:
    """Shares of 8 x 8 x 8 colours over all pictures [T, H, W, 3]: [512], summing to 1."""
    index = (pictures // (256 // _BINS)).astype(np.int64)
    code = (index[..., 0] * _BINS + index[..., 1]) * _BINS + index[..., 2]
    return np.bincount(code.ravel(), minlength=_BINS**3) / code.size


def histogram_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Hellinger distance of two histograms, 0 (the same) .. 1 (no colour in common)."""
    return float(np.sqrt(max(0.0, 1 - np.sqrt(a * b).sum())))


def layout_feature(pictures: Pictures, box: Box) -> NDArray[np.float64]:
    """Who is shown in the box, without any network: gradients and colours of the region, in 8 x 8 cells, mean of T.

    Histograms of gradient directions (Dalal and Triggs 2005: 8 directions, unsigned, of unit length a picture) and
    mean colours about their own mean, each of length one: [D].
    """
    rows, columns = region(box, pictures.shape[1:3])
    small = np.stack([_resized(picture[rows, columns]) for picture in pictures]) / 255.0
    gradients = np.mean([_gradients(picture.mean(2)) for picture in small], axis=0)
    step = _SIDE // _CELLS
    colours = small.reshape(len(small), _CELLS, step, _CELLS, step, 3).mean((0, 2, 4)).ravel()
    return np.concatenate([_unit(gradients), _unit(colours - 0.5)])


def feature_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Cosine distance of two features, 0 (the same) .. 2."""
    return float(1 - (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def _unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values / max(float(np.linalg.norm(values)), 1e-12)


def _resized(picture: Pictures) -> NDArray[np.float64]:
    """[64, 64, 3] by the mean over each cell's pixels."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)


def _gradients(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """[cells * cells * angles] of one grey picture [64, 64]."""
    down, across = np.gradient(grey)
    strength = np.hypot(down, across)
    angle = (np.arctan2(down, across) % np.pi) * _ANGLES / np.pi
    bins = np.floor(angle).astype(int) % _ANGLES
    cell = np.arange(_SIDE) * _CELLS // _SIDE
    index = (cell[:, None] * _CELLS + cell[None]) * _ANGLES + bins
    return _unit(np.bincount(index.ravel(), strength.ravel(), _CELLS * _CELLS * _ANGLES).astype(np.float64))


def edges(pictures: Pictures, box: Box) -> NDArray[np.float64]:
    """Sharpness [T] of what pictures [T, H, W, 3] show in a box: root mean square of the gradient, grey levels a pixel.

    A face that moved has all of it, elsewhere in the box. One that smears has lost some: where an edge is blurred, or
    twice there by half, the gradient adds up to the same, but not its square.
    """
    rows, columns = region(box, pictures.shape[1:3])
    grey = (picture[rows, columns].astype(np.float64).mean(2) for picture in pictures)
    return np.array([np.sqrt(np.square(np.gradient(picture)).sum(0).mean()) for picture in grey])


def flat_pixels(picture: Pictures, share: float = 0.3) -> NDArray[np.bool_]:
    """The pixels [H, W] of a picture that change least within two pixels around: where noise shows."""
    grey = picture.astype(np.float64).mean(2)
    down, across = np.gradient(grey)
    edges = np.hypot(down, across)
    padded = np.pad(edges, 2, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).max((2, 3))
    return around <= np.quantile(around, share)


def noise(pictures: Pictures, flat: NDArray[np.bool_]) -> NDArray[np.float64]:
    """High-frequency noise [T] of pictures [T, H, W, 3]: mean size of the Laplacian over the pixels that are flat.

    In grey levels of 0..255. The largest tenth is left out: something may have moved there.
    """
    out = []
    for picture in pictures:
        grey = np.pad(picture.astype(np.float64).mean(2), 1, mode="edge")
        laplacian = grey[1:-1, 1:-1] - (grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]) / 4
        size = np.sort(np.abs(laplacian[flat]))
        out.append(size[: max(1, int(0.9 * len(size)))].mean())
    return np.array(out)
