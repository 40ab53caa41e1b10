"""Rollouts and single forwards against the numbers of the public implementations, with the same weights and noise.

`tests/golden/families.json` holds what guandeh17/Self-Forcing, NVlabs/LongLive (v1.0), TencentARC/RollingForcing,
GAIR-NLP/LiveTalk and KlingAIResearch/AvatarForcing gave in float64 for the weights of `helpers.fill`, the engine's own
noise and the inputs made here from seeds; docs/parity.md names the commits and what was patched. In float64 a rollout
agrees to 2e-6: they keep their noise levels in float32.

Shape legend: B batch, C channels, F latent frames, h w latent size, n latent frames of a block, W pixel frames of one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from joyavatar_core.audio import AudioTokens, AudioTrack
from joyavatar_core.conditioning import ImageChannels
from joyavatar_core.config import AudioConfig, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.policy import POLICIES
from joyavatar_core.rollout import Condition, Rollout
from joyavatar_core.wav2vec_frames import Wav2Vec2Frames, Wav2Vec2FramesWhole

from .helpers import WAN as TEXT
from .helpers import assert_golden, fill

transformers = pytest.importorskip("transformers")
torch.set_num_threads(2)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "families.json").read_text(encoding="utf-8"))
SEED, BLOCKS, SIZE = 7, 6, (4, 6)
PACKED = replace(
    TEXT,
    layers=6,
    in_channels=33,
    out_channels=16,
    audio=AudioConfig(kind="added", features=5, width=3, window=4),
)
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-5)])


def prompt(dtype: torch.dtype) -> Tensor:
    """[1, 5, 12]"""
    return torch.randn((1, 5, 12), generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def picture_and_sound(latents: int) -> tuple[Tensor, Tensor]:
    """Latent [1, 16, 1, h, w] and frames [1, F, 4, 5], latent 0 hearing four times the same."""
    generator = torch.Generator().manual_seed(3)
    picture = torch.randn((1, 16, 1, *SIZE), generator=generator, dtype=torch.float64)
    sound = torch.randn((1, latents, 4, 5), generator=generator, dtype=torch.float64)
    sound[:, 0] = sound[:, 0, 3:]
    return picture, sound


def channels(picture: Tensor) -> ImageChannels:
    mask = torch.ones(1, 1, 2, *SIZE, dtype=picture.dtype)
    mask[:, :, 0] = 0
    return ImageChannels(torch.cat([picture.expand(-1, -1, 2, -1, -1), mask], 1), mask_last=True)


def rollout(name: str, config: ModelConfig, image: ImageChannels | None, dtype: torch.dtype) -> Rollout:
    model, policy = fill(JoyAvatarDiT(config).to(dtype)), POLICIES[name]
    geometry = Geometry(48, 32, **policy.block_sizes)
    condition = Condition(model.condition(prompt(dtype)), image)
    return Rollout(model, policy, geometry, condition, SEED, torch.device("cpu"), dtype)


@PRECISIONS
@pytest.mark.parametrize("name", ["self-forcing", "longlive", "rolling-forcing"])
@torch.no_grad()
def test_six_blocks_of_text_to_video(name: str, dtype: torch.dtype, tolerance: float) -> None:
    run = rollout(name, TEXT, None, dtype)
    out = torch.cat([block.latents for block in run.run(run.start(), BLOCKS)], dim=2)
    assert_golden(out, GOLDEN[name], tolerance)


@torch.no_grad()
def test_twelve_blocks_of_rolling_forcing() -> None:
    """From block 7 on the clean pass has lost sight of the first block, and the cache has been overwritten."""
    run = rollout("rolling-forcing", TEXT, None, torch.float32)
    state = run.start()
    sizes, out = set(), []
    while state.window < run.policy.num_windows(12):
        out += [block.latents for block in run.run_window(state, 12)]
        sizes.add(state.caches[0].keys.numel())
    assert len(sizes) == 1
    assert_golden(torch.cat(out, dim=2), GOLDEN["rolling-forcing twelve"], 2e-5)


@PRECISIONS
@torch.no_grad()
def test_six_blocks_of_livetalk(dtype: torch.dtype, tolerance: float) -> None:
    """Sink of three blocks at their own places, the picture's latent in the first place, audio between the layers."""
    picture, sound = (t.to(dtype) for t in picture_and_sound(3 * BLOCKS))
    run = rollout("livetalk", PACKED, channels(picture), dtype)
    state, out = run.start(), []
    for block in range(BLOCKS):
        state.audio[block] = AudioTokens(sound[0, 3 * block : 3 * block + 3], torch.ones(3, 4, dtype=torch.bool))
        out += [done.latents for done in run.run_window(state, BLOCKS)]
    assert torch.equal(out[0][:, :, :1], picture)
    assert_golden(torch.cat(out, dim=2), GOLDEN["livetalk"], tolerance)


