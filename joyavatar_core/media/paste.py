"""Frames laid back into the full picture they were cut from, with a soft edge.

Shape legend: T frames, H W of the full picture, h w of the region; all pictures uint8 RGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..sinks import FrameSink
from .picture import resize


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture, in its pixels."""

    x: int
    y: int
    width: int
    height: int

    def inside(self, outer: Region, size: tuple[int, int]) -> Region:
        """The same part where a picture of `size` (width, height), in which this is one, fills `outer`."""
        across, down = outer.width / size[0], outer.height / size[1]
        left, top = outer.x + round(self.x * across), outer.y + round(self.y * down)
        right = min(outer.x + round((self.x + self.width) * across), outer.x + outer.width)
        bottom = min(outer.y + round((self.y + self.height) * down), outer.y + outer.height)
        return Region(left, top, max(1, right - left), max(1, bottom - top))


class Paste:
    """Puts frames [T, h', w', 3] of any size into `region` of a picture [H, W, 3].

    feather: width of the soft edge, in shares of the region's shorter side; edges that lie on the picture's own edge
    stay hard. The result has even sides (the last row or column is left out where they are odd), as H.264 asks.
    """

    def __init__(self, picture: np.ndarray, region: Region, feather: float) -> None:
        height, width = picture.shape[:2]
        right, bottom = region.x + region.width, region.y + region.height
        if not (0 <= region.x < right <= width and 0 <= region.y < bottom <= height):
            raise ValueError(f"{region} does not lie inside the picture of {width}x{height}")
        self.region = region
        self.picture = np.ascontiguousarray(picture[: height // 2 * 2, : width // 2 * 2])
        rows, columns = self.picture.shape[:2]
        edge = max(1, round(feather * min(region.width, region.height)))
        down = _ramp(region.height, edge, region.y > 0, bottom < height)
        across = _ramp(region.width, edge, region.x > 0, right < width)
        self._inside = (
            slice(region.y, min(region.y + region.height, rows)),
            slice(region.x, min(region.x + region.width, columns)),
        )
        weights = np.minimum(down[:, None], across[None])[..., None]
        shown = self.picture[self._inside].shape[:2]
        self._weights = weights[: shown[0], : shown[1]].astype(np.float32)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the result."""
        return self.picture.shape[1], self.picture.shape[0]

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """[T, h', w', 3] -> [T, H, W, 3]."""
        out = np.repeat(self.picture[None], len(frames), axis=0)
        rows, columns = self._weights.shape[:2]
        for whole, frame in zip(out, frames, strict=True):
            face = resize(frame, self.region.width, self.region.height)[:rows, :columns].astype(np.float32)
            under = whole[self._inside].astype(np.float32)
            whole[self._inside] = np.rint(under + (face - under) * self._weights).astype(np.uint8)
        return out


@dataclass(frozen=True)
class PastingSink:
    """Takes the frames of a region and passes on whole ones."""

    paste: Paste
    sink: FrameSink

    def write(self, frames: np.ndarray) -> None:
        """uint8 [T, h', w', 3]."""
        self.sink.write(self.paste(frames))

    def write_audio(self, samples: np.ndarray) -> None:
        """float32 [channels, m]."""
        self.sink.write_audio(samples)


def _ramp(length: int, edge: int, soft_start: bool, soft_end: bool) -> np.ndarray:
    """[length] rising from 0 to 1 over `edge` at a soft start, falling at a soft end (half a cosine)."""
    place = np.arange(length) + 0.5
    far = np.full(length, float(edge))
    near = np.minimum(place if soft_start else far, length - place if soft_end else far)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(near / edge, 0, 1))
