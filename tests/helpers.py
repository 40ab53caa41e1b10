"""Small random models, seeded weights, golden numbers and conditions shared by the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from joyavatar_core.audio import AudioTokens
from joyavatar_core.conditioning import ImageChannels, reference_tokens
from joyavatar_core.config import AudioConfig, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.policy import RolloutPolicy
from joyavatar_core.rollout import Condition, Rollout, RolloutState

WAN = ModelConfig(
    dim=40,  # head_dim 20: 8 for time, 6 for height and width
    ffn_dim=56,
    layers=2,
    heads=2,
    in_channels=4,
    out_channels=4,
    freq_dim=32,
    text_dim=12,
    text_len=8,
    image_dim=0,
)
"""Wan2.1's text to video, small: the sizes that goldens of public implementations were made at."""
SMALL = ModelConfig(
    dim=24,
    ffn_dim=32,
    layers=2,
    heads=2,
    out_channels=4,
    in_channels=12,
    patch=(1, 1),
    freq_dim=32,
    text_dim=0,
    text_len=0,
    image_dim=4,
    audio=AudioConfig(
        kind="window", features=6, columns=2, width=8, window=5, tokens=2, channels=4, dilations=(1,), readings=3
    ),
)
GEOMETRY = Geometry(32, 16, spatial=8, patch=(1, 1))

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fill(module: ModuleT, seed: int = 0, scale: Mapping[str, float] | None = None) -> ModuleT:
    """Weights of variance 0.64 / fan-in from a seed, in sorted key order, times `scale` of the names given.

    Any module with the same keys and shapes gets the same weights: golden numbers of a public implementation rest on
    it, so what it draws for a key must not change.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = module.state_dict()
    for name in sorted(parameters):
        value = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
        if name.endswith("gamma") or (name.endswith("weight") and value.dim() == 1):  # of a norm
            value = 1 + 0.1 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        else:
            value = 0.8 * value / parameters[name][0].numel() ** 0.5
        parameters[name].copy_((scale or {}).get(name, 1.0) * value)
    return module.eval().requires_grad_(False)


def assert_golden(out: Tensor, golden: Mapping[str, Any], tolerance: float) -> None:
    """out [B, C, F, h, w] against stored samples, mean size of each frame, and a sum that sees any permutation."""
    flat = out.double().flatten()
    order = (flat * torch.arange(flat.numel(), dtype=torch.float64).cos()).sum()
    frames = out.double().abs().mean((0, 1, 3, 4))
    assert flat[:: flat.numel() // 7].tolist() == pytest.approx(golden["samples"], rel=0, abs=tolerance)
    assert frames.tolist() == pytest.approx(golden["frames"], rel=0, abs=tolerance)
    assert order.item() == pytest.approx(golden["order"], rel=0, abs=tolerance * 50)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64, config: ModelConfig = SMALL) -> JoyAvatarDiT:
    """A random model whose output really depends on every input."""
    torch.manual_seed(seed)
    model = JoyAvatarDiT(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    return model


def small_rollout(
    policy: RolloutPolicy, seed: int = 0, dtype: torch.dtype = torch.float64, config: ModelConfig = SMALL
) -> Rollout:
    """A rollout of the small model with a random picture."""
    model = small_model(dtype=dtype, config=config)
    torch.manual_seed(1)
    channels = torch.randn(1, 8, 30, *GEOMETRY.latent_size, dtype=dtype)
    tokens = reference_tokens(channels[:, 4:, 0], SMALL.patch)
    with torch.no_grad():
        kv = model.condition(image=tokens)
    geometry = replace(GEOMETRY, **policy.block_sizes)
    return Rollout(model, policy, geometry, Condition(kv, ImageChannels(channels)), seed, torch.device("cpu"), dtype)


def audio_tokens(block: int, latents: int = 3) -> AudioTokens:
    """Random tokens of a block, a function of its index."""
    generator = torch.Generator().manual_seed(1000 + block)
    tokens = torch.randn(latents, 5, 6, generator=generator)
    return AudioTokens(tokens, torch.ones(latents, 5, dtype=torch.bool))


@torch.no_grad()
def roll(rollout: Rollout, blocks: int, state: RolloutState | None = None) -> torch.Tensor:
    """Clean latents [1, C, 3 blocks, h, w] of a clip."""
    state = state or rollout.start()
    out = []
    while state.window < rollout.policy.num_windows(blocks):
        if state.window < blocks:
            shown = rollout.geometry.latents_of_block(state.window)
            state.audio[state.window] = audio_tokens(state.window, len(shown))
        out += [done.latents for done in rollout.run_window(state, blocks)]
    return torch.cat(out, dim=2)