@PRECISIONS
@torch.no_grad()
def test_six_blocks_of_avatarforcing(dtype: torch.dtype, tolerance: float) -> None:
    """The picture's latent by itself, silent, and then as sink; two latents of the past."""
    picture, sound = (t.to(dtype) for t in picture_and_sound(1 + 4 * BLOCKS))
    sound[:, 0] = 0
    run = rollout("avatarforcing", PACKED, channels(picture), dtype)
    state, out = run.start(), []
    while state.window < run.policy.num_windows(BLOCKS):
        if state.window < BLOCKS:
            heard = sound[0, run.geometry.latents_of_block(state.window)]
            state.audio[state.window] = AudioTokens(heard, torch.ones(len(heard), 4, dtype=torch.bool))
        out += [done.latents for done in run.run_window(state, BLOCKS)]
    assert [block.shape[2] for block in out] == [5, 4, 4, 4, 4, 4] and torch.equal(out[0][:, :, :1], picture)
    assert_golden(torch.cat(out, dim=2), GOLDEN["avatarforcing"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["livetalk", "avatarforcing"])
@torch.no_grad()
def test_one_forward_with_packed_audio(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = fill(JoyAvatarDiT(PACKED).to(dtype))
    if name == "livetalk":  # the first block: the mask opens at its second latent
        picture, sound = picture_and_sound(3)
        times, opened = [[1000.0, 640.0, 640.0], [930.0, 310.5, 0.0]], 1
    else:  # a later one
        picture, sound = picture_and_sound(4)
        sound[:, 0] = picture_and_sound(5)[1][:, 4]
        times, opened = [[930.0, 640.0, 310.5, 0.0]], 0
    batch, frames = len(times), len(times[0])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((batch, 16, frames, *SIZE), generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, 1, frames, *SIZE)
    mask[:, :, :opened] = 0
    x = torch.cat([x, picture.expand(batch, -1, frames, -1, -1), mask], dim=1).to(dtype)
    condition = model.condition(prompt(dtype).expand(batch, -1, -1))
    audio = model.audio(sound.to(dtype).expand(batch, -1, -1, -1))
    out, _ = model(x, torch.tensor(times, dtype=dtype), range(frames), condition, audio)
    assert_golden(out, GOLDEN[f"{name} forward"], tolerance)


# Hearing


def wav2vec2() -> Any:
    """A small base model, its weights from a seed in sorted key order."""
    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        conv_dim=(6,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="group",
        do_stable_layer_norm=False,
        conv_bias=False,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    weights = model.state_dict()
    for name in sorted(weights):
        drawn = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
        drawn = drawn * (0.5 if drawn.dim() > 1 else 0.1) + (1.0 if name.endswith("norm.weight") else 0.0)
        weights[name].copy_(drawn)
    return model.requires_grad_(False)


def spoken(seconds: float = 3.0) -> AudioTrack:
    track = AudioTrack()
    track.push(torch.randn(int(seconds * 16000), generator=torch.Generator().manual_seed(5)) * 0.1, 16000)
    track.finish()
    return track


@pytest.mark.parametrize(("name", "fps", "block", "delay"), [("livetalk", 16, 3, 0), ("avatarforcing", 25, 4, 1)])
def test_sound_is_heard_as_the_originals_do(name: str, fps: int, block: int, delay: int) -> None:
    golden = GOLDEN[f"{name} sound"]
    geometry = Geometry(64, 64, fps=Fraction(fps), block_latents=block)
    front_end = Wav2Vec2FramesWhole(wav2vec2(), geometry, delay=delay)
    tokens = front_end.features(spoken(), range(golden["shape"][0])).tokens.double()
    assert list(tokens.shape) == golden["shape"]
    assert tokens.flatten()[:: tokens.numel() // 11].tolist() == pytest.approx(golden["samples"], abs=3e-5)
    assert tokens.abs().mean((1, 2)).tolist() == pytest.approx(golden["latents"], abs=1e-5)
    assert tokens.abs().mean((0, 1)).tolist() == pytest.approx(golden["channels"], abs=1e-5)


@pytest.mark.parametrize(("fps", "block", "delay"), [(16, 3, 0), (25, 4, 1)])
def test_streaming_is_a_function_of_place_alone(fps: int, block: int, delay: int) -> None:
    """Windows cut any way, and the sound let go that is no longer needed, give the same bits."""
    geometry = Geometry(64, 64, fps=Fraction(fps), block_latents=block)
    front_end, whole = (Wav2Vec2Frames(wav2vec2(), geometry, history=1.5, delay=delay) for _ in range(2))
    sound, track = torch.randn(64000, generator=torch.Generator().manual_seed(6)) * 0.1, AudioTrack()
    at_once = AudioTrack()
    at_once.push(sound, 16000)
    at_once.finish()
    latents = geometry.latents_of_frames(geometry.frames_of_duration(at_once.duration))
    wanted, got, fed = whole.features(at_once, range(latents)).tokens, [], 0
    for latent in range(latents):
        while not track.finished and track.end < front_end.needs(latent + 1):
            track.push(sound[fed : fed + 1777], 16000)
            fed += 1777
            if fed >= len(sound):
                track.finish()
        got.append(front_end.features(track, range(latent, latent + 1)).tokens)
        track.drop(front_end.keeps(latent + 1))
    assert torch.equal(torch.cat(got), wanted) and wanted.shape == (latents, 4, 8 * 4)
    assert (wanted[0] == 0).all() == bool(delay) and front_end.channels == 32


def test_streaming_lies_beside_the_whole() -> None:
    """A model that hears convolutions only, of a tone that swells slowly: frames lie near the originals'."""
    model = wav2vec2()
    for layer in model.encoder.layers:
        layer.attention.out_proj.weight.zero_()
    for name, parameter in model.encoder.pos_conv_embed.named_parameters():
        if "original0" in name or name.endswith("bias"):
            parameter.zero_()
    geometry = Geometry(64, 64)
    time = torch.arange(48000) / 16000
    track = AudioTrack()
    loudness = 0.3 + 0.2 * torch.sin(2 * torch.pi * 0.8 * time)
    track.push(loudness * torch.sin(2 * torch.pi * 200 * time), 16000)  # four periods between two features
    track.finish()
    windows = Wav2Vec2Frames(model, geometry).features(track, range(12)).tokens
    whole = Wav2Vec2FramesWhole(model, geometry).features(track, range(12)).tokens
    middle = slice(4, 11)
    apart = (windows[middle] - whole[middle]).pow(2).mean().sqrt() / whole[middle].std()
    assert apart < 0.25


@pytest.mark.parametrize(
    ("options", "said"),
    [({"history": 0.2}, "a block needs at least"), ({"lookahead": 0.0}, "lookahead 0 s"), ({"delay": 2}, "delay 2")],
)
def test_windows_too_short(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Wav2Vec2Frames(wav2vec2(), Geometry(64, 64), **options)
