"""The light autoencoder against TAEHV and LightTAE at full width, and which of them a file is taken for.

The golden numbers (golden/taehv.json, see docs/parity.md) came from the public implementations, run in float64 with the
weights of `weights` and the inputs of `inputs`; both are made here again from seeds.

Shape legend: B batch, C latent channels, F latent frames, T pixel frames, h w latent size.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from joyavatar_core import checkpoint
from joyavatar_core.autoencoder import AUTOENCODERS, AutoencoderConfig, LightAutoencoder, light_config
from joyavatar_core.avatar import folded
from joyavatar_core.wan_vae import WanVAEConfig

from .helpers import assert_golden, fill

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "taehv.json").read_text())
LIGHT = replace(AUTOENCODERS["taew2_1"], latent_mean=WanVAEConfig().latent_mean, latent_std=WanVAEConfig().latent_std)
CONFIGS = {"taew2_1": AUTOENCODERS["taew2_1"], "taew2_2": AUTOENCODERS["taew2_2"], "lighttaew2_1": LIGHT}
SPLITS = ((4,), (1, 1, 1, 1), (3, 1), (1, 3))
TOLERANCES = {torch.float64: 1e-7, torch.float32: 5e-6}  # LightX2V rounds its means to float32, hence not 1e-12


@cache
def weights(name: str, dtype: torch.dtype = torch.float64) -> LightAutoencoder:
    """Random weights whose pictures are hardly ever limited to 0 .. 1."""
    module = fill(LightAutoencoder(CONFIGS[name]).to(dtype), scale={"decoder.22.weight": 0.6})
    module.state_dict()["decoder.22.bias"].fill_(0.5)
    return module


def inputs(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """latents [1, C, 4, 4, 6] and a video [1, 3, 13, H, W] of their size."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, channels, 4, 4, 6, generator=generator, dtype=torch.float64)
    side = 8 if channels == 16 else 16
    video = torch.rand(1, 3, 13, 4 * side, 6 * side, generator=generator, dtype=torch.float64) * 2 - 1
    return latents.to(dtype), video.to(dtype)


def streamed(decoder: LightAutoencoder, latents: Tensor, split: tuple[int, ...]) -> Tensor:
    state, pieces = None, []
    for piece in latents.split(split, dim=2):
        frames, state = decoder.decode_stream(piece, state)
        pieces.append(frames)
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_decodes_as_the_reference(name: str, dtype: torch.dtype) -> None:
    latents, _ = inputs(CONFIGS[name].latent_channels, dtype)
    if name.startswith("light"):
        latents = 0.5 * latents
    assert_golden(weights(name, dtype).decode(latents), GOLDEN[name]["decode"], TOLERANCES[dtype])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_streaming_decodes_as_the_reference(split: tuple[int, ...], fold: bool) -> None:
    """The same frames from the small state between the pieces, and from the faster decoder that a stream uses."""
    latents, _ = inputs(16, torch.float32)
    decoder = weights("taew2_1", torch.float32)
    if fold:
        decoder = folded(decoder, torch.device("cpu"), torch.float32)
    assert_golden(streamed(decoder, latents, split), GOLDEN["taew2_1"]["decode"], 5e-6)


@pytest.mark.parametrize("name", ["taew2_1", "taew2_2"])
def test_encodes_as_the_reference(name: str) -> None:
    """With three copies of the last frame behind the clip, not of the first before it."""
    _, video = inputs(CONFIGS[name].latent_channels, torch.float64)
    assert_golden(weights(name).encode(video), GOLDEN[name]["encode"], 1e-11)
    other = LightAutoencoder(replace(CONFIGS[name], ahead=False)).double()
    other.load_state_dict(weights(name).state_dict())
    assert not torch.allclose(other.encode(video), weights(name).encode(video), atol=1e-3)


