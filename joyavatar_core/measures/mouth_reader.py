"""A small convolutional network that reads mouth, blink and the face's place from frames: the ruler for lip sync.

It reads one person at a time. A coarse look at the whole picture finds mouth, eyes and size; mouth and eyes are cut
out, upright and at one scale, and read. A wide mouth on one face is a common one on another, so each reading also
hears the mean of the features over all frames of the video, of the mouth their deviation too: who this is, but not
when. No frame knows its neighbours, hence nothing is smoothed in time; but each mouth is looked at ten times, a little
aside and in a mirror, and the mean of what is read errs less than any of it.

Shape legend: T pixel frames, H W pixel size, h w size of a crop, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint

WEIGHTS = Path(__file__).parent.parent / "assets" / "mouth-reader.safetensors"

THUMB = 64  # side of the letterboxed picture the coarse look sees
_CHUNK = 64  # frames read at once
_LOOKS = 3  # cuts of mouth and eyes: each finds them nearer to the middle
_ASIDE = ((0.0, 0.0), (0.02, 0.0), (-0.02, 0.0), (0.0, 0.02), (0.0, -0.02))  # of the last one, in half face heights
APART = 0.81  # from the eyes to the mouth, in half face heights: what "size" rests on


@dataclass(frozen=True)
class Crop:
    """A cut-out: rows x columns samples, `density` of them to half the height of the face."""

    rows: int
    columns: int
    density: float


MOUTH_CROP = Crop(72, 84, 78.0)  # a row of teeth behind lips hardly open is a pixel or two high
EYES_CROP = Crop(28, 60, 40.0)


@dataclass(frozen=True)
class Place:
    """Where a face is: mouth, eyes [T, 2] (x, y) in pixels, centres of the boxes that hold them with brows and lips."""

    mouth: Tensor
    eyes: Tensor

    @property
    def size(self) -> Tensor:
        """[T] half the height of a face whose mouth lies as far from its eyes, in pixels: at least one."""
        return (self.mouth - self.eyes).norm(dim=1).clamp(min=APART) / APART

    @property
    def roll(self) -> Tensor:
        """[T] angle of the axis from the eyes down to the mouth, in radians, clockwise."""
        x, y = (self.mouth - self.eyes).unbind(1)
        return torch.atan2(-x, y)

    def moved(self, mouth: Tensor, eyes: Tensor) -> Place:
        """The place after mouth and eyes were found to lie aside by these [T, 2], in half face heights."""
        size, roll = self.size, self.roll
        return Place(self.mouth + turned(mouth, size, roll), self.eyes + turned(eyes, size, roll))

    def part(self, start: int, count: int) -> Place:
        """The place in some of the frames."""
        return Place(self.mouth[start : start + count], self.eyes[start : start + count])


@dataclass(frozen=True)
class Reading:
    """What was read. open, teeth, blink [T] 0..1; wide [T] -1 (round) .. 1 (spread).

    place [T, 4]: x and y of the point between eyes and mouth and the size (see Place), in pixels; roll in radians,
    clockwise.
    """

    open: Tensor
    wide: Tensor
    teeth: Tensor
    blink: Tensor
    place: Tensor


class Locator(nn.Module):
    """Thumbnails [T, 3, 64, 64] in [-1, 1] -> mouth and eyes [T, 2, 2] (x, y) in 0..1 of the thumbnail."""

    def __init__(self, ops: Any = nn) -> None:
        super().__init__()
        self.entry = nn.Sequential(ops.Conv2d(3, 32, 6, 4, 1), nn.ReLU(), ops.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.deep = nn.Sequential(
            *(ops.Conv2d(32, 40, 3, 2, 1), nn.ReLU(), ops.Conv2d(40, 40, 3, 1, 1), nn.ReLU()),
            *(ops.Conv2d(40, 40, 3, 1, 1), nn.ReLU(), ops.Conv2d(40, 32, 1)),
        )
        self.join = nn.Sequential(nn.ReLU(), ops.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.heat = ops.Conv2d(32, 2, 1)

    def forward(self, thumbs: Tensor) -> Tensor:
        fine = self.entry(thumbs)
        features = self.join(fine + F.interpolate(self.deep(fine), scale_factor=2.0))
        side = features.shape[-1]
        heat = self.heat(features).flatten(2).softmax(2)  # [T, 2, cells]
        line = (torch.arange(side, device=heat.device, dtype=heat.dtype) + 0.5) / side
        cells = torch.stack([line.repeat(side), line.repeat_interleave(side)], 1)
        return heat @ cells


class Residual(nn.Module):
    """[T, C, h, w], and what `count` convolutions make of it, added."""

    def __init__(self, width: int, count: int, ops: Any = nn) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ops.Conv2d(width, width, 3, 1, 1) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(F.relu(y))
        return x + y


class CropReader(nn.Module):
    """Crops [T, 3, h, w] of one person -> features -> outputs.

    stride: of the first layer. deep: more layers, and of the person's features the deviation beside the mean.
    """

    def __init__(
        self,
        crop: Crop,
        stride: int,
        widths: tuple[int, int, int, int],
        features: int,
        outputs: int,
        deep: bool = False,
        ops: Any = nn,
    ) -> None:
        super().__init__()
        first, second, third, last = widths
        cells = last * -(-crop.rows // (4 * stride)) * -(-crop.columns // (4 * stride))
        self.deep = deep
        self.layers = nn.Sequential(
            *(ops.Conv2d(3, first, 2 * stride - 1, stride, 1), nn.ReLU()),
            *(ops.Conv2d(first, second, 3, 2, 1), *([Residual(second, 2, ops)] if deep else []), nn.ReLU()),
            ops.Conv2d(second, third, 3, 2, 1),
            *([Residual(third, 1, ops)] if deep else [nn.ReLU(), ops.Conv2d(third, third, 3, 1, 1)]),
            *(nn.ReLU(), ops.Conv2d(third, last, 1), nn.ReLU()),
            nn.Flatten(),
            ops.Linear(cells, features),
        )
        self.person = nn.Sequential(nn.ReLU(), ops.Linear(features, features), nn.ReLU())
        self.head = nn.Sequential(
            nn.ReLU(), ops.Linear((3 if deep else 2) * features, features), nn.ReLU(), ops.Linear(features, outputs)
        )

    def look(self, crops: Tensor) -> Tensor:
        """Features [T, D] of each crop; light and contrast are taken out first."""
        crops = crops - crops.mean((1, 2, 3), keepdim=True)
        return self.layers(crops / (crops.square().mean((1, 2, 3), keepdim=True).sqrt() + 0.05))

    def tell(self, features: Tensor, people: int = 1) -> Tensor:
        """Outputs [T, outputs] from the features of `people` persons, T / people rows each."""
        each = features.unflatten(0, (people, -1))
        person = self.person(each)
        known = [person.mean(1, keepdim=True)]
        if self.deep:
            known.append((person.float().var(1, unbiased=False, keepdim=True) + 1e-4).sqrt().to(each.dtype))
        return self.head(torch.cat([each, *(k.expand_as(each) for k in known)], 2)).flatten(0, 1)


class MouthReader(nn.Module):
    """See the module. `read` is the whole of its use; the parts are public for the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.locator = Locator()
        self.mouth = CropReader(MOUTH_CROP, 3, (40, 64, 96, 24), 72, 5, deep=True)  # open, wide, teeth, dx, dy
        self.eyes = CropReader(EYES_CROP, 2, (16, 32, 40, 18), 40, 3)  # blink, dx, dy

    @torch.no_grad()
    def read(self, video: Tensor) -> Reading:
        """Read frames of one person: uint8 [T, H, W, 3], or float [3, T, H, W] in [-1, 1].

        Raises ValueError for another shape, and for pictures under 32 pixels.
        """
        pieces = frame_pieces(video)
        coarse = [self.locate(as_frames(piece)) for piece in pieces]
        place = Place(torch.cat([p.mouth for p in coarse]), torch.cat([p.eyes for p in coarse]))
        for _ in range(_LOOKS - 1):
            mouth, eyes = self._look(pieces, place)
            place = place.moved(mouth[:, 3:], eyes[:, 1:])
        mouth, eyes = self._look(pieces, place)
        open_, wide, teeth = self._told(pieces, place).unbind(1)
        place = place.moved(mouth[:, 3:], eyes[:, 1:])
        where = torch.column_stack([(place.mouth + place.eyes) / 2, place.size, place.roll])
        return Reading(open_.clamp(0, 1), wide.clamp(-1, 1), teeth.clamp(0, 1), eyes[:, 0].clamp(0, 1), where)

    def _told(self, pieces: tuple[Tensor, ...], place: Place) -> Tensor:
        """open, wide and teeth [T, 3] of the mouths there: means over all looks."""
        looks: list[list[Tensor]] = [[] for _ in range(2 * len(_ASIDE))]  # features of a piece at a time: [t, D]
        for i, piece in enumerate(pieces):
            frames, at = as_frames(piece), place.part(i * _CHUNK, _CHUNK)
            for k, aside in enumerate(_ASIDE):
                centre = at.mouth + turned(torch.tensor(aside).expand_as(at.mouth), at.size, at.roll)
                crops = cut(frames, centre, at.size, at.roll, MOUTH_CROP)
                looks[2 * k].append(self.mouth.look(crops))
                looks[2 * k + 1].append(self.mouth.look(crops.flip(-1)))
        told = [self.mouth.tell(torch.cat(seen))[:, :3] for seen in looks]
        return torch.stack(told).mean(0)

    def _look(self, pieces: tuple[Tensor, ...], place: Place) -> tuple[Tensor, Tensor]:
        """Outputs of mouth [T, 5] and eyes [T, 3] cut out there."""
        mouth, eyes = [], []
        for i, piece in enumerate(pieces):
            frames, at = as_frames(piece), place.part(i * _CHUNK, _CHUNK)
            mouth.append(self.mouth.look(cut(frames, at.mouth, at.size, at.roll, MOUTH_CROP)))
            eyes.append(self.eyes.look(cut(frames, at.eyes, at.size, at.roll, EYES_CROP)))
        return self.mouth.tell(torch.cat(mouth)), self.eyes.tell(torch.cat(eyes))

    def locate(self, frames: Tensor) -> Place:
        """The coarse look at frames [T, 3, H, W] in [-1, 1]."""
        thumbs, scale, offset = letterbox(frames)
        points = (self.locator(thumbs) * THUMB - 0.5 - offset) / scale
        return Place(points[:, 0], points[:, 1])


