"""Avatars on pictures: framing, drawing, the boxes of mouth, eyes and face, whole clips.

Shape legend: T pixel frames, H W pixel size. Pictures are uint8 [H, W, 3] RGB, sizes are (H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ...media.opencv import opencv
from ..speech import Speech, synthesize
from . import backgrounds, face, wardrobe
from .avatar import Avatar, Pose
from .layers import JAW_DROP, Image, Placement, Points, box
from .movement import motion
from .pictures import photo_like

_SWAY, _NOD = 0.22, 0.12  # room kept for the head's motion at the sides and above and below, in half face heights
_LEAST = 16  # pixels


@dataclass(frozen=True)
class Clip:
    """video [T, H, W, 3] uint8 RGB; boxes [T, 3, 4] of mouth, eyes and face (see `boxes`); poses: T of them."""

    video: Image
    speech: Speech
    boxes: NDArray[np.float32]
    poses: tuple[Pose, ...]


@dataclass(frozen=True)
class Frame:
    """Where the face lies in a picture: origin (pixels) and unit (pixels to a half face height)."""

    origin: NDArray[np.float64]
    unit: float

    def head(self, pose: Pose) -> Placement:
        """The head turns about the neck, one unit below the origin."""
        size = self.unit * pose.scale
        cos, sin = np.cos(pose.roll) * size, np.sin(pose.roll) * size
        neck = np.array([sin, self.unit - cos])  # what the turn takes from (0, 1), given back
        return Placement(
            np.array([[cos, sin], [-sin, cos]]),
            self.origin + neck + np.array([pose.head_x, pose.head_y]) * self.unit,
            size,
        )

    def body(self, pose: Pose) -> Placement:
        """The body follows the head a little."""
        moved = self.origin + np.array([pose.head_x * 0.25, pose.head_y * 0.3]) * self.unit
        return Placement(np.eye(2) * self.unit, moved, self.unit)


def frame(avatar: Avatar, size: tuple[int, int]) -> Frame:
    """Places the face so that no motion takes it out of the picture; hair and hats may be cut."""
    height, width = size
    half = avatar.face.width + _SWAY
    above, below = 1 + _NOD, 1 + _NOD + JAW_DROP
    unit = min(avatar.framing.size * height, height / (above + below), 0.5 * width / half)
    top, low = above * unit, height - below * unit
    left, right = half * unit, width - half * unit
    x = left + (right - left) * avatar.framing.x
    return Frame(np.array([x, top + (low - top) * avatar.framing.y]), unit)


def _features(pose: Pose) -> tuple[float, float]:
    """A head that moves aside also turns: its features move further than its outline."""
    return 0.55 * pose.head_x, 0.45 * pose.head_y


class Scene:
    """One avatar prepared for pictures of one size (H, W): what does not change is made once.

    Raises ValueError for sizes under 16.
    """

    def __init__(self, avatar: Avatar, size: tuple[int, int]):
        if min(size) < _LEAST:
            raise ValueError(f"size {size[0]}x{size[1]} is too small to draw a face: use at least {_LEAST}x{_LEAST}")
        self.avatar, self.size, self.frame = avatar, size, frame(avatar, size)
        self.background = backgrounds.background(avatar, size)
        self.back_hair, self.body = wardrobe.back_hair(avatar), wardrobe.body(avatar)
        self.ears, self.head, self.beard = face.ears(avatar), face.head(avatar), wardrobe.beard(avatar)
        self.skin, self.nose, self.brows = face.skin_marks(avatar), face.nose(avatar), face.brows(avatar)
        self.moustache, self.front_hair = wardrobe.moustache(avatar), wardrobe.front_hair(avatar)
        self.glasses, self.hat = wardrobe.glasses(avatar), wardrobe.hat(avatar)

    def draw(self, pose: Pose) -> Image:
        """The avatar in this pose: uint8 [H, W, 3] RGB."""
        avatar, canvas = self.avatar, self.background.copy()
        head = self.frame.head(pose)
        x, y = _features(pose)
        features = head.moved(x, y)
        self.back_hair.paint(canvas, head)
        self.body.paint(canvas, self.frame.body(pose))
        self.ears.paint(canvas, head.moved(-0.15 * pose.head_x, 0))
        self.head.paint(canvas, head, pose.open)
        self.beard.paint(canvas, head.moved(0.4 * x, 0.4 * y), pose.open)
        self.skin.paint(canvas, features, 0.6 * pose.open)
        face.eyes_layer(avatar, pose).paint(canvas, features)
        self.nose.paint(canvas, head.moved(1.35 * x, 0.2 + 1.35 * y))
        face.mouth_layer(avatar, pose).paint(canvas, features.moved(0, avatar.mouth.y))
        self.moustache.paint(canvas, features.moved(0, -0.28 * avatar.mouth.height * pose.open))
        self.front_hair.paint(canvas, head)
        self.brows.paint(canvas, features.moved(0, -0.07 * pose.brow))
        self.glasses.paint(canvas, features)
        self.hat.paint(canvas, head)
        return opencv().GaussianBlur(canvas, (0, 0), avatar.soft * self.size[0] / 256) if avatar.soft else canvas


def draw(avatar: Avatar, pose: Pose, size: tuple[int, int] = (256, 256)) -> Image:
    """One picture of the avatar: uint8 [H, W, 3] RGB for size (H, W). Raises ValueError for sizes under 16."""
    return Scene(avatar, size).draw(pose)


def render(avatar: Avatar, poses: tuple[Pose, ...], size: tuple[int, int]) -> tuple[Image, NDArray[np.float32]]:
    """video [T, H, W, 3] uint8 and the boxes [T, 3, 4] of mouth, eyes and face (see `boxes`)."""
    scene = Scene(avatar, size)
    video = np.stack([scene.draw(pose) for pose in poses])
    return video, np.stack([boxes(avatar, pose, size) for pose in poses])


def boxes(avatar: Avatar, pose: Pose, size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes of the mouth (wide open), of both eyes with brows, and of the face: [3, 4] pixels x0 y0 x1 y1."""
    head, mouth, eyes = frame(avatar, size).head(pose), avatar.mouth, avatar.eyes
    features = head.moved(*_features(pose))
    half = mouth.width * 1.3
    around_mouth = box(-half, mouth.y - 0.2, half, mouth.y + mouth.height * 0.72 + 0.16)
    side = eyes.x + eyes.width * 1.2
    around_eyes = box(-side, eyes.y - eyes.brow_height - 0.14, side, eyes.y + eyes.height + 0.05)
    outline = face.head_outline(avatar) * (1, 1 + JAW_DROP * pose.open)
    return np.stack(
        [_extent(points) for points in (features.place(around_mouth), features.place(around_eyes), head.place(outline))]
    )


def _extent(points: Points) -> NDArray[np.float32]:
    return np.concatenate([points.min(0), points.max(0)]).astype(np.float32)


def sample_clip(
    seed: int, frames: int, size: tuple[int, int] = (256, 256), fps: Fraction | float = 16, photo: bool = False
) -> Clip:
    """A random person saying random things: see Clip. `photo` gives the soft look of a photograph."""
    speech = synthesize(seed, frames / float(fps), fps)
    avatar = Avatar.random(seed)
    poses = motion(seed, speech, frames)
    video, found = render(avatar.photographed() if photo else avatar, poses, size)
    return Clip(photo_like(seed, video) if photo else video, speech, found, poses)
