"""All measures of one video, by name. `MEANINGS` says what each is; docs/evaluate.md what is good.

Shape legend: T pixel frames, N frames spread over the video, H W pixel size, n sound samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..media import MediaError
from ..media.opencv import opencv
from . import curves as traces
from . import drift, frechet, identity, q_align, seams, statistics, sync, syncnet
from .curves import Curves
from .face import STEADY, Face, assumed_face, read_face, reader_error
from .mouth_reader import MouthReader
from .statistics import Interval
from .video import Blocks, Frames, Video, read_sound
from .weights import MISSING, Weights

_READ_SECONDS = 60.0  # at the start, that the mouth reader and SyncNet see
_READ_SIDE = 256  # longest side of the pictures the reader sees
SPREAD = 32  # frames over the whole video for IDC, FID and the contact sheet
_JUDGED = 8  # of these that Q-Align scores
FVD_FRAMES = 64

MEANINGS: dict[str, str] = {
    "length.frames": "frames more (or less) than the sound has: 0 is right",
    "seam.jump": "change at block seams over change at all other frames; 1: no seam is seen",
    "seam.on_truth": "the same at the same places of the clips of --truth",
    "seam.ratio": "seam.jump over seam.on_truth",
    "colour.slope": "drift of the mean colour, CIE76 units (L*a*b*) a minute",
    "colour.lightness_slope": "the same of L* alone, signed",
    "colour.change": "CIE76 distance between the first and the last 30 seconds",
    "sharpness.level": "standard deviation of the Laplacian, grey levels",
    "sharpness.slope": "its growth a minute, in shares of the level",
    "sharpness.change": "from the first to the last 30 seconds, in shares of the first",
    "mouth.motion": "change in the lower middle of the face against the loudness of the sound, correlation, best lag",
    "mouth.motion_lag": "that lag in seconds; positive: the mouth is late",
    "mouth.motion_chance": "the same with sound of other times of the video",
    "mouth.opening": "opening read by the drawn-domain mouth reader against the loudness, correlation, best lag",
    "mouth.opening_lag": "that lag in seconds",
    "mouth.opening_chance": "the same with sound of other times of the video",
    "mouth.reader_error": "half face heights by which the reader fails to follow a moved or mirrored picture; above "
    f"{STEADY:g} it reads no mouth here, and mouth.opening is left out",
    "identity.layout": "distance from the reference of gradient directions and colours in 8 x 8 cells of the face "
    "(layout feature), 0 the same .. 2",
    "identity.layout_start": "the same over the first 30 seconds",
    "identity.layout_end": "the same over the last 30 seconds",
    "identity.colours": "Hellinger distance of the picture's colours from the reference's, 0 the same .. 1",
    "identity.colours_start": "the same over the first 30 seconds",
    "identity.colours_end": "the same over the last 30 seconds",
    "IDC": "cosine of DINOv2 features of frames and reference; higher is better",
    "Sync-C": "SyncNet confidence; higher is better",
    "Sync-D": "SyncNet distance; lower is better",
    "Q_score": "Q-Align score of frames, 0 .. 1; higher is better",
    "Q_face": "Q-Align score of faces, 0 .. 1; higher is better",
    "FID": "Frechet distance of Inception features of frames from those of --truth; lower is better",
    "FVD": "Frechet distance of I3D features of clips from those of --truth; lower is better",
    "FPS": "frames a second while the video was made on this machine",
}


@dataclass(frozen=True)
class Options:
    """How to measure: blocks, face where the user says so; networks; the reader of mouths."""

    reader: MouthReader
    weights: Weights = field(default_factory=Weights)
    blocks: Blocks | None = None
    face: Face | None = None


@dataclass
class Measured:
    """What one video gave. values by name; missing: name -> why not; for plots: curves, frames, mouth and sound [T].

    pictures, clips: features for FID and FVD, [N, D].
    """

    path: Path
    fps: float
    face: Face
    curves: Curves
    shown: Frames
    values: dict[str, Interval] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seams: NDArray[np.int64] | None = None
    sound: NDArray[np.float64] | None = None
    opening: NDArray[np.float64] | None = None
    pictures: NDArray[np.float64] | None = None
    clips: NDArray[np.float64] | None = None

    def put(self, name: str, value: float) -> None:
        """A figure without an interval of its own."""
        self.values[name] = Interval(value, value, value, 1)


def measure(video: Video, options: Options, reference: Frames | None = None, audio: Path | None = None) -> Measured:
    """reference: picture [H, W, 3] of any size, fitted as `joyavatar generate` fits it. audio: instead of the track.

    Raises MediaError for files that cannot be read.
    """
    if reference is not None:
        from ..media.picture import fit_picture

        reference = fit_picture(reference, video.width, video.height)
    face, opening, error = _find_face(video, options)
    traced = traces.trace(video.pieces(), video.fps, face, reference)
    shown = video.at(spread(traced.frames, SPREAD))
    result = Measured(video.path, video.fps, face, traced, shown, opening=opening)
    if np.isfinite(error):
        result.put("mouth.reader_error", error)
    sound = _sound(result, video, audio)
    _seams(result, options.blocks or video.blocks)
    _steadiness(result)
    _mouth(result, sound)
    _networks(result, video, options, reference, sound)
    return result


def spread(frames: int, count: int) -> list[int]:
    """Indices of at most `count` frames, evenly over the video."""
    return sorted(set(np.linspace(0, frames - 1, count).round().astype(int).tolist()))


def _find_face(video: Video, options: Options) -> tuple[Face, NDArray[np.float64] | None, float]:
    """The face, the opening [T] of the first minute where it can be read, and the reader's error (nan: not asked)."""
    cv2 = opencv()
    scale = min(1.0, _READ_SIDE / max(video.width, video.height))
    size = max(1, round(video.width * scale)), max(1, round(video.height * scale))
    small = [
        frame if scale == 1 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        for piece in video.pieces(max(2, round(_READ_SECONDS * video.fps)))
        for frame in piece
    ]
    frames = np.stack(small)
    error = reader_error(options.reader, frames)
    readable = error <= STEADY
    if not readable:
        return options.face or assumed_face(video.width, video.height), None, error
    reading = options.reader.read(torch.from_numpy(frames))
    return options.face or read_face(reading, error, scale), reading.open.double().numpy(), error


