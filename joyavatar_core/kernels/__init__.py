"""Several small operations of the transformer as one, in Triton: what only moves numbers then moves them once.

Where they are taken is decided by the tensors (`take`): CUDA, half or single precision, no gradient, and Triton there.
Where there is no Triton, torch.compile can make them (`compiled_kernels`), if that is asked for.
Everywhere else the caller's own torch code runs, which is what these are tested against. All arithmetic is in float32
and rounded once, at the end.

Shape legend: B batch, L tokens, F latent frames, P = L / F, D dim, n heads, d head dimension, K kept tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from subprocess import SubprocessError
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

Use = Literal["auto", "compiled", "always", "never"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_use: ContextVar[Use] = ContextVar("use of kernels", default="auto")


@contextmanager
def using(use: Use) -> Iterator[None]:
    """Inside: "auto" takes kernels where they fit, "compiled" those of torch.compile on any device it works on, "never"
    nowhere, "always" wherever there is no gradient: on meta tensors, to count what they move, and in Triton's
    interpreter (TRITON_INTERPRET=1, before the first one runs).
    """
    before = _use.set(use)
    try:
        yield
    finally:
        _use.reset(before)


def take(*tensors: Tensor) -> bool:
    """Whether kernels are to be run on these."""
    use = _use.get()
    if use == "never" or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    fit = all(t.dtype in DTYPES for t in tensors)
    if not fit or use == "always":
        return fit
    device = tensors[0].device
    return all(t.device == device for t in tensors) and fused(device, use)


@lru_cache(maxsize=8)
def available(device: torch.device) -> bool:
    """Whether Triton is installed and works on a CUDA device: it is tried, for it needs a compiler of its own."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    return _works(device, "Triton's kernels do", TritonError)


@lru_cache(maxsize=8)
def compiles(device: torch.device) -> bool:
    """Whether torch.compile works on a device: it is tried, for on a CPU it needs a C++ compiler."""
    with using("compiled"):
        return device.type != "meta" and _works(device, "torch.compile does")


def fused(device: torch.device, use: Use) -> bool:
    """Whether kernels of either making run on a device under `use`."""
    return compiles(device) if use == "compiled" else use != "never" and available(device)


def _works(device: torch.device, who: str, *errors: type[Exception]) -> bool:
    """Whether a kernel runs there and is right; a warning with the reason where it is not."""
    x, y, gate = (torch.full((1, 1, *more, 16), 2.0, device=device) for more in ((), (), (1,)))
    try:
        return bool((gated(x, y, gate) == 6).all())
    except (*errors, RuntimeError, OSError, ImportError, SubprocessError) as error:
        _LOG.warning("%s not work here (%s): the eager code runs instead", who, str(error).split("\n")[0])
        return False


def _launchers() -> ModuleType:
    """Where the operators are made."""
    if _use.get() == "compiled":
        from . import compiled_kernels as made
    else:
        from . import triton_kernels as made
    return made


def _op(name: str, schema: str, changed: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """An operator of torch: counted, captured and compiled as one, and run without its work on the meta device."""
    return torch.library.custom_op(f"joyavatar::{name}", mutates_args=changed, schema=schema)


@_op("modulated_norm", "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, times 1 + scale, plus shift: x [B, L, D], shift and scale [B, F, 1, D]."""
    return _launchers().launch_modulated_norm(x, None, shift, scale, eps)[1]


@_op("added_modulated_norm", "(Tensor x, Tensor y, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)")
def added_modulated_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and `modulated_norm` of it; y [B, L, D]."""
    return _launchers().launch_modulated_norm(x, y, shift, scale, eps)


@_op("gated", "(Tensor x, Tensor y, Tensor gate) -> Tensor")
def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y: x and y [B, L, D], gate [B, F, 1, D]."""
    return _launchers().launch_gated(x, y, gate)


@_op(
    "turn_into",
    "(Tensor x, Tensor? weight, float eps, Tensor table, Tensor(a!) out, Tensor(b!)? kept, int first) -> ()",
    ("out", "kept"),
)
def turn_into(
    x: Tensor, weight: Tensor | None, eps: float, table: Tensor, out: Tensor, kept: Tensor | None, first: int
) -> None:
    """RMSNorm over all heads (where there is a weight) and rotation of pairs of channels, into places that are given.

    x [B, L, D], also a slice of wider rows; weight [D]; table [L, d / 2, 2] cos and sin in float32; out [B, L, n, d]
    (its heads contiguous) gets what is turned; kept [B, K, n, d], contiguous, what is normalised only of the tokens
    from `first` on.
    """
    _launchers().launch_turn(x, weight, eps, table, out, kept, first)


@modulated_norm.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@added_modulated_norm.register_fake
def _(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
    return made[0], made[1]


@gated.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@turn_into.register_fake
def _(
    x: Tensor, weight: Tensor | None, eps: float, table: Tensor, out: Tensor, kept: Tensor | None, first: int
) -> None:
    return None
