"""The one seam of attention: every attention of the model calls a function of this shape.

Shape legend: q [B, Lq, heads, D], k and v [B, Lk, heads, D], mask boolean, broadcastable to [B, heads, Lq, Lk]
(True: may attend); result [B, Lq, heads, D].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention, which picks a kernel of its own."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def fitting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The fastest of `BACKENDS` that works on these tensors' device; `sdpa` on a CPU, with a mask, and in training.

    The ComfyUI nodes pass the host's switch (Sage and others) instead of this.
    """
    if q.device.type != "cuda" or mask is not None or torch.is_grad_enabled():
        return sdpa(q, k, v, mask)
    return BACKENDS[chosen(q.device, q.dtype, q.shape[-1])](q, k, v, None)


def _flash3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """FlashAttention-3 (flash_attn_interface); some of its versions give the logarithms of the sums too."""
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _of_torch(backend: SDPBackend) -> AttentionFn:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        with sdpa_kernel([backend]):
            return sdpa(q, k, v, mask)

    return run


BACKENDS: dict[str, AttentionFn] = {
    "flash3": _flash3,
    "cudnn": _of_torch(SDPBackend.CUDNN_ATTENTION),
    "flash": _of_torch(SDPBackend.FLASH_ATTENTION),
    "efficient": _of_torch(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa": sdpa,
}
"""Kernels by name, all for CUDA but `sdpa`; `chosen` says which is taken, `joyavatar bench` how fast each is."""
_FIRST = ("flash3", "cudnn")
"""Taken before torch's own choice on devices of compute capability 9 and up, in this order."""


@lru_cache(maxsize=32)
def chosen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name in BACKENDS of the kernel for a device: by what it can do, found out by trying."""
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return next((name for name in _FIRST if modern and works(name, device, dtype, head_dim)), "sdpa")


@torch.no_grad()
def works(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a kernel is there, takes such tensors, and gives what attention in float32 gives."""
    q, k, v = (torch.randn(1, n, 2, head_dim, device=device).to(dtype) for n in (64, 192, 192))
    try:
        out = BACKENDS[name](q, k, v, None)
    except (ImportError, RuntimeError):  # not installed; torch's and FlashAttention's word for: not with these
        return False
    wanted = sdpa(q.float(), k.float(), v.float())
    rough = max(1e-4, 8 * torch.finfo(dtype).eps)
    return out.shape == wanted.shape and bool((out.float() - wanted).abs().max() <= rough * wanted.abs().max())
