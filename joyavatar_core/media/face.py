"""Who it is: five points of a face, the face brought to ArcFace's place, and the 512 numbers of a recogniser.

No weights are in the package and none are fetched. The user supplies
- to find the face: YuNet from the OpenCV Zoo (MIT), or five points by hand;
- to recognise it: any ArcFace-like ONNX file that takes 112 x 112 and gives 512 numbers. InsightFace's are for
  non-commercial research only, so a product needs another one, or the consent of its authors;
- or the 512 numbers themselves, from anywhere.

Shape legend: H W pixel size; a picture is uint8 [H, W, 3] RGB. Points are [5, 2], x before y, in pixels: right eye,
left eye, tip of the nose, right and left corner of the mouth, right and left of the person (the order of YuNet and
ArcFace). An embedding is float32 [512] of length one.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import read
from .opencv import opencv
from .picture import read_picture

logger = logging.getLogger(__name__)

Picture = NDArray[np.uint8]
Points = NDArray[np.float32]
Embedding = NDArray[np.float32]

SIDE = 112
NUMBERS = 512
TEMPLATE: Points = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Where the five points lie in ArcFace's picture of 112 x 112 (InsightFace, face_align.py)."""

DETECTOR_HELP = (
    "give YuNet from the OpenCV Zoo (MIT licence): face_detection_yunet_2023mar.onnx for OpenCV 4, "
    "face_detection_yunet_2026may.onnx for OpenCV 5; or give the five points by hand"
)
RECOGNISER_HELP = (
    f"give an ArcFace ONNX file that gives {NUMBERS} numbers (InsightFace's w600k_r50.onnx and glintr100.onnx are for "
    "non-commercial research only), or the numbers themselves as .npy, .safetensors or .json"
)

_EMBEDDING_FILES = (".npy", ".safetensors", ".json")
_DETECTION_SIDES = (640, 320)  # YuNet finds faces of 10 to 300 pixels: a close-up is looked at small
_LEAST_SCORE = 0.8
_LEAST_EYES = 12.0  # pixels between the eyes below which the embedding says little


@dataclass(frozen=True)
class Recogniser:
    """An ArcFace network in OpenCV's dnn. The network gets (value - mean) / deviation of 0..255, RGB unless `bgr`.

    InsightFace's networks want mean and deviation of 127.5 and RGB; those converted from MXNet do it themselves. Lynx's
    PyTorch ArcFace wants BGR.
    """

    name: str
    network: Any
    mean: float = 127.5
    deviation: float = 127.5
    bgr: bool = False


def load_detector(path: str | Path) -> Any:
    """OpenCV's FaceDetectorYN. Raises ValueError for a file that is missing or is no face detector."""
    path, cv2 = _file(path, "face detector", DETECTOR_HELP), opencv()
    try:
        detector = cv2.FaceDetectorYN.create(str(path), "", (64, 64), _LEAST_SCORE)
        detector.detect(np.full((64, 64, 3), 128, np.uint8))
    except cv2.error as error:
        raise ValueError(
            f"{path}: OpenCV {cv2.__version__} cannot use it ({_reason(error)}); {DETECTOR_HELP}"
        ) from None
    return detector


def load_recogniser(path: str | Path) -> Recogniser:
    """An ArcFace ONNX file. Raises ValueError for a file that is missing, is not ONNX or gives other numbers."""
    path, cv2 = _file(path, "face recogniser", RECOGNISER_HELP), opencv()
    try:
        network = cv2.dnn.readNetFromONNX(str(path))
    except cv2.error as error:
        raise ValueError(
            f"{path}: OpenCV {cv2.__version__} cannot use it ({_reason(error)}); {RECOGNISER_HELP}"
        ) from None
    recogniser = Recogniser(path.name, network)
    if _normalises_itself(path):
        recogniser = replace(recogniser, mean=0.0, deviation=1.0)
    _forward(recogniser, np.full((SIDE, SIDE, 3), 128, np.uint8))
    return recogniser


