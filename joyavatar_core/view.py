"""What of a picture the model makes, and how its frames become the video.

The embedded model draws a face in cells of 16 pixels: one that fills a third of the height comes out smeared, and its
lips with it. So a small face is taken closer: the model makes a square about it at its own size, and the frames are
laid back into the still rest with a soft edge. The place is found by the mouth reader, which knows drawn faces; of a
face that it does not read steadily (`measures.face`), and of one that is large enough, the whole picture is made.

Shape legend: T frames; h w the model's size, H W the video's; all pictures uint8 RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from .avatar import Avatar, takes_reference_tokens
from .config import ModelConfig
from .geometry import Geometry
from .measures.face import STEADY, Face, read_face, reader_error
from .measures.mouth_reader import MouthReader, load_mouth_reader
from .media.paste import Paste, PastingSink, Region
from .media.picture import fit_picture, resize
from .policy import RolloutPolicy
from .sinks import FrameSink

Fit = Literal["crop", "pad"]

FACE_SHARE = 0.66
"""Height of the face in a close-up, in shares of the height: what most of the training's faces take."""

CLOSER = 1.15
"""A close-up is made if the face becomes so much larger for the model, and the picture as much smaller."""

_FEATHER = 0.12
_SHARPEST = 4  # times the video's size: how finely a close-up is cut from a picture that has more pixels


@dataclass(frozen=True)
class View:
    """picture: [h, w, 3] of the geometry's size, what the model gets. paste: what makes its frames the video's, None:
    they are."""

    picture: np.ndarray
    geometry: Geometry
    paste: Paste | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the video."""
        return self.paste.size if self.paste else (self.geometry.width, self.geometry.height)

    def taken(self, frames: np.ndarray) -> np.ndarray:
        """[T, H, W, 3] of the video -> [T, h, w, 3], as the model would be given them."""
        if self.paste is None:
            return frames
        region, (width, height) = self.paste.region, (self.geometry.width, self.geometry.height)
        rows, columns = slice(region.y, region.y + region.height), slice(region.x, region.x + region.width)
        return np.stack([resize(frame[rows, columns], width, height) for frame in frames])

    def finished(self, frames: np.ndarray) -> np.ndarray:
        """[T, h, w, 3] of the model -> [T, H, W, 3] of the video."""
        return self.paste(frames) if self.paste else frames

    def into(self, sink: FrameSink) -> FrameSink:
        """A sink for the model's frames, which passes on the video's."""
        return PastingSink(self.paste, sink) if self.paste else sink


def view_for(
    avatar: Avatar,
    policy: RolloutPolicy,
    picture: np.ndarray,
    size: tuple[int, int] | None = None,
    fit: Fit = "crop",
    close_up: bool = True,
) -> View:
    """How an avatar makes a video of `size` (width, height; None: its own) of a picture [*, *, 3].

    close_up: whether a small face is taken closer, by a model that needs it. ValueError for a size that does not fit.
    """
    closer = avatar.geometry(None, policy) if close_up and needs_close_ups(avatar.model.config) else None
    return view_of(picture, avatar.geometry(size, policy), closer, fit)


def needs_close_ups(config: ModelConfig) -> bool:
    """Whether a model is of the embedded kind: those of full size make small faces as well as others."""
    return takes_reference_tokens(config)


def view_of(picture: np.ndarray, whole: Geometry, closer: Geometry | None = None, fit: Fit = "crop") -> View:
    """How a picture [*, *, 3] becomes a video of the geometry `whole`, or, where its face is small, of `closer`."""
    frame = fit_picture(picture, whole.width, whole.height, fit)
    region = close_up_of(frame, (closer.width, closer.height)) if closer else None
    if closer is None or region is None:
        return View(frame, whole)
    scale = min(_SHARPEST, math.ceil(closer.height / region.height))
    fine = fit_picture(picture, scale * whole.width, scale * whole.height, fit)
    rows = slice(scale * region.y, scale * (region.y + region.height))
    columns = slice(scale * region.x, scale * (region.x + region.width))
    return View(resize(fine[rows, columns], closer.width, closer.height), closer, Paste(frame, region, _FEATHER))


def close_up_of(frame: np.ndarray, size: tuple[int, int]) -> Region | None:
    """The part of a frame [H, W, 3] that is to fill (width, height); None where the face is large enough or unread."""
    face = find_face(frame)
    return None if face is None else region_about(face, (frame.shape[1], frame.shape[0]), size)


def region_about(face: Face, within: tuple[int, int], size: tuple[int, int]) -> Region | None:
    """A rectangle of the shape of `size` (width, height) about a face, inside a picture of `within`.

    None where that would not make enough of a difference (`CLOSER`).
    """
    width, height = size
    wanted = 2 * face.size / FACE_SHARE
    if height / wanted < CLOSER:
        return None
    rows = min(wanted, within[1], within[0] * height / width)
    sides = (max(1, round(rows * width / height)), max(1, round(rows)))
    if math.prod(sides) * CLOSER**2 > math.prod(within):
        return None
    x, y = (
        min(max(0, round(centre - side / 2)), most - side)
        for centre, side, most in zip(face.centre, sides, within, strict=True)
    )
    return Region(x, y, *sides)


def find_face(frame: np.ndarray) -> Face | None:
    """The drawn face of a picture [H, W, 3]; None where the reader sees none that stays in its place."""
    if min(frame.shape[:2]) < 32:
        return None
    reader, still = _reader(), frame[None]
    error = reader_error(reader, still)
    if error > STEADY:
        return None
    return read_face(reader.read(torch.from_numpy(still.copy())), error, 1.0)


@cache
def _reader() -> MouthReader:
    return load_mouth_reader()
