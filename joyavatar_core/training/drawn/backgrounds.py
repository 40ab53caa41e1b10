"""What stands behind the avatar: soft pictures, painted once for a clip.

Shape legend: H W pixel size; pictures are uint8 [H, W, 3] RGB. Points are in picture heights, the origin top left.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...media.opencv import opencv
from .avatar import Avatar
from .colours import Colour, darker, hsv, lighter, mix
from .layers import Image, Layer, Placement, box, curve, ellipse


def background(avatar: Avatar, size: tuple[int, int]) -> Image:
    """The empty scene of this avatar for size (H, W), a little out of focus."""
    cv2, (height, width) = opencv(), size
    rng = np.random.default_rng(avatar.background_seed)
    first, second = avatar.palette.paper, avatar.palette.paper_2
    canvas = _gradient(size, first, mix(first, second, rng.uniform(0.3, 1.0)), rng.uniform(-0.6, 0.6))
    layer, aspect = Layer(), width / height
    _SCENES[avatar.background](rng, layer, aspect, (first, second))
    layer.paint(canvas, Placement(np.eye(2) * height, np.zeros(2), height))
    return cv2.GaussianBlur(canvas, (0, 0), _FOCUS.get(avatar.background, 0.012) * height)


_FOCUS = {"glow": 0.05, "blobs": 0.06, "bokeh": 0.014, "split": 0.01}


def _gradient(size: tuple[int, int], first: Colour, second: Colour, slant: float) -> Image:
    height, width = size
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(-0.5, 0.5, width)[None]
    share = np.clip(y + slant * x, 0, 1)[..., None]
    return (np.array(first) * (1 - share) + np.array(second) * share).astype(np.uint8)


Colours = tuple[Colour, Colour]


def _plain(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    """The gradient alone."""


def _glow(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    x, y = rng.uniform(0.2, 0.8) * aspect, rng.uniform(0.2, 0.6)
    for i in range(6):
        radius = 0.75 * (1 - i / 6)
        layer.fill(ellipse(x, y, radius, radius, 40), lighter(mix(*colours, 0.2 * i), 0.05 + 0.07 * i))


def _blobs(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    for _ in range(rng.integers(4, 8)):
        x, y, radius = rng.uniform(0, aspect), rng.uniform(0, 1), rng.uniform(0.12, 0.3)
        layer.fill(ellipse(x, y, radius, radius * rng.uniform(0.7, 1.3)), mix(*colours, rng.uniform(0.2, 1)))


def _bokeh(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    for _ in range(rng.integers(7, 14)):
        x, y, radius = rng.uniform(0, aspect), rng.uniform(0, 0.9), rng.uniform(0.03, 0.1)
        light = lighter(mix(*colours, rng.uniform(0, 1)), rng.uniform(0.1, 0.4))
        layer.fill(ellipse(x, y, radius, radius, 28), light)


def _window(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    left = rng.uniform(-0.05, 0.55) * aspect
    right, low, frame = left + rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.7), lighter(colours[0], 0.45)
    layer.fill(box(left, 0.04, right, low), frame)
    middle, sky = (left + right) / 2, hsv(rng.uniform(0.5, 0.62), rng.uniform(0.15, 0.4), rng.uniform(0.75, 0.97))
    for x0, x1 in ((left + 0.03, middle - 0.015), (middle + 0.015, right - 0.03)):
        layer.fill(box(x0, 0.07, x1, low - 0.03), sky)
        layer.fill(box(x0, low - 0.14, x1, low - 0.03), mix(sky, (120, 170, 110), 0.6))
    layer.fill(box(left - 0.03, low, right + 0.03, low + 0.04), darker(frame, 0.12))


def _shelf(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    wood = mix(colours[0], (150, 106, 74), 0.6)
    for row in (0.3, 0.66, 1.02):
        x = rng.uniform(0, 0.08)
        while x < aspect:
            width, tall = rng.uniform(0.05, 0.1), rng.uniform(0.15, 0.24)
            if rng.random() < 0.78:
                layer.fill(
                    box(x, row - tall, x + width, row),
                    mix(colours[0], mix(colours[1], hsv(rng.random(), 0.4, 0.75), 0.5), 0.6),
                )
            x += width + rng.uniform(0.0, 0.03)
        layer.fill(box(0, row, aspect, row + 0.035), darker(wood, 0.15))


def _hills(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    layer.fill(ellipse(rng.uniform(0.1, 0.9) * aspect, rng.uniform(0.1, 0.3), 0.09, 0.09), lighter(colours[0], 0.6))
    green = mix(hsv(rng.uniform(0.2, 0.45), 0.4, 0.65), colours[1], 0.4)
    for i in range(3):
        heights = [(aspect * (k / 4 * 1.1 - 0.05), 0.5 + 0.15 * i + rng.uniform(-0.08, 0.08)) for k in range(5)]
        ridge = curve(heights, 30)
        layer.fill(np.concatenate([ridge, [[aspect * 1.1, 1.1], [-0.1, 1.1]]]), darker(green, 0.12 * i))


def _room(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    low = rng.uniform(0.62, 0.78)
    layer.fill(box(0, low, aspect, 1.05), darker(mix(*colours, 0.7), 0.15))
    layer.fill(box(0, low - 0.025, aspect, low), lighter(colours[0], 0.3))
    for place in rng.uniform(0, 0.8, 2) * aspect:
        top, wide, tall = rng.uniform(0.06, 0.2), rng.uniform(0.14, 0.26), rng.uniform(0.14, 0.26)
        layer.fill(box(place, top, place + wide, top + tall), darker(colours[0], 0.25))
        layer.fill(box(place + 0.02, top + 0.02, place + wide - 0.02, top + tall - 0.02), lighter(colours[1], 0.2))


def _curtain(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    folds = rng.integers(4, 8)
    for i in range(folds):
        x, wide = (i + 0.5) / folds * aspect, aspect / folds
        for k in range(3):
            half = wide * (0.36 - 0.1 * k)
            layer.fill(box(x - half, -0.1, x + half, 1.1), mix(colours[0], colours[1], 0.12 * (k + 1)))


def _split(rng: np.random.Generator, layer: Layer, aspect: float, colours: Colours) -> None:
    left, right = rng.uniform(0.3, 0.8, 2)
    layer.fill(np.array([[0, left], [aspect, right], [aspect, 1.1], [0, 1.1]]), mix(*colours, 0.8))


_SCENES: dict[str, Callable[[np.random.Generator, Layer, float, Colours], None]] = {
    "gradient": _plain,
    "glow": _glow,
    "blobs": _blobs,
    "bokeh": _bokeh,
    "window": _window,
    "shelf": _shelf,
    "hills": _hills,
    "room": _room,
    "curtain": _curtain,
    "split": _split,
}
