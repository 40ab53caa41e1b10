"""Hair, beards, glasses, hats and clothes: layers made once for an avatar.

Shape legend: N points of a curve. Lengths are in half face heights, y down, the origin between eyes and mouth.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .avatar import Avatar
from .colours import Colour, darker, lighter, mix
from .face import head_outline
from .layers import Layer, Points, band, box, curve, ellipse, mirrored

# Hair

_U = np.linspace(1, -1, 45)
_FALLS = {"bob": 0.72, "long": 1.75, "wavy": 1.45}

_HAIRLINES: dict[str, Callable[[Points], Points]] = {
    "buzz": lambda u: -0.66 + 0.2 * np.abs(u) ** 3,
    "short": lambda u: -0.62 + 0.34 * np.abs(u) ** 3,
    "fringe": lambda u: -0.42 + 0.12 * np.abs(u) ** 4 + 0.03 * np.cos(u * 9),
    "side": lambda u: -0.54 - 0.2 * u + 0.32 * np.abs(u) ** 4,
    "swept": lambda u: -0.6 + 0.16 * np.sin(2.2 * u) + 0.3 * np.abs(u) ** 4,
    "parted": lambda u: -0.76 + 0.55 * np.abs(u) ** 1.2,
    "bob": lambda u: -0.42 + 0.3 * np.abs(u) ** 5,
    "long": lambda u: -0.74 + 0.62 * np.abs(u) ** 1.4,
    "wavy": lambda u: -0.66 - 0.16 * u + 0.5 * np.abs(u) ** 1.8,
    "bun": lambda u: -0.7 + 0.42 * np.abs(u) ** 2.2,
    "pigtails": lambda u: -0.46 + 0.06 * np.cos(6 * u) + 0.24 * np.abs(u) ** 4,
    "ponytail": lambda u: -0.66 - 0.12 * u + 0.4 * np.abs(u) ** 2,
    "braids": lambda u: -0.74 + 0.6 * np.abs(u) ** 1.3,
    "curly": lambda u: -0.56 + 0.07 * np.abs(np.sin(u * 7)) + 0.24 * np.abs(u) ** 3,
    "afro": lambda u: -0.6 + 0.03 * np.cos(u * 12) + 0.26 * np.abs(u) ** 3,
    "spiky": lambda u: -0.56 + 0.14 * np.abs((u * 3) % 1 - 0.5) + 0.26 * np.abs(u) ** 3,
    "mohawk": lambda u: -0.7 + 0.2 * np.abs(u) ** 2,
}


def back_hair(avatar: Avatar) -> Layer:
    """Behind head and body."""
    layer, colour = Layer(avatar.outline), darker(avatar.palette.hair, 0.22)
    side = avatar.face.width + 0.12 + avatar.hair_volume
    painter = _BACKS.get(avatar.hair)
    if avatar.hair in _FALLS:
        _falling(layer, avatar, colour, side)
    elif painter:
        painter(layer, avatar, colour, side)
    return layer


def _falling(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    fall, wave = _FALLS[avatar.hair], 0.07 if avatar.hair == "wavy" else 0.0
    y = np.linspace(-0.2, fall, 24)
    edge = side * (1 + 0.06 * np.sin((y + 0.2) / (fall + 0.2) * np.pi)) + wave * np.sin(7 * y)
    angle = np.linspace(0, np.pi, 30)[1:-1]
    top = np.stack([side * np.cos(angle), -0.2 - (0.75 + avatar.hair_volume) * np.sin(angle)], 1)
    right = np.stack([edge, y], 1)[::-1]
    left = np.stack([-edge, y], 1)
    foot = np.array([[-edge[-1] * 0.8, fall + 0.08], [0, fall + 0.1], [edge[-1] * 0.8, fall + 0.08]])
    layer.shape(np.concatenate([right, top, left, foot]), colour)


def _back_bun(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    layer.shape(ellipse(0.1 * avatar.light, -1.12 - avatar.hair_volume, 0.34, 0.3, 32), colour)


def _back_pigtails(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    for sign in (-1, 1):
        tail = curve(
            [(0.8, -0.5), (1.12, -0.56), (1.32, -0.1), (1.26, 0.4), (1.08, 0.62), (0.98, 0.1), (0.8, -0.3)], 36
        )
        layer.shape(mirrored(tail, sign), colour)
        layer.fill(ellipse(sign * 0.95, -0.46, 0.11, 0.13, 20), avatar.palette.trim)


def _back_braids(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    for sign in (-1, 1):
        for i in range(5):
            layer.shape(ellipse(sign * (side - 0.12 + 0.02 * i), 0.35 + 0.27 * i, 0.17, 0.19, 24), colour)
        layer.fill(ellipse(sign * (side - 0.03), 1.62, 0.1, 0.08, 20), avatar.palette.trim)


def _back_ponytail(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    tail = [(0.5, -0.95), (0.95, -1.0), (1.22, -0.5), (1.24, 0.2), (1.1, 0.75), (0.95, 0.2), (0.8, -0.4)]
    layer.shape(mirrored(curve(tail, 36), -avatar.light), colour)


def _back_curly(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    size = 0.24 + avatar.hair_volume
    for angle in np.linspace(np.pi * 0.92, np.pi * 2.08, 11):
        x, y = np.cos(angle) * (avatar.face.width + 0.03), -0.12 + np.sin(angle) * (0.86 + avatar.hair_volume)
        layer.shape(ellipse(x, y, size, size, 24), colour)


def _back_afro(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    bump = 1 + 0.03 * np.abs(np.sin(9 * angle))
    x = np.cos(angle) * (avatar.face.width + 0.3 + avatar.hair_volume) * bump
    layer.shape(np.stack([x, -0.32 + np.sin(angle) * (0.95 + avatar.hair_volume) * bump], 1), colour)


_BACKS: dict[str, Callable[[Layer, Avatar, Colour, float], None]] = {
    "bun": _back_bun,
    "pigtails": _back_pigtails,
    "braids": _back_braids,
    "ponytail": _back_ponytail,
    "curly": _back_curly,
    "afro": _back_afro,
}


def front_hair(avatar: Avatar) -> Layer:
    """Over the forehead."""
    layer = Layer(avatar.outline)
    if avatar.hair == "bald":
        _bald(layer, avatar)
        return layer
    cap, line = _cap(avatar), _hairline(avatar)
    colour = avatar.palette.hair
    if avatar.hair in ("buzz", "mohawk"):
        colour = mix(colour, avatar.palette.skin, 0.35 if avatar.hair == "buzz" else 0.65)
    layer.shape(np.concatenate([cap, line]), colour)
    if avatar.hair == "mohawk":
        crest = [(-0.26, -0.62), (-0.3, -1.1), (-0.12, -1.42), (0.12, -1.42), (0.3, -1.1), (0.26, -0.62), (0, -0.5)]
        layer.shape(curve(crest, 32), avatar.palette.hair)
    gloss = cap[9:20] if avatar.light < 0 else cap[25:36]
    for width, share in ((0.12, 0.06), (0.06, 0.13)):
        layer.line(gloss * (0.84, 0.9), lighter(colour, share), width)
    return layer


def _bald(layer: Layer, avatar: Avatar) -> None:
    """A ring of grey for the old, nothing for others."""
    if avatar.kind == "human" and avatar.face.age == "old":
        for side in (-1, 1):
            tuft = curve([(0.8, -0.42), (1.0, -0.34), (1.02, 0.02), (0.9, 0.16), (0.84, -0.1), (0.8, -0.42)], 24)
            layer.shape(mirrored(tuft * (avatar.face.width / 0.86, 1), side), avatar.palette.hair)


def _cap(avatar: Avatar) -> Points:
    """The outer edge of the hair from ear to ear."""
    grow, width = 0.04 + avatar.hair_volume, avatar.face.width
    grow = 0.015 if avatar.hair in ("buzz", "mohawk") else grow
    angle = np.linspace(np.pi, 2 * np.pi, 45)
    lift = np.zeros(45)
    if avatar.hair == "spiky":
        lift = 0.17 * np.abs((np.linspace(0, 5.99, 45) % 1) - 0.5) * 2
    if avatar.hair == "swept":
        lift = 0.16 * np.exp(-((np.cos(angle) * avatar.light - 0.35) ** 2) / 0.2)
    x = np.cos(angle) * (width + 0.05 + 0.35 * grow)
    return np.stack([x, -0.14 + np.sin(angle) * (0.88 + grow + lift)], 1)


def _hairline(avatar: Avatar) -> Points:
    """Back from ear to ear over the forehead; it runs down to the ears, or the background would show at the temples."""
    down = np.abs(_U) ** 12
    line = _HAIRLINES[avatar.hair](_U * avatar.light) * (1 - down) - 0.06 * down
    return np.stack([_U * (avatar.face.width - 0.02), line], 1)


# Beards: painted with the jaw


def beard(avatar: Avatar) -> Layer:
    """What grows on the jaw."""
    layer, mouth = Layer(), avatar.mouth
    colour = darker(avatar.palette.hair, 0.1)
    if avatar.beard == "stubble":
        colour = darker(avatar.palette.skin, 0.16)
    if avatar.beard in ("full", "stubble"):
        outline = head_outline(avatar, grow=0.04 if avatar.beard == "full" else 0.0)
        jaw = outline[outline[:, 1] > 0.12]
        jaw = jaw[np.argsort(np.arctan2(jaw[:, 1], jaw[:, 0]))]
        u = np.linspace(-1, 1, 25)
        top = mouth.y - 0.16 + 0.03 * np.cos(np.pi * u) - 0.16 * np.abs(u) ** 4
        layer.fill(np.concatenate([jaw, np.stack([u * -jaw[-1, 0], top], 1)]), colour)
    elif avatar.beard == "goatee":
        layer.fill(ellipse(0, mouth.y + 0.2, mouth.width * 0.95, 0.34, 32), colour)
    return layer


def moustache(avatar: Avatar) -> Layer:
    """Above the upper lip."""
    layer, mouth = Layer(), avatar.mouth
    if avatar.beard in ("moustache", "goatee", "full"):
        u = np.linspace(-1, 1, 21)
        top = mouth.y - mouth.upper - 0.14 + 0.1 * np.abs(u) ** 1.5
        shape = band(u * mouth.width * 1.12, top, top + 0.1 * (1.05 - np.abs(u)))
        layer.fill(shape, darker(avatar.palette.hair, 0.1 if avatar.beard != "full" else 0.2))
    return layer


# Worn on the head


def glasses(avatar: Avatar) -> Layer:
    """Rims, bridge and arms."""
    layer, eyes, colour = Layer(), avatar.eyes, avatar.palette.glasses
    if avatar.glasses == "none":
        return layer
    radius = min(eyes.x * 0.84, max(eyes.width * 1.3, 0.24))
    for side in (-1, 1):
        rim = ellipse(0, 0, radius, radius * 0.95, 36)
        if avatar.glasses == "square":
            rim = np.sign(rim) * (np.abs(rim) / radius) ** 0.45 * radius * (1, 0.82)
        centre = np.array([side * eyes.x, eyes.y + 0.01])
        layer.line(rim + centre, colour, 0.034, True)
        hinge = centre + np.array([side * radius, -0.02])
        layer.line(np.array([hinge, [side * avatar.face.width, -0.08]]), colour, 0.03)
    inner = eyes.x - radius
    bridge = [[-inner, eyes.y - 0.02], [0, eyes.y - 0.04], [inner, eyes.y - 0.02]]
    layer.line(np.array(bridge), colour, 0.032)
    return layer


def hat(avatar: Avatar) -> Layer:
    """Over everything on the head; earrings too."""
    layer = Layer(avatar.outline)
    if avatar.earrings:
        for side in (-1, 1):
            layer.shape(ellipse(side * (avatar.face.width + 0.04), 0.32, 0.055, 0.07, 18), (236, 200, 110))
    if avatar.hat != "none":
        _HATS[avatar.hat](layer, avatar, avatar.palette.hat, avatar.face.width + 0.1 + 0.4 * avatar.hair_volume)
    return layer


def _dome(side: float, top: float, low: float, power: float = 1.0) -> Points:
    """A cap's dome: from the left over the top to the right, with a bent lower edge."""
    angle = np.linspace(np.pi, 2 * np.pi, 36)
    upper = np.stack([np.cos(angle) * side, low - np.abs(np.sin(angle)) ** power * (low - top)], 1)
    u = np.linspace(1, -1, 20)
    return np.concatenate([upper, np.stack([u * side, low - 0.1 * (1 - u * u)], 1)])