def _sound(result: Measured, video: Video, audio: Path | None) -> tuple[NDArray[np.float32], int] | None:
    """The sound, its envelope and the length against it."""
    try:
        samples, rate = read_sound(audio or video.path)
    except MediaError:
        if audio:
            raise
        result.missing["length.frames"] = "the video has no sound that can be read; give --audio"
        return None
    result.put("length.frames", float(result.curves.frames - int(len(samples) / rate * video.fps + 0.5)))
    result.sound = sync.envelope(samples, rate, video.fps, result.curves.frames)
    return samples, rate


def _seams(result: Measured, blocks: Blocks | None) -> None:
    if blocks is None:
        result.missing["seam.jump"] = "the file does not say where its blocks end; give --block-frames"
        return
    result.seams = blocks.seams(result.curves.frames)
    if not len(result.seams):
        result.missing["seam.jump"] = f"{result.curves.frames} frames are one block"
        return
    result.values["seam.jump"] = seams.jump(result.curves.change, result.seams)


def _steadiness(result: Measured) -> None:
    """Colour, sharpness and person over time."""
    traced = result.curves
    lab = traced.lab
    ends = [drift.windows(lab[:, i], traced.seconds) for i in range(3)]
    start, end = (np.array([pair[i] for pair in ends]) for i in (0, 1))
    result.put("colour.change", float(np.linalg.norm(end - start)))
    level, sharp = float(traced.sharpness.mean()), drift.windows(traced.sharpness, traced.seconds)
    result.put("sharpness.level", level)
    if level > 0 and sharp[0] > 0:
        result.put("sharpness.change", sharp[1] / sharp[0] - 1)
    if traced.seconds < drift.LEAST:
        for name in ("colour.slope", "colour.lightness_slope", "sharpness.slope"):
            result.missing[name] = f"{traced.seconds:.2f} s are too short for a slope"
    else:
        slopes = [statistics.slope(lab[:, i], traced.minutes) for i in range(3)]
        result.put("colour.slope", float(np.linalg.norm(slopes)))
        result.values["colour.lightness_slope"] = drift.slope(lab[:, 0], traced.minutes)
        if level > 0:
            result.values["sharpness.slope"] = drift.slope(traced.sharpness / level, traced.minutes)
    for name, values in (("layout", traced.layout), ("colours", traced.colours)):
        start, end = drift.windows(values, traced.seconds)
        result.put(f"identity.{name}", float(values.mean()))
        result.put(f"identity.{name}_start", start)
        result.put(f"identity.{name}_end", end)


