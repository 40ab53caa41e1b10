"""Wan2.1 autoencoder: published keys, published numbers, and streams that equal the whole clip.

The golden numbers came from the public implementation (float64, its up-sampling kept in float64 too) with the weights
of `fill` and the inputs of `golden_inputs`; both are made here again from seeds, in sorted key order.

Shape legend: B batch, T pixel frames, F latent frames, Z latent channels, h w latent size, H W pixel size.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import cache
from itertools import combinations
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from joyavatar_core.geometry import Geometry
from joyavatar_core.types import nbytes
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig, convolve, convolve_as_images

from . import helpers

torch.set_num_threads(2)

KEY_COUNT = 194
KEY_SHA256 = "c9ff6f602a116974f2e5be0d25dce12f573d0a851df6464d47286e9e55f3926c"
PARAMETERS = 126_892_531

# fmt: off
GOLDEN: dict[str, dict[str, Any]] = {
    "encode": {
        "samples": [
            0.16050686789220, -0.10434007419478, 0.05260192973433, 0.34235591576740, 0.36072317095946,
            0.09251396178389, 0.44291077116186, -0.04008308652692,
        ],
        "frames": [
            0.30094965628301, 0.30229524581800, 0.32360042866248, 0.30451642274040, 0.29178823486743,
        ],
        "order": -1.90137582309365,
    },
    "decode": {
        "samples": [
            0.05312044391819, 0.01146468804496, -0.39749740111998, -0.09573411351789, -0.03448019993250,
            -0.11545980307355, -0.06311834720926, -0.14860655986030,
        ],
        "frames": [
            0.06361540566325, 0.10156692059541, 0.10066748575396, 0.09925128334397, 0.10034374874921,
            0.09764841496507, 0.11999361721981, 0.11599133957065, 0.13722617223530, 0.14045910409880,
            0.14112705373041, 0.14259389408499, 0.14536220520343, 0.11890824279889, 0.12605017867721,
            0.12890152084616, 0.14167725684897,
        ],
        "order": -0.38932249814564,
    },
}
# fmt: on


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def small(dim: int = 4, latents_per_pass: int = 1) -> WanVAEConfig:
    return WanVAEConfig(
        dim=dim,
        latent_mean=(0.1, -0.2, 0.3, 0.0),
        latent_std=(1.5, 2.0, 0.5, 1.0),
        latents_per_pass=latents_per_pass,
    )


def fill(vae: WanVAE) -> WanVAE:
    """Seeded weights; a quiet head keeps the video in [-1, 1]."""
    return helpers.fill(vae, scale={"decoder.head.2.weight": 0.3})


@cache
def tiny(latents_per_pass: int = 1) -> WanVAE:
    return fill(WanVAE(small(latents_per_pass=latents_per_pass)).double())


@cache
def wan() -> WanVAE:
    return fill(WanVAE(WanVAEConfig(dim=8)).double())


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def golden_inputs() -> tuple[Tensor, Tensor]:
    """video [2, 3, 17, 16, 24] in [-1, 1] and latents [2, 16, 5, 2, 3]."""
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(2, 3, 17, 16, 24, generator=generator, dtype=torch.float64) * 2 - 1
    return video, torch.randn(2, 16, 5, 2, 3, generator=generator, dtype=torch.float64)


def compositions(total: int) -> list[list[int]]:
    cuts = [c for n in range(total) for c in combinations(range(1, total), n)]
    return [[b - a for a, b in zip((0, *c), (*c, total), strict=True)] for c in cuts]


def decode_in_pieces(vae: WanVAE, latents: Tensor, sizes: list[int]) -> Tensor:
    state, video = None, []
    for piece in latents.split(sizes, dim=2):
        frames, state = vae.decode_stream(piece, state)
        video.append(frames)
    return torch.cat(video, dim=2)


# published names and numbers


def test_state_dict_is_the_published_one() -> None:
    with torch.device("meta"):
        parameters = WanVAE(WanVAEConfig()).state_dict()
    lines = [f"{name} {'x'.join(map(str, p.shape))}" for name, p in sorted(parameters.items())]
    assert len(lines) == KEY_COUNT
    assert sum(p.numel() for p in parameters.values()) == PARAMETERS
    for line in (
        "encoder.conv1.weight 96x3x3x3x3",
        "encoder.downsamples.5.time_conv.weight 192x192x3x1x1",
        "encoder.middle.1.norm.gamma 384x1x1",
        "decoder.upsamples.3.time_conv.weight 768x384x3x1x1",
        "decoder.upsamples.4.shortcut.weight 384x192x1x1x1",
        "decoder.upsamples.11.resample.1.weight 96x192x3x3",
        "decoder.head.0.gamma 96x1x1x1",
        "conv1.weight 32x32x1x1x1",
    ):
        assert line in lines
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEY_SHA256


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_golden_numbers(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    vae = wan() if dtype == torch.float64 else fill(WanVAE(WanVAEConfig(dim=8)))
    video, latents = (x.to(dtype) for x in golden_inputs())
    out = vae.encode(video) if kind == "encode" else vae.decode(latents)
    assert out.dtype == dtype
    assert out.abs().max() < 2 if kind == "encode" else out.abs().max() < 1, "clamped numbers would prove nothing"
    helpers.assert_golden(out, GOLDEN[kind], tolerance)


def test_config_agrees_with_the_geometry() -> None:
    config, geometry = WanVAEConfig(), Geometry(512, 512, Fraction(16))
    assert (config.spatial, config.temporal, config.latent_channels) == (geometry.spatial, geometry.temporal, 16)
    for latents in (1, 2, 4):
        assert tiny().decode(noise(1, 4, latents, 1, 1)).shape[2] == geometry.frames_of_latents(latents)


# streams


@pytest.mark.parametrize("per_pass", [1, 5])
def test_every_split_of_five_latents_decodes_the_same(per_pass: int) -> None:
    latents = noise(1, 4, 5, 1, 2)
    whole = tiny().decode(latents)
    assert whole.shape == (1, 3, 17, 8, 16)
    assert whole.abs().max() < 1
    for sizes in compositions(5):
        assert_same(decode_in_pieces(tiny(per_pass), latents, sizes), whole)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    per_pass=st.integers(1, 4),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_split_decodes_the_same(sizes: list[int], per_pass: int, batch: int, seed: int) -> None:
    latents = noise(batch, 4, sum(sizes), 1, 2, seed=seed)
    whole = tiny().decode(latents)
    assert_same(decode_in_pieces(tiny(per_pass), latents, sizes), whole)


@pytest.mark.parametrize("latents", compositions(4))
def test_every_split_encodes_the_same(latents: list[int]) -> None:
    video = noise(2, 3, 13, 8, 16).clamp(-1, 1)
    state, pieces = None, []
    for chunk in video.split([4 * n - 3 * (i == 0) for i, n in enumerate(latents)], dim=2):
        z, state = tiny().encode_stream(chunk, state)
        pieces.append(z)
    assert_same(torch.cat(pieces, dim=2), tiny().encode(video))


def test_state_is_plain_bounded_and_never_written_to() -> None:
    latents = noise(1, 4, 6, 2, 2)
    _, first = tiny().decode_stream(latents[:, :, :1], None)
    copy = {name: kept.clone() for name, kept in first.items()}
    frames, second = tiny().decode_stream(latents[:, :, 1:], first)
    again, _ = tiny().decode_stream(latents[:, :, 1:], first)
    assert first.keys() == second.keys() and len(first) == 32, "one entry per convolution over time"
    assert all(torch.equal(copy[name], first[name]) for name in first)
    assert torch.equal(frames, again), "a stream resumed from the same state goes the same way"
    assert nbytes(first) == nbytes(second)
    assert all(k.is_contiguous() and k.untyped_storage().nbytes() == nbytes({"k": k}) for k in second.values())


def test_decoder_is_causal() -> None:
    latents = noise(1, 4, 4, 2, 2)
    changed = latents.clone()
    changed[:, :, 3] += 1
    before, after = tiny().decode(latents), tiny().decode(changed)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.allclose(before[:, :, 9:], after[:, :, 9:])


# image-to-video conditioning


def test_picture_then_grey_is_constant_from_latent_29_on() -> None:
    clip = torch.zeros(1, 3, 141, 8, 16, dtype=torch.float64)
    clip[:, :, 0] = noise(1, 3, 8, 16).clamp(-1, 1)
    long, short = tiny().encode(clip), tiny().encode(clip[:, :, :117])
    assert (long.shape[2], short.shape[2], tiny().settled_latents) == (36, 30, 30)
    assert torch.equal(long, torch.cat([short, short[:, :, -1:].expand(-1, -1, 6, -1, -1)], dim=2))


def test_encoder_reach_is_exact() -> None:
    """The gradient says which pixel frames a latent depends on: frame 0 up to latent 28, not 29."""
    assert WanVAEConfig().encoder_reach == small().encoder_reach == 28
    clip = noise(1, 3, 117, 8, 8).clamp(-1, 1).requires_grad_()
    z = tiny().encode(clip)
    for latent, sees in ((28, True), (29, False)):
        (gradient,) = torch.autograd.grad(z[:, :, latent].sum(), clip, retain_graph=True)
        assert bool(gradient[:, :, 0].any()) is sees


# computing


class HostConv2d(nn.Conv2d):
    """A host's layer: keeps weights in its own dtype and casts them for every call."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input), None if self.bias is None else self.bias.to(input))


