"""Rotary position of Wan2.1: head dimension split over time, height and width, interleaved pairs, base 10000.

Keys are stored before rotation and rotated when they are read (URCR, JoyAvatar-Flash 3.5), so a table is made for
whatever temporal indices a forward assigns. There is no table end: angles are computed, in float64.

Shape legend: x [B, L, heads, head_dim], L = F * rows * columns; tables [L, head_dim / 2].
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASE = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Real dimensions given to time, height and width: (44, 42, 42) of 128."""
    plane = 2 * (head_dim // 6)
    return head_dim - 2 * plane, plane, plane


@lru_cache(maxsize=16)
def rotary_table(
    positions: tuple[int, ...], grid: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [F * rows * columns, head_dim / 2] for latents at the given temporal indices.

    In steady state of URCR the indices repeat, so the last tables are kept; where they grow for ever, a new table takes
    the angles of its few new places in time only.
    """
    rows, columns = grid
    return axes_table((positions, tuple(range(rows)), tuple(range(columns))), head_dim, dtype, device)


def axes_table(
    axes: tuple[tuple[int, ...], ...], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of tokens at the given indices of time, height and width, each with each, time outermost."""
    with torch.inference_mode(False):  # a kept table may be used in training later
        return _table(axes, head_dim, dtype, device)


def _table(
    axes: tuple[tuple[int, ...], ...], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Angles are computed for each axis alone; height and width stay as they are while time goes on."""
    full = (*(len(p) for p in axes), -1)
    shapes = [(len(p), *(1,) * (len(axes) - 1 - i), -1) for i, p in enumerate(axes)]
    parts = [_turns(p, d, dtype, device) for p, d in zip(axes, axis_dims(head_dim), strict=True)]
    cos, sin = (
        torch.cat([t.reshape(s).expand(full) for t, s in zip(turns, shapes, strict=True)], dim=-1).flatten(0, 2)
        for turns in zip(*parts, strict=True)
    )
    return cos, sin


@lru_cache(maxsize=64)
def _turns(positions: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [n, dim / 2] of an axis."""
    angles = _angles(torch.tensor(list(positions)), dim)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (2i, 2i+1) of x [B, L, heads, head_dim] by the table's angles."""
    cos, sin = (t.unsqueeze(1) for t in table)  # [L, 1, head_dim / 2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _angles(positions: Tensor, dim: int) -> Tensor:
    """[n, dim / 2]"""
    frequency = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions.double(), frequency)
