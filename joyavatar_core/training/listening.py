"""Teaches the audio projector to hear the mouth, before the transformer learns to draw it.

    python -m joyavatar_core.training.listening --out DIR --minutes 16

The sound reaches a lip through six layers and four noisy steps: left to the flow loss alone, a projector at random
finds it last, and the drawn clips are too few voices to learn hearing from. Speech is quick to make without pictures:
here thousands of clips are spoken, and the projector's readings are fitted to their true mouths. Since a transformer
gets nothing but these readings, better ears of the same kind may take the place of others without training it again.
`flow_matching` takes the projector as it is.

In DIR: projector.safetensors (averaged), curve.jsonl.

Shape legend: B clips of a batch, T pixel frames of a clip, those before its first latent's one included, K columns of
the truth, C channels of a front-end token.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..audio import LogMel
from ..config import MODELS, AudioConfig
from ..geometry import Geometry
from ..manner import HEARD
from ..projectors import AudioWindowProjector
from . import workers
from .augment import augment
from .common import Muon, kept_share, rate_scale, record
from .drawn import HELD_OUT_SEED, motion
from .encoded import as_track, by_latent
from .speech import synthesize

log = logging.getLogger(__name__)

_SCALES = (0.25, 0.4, 0.3, 0.3, 0.3, 0.3)  # usual deviations of what is heard
_WEIGHTS = (1.0, 1.0, 1.0, 0.15, 0.15, 0.15)  # what of brows, lids and heads can be heard is little
_GEOMETRY = Geometry(64, 64, Fraction(16), spatial=16)
_FRAMES = 117
_FIRST_SEED = 400_000_000
_AVERAGE = 0.998


@dataclass(frozen=True)
class Recipe:
    """clips: spoken before training, by so many processes. batch: clips of a step. minutes: of training itself."""

    model: str = "tiny"
    minutes: float = 16.0
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    clip_norm: float = 1.0
    clips: int = 11_000
    processes: int = 2
    batch: int = 8
    held_out: int = 60


@dataclass(frozen=True)
class Heard:
    """A spoken clip: front-end tokens [F, W, C] of its latents in the augmented sound, truth [F, temporal, K].

    Under a front end without surroundings, W = temporal, the tokens are those of consecutive frames.
    """

    tokens: Tensor
    truth: Tensor


def listen(seed: int, front_end: LogMel, geometry: Geometry, frames: int = _FRAMES) -> Heard:
    """The clip of this seed as an untrained ear gets it."""
    speech = synthesize(seed, float(frames / geometry.fps), geometry.fps)
    sound = torch.from_numpy(augment(seed, speech.audio, speech.sample_rate))
    columns = torch.tensor([[getattr(pose, name) for name in HEARD] for pose in motion(seed, speech, frames)])
    tokens = front_end.features(as_track(sound, speech.sample_rate), range(geometry.latents_of_frames(frames))).tokens
    return Heard(tokens, by_latent(columns, geometry))


def _listen_bare(seed: int, frames: int) -> Heard:
    """In half precision: thousands are kept."""
    heard = listen(seed, LogMel(_GEOMETRY, before=0, after=0), _GEOMETRY, frames)
    return Heard(heard.tokens.half(), heard.truth.half())


def speak(first_seed: int, count: int, processes: int, frames: int = _FRAMES) -> Heard:
    """`count` clips from a seed on, stacked: tokens [N, F, temporal, C], truth [N, F, temporal, K], half precision."""
    spoken: list[Heard] = []
    seeds, lengths = range(first_seed, first_seed + count), [frames] * count
    with workers.pool(processes if processes > 1 else 0) as pool:
        each = pool.map(_listen_bare, seeds, lengths, chunksize=25) if pool else map(_listen_bare, seeds, lengths)
        for heard in each:
            spoken.append(heard)
            if len(spoken) % 1000 == 0:
                log.info("%d of %d clips spoken", len(spoken), count)
    return Heard(torch.stack([h.tokens for h in spoken]), torch.stack([h.truth for h in spoken]))


def read(projector: AudioWindowProjector, audio: AudioConfig, tokens: Tensor) -> Tensor:
    """Readings of whole clips, between silences: tokens [B, F, temporal, C] -> [B, T, K]."""
    around = audio.reach // audio.columns
    quiet = tokens.new_full((len(tokens), around, tokens.shape[-1]), -1.0, dtype=torch.float32)
    return projector.read(torch.cat([quiet, tokens.flatten(1, 2).float(), quiet], dim=1))


@torch.no_grad()
def explained(projector: AudioWindowProjector, audio: AudioConfig, clips: Heard) -> dict[str, float]:
    """R2 of each column of the truth, as `heard_open` and so on."""
    truth = clips.truth.flatten(0, 2).float()
    told = torch.cat([read(projector, audio, part) for part in clips.tokens.split(16)]).flatten(0, 1)
    share = (told - truth).square().sum(0) / (truth - truth.mean(0)).square().sum(0).clamp(min=1e-6)
    return {f"heard_{name}": round(1 - float(value), 3) for name, value in zip(HEARD, share, strict=True)}


@torch.no_grad()
def spread(projector: AudioWindowProjector, audio: AudioConfig, clips: Heard, seed: int) -> None:
    """Lay the readings of a latent out over its tokens: each, in its usual deviations, along a direction of its own.

    So what is drawn beside them. A constant keeps the tokens' norm from taking their size away.
    """
    told = torch.cat([read(projector, audio, part) for part in clips.tokens.split(16)])
    latents = told.unflatten(1, (-1, audio.frames_read)).flatten(0, 1)  # [n, frames_read, heard]
    drawn = (0, audio.told - audio.readings)
    mean, usual = (F.pad(t, drawn, value=v).flatten() for t, v in ((latents.mean(0), 0.0), (latents.std(0), 1.0)))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty_like(projector.proj.weight)
    nn.init.orthogonal_(weight, generator=generator)
    weight *= (len(weight) / weight.shape[1]) ** 0.5 / usual.clamp(min=1e-3)
    projector.proj.weight.copy_(weight)
    projector.proj.bias.copy_(torch.randn(len(weight), generator=generator) - weight @ mean)


# Training


class Listening:
    """A projector in training, its average, and the optimisers: Muon for the inner convolutions."""

    def __init__(self, recipe: Recipe, projector: AudioWindowProjector, audio: AudioConfig) -> None:
        self.recipe, self.projector, self.audio, self.steps = recipe, projector, audio, 0
        self.average = copy.deepcopy(projector).requires_grad_(False)
        inner = {n: p for n, p in projector.named_parameters() if n.startswith("convs.") and n.endswith(".weight")}
        rest = [p for n, p in projector.named_parameters() if n.startswith("conv") and n not in inner]
        decay = recipe.weight_decay
        self.optimisers = (
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=decay),
            Muon(inner.values(), lr=recipe.learning_rate, weight_decay=decay),
        )

    def step(self, clips: Heard, progress: float) -> float:
        """One update on clips of a batch; its loss."""
        error = read(self.projector, self.audio, clips.tokens) - clips.truth.flatten(1, 2).float()
        loss = ((error / torch.tensor(_SCALES)).square() * torch.tensor(_WEIGHTS)).mean()
        self.projector.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.projector.parameters(), self.recipe.clip_norm)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.learning_rate * rate_scale(self.steps, self.recipe.warmup_steps, progress)
            optimiser.step()
        self._follow()
        self.steps += 1
        return loss.item()

    @torch.no_grad()
    def _follow(self) -> None:
        keep = kept_share(_AVERAGE, self.steps)
        for slow, fast in zip(self.average.parameters(), self.projector.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def train(recipe: Recipe, out: Path, start: Path | None = None) -> dict[str, float]:
    """Speak, train for recipe.minutes of wall-clock time, leave projector.safetensors in `out`; held-out figures.

    start: projector to go on from, whose readings keep their places in the tokens.
    """
    out.mkdir(parents=True, exist_ok=True)
    audio = MODELS[recipe.model].audio
    if audio is None or audio.kind != "window" or audio.readings != len(HEARD):
        raise ValueError(
            f"model {recipe.model} has no projector of log-mel windows with {len(HEARD)} readings: listening is for "
            "those that have"
        )
    torch.manual_seed(recipe.seed)
    projector = AudioWindowProjector(audio, nn)
    if start:
        load_projector(start, projector)
    held_out = speak(HELD_OUT_SEED + 140_000_000, recipe.held_out, 1, _FRAMES)
    pool = speak(_FIRST_SEED + recipe.seed, recipe.clips, recipe.processes, _FRAMES)
    state = Listening(recipe, projector, audio)
    _loop(state, out, pool, held_out)
    if not start:
        spread(state.average, audio, Heard(pool.tokens[:200], pool.truth[:200]), recipe.seed)
    figures = explained(state.average, audio, held_out)
    record(out / "curve.jsonl", {"step": state.steps, "clips": recipe.clips, **figures})
    notes = {"steps": state.steps, "clips": recipe.clips, "first_seed": _FIRST_SEED + recipe.seed, **figures}
    metadata = {"kind": "audio_projector", "recipe": checkpoint.config_to_json(recipe), "notes": str(notes)}
    checkpoint.write(out / "projector.safetensors", state.average.state_dict(), metadata)
    return figures


def _loop(state: Listening, out: Path, pool: Heard, held_out: Heard) -> None:
    random_, losses, minutes = random.Random(state.recipe.seed), 0.0, state.recipe.minutes
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        rows = torch.tensor(random_.choices(range(len(pool.truth)), k=state.recipe.batch))
        losses += state.step(Heard(pool.tokens[rows], pool.truth[rows]), progress)
        if state.steps % 250 == 0:
            line = {"step": state.steps, "minutes": round(progress * minutes, 2), "loss": round(losses / 250, 4)}
            record(out / "curve.jsonl", {**line, **explained(state.average, state.audio, held_out)})
            losses = 0.0


def load_projector(path: Path, projector: nn.Module) -> None:
    """Weights of a trained projector, strictly. CheckpointError for a file that does not fit."""
    tensors, _ = checkpoint.read(path)
    checkpoint.load_into(projector, tensors, "audio projector")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Teach the audio projector to hear mouths.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="of training, after speaking")
    parser.add_argument("--clips", type=int, default=Recipe.clips, help="spoken before it")
    parser.add_argument("--processes", type=int, default=Recipe.processes, help="that speak")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--initial", type=Path, help="projector.safetensors to go on from")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out, initial = options.pop("out"), options.pop("initial")
    train(Recipe(**options), out, initial)


if __name__ == "__main__":
    main()
