"""What the trainings of the transformer share: the recipe, the weights and their files, one step, and the loop.

A training says what a batch is, what its losses are and what is measured: `flow_matching`, `ode_regression`. In its
folder: transformer.safetensors (averaged weights, bfloat16, ready to use), train.pt (what --resume reads),
curve.jsonl and preview.png (true above generated).

Shape legend: B batch, F latent frames of a sequence, h w latent size.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from . import parallel, preview
from .batches import Batch
from .common import Muon, Weights, rate_scale, record, write_whole
from .sequences import Mixture

log = logging.getLogger(__name__)

_LONGEST_STEP = 60.0  # seconds; a longer one means that the process was stopped, which shall not eat the budget


@dataclass(frozen=True)
class Recipe:
    """All that decides a training, beside the machine.

    minutes: length by the clock; steps: length in steps instead, which makes a run the same on every machine.
    save_steps: steps between saved states, None: by the clock.
    tokens: video tokens in a batch, whatever the length of its sequences. betas: of AdamW. floor: share of the peak
    learning rate that is left at the end, 1 keeps it. mouth, eyes: weight of the loss there, 1 elsewhere.
    past: weight of the loss on finished blocks. average: decay of the averaged weights.
    held_out: clips kept for measuring.
    """

    policy: str = "joyavatar-flash"
    seed: int = 0
    minutes: float = 70.0
    steps: int | None = None
    save_steps: int | None = None
    tokens: int = 3072
    optimiser: str = "muon"
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 60
    floor: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.998
    mouth: float = 8.0
    eyes: float = 2.0
    past: float = 0.2
    held_out: int = 12
    mixture: Mixture = field(default_factory=Mixture)

    def __post_init__(self) -> None:
        if self.optimiser not in ("muon", "adamw"):
            raise ValueError(f"optimiser {self.optimiser!r} is not known: use muon or adamw")
        for name in ("minutes", "tokens", "held_out", "steps", "save_steps", "learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} must be positive")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor {self.floor} must be in 0..1: a share of the learning rate")


RecipeT = TypeVar("RecipeT", bound=Recipe)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every training takes; those named as fields of its recipe go there."""
    parser.add_argument("--autoencoder", type=Path, required=True, help="autoencoder.safetensors")
    parser.add_argument("--clips", type=Path, required=True, help="folder of training.clips")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, help="length in steps, in place of minutes")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--optimiser", choices=("muon", "adamw"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--recipe", default="{}", metavar="JSON", help="other values of the recipe; options win")


