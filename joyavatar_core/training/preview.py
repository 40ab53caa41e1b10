"""What a transformer makes of held-out people: a real rollout, a picture of it, and a number for its lips.

The number needs no landmark detector: the true opening of the mouth is known in every frame, so a ridge regression
from the mouth's pixels to the opening is fitted on the true frames of the same clip and read on the generated ones.

Shape legend: T pixel frames, F latent frames, C latent channels, h w latent size, H W pixel size, S samples of a
mouth patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..audio import AudioTokens
from ..autoencoder import LightAutoencoder
from ..conditioning import ImageChannels, reference_tokens
from ..geometry import Geometry
from ..measures import statistics
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from ..rollout import Condition, Rollout
from .clips import clip_path, read_clip
from .common import autocast
from .encoded import EncodedClips, as_video

_PATCH = 10
_EVERY = 10


@dataclass(frozen=True)
class Preview:
    """Clips to show: their files, the same encoded, and what decodes latents."""

    paths: tuple[Path, ...]
    clips: EncodedClips
    autoencoder: LightAutoencoder
    geometry: Geometry


def choose(held_out: EncodedClips, folder: Path, autoencoder: LightAutoencoder, patch: tuple[int, int]) -> Preview:
    """The first three of the clips, whose files lie in the folder."""
    clips = held_out.select(slice(0, 3))
    geometry = clips.geometry(autoencoder.spatial, patch)
    return Preview(tuple(clip_path(folder, int(seed)) for seed in clips.seed), clips, autoencoder, geometry)


def condition(model: JoyAvatarDiT, clips: EncodedClips, clip: int, geometry: Geometry) -> Condition:
    """What a rollout of one of the clips has of its picture."""
    indices = torch.arange(clips.latents.shape[1])[None]
    channels = clips.image_channels(torch.tensor([clip]), indices, geometry.temporal)
    image = reference_tokens(channels[:, geometry.temporal :, 0], model.config.patch)
    dtype = next(model.parameters()).dtype
    return Condition(model.condition(image=image.to(dtype)), ImageChannels(channels))


def sound(clips: EncodedClips, clip: int, geometry: Geometry) -> dict[int, AudioTokens]:
    """What a rollout of one of the clips has of its sound, by block."""
    blocks = clips.latents.shape[1] // geometry.block_latents
    tokens = clips.audio[clip].float().split(geometry.block_latents)[:blocks]
    return {block: AudioTokens(t, torch.ones(t.shape[:2], dtype=torch.bool)) for block, t in enumerate(tokens)}


@torch.no_grad()  # not inference_mode: RoPE tables are kept, and training uses them too
def roll_out(model: JoyAvatarDiT, policy: RolloutPolicy, show: Preview, clip: int, seed: int = 0) -> Tensor:
    """Latents [1, C, F, h, w] of a whole clip, from its first picture and its sound, by the engine's own rollout."""
    seen, dtype = condition(model, show.clips, clip, show.geometry), next(model.parameters()).dtype
    rollout = Rollout(model, policy, show.geometry, seen, seed, torch.device("cpu"), dtype)
    state = rollout.start()
    state.audio = sound(show.clips, clip, show.geometry)
    return torch.cat([block.latents for block in rollout.run(state, len(state.audio))], dim=2)


@torch.inference_mode()
def decode(autoencoder: LightAutoencoder, latents: Tensor) -> Tensor:
    """[1, C, F, h, w] -> [3, T, H, W] float32 in [-1, 1], in bfloat16 inside, a few latents at a time."""
    state, parts = None, []
    with autocast():
        for piece in latents.float().split(6, dim=2):
            video, state = autoencoder.decode_stream(piece, state)
            parts.append(video.float())
    return torch.cat(parts, dim=2)[0]


def mouth_patches(video: Tensor, box: Tensor) -> Tensor:
    """video [3, T, H, W] -> the mouth as grey values [T, S]; box [4] in pixels, a little enlarged."""
    margin = 0.1 * (box[2:] - box[:2])
    low = (box[:2] - margin).long().clamp(min=0).tolist()
    high = (box[2:] + margin).long().tolist()
    piece = video[:, :, low[1] : high[1], low[0] : high[0]]
    return F.adaptive_avg_pool2d(piece.mean(0)[:, None], _PATCH).flatten(1)


def fit_ruler(patches: Tensor, opening: Tensor, ridge: float = 0.03) -> Tensor:
    """Weights [S + 1] that read the opening [T] from patches [T, S]."""
    x = F.pad(patches, (0, 1), value=1.0)
    gram = x @ x.T
    return x.T @ torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(x)), opening)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, 0 where one does not vary."""
    return statistics.correlation(a.numpy(), b.numpy())


def read_ruler(ruler: Tensor, patches: Tensor) -> Tensor:
    return F.pad(patches, (0, 1), value=1.0) @ ruler


def write_preview(path: Path, show: Preview, make: Callable[[int], Tensor]) -> dict[str, float]:
    """PNG of every clip with true frames above generated ones; correlation of the lips with the truth.

    make: latents [1, C, F, h, w] of clip i, from its start, of its whole length or less.
    `sync` is read on generated frames, `ruler` on every second true frame with a ruler fitted on the others: what
    the ruler itself is good for. `drift` compares the picture's mean colour at both ends with the truth's.
    """
    rows, scores = [], []
    for i, source in enumerate(show.paths):
        clip = read_clip(source)
        made = decode(show.autoencoder, make(i))
        frames = made.shape[1]
        true = as_video(clip.video)[0][:, :frames]
        rows += [_strip(true), _strip(made)]
        scores.append(_scores(true, made, clip.boxes[0, 0], clip.open[:frames]))
    _write_png(path, torch.cat(rows))
    return {name: round(float(np.mean([s[name] for s in scores])), 3) for name in scores[0]}


def _scores(true: Tensor, made: Tensor, box: Tensor, opening: Tensor) -> dict[str, float]:
    real, fake = mouth_patches(true, box), mouth_patches(made, box)
    half = fit_ruler(real[::2], opening[::2])
    return {
        "sync": correlation(read_ruler(fit_ruler(real, opening), fake), opening),
        "ruler": correlation(read_ruler(half, real[1::2]), opening[1::2]),
        "drift": float((made[:, -12:].mean((1, 2, 3)) - true[:, -12:].mean((1, 2, 3))).abs().mean()),
    }


def _strip(video: Tensor) -> Tensor:
    """Every tenth frame beside the other, [H / 2, n W / 2, 3] uint8."""
    small = F.avg_pool2d(video[:, ::_EVERY].transpose(0, 1), 2)  # [n, 3, H / 2, W / 2]
    return small.add(1).mul(127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)


def _write_png(path: Path, picture: Tensor) -> None:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("previews are written by OpenCV: install opencv-python-headless") from error
    cv2.imwrite(str(path), picture.numpy()[..., ::-1])
