"""Clips as latents: the autoencoder run once over every stored clip, kept on disk beside the clips and in memory.

Shape legend: N clips, B batch, C latent channels, F latent frames, h w latent size, W audio tokens of a latent,
T pixel frames, H W pixel size.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..audio import AudioFrontEnd, AudioTrack, LogMel
from ..autoencoder import LightAutoencoder
from ..avatar import load_light_autoencoder
from ..conditioning import ImageChannels, image_channels
from ..geometry import Geometry
from ..manner import DRAWN, HEARD, as_told
from .clips import POSE_COLUMNS, StoredClip, read_clip, read_pose
from .common import autocast

log = logging.getLogger(__name__)


_PICTURES = ("latents", "image", "mouth", "eyes", "own")  # what a close-up cuts


@dataclass(frozen=True)
class EncodedClips:
    """N clips of one size and length, in half precision.

    seed [N] int64; latents [N, F, C, h, w]; image [N, n, C, h, w]: latents of [picture, grey ...];
    audio [N, F, W, channels]; mouth, eyes [N, F, h, w]: share of each cell inside the box; told [N, F, T, K]: the true
    readings of each latent's pixel frames (`manner`), None for clips whose truth nobody knows; own [N, F, C, h, w]:
    what a transformer made of the clips (`rehearsal`), if it did; corner [N, 2] int64: row and column of the first cell
    in the whole picture, None where these are whole pictures.
    """

    seed: Tensor
    latents: Tensor
    image: Tensor
    audio: Tensor
    mouth: Tensor
    eyes: Tensor
    told: Tensor | None = None
    own: Tensor | None = None
    corner: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @cached_property
    def mouth_cells(self) -> Tensor:
        """How many latent cells the mouth of each clip fills at its first frame: [N] float32."""
        return self.mouth[:, 0].float().sum(dim=(1, 2))

    def select(self, rows: slice | Tensor) -> EncodedClips:
        """Some of the clips."""
        return EncodedClips(**{name: tensor[rows] for name, tensor in self._tensors().items()})

    def _tensors(self) -> checkpoint.Tensors:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def tokens(self, patch: tuple[int, int]) -> int:
        """Video tokens of a latent under a transformer's patch."""
        return self.latents.shape[-2] * self.latents.shape[-1] // (patch[0] * patch[1])

    def geometry(self, spatial: int, patch: tuple[int, int], block_latents: int = 3) -> Geometry:
        """Sizes of the clips under an autoencoder of `spatial` pixels a cell and a transformer's patch."""
        height, width = (cells * spatial for cells in self.latents.shape[-2:])
        return Geometry(width, height, block_latents=block_latents, spatial=spatial, patch=patch)

    def close_ups(self, clips: Tensor, cells: int, patch: tuple[int, int], random_: random.Random) -> EncodedClips:
        """The given clips [B] cut to squares of latent cells about the mouth: fewer tokens, most of them face."""
        parts = [self._close_up(int(clip), cells, patch, random_) for clip in clips]
        return EncodedClips(**{name: torch.stack([part[name] for part in parts]) for name in parts[0]})

    def _close_up(self, clip: int, cells: int, patch: tuple[int, int], random_: random.Random) -> checkpoint.Tensors:
        share = self.mouth[clip].float().mean(0)
        corner = []
        for axis, size in enumerate(share.shape):
            wanted = random_.gauss(float(middle(share.sum(1 - axis)[None])) - cells / 2, cells / 8)
            corner.append(min(max(0, round(wanted / patch[axis])), (size - cells) // patch[axis]) * patch[axis])
        y, x = (slice(start, start + cells) for start in corner)
        mine = {name: tensor[clip] for name, tensor in self._tensors().items()}
        cut = {name: tensor[..., y, x] if name in _PICTURES else tensor for name, tensor in mine.items()}
        return cut | {"corner": torch.tensor(corner)}

    def manner(self, clips: Tensor, latents: Tensor) -> Tensor | None:
        """What no sound tells of latent frames [B, F] of clips [B]: [B, F, T, K], 0 in HEARD; None: nobody knows."""
        if self.told is None:
            return None
        told = self.told[clips[:, None], latents].float()
        told[..., : len(HEARD)] = 0
        return told

    def image_channels(self, clips: Tensor, latents: Tensor, temporal: int) -> Tensor:
        """Mask and image channels of latent frames [B, F] of clips [B]: [B, temporal + C, F, h, w]."""
        image = self.image[clips[:, None], latents.clamp(max=self.image.shape[1] - 1)].float()
        mask = (latents == 0).float()[:, :, None, None, None].expand(-1, -1, temporal, *image.shape[-2:])
        return torch.cat([mask, image], dim=2).transpose(1, 2)


def middle(share: Tensor) -> Tensor:
    """Centre of mass [n] of shares [n, cells], in cells from the first one's edge; the middle where there is none."""
    places = torch.arange(share.shape[1], device=share.device) + 0.5
    weight = share.sum(1)
    return torch.where(weight > 0, (share * places).sum(1) / weight.clamp(min=1e-6), share.shape[1] / 2)


@dataclass(frozen=True)
class LatentStore:
    """The clips of a folder and, beside them, their latents for one autoencoder file.

    patch: of the transformer, which the sizes of the clips must fit.
    """

    paths: Sequence[Path]
    folder: Path
    weights: Path
    patch: tuple[int, int]

    @property
    def home(self) -> Path:
        """Where the latents lie; another autoencoder file has another place."""
        return self.folder / f"latents-{checkpoint.sha256_of(self.weights)[:12]}"

    def ready(self) -> list[Path]:
        """Latents there are, in the order of the clips."""
        home = self.home
        return [home / p.name for p in self.paths if (home / p.name).exists()]

    def load(self) -> tuple[EncodedClips, ...]:
        """All of `ready`, clips of one size together, the most frequent size first."""
        groups: dict[torch.Size, list[checkpoint.Tensors]] = {}
        for path in self.ready():
            tensors = checkpoint.read(path)[0] | {"told": true_readings(read_pose(self.folder / path.name)).half()}
            groups.setdefault(tensors["latents"].shape, []).append(tensors)
        return tuple(_stacked(parts) for parts in sorted(groups.values(), key=len, reverse=True))

    def encode(self, count: int | None = None) -> None:
        """Encode the first `count` clips, or all, that are not encoded yet."""
        autoencoder, home = load_light_autoencoder(self.weights), self.home
        home.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(self.paths[:count]):
            if not (home / path.name).exists():
                clip = read_clip(path)
                height, width = clip.video.shape[1:3]
                geometry = Geometry(width, height, clip.fps, spatial=autoencoder.spatial, patch=self.patch)
                tensors = encode_clip(clip, autoencoder, LogMel(geometry), geometry)
                checkpoint.write(home / path.name, tensors, {"seed": str(clip.seed)})
            if i % 100 == 99:
                log.info("%d of %d clips encoded", i + 1, len(self.paths))

    @contextmanager
    def worker(self) -> Iterator[None]:
        """A process that encodes the remaining clips while the block runs."""
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(self,), daemon=True)
        process.start()
        try:
            yield
        finally:
            process.terminate()
            process.join()


def _work(store: LatentStore) -> None:
    if hasattr(os, "nice"):
        os.nice(10)  # what is trained on comes first
    torch.set_num_threads(1)
    store.encode()


@torch.inference_mode()
def encode_clip(
    clip: StoredClip, autoencoder: LightAutoencoder, front_end: AudioFrontEnd, geometry: Geometry
) -> checkpoint.Tensors:
    """One clip as the rows of EncodedClips. ValueError if it does not end with a latent frame."""
    frames = len(clip.video)
    count = geometry.latents_of_frames(frames)
    if geometry.frames_of_latents(count) != frames:
        raise ValueError(f"clip {clip.seed} has {frames} frames: 1 + {geometry.temporal} k are needed; draw it again")
    latents = encode_video(autoencoder, as_video(clip.video))
    image = picture_channels(autoencoder, as_video(clip.video[:1])[:, :, 0])
    return {
        "seed": torch.tensor(clip.seed),
        "latents": latents[0].transpose(0, 1).half().contiguous(),
        "image": image.channels[0, geometry.temporal :].transpose(0, 1).half().contiguous(),
        "audio": front_end.features(as_track(clip.audio, clip.sample_rate), range(count)).tokens.half(),
        "mouth": cell_shares(clip.boxes[:, 0], geometry).half(),
        "eyes": cell_shares(clip.boxes[:, 1], geometry).half(),
    }


def true_readings(pose: Tensor) -> Tensor:
    """The poses of a clip [T, P] as a model is told them, [F, temporal, K]."""
    columns = pose[:, [POSE_COLUMNS.index(name) for name in (*HEARD, *DRAWN)]]
    return by_latent(as_told(columns), Geometry(64, 64))


def by_latent(columns: Tensor, geometry: Geometry) -> Tensor:
    """Columns of pixel frames [T, K] -> [F, temporal, K]; the first latent's one frame is repeated."""
    count = geometry.latents_of_frames(len(columns))
    return columns[torch.tensor([geometry.frames_told(i) for i in range(count)])]


def _stacked(parts: list[checkpoint.Tensors]) -> EncodedClips:
    return EncodedClips(**{name: torch.stack([p[name] for p in parts]) for name in parts[0]})


def encode_video(autoencoder: LightAutoencoder, video: Tensor) -> Tensor:
    """[1, 3, T, H, W] -> latents float32, a second of frames at a time, in bfloat16 where the CPU is quick at it."""
    state, parts = None, []
    with autocast():
        for piece in (video[:, :, :1], *video[:, :, 1:].split(16, dim=2)):
            latents, state = autoencoder.encode_stream(piece, state)
            parts.append(latents.float())
    return torch.cat(parts, dim=2)


def picture_channels(autoencoder: LightAutoencoder, picture: Tensor) -> ImageChannels:
    """The engine's image channels of a picture [1, 3, H, W]."""
    with autocast():
        return ImageChannels(image_channels(autoencoder, picture).channels.float())


def as_video(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] or [B, T, H, W, 3] -> float [B, 3, T, H, W] in [-1, 1]."""
    batch = frames if frames.ndim == 5 else frames[None]
    return batch.movedim(-1, 1).contiguous().float().div_(127.5).sub_(1)


def as_track(audio: Tensor, sample_rate: int) -> AudioTrack:
    """The sound [n] of a clip, ended."""
    track = AudioTrack()
    track.push(audio, sample_rate)
    track.finish()
    return track


def cell_shares(boxes: Tensor, geometry: Geometry) -> Tensor:
    """Boxes [T, 4] in pixels -> share of each latent cell inside the box, mean over its pixel frames: [F, h, w]."""
    h, w = geometry.latent_size
    x0, y0, x1, y1 = (boxes / geometry.spatial).unbind(1)
    across, down = _overlap(x0, x1, w), _overlap(y0, y1, h)  # [T, w], [T, h]
    share = down[:, :, None] * across[:, None, :]
    count = geometry.latents_of_frames(len(boxes))
    return torch.stack([share[list(geometry.frames_of_latent(i))].mean(0) for i in range(count)])


def _overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Length of [low, high] inside each unit cell: [T, cells]."""
    left = torch.arange(cells)
    return (torch.minimum(high[:, None], left + 1) - torch.maximum(low[:, None], left)).clamp(min=0)
