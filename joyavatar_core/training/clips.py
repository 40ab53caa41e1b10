"""Clips on disk: drawn talking heads made ahead of training, one safetensors file each, frames as JPEG.

Drawing needs no weights, so it can run beside the training of the autoencoder:
`python -m joyavatar_core.training.clips --out DIR --count 2000`. A clip is a function of its seed; files that are
there already are skipped, so the command may be stopped and run again.

Shape legend: T pixel frames, n sound samples, H W pixel size.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from . import drawn

log = logging.getLogger(__name__)

FRAMES = 117  # thirty latents: ten blocks
_QUALITY = 95
_PHOTO_ODDS, _FLIP_ODDS = 0.3, 0.5


@dataclass(frozen=True)
class StoredClip:
    """One clip as training reads it.

    video: [T, H, W, 3] uint8 RGB. audio: [n] float32 in [-1, 1], mono. mouth, eyes: [T, 4] pixels x0 y0 x1 y1.
    open: [T] true opening of the mouth, 0..1. fps: pixel frames a second. sample_rate: Hz.
    """

    video: Tensor
    audio: Tensor
    mouth: Tensor
    eyes: Tensor
    open: Tensor
    fps: Fraction
    sample_rate: int
    seed: int


def clip_path(folder: Path, seed: int) -> Path:
    """Where the clip of this seed lies."""
    return folder / f"clip_{seed:08d}.safetensors"


def write_clip(folder: Path, seed: int, frames: int = FRAMES, size: tuple[int, int] = (256, 256)) -> Path:
    """Draw the clip of this seed and store it; a third of the clips look like photographs, half are mirrored.

    The file appears under its name only when it is whole.
    """
    rng = np.random.default_rng([seed, 1])
    photo, flip = bool(rng.random() < _PHOTO_ODDS), bool(rng.random() < _FLIP_ODDS)
    clip = drawn.sample_clip(seed, frames, size, photo=photo)
    clip = _mirrored(clip) if flip else clip
    jpegs = [_encode(frame) for frame in clip.video]
    tensors = {
        "frames": np.concatenate(jpegs),
        "sizes": np.array([len(j) for j in jpegs], np.int64),
        "audio": np.round(clip.speech.audio * 32767).astype(np.int16),
        "mouth": np.ascontiguousarray(clip.mouth),
        "eyes": np.ascontiguousarray(clip.eyes),
        "open": np.array([p.open for p in clip.poses], np.float32),
        "wide": np.array([p.wide for p in clip.poses], np.float32),
        "teeth": np.array([p.teeth for p in clip.poses], np.float32),
    }
    facts = {"seed": seed, "fps": str(clip.speech.fps), "sample_rate": clip.speech.sample_rate, "photo": photo}
    path = clip_path(folder, seed)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"clip": json.dumps(facts)})
    part.replace(path)
    return path


def read_clip(path: Path) -> StoredClip:
    """Read and decode a clip. OSError for a file that is not one."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["clip"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise OSError(f"{path} is not a stored clip ({error}): delete it and draw the clips again") from error
    pieces = np.split(tensors["frames"].numpy(), np.cumsum(tensors["sizes"].numpy())[:-1])
    return StoredClip(
        video=torch.from_numpy(np.stack([_decode(piece) for piece in pieces])),
        audio=tensors["audio"].float() / 32767,
        mouth=tensors["mouth"],
        eyes=tensors["eyes"],
        open=tensors["open"],
        fps=Fraction(facts["fps"]),
        sample_rate=facts["sample_rate"],
        seed=facts["seed"],
    )


def list_clips(folder: Path) -> list[Path]:
    """Clips in a folder, by seed. ValueError when there are none."""
    paths = sorted(folder.glob("clip_*.safetensors"))
    if not paths:
        raise ValueError(f"no clips in {folder}: draw some with python -m joyavatar_core.training.clips --out {folder}")
    return paths


def _mirrored(clip: drawn.Clip) -> drawn.Clip:
    width = clip.video.shape[2]

    def turned(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)

    video = np.ascontiguousarray(clip.video[:, :, ::-1])
    return replace(clip, video=video, mouth=turned(clip.mouth), eyes=turned(clip.eyes))


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("clips are stored as JPEG by OpenCV: install opencv-python-headless") from error
    return cv2


def _encode(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = _opencv()
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, _QUALITY),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ]
    return cv2.imencode(".jpg", frame[..., ::-1], options)[1]


def _decode(jpeg: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = _opencv()
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw clips until there are enough."""
    parser = argparse.ArgumentParser(description="Draw talking-head clips for training.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--count", type=int, default=2000, help="clips wanted")
    parser.add_argument("--first-seed", type=int, default=1_000_000, help="seed of the first clip")
    parser.add_argument("--frames", type=int, default=FRAMES, help="pixel frames in a clip: 1 + 4 (latents - 1)")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    _opencv().setNumThreads(1)
    for i in range(options.count):
        seed = options.first_seed + i
        if not clip_path(options.out, seed).exists():
            write_clip(options.out, seed, options.frames, (options.size, options.size))
        if i % 50 == 49:
            log.info("%d of %d clips", i + 1, options.count)


if __name__ == "__main__":
    main()
