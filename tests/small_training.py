"""A transformer, clips and a training small enough for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from joyavatar_core.autoencoder import AutoencoderConfig, LightAutoencoder
from joyavatar_core.config import MODELS, AudioConfig, ModelConfig
from joyavatar_core.manner import LIMITS
from joyavatar_core.training import autoencoder, clips, flow_matching
from joyavatar_core.training.encoded import EncodedClips

SMALL = ModelConfig(
    dim=24, ffn_dim=32, layers=2, heads=2, in_channels=36, patch=(2, 2), text_dim=0, text_len=0, image_dim=64,
    audio=AudioConfig(
        kind="window", features=8, width=16, window=16, tokens=2, channels=6, dilations=(2, 4, 4), readings=6
    ),
)  # fmt: skip
HEARING = replace(SMALL.audio, features=256, limits=LIMITS)  # pyright: ignore
PRESET = replace(SMALL, dim=32, patch=(4, 4), image_dim=256, audio=HEARING, prediction="x0")
SIZE = (4, 4)
"""Cells of the clips: one token a latent."""


def random_clips(count: int, size: tuple[int, int] = SIZE, blocks: int = 10) -> EncodedClips:
    """Clips that stand still, with random sound."""
    generator, frames = torch.Generator().manual_seed(count), 3 * blocks

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    share = torch.zeros(count, frames, *size).half()
    share[:, :, 2, 1:3] = 1
    steady = normal(count, 1, 16, *size).expand(-1, frames, -1, -1, -1).contiguous()
    return EncodedClips(
        seed=torch.arange(count),
        latents=steady,
        image=normal(count, 8, 16, *size),
        audio=normal(count, frames, 16, 256),
        mouth=share,
        eyes=share,
        told=torch.rand(count, frames, 4, len(LIMITS), generator=generator).half(),
    )


def add_small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PRESET` as the model "small"."""
    monkeypatch.setitem(MODELS, "small", PRESET)


def small_recipe() -> flow_matching.Recipe:
    return flow_matching.Recipe(model="small", tokens=200, held_out=2, warmup_steps=1, average=0.5, first_clips=3)


def small_training(out: Path, *more: EncodedClips) -> flow_matching.Training:
    """A training at step 0 on four clips, and on `more` of other sizes."""
    return flow_matching.begin(small_recipe(), out, (random_clips(6), *more))


def small_autoencoder(path: Path, seed: int = 0) -> Path:
    """The file of a narrow autoencoder of 16 channels and 16 pixels a cell that was never trained."""
    torch.manual_seed(seed)
    config = AutoencoderConfig(
        16, 2, (8, 8, 8), (8, 8, 8, 8), (1, 1, 1), (1, 1, 1), (0.0,) * 16, (1.0,) * 16, last_blocks=1
    )
    model = LightAutoencoder(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    autoencoder.save_model(path, model, config, {})
    return path


def drawn_clips(folder: Path) -> Path:
    """Four drawn clips just long enough for a full window, the third of another size than the others."""
    for seed, size in enumerate([(64, 64), (64, 64), (64, 128), (64, 64)]):
        clips.write_clip(folder, seed, frames=105, size=size)
    return folder
