"""Curves of a video, one number a frame, made in one pass over its frames.

Shape legend: T pixel frames, S looks (a few a second), H W pixel size, D feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..media.opencv import opencv
from . import pictures
from .face import Face
from .video import Frames

Curve = NDArray[np.float64]
LOOKS = 4  # a second, at who is shown


@dataclass(frozen=True)
class Curves:
    """What one pass over the frames gives.

    change [T]: mean absolute difference from the frame before, in grey levels of 0..255; the first is 0.
    mouth_change [T]: the same in the lower middle of the face. lab [T, 3]: mean CIE L* 0..100, a*, b*.
    sharpness [T]: standard deviation of the Laplacian, in grey levels.
    looks [S]: indices of the frames at which layout and colours were taken. layout [S]: cosine distance 0..2 of the
    layout feature of the face from the reference's. colours [S]: Hellinger distance 0..1 of the colour histograms.
    """

    fps: float
    change: Curve
    mouth_change: Curve
    lab: Curve
    sharpness: Curve
    looks: NDArray[np.int64]
    layout: Curve
    colours: Curve

    @property
    def frames(self) -> int:
        return len(self.change)

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    @property
    def minutes(self) -> Curve:
        """[T] when each frame is shown."""
        return np.arange(self.frames) / self.fps / 60


def trace(pieces: Iterable[Frames], fps: float, face: Face, reference: Frames | None) -> Curves:
    """Curves of frames [T, H, W, 3] that come in pieces.

    reference: [H, W, 3] of the same size, to which the person is compared; None: the mean over the looks of the first
    second.
    """
    step = max(1, round(fps / LOOKS))
    rows: list[tuple[float, ...]] = []
    looks: list[int] = []
    layout: list[NDArray[np.float64]] = []
    colours: list[NDArray[np.float64]] = []
    before: Frames | None = None
    for piece in pieces:
        for frame in piece:
            rows.append(_row(frame, frame if before is None else before, face))
            if (len(rows) - 1) % step == 0:
                looks.append(len(rows) - 1)
                layout.append(pictures.layout_feature(frame[None], face.box))
                colours.append(pictures.colour_histogram(frame[None]))
            before = frame
    table = np.array(rows)
    if reference is None:
        own_layout, own_colours = np.mean(layout[:LOOKS], axis=0), np.mean(colours[:LOOKS], axis=0)
    else:
        own_layout = pictures.layout_feature(reference[None], face.box)
        own_colours = pictures.colour_histogram(reference[None])
    return Curves(
        fps,
        table[:, 0],
        table[:, 1],
        table[:, 2:5],
        table[:, 5],
        np.array(looks),
        np.array([pictures.feature_distance(one, own_layout) for one in layout]),
        np.array([pictures.histogram_distance(one, own_colours) for one in colours]),
    )


def _row(frame: Frames, before: Frames, face: Face) -> tuple[float, ...]:
    """change, mouth_change, L, a, b, sharpness."""
    cv2 = opencv()
    difference = cv2.absdiff(frame, before)
    mouth = pictures.region(face.mouth, frame.shape[:2])
    lab = cv2.cvtColor(np.float32(frame.mean((0, 1), keepdims=True)) / 255, cv2.COLOR_RGB2LAB)[0, 0]
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return (
        float(difference.mean()),
        float(difference[mouth].mean()),
        *(float(value) for value in lab),
        float(cv2.Laplacian(grey, cv2.CV_32F).std()),
    )
