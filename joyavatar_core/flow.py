"""Flow matching: the only file that knows sigma (engine note section 2; Wan2.1 and Self-Forcing share these formulas).

sigma = timestep / 1000; x_t = (1 - sigma) x0 + sigma noise; velocity = noise - x0.

Shape legend: x [B, C, F, h, w], timesteps [F] or [B, F] on the 1000 .. 0 scale after the warp.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .types import sent


def per_latent(values: Sequence[float], repeats: int, like: Tensor) -> Tensor:
    """One value per block -> one per latent frame: [F], float32 (float64 beside float64 latents).

    The same tensor for the same values, so that no step sends it to the device again: it must not be written to.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return _per_latent(tuple(values), repeats, dtype, like.device)


@lru_cache(maxsize=128)  # a schedule has a handful
def _per_latent(values: tuple[float, ...], repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may use it too
        return sent(torch.tensor([v for v in values for _ in range(repeats)], dtype=dtype), device)


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t from clean latents and noise."""
    sigma = _sigma(timesteps, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model is trained to predict."""
    return noise - x0


def to_velocity(x_t: Tensor, x0: Tensor, timesteps: Tensor) -> Tensor:
    """Velocity implied by predicted clean latents; below timestep 50 as if at 50, or rounding would be blown up."""
    return (x_t - x0.to(x_t.dtype)) / _sigma(timesteps.clamp(min=50.0), x_t)


def to_x0(x_t: Tensor, v: Tensor, timesteps: Tensor) -> Tensor:
    """Clean latents implied by a predicted velocity."""
    return x_t - _sigma(timesteps, x_t) * v.to(x_t.dtype)


def euler_step(x_t: Tensor, v: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Tensor:
    """x at the next timestep along the velocity."""
    return x_t + (_sigma(next_timesteps, x_t) - _sigma(timesteps, x_t)) * v.to(x_t.dtype)


def _sigma(timesteps: Tensor, like: Tensor) -> Tensor:
    """[B or 1, 1, F, 1, 1] in the dtype of `like`."""
    return (timesteps / 1000).to(like.dtype).reshape(-1, 1, timesteps.shape[-1], 1, 1)
