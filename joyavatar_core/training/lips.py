"""A judge of lips: reads a drawn mouth from latents, so that a training can be told which lips the sound asks for.

    python -m joyavatar_core.training.lips --autoencoder FILE --clips CLIPS --out DIR --minutes 6

Flow matching and distillation weigh a lip as so many cells among others, and a mouth half open is cheap for both. A
judge that was trained on true clips and then left alone says what the lips of generated latents do, and the loss is
how far that is from what they should do (Wav2Lip's expert, LatentSync's supervision; here the truth of the drawing
stands in for a network of sound and lips). It is not the mouth reader of the measures, which sees pixels, was trained
on other people and other frames, and takes no part in any training.

In DIR: lips.safetensors (averaged), curve.jsonl.

Shape legend: N clips, B batch, C latent channels, F latent frames, h w latent size, s side of the window, t pixel
frames of a latent (4), K columns of the truth, D features.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..autoencoder import TEMPORAL
from ..geometry import Geometry
from .batches import Batch, weighted_mean
from .clips import POSE_COLUMNS, clip_path, list_clips, read_pose
from .common import autocast, kept_share, rate_scale, record
from .encoded import EncodedClips, LatentStore, by_latent, middle
from .flow_matching import hold_out

log = logging.getLogger(__name__)

TRUTH = ("open", "wide", "teeth")
"""What is read of a frame: names of the drawn pose."""

KIND = "lip_reader"
_WINDOW = 6  # latent cells: a mouth and what is about it
_SCALES = (0.25, 0.5, 0.25)  # deviations of TRUTH
_SHUT = 0.08  # an opening under this is lips that touch


@dataclass(frozen=True)
class Lips:
    """Where latents show lips: which latent frames they are, frames [B, F], and the mouths' cells, mouth [B, F, h, w].

    wanted [B, F, t, K]: what the lips are to do, in the columns TRUTH; None where nobody knows.
    """

    frames: Tensor
    mouth: Tensor
    wanted: Tensor | None = None

    def part(self, start: int) -> Lips:
        """Without what comes before the latent `start`."""
        wanted = None if self.wanted is None else self.wanted[:, start:]
        return Lips(self.frames[:, start:], self.mouth[:, start:], wanted)


class LipReader(nn.Module):
    """Latents [B, C, F, h, w] and where they show lips -> TRUTH [B, F, t, K].

    A latent is read beside the one before it, if that is there, and the mean of the features of all: who this is.
    """

    def __init__(self, channels: int, width: int = 64, features: int = 128) -> None:
        super().__init__()
        self.look = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * _WINDOW**2, features), nn.ReLU(), nn.Dropout(0.2)),
        )
        self.person = nn.Sequential(nn.Linear(features, features), nn.ReLU())
        self.tell = nn.Sequential(
            *(
                nn.Linear(3 * features, features),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(features, TEMPORAL * len(TRUTH)),
            ),
        )

    def forward(self, latents: Tensor, lips: Lips) -> Tensor:
        seen = self.look(windows(latents, lips.mouth)).unflatten(0, lips.frames.shape)
        follows = F.pad(lips.frames.diff(dim=1) == 1, (1, 0))  # [B, F]
        before = torch.where(follows[..., None], seen.roll(1, dims=1), seen)
        person = self.person(seen).mean(dim=1, keepdim=True).expand_as(seen)
        told = self.tell(torch.cat([seen, before, person], dim=-1))
        return told.float().unflatten(-1, (TEMPORAL, len(TRUTH)))


def windows(latents: Tensor, mouth: Tensor) -> Tensor:
    """Squares of cells about the middle of the mouth, zeros beyond the picture: [(B F), C, s, s]."""
    half = _WINDOW // 2
    padded = F.pad(latents.transpose(1, 2).flatten(0, 1), (half, half, half, half))
    share = mouth.flatten(0, 1)
    starts = [middle(share.sum(3 - axis)).round().long() for axis in (1, 2)]  # the padding makes up for the half
    rows, columns = (start[:, None] + torch.arange(_WINDOW, device=share.device) for start in starts)
    which = torch.arange(len(padded), device=share.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load_lip_reader(path: Path) -> LipReader:
    """A judge that learns no more. CheckpointError if the file is another's."""
    reader = checkpoint.load_module(path, _reader_for, "lip reader")
    return reader.float().eval().requires_grad_(False)


