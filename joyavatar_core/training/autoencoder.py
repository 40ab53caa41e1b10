"""Trains the light autoencoder on drawn clips, on a CPU, within a budget of wall-clock time.

    python -m joyavatar_core.training.autoencoder --out DIR --minutes 45 [--resume]
    python -m joyavatar_core.training.autoencoder --out DIR --minutes 60 --source FILE --near 0.3 --learning-rate 4e-4
    python -m joyavatar_core.training.autoencoder --out DIR --minutes 15 --source FILE --learns decoder
        [--rehearsals CLIPS/own-...]

The second command goes on with a finished autoencoder and holds its latents near what they were, so that a transformer
trained on them has little to learn anew. The third goes on with the decoder alone, and the latents stay what they are.
With rehearsals (`rehearsal`) the decoder also learns to make lively, sharp frames of what a transformer made of their
clips (`rehearsed_loss`): evener motion, for a little of the PSNR.

A worker process keeps a pool of drawn clips and cuts random crops from it; this process trains. In DIR:
autoencoder.safetensors (averaged weights, ready to use), train.safetensors (what --resume reads), curve.jsonl and
preview.png (original above reconstruction).

Shape legend: B batch, F latent frames, T pixel frames, C channels, h w latent size, H W pixel size.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import autoencoder as light
from .. import checkpoint
from ..autoencoder import AUTOENCODERS, AutoencoderConfig, LightAutoencoder
from ..avatar import load_light_autoencoder
from .autoencoder_data import HELD_OUT_KINDS, KINDS, Batch, Sample, batches, held_out, make_sample
from .clips import list_clips
from .common import Muon, autocast, beside, kept_share, rate_scale, record
from .drawn import HELD_OUT_SEED, Image
from .encoded import as_video
from .liveliness import liveliness_error

log = logging.getLogger(__name__)

_SPARE_FRAMES = 3  # drawn beyond the longest step's, so that one drawing gives several time slices
_OPTIONS = ("minutes", "steps", "seed", "size", "crop", "learning_rate", "learns", "near_weight")
_LOGGED: tuple[str, ...] = ("loss", "latent", "moved", "norm")
_USUAL_MOUTH = 32.0  # pixels: root of its area in a picture of 256
_COARSE = 8  # pixels: how exactly what a transformer made is to be where the truth is
_STILL = 2 / 255  # change, in half the range, beside which a frame counts as standing still

Part = Literal["both", "encoder", "decoder"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of every latent channel


@dataclass(frozen=True)
class Recipe:
    """All that decides a training, beside the machine.

    minutes: length by the clock; steps: length in steps instead: a run is then the same however often it is stopped,
    on one machine; save_steps: steps between saved states, None: two minutes.
    size: full picture; crop: side of the training crops; batches: (frames, clips) of the kinds of step, in turn;
    noise: range of the deviation of the noise added to latents; latent_penalty: pull to zero mean and unit variance;
    regions: weight of the error in the boxes of mouth, eyes and face, 1 elsewhere; small_mouths: how much more small
    mouths count (`region_weights`); evenness_weight: of `unevenness`.
    pool: clips that steps are cut from; renewed: how many of them are drawn anew for each step.
    Of a training that goes on with a finished autoencoder: learns: what of it; near_weight: pull of its latents to
    what they were; rehearsed: (latents, clips) of the steps on rehearsals, and the weights of the regions there: of a
    mouth that is not quite the true one there is little to learn, and the PSNR of true ones suffers.
    """

    model: str = "tiny"
    seed: int = 0
    minutes: float = 45.0
    steps: int | None = None
    save_steps: int | None = None
    size: int = 256
    crop: int = 128
    batches: tuple[tuple[int, int], ...] = ((9, 6), (5, 9))
    learning_rate: float = 1.2e-3
    warmup_steps: int = 40
    weight_decay: float = 1e-3
    clip_norm: float = 1.0
    ema: float = 0.998
    noise: tuple[float, float] = (0.0, 0.1)
    regions: tuple[float, float, float] = (8.0, 3.0, 2.0)
    small_mouths: float = 0.0
    square_weight: float = 6.0
    edge_weight: float = 1.0
    motion_weight: float = 1.0
    evenness_weight: float = 0.0
    coarse_weight: float = 0.5
    latent_penalty: float = 0.01
    pool: int = 96
    renewed: int = 2
    learns: Part = "both"
    near_weight: float = 0.0
    rehearsed: tuple[int, int] = (8, 3)
    rehearsed_regions: tuple[float, float, float] = (0.2, 3.0, 2.0)

    def __post_init__(self) -> None:
        step = AUTOENCODERS[self.model].spatial
        if self.crop % step or self.size % step or self.crop > self.size:
            raise ValueError(f"crop {self.crop} and size {self.size} must be multiples of {step}, crop not above size")
        for name in ("minutes", "steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} must be positive")
        if self.learns not in get_args(Part):
            raise ValueError(f"learns {self.learns!r}: one of {', '.join(get_args(Part))}")

    @property
    def clip_frames(self) -> int:
        """Pixel frames of the clips that steps are cut from."""
        return max(frames for frames, _ in self.batches) + _SPARE_FRAMES


# Loss


def region_weights(
    boxes: Tensor, height: int, width: int, weights: tuple[float, ...], small_mouths: float = 0.0
) -> Tensor:
    """boxes [B, T, R, 4] -> [B, 1, T, H, W]: weights[r] in box r (an earlier box wins), 1 elsewhere, over the mean.

    small_mouths: box 0 counts more by (32 over its side in pixels) to this power, within 1/3 and 3.
    """
    x = torch.arange(width) + 0.5
    y = torch.arange(height) + 0.5
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)  # each [B, T, R, 1]
    inside = ((y > y0) & (y < y1)).unsqueeze(-1) & ((x > x0) & (x < x1)).unsqueeze(-2)  # [B, T, R, H, W]
    out = torch.ones(inside.shape[:2] + inside.shape[3:])
    for region in reversed(range(len(weights))):
        out = out.masked_fill(inside[:, :, region], weights[region])
    side = ((x1 - x0) * (y1 - y0))[:, :, 0].clamp(min=1).sqrt()  # [B, T, 1]
    more = (_USUAL_MOUTH / side).pow(small_mouths).clamp(1 / 3, 3).unsqueeze(-1)
    out = torch.where(inside[:, :, 0], more * out, out)
    return (out / out.mean()).unsqueeze(1)


def reconstruct(
    model: LightAutoencoder, video: Tensor, noise: float = 0.0, seed: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """video [B, 3, T, H, W] -> its reconstruction, not clamped (a clamp has no gradient outside), and the latents.

    `noise` is the deviation of the Gaussian noise put on the latents before decoding, and `seed` decides it.
    """
    latents = model.encode(video)
    drawn = np.random.default_rng((*seed, 4)).standard_normal(latents.shape, np.float32)
    noisy = latents + noise * torch.from_numpy(drawn).to(latents)
    return model.decode_unclamped(noisy)[0].float(), latents.float()


def picture_loss(recipe: Recipe, made: Tensor, video: Tensor, weights: Tensor) -> Tensor:
    """Weighted L1 and square of the pixels and L1 of their differences along x and y (edges), of 4x4 means; and L1 of
    their differences along t (motion), not weighted: flicker is seen wherever it is."""
    error = made - video
    loss = (weights * error.abs()).mean() + recipe.square_weight * (weights * error.square()).mean()
    for axis in (3, 4):
        length = error.shape[axis] - 1
        loss = loss + recipe.edge_weight * (weights.narrow(axis, 1, length) * error.diff(dim=axis).abs()).mean() / 2
    loss = loss + recipe.motion_weight * error.diff(dim=2).abs().mean()
    if recipe.evenness_weight:
        loss = loss + recipe.evenness_weight * unevenness(made, video)
    coarse = F.avg_pool2d(error.transpose(1, 2).flatten(0, 1), 4)
    return loss + recipe.coarse_weight * coarse.abs().mean()


def unevenness(made: Tensor, video: Tensor) -> Tensor:
    """How far each frame's change from the one before is from the true change, in its share: mean of |log ratio|.

    Four frames come out of a latent, so errors change where latents meet: there a video jumps, and in between it
    stands. No error of single pixels tells that.
    """
    moved, truly = (x.diff(dim=2).abs().mean(dim=(1, 3, 4)) for x in (made, video))  # [B, T - 1]
    return ((moved + _STILL).log() - (truly + _STILL).log()).abs().mean()


def rehearsed_loss(made: Tensor, video: Tensor, weights: Tensor) -> Tensor:
    """Of frames that a decoder makes of a transformer's latents: as lively and as sharp as the true ones, place by
    place, and where they are only coarsely. What the transformer got wrong has no right pixels."""
    error = F.avg_pool2d((made - video).transpose(1, 2).flatten(0, 1), _COARSE)
    return liveliness_error(made, video, weights, edges=0.5) + error.abs().mean()


def latent_loss(latents: Tensor) -> Tensor:
    """Zero for latents whose every channel has zero mean and unit variance over the batch."""
    mean = latents.mean(dim=(0, 2, 3, 4))
    variance = latents.var(dim=(0, 2, 3, 4))
    return (mean.square() + variance.clamp(min=1e-6).log().square()).mean()


# Model


def initialise(model: LightAutoencoder, videos: list[Tensor], seed: int) -> None:
    """Weights that keep the variance from layer to layer, blocks near the identity, latents that are principal parts.

    Random projections to latents all carry brightness and hardly any colour, and training is slow to part them:
    the first latents are the 16 principal components of the features of `videos`, each of unit variance.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, light.MemoryBlock):
            nn.init.kaiming_normal_(_convolution(module.conv[-1]).weight, a=3.0)
    from_pixels, to_pixels = _convolution(model.encoder[0]), _convolution(model.decoder[-1])
    with torch.no_grad():
        _bias(from_pixels).copy_(-0.5 * from_pixels.weight.sum((1, 2, 3)))  # pixels reach it in 0..1
        to_pixels.weight.mul_(0.1)
        _bias(to_pixels).fill_(0.5)
    _principal_latents(model, videos)


