"""Trains the embedded transformer's first weights by flow matching on drawn clips, within a budget of wall-clock time.

    python -m joyavatar_core.training.clips --out CLIPS
    python -m joyavatar_core.training.listening --out LISTENING
    python -m joyavatar_core.training.flow_matching --autoencoder FILE --projector FILE --clips CLIPS \
        --out DIR --minutes 90 [--resume]

Teacher forcing under the policy's own schedule: every sequence is one forward that inference could make, with the
true past behind a mask (`sequences`). In DIR: transformer.safetensors (averaged weights, bfloat16, ready to use),
train.pt (what --resume reads), curve.jsonl and preview.png (true above generated).

Shape legend: B batch, N clips, C latent channels, F latent frames of a sequence, h w latent size, P tokens of a
latent, W audio tokens of a latent.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, flow
from ..autoencoder import LightAutoencoder
from ..avatar import load_light_autoencoder
from ..conditioning import reference_tokens
from ..config import MODELS, ModelConfig
from ..geometry import Geometry
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from ..policy import policy as policy_named
from . import preview
from .clips import clip_path, list_clips
from .common import Muon, Weights, rate_scale, record, write_whole
from .encoded import EncodedClips, LatentStore
from .listening import load_projector
from .sequences import Layout, Mixture, attend, sample_latents, sample_layout, sample_levels

log = logging.getLogger(__name__)

_LONGEST_STEP = 60.0  # seconds; a longer one means that the process was stopped, which shall not eat the budget


@dataclass(frozen=True)
class Recipe:
    """All that decides a training, beside the machine.

    tokens: video tokens in a batch, whatever the length of its sequences. mouth, eyes: weight of the loss there,
    1 elsewhere. past: weight of the loss on finished blocks. average: decay of the averaged weights.
    held_out: clips kept for measuring; first_clips: clips encoded before training starts.
    """

    model: str = "tiny"
    policy: str = "joyavatar-flash"
    seed: int = 0
    minutes: float = 70.0
    tokens: int = 3072
    optimiser: str = "muon"
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.998
    mouth: float = 6.0
    eyes: float = 2.0
    past: float = 0.2
    held_out: int = 12
    first_clips: int = 300
    mixture: Mixture = field(default_factory=Mixture)

    def __post_init__(self) -> None:
        if self.optimiser not in ("muon", "adamw"):
            raise ValueError(f"optimiser {self.optimiser!r} is not known: use muon or adamw")
        for name, value in (("minutes", self.minutes), ("tokens", self.tokens), ("held_out", self.held_out)):
            if value <= 0:
                raise ValueError(f"{name} {value} must be positive")


# Batches


@dataclass(frozen=True)
class Batch:
    """Sequences of one layout: x0, noise [B, C, F, h, w]; channels: mask and image channels, the same but for C;
    image: reference tokens [B, P, p q C]; audio [B, F, W, channels]; mouth, eyes [B, F, h, w]; timesteps [B, F]."""

    layout: Layout
    x0: Tensor
    noise: Tensor
    channels: Tensor
    image: Tensor
    audio: Tensor
    mouth: Tensor
    eyes: Tensor
    timesteps: Tensor


def make_batch(
    data: EncodedClips, layout: Layout, clips: Tensor, patch: tuple[int, int], mixture: Mixture, seed: int
) -> Batch:
    """The sequences of a layout cut from the given clips [B]; the seed decides the cuts, levels and noise."""
    random_, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    blocks = data.latents.shape[1] // layout.policy.block_latents
    frames = torch.tensor([sample_latents(random_, layout, blocks, mixture.gap) for _ in clips])  # [B, F]
    rows = clips[:, None]
    x0 = data.latents[rows, frames].float().transpose(1, 2)
    return Batch(
        layout=layout,
        x0=x0,
        noise=torch.randn(x0.shape, generator=generator),
        channels=data.image_channels(clips, frames, 4),
        image=reference_tokens(data.image[clips, 0].float(), patch),
        audio=data.audio[rows, frames].float(),
        mouth=data.mouth[rows, frames].float(),
        eyes=data.eyes[rows, frames].float(),
        timesteps=sample_levels(generator, layout, len(clips), mixture),
    )


def predict(model: JoyAvatarDiT, batch: Batch) -> Tensor:
    """Velocity of every latent of the batch, [B, C, F, h, w] float32."""
    dtype = next(model.parameters()).dtype
    tokens = batch.image.shape[1]
    x_t = flow.add_noise(batch.x0, batch.noise, batch.timesteps)
    condition = model.condition(image=batch.image.to(dtype))
    audio = model.audio(batch.audio.to(dtype))
    x = torch.cat([x_t, batch.channels], dim=1)
    mask = batch.layout.mask(tokens)
    return model(x, batch.timesteps, batch.layout.positions(), condition, audio, None, mask)[0]


def squared_error(batch: Batch, v: Tensor, channels: Tensor | None = None) -> Tensor:
    """Squared error of the velocity, mean over channels (weighted by `channels` [C]): [B, F, h, w]."""
    error = (v - flow.velocity(batch.x0, batch.noise)).square()
    return (error if channels is None else error * channels[:, None, None, None]).mean(dim=1)


def flow_loss(batch: Batch, v: Tensor, recipe: Recipe, channels: Tensor | None = None) -> Tensor:
    """Weighted mean of the squared error. The motion frame has no part in it."""
    weight = 1 + (recipe.mouth - 1) * batch.mouth + (recipe.eyes - 1) * batch.eyes
    latent = torch.ones(batch.layout.latents)
    latent[: batch.layout.lead] = recipe.past
    latent[batch.layout.lead - batch.layout.motion : batch.layout.lead] = 0
    weight = weight * latent[:, None, None]
    return (weight * squared_error(batch, v, channels)).sum() / weight.sum()


@torch.no_grad()
def channel_importance(decoder: LightAutoencoder, latents: Tensor) -> Tensor:
    """[C], mean about 1: how much of the decoded picture hangs on each latent channel. latents [1, C, F, h, w].

    Latents are whitened, so that a channel which hardly shows counts in the flow loss as much as one that is the
    shape of the face; weighted by the squared error that noise in a channel makes in the picture, the loss is one of
    pixels to first order. Kept within 1/4 and 4.
    """
    generator = torch.Generator().manual_seed(0)
    clean, errors = decoder.decode_unclamped(latents)[0], []
    for channel in range(latents.shape[1]):
        noisy = latents.clone()
        noisy[:, channel] += 0.5 * torch.randn(latents[:, channel].shape, generator=generator)
        errors.append((decoder.decode_unclamped(noisy)[0] - clean).square().mean())
    importance = torch.stack(errors)
    return (importance / importance.mean()).clamp(0.25, 4.0)


# Model


def initialise(model: nn.Module, seed: int) -> None:
    """Xavier matrices, small embeddings, a head that starts at zero, gates that start near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(p, std=0.02, generator=generator)
        elif name.startswith(("head.head", "time_projection")) or name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() >= 2:
            nn.init.xavier_uniform_(p.flatten(1), generator=generator)


