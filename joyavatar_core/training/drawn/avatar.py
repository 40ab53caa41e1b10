"""Who is drawn: identities, drawing styles, framings. All of it follows from a seed.

Shape legend: no tensors here; lengths are in half face heights unless said otherwise.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from ..speech import HELD_OUT_SEED
from .colours import INK, Colour, any_colour, between, darker, distance, hsv, mix

_HELD_OUT_SHARE = 5  # one combination in so many is held out

_SKINS: tuple[Colour, ...] = (
    (255, 228, 210), (246, 208, 180), (234, 188, 152), (214, 160, 120), (188, 130, 92), (150, 98, 66), (118, 78, 56),
    (96, 64, 50),
)  # fmt: skip
_HAIRS: tuple[Colour, ...] = (
    (46, 38, 42), (68, 46, 38), (104, 66, 44), (146, 96, 56), (196, 148, 88), (228, 194, 128), (172, 80, 44),
)  # fmt: skip
_GREY_HAIRS: tuple[Colour, ...] = ((150, 150, 156), (190, 190, 190), (226, 222, 216))
_IRISES: tuple[Colour, ...] = (
    (84, 56, 40),
    (116, 82, 46),
    (70, 116, 164),
    (88, 136, 90),
    (100, 116, 126),
    (64, 96, 68),
)

STYLES = ("flat", "outlined", "painted", "pastel")
_STYLE_ODDS = (0.24, 0.3, 0.3, 0.16)
KINDS = ("human", "cat", "bear", "rabbit", "robot", "alien", "frog")
_KIND_ODDS = (0.85, 0.03, 0.03, 0.025, 0.025, 0.02, 0.02)
AGES = ("child", "adult", "old")
_AGE_ODDS = (0.22, 0.58, 0.2)
_LONG_HAIR = ("bob", "long", "wavy", "bun", "pigtails", "ponytail", "braids")
_SHORT_HAIR = ("bald", "buzz", "short", "fringe", "side", "swept", "curly", "afro", "spiky", "mohawk")
_CLOTHES = ("crew", "vee", "collar", "tie", "hood", "stripes", "turtleneck", "jacket", "dress", "overalls", "scarf")
_BACKGROUNDS = ("gradient", "glow", "blobs", "bokeh", "window", "shelf", "hills", "room", "curtain", "split")
_HATS = ("cap", "beanie", "brim", "headphones", "headband", "flower", "bow")
_BEARDS = ("full", "goatee", "moustache", "stubble")
_NOSES = ("hook", "button", "shadow", "nostrils", "dot")
_GLASSES = ("round", "square")


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
    """Proportions. `age` and `nose` are names; snout: 0 for none, else the size of the muzzle."""

    width: float
    taper: float
    squareness: float
    ear: float
    nose: str
    nose_size: float
    blush: float
    age: str = "adult"
    freckles: float = 0.0
    snout: float = 0.0


@dataclass(frozen=True)
class Eyes:
    """x, y: place of the centre; width, height: half sizes of the opening; tilt: outer corner up; iris: radius;
    dots: drawn as plain dark ovals."""

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
    dots: bool = False


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
    hat: Colour


@dataclass(frozen=True)
class Framing:
    """size: half face height in picture heights, where the width of the picture allows it; x, y: place of the head
    in the room there is to move it, 0 (left, top) .. 1."""

    size: float
    x: float
    y: float


@dataclass(frozen=True)
class Avatar:
    """Who is drawn, in what style and where. kind, style, hair, hat, beard, glasses, clothes, background: names."""

    kind: str
    style: str
    face: Face
    eyes: Eyes
    mouth: Mouth
    palette: Palette
    framing: Framing
    hair: str
    hair_volume: float
    hat: str
    beard: str
    glasses: str
    clothes: str
    earrings: bool
    background: str
    background_seed: int
    shoulders: float
    outline: float  # line width in half face heights; 0 for none
    shade: float  # depth of the shading, 0..1
    light: float  # side of the light, -1 or 1
    soft: float = 0.0  # blur of the finished picture, in 256ths of its height

    @staticmethod
    def random(seed: int) -> Avatar:
        """The identity of this seed.

        Seeds from HELD_OUT_SEED on draw only held-out combinations (see `is_held_out`), those below none of them.
        """
        for attempt in count():
            avatar = _any_avatar(np.random.default_rng((seed, attempt)))
            if is_held_out(avatar) == (seed >= HELD_OUT_SEED):
                return avatar
        raise AssertionError("count() does not end")

    def photographed(self) -> Avatar:
        """As a photograph would show it: without outlines, with soft shading; see `pictures.photo_like`."""
        return replace(self, style="painted", outline=0.0, shade=max(self.shade, 0.2))


def is_held_out(avatar: Avatar) -> bool:
    """Whether training never shows this combination of kind, hair, hat, clothes and background: one in five."""
    names = "|".join((avatar.kind, avatar.hair, avatar.hat, avatar.clothes, avatar.background))
    return zlib.crc32(names.encode()) % _HELD_OUT_SHARE == 0


def _any_avatar(rng: np.random.Generator) -> Avatar:
    kind, style = str(rng.choice(KINDS, p=_KIND_ODDS)), str(rng.choice(STYLES, p=_STYLE_ODDS))
    age = str(rng.choice(AGES, p=_AGE_ODDS))
    long_hair = rng.random() < 0.48
    hair = _pick(rng, _LONG_HAIR if long_hair else _SHORT_HAIR) if kind == "human" else "bald"
    hat = _pick(rng, _HATS) if rng.random() < 0.3 else "none"
    bearded = kind == "human" and not long_hair and age != "child" and rng.random() < 0.45
    face = _random_face(rng, age, long_hair)
    avatar = Avatar(
        kind=kind,
        style=style,
        face=face,
        eyes=_random_eyes(rng, age, long_hair),
        mouth=_random_mouth(rng),
        palette=_random_palette(rng, age, long_hair),
        framing=_random_framing(rng),
        hair=hair,
        hair_volume=rng.uniform(0.05, 0.2),
        hat=hat,
        beard=_pick(rng, _BEARDS) if bearded else "none",
        glasses=_pick(rng, _GLASSES) if rng.random() < (0.4 if age == "old" else 0.22) else "none",
        clothes=_pick(rng, _CLOTHES),
        earrings=long_hair and kind == "human" and rng.random() < 0.4,
        background=_pick(rng, _BACKGROUNDS),
        background_seed=int(rng.integers(2**31)),
        shoulders=rng.uniform(1.2, 1.5) if age == "child" else rng.uniform(1.4, 1.85),
        **_random_style(rng, style),
    )
    return _STYLINGS[style](_CHARACTERS[kind](rng, avatar)) if kind != "human" else _STYLINGS[style](avatar)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _random_face(rng: np.random.Generator, age: str, soft: bool) -> Face:
    child = age == "child"
    return Face(
        width=rng.uniform(0.86, 0.96) if child else rng.uniform(0.76, 0.9),
        taper=rng.uniform(0.06, 0.2) if child else rng.uniform(0.1, 0.3 if soft else 0.24),
        squareness=rng.uniform(2.0, 2.2) if child or soft else rng.uniform(2.1, 2.6),
        ear=rng.uniform(0.14, 0.2),
        nose=_pick(rng, ("button", "dot", "nostrils") if child else _NOSES),
        nose_size=rng.uniform(0.6, 0.85) if child else rng.uniform(0.85, 1.25),
        blush=rng.uniform(0.2, 0.5) if child or rng.random() < 0.5 else 0.0,
        age=age,
        freckles=rng.uniform(0.2, 0.5) if rng.random() < 0.12 else 0.0,
    )


def _random_eyes(rng: np.random.Generator, age: str, soft: bool) -> Eyes:
    width = rng.uniform(0.2, 0.24) if age == "child" else rng.uniform(0.165, 0.215)
    height = width * (rng.uniform(0.8, 1.0) if age == "child" else rng.uniform(0.55, 0.85))
    return Eyes(
        x=rng.uniform(0.36, 0.4) if age == "child" else rng.uniform(0.33, 0.38),
        y=rng.uniform(-0.1, -0.04) if age == "child" else rng.uniform(-0.17, -0.08),
        width=width,
        height=height,
        tilt=rng.uniform(-0.05, 0.14),
        iris=height * rng.uniform(0.78, 0.95),
        lashes=rng.uniform(0.5, 1) if soft else rng.uniform(0, 0.5),
        brow_height=height + rng.uniform(0.08, 0.13),
        brow_thickness=rng.uniform(0.035, 0.06) if soft else rng.uniform(0.05, 0.085),
        brow_tilt=rng.uniform(-0.02, 0.08),
        dots=bool(rng.random() < 0.13),
    )


def _random_mouth(rng: np.random.Generator) -> Mouth:
    full = rng.random() < 0.7
    return Mouth(
        y=rng.uniform(0.47, 0.53),
        width=rng.uniform(0.27, 0.35),
        height=rng.uniform(0.29, 0.37),
        upper=rng.uniform(0.04, 0.07) if full else 0.025,
        lower=rng.uniform(0.055, 0.09) if full else 0.035,
        smile=rng.uniform(0.015, 0.06),
        bow=rng.uniform(0.15, 0.45),
    )


def _random_framing(rng: np.random.Generator) -> Framing:
    close = rng.random() < 0.75
    return Framing(
        size=rng.uniform(0.3, 0.43) if close else rng.uniform(0.2, 0.3),
        x=float(np.clip(0.5 + rng.normal(0, 0.16), 0.1, 0.9)),
        y=rng.uniform(0.3, 0.6) if close else rng.uniform(0.25, 0.45),
    )


def _random_palette(rng: np.random.Generator, age: str, painted_lips: bool) -> Palette:
    skin, hue = between(rng, _SKINS), rng.random()
    red = hsv(rng.uniform(0.94, 1.03), rng.uniform(0.5, 0.75), rng.uniform(0.62, 0.85))
    hair = between(rng, _GREY_HAIRS) if age == "old" and rng.random() < 0.85 else between(rng, _HAIRS)
    hair = hair if rng.random() < 0.84 else hsv(rng.random(), rng.uniform(0.35, 0.7), rng.uniform(0.5, 0.9))
    paper = hsv(hue, rng.uniform(0.12, 0.5), rng.uniform(0.5, 0.96))
    paper = darker(paper, 0.5) if distance(paper, skin) < 70 else paper
    turn = rng.choice((0.06, -0.07, 0.5, 0.33), p=(0.35, 0.35, 0.2, 0.1))
    cloth_hue = hue + rng.uniform(0.25, 0.75)
    return Palette(
        skin=skin,
        lips=mix(darker(skin, 0.16), red, rng.uniform(0.55, 0.9) if painted_lips else rng.uniform(0.25, 0.55)),
        hair=hair,
        iris=_IRISES[int(rng.integers(len(_IRISES)))] if rng.random() < 0.85 else any_colour(rng, 40, 180),
        cloth=hsv(cloth_hue, rng.uniform(0.2, 0.7), rng.uniform(0.35, 0.92)),
        trim=hsv(cloth_hue + rng.uniform(-0.1, 0.25), rng.uniform(0.1, 0.5), rng.uniform(0.6, 0.97)),
        paper=paper,
        paper_2=hsv(hue + turn, rng.uniform(0.1, 0.5), rng.uniform(0.4, 0.96)),
        glasses=INK if rng.random() < 0.55 else hsv(rng.random(), rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.6)),
        hat=hsv(cloth_hue + rng.uniform(-0.2, 0.2), rng.uniform(0.25, 0.7), rng.uniform(0.4, 0.92)),
    )


# Drawing styles


def _random_style(rng: np.random.Generator, style: str) -> dict[str, float]:
    outline = {"outlined": rng.uniform(0.018, 0.03), "pastel": rng.uniform(0.012, 0.02)}.get(style, 0.0)
    shade = {"flat": 0.0, "outlined": rng.uniform(0.06, 0.18), "painted": rng.uniform(0.2, 0.36), "pastel": 0.1}[style]
    return {
        "outline": outline,
        "shade": shade,
        "light": float(rng.choice((-1, 1))),
        "soft": rng.uniform(0.75, 1.0),
    }


def _keep(avatar: Avatar) -> Avatar:
    return avatar


def _pastel(avatar: Avatar) -> Avatar:
    """Chalky: everything a step towards white, the paper most."""
    p = avatar.palette
    return replace(
        avatar,
        palette=replace(
            p,
            hair=mix(p.hair, (236, 216, 222), 0.24),
            cloth=mix(p.cloth, (250, 240, 236), 0.4),
            trim=mix(p.trim, (250, 244, 240), 0.4),
            paper=mix(p.paper, (250, 242, 236), 0.5),
            paper_2=mix(p.paper_2, (246, 236, 240), 0.5),
            hat=mix(p.hat, (250, 240, 236), 0.35),
        ),
    )


_STYLINGS = {"flat": _keep, "outlined": _keep, "painted": _keep, "pastel": _pastel}


# Characters that are not human


def _furry(rng: np.random.Generator, avatar: Avatar, furs: tuple[Colour, ...], width: float, snout: float) -> Avatar:
    fur = between(rng, furs)
    return replace(
        avatar,
        face=replace(
            avatar.face, width=width, taper=0.1, squareness=2.0, nose="snout", nose_size=1.0, snout=snout, freckles=0.0
        ),
        eyes=replace(avatar.eyes, x=0.4, y=-0.14, brow_thickness=0.04, tilt=0.06),
        mouth=replace(avatar.mouth, y=0.52, smile=0.05, upper=0.04, lower=0.055),
        palette=replace(
            avatar.palette, skin=fur, hair=darker(fur, 0.45), lips=mix(darker(fur, 0.4), (150, 50, 64), 0.6)
        ),
        beard="none",
    )


def _cat(rng: np.random.Generator, avatar: Avatar) -> Avatar:
    furs = ((236, 226, 214), (224, 158, 92), (150, 146, 150), (92, 82, 88))
    made = _furry(rng, avatar, furs, rng.uniform(0.92, 1.0), rng.uniform(0.42, 0.5))
    return replace(made, palette=replace(made.palette, iris=hsv(rng.uniform(0.12, 0.45), 0.6, 0.75)))


def _bear(rng: np.random.Generator, avatar: Avatar) -> Avatar:
    furs = ((206, 158, 108), (150, 104, 72), (104, 76, 62), (232, 230, 226))
    return _furry(rng, avatar, furs, rng.uniform(0.9, 0.98), rng.uniform(0.46, 0.54))


def _rabbit(rng: np.random.Generator, avatar: Avatar) -> Avatar:
    furs = ((240, 234, 230), (212, 184, 158), (170, 160, 164))
    return _furry(rng, avatar, furs, rng.uniform(0.86, 0.94), rng.uniform(0.42, 0.48))


def _robot(rng: np.random.Generator, avatar: Avatar) -> Avatar:
    metal = hsv(rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.6, 0.88))
    eyes = replace(avatar.eyes, width=0.2, height=0.18, iris=0.15, lashes=0.0, tilt=0.0, brow_thickness=0.05)
    return replace(
        avatar,
        face=replace(avatar.face, width=0.88, taper=0.04, squareness=4.5, nose="none", blush=0.0, freckles=0.0),
        eyes=replace(eyes, x=0.38, y=-0.14, dots=False),
        framing=replace(avatar.framing, size=min(avatar.framing.size, 0.4)),  # room for the corners of a tilted box
        palette=replace(
            avatar.palette,
            skin=metal,
            hair=darker(metal, 0.5),
            lips=darker(metal, 0.4),
            iris=hsv(rng.uniform(0.45, 0.62), 0.7, 0.85),
        ),
        beard="none",
    )


def _alien(rng: np.random.Generator, avatar: Avatar) -> Avatar:
    skin = hsv(rng.uniform(0.2, 0.85), rng.uniform(0.25, 0.5), rng.uniform(0.65, 0.9))
    eyes = replace(avatar.eyes, x=0.4, y=-0.1, width=0.25, height=0.22, iris=0.2, tilt=0.2, brow_thickness=0.035)
    return replace(
        avatar,
        face=replace(avatar.face, width=0.9, taper=0.34, squareness=2.0, nose="nostrils", nose_size=0.6, freckles=0.3),
        eyes=replace(eyes, brow_height=0.33),
        palette=replace(avatar.palette, skin=skin, hair=darker(skin, 0.5), lips=mix(skin, (150, 40, 90), 0.5)),
        beard="none",
    )


def _frog(rng: np.random.Generator, avatar: Avatar) -> Avatar:
    skin = hsv(rng.uniform(0.2, 0.42), rng.uniform(0.35, 0.6), rng.uniform(0.6, 0.85))
    eyes = replace(avatar.eyes, x=0.46, y=-0.5, width=0.22, height=0.2, iris=0.15, tilt=0.0, brow_thickness=0.0)
    return replace(
        avatar,
        face=replace(avatar.face, width=1.0, taper=0.02, squareness=2.1, nose="nostrils", nose_size=0.7, freckles=0.0),
        eyes=replace(eyes, brow_height=0.26),
        mouth=replace(avatar.mouth, y=0.42, width=0.36, smile=0.06, upper=0.035, lower=0.05),
        palette=replace(
            avatar.palette, skin=skin, hair=darker(skin, 0.5), lips=mix(darker(skin, 0.3), (160, 60, 60), 0.3)
        ),
        hat=_pick(rng, ("none", "none", "bow", "headphones")),
        glasses="none",
        beard="none",
    )


_CHARACTERS = {"cat": _cat, "bear": _bear, "rabbit": _rabbit, "robot": _robot, "alien": _alien, "frog": _frog}
