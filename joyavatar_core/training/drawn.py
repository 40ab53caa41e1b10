"""Drawn talking heads: random identities, poses that follow speech, and the rasteriser, all on OpenCV polygons.

Everything is a polygon in one of two frames. The page frame has its unit at the picture's height and its origin at
the top left; the face frame has its origin between the eyes and the mouth, its unit at half the face's height, y
down. Parts that overlap (iris under a lid, teeth behind a lip) are cut by arithmetic on their curves, never by masks:
a frame at 256x256 takes a few milliseconds.

Shape legend: T pixel frames, N points of a polygon, H W pixel size. Pictures are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import partial
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from .speech import Speech, synthesize

Image = NDArray[np.uint8]
Points = NDArray[np.float64]
Colour = tuple[float, float, float]

_SUPERSAMPLE = 2
_SHIFT = 4  # fraction bits of OpenCV's fixed-point coordinates
_INK: Colour = (38, 26, 32)

_SKINS: tuple[Colour, ...] = (
    (255, 226, 206), (246, 208, 180), (234, 188, 152), (214, 160, 120), (188, 130, 92), (150, 98, 66), (112, 72, 50),
    (82, 52, 40),
)  # fmt: skip
_HAIRS: tuple[Colour, ...] = (
    (30, 24, 26), (58, 38, 30), (96, 60, 38), (142, 92, 52), (196, 148, 84), (226, 190, 120), (168, 72, 36),
    (150, 150, 154), (222, 220, 216),
)  # fmt: skip
_IRISES: tuple[Colour, ...] = ((74, 48, 32), (110, 76, 40), (64, 110, 160), (84, 132, 84), (96, 110, 120), (60, 90, 60))
_HAIR_STYLES = ("bald", "short", "fringe", "side", "parted", "bob", "long", "bun", "curly", "spiky")
_CLOTHES = ("crew", "vee", "collar", "hood", "stripes")
_BACKGROUNDS = ("flat", "gradient", "split", "dots", "bars", "window")
_BEARDS = ("none", "none", "none", "none", "full", "goatee", "moustache", "stubble")
_NOSES = ("hook", "button", "shadow", "nostrils")
_GLASSES = ("none", "none", "none", "round", "square")


@dataclass(frozen=True)
class Pose:
    """What moves. open 0..1, wide -1..1 and teeth 0..1 as in Speech; blink 0 (open) .. 1 (shut); gaze_x, gaze_y and
    brow -1..1 (brow up positive); head_x, head_y in half face heights; roll in radians; scale about 1."""

    open: float = 0.0
    wide: float = 0.0
    teeth: float = 0.0
    blink: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    brow: float = 0.0
    head_x: float = 0.0
    head_y: float = 0.0
    roll: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Face:
    """Proportions, in half face heights."""

    width: float
    taper: float
    squareness: float
    ear: float
    nose: str
    nose_size: float
    blush: float


@dataclass(frozen=True)
class Eyes:
    """x, y: place of the centre; width, height: half sizes of the opening; tilt: outer corner up; iris: radius."""

    x: float
    y: float
    width: float
    height: float
    tilt: float
    iris: float
    lashes: float
    brow_height: float
    brow_thickness: float
    brow_tilt: float


@dataclass(frozen=True)
class Mouth:
    """y: centre; width: half width at rest; height: full opening; upper, lower: lip thickness; smile: corners up."""

    y: float
    width: float
    height: float
    upper: float
    lower: float
    smile: float
    bow: float


@dataclass(frozen=True)
class Palette:
    """RGB, 0..255."""

    skin: Colour
    lips: Colour
    hair: Colour
    iris: Colour
    cloth: Colour
    trim: Colour
    paper: Colour
    paper_2: Colour
    glasses: Colour


@dataclass(frozen=True)
class Framing:
    """size: half face height; x, y: place of the face's origin; all in picture heights (x in picture widths)."""

    size: float
    x: float
    y: float


@dataclass(frozen=True)
class Avatar:
    """Who is drawn, in what style and where. `hair`, `beard`, `glasses`, `clothes`, `background` are style names."""

    face: Face
    eyes: Eyes
    mouth: Mouth
    palette: Palette
    framing: Framing
    hair: str
    hair_volume: float
    beard: str
    glasses: str
    clothes: str
    background: str
    shoulders: float
    outline: float  # line width in half face heights; 0 for none
    shade: float  # depth of the shading, 0..1
    light: float  # side of the light, -1 or 1

    @staticmethod
    def random(seed: int) -> Avatar:
        """The identity of this seed."""
        rng = np.random.default_rng(seed)
        hair = _pick(rng, _HAIR_STYLES)
        return Avatar(
            face=_random_face(rng),
            eyes=_random_eyes(rng),
            mouth=_random_mouth(rng),
            palette=_random_palette(rng),
            framing=_random_framing(rng),
            hair=hair,
            hair_volume=rng.uniform(0.05, 0.2),
            beard="none" if hair in ("bob", "long", "bun") else _pick(rng, _BEARDS),
            glasses=_pick(rng, _GLASSES),
            clothes=_pick(rng, _CLOTHES),
            background=_pick(rng, _BACKGROUNDS),
            shoulders=rng.uniform(1.35, 1.9),
            outline=rng.uniform(0.012, 0.03) if rng.random() < 0.5 else 0.0,
            shade=rng.uniform(0.08, 0.3) if rng.random() < 0.8 else 0.0,
            light=float(rng.choice((-1, 1))),
        )


@dataclass(frozen=True)
class Clip:
    """video [T, H, W, 3] uint8 RGB; mouth, eyes [T, 4] float32 pixels x0 y0 x1 y1; poses: T of them."""

    video: Image
    speech: Speech
    mouth: NDArray[np.float32]
    eyes: NDArray[np.float32]
    poses: tuple[Pose, ...]