class HostConv3d(nn.Conv3d):
    frames_seen: ClassVar[list[int]] = []

    def forward(self, input: Tensor) -> Tensor:
        self.frames_seen.append(input.shape[2])
        return self._conv_forward(input, self.weight.to(input), None if self.bias is None else self.bias.to(input))


def test_layers_of_a_host_cast_their_own_weights() -> None:
    host = WanVAE(small(), SimpleNamespace(Conv2d=HostConv2d, Conv3d=HostConv3d)).to(torch.bfloat16)
    plain = fill(WanVAE(small()).double()).to(torch.bfloat16)
    host.load_state_dict(plain.state_dict())
    plain = plain.double()
    latents, video = noise(1, 4, 3, 2, 2), noise(1, 3, 13, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        assert_same(host.decode(latents), plain.decode(latents))
        HostConv3d.frames_seen.clear()
        assert_same(host.encode(video), plain.encode(video))
    assert max(HostConv3d.frames_seen) == 4 + 2, "a pass holds four frames and two of the past, however long the clip"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3, 3), (1, 1, 1), (0, 1, 1)), ((3, 1, 1), (1, 1, 1), (0, 0, 0)), ((3, 1, 1), (2, 1, 1), (0, 0, 0)),
     ((1, 1, 1), (1, 1, 1), (0, 0, 0))],
)  # fmt: skip
def test_both_ways_to_convolve_agree(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, kernel, stride=stride, padding=padding, bias=bias).double()
    for frames in (3, 5, 6):
        x = noise(2, 4, frames, 5, 7)
        assert_same(convolve_as_images(conv, x), conv(x))
        assert_same(convolve(conv, x), conv(x))


