"""The same operators as torch.compile makes them of plain code: for devices without Triton, and a second opinion.

Arithmetic is in float32 and rounded once, as in `triton_kernels`. The first call of each takes seconds: a C++ compiler
runs (on a CPU), and what it makes is kept by torch for later processes.

Shape legend: B batch, L tokens, F latent frames, D dim, n heads, d head dimension, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=8)
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """One program for all sizes."""
    return torch.compile(plain, dynamic=True)


def launch_modulated_norm(
    x: Tensor, y: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x (+ y) [B, L, D], and its LayerNorm times 1 + scale plus shift, [B, F, 1, D]."""
    if y is None:
        return x, _compiled(_norm)(x, shift, scale, eps)
    return _compiled(_add_and_norm)(x, y, shift, scale, eps)


def launch_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y: x and y [B, L, D], gate [B, F, 1, D]."""
    return _compiled(_gate)(x, y, gate)


def launch_turn(
    x: Tensor, weight: Tensor | None, eps: float, table: Tensor, out: Tensor, kept: Tensor | None, first: int
) -> None:
    """See kernels.turn_into."""
    _compiled(_turn)(x, weight, eps, table, out, kept, first)


def _norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _modulated(x.float(), shift, scale, eps).to(x.dtype)


def _add_and_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + y.float()
    return total.to(x.dtype), _modulated(total, shift, scale, eps).to(x.dtype)


def _modulated(wide: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(wide, wide.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale.float()) + shift.float()).flatten(1, 2)


def _gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    frames = gate.shape[1]
    wide = x.float().unflatten(1, (frames, -1)) + gate.float() * y.float().unflatten(1, (frames, -1))
    return wide.flatten(1, 2).to(x.dtype)


def _turn(
    x: Tensor, weight: Tensor | None, eps: float, table: Tensor, out: Tensor, kept: Tensor | None, first: int
) -> None:
    wide = x.float()
    if weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    wide = wide.unflatten(-1, out.shape[2:])  # [B, L, n, d]
    if kept is not None:
        kept.copy_(wide[:, first : first + kept.shape[1]])
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, n, d / 2]
    cos, sin = (table[:, None, :, i] for i in (0, 1))
    out.copy_(torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2))
