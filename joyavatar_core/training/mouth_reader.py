"""Trains the mouth reader on drawn frames, on one thread of a CPU, within a budget of wall-clock time.

    python -m joyavatar_core.training.mouth_reader --out DIR --minutes 45 [--initial FILE [--keep locator eyes]]
        [--resume]

What limits a reader is how many people it has seen: a process beside draws new ones all the time, and the oldest of a
pool go. Two thirds of the mouths come from speech, the rest from chance, so that opening, width and teeth are not read
from one another. Frames are softened, stored as JPEG, made noisy, mirrored and recoloured, for a generator's frames
are none too clean. --keep takes parts of a finished reader as they are; the others begin anew. In DIR:
mouth-reader.safetensors (averaged weights in bfloat16, ready to use), train.safetensors (what --resume reads) and
curve.jsonl.

Shape legend: N clips of the pool, B clips of a batch, K frames of a clip, T frames, H W pixel size, h w size of a
crop.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cache, partial
from itertools import count
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .. import checkpoint
from ..measures.mouth_reader import (
    APART,
    EYES_CROP,
    MOUTH_CROP,
    THUMB,
    Crop,
    CropReader,
    MouthReader,
    Place,
    as_frames,
    cut,
    letterbox,
    load_mouth_reader,
    turned,
)
from ..measures.statistics import r_squared
from ..media.opencv import opencv
from .clips import SIZES
from .common import Muon, Weights, autocast, beside, rate_scale, record
from .drawn import HELD_OUT_SEED, Avatar, Image, Pose, boxes, motion, photo_like, render
from .speech import synthesize

log = logging.getLogger(__name__)

QUANTITIES = ("open", "wide", "teeth", "blink")
PARTS = ("locator", "mouth", "eyes")
_FRAMES = 10  # of a clip
_MOUTH, _EYES = Crop(122, 134, 84.0), Crop(62, 97, 44.0)  # what the pool keeps of a frame, upright
_SCALES = torch.tensor([0.25, 0.5, 0.25, 0.08, 0.08])  # deviations: open, wide, teeth, and the two offsets
_EYE_SCALES = torch.tensor([0.3, 0.08, 0.08])
_ASIDE_WEIGHT = 0.15


@dataclass(frozen=True)
class Recipe:
    """All that decides a training, beside the machine. Seeds from `seed` millions on are drawn.

    clips: people of a step. fresh: new ones a step at most, if they are drawn by then. pool: people kept. speeches:
    whose mouths they move. keep: parts of the reader that do not learn: locator, mouth, eyes.
    """

    seed: int = 800
    minutes: float = 45.0
    clips: int = 20
    fresh: int = 4
    pool: int = 2000
    speeches: int = 40
    held_out: int = 30
    keep: tuple[str, ...] = ()
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.03
    clip_norm: float = 2.0
    ema: float = 0.998

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 900:
            raise ValueError(f"seed {self.seed} must lie in 0 .. 899: it counts millions, and 900 on are held out")
        if self.minutes <= 0:
            raise ValueError(f"minutes {self.minutes} must be positive")
        if self.pool < self.clips:
            raise ValueError(f"a pool of {self.pool} people: a step takes {self.clips}")
        if unknown := set(self.keep) - set(PARTS):
            raise ValueError(f"no part of a reader: {', '.join(sorted(unknown))}; its parts are {', '.join(PARTS)}")


# Frames


@dataclass(frozen=True)
class Frames:
    """K frames of one person. thumbs [K, 3, 64, 64], mouths and eyes [K, 3, h, w] uint8; truth [K, 4]: QUANTITIES;
    spots [K, 2, 2]: mouth and eyes (x, y) in 0..1 of the thumbnail."""

    thumbs: Tensor
    mouths: Tensor
    eyes: Tensor
    truth: Tensor
    spots: Tensor


def true_place(avatar: Avatar, poses: Sequence[Pose], size: tuple[int, int]) -> Place:
    """Where the drawn face lies."""
    found = np.stack([boxes(avatar, pose, size) for pose in poses])
    middle = torch.from_numpy((found[..., :2] + found[..., 2:]) / 2)
    return Place(middle[:, 0], middle[:, 1])


def prepare(video: Image, poses: Sequence[Pose], place: Place) -> Frames:
    """What the pool keeps of a clip."""
    frames = as_frames(torch.from_numpy(video))
    thumbs, scale, offset = letterbox(frames)
    spots = (torch.stack([place.mouth, place.eyes], 1) * scale + offset + 0.5) / THUMB
    mouths = cut(frames, place.mouth, place.size, place.roll, _MOUTH)
    eyes = cut(frames, place.eyes, place.size, place.roll, _EYES)
    truth = torch.tensor([[getattr(pose, name) for name in QUANTITIES] for pose in poses])
    return Frames(_bytes(thumbs), _bytes(mouths), _bytes(eyes), truth, spots)


def _bytes(frames: Tensor) -> Tensor:
    return frames.add(1).mul(127.5).round().clamp(0, 255).byte()


def random_poses(rng: np.random.Generator, spoken: tuple[Pose, ...], count: int) -> tuple[Pose, ...]:
    """Poses of one clip: mouth from speech or by chance, within limits of the clip's own; so the blink. In three of
    ten all is as it was spoken."""
    poses = [spoken[i] for i in rng.integers(len(spoken), size=count)]
    if rng.random() < 0.3:
        return tuple(poses)
    if rng.random() < 0.5:
        most, round_, spread = rng.uniform(0.1, 1.0) ** 0.5, -rng.uniform(0, 1), rng.uniform(0, 1)
        shut = rng.random() < 0.3  # then a third of the frames rest
        for i in range(count):
            if not (shut and rng.random() < 0.35):
                mouth = (rng.uniform(0, most), rng.uniform(round_, spread), rng.uniform(0, 1) ** 1.5)
                poses[i] = replace(poses[i], open=mouth[0], wide=mouth[1], teeth=mouth[2])
            else:
                poses[i] = replace(poses[i], open=0.0, wide=0.0, teeth=0.0)
    if rng.random() < 0.5:
        poses = [replace(pose, blink=rng.uniform(0, 1) if rng.random() < 0.6 else 0.0) for pose in poses]
    lean, aside = rng.normal(0, 0.03), rng.normal(0, 0.03, 2)
    return tuple(replace(p, roll=p.roll + lean, head_x=p.head_x + aside[0], head_y=p.head_y + aside[1]) for p in poses)


def degrade(rng: np.random.Generator, video: Image) -> Image:
    """Frames [T, H, W, 3] as generators and codecs leave them: softer, coarser, noisy; many as they came."""
    cv2 = opencv()
    height, width = video.shape[1:3]
    out = video
    if rng.random() < 0.12:
        out = photo_like(int(rng.integers(2**31)), out)
    if rng.random() < 0.35:
        deviation = rng.uniform(0.3, 1.8) * min(height, width) / 256
        out = np.stack([cv2.GaussianBlur(frame, (0, 0), deviation) for frame in out])
    if rng.random() < 0.25:
        small = tuple(round(side * rng.uniform(0.45, 0.9)) for side in (width, height))
        down = [cv2.resize(frame, small, interpolation=cv2.INTER_AREA) for frame in out]
        out = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in down])
    if rng.random() < 0.3:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 85))]
        stored = [cv2.imencode(".jpg", frame, quality)[1] for frame in out]
        out = np.stack([np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8) for jpeg in stored])
    if rng.random() < 0.2:
        noise = rng.standard_normal(out.shape, np.float32) * rng.uniform(1, 8)
        out = np.clip(out + noise, 0, 255).astype(np.uint8)
    return out


def spoken_poses(seed: int, seconds: float = 8.0) -> tuple[Pose, ...]:
    """The motion of some speech."""
    speech = synthesize(seed, seconds, 16)
    return motion(seed, speech, len(speech.open))


def draw_clip(seed: int, spoken: tuple[Pose, ...]) -> Frames:
    """A random person in one of the sizes, in random poses, two of three degraded."""
    rng = np.random.default_rng((seed, 5))
    size = SIZES[rng.choice(3, p=(0.4, 0.2, 0.4))]
    avatar, poses = Avatar.random(seed), random_poses(rng, spoken, _FRAMES)
    video, _ = render(avatar, poses, size)
    video = degrade(rng, video) if rng.random() < 0.65 else video
    return prepare(video, poses, true_place(avatar, poses, size))


def people(recipe: Recipe, first: int) -> Iterator[tuple[NDArray[Any], ...]]:
    """Endless people, each the arrays of a Frames; a speech of theirs is replaced now and then."""
    bank = [spoken_poses(first + i) for i in range(recipe.speeches)]
    for i, seed in enumerate(count(first)):
        yield tuple(tensor.numpy() for tensor in astuple(draw_clip(seed, bank[i % len(bank)])))
        if i % 200 == 199:
            bank[i // 200 % len(bank)] = spoken_poses(seed)


class Pool:
    """People in memory, of whom the oldest are replaced."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.drawn = recipe, 0
        self.clips: list[Frames] = []

    def add(self, person: tuple[NDArray[Any], ...]) -> None:
        """One more."""
        place = self.drawn % self.recipe.pool
        self.clips[place : place + 1] = [Frames(*map(torch.from_numpy, person))]
        self.drawn += 1

    def take(self, queue: Queue) -> None:
        """Wait until there are enough for a batch; then those who wait in the queue, as many as a step may take."""
        while len(self.clips) < self.recipe.clips:
            self.add(queue.get(timeout=300))
        for _ in range(self.recipe.fresh):
            try:
                self.add(queue.get_nowait())
            except Empty:
                return

    def batch(self, rng: np.random.Generator) -> Frames:
        """Clips by chance, [B, K, ...]."""
        chosen = [self.clips[i] for i in rng.integers(len(self.clips), size=self.recipe.clips)]
        return Frames(*(torch.stack([getattr(clip, f.name) for clip in chosen]) for f in fields(Frames)))


