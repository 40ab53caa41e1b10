"""What the light autoencoder learns from: drawn clips, and what a transformer made of clips.

Shape legend: B clips of a step, T pixel frames, C latent channels, F latents, H W pixel size, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import checkpoint
from ..autoencoder import TEMPORAL
from .babble import babble
from .clips import read_clip
from .drawn import HELD_OUT_SEED, Avatar, Image, motion, photo_like, render, texture

if TYPE_CHECKING:
    from .autoencoder import Recipe

KINDS = ("drawn", "photo", "texture")
HELD_OUT_KINDS = ("drawn",) * 8 + ("photo",) * 2 + ("texture",) * 2
_KIND_ODDS = (0.77, 0.15, 0.08)
_FACE_FPS = Fraction(16)
_AT_FIRST = 24  # clips of the pool that the first step finds; it grows to its size
_KEPT = 40  # rehearsals that steps are cut from; one is read anew for each

Boxes = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What a step is made of: video [B, T, crop, crop, 3] uint8, boxes [B, T, 3, 4] and, where a transformer made the
    latents, these: [B, C, F, h, w] float16, whose last T frames are to be `video`."""

    video: Image
    boxes: Boxes
    latents: NDArray[np.float16] | None = None


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


@dataclass
class Latest(Generic[T]):
    """The last `most` of an endless row of things, each a function of its number."""

    make: Callable[[int], T]
    most: int
    kept: dict[int, T] = field(default_factory=dict)

    def before(self, end: int) -> list[T]:
        """Those with the highest numbers below `end`; such as are not at hand are made."""
        wanted = range(max(0, end - self.most), end)
        self.kept = {n: self.kept[n] if n in self.kept else self.make(n) for n in wanted}
        return list(self.kept.values())


def batches(recipe: Recipe, seed: int, rehearsals: Sequence[Path] = (), first: int = 0) -> Iterator[Batch]:
    """Endless batches from the number `first` on, each a function of seed and number: of drawn clips in turn of all the
    recipe's kinds and of rehearsals, where there are any.

    Every batch renews some clips of the pool, so drawing costs the same however large the batch is.
    """
    kinds = len(recipe.batches)
    drawn = Latest(partial(_fresh, recipe, seed), recipe.pool)
    read = Latest(partial(_read, seed, rehearsals), _KEPT)
    for number in count(first):
        rng = np.random.default_rng((seed, number, 1))
        turn, kind = divmod(number, kinds + bool(rehearsals))
        if kind == kinds:
            yield _rehearsed(rng, recipe, read.before(recipe.rehearsed[1] + turn))
            continue
        frames, clips = recipe.batches[kind]
        pool = drawn.before(min(_AT_FIRST, recipe.pool) + recipe.renewed * (kinds * turn + kind))
        cuts = [cut(rng, pool[i], frames, recipe.crop) for i in rng.integers(len(pool), size=clips)]
        yield Batch(np.stack([c.video for c in cuts]), np.stack([c.boxes for c in cuts]))


def _fresh(recipe: Recipe, seed: int, number: int) -> Sample:
    """A new clip, at full size or (four of ten) between 3/4 and 3/2 of it."""
    rng = np.random.default_rng((seed, number, 2))
    scale = rng.uniform(0.75, 1.5) if rng.random() < 0.4 else 1.0
    size = max(recipe.crop, round(recipe.size * scale))
    return make_sample(int(rng.integers(HELD_OUT_SEED)), KINDS[rng.choice(3, p=_KIND_ODDS)], size, recipe.clip_frames)


def held_out(recipe: Recipe, frames: int = 9) -> list[Sample]:
    """The twelve fixed clips that measure a training: eight drawn, two photo-like, two textures."""
    return [make_sample(HELD_OUT_SEED + i, kind, recipe.size, frames) for i, kind in enumerate(HELD_OUT_KINDS)]


# Rehearsals


class Rehearsed(NamedTuple):
    """A stored clip, video [T, H, W, 3] and boxes [T, 3, 4], and what a transformer made of it, [F, C, h, w]."""

    video: Image
    boxes: Boxes
    latents: NDArray[np.float16]


def _rehearsed(rng: np.random.Generator, recipe: Recipe, kept: Sequence[Rehearsed]) -> Batch:
    """A batch of rehearsals."""
    latents, clips = recipe.rehearsed
    cuts = [cut_rehearsed(rng, kept[i], latents, recipe.crop) for i in rng.integers(len(kept), size=clips)]
    return Batch(*(np.stack(part) for part in zip(*cuts, strict=True)))


def _read(seed: int, paths: Sequence[Path], number: int) -> Rehearsed:
    """One of the rehearsals, whose folder lies beside their clips (`rehearsal.RehearsalStore`)."""
    path = paths[int(np.random.default_rng((seed, number, 3)).integers(len(paths)))]
    clip = read_clip(path.parent.parent / path.name)
    own = checkpoint.read(path)[0]["own"]
    return Rehearsed(clip.video.numpy(), clip.boxes.numpy(), own.numpy())


def cut_rehearsed(rng: np.random.Generator, clip: Rehearsed, latents: int, crop: int) -> Rehearsed:
    """Some latents of a random crop, mostly about the face, and the true frames that they are to become.

    The frames of the first two latents are left out: a decoder that starts there remembers nothing.
    """
    rows, columns = clip.latents.shape[2:]
    cell, cells = clip.video.shape[1] // rows, crop * rows // clip.video.shape[1]
    first = int(rng.integers(1, len(clip.latents) - latents + 1))
    frames = slice(TEMPORAL * (first + 1) + 1, TEMPORAL * (first + latents - 1) + 1)
    box = clip.boxes[frames.start, int(rng.random() < 0.4)]
    centre = np.flip((box[:2] + box[2:]) / 2) + rng.normal(0, crop / 4, 2)
    y, x = np.clip(np.round(centre / cell - cells / 2), 0, (rows - cells, columns - cells)).astype(int)
    corner = np.array([x, y, x, y], np.float32) * cell
    return Rehearsed(
        clip.video[frames, y * cell : y * cell + crop, x * cell : x * cell + crop],
        np.clip(clip.boxes[frames] - corner, 0, crop),
        clip.latents[first : first + latents, :, y : y + cells, x : x + cells].swapaxes(0, 1),
    )
