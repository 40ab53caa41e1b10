"""Who finds the faces: OpenCV's YuNet with a file of the user's, points given by hand, or any object of the same kind.

Shape legend: H W pixel size; a picture is uint8 [H, W, 3] RGB. The five points are those of YuNet, in its order: right
eye, left eye, tip of the nose, right and left corner of the mouth (right and left of the person), x before y.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...media.face import DETECTOR_HELP, load_detector
from ...media.opencv import opencv


@dataclass(frozen=True)
class Face:
    """box [4]: x0 y0 x1 y1, and points [5, 2], in pixels of the video; score 0..1."""

    box: NDArray[np.float32]
    points: NDArray[np.float32]
    score: float = 1.0

    @property
    def height(self) -> float:
        return float(self.box[3] - self.box[1])


@dataclass(frozen=True)
class Moment:
    """Where a picture comes from. source: name of the video. seconds: since its first frame. width, height: its size.

    The picture that goes with it may be smaller: faces are given in pixels of the video.
    """

    source: str
    seconds: float
    width: int
    height: int


class FaceDetector(Protocol):
    """What finds faces. Sent to worker processes, so it must be picklable."""

    def detect(self, picture: NDArray[np.uint8], moment: Moment) -> list[Face]:
        """All faces in a picture [H, W, 3]."""
        ...


@dataclass
class YuNet:
    """OpenCV's cv2.FaceDetectorYN, loaded where it is used. ValueError, when used, for a file that does not serve."""

    path: Path
    _detector: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_detector": None}  # OpenCV's object cannot travel

    def check(self) -> None:
        """Load it. ValueError for a file that is missing or that OpenCV cannot use."""
        self._detector = self._detector or load_detector(self.path)

    def detect(self, picture: NDArray[np.uint8], moment: Moment) -> list[Face]:
        self.check()
        cv2, (height, width) = opencv(), picture.shape[:2]
        try:
            self._detector.setInputSize((width, height))
            found = self._detector.detect(np.ascontiguousarray(picture[..., ::-1]))[1]
        except cv2.error as error:  # OpenCV 5 with the file of a fixed size
            reason = " ".join(str(error).split())[-120:]
            raise ValueError(f"{self.path}: OpenCV cannot use it ({reason}); {DETECTOR_HELP}") from error
        scale = moment.width / width
        return [_face_of_row(np.asarray(row, np.float32), scale) for row in (() if found is None else found)]


def _face_of_row(row: NDArray[np.float32], scale: float) -> Face:
    """YuNet's row: x, y, width, height, five points, score."""
    box = np.array([row[0], row[1], row[0] + row[2], row[1] + row[3]], np.float32)
    return Face(box * scale, row[4:14].reshape(5, 2) * scale, float(row[14]))


@dataclass(frozen=True)
class ByHand:
    """Faces from a file of box and five points: {"talk.mp4": [{"seconds": 0, "box": [4], "points": [[x, y] * 5]}]}.

    Names are paths inside the folder of the videos; pixels are those of the upright video. Between two times the face
    moves in a straight line, before the first and after the last it stays: one entry serves a face that keeps still.
    """

    videos: dict[str, list[tuple[float, Face]]]

    def detect(self, picture: NDArray[np.uint8], moment: Moment) -> list[Face]:
        entries = self.videos.get(moment.source, [])
        if not entries:
            return []
        times = [seconds for seconds, _ in entries]
        rows = np.stack([np.concatenate([face.box, face.points.reshape(-1)]) for _, face in entries])
        row = np.array([np.interp(moment.seconds, times, column) for column in rows.T], np.float32)
        return [Face(row[:4], row[4:].reshape(5, 2))]


def read_points(path: Path) -> ByHand:
    """The file of --points. ValueError naming the video and what is wrong with its entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it must be an object, a list of faces for each name of a video")
    except (OSError, ValueError) as error:
        raise ValueError(f"--points {path} cannot be read: {error}") from error
    return ByHand({name: _entries(path, name, entries) for name, entries in content.items()})


def _entries(path: Path, name: str, entries: Any) -> list[tuple[float, Face]]:
    try:
        faces = [(float(e.get("seconds", 0)), _face_by_hand(e)) for e in entries]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f'--points {path}: {name} needs entries like {{"seconds": 0, "box": [x0, y0, x1, y1], "points": '
            f"[[x, y], ...]}} with five points ({type(error).__name__}: {error})"
        ) from error
    return sorted(faces, key=lambda face: face[0])


def _face_by_hand(entry: dict[str, Any]) -> Face:
    box, points = np.array(entry["box"], np.float32), np.array(entry["points"], np.float32)
    if box.shape != (4,) or points.shape != (5, 2) or box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"box {list(box.shape)} and points {list(points.shape)}")
    return Face(box, points)
