"""Colours: RGB tuples of floats in 0..255, and the mixtures painters use."""

from __future__ import annotations

import colorsys

import numpy as np

Colour = tuple[float, float, float]

INK: Colour = (60, 46, 54)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour in the first."""
    (a, b, c), (x, y, z) = first, second
    return a + (x - a) * share, b + (y - b) * share, c + (z - c) * share


def darker(colour: Colour, share: float) -> Colour:
    """Shadows turn a little to blue and red, as painters have them."""
    r, g, b = colour
    return r * (1 - 0.65 * share), g * (1 - 0.75 * share), b * (1 - 0.62 * share)


def lighter(colour: Colour, share: float) -> Colour:
    """Towards a warm white."""
    return mix(colour, (255, 250, 240), share)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue in turns, saturation and value 0..1."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return 255 * r, 255 * g, 255 * b


def any_colour(rng: np.random.Generator, low: float = 30, high: float = 240) -> Colour:
    """Each component on its own in low..high."""
    r, g, b = rng.uniform(low, high, 3)
    return float(r), float(g), float(b)


def between(rng: np.random.Generator, scale: tuple[Colour, ...]) -> Colour:
    """A colour between two neighbours of a scale, slightly off."""
    place = rng.uniform(0, len(scale) - 1)
    mixed = mix(scale[int(place)], scale[int(place) + 1], place % 1)
    r, g, b = np.clip(np.array(mixed) + rng.normal(0, 4, 3), 0, 255)
    return float(r), float(g), float(b)


def distance(first: Colour, second: Colour) -> float:
    """Euclidean, in steps of 255."""
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5