# Random identities


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _random_face(rng: np.random.Generator) -> Face:
    return Face(
        width=rng.uniform(0.74, 0.9),
        taper=rng.uniform(0.1, 0.34),
        squareness=rng.uniform(2.0, 2.6),
        ear=rng.uniform(0.14, 0.2),
        nose=_pick(rng, _NOSES),
        nose_size=rng.uniform(0.8, 1.25),
        blush=rng.uniform(0, 0.35) if rng.random() < 0.6 else 0.0,
    )


def _random_eyes(rng: np.random.Generator) -> Eyes:
    width = rng.uniform(0.15, 0.2)
    return Eyes(
        x=rng.uniform(0.32, 0.38),
        y=rng.uniform(-0.16, -0.06),
        width=width,
        height=width * rng.uniform(0.5, 0.8),
        tilt=rng.uniform(-0.05, 0.14),
        iris=width * rng.uniform(0.48, 0.62),
        lashes=rng.uniform(0, 1),
        brow_height=rng.uniform(0.17, 0.25),
        brow_thickness=rng.uniform(0.03, 0.075),
        brow_tilt=rng.uniform(-0.08, 0.08),
    )


def _random_mouth(rng: np.random.Generator) -> Mouth:
    return Mouth(
        y=rng.uniform(0.46, 0.53),
        width=rng.uniform(0.26, 0.34),
        height=rng.uniform(0.28, 0.36),
        upper=rng.uniform(0.035, 0.07),
        lower=rng.uniform(0.05, 0.09),
        smile=rng.uniform(-0.015, 0.055),
        bow=rng.uniform(0.15, 0.5),
    )


def _random_framing(rng: np.random.Generator) -> Framing:
    size = rng.uniform(0.2, 0.42)
    return Framing(size=size, x=0.5 + rng.normal(0, 0.03), y=0.5 + rng.uniform(-0.05, 0.06) - 0.2 * (0.42 - size))


def _any_colour(rng: np.random.Generator, low: float = 30, high: float = 240) -> Colour:
    return tuple(float(x) for x in rng.uniform(low, high, 3))  # type: ignore[return-value]


