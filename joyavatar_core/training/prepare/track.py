"""From looks at the pictures to clips: which seconds hold one face that stays, and what is cut out of the picture.

Shape legend: n pictures of a video, T pictures of a clip; a row is a face: box x0 y0 x1 y1 and five points x y, [14],
pixels of the video.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .faces import Face

Rows = NDArray[np.float32]
Box = tuple[int, int, int, int]

NO_FACE = "no face"
SEVERAL = "several faces"
SMALL = "face too small"
LEAVES = "face leaves the picture"
DAMAGED = "damaged pictures"
SHORT = "shorter than a clip"
MOVES = "face moves out of the crop"
SILENT = "silent"

_OTHER = 1 / 3  # of the height of the largest face: smaller ones (posters, a crowd) are not company
_OUTSIDE = 0.02  # share of the face's height that may lie outside the picture
_BLINK = 0.25  # seconds for which a detector may lose a face
_JUMP = 0.5  # of the face's height, from one look to the next: somebody else, or a cut that was missed
_SMOOTH = 0.08  # seconds, deviation of the smoothing
_EYE_LINE = 0.46  # height of the middle of the face in the crop
_MARGIN = 0.04  # of the crop, kept free round the face


@dataclass(frozen=True)
class Look:
    """One look for faces at picture `index`: a row, or why there is none."""

    index: int
    row: Rows | None
    reason: str = ""


@dataclass(frozen=True)
class Span:
    """Pictures [start, stop) of one shot in which one face stays: rows [stop - start, 14]."""

    start: int
    rows: Rows

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


def judge(index: int, faces: Sequence[Face], width: int, height: int, min_face: int) -> Look:
    """The one face of a picture of a video of this size, or why it does not serve."""
    if not faces:
        return Look(index, None, NO_FACE)
    largest = max(faces, key=lambda face: face.height)
    if sum(face.height > _OTHER * largest.height for face in faces) > 1:
        return Look(index, None, SEVERAL)
    if largest.height < min_face:
        return Look(index, None, SMALL)
    room = _OUTSIDE * largest.height
    x0, y0, x1, y1 = largest.box
    if x0 < -room or y0 < -room or x1 > width + room or y1 > height + room:
        return Look(index, None, LEAVES)
    return Look(index, np.concatenate([largest.box, largest.points.reshape(-1)]).astype(np.float32))


def spans(shot: range, looks: Sequence[Look], fps: float) -> tuple[list[Span], Counter[str]]:
    """Spans of a shot, and how many of its pictures fail for which reason.

    looks: at some pictures of the shot, in order, the first of them at its beginning. Between two good looks the face
    moves in a straight line; pictures between a good and a bad look share the bad one's reason.
    """
    kept = _without_blinks(looks, fps)
    lost: Counter[str] = Counter()
    groups: list[tuple[list[Look], int]] = []
    last: Look | None = None
    for look, after in zip(kept, [*kept[1:], None], strict=True):
        stop = shot.stop if after is None else after.index
        if look.row is None:
            lost[look.reason] += stop - look.index
        else:
            if after is not None and after.row is None:
                lost[after.reason] += stop - look.index - 1
                stop = look.index + 1
            group = groups.pop()[0] if last is not None and not _jumps(last, look) else []
            group.append(look)
            groups.append((group, stop))
        last = look if look.row is not None else None
    return [_moving(group, stop) for group, stop in groups], lost


def _moving(looks: list[Look], stop: int) -> Span:
    """The span of consecutive good looks: straight lines between them."""
    at = [look.index for look in looks]
    rows = np.stack([look.row for look in looks if look.row is not None])
    between = [np.interp(np.arange(at[0], stop), at, column) for column in rows.T]
    return Span(at[0], np.stack(between, axis=1).astype(np.float32))


def _without_blinks(looks: Sequence[Look], fps: float) -> list[Look]:
    """Looks without those at which a detector lost a face for a moment."""
    good = np.array([look.index for look in looks if look.row is not None])
    if not len(good):
        return list(looks)

    def is_blink(look: Look) -> bool:
        after = int(np.searchsorted(good, look.index))
        return look.reason == NO_FACE and 0 < after < len(good) and good[after] - good[after - 1] <= _BLINK * fps

    return [look for look in looks if not is_blink(look)]


def _jumps(last: Look, look: Look) -> bool:
    assert last.row is not None and look.row is not None
    before, now = last.row[:4].reshape(2, 2), look.row[:4].reshape(2, 2)
    size = before[1, 1] - before[0, 1]
    moved = np.abs(now.mean(0) - before.mean(0)).max()
    return bool(moved > _JUMP * size or abs((now[1, 1] - now[0, 1]) / size - 1) > _JUMP)


def smoothed(rows: Rows, fps: float) -> Rows:
    """Rows [T, 14] averaged over time (Gaussian), edges repeated: detectors tremble by a pixel or two."""
    deviation = _SMOOTH * fps
    reach = int(np.ceil(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    padded = np.pad(rows, ((reach, reach), (0, 0)), mode="edge")
    smooth = [np.convolve(column, weights / weights.sum(), mode="valid") for column in padded.T]
    return np.stack(smooth, axis=1).astype(np.float32)


# What is cut out


def crop_of(rows: Rows, video: tuple[int, int], size: tuple[int, int], face_share: float) -> Box | None:
    """The part x0 y0 x1 y1 of a video of (width, height) that makes a clip of `size` (width, height).

    One box for the whole clip, so that the picture stands as still as the camera did and the head moves in it. The face
    (median height) takes `face_share` of its height; the box grows where the face would leave it, and shrinks where the
    video is too small. None where it cannot hold the face in every picture.
    """
    boxes = rows[:, :4]
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    tall = float(np.median(boxes[:, 3] - boxes[:, 1])) / face_share
    aspect = size[0] / size[1]
    needed = (high - low) * (1 + 2 * _MARGIN)
    tall = max(tall, float(needed[1]), float(needed[0]) / aspect)
    tall = min(tall, video[1], video[0] / aspect)
    wide = tall * aspect
    if wide < high[0] - low[0] or tall < high[1] - low[1]:
        return None
    middle = np.median((boxes[:, :2] + boxes[:, 2:]) / 2, axis=0)
    x = _placed(float(middle[0]) - wide / 2, float(low[0]), float(high[0]), wide, video[0])
    y = _placed(float(middle[1]) - tall * _EYE_LINE, float(low[1]), float(high[1]), tall, video[1])
    return round(x), round(y), min(video[0], round(x + wide)), min(video[1], round(y + tall))


def _placed(wanted: float, low: float, high: float, length: float, room: float) -> float:
    """Where an interval of this length begins: near `wanted`, round [low, high], inside [0, room]."""
    around = min(max(wanted, high - length), low)
    return min(max(around, 0.0), room - length)


def in_crop(rows: Rows, crop: Box, size: tuple[int, int]) -> Rows:
    """Rows in the pixels of a clip of `size` (width, height)."""
    origin = np.array(crop[:2], np.float32)
    scale = np.array(size, np.float32) / (np.array(crop[2:], np.float32) - origin)
    return ((rows.reshape(len(rows), 7, 2) - origin) * scale).reshape(len(rows), 14).astype(np.float32)


def mouth_boxes(rows: Rows) -> NDArray[np.float32]:
    """Boxes [T, 4] of the lips, wide open: from the corners of the mouth, as the five points give no more.

    A turned head brings the corners together: the width counts at least a quarter of the face's height.
    """
    right, left, nose = rows[:, 10:12], rows[:, 12:14], rows[:, 8:10]
    middle = (right + left) / 2
    face = rows[:, 3] - rows[:, 1]
    wide = np.maximum(np.linalg.norm(left - right, axis=1), 0.25 * face)
    top = np.maximum(middle[:, 1] - 0.5 * wide, (middle[:, 1] + nose[:, 1]) / 2)
    sides = (middle[:, 0] - 0.7 * wide, top, middle[:, 0] + 0.7 * wide, middle[:, 1] + 0.65 * wide)
    return np.stack(sides, axis=1).astype(np.float32)


def eye_boxes(rows: Rows) -> NDArray[np.float32]:
    """Boxes [T, 4] of both eyes with brows."""
    right, left = rows[:, 4:6], rows[:, 6:8]
    middle = (right + left) / 2
    apart = np.maximum(np.linalg.norm(left - right, axis=1), 0.25 * (rows[:, 3] - rows[:, 1]))
    low, high = np.minimum(right[:, 0], left[:, 0]), np.maximum(right[:, 0], left[:, 0])
    above, below = middle[:, 1] - 0.55 * apart, middle[:, 1] + 0.35 * apart
    return np.stack([low - 0.45 * apart, above, high + 0.45 * apart, below], axis=1).astype(np.float32)