def make_optimisers(recipe: Recipe, weights: Weights) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for all else, or AdamW alone."""
    rate = recipe.learning_rate
    in_blocks = [n for n, p in weights.master.items() if n.startswith("blocks.") and p.dim() == 2]
    names = in_blocks if recipe.optimiser == "muon" else []
    matrices = [weights.master[n] for n in names]
    rest = [p for n, p in weights.master.items() if n not in names]
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    return [adam, Muon(matrices, lr=rate, weight_decay=recipe.weight_decay)] if matrices else [adam]


def save_transformer(path: Path, model: JoyAvatarDiT, recipe: Recipe, notes: dict[str, Any]) -> None:
    """Weights with all that is needed to use them and to know where they come from, as JSON in the metadata."""
    metadata = {
        "model_config": checkpoint.config_to_json(model.config),
        "policy": recipe.policy,
        "recipe": checkpoint.config_to_json(recipe),
        "notes": json.dumps(notes),
    }
    checkpoint.write(path, model.state_dict(), metadata)


# Training


@dataclass
class Training:
    """All that changes while training, and what it works on. spent: seconds over all sessions; steps likewise."""

    recipe: Recipe
    out: Path
    model: JoyAvatarDiT
    weights: Weights
    optimisers: list[torch.optim.Optimizer]
    data: tuple[EncodedClips, ...]
    held_out: EncodedClips
    policy: RolloutPolicy
    channels: Tensor
    spent: float = 0.0
    steps: int = 0

    @property
    def progress(self) -> float:
        return min(1.0, self.spent / (60 * self.recipe.minutes))

    def batch(self) -> Batch:
        """The batch of the next step: a function of the seed and the step."""
        random_ = random.Random(f"{self.recipe.seed} {self.steps}")
        layout = sample_layout(random_, self.policy, self.recipe.mixture)
        (data,) = random_.choices(self.data, [len(part) for part in self.data])
        tokens = _tokens_per_latent(data, self.model.config)
        count = max(1, round(self.recipe.tokens / (layout.latents * tokens)))
        clips = torch.tensor([random_.randrange(len(data)) for _ in range(count)])
        patch, mixture = self.model.config.patch, self.recipe.mixture
        return make_batch(data, layout, clips, patch, mixture, random_.randrange(2**31))

    def averaged(self) -> JoyAvatarDiT:
        """The model with the averaged weights, to be used and thrown away."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        model.load_state_dict({**model.state_dict(), **self.weights.average})
        return model