def load_mouth_reader(path: str | Path = WEIGHTS) -> MouthReader:
    """The reader of the package, or of another file, in float32. CheckpointError if it does not fit."""
    reader = checkpoint.load_module(path, lambda metadata, tensors: MouthReader(), "mouth reader")
    return reader.float().requires_grad_(False)


def frame_pieces(video: Tensor) -> tuple[Tensor, ...]:
    """A video in pieces of a few frames: `read` turns one at a time to float. ValueError as for `read`."""
    bytes_ = video.dtype == torch.uint8
    if video.dim() != 4 or video.shape[3 if bytes_ else 0] != 3 or not video.numel():
        raise ValueError(f"video {tuple(video.shape)} {video.dtype}: give uint8 [T, H, W, 3] or float [3, T, H, W]")
    height, width = video.shape[1:3] if bytes_ else video.shape[2:]
    if min(height, width) < 32:
        raise ValueError(f"frames of {width}x{height} pixels: at least 32x32 are needed to read a mouth")
    return video.split(_CHUNK, dim=0 if bytes_ else 1)


def as_frames(video: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] or float [3, T, H, W] in [-1, 1] -> float32 [T, 3, H, W] in [-1, 1]."""
    if video.dtype == torch.uint8:
        return video.permute(0, 3, 1, 2).float() / 127.5 - 1
    return video.transpose(0, 1).float()


def letterbox(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """frames [T, 3, H, W] -> thumbs [T, 3, 64, 64] with grey bars, and scale and offset [2] (x, y).

    A pixel (x, y) of the frame lies at (x + 0.5) * scale - 0.5 + bar; `offset` holds what is left of that when
    scale * x is taken away.
    """
    height, width = frames.shape[2:]
    longest = max(height, width)
    h, w = (max(1, round(THUMB * side / longest)) for side in (height, width))
    small = F.interpolate(frames, (h, w), mode="bilinear", antialias=True, align_corners=False)
    left, top = (THUMB - w) // 2, (THUMB - h) // 2
    thumbs = F.pad(small, (left, THUMB - w - left, top, THUMB - h - top))
    scale = torch.tensor([w / width, h / height])
    return thumbs, scale, scale / 2 - 0.5 + torch.tensor([left, top])


def cut(frames: Tensor, centre: Tensor, size: Tensor, roll: Tensor, crop: Crop) -> Tensor:
    """Upright crops [T, 3, rows, columns] about centre [T, 2] (pixels) of faces of this size and roll [T].

    Outside of the frame the edge goes on. Frames much finer than the crop are halved first.
    """
    finest = float(size.median()) / crop.density
    while finest >= 2:
        frames, finest = F.avg_pool2d(frames, 2), finest / 2
        centre, size = (centre + 0.5) / 2 - 0.5, size / 2
    x = (torch.arange(crop.columns) + 0.5 - crop.columns / 2) / crop.density
    y = (torch.arange(crop.rows) + 0.5 - crop.rows / 2) / crop.density
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).flatten(0, 1)  # [(rows columns), 2] in half faces
    pixels = centre[:, None] + turned(grid.expand(len(frames), -1, -1), size[:, None], roll[:, None])
    shape = torch.tensor([frames.shape[3], frames.shape[2]])
    places = ((2 * pixels + 1) / shape - 1).unflatten(1, (crop.rows, crop.columns))
    return F.grid_sample(frames, places, mode="bilinear", padding_mode="border", align_corners=False)


def turned(vectors: Tensor, size: Tensor, roll: Tensor) -> Tensor:
    """Vectors [*, 2] (x, y) of the upright face, in half face heights -> pixels of the picture."""
    x, y = vectors.unbind(-1)
    cos, sin = roll.cos() * size, roll.sin() * size
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