def _convolution(layer: nn.Module) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d)
    return layer


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


@torch.no_grad()
def _principal_latents(model: LightAutoencoder, videos: list[Tensor]) -> None:
    """Set the last convolution of the encoder to the whitened principal components of what reaches it."""
    last, seen = _convolution(model.encoder[-1]), []
    hook = last.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0]))
    for video in videos:
        model.encode(video)
    hook.remove()
    features = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in seen]).double()
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    values, vectors = values.flip(0)[: last.out_channels], vectors.flip(1)[:, : last.out_channels]
    whiten = (vectors / (values.clamp(min=0) + 1e-4 * values[0]).sqrt()).T
    last.weight.zero_()
    last.weight[: len(whiten), :, 1, 1] = whiten.float()
    _bias(last)[: len(whiten)] = -(whiten @ mean).float()


def matrices(model: LightAutoencoder) -> dict[str, nn.Parameter]:
    """Views of the inner convolutions as matrices [out, (ky kx in)], by parameter name: what Muon updates."""
    outer = {"encoder.0.weight", f"decoder.{len(model.decoder) - 1}.weight"}
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {name: p for name, p in learns.items() if p.ndim == 4 and name not in outer}
    return {name: nn.Parameter(_as_matrix(p.detach())) for name, p in inner.items()}


