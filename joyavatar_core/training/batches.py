"""Batches of training sequences, the model's forward on them, and the weighted error of what it says.

Shape legend: B batch, N clips, C latent channels, F latent frames of a sequence, h w latent size, P tokens of a
latent, W audio tokens of a latent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import flow
from ..conditioning import reference_tokens
from ..model import JoyAvatarDiT
from .encoded import EncodedClips
from .inputs import hear
from .sequences import Layout, Mixture, sample_latents, sample_levels

_SMALLEST_MOUTH = 0.5  # latent cells: a mouth that is hidden or outside the picture is not drawn more often still


@dataclass(frozen=True)
class Batch:
    """Sequences of one layout, latent frames `frames` [B, F] of the clips `clips` [B], whose seeds are `seeds` [B].

    corner [B, 2]: row and column of the first cell in the clip's whole picture.
    true, x0, noise [B, C, F, h, w]: latents of the true clips, those to be learnt, mostly the same, and what they are
    mixed with; channels: mask and image channels, the same but for C; image: reference tokens
    [B, P, p q C]; audio [B, F, W, channels]; mouth, eyes [B, F, h, w]; timesteps [B, F]; manner [B, F, T, K]: what no
    sound tells, of clips whose truth is known; told [B, F, T, K]: readings that stand in place of what is heard, if
    there are any; own [B, C, F, h, w]: rehearsals of these frames, likewise.
    """

    layout: Layout
    clips: Tensor
    seeds: Tensor
    corner: Tensor
    frames: Tensor
    true: Tensor
    x0: Tensor
    noise: Tensor
    channels: Tensor
    image: Tensor
    audio: Tensor
    mouth: Tensor
    eyes: Tensor
    timesteps: Tensor
    manner: Tensor | None = None
    told: Tensor | None = None
    own: Tensor | None = None


def make_batch(
    data: EncodedClips,
    layout: Layout,
    clips: Tensor,
    patch: tuple[int, int],
    mixture: Mixture,
    seed: int,
    told: bool = False,
) -> Batch:
    """The sequences of a layout cut from the given clips [B]; the seed decides the cuts, levels and noise.

    told: true readings stand in place of what is heard. ValueError for clips that have none.
    """
    if told and data.told is None:
        raise ValueError("these clips have no truth to tell: take drawn ones (training.clips)")
    random_, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    blocks = data.latents.shape[1] // layout.policy.block_latents
    frames = torch.tensor([sample_latents(random_, layout, blocks, mixture.gap) for _ in clips])  # [B, F]
    rows = clips[:, None]
    x0 = data.latents[rows, frames].float().transpose(1, 2)
    return Batch(
        layout=layout,
        clips=clips,
        seeds=data.seed[clips],
        corner=torch.zeros(len(clips), 2, dtype=torch.long) if data.corner is None else data.corner[clips],
        frames=frames,
        true=x0,
        x0=x0,
        noise=torch.randn(x0.shape, generator=generator),
        channels=data.image_channels(clips, frames, 4),
        image=reference_tokens(data.image[clips, 0].float(), patch),
        audio=data.audio[rows, frames].float(),
        mouth=data.mouth[rows, frames].float(),
        eyes=data.eyes[rows, frames].float(),
        timesteps=sample_levels(generator, layout, len(clips), mixture),
        manner=data.manner(clips, frames),
        told=data.told[rows, frames].float() if told and data.told is not None else None,
        own=None if data.own is None else data.own[rows, frames].float().transpose(1, 2),
    )


def draw_clips(random_: random.Random, layout: Layout, odds: Sequence[float], tokens: int, each: int) -> Tensor:
    """Which clips, drawn by their odds, make a batch of about `tokens` video tokens, `each` in a latent: [B]."""
    batch = max(1, round(tokens / (layout.latents * each)))
    return torch.tensor(random_.choices(range(len(odds)), odds, k=batch))


@dataclass(frozen=True)
class Framing:
    """What of a picture a batch shows.

    close_ups: odds of squares about the mouths in place of whole frames: more faces for the same time.
    close_up: their widths in latent cells.
    small_mouths: a clip is drawn in inverse proportion to the cells of its mouth to this power. 0: all clips alike, so
    that sizes and framings that few clips have are learnt last; 1: as many cells of small mouths as of large ones.
    """

    close_ups: float = 0.7
    close_up: tuple[int, ...] = (8, 12)
    small_mouths: float = 0.0

    def draw(
        self,
        data: tuple[EncodedClips, ...],
        layout: Layout,
        tokens: int,
        patch: tuple[int, int],
        draws: tuple[random.Random, random.Random],
    ) -> tuple[EncodedClips, Tensor]:
        """Clips of one size and which of them, [B], make a batch of about `tokens` video tokens.

        data: parts of one size each. draws: common to all processes, and our own.
        """
        common, own = draws
        odds = [part.mouth_cells.clamp(min=_SMALLEST_MOUTH).pow(-self.small_mouths).tolist() for part in data]
        ((part, its),) = common.choices(list(zip(data, odds, strict=True)), [sum(each) for each in odds])
        cells = common.choice(self.close_up)
        if min(part.latents.shape[-2:]) < cells or common.random() >= self.close_ups:
            return part, draw_clips(own, layout, its, tokens, part.tokens(patch))
        each = cells**2 // (patch[0] * patch[1])
        cut = part.close_ups(draw_clips(own, layout, its, tokens, each), cells, patch, own)
        return cut, torch.arange(len(cut))


def predict(model: JoyAvatarDiT, batch: Batch) -> Tensor:
    """Velocity of every latent of the batch, [B, C, F, h, w] float32."""
    dtype = next(model.parameters()).dtype
    tokens = batch.image.shape[1]
    x_t = flow.add_noise(batch.x0, batch.noise, batch.timesteps)
    condition = model.condition(image=batch.image.to(dtype))
    told = batch.told
    audio = hear(model, batch.audio, batch.manner) if told is None else model.told(told.to(dtype))
    x = torch.cat([x_t, batch.channels], dim=1)
    mask = batch.layout.mask(tokens)
    return model(x, batch.timesteps, batch.layout.positions(), condition, audio, None, mask)[0]


def squared_error(batch: Batch, v: Tensor) -> Tensor:
    """Squared error of the velocity, mean over channels: [B, F, h, w]."""
    return (v - flow.velocity(batch.x0, batch.noise)).square().mean(dim=1)


def clean(batch: Batch, v: Tensor) -> Tensor:
    """The clean latents [B, C, F, h, w] that a velocity implies."""
    return flow.to_x0(flow.add_noise(batch.x0, batch.noise, batch.timesteps), v, batch.timesteps)


def x0_error(batch: Batch, v: Tensor) -> Tensor:
    """Squared error of the clean latents that the velocity implies, mean over channels: [B, F, h, w]."""
    return (clean(batch, v) - batch.x0).square().mean(dim=1)


def without_sound(batch: Batch, deaf: Tensor) -> Batch:
    """The batch with zeros for the audio tokens of some sequences, [B] bool: what guidance goes away from."""
    return replace(batch, audio=batch.audio.masked_fill(deaf[:, None, None, None], 0.0))


def some_deaf(batch: Batch, odds: float, generator: torch.Generator) -> Batch:
    """The batch with every sequence without its sound at these odds."""
    return without_sound(batch, torch.rand(len(batch.audio), generator=generator) < odds)


def other_voices(batch: Batch, columns: int, strength: float, generator: torch.Generator) -> Batch:
    """The batch as other throats would say it: spectra stretched along the frequencies by factors up to e^strength
    (vocal tract length perturbation, Jaitly and Hinton 2013), and up to 6 dB louder or softer.

    audio: log-mel tokens of `columns` columns each, 0.5 a factor of ten, silence at -1.
    """
    spectra = batch.audio.unflatten(-1, (columns, -1))  # [B, F, W, columns, mels]
    count, mels = len(spectra), spectra.shape[-1]
    draws = 2 * torch.rand(2, count, generator=generator) - 1
    places = (torch.arange(mels) * (strength * draws[0, :, None]).exp()).clamp(max=mels - 1)  # [B, mels]
    low = places.floor().long().clamp(max=mels - 2)
    part = (places - low)[:, None, None, None]

    def at(bins: Tensor) -> Tensor:
        return spectra.gather(-1, bins[:, None, None, None].expand_as(spectra))

    stretched = at(low) * (1 - part) + at(low + 1) * part
    louder = stretched + 0.3 * draws[1].view(-1, 1, 1, 1, 1)
    return replace(batch, audio=louder.clamp(min=-1.0).flatten(-2))


def loss_weights(batch: Batch, mouth: float, eyes: float, past: float) -> Tensor:
    """Weights of the cells, [B, F, h, w]: of mouth, eyes and finished blocks as given, 1 elsewhere.

    The motion frame has no part in a loss.
    """
    cells = 1 + (mouth - 1) * batch.mouth + (eyes - 1) * batch.eyes
    latent = torch.ones(batch.layout.latents)
    latent[: batch.layout.lead] = past
    latent[batch.layout.lead - batch.layout.motion : batch.layout.lead] = 0
    return cells * latent[:, None, None]


def weighted_mean(error: Tensor, weights: Tensor) -> Tensor:
    """Mean of an error under weights of its shape."""
    return (weights * error).sum() / weights.sum()


def regression_loss(batch: Batch, v: Tensor, mouth: float, eyes: float, past: float) -> Tensor:
    """Weighted mean (`loss_weights`) of the squared error of the clean latents."""
    return weighted_mean(x0_error(batch, v), loss_weights(batch, mouth, eyes, past))


# Measuring


def measured_batch(
    clips: EncodedClips, layout: Layout, patch: tuple[int, int], mixture: Mixture, told: bool = False
) -> Batch:
    """All the clips under a layout, always the same: levels as at inference, the past right before the window."""
    exact = replace(mixture, exact=1.0, clean_motion=0.0, sink_late=1.0, gap=0.0)
    return make_batch(clips, layout, torch.arange(len(clips)), patch, exact, seed=1, told=told)


def by_level(model: JoyAvatarDiT, batch: Batch, error: Callable[[Batch, Tensor], Tensor]) -> dict[str, float]:
    """`error` of the window's blocks by level (index before the warp): all cells, and the mouth alone.

    `deaf_1000` is the mouth's error with another clip's sound: as long as it equals `mouth_1000` the model does not
    listen.
    """
    told = None if batch.told is None else batch.told.roll(1, 0)
    deaf = replace(batch, audio=batch.audio.roll(1, 0), told=told)
    here, there = error(batch, predict(model, batch)), error(deaf, predict(model, deaf))
    n, scores = batch.layout.policy.block_latents, {}
    for i, timestep in enumerate(batch.layout.timesteps):
        block = slice(batch.layout.lead + i * n, batch.layout.lead + (i + 1) * n)
        mouth = batch.mouth[:, block]
        scores[f"all_{timestep:.0f}"] = float(here[:, block].mean())
        scores[f"mouth_{timestep:.0f}"] = float(weighted_mean(here[:, block], mouth))
        scores[f"deaf_{timestep:.0f}"] = float(weighted_mean(there[:, block], mouth))
    return {name: round(value, 4) for name, value in scores.items()}