def _mouth(result: Measured, sound: object) -> None:
    if sound is None or result.sound is None:
        result.missing["mouth.motion"] = result.missing["mouth.opening"] = result.missing["length.frames"]
        return
    curves = {"motion": result.curves.mouth_change, "opening": result.opening}
    for name, curve in curves.items():
        if curve is None:
            result.missing[f"mouth.{name}"] = "the drawn-domain reader reads no mouth here"
            continue
        try:
            found = sync.relation(curve, result.sound[: len(curve)], result.fps)
        except ValueError as error:
            result.missing[f"mouth.{name}"] = str(error)
            continue
        result.put(f"mouth.{name}", found.correlation)
        result.put(f"mouth.{name}_lag", found.lag)
        if np.isfinite(found.chance):
            result.put(f"mouth.{name}_chance", found.chance)


def _networks(
    result: Measured,
    video: Video,
    options: Options,
    reference: Frames | None,
    sound: tuple[NDArray[np.float32], int] | None,
) -> None:
    """The tiers that need weights of the user's."""
    weights = options.weights
    own = result.shown[0] if reference is None else reference
    if weights.dino is None:
        result.missing["IDC"] = MISSING["IDC"]
    else:
        result.put("IDC", identity.consistency(weights.dino, result.shown[1:], own))
    _syncnet(result, video, weights, sound)
    if weights.q_align is None:
        result.missing["Q_score"] = result.missing["Q_face"] = MISSING["Q_score"]
    else:
        judged = result.shown[spread(len(result.shown), _JUDGED)]
        for name, value in zip(("Q_score", "Q_face"), q_align.score(weights.q_align, judged, result.face), strict=True):
            result.put(name, value)
    if weights.inception is not None:
        result.pictures = frechet.picture_features(weights.inception, result.shown)
    if weights.i3d is not None and result.curves.frames >= frechet.CLIP_FRAMES:
        result.clips = frechet.clip_features(weights.i3d, np.concatenate(list(video.pieces(FVD_FRAMES))))


def _syncnet(result: Measured, video: Video, weights: Weights, sound: tuple[NDArray[np.float32], int] | None) -> None:
    why = MISSING["Sync-C"] if weights.syncnet is None else None
    if why is None and sound is None:
        why = result.missing["length.frames"]
    if why is None and result.curves.seconds * syncnet.FPS < syncnet.SPAN + 1:
        why = f"{result.curves.seconds:.2f} s are too short for SyncNet"
    if why is not None or weights.syncnet is None or sound is None:
        result.missing["Sync-C"] = result.missing["Sync-D"] = str(why)
        return
    limit = round(_READ_SECONDS * syncnet.FPS)
    crops = syncnet.face_crops(video.pieces(), video.fps, result.face, limit)
    found = syncnet.score(weights.syncnet, crops, *sound)
    result.put("Sync-C", found.confidence)
    result.put("Sync-D", found.distance)
