"""What the device does at best, measured in the same process: a large product, a large attention, a large copy.

A forward's share of them says how close it comes to the hardware, whatever the hardware is.

Shape legend: L tokens, heads, D head dimension.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import BACKENDS, AttentionFn, fitting
from .timing import seconds
from .trace import KINDS, Kind, Work


@dataclass(frozen=True)
class Sizes:
    """matrix: rows and columns of square factors. tokens: of queries and keys. copied: bytes."""

    matrix: int
    tokens: int
    copied: int


LARGE = Sizes(8192, 16384, 1 << 31)
SMALL = Sizes(1024, 2048, 1 << 26)  # a CPU needs no more


@dataclass(frozen=True)
class Ceilings:
    """linear, attention: FLOP a second; memory: bytes a second, read and written. attentions: of each backend."""

    linear: float
    attention: float
    memory: float
    attentions: Mapping[str, float]
    sizes: Sizes

    def seconds(self, work: Mapping[Work, int]) -> dict[Kind, float]:
        """Time of work by kind at these rates: of each operation, its arithmetic or its bytes, whichever takes longer.

        Nothing overlaps, and what only moves numbers moves them as often as the code does.
        """
        rates = {"linear": self.linear, "attention": self.attention, "memory": float("inf")}
        spent: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        for w, count in work.items():
            spent[w.kind] += count * max(w.flops / rates[w.kind], w.bytes / self.memory)
        return spent


@torch.inference_mode()
def measure(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    sizes: Sizes | None = None,
    attention: AttentionFn = fitting,
) -> Ceilings:
    """Of a device, in a precision, for heads as the model has them; random numbers (zeros would run faster)."""
    sizes = sizes or (SMALL if device.type == "cpu" else LARGE)
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=dtype) for _ in range(2))
    linear = 2 * sizes.matrix**3 / _best(lambda: torch.mm(a, b), device)
    q, k, v = (torch.randn(1, sizes.tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    work = 4 * heads * sizes.tokens**2 * head_dim
    attentions = {n: work / s for n, s in _attentions(q, k, v, attention).items()}
    del q, k, v
    source = torch.randn(sizes.copied // 4, device=device)
    target = torch.empty_like(source)
    memory = 2 * source.numel() * 4 / _best(lambda: target.copy_(source), device)
    return Ceilings(linear, max(attentions.values()), memory, attentions, sizes)


def _attentions(q: Tensor, k: Tensor, v: Tensor, attention: AttentionFn) -> dict[str, float]:
    """Seconds with the model's attention, and with each kernel of the table that takes these tensors."""
    found = {"model": _best(lambda: attention(q, k, v, None), q.device)}
    for name, kernel in BACKENDS.items() if q.device.type == "cuda" else ():
        try:
            found[name] = _best(lambda kernel=kernel: kernel(q, k, v, None), q.device)
        except (ImportError, RuntimeError):  # not there, or it does not take them
            continue
    return found


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds."""
    return statistics.median(seconds(call, device, repeats=10, warm_up=3))
