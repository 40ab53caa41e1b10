"""The one seam of attention: every attention of the model calls a function of this shape.

Shape legend: q [B, Lq, heads, D], k and v [B, Lk, heads, D], mask boolean, broadcastable to [B, heads, Lq, Lk]
(True: may attend); result [B, Lq, heads, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention; the default. The ComfyUI nodes pass the host's switch instead."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