def parse(parser: argparse.ArgumentParser, kind: type[RecipeT], arguments: Sequence[str] | None) -> tuple[Any, RecipeT]:
    """The options, and the recipe they make; threads and logging are set."""
    options = parser.parse_args(arguments)
    given = {f.name: vars(options).get(f.name) for f in fields(kind)}
    recipe = replace(recipe_of(kind, options.recipe), **{n: v for n, v in given.items() if v is not None})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parallel.join()
    torch.set_num_threads(max(1, options.threads // parallel.world()))
    return options, recipe


def recipe_of(kind: type[RecipeT], text: str) -> RecipeT:
    """A recipe whose default values are changed by a JSON object. ValueError names keys that it has not."""
    try:
        return checkpoint.config_from_json(kind, text)
    except checkpoint.CheckpointError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"recipe {text}: {error.__cause__}; known: {known}") from error


# Model


def initialise(model: nn.Module, seed: int) -> None:
    """Xavier matrices, small embeddings, a head that starts at zero, gates that start near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        initialise_parameter(name, p, generator)


def initialise_parameter(name: str, p: Tensor, generator: torch.Generator) -> None:
    """The weights of norms stay as they are."""
    if name.endswith("modulation"):
        nn.init.normal_(p, std=0.02, generator=generator)
    elif name.startswith(("head.head", "time_projection")) or name.endswith("bias"):
        nn.init.zeros_(p)
    elif p.dim() >= 2:
        nn.init.xavier_uniform_(p.flatten(1), generator=generator)


@dataclass
class Learner:
    """A model in training: its weights in their precisions, the optimisers that move them, its peak learning rate."""

    model: JoyAvatarDiT
    weights: Weights
    optimisers: list[torch.optim.Optimizer]
    rate: float

    def update(self, recipe: Recipe, scale: float, step: int) -> float:
        """Move the weights by the gradients they hold, `scale` the share of the peak rate; the gradients' norm.

        A gradient that is not finite is thrown away.
        """
        norm = self.weights.collect()
        if norm < float("inf"):
            self.weights.clip(norm, recipe.clip_norm)
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = self.rate * scale
                optimiser.step()
            self.weights.publish(step)
        return norm

    def averaged(self) -> JoyAvatarDiT:
        """The model with the averaged weights, to be used and thrown away."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        model.load_state_dict({**model.state_dict(), **self.weights.average})
        return model

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights.state(), "optimisers": [o.state_dict() for o in self.optimisers]}

    def load(self, state: dict[str, Any]) -> None:
        self.weights.load(state["weights"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def learner(model: JoyAvatarDiT, recipe: Recipe, rate: float | None = None) -> Learner:
    """A model at the beginning of its training, at the recipe's learning rate or another."""
    weights, rate = Weights(model, recipe.average), rate or recipe.learning_rate
    return Learner(model, weights, make_optimisers(recipe, weights, rate), rate)


def make_optimisers(recipe: Recipe, weights: Weights, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for all else, or AdamW alone."""
    in_blocks = [n for n, p in weights.master.items() if n.startswith("blocks.") and p.dim() == 2]
    names = in_blocks if recipe.optimiser == "muon" else []
    matrices = [weights.master[n] for n in names]
    rest = [p for n, p in weights.master.items() if n not in names]
    adam = torch.optim.AdamW(rest, lr=rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return [adam, Muon(matrices, lr=rate, weight_decay=recipe.weight_decay)] if matrices else [adam]


def save_transformer(path: Path, model: JoyAvatarDiT, recipe: Recipe, notes: dict[str, Any]) -> None:
    """Weights with all that is needed to use them and to know where they come from, as JSON in the metadata."""
    checkpoint.write(path, {n: t.bfloat16() for n, t in model.state_dict().items()}, metadata(model, recipe, notes))


def metadata(model: JoyAvatarDiT, recipe: Recipe, notes: dict[str, Any]) -> dict[str, str]:
    """Of a file of weights."""
    return {
        "model_config": checkpoint.config_to_json(model.config),
        "policy": recipe.policy,
        "recipe": checkpoint.config_to_json(recipe),
        "notes": json.dumps(notes),
    }


# Training


@dataclass(kw_only=True)
class Training(ABC, Generic[RecipeT]):
    """All that changes while training, and what it works on. spent: seconds over all sessions; steps likewise.

    learner: the model that the training is for.
    """

    recipe: RecipeT
    out: Path
    learner: Learner
    policy: RolloutPolicy
    spent: float = 0.0
    steps: int = 0

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One step of the training, a function of the seed, the step and the process; what it was like.

        Figures: loss, norm of the gradient, latents worked on by all processes.
        """

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Figures on held-out people."""

    @abstractmethod
    def clips(self) -> int:
        """How many clips it learns from."""

    def show(self, model: JoyAvatarDiT, what: preview.Preview, clip: int) -> Tensor:
        """Latents [1, C, F, h, w] that the model makes of a clip's picture and sound: the engine's own rollout."""
        return preview.roll_out(model, self.policy, what, clip)

    def draws(self) -> tuple[random.Random, random.Random]:
        """What decides the next batch: draws common to all processes, so that their work is alike, and our own."""
        place = f"{self.recipe.seed} {self.steps}"
        return random.Random(place), random.Random(f"{place} {parallel.rank()}")

    @property
    def tokens(self) -> int:
        """Video tokens of this process's share of a batch."""
        return self.recipe.tokens // parallel.world()

    @property
    def progress(self) -> float:
        """Share of the training that is done: of the steps where the recipe counts them, else of the time."""
        if self.recipe.steps is not None:
            return min(1.0, self.steps / self.recipe.steps)
        return min(1.0, self.spent / (60 * self.recipe.minutes))

    @property
    def rate_scale(self) -> float:
        """Share of the peak learning rate at this step."""
        return rate_scale(self.steps, self.recipe.warmup_steps, self.progress, self.recipe.floor)

    @property
    def model(self) -> JoyAvatarDiT:
        return self.learner.model

    def learners(self) -> dict[str, Learner]:
        """All models that change, by name."""
        return {"generator": self.learner}

    def averaged(self) -> JoyAvatarDiT:
        """The model with the averaged weights, to be used and thrown away."""
        return self.learner.averaged()


class Supervised(Training[RecipeT]):
    """A training whose step is one batch with known targets: forward, backward, update."""

    @abstractmethod
    def batch(self) -> Batch:
        """The batch of the next step: a function of the seed, the step and the process."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What is to become small."""

    def step(self) -> dict[str, float]:
        batch = self.batch()
        loss = self.loss(batch)
        loss.backward()
        norm = self.learner.update(self.recipe, self.rate_scale, self.steps)
        latents = batch.x0.shape[0] * batch.layout.latents * parallel.world()
        return {"loss": loss.item(), "norm": norm, "latents": float(latents)}


def train_step(state: Training) -> dict[str, float]:
    """The next step."""
    figures = state.step()
    state.steps += 1
    return figures


def save(state: Training) -> None:
    """train.pt and transformer.safetensors, each whole or not at all."""
    content = {
        "steps": state.steps,
        "spent": state.spent,
        "learners": {name: learner.state() for name, learner in state.learners().items()},
    }
    write_whole(state.out / "train.pt", lambda path: torch.save(content, path))
    save_transformer(state.out / "transformer.safetensors", state.averaged(), state.recipe, notes(state))


def notes(state: Training) -> dict[str, Any]:
    """What a training has done so far."""
    return {"steps": state.steps, "minutes": round(state.spent / 60, 1), "clips": state.clips()}


def resume(state: Training) -> None:
    """Go on from train.pt. ValueError when there is none."""
    path = state.out / "train.pt"
    if not path.exists():
        raise ValueError(f"nothing to resume in {state.out}: start without --resume")
    content = torch.load(path, weights_only=True)
    state.steps, state.spent = content["steps"], content["spent"]
    for name, learner in state.learners().items():
        learner.load(content["learners"][name])
    log.info("resumed at step %d, %.1f minutes spent", state.steps, state.spent / 60)


@dataclass
class Clock:
    """Says when something is due, in seconds spent."""

    every: float
    last: float = 0.0

    def due(self, now: float) -> bool:
        if now - self.last < self.every:
            return False
        self.last = now
        return True


@dataclass
class Curve:
    """Means of what steps were like, every `every` steps a line in curve.jsonl; and the clock of the training.

    In a terminal process 0 draws a bar: of steps where the recipe counts them, else of seconds.
    """

    state: Training
    every: int = 20
    sums: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from tqdm import tqdm

        self.last, self.since = time.monotonic(), self.state.spent
        steps, hidden = self.state.recipe.steps, bool(parallel.rank()) or None  # None: where there is no terminal
        total, unit = (60 * self.state.recipe.minutes, "s") if steps is None else (steps, "step")
        self.bar = tqdm(total=total, unit=unit, initial=self._done(), disable=hidden, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Curve:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _done(self) -> int:
        return round(self.state.spent) if self.state.recipe.steps is None else self.state.steps

    def note(self, figures: Mapping[str, float]) -> None:
        """Of the step just made."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in figures.items()}
        if self.state.steps % self.every == 0:
            rate = round(self.sums.pop("latents") / max(1e-9, self.state.spent - self.since), 1)
            line = {name: round(total / self.every, 4) for name, total in self.sums.items()}
            if not parallel.rank():
                record(self.state.out / "curve.jsonl", {**_where(self.state), **line, "latents_s": rate})
            self.since, self.sums = self.state.spent, {}

    def tick(self) -> None:
        """All that was done since the last call is time spent, in every process the same."""
        now = time.monotonic()
        self.state.spent = parallel.agreed(self.state.spent + min(now - self.last, _LONGEST_STEP))
        self.last = now
        self.bar.update(self._done() - self.bar.n)


def loop(state: Training, show: preview.Preview, refresh: Callable[[], None], log_steps: int = 20) -> None:
    """Train until the budget of time, or of steps, is spent; `refresh` comes before measuring.

    Saving and measuring count as time spent.
    """
    saving, measuring, showing = Clock(150, state.spent), Clock(300, state.spent), Clock(600, state.spent)
    with Curve(state, log_steps) as curve:
        while state.progress < 1:
            curve.note(train_step(state))
            measure, write, draw = (clock.due(state.spent) for clock in (measuring, saving, showing))
            if state.recipe.save_steps is not None:
                write = state.steps % state.recipe.save_steps == 0
            if measure:
                refresh()
            if not parallel.rank():
                _look(state, show, measure, write, draw)
            curve.tick()


def _look(state: Training, show: preview.Preview, measure: bool, write: bool, draw: bool) -> None:
    if measure:
        record(state.out / "curve.jsonl", {**_where(state), **state.measure()})
    if write:
        save(state)
    if draw:
        show_preview(state, show)


def finish(state: Training, show: preview.Preview) -> None:
    """Save, measure and show what was learnt."""
    if not parallel.rank():
        _look(state, show, measure=True, write=True, draw=True)


def show_preview(state: Training, show: preview.Preview) -> None:
    """What it makes of held-out people into preview.png, and how well its mouths follow the sound."""
    model = state.averaged()
    figures = preview.write_preview(state.out / "preview.png", show, lambda clip: state.show(model, show, clip))
    record(state.out / "curve.jsonl", {**_where(state), **figures})


def _where(state: Training) -> dict[str, object]:
    return {"step": state.steps, "minutes": round(state.spent / 60, 2)}