def test_an_encoder_that_looks_ahead_does_not_stream() -> None:
    with pytest.raises(ValueError, match="three frames ahead"):
        weights("taew2_1").encode_stream(torch.zeros(1, 3, 5, 32, 32, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="4 pixel frames"):
        weights("taew2_1").encode(torch.zeros(1, 3, 4, 32, 32, dtype=torch.float64))


def test_light_tae_takes_the_latents_of_the_vae_itself() -> None:
    """Normalised latents in, as models make them: the same picture as TAEHV's way with latents scaled by hand."""
    latents, _ = inputs(16, torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 16, 1, 1, 1) for values in _wan())
    raw = LightAutoencoder(AUTOENCODERS["taew2_1"]).double()
    raw.load_state_dict(weights("lighttaew2_1").state_dict())
    assert torch.allclose(weights("lighttaew2_1").decode(latents), raw.decode(latents * std + mean), atol=1e-12)


def _wan() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return WanVAEConfig().latent_mean, WanVAEConfig().latent_std


# what a file is taken for


def on_meta(config: AutoencoderConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with torch.device("meta"):
        return LightAutoencoder(config).to(dtype).state_dict()


@pytest.mark.parametrize(
    "config",
    [
        *(c for c in AUTOENCODERS.values()),
        AutoencoderConfig(encoder_widths=(4, 6, 8), decoder_widths=(8, 6, 5, 4), encoder_blocks=(1, 0, 2)),
    ],
)
def test_widths_are_read_from_the_shapes(config: AutoencoderConfig) -> None:
    found = light_config("taew2_1.safetensors", {}, on_meta(config))
    assert found == replace(config, ahead=True)


@pytest.mark.parametrize(
    ("name", "dtype", "raw", "sure"),
    [
        ("taew2_1.pth", torch.float16, False, True),
        ("taew2_1.safetensors", torch.float32, False, True),
        ("lighttaew2_1.safetensors", torch.float32, True, True),
        ("LightTAEW2_1-fp16.safetensors", torch.float16, True, True),
        ("decoder.safetensors", torch.float16, False, False),
        ("decoder.safetensors", torch.float32, True, False),
    ],
)
def test_tae_and_light_tae_are_told_apart(
    name: str, dtype: torch.dtype, raw: bool, sure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = light_config(name, {}, on_meta(AUTOENCODERS["taew2_1"], dtype))
    assert config == (LIGHT if raw else AUTOENCODERS["taew2_1"])
    assert sure == ("by its precision" not in caplog.text)


def test_our_own_files_say_what_they_are() -> None:
    config = AUTOENCODERS["tiny"]
    metadata = {"autoencoder_config": checkpoint.config_to_json(config)}
    assert light_config("lighttaew2_1.safetensors", metadata, on_meta(config)) == config


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("taehv.pth", AUTOENCODERS["taew2_1"], "Hunyuan"),
        ("taecvx.safetensors", AUTOENCODERS["taew2_1"], "CogVideoX"),
        ("lighttaehy1_5.safetensors", AUTOENCODERS["taew2_1"], "Hunyuan"),
        ("lighttaew2_2.safetensors", AUTOENCODERS["taew2_2"], "48 latent channels"),
    ],
)
def test_light_autoencoders_of_other_models_are_refused(name: str, config: AutoencoderConfig, said: str) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=said):
        light_config(name, {}, on_meta(config))


def test_the_larger_variant_is_refused() -> None:
    tensors = on_meta(AUTOENCODERS["taew2_2"])
    tensors["decoder.1.conv.0.weight"] = torch.empty(1024, 1, 7, 7, device="meta")
    with pytest.raises(checkpoint.CheckpointError, match="super"):
        light_config("taew2_2_super.pth", {}, tensors)


@pytest.mark.parametrize("spoil", ["missing", "left over", "of another shape"])
def test_a_wrong_key_is_named(spoil: str) -> None:
    tensors = on_meta(AUTOENCODERS["taew2_1"])
    key = "decoder.7.conv.weight"
    changed = {"missing": {}, "left over": {key: tensors[key], "decoder.23.bias": tensors[key]}}
    other = changed.get(spoil, {key: tensors[key][:, :-1]})
    tensors = {k: v for k, v in tensors.items() if k != key} | other
    with torch.device("meta"):
        module = LightAutoencoder(light_config("taew2_1.pth", {}, tensors))
    with pytest.raises(checkpoint.CheckpointError, match=f"1 {spoil}: decoder"):
        checkpoint.load_into(module, tensors, "taew2_1.pth")
