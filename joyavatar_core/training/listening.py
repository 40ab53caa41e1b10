"""Teaches the audio projector to hear the mouth, before the transformer learns to draw it.

    python -m joyavatar_core.training.listening --out DIR --minutes 8

The sound reaches a lip through six layers and four noisy steps: left to the flow loss alone, a projector at random
finds it last, and the drawn clips are too few voices to learn hearing from. Speech is quick to make without pictures,
so that here a linear head on the projected tokens is fitted to the true mouths of new speech at every step; what was
heard once hardly comes again. The head is thrown away, `flow_matching` takes the projector as it is.

At the end the projector is narrowed to what it was taught (`narrow`): a voice has much else to tell, and a transformer
that hears it learns the few voices of its clips by heart.

In DIR: projector.safetensors (averaged), curve.jsonl.

Shape legend: N clips, B batch, F latent frames, W audio tokens of a latent, K columns of the truth, D width, H hidden
width, n latent frames of many clips.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..audio import LogMel
from ..config import MODELS, AudioConfig
from ..geometry import Geometry
from ..projectors import AudioWindowProjector
from .augment import augment
from .common import kept_share, rate_scale, record
from .drawn import HELD_OUT_SEED, motion
from .encoded import as_track
from .speech import synthesize

log = logging.getLogger(__name__)

TRUTH = ("open", "wide", "teeth", "brow", "blink", "head_y")
"""What the sound tells of a frame: columns of the truth, names of the drawn pose."""

_FRAMES = 117
_FIRST_SEED = 400_000_000
_BATCH = 512  # latent frames
_AVERAGE = 0.995


@dataclass(frozen=True)
class Recipe:
    """pool: clips kept in memory, the oldest leaves when one more is spoken. steps_per_clip: updates in between."""

    model: str = "tiny"
    minutes: float = 8.0
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    pool: int = 1200
    first: int = 150
    steps_per_clip: int = 2
    held_out: int = 40


class Listener(nn.Module):
    """Front-end tokens [..., W, channels] -> truth [..., temporal, K], through the model's projector."""

    def __init__(self, audio: AudioConfig, temporal: int) -> None:
        super().__init__()
        self.temporal = temporal
        self.projector = AudioWindowProjector(audio, nn)
        self.head = nn.Linear(audio.tokens * audio.width, temporal * len(TRUTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.projector(tokens).flatten(-2)).unflatten(-1, (self.temporal, -1))


@dataclass(frozen=True)
class Heard:
    """A spoken clip: tokens [F, W, channels] of the augmented sound, truth [F, temporal, K]."""

    tokens: Tensor
    truth: Tensor


def listen(seed: int, front_end: LogMel, geometry: Geometry, frames: int = _FRAMES) -> Heard:
    """The clip of this seed as an untrained ear gets it."""
    speech = synthesize(seed, float(frames / geometry.fps), geometry.fps)
    sound = torch.from_numpy(augment(seed, speech.audio, speech.sample_rate))
    columns = torch.tensor([[getattr(pose, name) for name in TRUTH] for pose in motion(seed, speech, frames)])
    tokens = front_end.features(as_track(sound, speech.sample_rate), range(geometry.latents_of_frames(frames))).tokens
    return Heard(tokens, by_latent(columns, geometry))


def by_latent(columns: Tensor, geometry: Geometry) -> Tensor:
    """Columns of pixel frames [T, K] -> [F, temporal, K]; the first latent's one frame is repeated."""
    count = geometry.latents_of_frames(len(columns))
    frames = [list(geometry.frames_of_latent(i)) for i in range(count)]
    return columns[torch.tensor([f * (geometry.temporal // len(f)) for f in frames])]


@torch.no_grad()
def narrow(listener: Listener, clips: Sequence[Heard], ridge: float = 1e-3) -> None:
    """Let the projector's hidden layer tell nothing but what its best linear reading of the truth rests on.

    Hidden numbers [n, H] are replaced by what is to be expected of them given that reading. Both are linear, so that
    they go into the weights of the last layer and nothing else changes.
    """
    hidden: list[Tensor] = []
    last = listener.projector.proj_out
    hook = last.register_forward_hook(lambda _layer, inputs, _output: hidden.append(inputs[0].flatten(0, -2)))
    for clip in clips:
        listener.projector(clip.tokens)
    hook.remove()
    x, truth = torch.cat(hidden).double(), torch.cat([clip.truth for clip in clips]).flatten(1).double()
    mean = x.mean(0)
    x, truth = x - mean, truth - truth.mean(0)
    spread = x.T @ x / len(x)
    reading = torch.linalg.solve(
        spread + ridge * spread.diagonal().mean() * torch.eye(len(spread)), x.T @ truth / len(x)
    )
    read = x @ reading  # [n, t K]
    scale = read.square().mean(0).sqrt().clamp(min=1e-9)
    read, reading = read / scale, reading / scale
    own = read.T @ read / len(x) + 1e-6 * torch.eye(read.shape[1])
    kept = (reading @ torch.linalg.solve(own, read.T @ x / len(x))).T  # [H, H]
    weight = last.weight.double()
    last.bias.add_((weight @ (mean - kept @ mean)).float())
    last.weight.copy_((weight @ kept).float())


@torch.no_grad()
def explained(listener: Listener, clips: Sequence[Heard]) -> dict[str, float]:
    """R2 of each column of the truth, as `heard_open` and so on."""
    truth = torch.cat([clip.truth for clip in clips]).flatten(0, 1)
    read = listener(torch.cat([clip.tokens for clip in clips])).flatten(0, 1)
    share = (read - truth).square().sum(0) / (truth - truth.mean(0)).square().sum(0).clamp(min=1e-6)
    return {f"heard_{name}": round(1 - float(value), 3) for name, value in zip(TRUTH, share, strict=True)}


def step(listener: Listener, optimiser: torch.optim.Optimizer, clips: Sequence[Heard], random_: random.Random) -> float:
    """One update on latent frames from the whole pool; its mean squared error."""
    chosen = random_.choices(clips, k=_BATCH // 8)
    rows = [torch.randint(len(clip.truth), (8,)) for clip in chosen]
    tokens = torch.cat([clip.tokens[r] for clip, r in zip(chosen, rows, strict=True)])
    truth = torch.cat([clip.truth[r] for clip, r in zip(chosen, rows, strict=True)])
    loss = (listener(tokens) - truth).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def train(recipe: Recipe, out: Path, start: Path | None = None) -> dict[str, float]:
    """Train for recipe.minutes of wall-clock time and leave projector.safetensors in `out`; the held-out figures.

    start: projector to go on from.
    """
    out.mkdir(parents=True, exist_ok=True)
    audio = MODELS[recipe.model].audio
    if audio is None or audio.kind != "window":
        raise ValueError(f"model {recipe.model} has no projector of log-mel windows: listening is for those that have")
    torch.manual_seed(recipe.seed)
    geometry = Geometry(64, 64, Fraction(16), spatial=16)
    listener, front_end = Listener(audio, geometry.temporal), LogMel(geometry)
    if start:
        load_projector(start, listener.projector)
    held_out = [listen(HELD_OUT_SEED + 50_000_000 + i, front_end, geometry) for i in range(recipe.held_out)]
    average = copy.deepcopy(listener)
    spoken = (listen(_FIRST_SEED + recipe.seed + i, front_end, geometry) for i in itertools.count())
    steps, pool = _loop(recipe, out, listener, average, spoken, held_out)
    figures = explained(average, held_out)
    narrow(average, pool)
    figures |= {f"narrowed_{name}": value for name, value in explained(average, held_out).items()}
    clips = recipe.first + steps // recipe.steps_per_clip
    record(out / "curve.jsonl", {"step": steps, "clips": clips, **figures})
    notes = {"steps": steps, "clips": clips, "first_seed": _FIRST_SEED + recipe.seed, **figures}
    metadata = {"kind": "audio_projector", "recipe": checkpoint.config_to_json(recipe), "notes": str(notes)}
    checkpoint.write(out / "projector.safetensors", average.projector.state_dict(), metadata)
    return figures


def _loop(
    recipe: Recipe, out: Path, listener: Listener, average: Listener, spoken: Iterator[Heard], held_out: Sequence[Heard]
) -> tuple[int, Sequence[Heard]]:
    """Steps made, and the clips heard last."""
    optimiser = torch.optim.AdamW(listener.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    random_ = random.Random(recipe.seed)
    pool: deque[Heard] = deque(itertools.islice(spoken, recipe.first), maxlen=recipe.pool)
    start, steps, clips, losses = time.monotonic(), 0, recipe.first, 0.0
    while (progress := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        pool.append(next(spoken))
        clips += 1
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate_scale(steps, 50, progress)
        for _ in range(recipe.steps_per_clip):
            losses += step(listener, optimiser, pool, random_)
            _follow(average, listener, steps)
            steps += 1
        if steps % 500 == 0:
            line = {"step": steps, "minutes": round(progress * recipe.minutes, 2), "loss": round(losses / 500, 4)}
            record(out / "curve.jsonl", {**line, "clips": clips, **explained(average, held_out)})
            losses = 0.0
    return steps, pool


@torch.no_grad()
def _follow(average: Listener, listener: Listener, steps: int) -> None:
    keep = kept_share(_AVERAGE, steps)
    for slow, fast in zip(average.parameters(), listener.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)


def load_projector(path: Path, projector: nn.Module) -> None:
    """Weights of a trained projector, strictly. CheckpointError for a file that does not fit."""
    tensors, _ = checkpoint.read(path)
    checkpoint.load_into(projector, tensors, "audio projector")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Teach the audio projector to hear mouths.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--initial", type=Path, help="projector.safetensors to go on from")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(minutes=options.minutes, seed=options.seed, learning_rate=options.learning_rate)
    train(recipe, options.out, options.initial)


if __name__ == "__main__":
    main()
