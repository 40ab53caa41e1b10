"""Work and memory of a forward, counted by running it on torch's meta device, which computes shapes and nothing else.

The model, the rollout and the decoders run as they are; a `Ledger` sees every operation of theirs. So a change of the
code changes the count. FLOPs are 2 per multiplication and addition. Attention counts as one fused kernel: its matrix is
never in memory. Bytes are each operand read once and each result written once.

Shape legend: B batch, C latent channels, F latent frames, h w latent size, L tokens, heads, D head dimension.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["linear", "attention", "memory"]
KINDS: tuple[Kind, ...] = ("linear", "attention", "memory")
_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Work:
    """One operation. kind: products of matrices and convolutions, attention, or all that only moves numbers.

    place: whose weights a product has (self_attn, cross_attn, ffn, other); of attention, self or cross.
    """

    kind: Kind
    place: str
    flops: int
    bytes: int


class Ledger(TorchDispatchMode):
    """While it is entered, notes every operation on tensors of its device, and the bytes that are alive.

    device: of the tensors that count; others (noise drawn on the CPU) are left out.
    fused_norm: count an RMSNorm as one kernel, as CUDA runs it; else by the operations torch makes of it elsewhere.
    peak: most bytes alive at once of what was made inside; what was there before does not count.
    """

    def __init__(self, device: str = "meta", fused_norm: bool = False) -> None:
        super().__init__()
        self.device, self.fused_norm = device, fused_norm
        self.work: Counter[Work] = Counter()
        self.live = self.peak = 0
        self._places: dict[int, str] = {}
        self._known: set[int] = set()
        self._inside = False

    def name_weights(self, model: nn.Module) -> None:
        """Tell products apart by whose weights they have."""
        for name, p in model.named_parameters():
            parts = name.split(".")
            place = next((part for part in ("self_attn", "cross_attn", "ffn") if part in parts), "other")
            self._places[p.untyped_storage()._cdata] = place

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """An AttentionFn that computes nothing: q [B, Lq, heads, D], k and v [B, Lk, heads, D]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        batch, queries, heads, width = q.shape
        if not self._inside:
            return out
        flops = 4 * batch * heads * queries * k.shape[1] * width
        place = "self_attn" if k.shape[0] == 1 and k.shape[1] >= queries else "cross_attn"
        self.work[Work("attention", place, flops, sum(map(_moved, (q, k, v, out))))] += 1
        return out

    def __enter__(self) -> Ledger:
        self._inside = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        before = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **kwargs)
        made = _tensors(out)
        mine = [t for t in (*given, *made) if t.device.type == self.device]
        if mine:
            self._note(func, args, kwargs, out, given, made, before)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, given: Any, made: Any, before: set[int]) -> None:
        fresh = [t for t in made if t.untyped_storage()._cdata not in before]
        for tensor in fresh:
            self._hold(tensor)
        name = func._overloadpacket.__name__
        if name in _ALLOCATES or not (fresh or func._schema.is_mutable):
            return  # nothing moves: a view, or room without contents
        moved = sum(map(_moved, {id(t): t for t in (*given, *made)}.values()))
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            self.work[Work("memory", "other", 0, moved)] += 1
            return
        kind: Kind = "attention" if "attention" in name else "linear"
        self.work[Work(kind, self._place(given), formula(*args, **kwargs, out_val=out), moved)] += 1

    def _place(self, given: Iterable[Tensor]) -> str:
        found = (self._places.get(t.untyped_storage()._cdata) for t in given)
        return next((place for place in found if place), "other")

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or tensor.device.type != self.device:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _FusedNorms(TorchFunctionMode):
    """RMSNorm as one operation: it reads x and writes as much."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.rms_norm, torch.rms_norm):
            return func(*args, **(kwargs or {}))
        out = torch.empty_like(args[0])
        self.ledger.work[Work("memory", "other", 0, _moved(args[0]) + _moved(out))] += 1
        return out


def flops(work: Mapping[Work, int], kind: Kind | None = None, place: str | None = None) -> int:
    """FLOPs of all work, or of one kind or place."""
    return sum(n * w.flops for w, n in work.items() if kind in (None, w.kind) and place in (None, w.place))


def moved_bytes(work: Mapping[Work, int], kind: Kind | None = None) -> int:
    """Bytes that all work, or one kind, reads and writes."""
    return sum(n * w.bytes for w, n in work.items() if kind in (None, w.kind))


def counted(call: Callable[[], object], ledger: Ledger) -> Ledger:
    """The ledger after a call, without gradients. Not in inference mode, where products hide in larger operations."""
    norms = _FusedNorms(ledger) if ledger.fused_norm else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), ledger, norms:
        held = call()
    del held
    return ledger


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _moved(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that repeats itself (expand), those that are there."""
    own = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return own * tensor.element_size()
