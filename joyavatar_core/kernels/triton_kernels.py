"""The kernels themselves, a program a token; imported at the first launch, for Triton may not be there.

Shape legend: B batch, L tokens, F latent frames, D dim, n heads, d head dimension, K kept tokens.
"""

from __future__ import annotations

import os

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether these run in Triton's interpreter, on CPU tensors: settled when this file is imported."""


@triton.jit
def _modulated_norm(
    x_ptr, y_ptr, shift_ptr, scale_ptr, sum_ptr, out_ptr, per_level, level_step, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row * width + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    level = (row // per_level) * level_step + at
    shift = tl.load(shift_ptr + level, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + level, mask=inside, other=0.0).to(tl.float32)
    y = centred / deviation * (1.0 + scale) + shift
    tl.store(out_ptr + row * width + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x_ptr, y_ptr, gate_ptr, out_ptr, per_level, level_step, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row // per_level) * level_step + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + at, (x + y * gate).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _turn(
    x_ptr, weight_ptr, table_ptr, out_ptr, kept_ptr, tokens, width, half,
    x_batch, x_token, out_batch, out_token, first, count, eps,
    NORM: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + batch * x_batch + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        x = x * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        place = token - first
        if (place >= 0) & (place < count):
            tl.store(kept_ptr + (batch * count + place) * width + at, x.to(kept_ptr.dtype.element_ty), mask=inside)
    pair = tl.arange(0, BLOCK // 2)
    angle = table_ptr + (token * half + pair % half) * 2
    cos = tl.load(angle, mask=pair < width // 2, other=0.0)
    sin = tl.load(angle + 1, mask=pair < width // 2, other=0.0)
    even, odd = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    turned = tl.interleave(even * cos - odd * sin, even * sin + odd * cos)
    out = out_ptr + batch * out_batch + token * out_token + at
    tl.store(out, turned.to(out_ptr.dtype.element_ty), mask=inside)


def launch_modulated_norm(
    x: Tensor, y: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + y, its norm modulated); without y the first is empty. See `added_modulated_norm`."""
    x, width = x.contiguous(), x.shape[-1]
    y = None if y is None else y.contiguous()
    shift, step = _levels(shift)
    scale, other = _levels(scale)
    assert step == other, (step, other)
    total = torch.empty_like(x) if y is not None else x.new_empty(0)
    out = torch.empty_like(x)
    _modulated_norm[(_rows(x),)](
        x, x if y is None else y, shift, scale, total, out, x.shape[1] // shift.shape[1], step, width, eps,
        ADD=y is not None, BLOCK=_block(width), num_warps=_warps(width),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return total, out


def launch_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See `gated`."""
    x, y, width = x.contiguous(), y.contiguous(), x.shape[-1]
    gate, step = _levels(gate)
    out = torch.empty_like(x)
    _gated[(_rows(x),)](
        x, y, gate, out, x.shape[1] // gate.shape[1], step, width,
        BLOCK=_block(width), num_warps=_warps(width),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out


def launch_turn(
    x: Tensor, weight: Tensor | None, eps: float, table: Tensor, out: Tensor, kept: Tensor | None, first: int
) -> None:
    """See `turn_into`."""
    batch, tokens, width = x.shape
    head_dim = out.shape[3]
    assert x.stride(2) == 1 and out.stride()[2:] == (head_dim, 1), (x.stride(), out.stride())
    assert out.shape[:2] == x.shape[:2] and out.shape[2] * head_dim == width, (x.shape, out.shape)
    assert table.shape == (tokens, head_dim // 2, 2) and table.is_contiguous(), (table.shape, x.shape)
    assert kept is None or kept.is_contiguous(), kept.stride()
    _turn[(batch * tokens,)](
        x, x if weight is None else weight, table, out, out if kept is None else kept, tokens, width, head_dim // 2,
        x.stride(0), x.stride(1), out.stride(0), out.stride(1), first, 0 if kept is None else kept.shape[1], eps,
        NORM=weight is not None, KEEP=kept is not None, BLOCK=_block(width), num_warps=_warps(width),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


def _levels(level: Tensor) -> tuple[Tensor, int]:
    """[B, F, 1, D] -> the same, readable with one step from level to level, and that step."""
    batch, frames, _, _ = level.shape
    even = batch == 1 or level.stride(0) == frames * level.stride(1)
    if level.stride(3) != 1 or not even:
        level = level.contiguous()
    return level, level.stride(1) if frames > 1 else level.stride(0)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def _block(width: int) -> int:
    return max(2, triton.next_power_of_2(width))


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8
