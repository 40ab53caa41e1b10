"""Wan2.2-S2V against the numbers of Live Avatar's release, with the same weights; its names, sizes and LoRA.

The golden numbers (tests/golden/live_avatar.json) came from the released classes in float64, patched as docs/parity.md
lists, with the weights of `helpers.fill` and the inputs of `given`, both made here again from seeds:
- "forward": the first block alone beside the prefilled reference, a timestep of each latent;
- "released", "never": six blocks of the release's loop, with and without the refresh of the reference after block 4,
  the sink drawn at d = 17, noise of `noise.gaussian` for seed 5;
- "features": frames of the release's audio encoder out of random hidden states.

Shape legend: B batch, C channels, F latent frames, h w latent size, L tokens, T tokens of the audio encoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from joyavatar_core.audio import AudioTokens
from joyavatar_core.config import AudioConfig, ModelConfig, S2VConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import Past, WithReference
from joyavatar_core.policy import POLICIES, RolloutPolicy
from joyavatar_core.rollout import Condition, Reference, Rollout
from joyavatar_core.s2v import S2VDiT
from joyavatar_core.s2v_audio import stretched

from .helpers import assert_golden, fill

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden/live_avatar.json").read_text())
CONFIG = ModelConfig(
    dim=96,
    ffn_dim=64,
    layers=3,
    heads=2,
    in_channels=16,
    out_channels=16,
    freq_dim=32,
    text_dim=12,
    text_len=8,
    image_dim=0,
    audio=AudioConfig(kind="injected", features=25 * 6, window=4, tokens=4),
    s2v=S2VConfig(inject_layers=(0, 2)),
)
GEOMETRY = Geometry(128, 128, fps=Fraction(25))  # 64 tokens a latent frame
LIVE = POLICIES["live-avatar"]
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])


@dataclass(frozen=True)
class Given:
    """text [1, 5, 12]; picture [1, 16, 1, 16, 16]; motion [1, 16, 19, 16, 16]; x [1, 16, 3, 16, 16];
    audio [18, 4, 150]: hidden states of six blocks' frames, side by side."""

    text: Tensor
    picture: Tensor
    motion: Tensor
    x: Tensor
    audio: Tensor


def given(dtype: torch.dtype) -> Given:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 5, 12), (1, 16, 1, 16, 16), (1, 16, 19, 16, 16), (1, 16, 3, 16, 16), (1, 25, 6, 72))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    text, picture, motion, x, states = drawn
    return Given(text, picture, motion, x, states[0].permute(2, 0, 1).reshape(18, 4, 150))


@cache
def model(dtype: torch.dtype) -> S2VDiT:
    return fill(S2VDiT(CONFIG).to(dtype))


def rollout(policy: RolloutPolicy, dtype: torch.dtype) -> Rollout:
    dit, inputs = model(dtype), given(dtype)
    with torch.no_grad():
        kv = dit.condition(inputs.text)
    condition = Condition(kv, reference=Reference(inputs.picture, inputs.motion))
    return Rollout(dit, policy, GEOMETRY, condition, 5, torch.device("cpu"), dtype)


@torch.no_grad()
def six_blocks(policy: RolloutPolicy, dtype: torch.dtype) -> Tensor:
    run, inputs = rollout(policy, dtype), given(dtype)
    state, blocks = run.start(), []
    for block in range(6):
        tokens = inputs.audio[3 * block : 3 * block + 3]
        state.audio[block] = AudioTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
        blocks += run.run_window(state, 6)
    return torch.cat([b.latents for b in blocks], dim=2)


@PRECISIONS
def test_a_forward_is_the_release_s(dtype: torch.dtype, tolerance: float) -> None:
    inputs, dit = given(dtype), model(dtype)
    condition = dit.condition(inputs.text)
    made = dit.prefill(inputs.picture, condition, 30, inputs.motion)
    keys, values = (torch.stack(t) for t in zip(*made, strict=True))
    assert keys.shape == (3, 1, 160, 2, 48), "2.5 times the tokens of a latent frame"
    past = Past(WithReference(None, (keys, values)), (), 30)
    levels = torch.tensor([640.0, 310.5, 12.5], dtype=dtype)
    out, _ = dit(inputs.x, levels, range(3), condition, dit.audio(inputs.audio[None, :3]), past)
    assert_golden(out, GOLDEN["forward"], tolerance)


@PRECISIONS
@pytest.mark.parametrize(("name", "refresh"), [("released", 4), ("never", None)])
def test_six_blocks_are_the_release_s(name: str, refresh: int | None, dtype: torch.dtype, tolerance: float) -> None:
    policy = replace(LIVE, reference_ahead=(17, 17), reference_refresh=refresh)
    assert_golden(six_blocks(policy, dtype), GOLDEN[name], 5 * tolerance)


# The sound


@pytest.mark.parametrize("tokens", [47, 120, 333])
def test_frames_of_the_sound_are_the_release_s(tokens: int) -> None:
    """The release's resampling of hidden states: the same bits as torch's interpolation, and its zeros past the end."""
    states = torch.randn(25, tokens, 3, generator=torch.Generator().manual_seed(tokens))
    encoded, golden = states.permute(1, 0, 2).flatten(1), GOLDEN["features"][str(tokens)]
    frames = golden["shape"][0]
    out = stretched(encoded, [round(Fraction(30 * i, 25)) for i in range(frames)])
    assert [*out.shape] == [frames, 75]
    whole = torch.nn.functional.interpolate(
        encoded.T[None], size=int(tokens / 50.0 * 30), mode="linear", align_corners=True
    )[0].T
    kept = [p for p in (round(Fraction(30 * i, 25)) for i in range(frames)) if p < len(whole)]
    torch.testing.assert_close(out[: len(kept)], whole[kept], rtol=0, atol=5e-7)  # equal where its kernel is fused
    assert not out[len(kept) :].any()
    assert out.double().sum(1)[::5].tolist() == pytest.approx(golden["frames"], rel=0, abs=1e-12)
    order = (out.double().flatten() * torch.arange(out.numel(), dtype=torch.float64).cos()).sum()
    assert order.item() == pytest.approx(golden["order"], rel=0, abs=1e-9)
