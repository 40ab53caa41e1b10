"""Rotary position of Wan2.1: head dimension split over time, height and width, interleaved pairs, base 10000.

Keys are stored before rotation and rotated when they are read (URCR, JoyAvatar-Flash 3.5), so a table is made for
whatever temporal indices a forward assigns. There is no table end: angles are computed, in float64.

Shape legend: x [B, L, heads, head_dim], L = F * rows * columns; tables [L, head_dim / 2], of unit complex numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .types import sent

BASE = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Real dimensions given to time, height and width: (44, 42, 42) of 128."""
    plane = 2 * (head_dim // 6)
    return head_dim - 2 * plane, plane, plane


@lru_cache(maxsize=8)  # as many as the ring has places, and more: one takes 15 MB at 512x512
def rotary_table(
    positions: tuple[int, ...], grid: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rotation [F * rows * columns, head_dim / 2] of latents at the given temporal indices; see `axes_table`.

    In steady state of URCR the indices repeat, so the last tables are kept; where they grow for ever, a new table takes
    the angles of its few new places in time only, and is put together on the device.
    """
    rows, columns = grid
    return axes_table((positions, tuple(range(rows)), tuple(range(columns))), head_dim, dtype, device)


def axes_table(axes: tuple[tuple[int, ...], ...], head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos + i sin of tokens at the given indices of time, height and width, each with each, time outermost.

    dtype: of what is to be rotated; numbers are complex64, beside float64 complex128.
    """
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    full = (*map(len, axes), -1)
    shapes = [(len(p), *(1,) * (len(axes) - 1 - i), -1) for i, p in enumerate(axes)]
    with torch.inference_mode(False):  # a kept table may be used in training later
        turns = [_turns(p, d, wide, device) for p, d in zip(axes, axis_dims(head_dim), strict=True)]
        parts = [t.reshape(s).expand(full) for t, s in zip(turns, shapes, strict=True)]
        return torch.cat(parts, dim=-1).flatten(0, 2)


@lru_cache(maxsize=64)
def _turns(positions: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """cos + i sin [n, dim / 2] of an axis."""
    angles = _angles(torch.tensor(positions), dim)
    return sent(torch.polar(torch.ones_like(angles), angles).to(dtype), device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of x [B, L, heads, head_dim] by the table's angles, in at least float32.

    As complex numbers: on a CPU, which does not vectorise over channels that lie interleaved, that takes a twelfth of
    the time of cos and sin by themselves; on a GPU it moves as many bytes, and the kernel in `kernels` far fewer.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2))) * table.unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _angles(positions: Tensor, dim: int) -> Tensor:
    """[n, dim / 2]"""
    frequency = BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions.double(), frequency)
