"""The rasteriser: layers of polygons and lines in a frame of their own, placed on the picture.

Layers that do not change within a clip are made once; every frame only moves their points. Parts that overlap (iris
under a lid, teeth behind a lip) are cut by arithmetic on their curves, never by masks.

Shape legend: N points of a polygon [N, 2] (x, y). Pictures are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...media.opencv import opencv
from .colours import Colour, darker

Image = NDArray[np.uint8]
Points = NDArray[np.float64]

_SHIFT = 4  # fraction bits of OpenCV's fixed-point coordinates
JAW_DROP = 0.09  # how far the chin drops with the mouth wide open


@dataclass(frozen=True)
class Placement:
    """pixel = points @ matrix + offset; `unit` pixels to the unit."""

    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    unit: float

    def place(self, points: Points) -> Points:
        """[N, 2] in this frame -> pixels."""
        return points @ self.matrix + self.offset

    def moved(self, x: float, y: float) -> Placement:
        """The frame moved by (x, y) of its own units."""
        return Placement(self.matrix, self.offset + np.array((x, y)) @ self.matrix, self.unit)


@dataclass
class Layer:
    """Strokes in the order of painting: points, colour, width in units (0 for a filled polygon), closed."""

    outline: float = 0.0
    strokes: list[tuple[Points, Colour, float, bool]] = field(default_factory=list)
    _all: Points | None = None

    def fill(self, points: Points, colour: Colour) -> None:
        """A filled polygon."""
        self.strokes.append((points, colour, 0.0, True))

    def line(self, points: Points, colour: Colour, width: float, closed: bool = False) -> None:
        """A line of this width."""
        self.strokes.append((points, colour, width, closed))

    def shape(self, points: Points, colour: Colour, closed: bool = True) -> None:
        """A filled polygon, with the layer's outline if it has one."""
        self.fill(points, colour)
        if self.outline:
            self.line(points, darker(colour, 0.52), self.outline, closed)

    def paint(self, canvas: Image, placement: Placement, jaw: float = 0.0) -> None:
        """Draw all strokes; `jaw` 0..1 lowers what lies below the frame's origin, as a jaw does."""
        if not self.strokes:
            return
        cv2 = opencv()
        points = self._joined()
        if jaw:
            below = np.maximum(points[:, 1], 0.0)
            points = points + np.stack([np.zeros_like(below), jaw * JAW_DROP * below * below], 1)
        pixels = np.rint(placement.place(points) * (1 << _SHIFT)).astype(np.int32)
        start = 0
        for shape, colour, width, closed in self.strokes:
            piece = pixels[start : start + len(shape)]
            start += len(shape)
            if width:
                thick = max(1, round(width * placement.unit))
                cv2.polylines(canvas, [piece], closed, colour, thick, cv2.LINE_AA, _SHIFT)
            else:
                cv2.fillPoly(canvas, [piece], colour, cv2.LINE_AA, _SHIFT)

    def _joined(self) -> Points:
        if self._all is None:
            self._all = np.concatenate([points for points, *_ in self.strokes])
        return self._all


_CIRCLES: dict[int, Points] = {}


def ellipse(x: float, y: float, rx: float, ry: float, count: int = 32) -> Points:
    """`count` points of an ellipse."""
    if count not in _CIRCLES:
        angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
        _CIRCLES[count] = np.stack([np.cos(angle), np.sin(angle)], 1)
    return _CIRCLES[count] * (rx, ry) + (x, y)


def band(x: Points, upper: Points, lower: Points) -> Points:
    """Polygon between two curves over the same x."""
    out = np.empty((2 * len(x), 2))
    out[: len(x), 0], out[: len(x), 1] = x, upper
    out[len(x) :, 0], out[len(x) :, 1] = x[::-1], lower[::-1]
    return out


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def curve(points: list[tuple[float, float]], count: int = 24) -> Points:
    """A smooth line through these points (Catmull-Rom), `count` points long."""
    known = np.array(points, float)
    padded = np.concatenate([2 * known[:1] - known[1:2], known, 2 * known[-1:] - known[-2:-1]])
    at = np.linspace(0, len(known) - 1 - 1e-9, count)
    i, t = at.astype(int), (at % 1)[:, None]
    p0, p1, p2, p3 = (padded[i + k] for k in range(4))
    return 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)


def mirrored(points: Points, side: float) -> Points:
    """The points, for side -1 on the other side of the axis."""
    return points * (side, 1)