@dataclass(frozen=True)
class Look:
    """How the clips of a batch are shown: mirrored or not [B], the order of the channels for all, gain and offset
    [B, 1, 3, 1, 1] and noise [B, 1, 1, 1, 1] of each."""

    mirrored: Tensor
    order: list[int]
    gain: Tensor
    offset: Tensor
    noise: Tensor

    @staticmethod
    def random(rng: np.random.Generator, clips: int) -> Look:
        """Half of them mirrored, all recoloured, half noisy."""
        order = [int(i) for i in rng.permutation(3)] if rng.random() < 0.2 else [0, 1, 2]
        gain = rng.uniform(0.6, 1.3, (clips, 1, 1, 1, 1)) * rng.uniform(0.85, 1.15, (clips, 1, 3, 1, 1))
        noise = rng.uniform(0, 0.05, (clips, 1, 1, 1, 1)) * (rng.random((clips, 1, 1, 1, 1)) < 0.5)
        offset = rng.uniform(-0.25, 0.25, (clips, 1, 1, 1, 1))
        mirrored = torch.from_numpy(rng.random(clips) < 0.5)
        return Look(mirrored, order, _tensor(gain), _tensor(offset), _tensor(noise))

    def apply(self, images: Tensor) -> Tensor:
        """Images [B, K, 3, H, W] in [-1, 1], as they are shown."""
        images = torch.where(self.mirrored.view(-1, 1, 1, 1, 1), images.flip(-1), images)
        images = images if self.order == [0, 1, 2] else images[:, :, self.order]
        return images * self.gain + self.offset + self.noise * _grain(images.shape)


