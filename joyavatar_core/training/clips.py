"""Clips on disk: drawn talking heads made ahead of training, one safetensors file each, frames as JPEG.

Drawing needs no weights, so it can run beside the training of the autoencoder:
`python -m joyavatar_core.training.clips --out DIR --count 2000`. A clip is a function of its seed; files that are
there already are skipped, so the command may be stopped and run again.

Shape legend: T pixel frames, n sound samples, P numbers of a pose, H W pixel size.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..media.opencv import opencv
from . import drawn
from .augment import augment
from .mouth import TimedPhone

log = logging.getLogger(__name__)

FRAMES = 117  # thirty latents: ten blocks
SIZES = ((256, 256), (320, 192), (192, 320))
POSE_COLUMNS = tuple(field.name for field in fields(drawn.Pose))
_QUALITY = 95
_PHOTO_ODDS, _FLIP_ODDS, _FIRST_SIZE_ODDS = 0.15, 0.5, 0.6


@dataclass(frozen=True)
class StoredClip:
    """One clip as training reads it.

    video: [T, H, W, 3] uint8 RGB. audio: [n] float32 in [-1, 1], mono, as the engine would hear it: augmented.
    boxes: [T, 3, 4] of mouth, eyes and face, pixels x0 y0 x1 y1. pose: [T, P], the columns POSE_COLUMNS.
    phones: the sounds in time. fps: pixel frames a second. sample_rate: Hz. source: who spoke. photo: photo-like.
    """

    video: Tensor
    audio: Tensor
    boxes: Tensor
    pose: Tensor
    phones: tuple[TimedPhone, ...]
    fps: Fraction
    sample_rate: int
    seed: int
    source: str
    photo: bool

    def truth(self, name: str) -> Tensor:
        """[T] one column of `pose`, by its name in drawn.Pose. ValueError for another name."""
        return self.pose[:, POSE_COLUMNS.index(name)]

    @property
    def open(self) -> Tensor:
        """[T] true opening of the mouth, 0..1."""
        return self.truth("open")


def clip_path(folder: Path, seed: int) -> Path:
    """Where the clip of this seed lies."""
    return folder / f"clip_{seed:09d}.safetensors"


def clip_size(seed: int, sizes: Sequence[tuple[int, int]] = SIZES) -> tuple[int, int]:
    """The size (H, W) of the clip of this seed: the first in six of ten, the others alike in the rest."""
    rng = np.random.default_rng((seed, 2))
    first = len(sizes) == 1 or rng.random() < _FIRST_SIZE_ODDS
    return sizes[0] if first else sizes[1 + int(rng.integers(len(sizes) - 1))]


def write_clip(folder: Path, seed: int, frames: int = FRAMES, size: tuple[int, int] = SIZES[0]) -> Path:
    """Draw the clip of this seed and store it; some clips look like photographs, half are mirrored.

    The file appears under its name only when it is whole.
    """
    rng = np.random.default_rng((seed, 1))
    photo, flip = bool(rng.random() < _PHOTO_ODDS), bool(rng.random() < _FLIP_ODDS)
    clip = drawn.sample_clip(seed, frames, size, photo=photo)
    clip = mirrored(clip) if flip else clip
    speech = clip.speech
    jpegs = [_encode(frame) for frame in clip.video]
    tensors = {
        "frames": np.concatenate(jpegs),
        "sizes": np.array([len(j) for j in jpegs], np.int64),
        "audio": np.round(augment(seed, speech.audio, speech.sample_rate) * 32767).astype(np.int16),
        "boxes": np.ascontiguousarray(clip.boxes),
        "pose": np.array([astuple(pose) for pose in clip.poses], np.float32),
    }
    facts = {
        "seed": seed,
        "fps": str(speech.fps),
        "sample_rate": speech.sample_rate,
        "size": size,
        "source": speech.source,
        "photo": photo,
        "phones": [astuple(phone) for phone in speech.phones],
    }
    path = clip_path(folder, seed)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"clip": json.dumps(facts)})
    part.replace(path)
    return path


def read_clip(path: Path) -> StoredClip:
    """Read and decode a clip. OSError for a file that is not one."""
    with _opened(path) as file:
        facts = json.loads((file.metadata() or {})["clip"])
        tensors = {name: file.get_tensor(name) for name in ("frames", "sizes", "audio", "boxes", "pose")}
        phones = tuple(TimedPhone(*phone) for phone in facts["phones"])
    return StoredClip(
        video=_decoded(tensors["frames"], tensors["sizes"].tolist()),
        audio=tensors["audio"].float() / 32767,
        boxes=tensors["boxes"],
        pose=tensors["pose"],
        phones=phones,
        fps=Fraction(facts["fps"]),
        sample_rate=facts["sample_rate"],
        seed=facts["seed"],
        source=facts["source"],
        photo=facts["photo"],
    )


def read_frames(path: Path, frames: slice) -> Tensor:
    """Some of the frames of a clip, one after another: [n, H, W, 3] uint8 RGB. OSError for a file that is not one."""
    with _opened(path) as file:
        sizes: list[int] = file.get_tensor("sizes").tolist()
        begin, shown = sum(sizes[: frames.start]), sizes[frames]
        stored = file.get_slice("frames")[begin : begin + sum(shown)]
    return _decoded(stored, shown)


def read_pose(path: Path) -> Tensor:
    """[T, P] the poses of a stored clip alone. OSError for a file that is not one."""
    with _opened(path) as file:
        return file.get_tensor("pose")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, KeyError) as error:
        raise OSError(f"{path} is not a stored clip ({error}): delete it and draw the clips again") from error


def _decoded(stored: Tensor, sizes: list[int]) -> Tensor:
    """Frames [n, H, W, 3] of their JPEG files, one behind the other, of so many bytes each."""
    pieces = np.split(stored.numpy(), np.cumsum(sizes)[:-1])
    return torch.from_numpy(np.stack([_decode(piece) for piece in pieces]))


def list_clips(folder: Path) -> list[Path]:
    """Clips in a folder, by seed. ValueError when there are none."""
    paths = sorted(folder.glob("clip_*.safetensors"))
    if not paths:
        raise ValueError(f"no clips in {folder}: draw some with python -m joyavatar_core.training.clips --out {folder}")
    return paths


def mirrored(clip: drawn.Clip) -> drawn.Clip:
    """The clip in a mirror: pictures, boxes and poses."""
    width, boxes = clip.video.shape[2], clip.boxes
    return replace(
        clip,
        video=np.ascontiguousarray(clip.video[:, :, ::-1]),
        boxes=np.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1),
        poses=tuple(replace(p, gaze_x=-p.gaze_x, head_x=-p.head_x, roll=-p.roll) for p in clip.poses),
    )


def _encode(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = opencv()
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, _QUALITY),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ]
    return cv2.imencode(".jpg", frame[..., ::-1], options)[1].reshape(-1)


def _decode(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = opencv()
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1]


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give height x width, such as 320x192") from None
    return height, width


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw clips until there are enough."""
    parser = argparse.ArgumentParser(description="Draw talking-head clips for training.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--count", type=int, default=2000, help="clips wanted")
    parser.add_argument("--first-seed", type=int, default=1_000_000, help="seed of the first clip")
    parser.add_argument("--frames", type=int, default=FRAMES, help="pixel frames in a clip: 1 + 4 (latents - 1)")
    parser.add_argument("--sizes", type=_size, nargs="+", default=SIZES, help="HEIGHTxWIDTH; the first is the usual")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    opencv().setNumThreads(1)
    for i in range(options.count):
        seed = options.first_seed + i
        if not clip_path(options.out, seed).exists():
            write_clip(options.out, seed, options.frames, clip_size(seed, options.sizes))
        if i % 50 == 49:
            log.info("%d of %d clips", i + 1, options.count)


if __name__ == "__main__":
    main()