def _tokens_per_latent(data: EncodedClips, config: ModelConfig) -> int:
    return data.latents.shape[-2] * data.latents.shape[-1] // (config.patch[0] * config.patch[1])


def hold_out(data: tuple[EncodedClips, ...], count: int) -> tuple[tuple[EncodedClips, ...], EncodedClips]:
    """Clips to train on, and the first `count` of the most frequent size. ValueError when there are too few."""
    if not data or len(data[0]) <= count:
        found = len(data[0]) if data else 0
        raise ValueError(f"{found} clips of one size: more than the {count} held out are needed; draw more")
    return (data[0].select(slice(count, None)), *data[1:]), data[0].select(slice(0, count))


def begin(
    recipe: Recipe, out: Path, data: tuple[EncodedClips, ...], channels: Tensor, projector: Path | None = None
) -> Training:
    """A training at step 0. A projector that has learned to listen stays as it is."""
    data, held_out = hold_out(data, recipe.held_out)
    model = JoyAvatarDiT(MODELS[recipe.model], attention=attend)
    initialise(model, recipe.seed)
    if projector:
        load_projector(projector, model.proj_model)
        model.proj_model.requires_grad_(False)
    model = model.bfloat16()
    weights = Weights(model, recipe.average)
    return Training(
        recipe=recipe,
        out=out,
        model=model,
        weights=weights,
        optimisers=make_optimisers(recipe, weights),
        data=data,
        held_out=held_out,
        policy=policy_named(recipe.policy),
        channels=channels,
    )


def train_step(state: Training) -> dict[str, float]:
    """One batch: forward, backward, update. A gradient that is not finite is thrown away."""
    recipe, batch = state.recipe, state.batch()
    loss = flow_loss(batch, predict(state.model, batch), recipe, state.channels)
    loss.backward()
    norm = state.weights.collect()
    scale = rate_scale(state.steps, recipe.warmup_steps, state.progress)
    if norm < float("inf"):
        state.weights.clip(norm, recipe.clip_norm)
        for optimiser in state.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * scale
            optimiser.step()
        state.weights.publish(state.steps)
    state.steps += 1
    return {"loss": loss.item(), "norm": norm, "tokens": float(batch.x0.shape[0] * batch.layout.latents)}


@torch.no_grad()  # not inference_mode: RoPE tables are kept, and training uses them too
def evaluate(state: Training) -> dict[str, float]:
    """Error on held-out people by level (index before the warp): all cells, and the mouth alone.

    `start` is the very first forward; `deaf_1000` is the mouth's error with another clip's sound: as long as it
    equals `mouth_1000` the model does not listen.
    """
    model, scores = state.averaged(), {}
    context = state.policy.context_blocks
    steady = Layout(state.policy, context, state.policy.window_steps(context + state.policy.lead_blocks)[-1].timesteps)
    first = Layout(state.policy, 0, state.policy.window_steps(0)[0].timesteps)
    batch = _measured_batch(state, steady)
    error, deaf = squared_error(batch, predict(model, batch)), replace(batch, audio=batch.audio.roll(1, 0))
    deaf_error = squared_error(deaf, predict(model, deaf))
    n = state.policy.block_latents
    for i, timestep in enumerate(steady.timesteps):
        block = slice(steady.lead + i * n, steady.lead + (i + 1) * n)
        scores[f"all_{timestep:.0f}"] = float(error[:, block].mean())
        scores[f"mouth_{timestep:.0f}"] = _weighted(error, batch.mouth, block)
        scores[f"deaf_{timestep:.0f}"] = _weighted(deaf_error, batch.mouth, block)
    start = _measured_batch(state, first)
    scores["start"] = float(squared_error(start, predict(model, start)).mean())
    return {name: round(value, 4) for name, value in scores.items()}


def _weighted(error: Tensor, weight: Tensor, latents: slice) -> float:
    return float((error * weight)[:, latents].sum() / weight[:, latents].sum())


def _measured_batch(state: Training, layout: Layout) -> Batch:
    exact = replace(state.recipe.mixture, exact=1.0, clean_motion=0.0, sink_late=1.0, gap=0.0)
    clips = torch.arange(len(state.held_out))
    return make_batch(state.held_out, layout, clips, state.model.config.patch, exact, seed=1)


def save(state: Training) -> None:
    """train.pt and transformer.safetensors, each whole or not at all."""
    content = {
        "steps": state.steps,
        "spent": state.spent,
        "weights": state.weights.state(),
        "optimisers": [o.state_dict() for o in state.optimisers],
    }
    write_whole(state.out / "train.pt", lambda path: torch.save(content, path))
    clips = sum(len(part) for part in state.data)
    notes = {"steps": state.steps, "minutes": round(state.spent / 60, 1), "clips": clips}
    save_transformer(state.out / "transformer.safetensors", state.averaged(), state.recipe, notes)


