"""What is done to a loaded model once, so that its forwards are faster: weights of q, k and v as one product.

Names and values of the weights stay as they are. A layer that is no plain linear one (the host's, an adapter, one with
hooks) is left alone, and so is one that is changed later: `model.Stacked.holds` looks before every product.

Shape legend: D dim.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from .model import Block, JoyAvatarDiT, Stacked, is_hooked


@torch.no_grad()
def stack_projections(model: JoyAvatarDiT) -> int:
    """Lay the weights of q, k and v of every self-attention side by side, [3 D, D]; the layers' own become parts of it.

    Takes no more memory. Move the model to its device before: parts that move apart are multiplied apart again.

    Returns:
        how many attentions were stacked.
    """
    attentions = [cast(Block, block).self_attn for block in model.blocks]
    fit = [a for a in attentions if _stackable(a.q, a.k, a.v)]
    for attention in fit:
        layers = (attention.q, attention.k, attention.v)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        rows, biases = weight.chunk(3), bias.chunk(3)
        for layer, mine, own in zip(layers, rows, biases, strict=True):
            layer.weight = nn.Parameter(mine, requires_grad=False)
            layer.bias = nn.Parameter(own, requires_grad=False)
        attention.stacked = Stacked(weight, bias)
    return len(fit)


def _stackable(*layers: nn.Module) -> bool:
    """Plain linear layers at rest: of one type, on one device, not in training."""
    if not all(type(layer) is nn.Linear and layer.bias is not None and not is_hooked(layer) for layer in layers):
        return False
    weights = [cast(nn.Linear, layer).weight for layer in layers]
    alike = len({(w.dtype, w.device, w.shape) for w in weights}) == 1
    return alike and not any(w.requires_grad for w in weights)