def points(picture: Picture, detector: Any) -> Points:
    """The five points of the one face in a picture [H, W, 3].

    detector: the path of a YuNet file, or what `load_detector` gave.
    Raises ValueError where there is no face, or more than one.
    """
    detector = load_detector(detector) if isinstance(detector, (str, Path)) else detector
    longest = max(picture.shape[:2])
    rows = np.empty((0, 15), np.float32)
    for side in _DETECTION_SIDES:
        rows = _detect(detector, picture, min(1.0, side / longest))
        if len(rows) or longest <= side // 2:
            break
    if not len(rows):
        raise ValueError(f"no face found in the picture of {_size(picture)}: take another, or give five points by hand")
    if len(rows) > 1:
        places = ", ".join(f"{x + w / 2:.0f},{y + h / 2:.0f}" for x, y, w, h in rows[:4, :4])
        raise ValueError(f"{len(rows)} faces found (at {places}): crop to one, or give its five points by hand")
    return rows[0, 4:14].reshape(5, 2)


def given_points(text: str) -> Points:
    """Five points by hand, from "X,Y X,Y X,Y X,Y X,Y". Raises ValueError for other text."""
    numbers = re.findall(r"[^\s,;]+", text)
    try:
        return np.array([float(n) for n in numbers], np.float32).reshape(5, 2)
    except ValueError:
        raise ValueError(
            f"face points {text!r}: write five of them in pixels, X,Y X,Y X,Y X,Y X,Y (right eye, left eye, nose, "
            "right and left corner of the mouth, as the person has them)"
        ) from None


def aligned(picture: Picture, points: Points) -> Picture:
    """The face of a picture [H, W, 3], turned, scaled and moved to ArcFace's place: [112, 112, 3], black outside.

    Raises ValueError for points that cannot be a face's.
    """
    matrix = similarity(_checked(picture, points))
    return opencv().warpAffine(picture, matrix, (SIDE, SIDE), borderValue=(0, 0, 0))


def similarity(points: Points) -> NDArray[np.float64]:
    """[2, 3]: the turn, scale and shift that bring five points [5, 2] nearest to the template (least squares).

    In complex numbers z -> a z + b, where a is the regression of the centred template on the centred points.
    """
    here, there = (np.asarray(p, np.float64) @ np.array([1, 1j]) for p in (points, TEMPLATE))
    centred = here - here.mean()
    a = (centred.conj() @ (there - there.mean())) / (centred.conj() @ centred).real
    b = there.mean() - a * here.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def embed(picture: Picture, points: Points, model: str | Path | Recogniser) -> Embedding:
    """The embedding of a face in a picture [H, W, 3], of length one, as InsightFace's normed_embedding and Lynx use it.

    model: the path of an ArcFace ONNX file, or what `load_recogniser` gave.
    Raises ValueError for points that are no face's and for a file that is no recogniser.
    """
    model = model if isinstance(model, Recogniser) else load_recogniser(model)
    return unit(_forward(model, aligned(picture, points)), model.name)


def unit(numbers: Any, name: str) -> Embedding:
    """512 numbers from anywhere, called `name`, as an embedding of length one. Raises ValueError for anything else."""
    vector = np.asarray(numbers, np.float64).reshape(-1)
    if vector.size != NUMBERS:
        raise ValueError(f"{name} has {vector.size} numbers: a model takes {NUMBERS} numbers")
    length = float(np.linalg.norm(vector))
    if not math.isfinite(length) or length < 1e-6:
        raise ValueError(f"{name} has length {length:g}: a face embedding has finite numbers that are not all zero")
    return (vector / length).astype(np.float32)


