"""What worker processes do: look through a video, cut a clip out of it, draw an avatar. No weights but the detector's.

Shape legend: T pixel frames of a clip, H W pixel size; pictures uint8 [H, W, 3] RGB; sound float32 [n].
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...audio import SAMPLE_RATE
from ...media import face
from ...media.picture import resize
from .. import clips
from . import track, video
from .faces import FaceDetector, Moment
from .settings import Content, VideoOptions
from .shots import ShotFilter
from .sources import Source

log = logging.getLogger(__name__)

DETECTION_SIDE = 640
"""Pictures are brought to this longer side before a detector sees them: a face of 80 pixels in 1080p is 27 there."""

TAIL = Fraction(1, 2)
"""Seconds of sound kept after a clip: audio front ends look ahead, and a stream does not end with its training clip."""


@dataclass(frozen=True)
class Cut:
    """One clip of a plan.

    first: its first picture. crop: x0 y0 x1 y1 in the video. rows [T, 14]: the face, in pixels of the clip, to a tenth.
    """

    first: int
    crop: tuple[int, int, int, int]
    rows: list[list[float]]


@dataclass(frozen=True)
class Plan:
    """What a look through a video found.

    bytes: size of the file, to notice another one under its name. error: why nothing can be made of it. seconds: that
    were looked through; lost: seconds by reason. refused: keys of clips turned down when they were cut, and why.
    """

    id: str
    name: str
    bytes: int
    fps: int
    width: int = 0
    height: int = 0
    start: str = "0"
    seconds: float = 0.0
    error: str = ""
    damage: str = ""
    cuts: tuple[Cut, ...] = ()
    lost: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def key(self, cut: Cut) -> str:
        """Name of a clip's sample."""
        return f"{self.id}-{cut.first:07d}"

    @property
    def track(self) -> video.Track:
        return video.Track(self.width, self.height, Fraction(self.start), self.seconds)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """ValueError, KeyError or TypeError for another text."""
        facts = json.loads(text)
        cuts = tuple(Cut(c["first"], tuple(c["crop"]), c["rows"]) for c in facts.pop("cuts"))
        return Plan(**facts, cuts=cuts)


@dataclass(frozen=True)
class Clip:
    """A clip as the encoders take it.

    frames [T, H, W, 3]; sound [n] at `rate` Hz, from the beginning of the clip and past its end; mouth, eyes [T, 4]:
    boxes x0 y0 x1 y1 in pixels; face: ArcFace's picture [112, 112, 3], or None. facts: what the sample says of itself.
    """

    key: str
    seed: int
    frames: NDArray[np.uint8]
    sound: NDArray[np.float32]
    rate: int
    mouth: NDArray[np.float32]
    eyes: NDArray[np.float32]
    face: NDArray[np.uint8] | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """A clip of a plan that was turned down when it was cut."""

    key: str
    reason: str


# Looking


def scan(source: Source, detector: FaceDetector, content: Content, options: VideoOptions) -> Plan:
    """Look through a whole video, small, and plan its clips. A video that cannot be used gives a plan that says why."""
    empty = Plan(source.id, source.name, source.path.stat().st_size, content.fps)
    try:
        found = video.probe(source.path)
        damage = video.Damage()
        shots, count = _looks(source, found, detector, content.fps, options, damage)
    except video.SourceError as error:
        return Plan(**{**vars(empty), "error": str(error)})
    lost: Counter[str] = Counter()
    cuts: list[Cut] = []
    for (start, looks), stop in zip(shots, [*(first for first, _ in shots[1:]), count], strict=True):
        spans, missed = track.spans(range(start, stop), looks, content.fps)
        lost += missed
        for span in spans:
            cuts += _cuts(span, found, content, options, lost)
    return Plan(
        **{
            **vars(empty),
            "width": found.width,
            "height": found.height,
            "start": str(found.start),
            "seconds": round(count / content.fps, 3),
            "damage": damage.first,
            "cuts": tuple(cuts),
            "lost": {reason: round(n / content.fps, 3) for reason, n in lost.items()},
        }
    )


def _looks(
    source: Source,
    found: video.Track,
    detector: FaceDetector,
    fps: int,
    options: VideoOptions,
    damage: video.Damage,
) -> tuple[list[tuple[int, list[track.Look]]], int]:
    """(first picture, looks for faces) of each shot, and the number of pictures."""
    shots: list[tuple[int, list[track.Look]]] = []
    shot_filter, count = ShotFilter(options.cut), 0
    for picture in video.pictures(source.path, found, fps, longest=DETECTION_SIDE, damage=damage):
        index, count = count, count + 1
        if (picture is not None and shot_filter.begins(picture)) or not shots:
            shots.append((index, []))
        looks = shots[-1][1]
        if picture is None:
            looks.append(track.Look(index, None, track.DAMAGED))
        elif not looks or index % options.detect_every == 0 or looks[-1].reason == track.DAMAGED:
            moment = Moment(source.name, (index + 0.5) / fps, found.width, found.height)
            faces = detector.detect(picture, moment)
            looks.append(track.judge(index, faces, found.width, found.height, options.min_face))
    return shots, count


