"""Sync-C and Sync-D: SyncNet (Chung and Zisserman, "Out of time: automated lip sync in the wild", ACCV-W 2016).

The network in the layout of the published file syncnet_v2.model, whose weights the user supplies. Picture: five
frames of 25 a second, 224 x 224, BGR, 0..255. Sound: 16 kHz in 16-bit units, 13 cepstral coefficients at 100 Hz, 20 in
a row for the same 0.2 seconds. Both become 1024 numbers, whose distance is small where lips and sound agree.

Shape legend: n sound samples, T pixel frames of 25 a second, C coefficients (13), W windows (T - 5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..media.opencv import opencv
from .face import Face
from .video import Frames, resampled

FPS = 25
SAMPLE_RATE = 16_000
SIDE = 224
SPAN = 5  # frames a window
_CEPSTRA = 4 * SPAN  # columns of 10 ms for the same time
REACH = 15  # frames by which the sound is moved either way
_CROP = 1.4  # half side of the crop, in half face heights
_BATCH = 16
FEATURES = 1024


class SyncNet(nn.Module):
    """Two streams to one space. Key names and shapes are those of syncnet_v2.model (`features`: 1024 there).

    ops: namespace of layer classes, as for the transformer.
    """

    def __init__(self, features: int = FEATURES, ops: Any = nn) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_unit2d(ops, 1, 64, 3, padding=1),
            nn.MaxPool2d(1, 1),
            *_unit2d(ops, 64, 192, 3, padding=1),
            nn.MaxPool2d(3, (1, 2)),
            *_unit2d(ops, 192, 384, 3, padding=1),
            *_unit2d(ops, 384, 256, 3, padding=1),
            *_unit2d(ops, 256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
            *_unit2d(ops, 256, 512, (5, 4)),
        )
        self.netfcaud = _head(ops, features)
        self.netfclip = _head(ops, features)
        self.netcnnlip = nn.Sequential(
            *_unit3d(ops, 3, 96, (5, 7, 7), stride=2),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_unit3d(ops, 96, 256, (1, 5, 5), stride=2, padding=1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_unit3d(ops, 256, 256, (1, 3, 3), padding=1),
            *_unit3d(ops, 256, 256, (1, 3, 3), padding=1),
            *_unit3d(ops, 256, 256, (1, 3, 3), padding=1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_unit3d(ops, 256, 512, (1, 6, 6)),
        )

    def hear(self, cepstra: Tensor) -> Tensor:
        """[W, 1, 13, 20] -> [W, features]."""
        return self.netfcaud(self.netcnnaud(cepstra).flatten(1))

    def look(self, crops: Tensor) -> Tensor:
        """[W, 3, 5, 224, 224] -> [W, features]."""
        return self.netfclip(self.netcnnlip(crops).flatten(1))


def _unit2d(
    ops: Any, inputs: int, outputs: int, kernel: int | tuple[int, int], padding: int = 0
) -> tuple[nn.Module, ...]:
    return ops.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU()


def _unit3d(
    ops: Any, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1, padding: int = 0
) -> tuple[nn.Module, ...]:
    """Stride and padding are spatial: time is only crossed by the first layer's kernel."""
    steps, border = (1, stride, stride), (0, padding, padding)
    return ops.Conv3d(inputs, outputs, kernel, steps, border), nn.BatchNorm3d(outputs), nn.ReLU()


def _head(ops: Any, features: int) -> nn.Sequential:
    return nn.Sequential(ops.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), ops.Linear(512, features))


def load_syncnet(path: str | Path) -> SyncNet:
    """The network with the weights of syncnet_v2.model, or of a file with the same names.

    Only tensors are unpickled. Raises ValueError for a file that is not a state of this network.
    """
    from pickle import UnpicklingError

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = SyncNet(len(state["netfclip.3.bias"]))
        net.load_state_dict(state)
    except (UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not the weights of SyncNet ({reason}); supply syncnet_v2.model") from None
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class SyncScore:
    """confidence: Sync-C, median over offsets minus the smallest mean distance. distance: Sync-D, that smallest.
    offset: frames of 25 a second by which the sound has to be moved for it (positive: the sound is early)."""

    confidence: float
    distance: float
    offset: int


@torch.inference_mode()
def score(net: SyncNet, crops: NDArray[np.uint8], audio: NDArray[np.float32], rate: int) -> SyncScore:
    """crops uint8 RGB [T, 224, 224, 3] at 25 a second, mono sound [n] of the same start.

    Raises ValueError for less than six frames or sound under a quarter of a second.
    """
    sound = resampled(audio, rate, SAMPLE_RATE)
    windows = min(len(crops), len(sound) * FPS // SAMPLE_RATE) - SPAN
    if windows < 1:
        raise ValueError(f"{len(crops)} frames at 25 a second are too short for SyncNet: at least 6 are needed")
    cepstra = torch.from_numpy(cepstra_of(sound)).float()
    seen, heard = [], []
    for start in range(0, windows, _BATCH):
        rows = range(start, min(start + _BATCH, windows))
        pictures = torch.from_numpy(crops[start : rows[-1] + SPAN, :, :, ::-1].copy()).float().permute(3, 0, 1, 2)
        seen.append(net.look(torch.stack([pictures[:, i - start : i - start + SPAN] for i in rows])))
        heard.append(net.hear(torch.stack([cepstra[None, :, 4 * i : 4 * i + _CEPSTRA] for i in rows])))
    return score_features(torch.cat(seen), torch.cat(heard))


def score_features(seen: Tensor, heard: Tensor) -> SyncScore:
    """Features [W, D] of picture and sound. Offsets beyond the ends are compared with zeros, as the published script
    does."""
    padded = F.pad(heard, (0, 0, REACH, REACH))
    distances = [F.pairwise_distance(seen, padded[i : i + len(seen)]).mean() for i in range(2 * REACH + 1)]
    means = torch.stack(distances)
    best = int(means.argmin())
    return SyncScore(float(means.median() - means[best]), float(means[best]), REACH - best)


def cepstra_of(sound: NDArray[np.float32]) -> NDArray[np.float64]:
    """[13, K] coefficients at 100 Hz of 16 kHz sound [n] with 1.0 for full scale."""
    try:
        from python_speech_features import mfcc  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("SyncNet's sound needs python_speech_features: pip install python_speech_features") from error
    samples = np.clip(np.round(sound * 32768.0), -32768, 32767).astype(np.int16)
    return mfcc(samples, SAMPLE_RATE).T


def face_crops(pieces: Iterable[Frames], fps: float, face: Face, frames: int) -> NDArray[np.uint8]:
    """The face as SyncNet was trained on it: at most `frames` squares [T, 224, 224, 3], at 25 a second.

    1.4 times the face's height, moved down by 0.4 of half of it, so that mouth and chin are in the middle; the
    nearest frame in time; beyond the picture it is grey (110), as in the published pipeline.
    """
    cv2 = opencv()
    side = 2 * _CROP * face.size
    left, top = face.centre[0] - _CROP * face.size, face.centre[1] - face.size
    scale = SIDE / side
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    out: list[NDArray[np.uint8]] = []
    index = 0
    for piece in pieces:
        for frame in piece:
            crop = None
            while len(out) < frames and int((len(out) + 0.5) * fps / FPS) == index:
                if crop is None:
                    crop = cv2.warpAffine(frame, matrix, (SIDE, SIDE), borderValue=(110, 110, 110))
                out.append(crop)
            index += 1
            if len(out) == frames:
                return np.stack(out)
    return np.stack(out)