def _between(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    """A colour between two neighbours of a scale, slightly off."""
    place = rng.uniform(0, len(colours) - 1)
    mixed = _mix(colours[int(place)], colours[int(place) + 1], place % 1)
    return _clip(np.array(mixed) + rng.normal(0, 5, 3))


def _random_palette(rng: np.random.Generator) -> Palette:
    skin = _between(rng, _SKINS) if rng.random() < 0.92 else _any_colour(rng, 90)
    red: Colour = (rng.uniform(150, 215), rng.uniform(30, 90), rng.uniform(50, 100))
    return Palette(
        skin=skin,
        lips=_mix(_darker(skin, 0.12), red, rng.uniform(0.25, 0.85)),
        hair=_HAIRS[int(rng.integers(len(_HAIRS)))] if rng.random() < 0.7 else _any_colour(rng),
        iris=_IRISES[int(rng.integers(len(_IRISES)))] if rng.random() < 0.8 else _any_colour(rng, 30, 190),
        cloth=_any_colour(rng),
        trim=_any_colour(rng, 60),
        paper=_any_colour(rng, 50, 250),
        paper_2=_any_colour(rng, 50, 250),
        glasses=_INK if rng.random() < 0.6 else _any_colour(rng, 20, 180),
    )


# Colour


def _clip(values: NDArray[np.float64]) -> Colour:
    r, g, b = np.clip(values, 0, 255)
    return float(r), float(g), float(b)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    return _clip(np.array(first) * (1 - share) + np.array(second) * share)


def _darker(colour: Colour, share: float) -> Colour:
    """Shadows turn a little to blue and red, as painters have them."""
    return _mix(colour, _clip(np.array(colour) * (0.35, 0.25, 0.38)), share)


def _lighter(colour: Colour, share: float) -> Colour:
    return _mix(colour, (255, 250, 240), share)


# Rasteriser


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("drawing avatars needs OpenCV: install the package opencv-python-headless") from error
    return cv2


@dataclass(frozen=True)
class _Brush:
    """Draws in one frame: pixel = points @ matrix + offset; `unit` pixels to the unit."""

    canvas: Image
    matrix: NDArray[np.float64]
    offset: NDArray[np.float64]
    unit: float

    def fill(self, points: Points, colour: Colour) -> None:
        cv2 = _opencv()
        cv2.fillPoly(self.canvas, [self._pixels(points)], colour, cv2.LINE_AA, _SHIFT)

    def line(self, points: Points, colour: Colour, width: float, closed: bool = False) -> None:
        cv2 = _opencv()
        thickness = max(1, round(width * self.unit))
        cv2.polylines(self.canvas, [self._pixels(points)], closed, colour, thickness, cv2.LINE_AA, _SHIFT)

    def place(self, points: Points) -> Points:
        return points @ self.matrix + self.offset

    def _pixels(self, points: Points) -> NDArray[np.int32]:
        return np.round(self.place(points) * (1 << _SHIFT)).astype(np.int32)


def _page_brush(canvas: Image) -> _Brush:
    height = canvas.shape[0]
    return _Brush(canvas, np.eye(2) * height, np.zeros(2), height)


def _face_brush(canvas: Image, avatar: Avatar, pose: Pose) -> _Brush:
    height, width = canvas.shape[:2]
    unit = avatar.framing.size * height
    cos, sin = np.cos(pose.roll) * unit * pose.scale, np.sin(pose.roll) * unit * pose.scale
    offset = np.array([avatar.framing.x * width, avatar.framing.y * height])
    # The head turns about the neck, one unit below the origin.
    neck = np.array([0.0, 1.0]) * unit
    turned = np.array([[0.0, 1.0]]) @ np.array([[cos, sin], [-sin, cos]])
    offset = offset + neck - turned[0] + np.array([pose.head_x, pose.head_y]) * unit
    return _Brush(canvas, np.array([[cos, sin], [-sin, cos]]), offset, unit * pose.scale)


def _ellipse(x: float, y: float, rx: float, ry: float, count: int = 40) -> Points:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def _band(x: Points, upper: Points, lower: Points) -> Points:
    """Polygon between two curves over the same x."""
    return np.concatenate([np.stack([x, upper], 1), np.stack([x, lower], 1)[::-1]])


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


# Parts, from the back to the front


def _head(avatar: Avatar, pose: Pose, grow: float = 0.0, count: int = 72) -> Points:
    """Outline of the face, from the right side over the chin and round; the chin drops with the jaw."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    power = 2 / avatar.face.squareness
    x = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power
    y = np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** power
    below = np.maximum(y, 0)
    x = x * (avatar.face.width + grow) * (1 - avatar.face.taper * below**1.6)
    return np.stack([x, y * (1 + grow) + below**2 * (0.02 + 0.1 * pose.open)], 1)


def _paint_background(avatar: Avatar, canvas: Image) -> None:
    height, width = canvas.shape[:2]
    canvas[:] = _bytes(avatar.palette.paper)
    page, aspect, second = _page_brush(canvas), width / height, avatar.palette.paper_2
    near = _mix(avatar.palette.paper, second, 0.35)
    if avatar.background == "gradient":
        ends = np.array([[avatar.palette.paper, avatar.palette.paper_2]], np.float32).swapaxes(0, 1)
        canvas[:] = _opencv().resize(ends, (width, height), interpolation=1).astype(np.uint8)
    elif avatar.background == "split":
        page.fill(np.array([[0, 0.62], [aspect, 0.5], [aspect, 1], [0, 1]]), second)
    elif avatar.background == "dots":
        for x, y in np.argwhere(np.ones((7, 6))) / 5.0:
            page.fill(_ellipse(x * aspect + 0.1 * ((y * 5) % 2), y, 0.04, 0.04, 24), near)
    elif avatar.background == "bars":
        for x in np.arange(0, 1, 0.25) * aspect:
            page.fill(_box(x, 0, x + 0.125 * aspect, 1), near)
    elif avatar.background == "window":
        page.fill(_box(0.1 * aspect, 0.06, 0.5 * aspect, 0.6), second)
        page.line(_box(0.1 * aspect, 0.06, 0.5 * aspect, 0.6), _darker(avatar.palette.paper, 0.4), 0.02, True)
        page.line(np.array([[0.3 * aspect, 0.06], [0.3 * aspect, 0.6]]), _darker(avatar.palette.paper, 0.4), 0.014)


def _bytes(colour: Colour) -> NDArray[np.uint8]:
    return np.array(colour).round().astype(np.uint8)


def _outlined(avatar: Avatar, brush: _Brush, points: Points, colour: Colour, closed: bool = True) -> None:
    brush.fill(points, colour)
    if avatar.outline:
        brush.line(points, _darker(colour, 0.9), avatar.outline, closed)


def _paint_back_hair(avatar: Avatar, brush: _Brush) -> None:
    width, grow = avatar.face.width, avatar.hair_volume
    colour = _darker(avatar.palette.hair, 0.25)
    if avatar.hair in ("bob", "long"):
        fall = 0.75 if avatar.hair == "bob" else 1.7
        side = width + 0.12 + grow
        top = _ellipse(0, -0.2, side, 0.95 + grow)
        top = top[top[:, 1] < 0.0]
        order = np.argsort(top[:, 0])
        right = np.array([[side * 1.04, fall * 0.6], [side * 0.8, fall]])
        _outlined(avatar, brush, np.concatenate([top[order], right, right[::-1] * (-1, 1)]), colour)
    elif avatar.hair == "bun":
        _outlined(avatar, brush, _ellipse(0, -1.12 - grow, 0.34, 0.3), colour)
    elif avatar.hair == "curly":
        for angle in np.linspace(np.pi * 0.92, np.pi * 2.08, 11):
            x, y = np.cos(angle) * (width + 0.03), -0.12 + np.sin(angle) * (0.86 + grow)
            _outlined(avatar, brush, _ellipse(x, y, 0.24 + grow, 0.24 + grow, 28), colour)


def _paint_body(avatar: Avatar, brush: _Brush) -> None:
    skin, cloth = _darker(avatar.palette.skin, 0.18 + avatar.shade), avatar.palette.cloth
    half = avatar.shoulders
    _outlined(avatar, brush, np.array([[-0.34, 0.55], [0.34, 0.55], [0.37, 1.6], [-0.37, 1.6]]), skin)
    u = np.linspace(-1, 1, 33)
    shoulder = 1.22 + 0.42 * np.abs(u) ** 2.2 + 0.9 * np.maximum(np.abs(u) - 0.86, 0) * 6
    torso = np.concatenate([np.stack([u * half, shoulder], 1), [[half * 1.08, 5], [-half * 1.08, 5]]])
    _outlined(avatar, brush, torso, cloth)
    _NECKLINES[avatar.clothes](avatar, brush, skin)


def _neckline_crew(avatar: Avatar, brush: _Brush, skin: Colour) -> None:
    brush.fill(_ellipse(0, 1.2, 0.46, 0.24), avatar.palette.trim)
    brush.fill(_ellipse(0, 1.16, 0.38, 0.2), skin)


def _neckline_vee(avatar: Avatar, brush: _Brush, skin: Colour) -> None:
    brush.fill(np.array([[-0.5, 1.2], [0.5, 1.2], [0.0, 1.95]]), avatar.palette.trim)
    brush.fill(np.array([[-0.38, 1.18], [0.38, 1.18], [0.0, 1.8]]), skin)


def _neckline_collar(avatar: Avatar, brush: _Brush, skin: Colour) -> None:
    brush.fill(np.array([[-0.3, 1.1], [0.3, 1.1], [0.0, 1.62]]), skin)
    flap = np.array([[0.32, 1.06], [0.56, 1.24], [0.3, 1.68], [0.0, 1.58]])
    for side in (-1, 1):
        _outlined(avatar, brush, flap * (side, 1), avatar.palette.trim)


def _neckline_hood(avatar: Avatar, brush: _Brush, skin: Colour) -> None:
    dark = _darker(avatar.palette.cloth, 0.3)
    _outlined(avatar, brush, _ellipse(0, 1.26, 0.74, 0.34), dark)
    brush.fill(_ellipse(0, 1.17, 0.42, 0.2), skin)
    for side in (-1, 1):
        brush.line(np.array([[0.24, 1.5], [0.26, 2.1]]) * (side, 1), avatar.palette.trim, 0.035)


def _neckline_stripes(avatar: Avatar, brush: _Brush, skin: Colour) -> None:
    for y in np.arange(1.75, 3.4, 0.34):
        brush.fill(_box(-avatar.shoulders * 0.92, y, avatar.shoulders * 0.92, y + 0.15), avatar.palette.trim)
    brush.fill(_ellipse(0, 1.18, 0.4, 0.2), skin)


_NECKLINES: dict[str, Callable[[Avatar, _Brush, Colour], None]] = {
    "crew": _neckline_crew,
    "vee": _neckline_vee,
    "collar": _neckline_collar,
    "hood": _neckline_hood,
    "stripes": _neckline_stripes,
}


def _paint_head(avatar: Avatar, brush: _Brush, pose: Pose) -> None:
    skin, face = avatar.palette.skin, avatar.face
    for side in (-1, 1):
        ear = _ellipse(side * (face.width + 0.02) - 0.08 * pose.head_x, 0.0, face.ear * 0.7, face.ear * 1.3, 28)
        _outlined(avatar, brush, ear, _darker(skin, 0.1))
        brush.fill(_ellipse(side * (face.width + 0.03), 0.0, face.ear * 0.35, face.ear * 0.8, 20), _darker(skin, 0.3))
    outline = _head(avatar, pose)
    brush.fill(outline, skin)
    if avatar.shade:
        _paint_shade(avatar, brush, outline)
    if face.blush:
        for side in (-1, 1):
            blush = _ellipse(side * 0.47, 0.24, 0.17, 0.11, 28)
            brush.fill(blush, _mix(skin, (235, 80, 90), face.blush * 0.6))
    if avatar.outline:
        brush.line(outline, _darker(skin, 0.9), avatar.outline, True)


def _paint_shade(avatar: Avatar, brush: _Brush, outline: Points) -> None:
    """A crescent away from the light: the half outline against the same half drawn in."""
    for step, depth in ((0.76, 0.5), (0.87, 1.0)):
        half = outline[np.sign(outline[:, 0]) == -avatar.light]
        order = np.argsort(half[:, 1])
        inner = half[order] * (step, 1)
        crescent = np.concatenate([half[order], inner[::-1]])
        brush.fill(crescent, _darker(avatar.palette.skin, avatar.shade * depth))


def _paint_nose(avatar: Avatar, brush: _Brush, shift: Points) -> None:
    dark, size = _darker(avatar.palette.skin, 0.42), avatar.face.nose_size
    tip = shift * 1.35 + (0, 0.2)
    if avatar.face.nose == "hook":
        curve = np.array([[0.0, -0.26], [0.04, -0.1], [0.1, 0.04], [0.05, 0.09], [-0.05, 0.08]])
        brush.line(curve * (size * avatar.light, size) + tip, dark, 0.028)
    elif avatar.face.nose == "button":
        brush.fill(_ellipse(tip[0], tip[1] + 0.02, 0.11 * size, 0.085 * size, 28), _darker(avatar.palette.skin, 0.22))
        brush.fill(_ellipse(tip[0], tip[1] - 0.01, 0.08 * size, 0.055 * size, 28), _lighter(avatar.palette.skin, 0.16))
    elif avatar.face.nose == "shadow":
        wedge = np.array([[0.0, -0.3], [0.13, 0.06], [0.06, 0.1], [-0.1, 0.08]])
        brush.fill(wedge * (-size * avatar.light, size) + tip, _darker(avatar.palette.skin, 0.22))
    else:
        for side in (-1, 1):
            brush.fill(_ellipse(tip[0] + side * 0.06 * size, tip[1] + 0.05, 0.03, 0.02, 16), dark)
        brush.line(_ellipse(tip[0], tip[1] - 0.01, 0.12 * size, 0.09 * size)[4:17], dark, 0.022)


def _lids(eyes: Eyes, blink: float, u: Points) -> tuple[Points, Points]:
    """Heights of the upper and the lower lid over u in [-1, 1]; they meet at blink 1."""
    lower = eyes.height * 0.72 * (1 - u * u)
    upper = -eyes.height * (1 - np.abs(u) ** 2.4)
    shut = lower * 0.75
    return upper + (shut - upper) * blink, lower + (shut - lower) * blink


def _paint_eye(avatar: Avatar, brush: _Brush, pose: Pose, side: int, shift: Points) -> None:
    eyes, skin = avatar.eyes, avatar.palette.skin
    u = np.linspace(-1, 1, 21)
    upper, lower = _lids(eyes, pose.blink, u)
    lean = -eyes.tilt * u * side * eyes.width
    x = u * eyes.width
    at = partial(_moved, by=shift + np.array([side * eyes.x, eyes.y]))
    socket = _band(x, -eyes.height * 1.18 * (1 - np.abs(u) ** 2.4) + lean, lower + lean)
    brush.fill(at(socket), _darker(skin, 0.14))
    if pose.blink < 0.93:
        brush.fill(at(_band(x, upper + lean, lower + lean)), (250, 248, 246))
        _paint_iris(avatar, brush, pose, partial(_cut, x=x, upper=upper + lean, lower=lower + lean), at)
    lid = np.stack([x, upper + lean], 1)
    brush.line(at(lid), _INK, 0.026 + 0.02 * eyes.lashes)
    brush.line(at(np.stack([x, lower + lean], 1)[3:-3]), _darker(skin, 0.45), 0.014)
    if eyes.lashes > 0.6:
        outer = lid[-1] if side > 0 else lid[0]
        brush.line(at(np.stack([outer, outer + np.array([side * 0.05, -0.045])])), _INK, 0.032)


def _moved(points: Points, by: Points) -> Points:
    return points + by


def _cut(points: Points, x: Points, upper: Points, lower: Points) -> Points:
    """A convex shape cut by the two lids: clamping y is the exact intersection, the lids being functions of x."""
    low, high = np.interp(points[:, 0], x, upper), np.interp(points[:, 0], x, lower)
    return np.stack([np.clip(points[:, 0], x[0], x[-1]), np.clip(points[:, 1], low, np.maximum(low, high))], 1)


def _paint_iris(
    avatar: Avatar, brush: _Brush, pose: Pose, cut: Callable[[Points], Points], at: Callable[[Points], Points]
) -> None:
    eyes, colour = avatar.eyes, avatar.palette.iris
    x, y = pose.gaze_x * eyes.width * 0.4, pose.gaze_y * eyes.height * 0.4 - eyes.height * 0.1
    brush.fill(at(cut(_ellipse(x, y, eyes.iris, eyes.iris, 36))), _darker(colour, 0.55))
    brush.fill(at(cut(_ellipse(x, y, eyes.iris * 0.84, eyes.iris * 0.84, 36))), colour)
    brush.fill(at(cut(_ellipse(x, y + eyes.iris * 0.35, eyes.iris * 0.6, eyes.iris * 0.4, 24))), _lighter(colour, 0.3))
    brush.fill(at(cut(_ellipse(x, y, eyes.iris * 0.46, eyes.iris * 0.46, 28))), (18, 14, 18))
    spark, off = eyes.iris * 0.26, eyes.iris * 0.36
    brush.fill(at(cut(_ellipse(x + avatar.light * off, y - off, spark, spark, 16))), (255, 255, 255))


def _paint_brow(avatar: Avatar, brush: _Brush, pose: Pose, side: int, shift: Points) -> None:
    eyes = avatar.eyes
    u = np.linspace(-1, 1, 15)
    arch = -0.05 * (1 - u * u) - eyes.brow_tilt * u * side
    thick = eyes.brow_thickness * (1 - 0.35 * (u * side + 1) / 2) * np.sqrt(np.maximum(1 - np.abs(u) ** 4, 0.04))
    y = eyes.y - eyes.brow_height - 0.07 * pose.brow + arch
    shape = _band(u * eyes.width * 1.25, y - thick / 2, y + thick / 2)
    colour = _darker(avatar.palette.hair, 0.35)
    brush.fill(shape + shift + (side * eyes.x * 1.04, 0), colour)


@dataclass(frozen=True)
class _Lips:
    """The four curves of the mouth over x, face frame."""

    x: Points
    outer_upper: Points
    upper: Points
    lower: Points
    outer_lower: Points


def _lip_curves(mouth: Mouth, pose: Pose) -> _Lips:
    u = np.linspace(-1, 1, 37)
    spread = 1 + (0.2 if pose.wide > 0 else 0.42) * pose.wide - 0.06 * pose.open
    round_ = max(0.0, -pose.wide)
    # A round mouth is an ellipse, a spread one is flatter in the middle and pointed at its corners.
    bulge = np.maximum(1 - u * u, 0) ** (0.8 - 0.3 * round_)
    gap = pose.open * mouth.height * (1 + 0.12 * round_)
    corners = -(mouth.smile + 0.02 * max(0.0, pose.wide)) * (u * u - 0.35)
    upper, lower = corners - 0.28 * gap * bulge, corners + 0.72 * gap * bulge
    body = np.maximum(1 - u * u, 0) ** 0.62
    notch = 1 - mouth.bow * np.exp(-((u / 0.2) ** 2)) * (1 - 0.6 * round_)
    pout = 1 + 0.35 * round_ - 0.2 * pose.open * (1 - round_)
    outer_upper = upper - mouth.upper * body * notch * pout
    outer_lower = lower + mouth.lower * body * pout
    return _Lips(u * mouth.width * spread, outer_upper, upper, lower, outer_lower)


def _paint_mouth(avatar: Avatar, brush: _Brush, pose: Pose, shift: Points) -> None:
    lips, colour = _lip_curves(avatar.mouth, pose), avatar.palette.lips
    at = partial(_moved, by=shift + np.array([0, avatar.mouth.y]))
    under = np.array([0, float(lips.outer_lower.max()) + 0.055])
    brush.fill(at(_ellipse(0, 0, float(lips.x[-1]) * 0.5, 0.022, 24) + under), _darker(avatar.palette.skin, 0.2))
    brush.fill(at(_band(lips.x, lips.outer_upper, lips.upper)), _darker(colour, 0.2))
    brush.fill(at(_band(lips.x, lips.lower, lips.outer_lower)), colour)
    shine = slice(12, 25)
    mid = lips.lower * 0.45 + lips.outer_lower * 0.55
    brush.line(at(np.stack([lips.x, mid], 1)[shine]), _lighter(colour, 0.25), 0.018)
    if float((lips.lower - lips.upper).max()) > 0.012:
        _paint_inside(brush, lips, pose, at)
    rim = np.stack([lips.x, lips.upper], 1)
    brush.line(at(rim), _darker(colour, 0.8), 0.016)
    if avatar.outline:
        edge = _band(lips.x, lips.outer_upper, lips.outer_lower)
        brush.line(at(edge), _darker(colour, 0.75), avatar.outline * 0.7, True)


def _paint_inside(brush: _Brush, lips: _Lips, pose: Pose, at: Callable[[Points], Points]) -> None:
    """Dark, then tongue, then both rows of teeth, each kept inside the opening by its curves."""
    gap = lips.lower - lips.upper
    brush.fill(at(_band(lips.x, lips.upper, lips.lower)), (58, 14, 24))
    u = lips.x / lips.x[-1]
    tongue = np.maximum(0.5 * gap.max() * (1 - (u / 0.8) ** 2), 0) if gap.max() > 0.08 else np.zeros_like(u)
    brush.fill(at(_band(lips.x, lips.lower - np.minimum(tongue, 0.5 * gap), lips.lower)), (196, 84, 92))
    bottom = float(lips.lower.max())
    brush.line(at(np.array([[0, bottom - 0.3 * float(gap.max())], [0, bottom]])), (160, 60, 72), 0.012)
    inside = np.clip((1 - np.abs(u)) * 9, 0, 1)
    row = np.minimum((0.045 + 0.05 * pose.teeth) * inside, gap * (0.34 + 0.2 * pose.teeth))
    brush.fill(at(_band(lips.x, lips.upper, lips.upper + row)), (250, 247, 240))
    if pose.teeth > 0.3:
        row = np.minimum(0.05 * inside, gap * 0.42) * min(1.0, (pose.teeth - 0.3) * 3)
        brush.fill(at(_band(lips.x, lips.lower - row, lips.lower)), (236, 231, 222))


def _paint_beard(avatar: Avatar, brush: _Brush, pose: Pose, shift: Points) -> None:
    style, mouth = avatar.beard, avatar.mouth
    if style == "none":
        return
    share = 0.3 if style == "stubble" else 1.0
    colour = _mix(avatar.palette.skin, _darker(avatar.palette.hair, 0.15), share)
    if style in ("full", "stubble"):
        outline = _head(avatar, pose, grow=0.03 if style == "full" else 0.0)
        jaw = outline[outline[:, 1] > 0.12]
        jaw = jaw[np.argsort(jaw[:, 0])]
        top = 0.3 + 0.06 * np.cos(np.linspace(-np.pi, np.pi, 25)) - 0.14 * np.abs(np.linspace(-1, 1, 25)) ** 4
        inner = np.stack([np.linspace(jaw[-1, 0], jaw[0, 0], 25), top], 1) + shift * (0.5, 0.5)
        brush.fill(np.concatenate([_chin_order(jaw), inner]), colour)
    if style == "goatee":
        brush.fill(_ellipse(0, mouth.y + 0.17 + 0.2 * pose.open, mouth.width * 0.9, 0.3, 32) + shift, colour)
    if style in ("moustache", "goatee"):
        u = np.linspace(-1, 1, 21)
        top = mouth.y - mouth.upper - 0.14 - 0.08 * pose.open + 0.1 * np.abs(u) ** 1.5
        brush.fill(_band(u * mouth.width * 1.15, top, top + 0.1 * (1.05 - np.abs(u))) + shift, colour)


def _chin_order(jaw: Points) -> Points:
    """Jaw points from the left ear round the chin to the right ear."""
    angle = np.arctan2(jaw[:, 1], jaw[:, 0])
    return jaw[np.argsort(-angle)]


_HAIRLINES: dict[str, Callable[[Points], Points]] = {
    "short": lambda u: -0.62 + 0.34 * np.abs(u) ** 3,
    "fringe": lambda u: -0.42 + 0.12 * np.abs(u) ** 4 + 0.03 * np.cos(u * 9),
    "side": lambda u: -0.52 - 0.2 * u + 0.32 * np.abs(u) ** 4,
    "parted": lambda u: -0.76 + 0.55 * np.abs(u) ** 1.2,
    "bob": lambda u: -0.42 + 0.3 * np.abs(u) ** 5,
    "long": lambda u: -0.74 + 0.62 * np.abs(u) ** 1.4,
    "bun": lambda u: -0.7 + 0.42 * np.abs(u) ** 2.2,
    "curly": lambda u: -0.56 + 0.1 * np.abs(np.sin(u * 7)) + 0.24 * np.abs(u) ** 3,
    "spiky": lambda u: -0.58 + 0.16 * np.abs((u * 3.5) % 1 - 0.5) + 0.26 * np.abs(u) ** 3,
}


def _paint_front_hair(avatar: Avatar, brush: _Brush) -> None:
    if avatar.hair == "bald":
        return
    grow, width = 0.04 + avatar.hair_volume, avatar.face.width
    angle = np.linspace(np.pi, 2 * np.pi, 45)
    lift = np.zeros(45) if avatar.hair != "spiky" else 0.16 * np.abs((np.linspace(0, 6.99, 45) % 1) - 0.5) * 2
    x = np.cos(angle) * (width + 0.05 + 0.35 * grow)
    cap = np.stack([x, -0.14 + np.sin(angle) * (0.88 + grow + lift)], 1)
    u = np.linspace(1, -1, 45)
    # Whatever the style, the line runs down to the ears, or the background would show at the temples.
    down = np.abs(u) ** 12
    line = np.stack([u * (width - 0.02), _HAIRLINES[avatar.hair](u * avatar.light) * (1 - down) - 0.06 * down], 1)
    _outlined(avatar, brush, np.concatenate([cap, line]), avatar.palette.hair)
    gloss = cap[8:20] * (0.8, 0.9) if avatar.light < 0 else cap[25:37] * (0.8, 0.9)
    brush.line(gloss + np.array([0, 0.02]), _lighter(avatar.palette.hair, 0.14), 0.05)


def _paint_glasses(avatar: Avatar, brush: _Brush, shift: Points) -> None:
    if avatar.glasses == "none":
        return
    eyes, colour = avatar.eyes, avatar.palette.glasses
    radius = eyes.x * 0.78
    for side in (-1, 1):
        rim = _ellipse(0, 0, radius, radius * 0.95, 40)
        if avatar.glasses == "square":
            rim = np.sign(rim) * (np.abs(rim) / radius) ** 0.45 * radius * (1, 0.8)
        centre = shift + np.array([side * eyes.x, eyes.y + 0.01])
        brush.line(rim + centre, colour, 0.034, True)
        hinge = centre + np.array([side * radius, -0.02])
        brush.line(np.array([hinge, [side * (avatar.face.width + 0.02), -0.1]]), colour, 0.03)
    inner = eyes.x - radius
    brush.line(np.array([[-inner, -0.02], [0, -0.045], [inner, -0.02]]) + shift + (0, eyes.y), colour, 0.03)


# Pictures


def draw(avatar: Avatar, pose: Pose, size: tuple[int, int] = (256, 256)) -> Image:
    """The avatar in this pose: uint8 [H, W, 3] RGB for size (H, W). Raises ValueError for sizes under 16."""
    height, width = size
    if height < 16 or width < 16:
        raise ValueError(f"size {height}x{width} is too small to draw a face: use at least 16x16")
    canvas = np.empty((height * _SUPERSAMPLE, width * _SUPERSAMPLE, 3), np.uint8)
    _paint_background(avatar, canvas)
    _paint_person(avatar, pose, canvas)
    cv2 = _opencv()
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _features(pose: Pose) -> Points:
    """A head that moves aside also turns: its features move further than its outline."""
    return np.array([0.55 * pose.head_x, 0.45 * pose.head_y])


def _paint_person(avatar: Avatar, pose: Pose, canvas: Image) -> None:
    head = _face_brush(canvas, avatar, pose)
    body = _face_brush(canvas, avatar, Pose(head_x=pose.head_x * 0.25, head_y=pose.head_y * 0.3))
    shift = _features(pose)
    _paint_back_hair(avatar, head)
    _paint_body(avatar, body)
    _paint_head(avatar, head, pose)
    _paint_beard(avatar, head, pose, shift)
    _paint_nose(avatar, head, shift)
    for side in (-1, 1):
        _paint_eye(avatar, head, pose, side, shift)
    _paint_mouth(avatar, head, pose, shift)
    _paint_front_hair(avatar, head)
    for side in (-1, 1):
        _paint_brow(avatar, head, pose, side, shift)
    _paint_glasses(avatar, head, shift)


def boxes(avatar: Avatar, pose: Pose, size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes of the mouth (wide open) and of both eyes with brows: [4] pixels x0 y0 x1 y1, unclipped."""
    brush = _face_brush(np.empty((*size, 3), np.uint8), avatar, pose)
    shift, mouth, eyes = _features(pose), avatar.mouth, avatar.eyes
    half = mouth.width * 1.3
    around_mouth = _box(-half, mouth.y - 0.2, half, mouth.y + mouth.height * 0.72 + 0.16) + shift
    side = eyes.x + eyes.width * 1.2
    around_eyes = _box(-side, eyes.y - eyes.brow_height - 0.12, side, eyes.y + eyes.height + 0.05) + shift
    return _extent(brush.place(around_mouth)), _extent(brush.place(around_eyes))


def _extent(points: Points) -> NDArray[np.float32]:
    return np.concatenate([points.min(0), points.max(0)]).astype(np.float32)


# Motion


def _sway(rng: np.random.Generator, frames: int, fps: float, seconds: float) -> NDArray[np.float64]:
    """[T] smooth noise of unit deviation with this correlation time; sums of sines do not depend on T."""
    time = np.arange(frames) / fps
    hz = rng.uniform(0.25, 1.0, 6) / seconds
    phase = rng.uniform(0, 2 * np.pi, 6)
    return np.sin(2 * np.pi * hz * time[:, None] + phase).sum(1) / np.sqrt(3)


def _blinks(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.float64]:
    """[T] about 15 blinks a minute, a third of a second each."""
    time, out = np.arange(frames) / fps, np.zeros(frames)
    at = rng.uniform(0, 4)
    while at < frames / fps:
        out = np.maximum(out, np.clip(1.6 - np.abs(time - at) / 0.09, 0, 1))
        at += 0.6 + rng.exponential(3.4)
    return out


def _glances(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.float64]:
    """[T, 2] gaze that rests and jumps, mostly to the viewer."""
    out = np.zeros((frames, 2))
    at = 0.0
    while at < frames:
        target = rng.normal(0, 0.5, 2) if rng.random() < 0.5 else rng.normal(0, 0.08, 2)
        out[int(at) :] = np.clip(target, -1, 1)
        at += max(1.0, rng.uniform(0.5, 2.5) * fps)
    return out


def motion(seed: int, speech: Speech, frames: int) -> tuple[Pose, ...]:
    """Poses of `frames` frames: lips from the speech (its last frame is held), head, eyes and brows of their own.

    The head sways slowly and nods a little with stress; brows rise with stress.
    """
    rng = np.random.default_rng(seed)
    fps = float(speech.fps)
    at = np.minimum(np.arange(frames), len(speech.open) - 1)
    stress, lively = speech.stress[at], rng.uniform(0.6, 1.3)
    sway = lively * np.stack([_sway(rng, frames, fps, s) for s in (1.8, 1.8, 2.2, 2.6, 1.5)])
    gaze, blink = _glances(rng, frames, fps), _blinks(rng, frames, fps)
    columns = np.stack(
        [
            *(speech.open[at], speech.wide[at], speech.teeth[at], blink, gaze[:, 0], gaze[:, 1]),
            np.clip(0.25 * sway[4] + 0.7 * stress, -1, 1),
            *(0.05 * sway[0], 0.022 * sway[1] + 0.02 * stress, 0.035 * sway[2], 1 + 0.018 * sway[3]),
        ],
        axis=1,
    )
    assert columns.shape[1] == len(fields(Pose))
    return tuple(Pose(*map(float, row)) for row in columns)


def sample_clip(
    seed: int, frames: int, size: tuple[int, int] = (256, 256), fps: Fraction | float = 16, photo: bool = False
) -> Clip:
    """A random person saying random things: see Clip. `photo` gives the soft look of a photograph."""
    speech = synthesize(seed, frames / float(fps), fps)
    avatar = Avatar.random(seed)
    if photo:
        avatar = replace(avatar, outline=0.0, shade=max(avatar.shade, 0.2))
    poses = motion(seed, speech, frames)
    video, mouth, eyes = render(avatar, poses, size)
    return Clip(photo_like(seed, video) if photo else video, speech, mouth, eyes, poses)


def render(
    avatar: Avatar, poses: tuple[Pose, ...], size: tuple[int, int]
) -> tuple[Image, NDArray[np.float32], NDArray[np.float32]]:
    """video [T, H, W, 3] uint8 and the boxes [T, 4] of mouth and eyes (see `boxes`)."""
    found = [boxes(avatar, pose, size) for pose in poses]
    video = np.stack([draw(avatar, pose, size) for pose in poses])
    return video, np.stack([mouth for mouth, _ in found]), np.stack([eyes for _, eyes in found])


def photo_like(seed: int, video: Image) -> Image:
    """Soft gradients in place of flat fills, uneven light, a colour cast and grain: [T, H, W, 3] in and out."""
    rng, cv2 = np.random.default_rng(seed), _opencv()
    height, width = video.shape[1:3]
    spread, share = rng.uniform(0.015, 0.05) * height, rng.uniform(0.3, 0.6)
    light = cv2.resize(rng.uniform(0.6, 1.25, (3, 3, 1)).astype(np.float32), (width, height), interpolation=2)
    tint = (light[..., None] * rng.uniform(0.85, 1.12, 3)).astype(np.float32)
    gamma, grain, sharp = rng.uniform(0.8, 1.25), rng.uniform(0, 5), rng.uniform(0.3, 0.9)
    out = np.empty_like(video)
    for t, frame in enumerate(video.astype(np.float32)):
        frame = cv2.GaussianBlur(frame, (0, 0), sharp)
        soft = cv2.resize(frame, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        soft = cv2.resize(cv2.GaussianBlur(soft, (0, 0), spread / 4), (width, height))
        mixed = np.clip((frame * (1 - share) + soft * share) * tint / 255, 0, 1) ** gamma * 255
        out[t] = np.clip(mixed + grain * rng.standard_normal((height, width, 1), np.float32), 0, 255)
    return out


# Textures


def texture(seed: int, size: tuple[int, int] = (256, 256)) -> Image:
    """A picture of no face, uint8 [H, W, 3]: dead leaves, 1/f noise, stripes, blobs or blurred fields of colour."""
    rng = np.random.default_rng(seed)
    kinds = (_leaves, _cloud, _stripes, _blobs, _fields)
    return kinds[rng.choice(5, p=(0.4, 0.2, 0.12, 0.14, 0.14))](rng, size)


def _leaves(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    """Dead leaves: shapes of all sizes over one another have the statistics of natural pictures."""
    height, width = size
    canvas = _fields(rng, (height * 2, width * 2))
    page = _page_brush(canvas)
    for radius in np.sort(np.exp(rng.uniform(np.log(0.01), np.log(0.35), rng.integers(40, 130))))[::-1]:
        corners = int(rng.choice((3, 4, 5, 6, 24)))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, 24)
        shape = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.3, 1)], 1) * radius
        turn = rng.uniform(0, np.pi)
        spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        page.fill(shape @ spin + rng.uniform(0, 1, 2) * (width / height, 1), _any_colour(rng, 0, 255))
    small = _opencv().resize(canvas, (width, height), interpolation=_opencv().INTER_AREA).astype(np.float32)
    shading = _spectrum(rng, size, rng.uniform(1.2, 2.0))[..., None] * rng.uniform(0, 30)
    return np.clip(small + shading, 0, 255).astype(np.uint8)