def _cuts(
    span: track.Span, found: video.Track, content: Content, options: VideoOptions, lost: Counter[str]
) -> Iterator[Cut]:
    """Clips side by side from the beginning of a span; what is left over or fails is counted."""
    length, size = content.frames, (content.width, content.height)
    rest = len(span.rows) % length
    if rest:
        lost[track.SHORT] += rest
    smooth = track.smoothed(span.rows, content.fps)
    for begin in range(0, len(span.rows) - rest, length):
        rows = smooth[begin : begin + length]
        crop = track.crop_of(rows, (found.width, found.height), size, options.face_share)
        if crop is None:
            lost[track.MOVES] += length
            continue
        inside = track.in_crop(rows, crop, size)
        yield Cut(span.start + begin, crop, [[round(float(v), 1) for v in row] for row in inside])


# Cutting


def cut(source: Source, plan: Plan, which: Cut, content: Content, options: VideoOptions) -> Clip | Refusal:
    """Decode one clip of a plan: pictures cropped and resized, sound at 16 kHz."""
    key, damage = plan.key(which), video.Damage()
    try:
        heard = _heard(source, plan, which, content, damage)
        if _level(heard[: round(content.frames * SAMPLE_RATE / content.fps)]) < options.quietest:
            return Refusal(key, track.SILENT)
        frames, first = _cropped(source, plan, which, content, damage)
    except video.SourceError as error:
        return Refusal(key, str(error))
    if len(frames) < content.frames:
        return Refusal(key, track.DAMAGED)
    rows = np.array(which.rows, np.float32)
    facts = {
        "kind": "video",
        "source": plan.name,
        "start": round(which.first / content.fps, 4),
        "seconds": round(content.frames / content.fps, 4),
        "crop": list(which.crop),
        "magnified": round(content.height / (which.crop[3] - which.crop[1]), 3),
        "level_db": round(_level(heard), 1),
        "damage": damage.first or plan.damage,
        "prompt": source.prompt,
    }
    return Clip(
        key,
        _seed(key),
        np.stack(frames),
        heard,
        SAMPLE_RATE,
        track.mouth_boxes(rows),
        track.eye_boxes(rows),
        _aligned(first, rows[0], which.crop, (content.width, content.height)),
        facts,
    )


def _heard(source: Source, plan: Plan, which: Cut, content: Content, damage: video.Damage) -> NDArray[np.float32]:
    begin = Fraction(plan.start) + Fraction(which.first, content.fps)
    return video.sound(source.path, begin, begin + Fraction(content.frames, content.fps) + TAIL, damage)


def _cropped(
    source: Source, plan: Plan, which: Cut, content: Content, damage: video.Damage
) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint8]]:
    """The clip's pictures, and the whole first one."""
    x0, y0, x1, y1 = which.crop
    frames: list[NDArray[np.uint8]] = []
    whole = np.zeros((1, 1, 3), np.uint8)
    for picture in video.pictures(source.path, plan.track, content.fps, which.first, damage=damage):
        if picture is None:
            break
        whole = whole if frames else picture
        frames.append(resize(picture[y0:y1, x0:x1], content.width, content.height))
        if len(frames) == content.frames:
            break
    return frames, whole


def _level(sound: NDArray[np.float32]) -> float:
    """Root mean square of a sound in dB of full scale."""
    return float(10 * np.log10(np.mean(sound.astype(np.float64) ** 2) + 1e-12))


def _aligned(
    whole: NDArray[np.uint8], row: NDArray[np.float32], crop: tuple[int, int, int, int], size: tuple[int, int]
) -> NDArray[np.uint8] | None:
    """The face of a whole picture in ArcFace's place, as sharp as the video; None for points that are no face's."""
    origin = np.array(crop[:2], np.float32)
    scale = (np.array(crop[2:], np.float32) - origin) / np.array(size, np.float32)
    points = (row[4:].reshape(5, 2) * scale + origin).astype(np.float32)
    try:
        return face.aligned(whole, points)
    except ValueError as error:
        log.info("%s", error)
        return None


def _seed(key: str) -> int:
    """A number for a key: 62 bits, so that it is a positive int64."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) >> 2


# Drawing


def drawn_key(seed: int) -> str:
    return f"drawn-{seed:09d}"


def draw(seed: int, content: Content) -> Clip:
    """The drawn clip of a seed as `training/clips.py` stores it: sound disturbed, some photo-like, half mirrored."""
    with tempfile.TemporaryDirectory() as folder:
        path = clips.write_clip(Path(folder), seed, content.frames, (content.height, content.width))
        clip = clips.read_clip(path)
    facts = {
        "kind": "drawn",
        "source": clip.source,
        "start": 0.0,
        "seconds": round(content.frames / content.fps, 4),
        "photo": clip.photo,
        "prompt": "",
    }
    boxes = clip.boxes.numpy()
    sound = clip.audio.numpy()
    return Clip(
        drawn_key(seed), seed, clip.video.numpy(), sound, clip.sample_rate, boxes[:, 0], boxes[:, 1], None, facts
    )
