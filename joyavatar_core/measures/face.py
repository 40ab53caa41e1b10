"""Where the face is in a video, without a detector: read by the mouth reader, given by hand, or assumed.

The reader was trained on drawn people. It says something about whatever it is shown, so it is put to a test that
needs no truth: when the picture is moved or mirrored, what it has found must move along. On drawn faces it does, to a
hundredth of a face; on photographs and landscapes it does not.

Shape legend: T pixel frames, H W pixel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .mouth_reader import MouthReader, Reading
from .video import Frames

STEADY = 0.06  # half face heights: the reader's answer may be off by so much after a move, or it reads no face
_SHIFT = 0.03  # of the picture's longer side
_LOOKS = 6  # frames that are tested


@dataclass(frozen=True)
class Face:
    """One place for a whole video: an avatar hardly moves.

    centre: (x, y) of the point between eyes and mouth, pixels. size: half the height of the face, pixels.
    source: how it was found. error: of the reader under moves, in half face heights; nan where it was not asked.
    """

    centre: tuple[float, float]
    size: float
    source: Literal["read", "given", "assumed"]
    error: float

    @property
    def box(self) -> NDArray[np.float64]:
        """x0 y0 x1 y1 of the face."""
        (x, y), half = self.centre, self.size
        return np.array([x - 0.85 * half, y - half, x + 0.85 * half, y + half])

    @property
    def mouth(self) -> NDArray[np.float64]:
        """x0 y0 x1 y1 of the lower middle of the face: mouth and chin."""
        (x, y), half = self.centre, self.size
        return np.array([x - 0.45 * half, y + 0.15 * half, x + 0.45 * half, y + 0.85 * half])


def given_face(text: str) -> Face:
    """From "X0,Y0,X1,Y1" in pixels: forehead to chin. Raises ValueError for other text or an empty box."""
    parts = text.split(",")
    try:
        x0, y0, x1, y1 = (float(part) for part in parts)
    except ValueError:
        raise ValueError(f"--face {text!r}: write it as X0,Y0,X1,Y1 in pixels") from None
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"--face {text!r}: X1 must be above X0 and Y1 above Y0")
    return Face(((x0 + x1) / 2, (y0 + y1) / 2), (y1 - y0) / 2, "given", float("nan"))


def assumed_face(width: int, height: int) -> Face:
    """Where portraits have it: in the middle, above half height."""
    return Face((0.5 * width, 0.45 * height), 0.32 * min(width, height), "assumed", float("nan"))


def reader_error(reader: MouthReader, frames: Frames) -> float:
    """How far the reader's place fails to follow a shifted and a mirrored picture: median, in half face heights."""
    height, width = frames.shape[1:3]
    if min(height, width) < 32:
        return float("inf")
    frames = frames[np.linspace(0, len(frames) - 1, min(_LOOKS, len(frames))).round().astype(int)]
    dx, dy = (max(1, round(_SHIFT * max(height, width))) for _ in range(2))
    padded = np.pad(frames, ((0, 0), (dy, 0), (dx, 0), (0, 0)), mode="edge")[:, :height, :width]
    errors = []
    plain, moved, mirrored = (_places(reader, f) for f in (frames, padded, frames[:, :, ::-1]))
    errors.append(np.hypot(moved[:, 0] - plain[:, 0] - dx, moved[:, 1] - plain[:, 1] - dy) / plain[:, 2])
    errors.append(np.hypot(width - 1 - mirrored[:, 0] - plain[:, 0], mirrored[:, 1] - plain[:, 1]) / plain[:, 2])
    return float(np.median(np.maximum(*errors)))


def _places(reader: MouthReader, frames: Frames) -> NDArray[np.float64]:
    return reader.read(torch.from_numpy(frames.copy())).place.double().numpy()


def read_face(reading: Reading, error: float, scale: float) -> Face:
    """The median place of a reading of frames that were `scale` times as large as the video's."""
    x, y, size, _ = np.median(reading.place.double().numpy(), axis=0) / scale
    return Face((float(x), float(y)), float(size), "read", error)