def _as_matrix(weight: Tensor) -> Tensor:
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    assert matrix.data_ptr() == weight.data_ptr(), "the weights must be in channels_last, or a copy would be trained"
    return matrix


def finished(source: Path, learns: Part, last_blocks: int = 0) -> tuple[LightAutoencoder, LightAutoencoder]:
    """Two copies of a finished autoencoder, the first with one half that does not learn or, for "both", none.

    last_blocks: how many a decoder that learns is to have at least; those that it lacks begin as the identity.
    """
    model = load_light_autoencoder(source).float()
    model = model if learns == "encoder" else with_last_blocks(model, last_blocks)
    average = copy.deepcopy(model)
    model.encoder.requires_grad_(learns != "decoder")
    model.decoder.requires_grad_(learns != "encoder")
    return model, average


def with_last_blocks(model: LightAutoencoder, count: int) -> LightAutoencoder:
    """An autoencoder that makes the same frames and has `count` last blocks, or the same one if it has them."""
    if model.config.last_blocks >= count:
        return model
    other = LightAutoencoder(replace(model.config, last_blocks=count))
    *layers, to_pixels = model.decoder
    fresh = list(other.decoder)[len(layers) : -1]
    for block in fresh:  # what enters is not negative, so the ReLU behind the sum changes nothing
        assert isinstance(block, light.MemoryBlock)
        last = _convolution(block.conv[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(_bias(last))
    other.encoder, other.decoder = model.encoder, nn.Sequential(*layers, *fresh, to_pixels)
    return other


def frozen(source: Path) -> LightAutoencoder:
    """A finished autoencoder that is only asked, in the layout convolutions like."""
    model = load_light_autoencoder(source).float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def latent_statistics(latents: list[Tensor]) -> Statistics:
    """Mean and deviation of every channel over latents of any sizes, each [B, C, F, h, w], not normalised."""
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in latents], dim=1)
    return tuple(flat.mean(1).tolist()), tuple(flat.std(1).tolist())