def _reader_for(metadata: Mapping[str, str], tensors: checkpoint.Tensors) -> LipReader:
    if metadata.get("kind") != KIND:
        raise checkpoint.CheckpointError(f"not a judge of lips but {metadata.get('kind', 'something else')}: train one")
    return LipReader(tensors["look.0.weight"].shape[1])


# Truth


@dataclass(frozen=True)
class LipTruth:
    """What the lips of the stored clips of a folder do; read when it is asked for, kept in memory."""

    folder: Path
    lips: dict[int, Tensor] = field(default_factory=dict)

    def of(self, seeds: Tensor, frames: Tensor) -> Tensor:
        """Of the latent frames [B, F] of the clips of these seeds [B]: [B, F, t, K]. OSError for a damaged clip."""
        return torch.stack([self._clip(seed)[f] for seed, f in zip(seeds.tolist(), frames, strict=True)])

    def _clip(self, seed: int) -> Tensor:
        """[F, t, K] of a whole clip."""
        if seed not in self.lips:
            pose = read_pose(clip_path(self.folder, seed))
            columns = [POSE_COLUMNS.index(name) for name in TRUTH]
            self.lips[seed] = by_latent(pose[:, columns], Geometry(64, 64))
        return self.lips[seed]


def lip_error(read: Tensor, wanted: Tensor, shut: float = 1.0) -> Tensor:
    """Squared error [B, F] of readings [B, F, t, K] in shares of the usual deviations, mean over frames and columns.

    Frames whose lips are to touch count `shut` times: a missed m, b or p is what people see.
    """
    error = ((read - wanted) / torch.tensor(_SCALES, device=read.device)).square().mean(dim=-1)
    return (error * torch.where(wanted[..., 0] < _SHUT, shut, 1.0)).mean(dim=-1)


@dataclass(frozen=True)
class LipLoss:
    """What a judge of lips has to say. weight: of its loss; shut: see `lip_error`."""

    reader: LipReader
    weight: float
    shut: float

    @torch.no_grad()
    def seen(self, latents: Tensor, lips: Lips) -> Lips:
        """The lips of true latents are wanted, as the judge reads them: where it is wrong about a person, it is wrong
        about what is made of this person too."""
        return replace(lips, wanted=self.reader(latents, lips))

    def of_window(self, batch: Batch, made: Tensor) -> Tensor:
        """Of the clean latents made [B, C, F, h, w] of a batch, those of the window, against the true ones."""
        counts = torch.ones(batch.frames.shape)
        counts[:, : batch.layout.lead] = 0
        return self(made, self.seen(batch.true, Lips(batch.frames, batch.mouth)), counts)

    def __call__(self, latents: Tensor, lips: Lips, counts: Tensor) -> Tensor:
        """weight times the mean of `lip_error` of latents [B, C, F, h, w] over those that count; counts [B, F]."""
        assert lips.wanted is not None
        return self.weight * weighted_mean(
            lip_error(self.reader(latents.float(), lips), lips.wanted, self.shut), counts
        )


def load_lip_loss(path: Path, weight: float, shut: float) -> LipLoss:
    """The judge of a file."""
    return LipLoss(load_lip_reader(path), weight, shut)


# Training


@dataclass(frozen=True)
class Recipe:
    """batch: clips of a step; frames: latents of each. noise: the most that is put on the latents, for a generator's
    are none too clean."""

    minutes: float = 6.0
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    batch: int = 32
    frames: int = 8
    noise: float = 0.4
    average: float = 0.995
    held_out: int = 40