def resume(state: Training) -> None:
    """Go on from train.pt. ValueError when there is none."""
    path = state.out / "train.pt"
    if not path.exists():
        raise ValueError(f"nothing to resume in {state.out}: start without --resume")
    content = torch.load(path, weights_only=True)
    state.steps, state.spent = content["steps"], content["spent"]
    state.weights.load(content["weights"])
    for optimiser, saved in zip(state.optimisers, content["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
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


def loop(state: Training, store: LatentStore, show: preview.Preview, log_steps: int = 20) -> None:
    """Train until the budget is spent, on ever more clips. Saving and measuring count as time spent."""
    saving, measuring, showing = Clock(150, state.spent), Clock(300, state.spent), Clock(600, state.spent)
    last, since, sums = time.monotonic(), state.spent, dict.fromkeys(("loss", "norm", "tokens"), 0.0)
    while state.progress < 1:
        figures = train_step(state)
        sums = {name: total + figures[name] for name, total in sums.items()}
        if state.steps % log_steps == 0:
            line = {"loss": round(sums["loss"] / log_steps, 4), "norm": round(sums["norm"] / log_steps, 3)}
            rate = round(sums["tokens"] / max(1e-9, state.spent - since), 1)
            record(state.out / "curve.jsonl", {**_where(state), **line, "latents_s": rate})
            since, sums = state.spent, dict.fromkeys(sums, 0.0)
        if measuring.due(state.spent):
            record(state.out / "curve.jsonl", {**_where(state), **evaluate(state)})
            grow(state, store)
        if saving.due(state.spent):
            save(state)
        if showing.due(state.spent):
            show_preview(state, show)
        now = time.monotonic()
        state.spent, last = state.spent + min(now - last, _LONGEST_STEP), now


def grow(state: Training, store: LatentStore) -> None:
    """Take in the clips encoded since."""
    known = sum(len(part) for part in state.data)
    if len(store.ready()) > state.recipe.held_out + known:
        state.data, _ = hold_out(store.load(), state.recipe.held_out)
        log.info("training on %d clips", sum(len(part) for part in state.data))


def _where(state: Training) -> dict[str, object]:
    return {"step": state.steps, "minutes": round(state.spent / 60, 2)}


def show_preview(state: Training, show: preview.Preview) -> None:
    """A real rollout of held-out people into preview.png, and how well its mouths follow the sound."""
    figures = preview.write_preview(state.out / "preview.png", state.averaged(), state.policy, show)
    record(state.out / "curve.jsonl", {**_where(state), **figures})


def train(
    recipe: Recipe, out: Path, clips: Path, autoencoder: Path, projector: Path | None = None, again: bool = False
) -> None:
    """Train for recipe.minutes of wall-clock time (all sessions together).

    Training starts with the first clips encoded; a worker encodes the rest meanwhile.
    """
    out.mkdir(parents=True, exist_ok=True)
    decoder, patch = load_light_autoencoder(autoencoder), MODELS[recipe.model].patch
    store = LatentStore(list_clips(clips), clips, autoencoder, patch)
    store.encode(recipe.held_out + recipe.first_clips)
    data = store.load()
    channels = channel_importance(decoder, data[0].latents[:2, :4].float().transpose(1, 2))
    state = begin(recipe, out, data, channels, projector)
    if again:
        resume(state)
    shown = state.held_out.select(slice(0, 3))
    paths = tuple(clip_path(clips, int(seed)) for seed in shown.seed)
    height, width = (cells * decoder.spatial for cells in shown.latents.shape[-2:])
    show = preview.Preview(paths, shown, decoder, Geometry(width, height, spatial=decoder.spatial, patch=patch))
    with store.worker():
        loop(state, store, show)
    save(state)
    record(out / "curve.jsonl", {**_where(state), **evaluate(state)})
    show_preview(state, show)


def _recipe(options: argparse.Namespace) -> Recipe:
    given = {name: value for name, value in vars(options).items() if name in asdict(Recipe()) and value is not None}
    return replace(Recipe(), **given)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the embedded transformer on drawn clips.")
    parser.add_argument("--autoencoder", type=Path, required=True, help="autoencoder.safetensors")
    parser.add_argument("--clips", type=Path, required=True, help="folder of training.clips")
    parser.add_argument("--projector", type=Path, help="projector.safetensors of training.listening")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--optimiser", choices=("muon", "adamw"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    train(_recipe(options), options.out, options.clips, options.autoencoder, options.projector, options.resume)


if __name__ == "__main__":
    main()