@torch.no_grad()
def _encode(model: LightAutoencoder, sample: Sample) -> Tensor:
    with autocast():
        return model.encode(as_video(torch.from_numpy(sample.video))).float()


# Files


def save_model(path: Path, model: LightAutoencoder, config: AutoencoderConfig, notes: dict[str, object]) -> None:
    """Write weights with their config and notes (JSON) in the metadata; `avatar.load_light_autoencoder` reads them."""
    metadata = {"autoencoder_config": checkpoint.config_to_json(config), "kind": "light_autoencoder", **_strings(notes)}
    checkpoint.write(path, model.state_dict(), metadata)


def _strings(notes: dict[str, object]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}


# Training


@dataclass
class _Training:
    """All that changes while training; `spent` counts seconds over all sessions, `steps` likewise."""

    recipe: Recipe
    out: Path
    model: LightAutoencoder
    average: LightAutoencoder
    optimisers: tuple[torch.optim.Optimizer, ...]
    matrices: dict[str, nn.Parameter]
    spent: float = 0.0
    steps: int = 0
    figures: dict[str, float] | None = None
    before: LightAutoencoder | None = None  # whose latents the new ones are to stay near

    @property
    def statistics(self) -> Statistics | None:
        """Of the latents, where they are settled: a finished autoencoder is trained further."""
        config = self.average.config
        return (config.latent_mean, config.latent_std) if config.latent_mean else None

    @property
    def progress(self) -> float:
        if self.recipe.steps is not None:
            return min(1.0, self.steps / self.recipe.steps)
        return min(1.0, self.spent / (60 * self.recipe.minutes))


def _step(state: _Training, batch: Batch, noise: float) -> dict[str, float]:
    """One step on drawn clips, which are encoded and decoded, or on rehearsals, which are decoded."""
    recipe, video, (height, width) = state.recipe, as_video(torch.from_numpy(batch.video)), batch.video.shape[2:4]
    boxes, none = torch.from_numpy(batch.boxes), torch.zeros(())
    if batch.latents is None:
        weights = region_weights(boxes, height, width, recipe.regions, recipe.small_mouths)
        with autocast():
            made, latents = reconstruct(state.model, video, noise, (recipe.seed, state.steps))
        picture = picture_loss(recipe, made, video, weights)
        spread, moved = latent_loss(latents), _moved(state, video, latents)
    else:
        weights = region_weights(boxes, height, width, recipe.rehearsed_regions)
        with autocast():
            made = state.model.decode_unclamped(torch.from_numpy(batch.latents).float())[0]
        picture = rehearsed_loss(made[:, :, -video.shape[2] :].float(), video, weights)
        spread, moved = none, none
    state.model.zero_grad(set_to_none=True)
    (picture + recipe.latent_penalty * spread + recipe.near_weight * moved).backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_norm)
    if torch.isfinite(norm):
        rate = recipe.learning_rate * rate_scale(state.steps, recipe.warmup_steps, state.progress)
        _apply(state, rate)
    state.steps += 1
    _update_average(state)
    figures = (picture, spread, moved, norm)
    return {name: figure.item() for name, figure in zip(_LOGGED, figures, strict=True)}