@torch.no_grad()
def explained(reader: LipReader, data: EncodedClips, truth: LipTruth) -> dict[str, float]:
    """R2 of each column of the truth over all latents of the clips."""
    every = torch.arange(data.latents.shape[1]).expand(len(data), -1)
    latents, lips = cut(data, torch.arange(len(data)), every)
    read, true = reader(latents, lips).flatten(0, 2), truth.of(data.seed, lips.frames).flatten(0, 2)
    share = (read - true).square().sum(0) / (true - true.mean(0)).square().sum(0).clamp(min=1e-6)
    return {f"read_{name}": round(1 - float(value), 3) for name, value in zip(TRUTH, share, strict=True)}


def cut(data: EncodedClips, clips: Tensor, frames: Tensor) -> tuple[Tensor, Lips]:
    """Latent frames [B, F] of clips [B]: [B, C, F, h, w], and where they show lips."""
    rows = clips[:, None]
    return data.latents[rows, frames].float().transpose(1, 2), Lips(frames, data.mouth[rows, frames].float())


def step_loss(
    reader: LipReader, data: EncodedClips, truth: LipTruth, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """On pieces by chance of clips by chance."""
    clips = torch.randint(len(data), (recipe.batch,), generator=generator)
    starts = torch.randint(data.latents.shape[1] - recipe.frames + 1, (recipe.batch,), generator=generator)
    latents, lips = cut(data, clips, starts[:, None] + torch.arange(recipe.frames))
    strength = recipe.noise * torch.rand(recipe.batch, 1, 1, 1, 1, generator=generator)
    with autocast():
        read = reader(latents + strength * torch.randn(latents.shape, generator=generator), lips)
    return lip_error(read, truth.of(data.seed[clips], lips.frames)).mean()


def train(recipe: Recipe, out: Path, clips: Path, autoencoder: Path) -> dict[str, float]:
    """Train for recipe.minutes of wall-clock time on the clips that are encoded; R2 on those held out."""
    out.mkdir(parents=True, exist_ok=True)
    store = LatentStore(list_clips(clips), clips, autoencoder, (1, 1))
    store.encode()
    parts, held_out = hold_out(store.load(), recipe.held_out)
    truth = LipTruth(clips)
    torch.manual_seed(recipe.seed)
    reader = LipReader(held_out.latents.shape[2])
    average, generator = copy.deepcopy(reader).eval(), torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(reader.parameters(), weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    begun = told = time.monotonic()
    step, sizes = 0, [float(len(part)) for part in parts]
    while (spent := time.monotonic() - begun) < 60 * recipe.minutes:
        part = parts[int(torch.multinomial(torch.tensor(sizes), 1, generator=generator))]
        loss = step_loss(reader, part, truth, recipe, generator)
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate_scale(step, recipe.warmup_steps, spent / (60 * recipe.minutes))
        optimiser.step()
        keep = kept_share(recipe.average, step)
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), reader.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        step += 1
        if time.monotonic() - told > 60:
            told = time.monotonic()
            record(out / "curve.jsonl", {"step": step, "loss": loss.item(), **explained(average, held_out, truth)})
    figures = explained(average, held_out, truth)
    record(out / "curve.jsonl", {"step": step, **figures})
    metadata = {
        "kind": KIND,
        "recipe": checkpoint.config_to_json(recipe),
        "notes": str({"steps": step, **figures}),
    }
    checkpoint.write(out / "lips.safetensors", average.state_dict(), metadata)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train a judge of lips on the latents of drawn clips.")
    parser.add_argument("--autoencoder", type=Path, required=True, help="autoencoder.safetensors")
    parser.add_argument("--clips", type=Path, required=True, help="folder of training.clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    given = {name: vars(options)[name] for name in ("minutes", "seed")}
    recipe = replace(Recipe(), **{name: value for name, value in given.items() if value is not None})
    train(recipe, options.out, options.clips, options.autoencoder)


if __name__ == "__main__":
    main()