def _spectrum(rng: np.random.Generator, size: tuple[int, int], slope: float) -> NDArray[np.float32]:
    """[H, W] noise of spectrum 1/f^slope and unit deviation."""
    height, width = size
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal(size)) / f**slope
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, size)
    return (noise / max(float(noise.std()), 1e-9)).astype(np.float32)


def _cloud(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    slope = rng.uniform(1.0, 2.0)
    shared = _spectrum(rng, size, slope)
    planes = [0.7 * shared + 0.5 * _spectrum(rng, size, slope) for _ in range(3)]
    base = np.array(_any_colour(rng, 60, 200))
    return np.clip(np.stack(planes, 2) * rng.uniform(20, 60) + base, 0, 255).astype(np.uint8)


def _stripes(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    y, x = np.mgrid[: size[0], : size[1]]
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(6), np.log(60)))
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle) + 6 * _spectrum(rng, size, 2.0)) * 2 * np.pi / period)
    share = (0.5 + 0.5 * np.tanh(wave * rng.uniform(0.5, 6)))[..., None]
    first, second = np.array(_any_colour(rng, 0, 255)), np.array(_any_colour(rng, 0, 255))
    return (first * share + second * (1 - share)).astype(np.uint8)


def _blobs(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    y, x = np.mgrid[: size[0], : size[1]] / float(size[0])
    out = np.full((*size, 3), _any_colour(rng, 20, 220), np.float32)
    for _ in range(rng.integers(5, 16)):
        cx, cy = rng.uniform(0, 1, 2)
        share = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * rng.uniform(0.02, 0.2) ** 2))[..., None]
        out += (np.array(_any_colour(rng, 0, 255)) - out) * share * rng.uniform(0.4, 1)
    return out.clip(0, 255).astype(np.uint8)


def _fields(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    cells = rng.integers(2, 7)
    small = rng.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
    return _opencv().resize(small, size[::-1], interpolation=1).clip(0, 255).astype(np.uint8)
