"""Eight bits (e4m3) for products of the transformer's blocks and for keys and values that are kept; options, both.

Weights have a scale for every output channel, activations one for every token, found as they come; torch._scaled_mm
multiplies (CUDA of compute capability 8.9 and up; on a CPU it is there too, slowly). Keys and values have one scale
for every token and head.

Shape legend: x [.., L, D], weight [D', D], keys and values [.., heads, d].
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .cache import KV, KVCache
from .model import Block, JoyAvatarDiT
from .types import StreamTensors

EightBits = Literal["none", "linear", "kv", "both"]
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
_LEAST = 1e-12  # of a row of zeros
_MULTIPLE = 16  # of rows and columns that the products take


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> eight bits of it, and the scale of each row in float32, [.., 1]: row / scale reaches 448 at most."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=_LEAST)
    return (wide / scale).to(FLOAT8), scale


def restored(small: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantised` gave, as numbers again."""
    return (small.float() * scale).to(dtype)


class EightBitLinear(nn.Module):
    """A linear layer in eight bits, made of another: weight [D', D], scale [D', 1], bias [D']."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        small, scale = quantised(linear.weight.detach())
        self.weight, self.scale = (nn.Parameter(t, requires_grad=False) for t in (small, scale))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D'] in the dtype of x."""
        rows, scale = quantised(x.flatten(0, -2))
        product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        out = product(rows, self.weight.t(), scale, self.scale.t(), out_dtype=torch.bfloat16)
        out = out.to(x.dtype) if self.bias is None else out.to(x.dtype) + self.bias
        return out.unflatten(0, x.shape[:-1])


class EightBitCache(KVCache):
    """A cache in eight bits: half the memory, and a copy in `dtype` of what a layer reads, while it reads it."""

    def __init__(self, *, dtype: torch.dtype, **sizes: Any) -> None:
        super().__init__(dtype=FLOAT8, **sizes)
        self.dtype = dtype
        self.scales = torch.ones(2, *self.keys.shape[:-1], 1, dtype=torch.float32, device=self.keys.device)

    def context(self, layer: int) -> KV:
        """As KVCache; copies."""
        keys, values = super().context(layer)
        scales = self.scales[:, layer, :, : keys.shape[1]]
        return restored(keys, scales[0], self.dtype), restored(values, scales[1], self.dtype)

    def tensors(self) -> StreamTensors:
        """As KVCache, with the scales."""
        return super().tensors() | {"key_scales": self.scales[0], "value_scales": self.scales[1]}

    def part(self, items: slice) -> EightBitCache:
        """As KVCache, with the scales."""
        part = super().part(items)
        assert isinstance(part, EightBitCache)
        part.scales = self.scales[:, :, items]
        return part

    def _store(self, layer: int, tokens: slice, keys: Tensor, values: Tensor) -> None:
        for i, (place, new) in enumerate(((self.keys, keys), (self.values, values))):
            small, scale = quantised(new)
            place[layer, :, tokens] = small
            self.scales[i, layer, :, tokens] = scale


@torch.no_grad()
def shrink_products(model: JoyAvatarDiT) -> int:
    """Put `EightBitLinear` in place of the plain linear layers that every token of the window passes (q, k, v and o of
    self-attention, q and o of cross-attention, feed-forward); keys of conditions, embeddings and head stay.

    Returns:
        how many layers were changed.

    Raises:
        ValueError: the device cannot multiply eight bits, or the widths are no multiples of 16.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no products in eight bits: leave --fp8 linear out")
    if model.config.dim % _MULTIPLE or model.config.ffn_dim % _MULTIPLE:
        raise ValueError(
            f"widths {model.config.dim} and {model.config.ffn_dim} of the model must be multiples of {_MULTIPLE} for "
            "products in eight bits: leave --fp8 linear out"
        )
    changed = 0
    for block in map(_as_block, model.blocks):
        places = [(block.self_attn, n) for n in "qkvo"] + [(block.cross_attn, n) for n in "qo"]
        for parent, name in (*places, (block.ffn, "0"), (block.ffn, "2")):
            layer = getattr(parent, name)
            if type(layer) is nn.Linear:
                setattr(parent, name, EightBitLinear(layer))
                changed += 1
    return changed


def _as_block(block: nn.Module) -> Block:
    return cast(Block, block)
