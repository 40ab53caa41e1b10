"""What the light autoencoder learns from: drawn clips.

Shape legend: B clips of a step, T pixel frames, H W pixel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .babble import babble
from .drawn import HELD_OUT_SEED, Avatar, Image, motion, photo_like, render, texture

if TYPE_CHECKING:
    from .autoencoder import Recipe

KINDS = ("drawn", "photo", "texture")
HELD_OUT_KINDS = ("drawn",) * 8 + ("photo",) * 2 + ("texture",) * 2
_KIND_ODDS = (0.77, 0.15, 0.08)
_FACE_FPS = Fraction(16)

Boxes = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """video [T, H, W, 3] uint8; boxes [T, 3, 4] float32: mouth, eyes and face, x0 y0 x1 y1, empty for textures."""

    video: Image
    boxes: Boxes


def make_sample(seed: int, kind: str, size: int, frames: int) -> Sample:
    """One clip of a face ("drawn" or "photo") or of a moving "texture", size x size. The seed decides all."""
    return _moving_texture(seed, size, frames) if kind == "texture" else _face(seed, kind == "photo", size, frames)


def _face(seed: int, photo: bool, size: int, frames: int) -> Sample:
    rng = np.random.default_rng(seed)
    total = 64
    speech = babble(seed, float(total / _FACE_FPS), _FACE_FPS)  # mouths are all that counts here
    start = int(rng.integers(total - frames))
    avatar = Avatar.random(seed)
    avatar = replace(avatar, outline=0.0, shade=max(avatar.shade, 0.2)) if photo else avatar
    video, found = render(avatar, motion(seed, speech, total)[start : start + frames], (size, size))
    return Sample(photo_like(seed, video) if photo else video, found)


def _moving_texture(seed: int, size: int, frames: int) -> Sample:
    """A texture under a slow pan, zoom and turn."""
    import cv2

    rng = np.random.default_rng(seed)
    picture = texture(seed, (size * 5 // 4, size * 5 // 4))
    pan, zoom, turn = rng.normal(0, 1.5, 2), rng.normal(0, 0.006), rng.normal(0, 0.006)
    video = []
    for t in range(frames):
        scale, angle = math.exp(zoom * t), turn * t
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        middle = np.array([[cos, -sin], [sin, cos]]) @ np.full(2, -picture.shape[0] / 2) + size / 2 + pan * t
        matrix = np.array([[cos, -sin, middle[0]], [sin, cos, middle[1]]])
        video.append(cv2.warpAffine(picture, matrix, (size, size), borderMode=cv2.BORDER_REFLECT))
    return Sample(np.stack(video).astype(np.uint8), np.zeros((frames, 3, 4), np.float32))


def cut(rng: np.random.Generator, sample: Sample, frames: int, crop: int) -> Sample:
    """A random slice of time and a random crop, mostly about the face, half of them mirrored."""
    total, height, width = sample.video.shape[:3]
    start = int(rng.integers(total - frames + 1))
    boxes = sample.boxes[start : start + frames]
    corner = rng.uniform(0, 1, 2) * (width - crop, height - crop)
    if boxes.any() and rng.random() < 0.7:
        box = boxes[0, int(rng.random() < 0.4)]
        corner = (box[:2] + box[2:]) / 2 - crop / 2 + rng.normal(0, crop / 6, 2)
    x, y = np.clip(corner, 0, (width - crop, height - crop)).astype(int)
    video = sample.video[start : start + frames, y : y + crop, x : x + crop]
    boxes = np.clip(boxes - np.array([x, y, x, y], np.float32), 0, crop)
    if rng.random() < 0.5:
        video = video[:, :, ::-1]
        boxes = np.stack([crop - boxes[..., 2], boxes[..., 1], crop - boxes[..., 0], boxes[..., 3]], -1)
    return Sample(video, boxes)


def batches(recipe: Recipe, seed: int) -> Iterator[tuple[Image, Boxes]]:
    """Endless batches in turn of all the recipe's kinds: video [B, T, crop, crop, 3] and boxes [B, T, 3, 4].

    Every batch renews some clips of the pool, so drawing costs the same however large the batch is.
    """
    rng = np.random.default_rng(seed)
    pool = [_fresh(rng, recipe) for _ in range(min(24, recipe.pool))]
    turn = 0
    while True:
        for frames, clips in recipe.batches:
            cuts = [cut(rng, pool[i], frames, recipe.crop) for i in rng.integers(len(pool), size=clips)]
            yield np.stack([c.video for c in cuts]), np.stack([c.boxes for c in cuts])
            for _ in range(recipe.renewed):
                pool[turn % recipe.pool : turn % recipe.pool + 1] = [_fresh(rng, recipe)]
                turn = turn + 1 if len(pool) == recipe.pool else len(pool)


def _fresh(rng: np.random.Generator, recipe: Recipe) -> Sample:
    """A new clip, at full size or (four of ten) between 3/4 and 3/2 of it."""
    scale = rng.uniform(0.75, 1.5) if rng.random() < 0.4 else 1.0
    size = max(recipe.crop, round(recipe.size * scale))
    return make_sample(int(rng.integers(HELD_OUT_SEED)), KINDS[rng.choice(3, p=_KIND_ODDS)], size, recipe.clip_frames)


def held_out(recipe: Recipe, frames: int = 9) -> list[Sample]:
    """The twelve fixed clips that measure a training: eight drawn, two photo-like, two textures."""
    return [make_sample(HELD_OUT_SEED + i, kind, recipe.size, frames) for i, kind in enumerate(HELD_OUT_KINDS)]
