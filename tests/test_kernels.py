"""Kernels in Triton's interpreter against the eager code, and what picks one or the other.

Shape legend: B batch, L tokens, F latent frames, D dim, n heads, d head dimension, P tokens of the past.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from joyavatar_core import kernels
from joyavatar_core.bench import costs
from joyavatar_core.bench.trace import flops, moved_bytes
from joyavatar_core.cache import EVERY
from joyavatar_core.config import MODELS, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.kernels import compiled_kernels
from joyavatar_core.model import Past, SelfAttention, Table, _gated, _modulate_sum, modulate
from joyavatar_core.policy import RolloutPolicy
from joyavatar_core.rope import rotary_table, rotate

from .helpers import GEOMETRY, SMALL, small_model

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
"""Of the largest value: in float32 rounding of sums, in bfloat16 a rounding of the result (half of 2**-7) and its like
in the eager code, which rounds between its steps."""


@pytest.fixture
def interpreter() -> None:
    """TRITON_INTERPRET, which Triton reads when it is imported, is set in `tests/__init__.py`."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: Tensor, b: Tensor) -> bool:
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return bool((a.double() - b.double()).abs().max() <= TOLERANCE[a.dtype] * b.double().abs().max())


def levels(batch: int, frames: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Six levels as the model makes them: slices of one tensor, [B, F, 1, D]."""
    return tuple(t.unsqueeze(2) for t in noise(batch, frames, 6, width, seed=9, dtype=dtype).unbind(2))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "width"), [(1, 1, 1, 1), (1, 3, 2, 7), (2, 3, 1, 24), (2, 1, 2, 16)]
)
def test_norm_and_gate(batch: int, frames: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    x, y = (noise(batch, frames * tokens, width, seed=s, dtype=dtype) for s in (1, 2))
    shift, scale, gate, *_ = levels(batch, frames, width, dtype)
    eager = (modulate(x, shift, scale, 1e-6), *_modulate_sum(x, y, shift, scale, 1e-6), _gated(x, y, gate))
    with kernels.using("always"):
        fused = (modulate(x, shift, scale, 1e-6), *_modulate_sum(x, y, shift, scale, 1e-6), _gated(x, y, gate))
    for a, b in zip(fused, eager, strict=True):
        assert close(a, b) or width == 1  # of one channel the norm is 0 / 0 but for eps


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "width", "window", "past"), [(1, 1, 6, 1, 0), (2, 3, 10, 4, 3), (1, 2, 8, 3, 1)]
)
def test_norm_rotation_and_places(
    batch: int, heads: int, width: int, window: int, past: int, dtype: torch.dtype
) -> None:
    config = ModelConfig(
        dim=heads * width, ffn_dim=8, layers=1, heads=heads, out_channels=4, in_channels=4, text_dim=4, image_dim=0
    )
    attention = SelfAttention(config, nn, lambda q, k, v, mask: q).to(dtype).requires_grad_(False)
    for i, norm in enumerate((attention.norm_q, attention.norm_k)):
        norm.weight.copy_(1 + 0.3 * noise(heads * width, seed=20 + i))
    turn = rotary_table(tuple(range(past + window)), (1, 1), width, dtype, torch.device("cpu"))
    table = Table(turn[past:], turn)
    wide = noise(batch, window, 3 * heads * width, seed=4, dtype=dtype)  # as one product of all three makes them
    q, k, _ = wide.chunk(3, dim=-1)
    held = noise(batch, past + 2, heads, width, seed=5, dtype=dtype)[:, :past] if past else None
    for kept in (EVERY, slice(0, 1), slice(window - 1, window)):
        for a, b in zip(
            attention._turned(q, k, table, held, kept), attention._rotated(q, k, table, held, kept), strict=True
        ):
            assert close(a, b), kept


def test_rotation_is_that_of_cos_and_sin() -> None:
    """By the formula, in float64."""
    x = noise(2, 12, 3, 8).double()
    table = rotary_table((5, 2), (2, 3), 8, torch.float64, x.device)
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], table.real.unsqueeze(1), table.imag.unsqueeze(1)
    wanted = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    assert torch.allclose(rotate(x, table), wanted, rtol=0, atol=1e-14)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = rotary_table((5, 2), (2, 3), 8, dtype, x.device)
        assert narrow.dtype == torch.complex64
        assert close(rotate(x.to(dtype), narrow), rotate(x.to(dtype).double(), table).to(dtype))


def whole(use: kernels.Use, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Velocity, and keys and values that are kept, of a window beside a past."""
    model = small_model(dtype=dtype).requires_grad_(False)
    x = noise(1, 12, 3, *GEOMETRY.latent_size, seed=3).to(dtype)
    condition = model.condition(image=noise(1, 5, 4, seed=6).to(dtype))
    audio = model.audio(noise(1, 3, 5, 6, seed=7).to(dtype))
    keys, values = noise(2, 1, 8, SMALL.heads, SMALL.head_dim, seed=8).to(dtype)
    past = Past(SimpleNamespace(context=lambda layer: (keys, values)), (0,))  # pyright: ignore
    times = torch.tensor([900.0, 900.0, 500.0])
    with kernels.using(use):
        v, kv = model(x, times, (1, 2, 3), condition, audio, past, kept=slice(1, 2))
    return v, *(t for pair in kv for t in pair)


@pytest.mark.usefixtures("interpreter")
def test_a_forward_by_kernels_is_the_eager_one() -> None:
    with torch.inference_mode():  # as streams run
        made = whole("always", torch.float32)
    for fused, eager in zip(made, whole("never", torch.float32), strict=True):
        assert (fused - eager).abs().max() < 1e-5 * eager.abs().max()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_forward_by_compiled_kernels_is_the_eager_one() -> None:
    """Whoever has no Triton: the same operators by torch.compile, on this CPU."""
    with torch.inference_mode():
        made = whole("compiled", torch.float32)
    for fused, eager in zip(made, whole("never", torch.float32), strict=True):
        assert (fused - eager).abs().max() < 1e-5 * eager.abs().max()
    assert kernels.fused(torch.device("cpu"), "compiled") and not kernels.fused(torch.device("cpu"), "auto")


def test_without_a_compiler_the_eager_code_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def no_compiler(plain: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand a long story")

    monkeypatch.setattr(compiled_kernels, "_compiled", no_compiler)
    kernels.compiles.cache_clear()
    try:
        with torch.inference_mode():
            made = whole("compiled", torch.float32)
        assert "torch.compile does not work here (no C++ compiler was found): the eager code runs" in caplog.text
        assert all(torch.equal(a, b) for a, b in zip(made, whole("never", torch.float32), strict=True))
    finally:
        kernels.compiles.cache_clear()


def test_kernels_are_for_cuda_without_gradient() -> None:
    x, weight = noise(1, 2, 4), noise(1, 2, 4).requires_grad_()
    assert not kernels.take(x), "on a CPU the eager code runs"
    with kernels.using("always"):
        assert kernels.take(x) and not kernels.take(x, weight) and not kernels.take(x.double())
        with torch.no_grad():
            assert kernels.take(weight)
        with kernels.using("never"):
            assert not kernels.take(x)
        assert kernels.take(x)
    assert not kernels.take(x)


@pytest.mark.usefixtures("interpreter")
def test_a_norm_with_a_hook_is_run_as_a_layer() -> None:
    """Sequence parallelism exchanges tokens for heads there; the host puts weights in place."""
    model, seen = small_model(dtype=torch.float32).requires_grad_(False), []
    norm = model.blocks[0].self_attn.norm_q  # pyright: ignore
    plain = model.blocks[0].self_attn._turned  # pyright: ignore
    q, k = noise(1, 8, 24), noise(1, 8, 24, seed=1)
    turn = rotary_table((0,), (2, 4), 12, torch.float32, torch.device("cpu"))
    before = plain(q, k, Table(turn, turn), None, EVERY)
    norm.register_forward_hook(lambda *_: seen.append(1))
    after = plain(q, k, Table(turn, turn), None, EVERY)
    assert seen and all(close(a, b) for a, b in zip(after, before, strict=True))


def test_kernels_move_less_and_compute_the_same() -> None:
    """By the counts that docs/performance.md is made of."""
    config, geometry = replace(MODELS["flash-1.3b"], layers=1), Geometry(64, 96)
    eager, fused = (
        costs.model_cost(config, RolloutPolicy(), geometry, torch.bfloat16, fused=fused) for fused in (False, True)
    )
    assert flops(fused.work) == flops(eager.work)
    assert moved_bytes(fused.work, "memory") < 0.65 * moved_bytes(eager.work, "memory")
    assert sum(fused.work.values()) < sum(eager.work.values())
