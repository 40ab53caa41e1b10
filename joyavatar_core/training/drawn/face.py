"""The face: head, ears, nose, skin, and what moves in it: eyes and mouth.

Shape legend: N points of a curve. Lengths are in half face heights, y down, the origin between eyes and mouth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .avatar import Avatar, Eyes, Mouth, Pose
from .colours import INK, Colour, darker, lighter, mix
from .layers import Layer, Points, band, curve, ellipse, mirrored

_TEETH: Colour = (242, 235, 226)
_INSIDE: Colour = (114, 34, 48)
_TONGUE: Colour = (206, 98, 104)

_LID = np.linspace(-1, 1, 19)
_LID_UPPER, _LID_LOWER = 1 - np.abs(_LID) ** 2.4, 1 - _LID**2
_LIP = np.linspace(-1, 1, 33)
_LIP_ROUND = np.maximum(1 - _LIP**2, 0)
_LIP_BODY = _LIP_ROUND**0.62
_LIP_BOW = np.exp(-((_LIP / 0.2) ** 2))
_LIP_INSIDE = np.clip((1 - np.abs(_LIP)) * 7, 0, 1)


def head_outline(avatar: Avatar, grow: float = 0.0, number: int = 64) -> Points:
    """[N, 2] outline of the face with the mouth shut, from the right side over the chin and round."""
    angle = np.linspace(0, 2 * np.pi, number, endpoint=False)
    power = 2 / avatar.face.squareness
    x = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power
    y = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** power
    x = x * (avatar.face.width + grow) * (1 - avatar.face.taper * np.maximum(y, 0) ** 1.6)
    return np.stack([x, y * (1 + grow)], 1)


# What keeps its shape: made once


def ears(avatar: Avatar) -> Layer:
    """Behind the head."""
    layer, skin, face = Layer(avatar.outline), avatar.palette.skin, avatar.face
    for side in (-1, 1):
        _EARS.get(avatar.kind, _human_ear)(layer, avatar, skin, side, face.width)
    return layer


def _human_ear(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    size = avatar.face.ear
    layer.shape(ellipse(side * (width + 0.02), 0.0, size * 0.7, size * 1.3, 28), darker(skin, 0.08))
    layer.fill(ellipse(side * (width + 0.035), 0.0, size * 0.36, size * 0.8, 20), darker(skin, 0.24))


def _cat_ear(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    ear = curve([(0.24, -0.8), (0.46, -1.2), (0.72, -1.38), (0.86, -1.1), (0.92, -0.5)], 24)
    layer.shape(mirrored(ear, side), skin)
    layer.fill(mirrored((ear - (0.62, -0.9)) * 0.58 + (0.63, -0.92), side), mix(skin, (236, 150, 150), 0.6))


def _round_ear(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    layer.shape(ellipse(side * 0.72, -0.82, 0.3, 0.3, 32), skin)
    layer.fill(ellipse(side * 0.72, -0.82, 0.18, 0.18, 28), mix(darker(skin, 0.2), (230, 150, 140), 0.35))


def _long_ear(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    for size, colour in ((1.0, skin), (0.6, mix(skin, (238, 156, 160), 0.6))):
        points = ellipse(0, -0.42, 0.22 * size, 0.56 * (0.4 + 0.6 * size), 36)
        lean = np.array([[np.cos(0.22), np.sin(0.22)], [-np.sin(0.22), np.cos(0.22)]])
        (layer.shape if size == 1 else layer.fill)(mirrored(points @ lean + (0.4, -0.82), side), colour)


def _robot_ear(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    layer.shape(mirrored(_rounded(width - 0.06, -0.24, width + 0.14, 0.2), side), darker(skin, 0.35))
    if side > 0:
        layer.line(np.array([[0.0, -0.9], [0.0, -1.24]]), darker(skin, 0.4), 0.06)
        layer.shape(ellipse(0, -1.28, 0.1, 0.1, 24), avatar.palette.iris)


def _antenna(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    layer.line(mirrored(curve([(0.2, -0.85), (0.3, -1.1), (0.46, -1.24)], 10), side), darker(skin, 0.25), 0.06)
    layer.shape(ellipse(side * 0.48, -1.27, 0.1, 0.1, 24), lighter(skin, 0.3))


def _frog_eye_socket(layer: Layer, avatar: Avatar, skin: Colour, side: int, width: float) -> None:
    layer.shape(ellipse(side * 0.46, -0.66, 0.37, 0.4, 40), skin)


_EARS = {
    "cat": _cat_ear,
    "bear": _round_ear,
    "rabbit": _long_ear,
    "robot": _robot_ear,
    "alien": _antenna,
    "frog": _frog_eye_socket,
}


def _rounded(x0: float, y0: float, x1: float, y1: float) -> Points:
    unit = ellipse(0, 0, 1, 1, 28)
    squared = np.sign(unit) * np.abs(unit) ** 0.4
    return squared * ((x1 - x0) / 2, (y1 - y0) / 2) + ((x0 + x1) / 2, (y0 + y1) / 2)


def head(avatar: Avatar) -> Layer:
    """The skin of the head with its light and shadow; paint it with the jaw."""
    layer, skin, outline = Layer(avatar.outline), avatar.palette.skin, head_outline(avatar)
    layer.fill(outline, skin)
    if avatar.shade:
        _shade(layer, avatar, outline)
    if avatar.kind == "robot":
        for side in (-1, 1):
            layer.fill(ellipse(side * avatar.face.width * 0.82, 0.82, 0.05, 0.05, 16), darker(skin, 0.3))
    if avatar.outline:
        layer.line(outline, darker(skin, 0.52), avatar.outline, True)
    return layer


def _shade(layer: Layer, avatar: Avatar, outline: Points) -> None:
    """Crescents away from the light, many and faint in painted faces, two in others; then a glow on the bright side."""
    steps = 7 if avatar.style == "painted" else 2
    half = outline[np.sign(outline[:, 0]) == -avatar.light]
    half = half[np.argsort(half[:, 1])]
    for i in range(steps):
        inner = 0.42 + 0.5 * (i + 1) / steps
        depth = avatar.shade * (i + 1) / steps
        layer.fill(np.concatenate([half, half[::-1] * (inner, 1)]), darker(avatar.palette.skin, depth))
    if avatar.style == "painted":
        for size in (1.0, 0.7, 0.4):
            glow = ellipse(avatar.light * 0.3, -0.45, 0.42 * size, 0.34 * size, 32)
            layer.fill(glow, lighter(avatar.palette.skin, 0.1 * (1.2 - size)))


def skin_marks(avatar: Avatar) -> Layer:
    """Cheeks, freckles, lines of age and muzzles: they move with the features."""
    layer, skin, face = Layer(), avatar.palette.skin, avatar.face
    if face.blush:
        for size, share in ((1.0, 0.45), (0.78, 0.75), (0.55, 1.0)):
            for side in (-1, 1):
                cheek = ellipse(side * 0.5, 0.23, 0.2 * size, 0.13 * size, 28)
                layer.fill(cheek, mix(skin, (236, 96, 100), face.blush * 0.5 * share))
    if face.freckles:
        for x, y in ((0.3, 0.12), (0.42, 0.2), (0.52, 0.1), (0.38, 0.28), (0.56, 0.22)):
            for side in (-1, 1):
                layer.fill(ellipse(side * x, y, 0.026, 0.024, 14), darker(skin, 0.4 * face.freckles + 0.08))
    if face.age == "old" and avatar.kind == "human":
        _lines_of_age(layer, avatar)
    if face.snout:
        layer.outline = avatar.outline * 0.6
        muzzle = lighter(mix(skin, (255, 240, 225), 0.3), 0.25)
        layer.shape(ellipse(0, 0.42, face.snout * 1.12, face.snout * 0.86, 44), muzzle)
    return layer


def _lines_of_age(layer: Layer, avatar: Avatar) -> None:
    colour = darker(avatar.palette.skin, 0.22)
    mouth, eyes = avatar.mouth, avatar.eyes
    for side in (-1, 1):
        fold = [(0.2, 0.2), (mouth.width + 0.05, 0.34), (mouth.width + 0.12, 0.5)]
        layer.line(mirrored(curve(fold, 12), side), colour, 0.022)
        bag = [(eyes.x - 0.13, eyes.y + 0.19), (eyes.x, eyes.y + 0.23), (eyes.x + 0.14, eyes.y + 0.18)]
        layer.line(mirrored(curve(bag, 10), side), colour, 0.02)
    for y in (-0.66, -0.55):
        layer.line(
            curve([(-0.3, y + 0.02), (0, y - 0.02), (0.3, y + 0.02)], 12), darker(avatar.palette.skin, 0.16), 0.02
        )


def nose(avatar: Avatar) -> Layer:
    """About its tip, at (0, 0.2) of the features."""
    layer, size, skin = Layer(), avatar.face.nose_size, avatar.palette.skin
    _NOSES[avatar.face.nose](layer, avatar, skin, size)
    return layer


def _nose_hook(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    line = curve([(0.0, -0.22), (0.04, -0.08), (0.1, 0.04), (0.04, 0.09), (-0.05, 0.08)], 20)
    layer.line(line * (size * avatar.light, size), darker(skin, 0.36), 0.03)


def _nose_button(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    layer.fill(ellipse(0, 0.02, 0.12 * size, 0.09 * size, 28), darker(skin, 0.2))
    layer.fill(ellipse(0.01 * avatar.light, -0.005, 0.095 * size, 0.065 * size, 28), lighter(skin, 0.1))


def _nose_shadow(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    wedge = curve([(0.0, -0.3), (0.07, -0.1), (0.13, 0.05), (0.05, 0.1), (-0.1, 0.08), (-0.01, -0.06), (0.0, -0.3)], 30)
    layer.fill(wedge * (-size * avatar.light, size), darker(skin, 0.2))


def _nose_nostrils(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    for side in (-1, 1):
        layer.fill(ellipse(side * 0.065 * size, 0.05, 0.034, 0.024, 16), darker(skin, 0.42))
    if avatar.kind == "human":
        layer.line(ellipse(0, -0.01, 0.12 * size, 0.09 * size)[3:14], darker(skin, 0.3), 0.022)


def _nose_dot(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    layer.line(curve([(-0.05, 0.03), (0.0, 0.055), (0.05, 0.03)], 8) * size, darker(skin, 0.4), 0.036)


def _nose_snout(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    dark = mix(darker(skin, 0.85), (90, 50, 56), 0.5)
    if avatar.kind in ("cat", "rabbit"):
        dark = (214, 130, 136)
    shape = curve(
        [(-0.13, -0.07), (0, -0.1), (0.13, -0.07), (0.09, 0.03), (0, 0.09), (-0.09, 0.03), (-0.13, -0.07)], 32
    )
    layer.fill(shape, dark)
    layer.fill(ellipse(-0.04, -0.05, 0.035, 0.02, 16), lighter(dark, 0.4))
    layer.line(np.array([[0.0, 0.08], [0.0, 0.17]]), darker(skin, 0.45), 0.024)


def _nose_none(layer: Layer, avatar: Avatar, skin: Colour, size: float) -> None:
    """Robots have none."""


_NOSES = {
    "hook": _nose_hook,
    "button": _nose_button,
    "shadow": _nose_shadow,
    "nostrils": _nose_nostrils,
    "dot": _nose_dot,
    "snout": _nose_snout,
    "none": _nose_none,
}


def brows(avatar: Avatar) -> Layer:
    """Both brows at rest."""
    layer, eyes = Layer(), avatar.eyes
    if not eyes.brow_thickness:
        return layer
    u = np.linspace(-1, 1, 15)
    for side in (-1, 1):
        arch = -0.05 * (1 - u * u) + eyes.brow_tilt * u * side
        thick = eyes.brow_thickness * (1 - 0.35 * (u * side + 1) / 2) * np.sqrt(np.maximum(1 - np.abs(u) ** 4, 0.04))
        y = eyes.y - eyes.brow_height + arch
        x = u * eyes.width * 1.12 + side * eyes.x * 1.04
        layer.fill(band(x, y - thick / 2, y + thick / 2), darker(avatar.palette.hair, 0.25))
    return layer


# What moves: made for every frame


def eyes_layer(avatar: Avatar, pose: Pose) -> Layer:
    """Both eyes."""
    layer = Layer()
    for side in (-1, 1):
        (_dot_eye if avatar.eyes.dots else _eye)(layer, avatar, pose, side)
    return layer


def _dot_eye(layer: Layer, avatar: Avatar, pose: Pose, side: int) -> None:
    eyes = avatar.eyes
    x, y = side * eyes.x + 0.035 * pose.gaze_x, eyes.y + 0.02 * pose.gaze_y
    radius, tall = eyes.width * 0.5, eyes.width * 0.74 * (1 - pose.blink)
    if tall < 0.03:
        layer.line(curve([(x - radius * 1.3, y), (x, y + 0.035), (x + radius * 1.3, y)], 9), INK, 0.034)
        return
    layer.fill(ellipse(x, y, radius, tall, 26), INK)
    if pose.blink < 0.4:
        spark = radius * 0.36
        layer.fill(ellipse(x + avatar.light * radius * 0.36, y - tall * 0.4, spark, spark, 14), (250, 248, 246))


def _lids(eyes: Eyes, blink: float) -> tuple[Points, Points]:
    """Heights of the upper and the lower lid; they meet at blink 1."""
    upper, lower = -eyes.height * _LID_UPPER, eyes.height * 0.72 * _LID_LOWER
    shut = lower * 0.75
    return upper + (shut - upper) * blink, lower + (shut - lower) * blink


def _eye(layer: Layer, avatar: Avatar, pose: Pose, side: int) -> None:
    eyes, skin = avatar.eyes, avatar.palette.skin
    upper, lower = _lids(eyes, pose.blink)
    lean = eyes.y - eyes.tilt * side * eyes.width * _LID
    upper, lower = upper + lean, lower + lean
    x = _LID * eyes.width + side * eyes.x
    layer.fill(band(x, lean - eyes.height * 1.16 * _LID_UPPER, lower), darker(skin, 0.12))
    if pose.blink < 0.93:
        layer.fill(band(x, upper, lower), (246, 243, 240))
        _iris(layer, avatar, pose, side, (x, upper, lower))
    lid = np.stack([x, upper], 1)
    ink = mix(INK, skin, 0.1)
    layer.line(lid, ink, 0.028 + 0.022 * eyes.lashes)
    if eyes.lashes > 0.6:
        outer = lid[-1] if side > 0 else lid[0]
        layer.line(np.stack([outer, outer + np.array([side * 0.055, -0.045])]), ink, 0.036)


def _iris(layer: Layer, avatar: Avatar, pose: Pose, side: int, lids: tuple[Points, Points, Points]) -> None:
    eyes, colour = avatar.eyes, avatar.palette.iris
    x = side * eyes.x + pose.gaze_x * eyes.width * 0.38
    y = eyes.y + pose.gaze_y * eyes.height * 0.35 - eyes.height * 0.08
    spark, off = eyes.iris * 0.27, eyes.iris * 0.36
    for dx, dy, rx, ry, shade in (
        (0.0, 0.0, eyes.iris, eyes.iris, darker(colour, 0.45)),
        (0.0, 0.1 * eyes.iris, eyes.iris * 0.82, eyes.iris * 0.8, colour),
        (0.0, 0.0, eyes.iris * 0.5, eyes.iris * (0.75 if avatar.kind == "cat" else 0.5), (36, 28, 34)),
        (avatar.light * off, -off, spark, spark, (250, 250, 250)),
    ):
        layer.fill(_cut(ellipse(x + dx, y + dy, rx, ry, 26), *lids), shade)


def _cut(points: Points, x: Points, upper: Points, lower: Points) -> Points:
    """A convex shape cut by the two lids: clamping y is the exact intersection, the lids being functions of x."""
    low, high = np.interp(points[:, 0], x, upper), np.interp(points[:, 0], x, lower)
    return np.stack([np.clip(points[:, 0], x[0], x[-1]), np.clip(points[:, 1], low, np.maximum(low, high))], 1)


@dataclass(frozen=True)
class Lips:
    """The four curves of the mouth over x, about the middle of the mouth."""

    x: Points
    outer_upper: Points
    upper: Points
    lower: Points
    outer_lower: Points


def lip_curves(mouth: Mouth, pose: Pose) -> Lips:
    """The lips of this pose. Teeth part the lips a little even where `open` is small, or they would not show."""
    round_ = max(0.0, -pose.wide)
    spread = 1 + (0.2 if pose.wide > 0 else 0.46) * pose.wide - 0.06 * pose.open
    # A round mouth is an ellipse, a spread one is flatter in the middle and pointed at its corners.
    bulge = _LIP_ROUND ** (0.8 - 0.3 * round_)
    parted = pose.open + 0.13 * max(0.0, pose.teeth - 0.15) * (1 - pose.open)
    gap = parted * mouth.height * (1 + 0.15 * round_)
    corners = -(mouth.smile + 0.02 * max(0.0, pose.wide)) * (_LIP**2 - 0.35)
    upper, lower = corners - 0.28 * gap * bulge, corners + 0.72 * gap * bulge
    pout = 1 + 0.4 * round_ - 0.2 * pose.open * (1 - round_)
    notch = 1 - mouth.bow * _LIP_BOW * (1 - 0.6 * round_)
    outer_upper = upper - mouth.upper * _LIP_BODY * notch * pout
    outer_lower = lower + mouth.lower * _LIP_BODY * pout * (1 - 0.45 * _tucked(pose))
    return Lips(_LIP * mouth.width * spread, outer_upper, upper, lower, outer_lower)


def _tucked(pose: Pose) -> float:
    """How far the lower lip lies under the upper teeth: f and v, that is teeth in an almost shut, not spread mouth."""
    shut = min(1.0, max(0.0, (0.13 - pose.open) / 0.05))
    return shut * min(1.0, max(0.0, (pose.teeth - 0.4) / 0.2)) * min(1.0, max(0.0, (0.35 - pose.wide) / 0.15))


def mouth_layer(avatar: Avatar, pose: Pose) -> Layer:
    """Lips, and what shows between them."""
    layer, lips, colour = Layer(), lip_curves(avatar.mouth, pose), avatar.palette.lips
    under = float(lips.outer_lower.max()) + 0.05
    layer.fill(ellipse(0, under, float(lips.x[-1]) * 0.5, 0.024, 20), darker(_around_mouth(avatar), 0.14))
    edge = band(lips.x, lips.outer_upper, lips.outer_lower)
    layer.fill(edge, darker(colour, 0.1))
    layer.fill(band(lips.x, lips.lower, lips.outer_lower), colour)
    if float((lips.lower - lips.upper).max()) > 0.012:
        _inside(layer, lips, pose)
    layer.line(np.stack([lips.x, lips.upper], 1), darker(colour, 0.62), 0.024 if pose.open < 0.05 else 0.016)
    if avatar.outline:
        layer.line(edge, darker(colour, 0.5), avatar.outline * 0.6, True)
    return layer


def _around_mouth(avatar: Avatar) -> Colour:
    if avatar.beard in ("full", "goatee"):
        return avatar.palette.hair
    return lighter(avatar.palette.skin, 0.4) if avatar.face.snout else avatar.palette.skin


def _inside(layer: Layer, lips: Lips, pose: Pose) -> None:
    """Dark, then tongue, then both rows of teeth, each kept inside the opening by its curves."""
    gap = lips.lower - lips.upper
    most = float(gap.max())
    layer.fill(band(lips.x, lips.upper, lips.lower), _INSIDE)
    spread = 1 - 0.9 * max(0.0, -pose.wide)  # a round mouth is a dark hole
    if most > 0.09:
        flat = 0.42 * spread
        tongue = np.minimum(np.maximum(flat * most * (1 - (_LIP / 0.8) ** 2), 0), 0.5 * gap)
        layer.fill(band(lips.x, lips.lower - tongue, lips.lower), _TONGUE)
    tucked = _tucked(pose)
    share = 0.3 + 0.25 * pose.teeth + 0.45 * tucked
    row = np.minimum((0.045 + 0.06 * pose.teeth) * _LIP_INSIDE, gap * share) * spread
    layer.fill(band(lips.x, lips.upper, lips.upper + row), _TEETH)
    if pose.teeth > 0.3 and tucked < 0.5:
        row = np.minimum(0.06 * _LIP_INSIDE, gap * 0.4) * min(1.0, (pose.teeth - 0.3) * 3)
        layer.fill(band(lips.x, lips.lower - row, lips.lower), darker(_TEETH, 0.08))