def _hat_cap(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    layer.shape(_dome(side, -1.24 - avatar.hair_volume, -0.5), colour)
    u = np.linspace(-1, 1, 25)
    peak = band(u * side * 0.86, -0.62 - 0.06 * (1 - u * u), -0.56 + 0.02 * (1 - u * u))
    layer.shape(peak, darker(colour, 0.25))
    layer.fill(ellipse(0, -0.92, 0.17, 0.14, 24), avatar.palette.trim)


def _hat_beanie(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    layer.shape(_dome(side, -1.32 - avatar.hair_volume, -0.55), colour)
    u = np.linspace(-1, 1, 25)
    arch = -0.1 * (1 - u * u)
    layer.shape(band(u * (side + 0.03), arch - 0.72, arch - 0.44), darker(colour, 0.2))
    layer.shape(ellipse(0, -1.38 - avatar.hair_volume, 0.17, 0.16, 28), avatar.palette.trim)


def _hat_brim(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    layer.shape(_dome(side * 0.86, -1.32 - avatar.hair_volume, -0.6, 0.6), colour)
    u = np.linspace(-1, 1, 29)
    arch = -0.06 * (1 - u * u)
    layer.fill(band(u * side * 0.86, arch - 0.86, arch - 0.66), avatar.palette.trim)
    layer.shape(ellipse(0, -0.64, side * 1.38, 0.12, 48), darker(colour, 0.14))


def _hat_headphones(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    angle = np.linspace(np.pi * 0.98, np.pi * 2.02, 36)
    arc = np.stack([np.cos(angle) * (side + 0.02), -0.1 + np.sin(angle) * (1.04 + avatar.hair_volume)], 1)
    layer.line(arc, darker(colour, 0.3), 0.1)
    for sign in (-1, 1):
        layer.shape(ellipse(sign * (side + 0.02), -0.02, 0.17, 0.27, 30), colour)
        layer.fill(ellipse(sign * (side + 0.05), -0.02, 0.09, 0.17, 24), lighter(colour, 0.25))


def _hat_headband(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    u = np.linspace(-1, 1, 29)
    arch = -0.3 * (1 - u * u) - 0.5
    layer.shape(band(u * (side - 0.06), arch - 0.08, arch + 0.08), colour)


def _hat_flower(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    x = avatar.light * (side - 0.22)
    for angle in np.linspace(0, 2 * np.pi, 5, endpoint=False):
        layer.shape(ellipse(x + 0.14 * np.cos(angle), -0.66 + 0.14 * np.sin(angle), 0.11, 0.11, 20), colour)
    layer.fill(ellipse(x, -0.66, 0.09, 0.09, 20), (244, 206, 110))


def _hat_bow(layer: Layer, avatar: Avatar, colour: Colour, side: float) -> None:
    middle = np.array((0.2 * avatar.light, -1.0 - avatar.hair_volume))
    for sign in (-1, 1):
        wing = curve([(0, 0), (0.3, -0.2), (0.36, 0.02), (0.3, 0.18), (0, 0)], 20)
        layer.shape(mirrored(wing, sign) + middle, colour)
    layer.shape(ellipse(middle[0], middle[1], 0.09, 0.1, 20), darker(colour, 0.2))


_HATS: dict[str, Callable[[Layer, Avatar, Colour, float], None]] = {
    "cap": _hat_cap,
    "beanie": _hat_beanie,
    "brim": _hat_brim,
    "headphones": _hat_headphones,
    "headband": _hat_headband,
    "flower": _hat_flower,
    "bow": _hat_bow,
}

# The body


def body(avatar: Avatar) -> Layer:
    """Neck, shoulders, arms and clothes."""
    layer, half, cloth = Layer(avatar.outline), avatar.shoulders, avatar.palette.cloth
    skin = darker(avatar.palette.skin, 0.14 + 0.5 * avatar.shade)
    neck = 0.26 if avatar.face.age == "child" else 0.33
    layer.shape(np.array([[-neck, 0.55], [neck, 0.55], [neck + 0.03, 1.6], [-neck - 0.03, 1.6]]), skin)
    side_ = _side(half)
    layer.shape(np.concatenate([side_, mirrored(side_[::-1], -1)]), cloth)
    for i in range(4 if avatar.shade else 0):
        inner = side_[::-1] * (0.72 + 0.06 * i, 1) + (0, 0.1)
        layer.fill(mirrored(np.concatenate([side_, inner]), -avatar.light), darker(cloth, 0.06 * (i + 1)))
    for side in (-1, 1):
        arm = curve([(half * 0.74, 2.15), (half * 0.78, 2.8), (half * 0.76, 3.6), (half * 0.8, 5.0)], 16)
        layer.line(mirrored(arm, side), darker(cloth, 0.3), 0.035)
    _CLOTHES[avatar.clothes](layer, avatar, skin)
    return layer


def _side(half: float) -> Points:
    """The right side of the torso, from the neck down."""
    shoulder = [(0.0, 1.2), (half * 0.3, 1.23), (half * 0.62, 1.36), (half * 0.88, 1.6), (half * 1.02, 2.05)]
    return curve([*shoulder, (half * 1.1, 3.0), (half * 1.14, 5.0)], 32)


def _crew(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.fill(ellipse(0, 1.22, 0.48, 0.25), avatar.palette.trim)
    layer.fill(ellipse(0, 1.17, 0.39, 0.2), skin)


def _vee(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.fill(np.array([[-0.5, 1.19], [0.5, 1.19], [0.0, 1.95]]), avatar.palette.trim)
    layer.fill(np.array([[-0.38, 1.16], [0.38, 1.16], [0.0, 1.78]]), skin)


def _collar(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.fill(np.array([[-0.32, 1.08], [0.32, 1.08], [0.0, 1.62]]), skin)
    flap = np.array([[0.32, 1.06], [0.56, 1.24], [0.3, 1.68], [0.0, 1.58]])
    for side in (-1, 1):
        layer.shape(mirrored(flap, side), avatar.palette.trim)
    layer.line(np.array([[0.0, 1.62], [0.0, 4.8]]), darker(avatar.palette.cloth, 0.25), 0.03)


def _tie(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.fill(
        np.array([[-0.32, 1.1], [0.32, 1.1], [0.34, 1.6], [0.0, 2.9], [-0.34, 1.6]]), lighter(avatar.palette.trim, 0.5)
    )
    layer.fill(np.array([[-0.26, 1.06], [0.26, 1.06], [0.0, 1.46]]), skin)
    layer.fill(np.array([[-0.1, 1.44], [0.1, 1.44], [0.17, 2.5], [0.0, 2.76], [-0.17, 2.5]]), avatar.palette.hat)
    lapel = np.array([[0.34, 1.14], [0.62, 1.3], [0.5, 1.9], [0.02, 2.95]])
    for side in (-1, 1):
        layer.shape(mirrored(lapel, side), darker(avatar.palette.cloth, 0.16))


def _hood(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.shape(ellipse(0, 1.27, 0.76, 0.34), darker(avatar.palette.cloth, 0.22))
    layer.fill(ellipse(0, 1.17, 0.43, 0.2), skin)
    for side in (-1, 1):
        layer.line(np.array([[0.24, 1.5], [0.26, 2.1]]) * (side, 1), avatar.palette.trim, 0.045)


def _stripes(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    stripe = mix(avatar.palette.cloth, avatar.palette.trim, 0.6)
    for y in (1.85, 2.55, 3.25, 3.95):
        layer.fill(box(-avatar.shoulders * 0.96, y, avatar.shoulders * 0.96, y + 0.32), stripe)
    layer.fill(ellipse(0, 1.18, 0.41, 0.2), skin)


def _turtleneck(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.shape(curve([(-0.4, 0.98), (0, 1.12), (0.4, 0.98), (0.46, 1.32), (0, 1.44), (-0.46, 1.32), (-0.4, 0.98)], 40),
                mix(avatar.palette.cloth, (255, 255, 255), 0.1))  # fmt: skip


def _jacket(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.fill(np.array([[-0.5, 1.19], [0.5, 1.19], [0.34, 5.0], [-0.34, 5.0]]), avatar.palette.trim)
    layer.fill(ellipse(0, 1.17, 0.38, 0.22), skin)
    lapel = np.array([[0.4, 1.12], [0.66, 1.3], [0.66, 2.2], [0.36, 3.2]])
    for side in (-1, 1):
        layer.shape(mirrored(lapel, side), darker(avatar.palette.cloth, 0.18))


def _dress(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    half, bare = avatar.shoulders, avatar.palette.skin
    neckline = curve([(-half * 0.98, 1.72), (-half * 0.6, 1.3), (0, 1.18), (half * 0.6, 1.3), (half * 0.98, 1.72)], 30)
    low = curve([(half * 0.9, 1.9), (half * 0.5, 2.1), (0, 1.98), (-half * 0.5, 2.1), (-half * 0.9, 1.9)], 30)
    layer.fill(np.concatenate([neckline, low]), darker(bare, 0.04))
    for side in (-1, 1):
        layer.line(np.array([[side * half * 0.46, 1.26], [side * half * 0.46, 2.1]]), avatar.palette.cloth, 0.12)
        layer.fill(ellipse(side * 0.12, 1.52, 0.05, 0.05, 16), avatar.palette.trim)
    layer.fill(ellipse(0, 1.56, 0.06, 0.06, 16), avatar.palette.trim)


def _overalls(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    layer.fill(ellipse(0, 1.18, 0.41, 0.2), skin)
    front = avatar.palette.hat
    half = avatar.shoulders
    layer.shape(box(-half * 0.52, 2.1, half * 0.52, 5.0), front)
    for side in (-1, 1):
        layer.shape(np.array([[0.52, 1.3], [0.74, 1.38], [half * 0.52, 2.4], [half * 0.34, 2.4]]) * (side, 1), front)
        layer.fill(ellipse(side * half * 0.42, 2.32, 0.08, 0.08, 18), (238, 206, 122))


def _scarf(layer: Layer, avatar: Avatar, skin: Colour) -> None:
    knit = avatar.palette.hat
    tail = curve([(0.2, 1.4), (0.6, 1.5), (0.66, 2.6), (0.3, 2.66), (0.2, 1.4)], 28)
    layer.shape(mirrored(tail, avatar.light), darker(knit, 0.14))
    layer.shape(
        curve([(-0.56, 1.0), (0, 1.2), (0.56, 1.0), (0.68, 1.42), (0, 1.66), (-0.68, 1.42), (-0.56, 1.0)], 40), knit
    )


_CLOTHES: dict[str, Callable[[Layer, Avatar, Colour], None]] = {
    "crew": _crew,
    "vee": _vee,
    "collar": _collar,
    "tie": _tie,
    "hood": _hood,
    "stripes": _stripes,
    "turtleneck": _turtleneck,
    "jacket": _jacket,
    "dress": _dress,
    "overalls": _overalls,
    "scarf": _scarf,
}