@cache
def _grains() -> Tensor:
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))


def _grain(shape: torch.Size) -> Tensor:
    """Normal noise of this shape, from a store: to make it anew would take longer than the convolutions."""
    start = int(torch.randint(len(_grains()) - shape.numel(), ()))
    return _grains()[start : start + shape.numel()].view(shape)


def _tensor(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


# Training


def loss_of(
    reader: MouthReader, batch: Frames, rng: np.random.Generator, keep: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Losses of a batch [B, K, ...] of the parts that learn: the coarse look at two frames of a clip, crops set aside
    at random."""
    look, losses = Look.random(rng, len(batch.truth)), {}
    truth = batch.truth.flatten(0, 1)
    if "locator" not in keep:
        losses["place"] = _place_loss(reader, batch, look, rng)
    if "mouth" not in keep:
        error = _crop_error(reader.mouth, (batch.mouths, _MOUTH, MOUTH_CROP), truth[:, :3], look, rng) / _SCALES
        losses |= {"mouth": error[:, :3].square().mean(), "aside": _ASIDE_WEIGHT * error[:, 3:].square().mean()}
    if "eyes" not in keep:
        error = _crop_error(reader.eyes, (batch.eyes, _EYES, EYES_CROP), truth[:, 3:], look, rng) / _EYE_SCALES
        losses |= {"blink": error[:, :1].square().mean(), "eyes_aside": _ASIDE_WEIGHT * error[:, 1:].square().mean()}
    return losses


def _crop_error(
    part: CropReader, shown: tuple[Tensor, Crop, Crop], truth: Tensor, look: Look, rng: np.random.Generator
) -> Tensor:
    """Readings and places [(B K), outputs] less the truth; shown: of the pool [B, K, 3, H, W], its and our cut."""
    offset, crops = _jittered(rng, shown[0].float(), shown[1], look, shown[2])
    told = part.tell(part.look(crops), len(shown[0])).float()
    return told - torch.cat([truth, offset], 1)


def _place_loss(reader: MouthReader, batch: Frames, look: Look, rng: np.random.Generator) -> Tensor:
    """Distance of mouth and eyes from where they are, in half face heights."""
    rows = torch.arange(len(batch.truth))[:, None]
    picked = torch.from_numpy(rng.integers(batch.truth.shape[1], size=(len(rows), 2)))
    thumbs = look.apply(batch.thumbs[rows, picked].float() / 127.5 - 1)
    spots = batch.spots[rows, picked].clone()
    size = (spots[..., 0, :] - spots[..., 1, :]).norm(dim=-1).flatten() / APART
    spots[..., 0] = torch.where(look.mirrored.view(-1, 1, 1), 1 - spots[..., 0], spots[..., 0])
    offset = (reader.locator(thumbs.flatten(0, 1)) - spots.flatten(0, 1)) / size.view(-1, 1, 1)
    return F.smooth_l1_loss(offset, torch.zeros_like(offset), beta=0.2)


def _jittered(rng: np.random.Generator, kept: Tensor, of: Crop, look: Look, crop: Crop) -> tuple[Tensor, Tensor]:
    """How far aside the truth lies [(B K), 2], and crops [(B K), 3, h, w] of about the middle of what the pool keeps
    [B, K, 3, H, W] (0..255), a cut-out of its own.

    A third of the persons is misplaced a lot, as by the coarse look, the rest a little.
    """
    clips, frames = kept.shape[:2]
    far = np.repeat(np.where(rng.random((clips, 1)) < 0.35, 1.0, 0.25), frames, axis=1)
    wrong = far * (0.06 * rng.standard_normal((clips, 1)) + 0.06 * rng.standard_normal((clips, frames)))
    size = of.density * _tensor(np.exp(np.clip(wrong, -0.3, 0.3))).flatten()
    roll = _tensor(0.06 * far * rng.standard_normal((clips, frames))).flatten()
    offset = _tensor(np.clip(0.08 * far[..., None] * rng.standard_normal((clips, frames, 2)), -0.25, 0.25))
    offset = offset.flatten(0, 1)
    true = torch.tensor([(of.columns - 1) / 2, (of.rows - 1) / 2])
    crops = cut(kept.flatten(0, 1), true - turned(offset, size, roll), size, roll, crop) / 127.5 - 1
    crops = look.apply(crops.unflatten(0, (clips, -1))).flatten(0, 1)
    sign = torch.ones(clips, frames, 2)
    sign[look.mirrored, :, 0] = -1
    return offset * sign.flatten(0, 1), crops


@dataclass
class Training:
    """A training under way; spent: seconds, all sessions together."""

    recipe: Recipe
    out: Path
    weights: Weights
    optimisers: tuple[torch.optim.Optimizer, ...]
    steps: int = 0
    session_steps: int = 0
    spent: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        return self.spent / (60 * self.recipe.minutes)


def step(state: Training, reader: MouthReader, pool: Pool, rng: np.random.Generator) -> None:
    """Learn, publish."""
    with autocast():
        losses = loss_of(reader, pool.batch(rng), rng, state.recipe.keep)
    torch.stack(list(losses.values())).sum().backward()
    state.weights.clip(state.weights.collect(), state.recipe.clip_norm)
    rate = state.recipe.learning_rate * rate_scale(state.session_steps, state.recipe.warmup_steps, state.progress)
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    state.steps, state.session_steps = state.steps + 1, state.session_steps + 1
    state.weights.publish(state.steps)
    for name, value in losses.items():
        loss = float(value.detach())
        state.sums[name] = 0.98 * state.sums.get(name, loss) + 0.02 * loss


def held_out_clips(count: int, frames: int = 32) -> list[tuple[Image, tuple[Pose, ...], Place]]:
    """Held-out people in natural motion, every third frame, in all sizes, as drawn."""
    clips = []
    for i in range(count):
        seed, size = HELD_OUT_SEED + 50_000_000 + i, SIZES[i % len(SIZES)]
        avatar, poses = Avatar.random(seed), spoken_poses(seed, 3 * frames / 16)[::3]
        clips.append((render(avatar, poses, size)[0], poses, true_place(avatar, poses, size)))
    return clips


def measure(reader: MouthReader, clips: list[tuple[Image, tuple[Pose, ...], Place]]) -> dict[str, float]:
    """R2 of each quantity over all frames, and the mean distance of the face's place in face heights."""
    read = [reader.read(torch.from_numpy(video)) for video, _, _ in clips]
    poses = [pose for _, some, _ in clips for pose in some]
    figures = {}
    for name in QUANTITIES:
        truth = np.array([getattr(pose, name) for pose in poses])
        figures[name] = round(r_squared(torch.cat([getattr(r, name) for r in read]).numpy(), truth), 4)
    wrong = [
        ((r.place[:, :2] - (p.mouth + p.eyes) / 2).norm(dim=1) / p.size / 2).mean()
        for r, (_, _, p) in zip(read, clips, strict=True)
    ]
    return {**figures, "place_error": round(float(torch.stack(wrong).mean()), 4)}


def save(state: Training, figures: dict[str, float]) -> None:
    """The averaged weights, ready to use, and what a resumed training needs."""
    average = {name: tensor.bfloat16() for name, tensor in state.weights.average.items()}
    notes = {"steps": str(state.steps), "spent": str(state.spent)}
    about = {"recipe": str(state.recipe), "r2 on held-out drawn frames": str(figures), **notes}
    checkpoint.write(state.out / "mouth-reader.safetensors", average, about)
    tensors = {f"{kind}.{n}": t for kind, part in state.weights.state().items() for n, t in part.items()}
    checkpoint.write(state.out / "train.safetensors", tensors, notes)


def resume(state: Training) -> None:
    """Weights, average and time spent; the optimiser's moments start anew."""
    tensors, notes = checkpoint.read(state.out / "train.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"master": {}, "average": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    state.weights.load(parts)
    state.steps, state.spent = int(notes["steps"]), float(notes["spent"])


def averaged(state: Training) -> MouthReader:
    """A reader with the averaged weights."""
    return checkpoint.load_into(MouthReader(), {n: t.clone() for n, t in state.weights.average.items()}, "average")


def train(recipe: Recipe, out: Path, go_on: bool = False, start: Path | None = None) -> dict[str, float]:
    """Train for recipe.minutes (all sessions together); figures on held-out frames: see `measure`.

    start: a finished reader to begin with, or to take the parts from that are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    reader = begin(recipe, start)
    weights = Weights(reader, recipe.ema)
    state = Training(recipe, out, weights, make_optimisers(recipe, weights))
    if go_on:
        resume(state)
    clips, pool = held_out_clips(recipe.held_out), Pool(recipe)
    first = recipe.seed * 1_000_000 + recipe.fresh * state.steps
    rng = np.random.default_rng((recipe.seed, state.steps))
    with beside(partial(people, recipe, first), most=64) as queue:
        pool.take(queue)  # the process beside has to start first, which is no time of training
        last, measured = time.monotonic(), state.spent
        while state.progress < 1:
            pool.take(queue)
            step(state, reader, pool, rng)
            now = time.monotonic()
            state.spent, last = state.spent + now - last, now
            if state.spent - measured > 180:
                _tell(state, clips)
                measured = state.spent
    return _tell(state, clips)


def begin(recipe: Recipe, start: Path | None) -> MouthReader:
    """A reader to be trained. ValueError for parts to keep without a reader to take them from."""
    if not recipe.keep:
        return load_mouth_reader(start).requires_grad_(True) if start else MouthReader()
    if start is None:
        raise ValueError(f"--keep {' '.join(recipe.keep)}: give --initial, the reader that has them")
    reader, tensors = MouthReader(), checkpoint.read(start)[0]
    for name in recipe.keep:
        part = {n.removeprefix(f"{name}."): t.float() for n, t in tensors.items() if n.startswith(f"{name}.")}
        checkpoint.load_into(getattr(reader, name), part, f"{name} of {start.name}").requires_grad_(False)
    return reader


def make_optimisers(recipe: Recipe, weights: Weights) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the inner convolutions, AdamW for all else."""
    inner = [n for n, p in weights.master.items() if p.dim() == 4 and p.shape[1] > 3]
    rest = [p for n, p in weights.master.items() if n not in inner]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    return adam, Muon([weights.master[n] for n in inner], lr=rate, weight_decay=decay)


def _tell(state: Training, clips: list[tuple[Image, tuple[Pose, ...], Place]]) -> dict[str, float]:
    """Measure, record and save."""
    figures = measure(averaged(state), clips)
    losses = {name: round(value, 4) for name, value in state.sums.items()}
    figures_named = {f"r2_{name}" if name in QUANTITIES else name: value for name, value in figures.items()}
    line = {"step": state.steps, "minutes": round(state.spent / 60, 2), **losses, **figures_named}
    record(state.out / "curve.jsonl", line)
    save(state, figures)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the mouth reader on drawn frames.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="all sessions together")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="first seed drawn, in millions")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--initial", type=Path, help="a finished reader to begin with, e.g. the one in the package")
    parser.add_argument("--keep", nargs="+", choices=PARTS, default=(), help="its parts that stay; others begin anew")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    recipe = Recipe(
        seed=options.seed, minutes=options.minutes, keep=tuple(options.keep), learning_rate=options.learning_rate
    )
    train(recipe, options.out, options.resume, options.initial)


if __name__ == "__main__":
    main()