def _moved(state: _Training, video: Tensor, latents: Tensor) -> Tensor:
    """Mean square of what latents have moved from those of the autoencoder before; 0 where none is held to."""
    if state.before is None:
        return latents.new_zeros(())
    with torch.no_grad(), autocast():
        before = state.before.encode(video).float()
    return (latents - before).square().mean()


def _apply(state: _Training, rate: float) -> None:
    own = dict(state.model.named_parameters())
    for name, matrix in state.matrices.items():
        grad = own[name].grad
        matrix.grad = None if grad is None else grad.permute(0, 2, 3, 1).flatten(1)
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()


@torch.no_grad()
def _update_average(state: _Training) -> None:
    keep = kept_share(state.recipe.ema, state.steps)
    for slow, fast in zip(state.average.parameters(), state.model.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)


@torch.no_grad()
def evaluate(model: LightAutoencoder, samples: list[Sample]) -> tuple[dict[str, float], list[Image], Statistics]:
    """PSNR in dB over the held-out clips (by kind; mouth and face of the drawn), reconstructions, statistics."""
    scores: dict[str, list[float]] = {name: [] for name in (*KINDS, "mouth", "face")}
    pictures, latents = [], []
    for kind, sample in zip(HELD_OUT_KINDS, samples, strict=True):
        latents.append(_encode(model, sample))
        with autocast():
            made = model.decode(latents[-1]).float()
        frames = made[0].permute(1, 2, 3, 0).add(1).mul(127.5).round().numpy().astype(np.uint8)
        pictures.append(frames)
        scores[kind].append(_psnr(frames, sample.video))
        if kind == "drawn":
            scores["mouth"].append(_box_psnr(frames, sample, 0))
            scores["face"].append(_box_psnr(frames, sample, 2))
    figures = {f"psnr_{name}": round(float(np.mean(values)), 2) for name, values in scores.items()}
    return figures, pictures, latent_statistics(latents)


def _psnr(made: Image, truth: Image) -> float:
    error = np.square(made.astype(np.float64) - truth).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def _box_psnr(made: Image, sample: Sample, region: int) -> float:
    """Mean over the frames of the PSNR inside a box, in dB."""
    size = sample.video.shape[1]
    corners = np.clip(sample.boxes[:, region], 0, size).astype(int)
    pieces = [(made[t, y0:y1, x0:x1], sample.video[t, y0:y1, x0:x1]) for t, (x0, y0, x1, y1) in enumerate(corners)]
    return float(np.mean([_psnr(a, b) for a, b in pieces if a.size]))


def _preview(path: Path, samples: list[Sample], made: list[Image]) -> None:
    """Rows of six clips, original above reconstruction; the middle frame of each."""
    import cv2

    rows = []
    for first in range(0, len(samples), 6):
        rows.append(np.concatenate([s.video[5] for s in samples[first : first + 6]], axis=1))
        rows.append(np.concatenate([m[5] for m in made[first : first + 6]], axis=1))
    cv2.imwrite(str(path), np.concatenate(rows)[..., ::-1])


def _checkpoint(state: _Training, statistics: Statistics) -> None:
    notes: dict[str, object] = {
        "recipe": asdict(state.recipe),
        "steps": state.steps,
        "spent": state.spent,
        "figures": state.figures or {},
        "data": f"drawn clips, training seeds 0..{HELD_OUT_SEED - 1}, held out from {HELD_OUT_SEED}",
    }
    both = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    both |= {f"average.{k}": v for k, v in state.average.state_dict().items()}
    checkpoint.write(state.out / "train.safetensors", both | _moments(state), _strings(notes))
    mean, deviation = state.statistics or statistics
    config = replace(state.average.config, latent_mean=mean, latent_std=deviation)
    save_model(state.out / "autoencoder.safetensors", state.average, config, notes)