def test_bfloat16_stays_near_float64() -> None:
    latents, video = noise(1, 4, 3, 2, 2), noise(1, 3, 9, 16, 16).clamp(-1, 1)
    half = fill(WanVAE(small())).to(torch.bfloat16)
    decoded, encoded = half.decode(latents.float()), half.encode(video.float())
    assert decoded.dtype == encoded.dtype == torch.float32
    for ours, exact in ((decoded, tiny().decode(latents)), (encoded, tiny().encode(video))):
        assert (ours - exact).norm() < 0.05 * exact.norm()


# edges


def test_wrong_input_is_refused_with_the_remedy() -> None:
    vae = tiny()
    _, state = vae.decode_stream(noise(1, 4, 1, 2, 2), None)
    _, seen = vae.encode_stream(noise(1, 3, 1, 8, 8), None)
    with pytest.raises(ValueError, match=r"1 \+ 4 k frames at the start"):
        vae.encode(noise(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="4 k later"):
        vae.encode_stream(noise(1, 3, 5, 8, 8), seen)
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(noise(1, 3, 1, 12, 8))
    with pytest.raises(ValueError, match=r"\[B, 4, F, h, w\]"):
        vae.decode(noise(1, 16, 1, 2, 2))
    with pytest.raises(ValueError, match="F at least 1"):
        vae.decode_stream(noise(1, 4, 0, 2, 2), state)
    with pytest.raises(ValueError, match="pass None to start a new stream"):
        vae.decode_stream(noise(1, 4, 1, 2, 3), state)
    with pytest.raises(ValueError, match=r"no 'decoder\.conv1'"):
        vae.decode_stream(noise(1, 4, 1, 2, 2), seen)
    with pytest.raises(ValueError, match="one of each per latent channel"):
        WanVAEConfig(latent_mean=(0.0,))
    with pytest.raises(ValueError, match="halve_time"):
        WanVAEConfig(halve_time=(True,))
    with pytest.raises(ValueError, match="latents_per_pass"):
        WanVAEConfig(latents_per_pass=0)