def read_embedding(path: str | Path) -> Embedding:
    """An embedding from a file: .npy, the one tensor of a .safetensors file, or a JSON list of numbers.

    Raises ValueError for anything else. A pickle is never read.
    """
    path = _file(path, "face embedding", RECOGNISER_HELP)
    try:
        numbers = _numbers(path)
        return unit(np.asarray(numbers, np.float64), path.name)
    except (TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no face embedding: {_reason(error)}") from None


def _numbers(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    tensors = list(read(path)[0].values())
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors, where there must be one")
    return tensors[0].double().numpy()


def face_of_file(
    path: str | Path, model: str | Path | None = None, detector: str | Path | None = None, hand: str | None = None
) -> Embedding:
    """The embedding that a file holds, or that a recogniser makes of a picture.

    model, detector: ONNX files, asked for when the file is a picture. hand: five points instead of a detector.
    Raises ValueError (MediaError for the picture) naming what is missing.
    """
    if Path(path).suffix.lower() in _EMBEDDING_FILES:
        return read_embedding(path)
    if model is None:
        raise ValueError(f"{path} is a picture, so a face recogniser is needed: {RECOGNISER_HELP}")
    if detector is None and hand is None:
        raise ValueError(f"{path} is a picture, so the face must be found: {DETECTOR_HELP}")
    picture = read_picture(path)
    found = given_points(hand) if hand is not None else points(picture, detector)
    return embed(picture, found, model)


def _detect(detector: Any, picture: Picture, scale: float) -> NDArray[np.float32]:
    """YuNet's rows [n, 15], in pixels of the picture: x, y, width, height, five points, score."""
    cv2 = opencv()
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    detector.setInputSize((picture.shape[1], picture.shape[0]))
    try:
        rows = detector.detect(np.ascontiguousarray(picture[..., ::-1]))[1]
    except cv2.error as error:
        raise ValueError(f"the face detector fails ({_reason(error)}); {DETECTOR_HELP}") from None
    rows = np.empty((0, 15), np.float32) if rows is None else np.array(rows, np.float32)
    rows[:, :14] /= scale
    return rows


def _forward(model: Recogniser, face: Picture) -> NDArray[np.float32]:
    """What a network gives for an aligned face [112, 112, 3]: 512 numbers, of any length."""
    cv2 = opencv()
    blob = cv2.dnn.blobFromImage(face, 1 / model.deviation, (SIDE, SIDE), (model.mean,) * 3, swapRB=model.bgr)
    try:
        model.network.setInput(blob)
        numbers = np.asarray(model.network.forward())
    except cv2.error as error:
        raise ValueError(
            f"{model.name}: it does not take {SIDE}x{SIDE} ({_reason(error)}); {RECOGNISER_HELP}"
        ) from None
    if numbers.size != NUMBERS:
        raise ValueError(f"{model.name} gives {numbers.size} numbers, not {NUMBERS}; {RECOGNISER_HELP}")
    return numbers.reshape(-1)


def _normalises_itself(path: Path) -> bool:
    """Whether a network begins with a subtraction and a multiplication, as those from MXNet do (InsightFace's rule).

    The first nodes stand in the first bytes of an ONNX file.
    """
    with path.open("rb") as file:
        head = file.read(2048)
    return bool(re.search(rb"Sub|_minus", head) and re.search(rb"Mul|_mul", head))


def _checked(picture: Picture, points: Points) -> Points:
    """The points. ValueError for some that cannot be a face's; a warning for a very small face."""
    points = np.asarray(points, np.float32)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"face points of shape {list(points.shape)}: give five finite ones, [5, 2]")
    height, width = picture.shape[:2]
    if not (np.abs(points - [width / 2, height / 2]) <= [width, height]).all():
        raise ValueError(f"face points {_rounded(points)} lie outside the picture of {_size(picture)}: give its pixels")
    eyes = float(np.linalg.norm(points[1] - points[0]))
    down = points[3:].mean(0) - points[:2].mean(0)
    across = points[1] - points[0]
    if eyes < 1 or across[0] * down[1] - across[1] * down[0] <= 0:
        raise ValueError(
            f"face points {_rounded(points)} are not in the order right eye, left eye (of the person), nose, right and "
            "left corner of the mouth: put them so"
        )
    if eyes < _LEAST_EYES:
        logger.warning("the eyes are %.0f pixels apart: too few to tell people apart surely", eyes)
    return points


def _file(path: str | Path, what: str, remedy: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path} for the {what}: {remedy}")
    return path


def _reason(error: Exception) -> str:
    """The last words of OpenCV's long messages."""
    return " ".join(str(error).split())[-120:]


def _size(picture: Picture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


def _rounded(points: Iterable[Any]) -> str:
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