def _begin(recipe: Recipe, out: Path, first: list[Tensor], source: Path | None = None) -> _Training:
    if source:
        model, average = finished(source, recipe.learns, AUTOENCODERS[recipe.model].last_blocks)
    else:
        model, average = (LightAutoencoder(AUTOENCODERS[recipe.model]) for _ in range(2))
    model, average = (m.to(memory_format=torch.channels_last) for m in (model, average))  # type: ignore[call-overload]
    if first and not source:
        initialise(model, first, recipe.seed)
        average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    views = matrices(model)
    rest = [p for name, p in model.named_parameters() if name not in views and p.requires_grad]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    muon = Muon(views.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    before = frozen(source) if source and recipe.near_weight else None
    return _Training(recipe, out, model, average, (adam, muon), views, before=before)


def _moments(state: _Training) -> dict[str, Tensor]:
    """What the optimisers know of each parameter, by their numbers."""
    return {
        f"optimiser.{i}.{number}.{what}": torch.as_tensor(value)
        for i, optimiser in enumerate(state.optimisers)
        for number, known in optimiser.state_dict()["state"].items()
        for what, value in known.items()
    }


def _resume(state: _Training) -> None:
    """Weights, average, what the optimisers know and time spent from train.safetensors."""
    tensors, notes = checkpoint.read(state.out / "train.safetensors")
    for prefix, model in (("model.", state.model), ("average.", state.average)):
        model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    known: tuple[dict[int, dict[str, Tensor]], ...] = tuple({} for _ in state.optimisers)
    for name in (n for n in tensors if n.startswith("optimiser.")):
        _, i, number, what = name.split(".")
        known[int(i)].setdefault(int(number), {})[what] = tensors[name]
    for optimiser, of in zip(state.optimisers, known, strict=True):
        optimiser.load_state_dict({**optimiser.state_dict(), "state": of})
    state.steps, state.spent = int(notes["steps"]), float(notes["spent"])
    log.info("resumed at step %d, %.1f minutes spent", state.steps, state.spent / 60)


def _measure(state: _Training, samples: list[Sample]) -> Statistics:
    """Figures and preview of the averaged model; returns its latent statistics."""
    state.figures, made, statistics = evaluate(state.average, samples)
    _preview(state.out / "preview.png", samples, made)
    record(state.out / "curve.jsonl", {"step": state.steps, "minutes": round(state.spent / 60, 2), **state.figures})
    return statistics


@dataclass
class _Threads:
    """Trains on one thread and tries `most` every three minutes, for as long as that pays.

    On a busy machine two threads that wait for each other at every layer are several times slower than one.
    single: seconds a frame on one thread, smoothed; slow: steps in a row that more threads did not speed up.
    """

    most: int
    single: float = 0.0
    slow: int = 0
    next_trial: float = 0.0

    def note(self, cost: float, now: float) -> None:
        """Take the cost (seconds a frame) of the step just made and set the number of threads of the next."""
        if torch.get_num_threads() == 1:
            self.single = 0.8 * self.single + 0.2 * cost if self.single else cost
            if self.most > 1 and now >= self.next_trial:
                self.slow = 0
                torch.set_num_threads(self.most)
            return
        self.slow = self.slow + 1 if cost > 0.9 * self.single else 0
        if self.slow == 2:
            self.next_trial = now + 180
            torch.set_num_threads(1)


def _loop(state: _Training, queue: Queue, samples: list[Sample]) -> None:
    """Train until the budget is spent; measure every five minutes, save every two, log every fifty steps."""
    threads = None if state.recipe.steps else _Threads(torch.get_num_threads())  # sums differ with their number
    if threads:
        torch.set_num_threads(1)
    statistics = _measure(state, samples)
    measured = saved = state.spent
    last = time.monotonic()
    frames, since, sums = 0.0, state.spent, dict.fromkeys(_LOGGED, 0.0)
    while state.progress < 1:
        figures = _one_step(state, queue)
        frames += figures["frames"]
        sums = {key: sums[key] + figures[key] / 50 for key in sums}
        now = time.monotonic()
        if threads:
            threads.note(figures["seconds"] / figures["frames"], now)
        state.spent, last = state.spent + now - last, now
        if state.steps % 50 == 0:
            rate = round(frames / max(state.spent - since, 1e-9), 1)
            means = {key: round(value, 4) for key, value in sums.items()}
            record(
                state.out / "curve.jsonl",
                {"step": state.steps, "minutes": round(state.spent / 60, 2), **means, "frames_s": rate},
            )
            frames, since, sums = 0.0, state.spent, dict.fromkeys(sums, 0.0)
        if state.spent - measured > 300 or (measured < 60 < state.spent):
            statistics, measured = _measure(state, samples), state.spent
        every = state.recipe.save_steps
        if state.steps % every == 0 if every else state.spent - saved > 120:
            _checkpoint(state, statistics)
            saved = state.spent


def _one_step(state: _Training, queue: Queue) -> dict[str, float]:
    rng = np.random.default_rng((state.recipe.seed, state.steps))
    batch: Batch = queue.get(timeout=300)
    begun = time.monotonic()
    figures = _step(state, batch, float(rng.uniform(*state.recipe.noise)))
    clips, frames = batch.video.shape[:2]
    return {**figures, "frames": float(clips * frames), "seconds": time.monotonic() - begun}


def _final_statistics(state: _Training) -> Statistics:
    """Of the latents of 64 held-out clips that no measuring has seen."""
    kinds, size = ("drawn", "drawn", "photo"), state.recipe.size
    fresh = [make_sample(HELD_OUT_SEED + 1000 + i, kinds[i % 3], size, 9) for i in range(64)]
    return latent_statistics([_encode(state.average, sample) for sample in fresh])


def train(
    recipe: Recipe, out: Path, resume: bool = False, source: Path | None = None, rehearsals: Path | None = None
) -> dict[str, float]:
    """Train for recipe.minutes of wall-clock time, or recipe.steps (all sessions together); the model is left in `out`.

    With a finished autoencoder as `source`, what of it recipe.learns is trained further, with a folder of rehearsals
    on these too.
    Returns the final figures: PSNR in dB. Raises OSError when `resume` finds no train.safetensors in `out`, ValueError
    for a folder without rehearsals, and for rehearsals when the decoder does not learn: they are only decoded.
    """
    if rehearsals and recipe.learns == "encoder":
        raise ValueError("rehearsals teach the decoder, and only the encoder is to learn: leave one of them out")
    out.mkdir(parents=True, exist_ok=True)
    samples = held_out(recipe)
    paths = list_clips(rehearsals) if rehearsals else ()
    first = () if source or resume else islice(batches(recipe, recipe.seed), 4)
    state = _begin(recipe, out, [as_video(torch.from_numpy(batch.video)) for batch in first], source)
    if resume:
        _resume(state)
    with beside(partial(batches, recipe, recipe.seed, paths, state.steps), most=6) as queue:
        _loop(state, queue, samples)
    _measure(state, samples)
    _checkpoint(state, state.statistics or _final_statistics(state))
    log.info("finished: %s", state.figures)
    return state.figures or {}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the light autoencoder on drawn clips.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, help="length in steps, in place of minutes")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--crop", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--source", type=Path, help="autoencoder.safetensors to go on with")
    parser.add_argument("--learns", choices=get_args(Part), help="what of --source")
    parser.add_argument("--near", dest="near_weight", type=float, help="pull of the latents to those of --source")
    parser.add_argument("--rehearsals", type=Path, metavar="FOLDER", help="own-... beside the clips of training.acting")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--recipe", default="{}", metavar="JSON", help="other values of the recipe; options win")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    given = {name: vars(args)[name] for name in _OPTIONS}
    recipe = checkpoint.config_from_json(Recipe, args.recipe)
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    train(recipe, args.out, args.resume, args.source, args.rehearsals)


if __name__ == "__main__":
    main()
