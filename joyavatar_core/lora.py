"""Low-rank adapters (LoRA) put into the weights they belong to: W + scale * B A.

Names: peft's (`lora_A`, `lora_B`, also `.default.`, with `base_layer` where the adapter was never taken out of its
model) and the host's (`lora_down`, `lora_up`, `alpha`), in front of them any of the usual prefixes.

Shape legend: A [rank, in], B [out, rank], W [out, in] or a convolution's with the same first axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_PREFIX = re.compile(r"^(?:base_model\.|diffusion_model\.|transformer\.|module\.|model\.)+")
_PART = re.compile(r"\.(?:lora_(?P<side>A|B|down|up)(?:\.default)?(?:\.weight)?|(?P<alpha>alpha))$")
_FIRST = {"A": "down", "down": "down", "B": "up", "up": "up"}
INSIDE_ALPHA = 64.0
"""Of adapters that never left their model: AvatarForcing trains with alpha 64, which its file does not say."""


@dataclass(frozen=True)
class Pair:
    """The adapter of one matrix. down is A, up is B; scale is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    def update(self) -> Tensor:
        """scale * B A in float32, [out, in]."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


def is_adapter(names: Iterable[str]) -> bool:
    """Whether a file is an adapter: most names are parts of one (what else it may hold, its family says)."""
    names = list(names)
    parts = [_PART.search(name) is not None for name in names]
    return 2 * sum(parts) > len(parts) and not is_inside(names)


def is_inside(names: Iterable[str]) -> bool:
    """Whether a model still carries its adapters."""
    return any(".base_layer." in name for name in names)


def pairs(tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Pair]:
    """Adapters of a file by the name of the module they change.

    alpha: where the file names none; None: that of the rank, so that the scale is 1.
    Raises ValueError naming an entry that is no part of an adapter, a half that has lost the other, or a misfit.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _PART.search(name)
        if not found:
            raise ValueError(f"{name} is no part of a LoRA")
        side = "alpha" if found["alpha"] else _FIRST[found["side"]]
        parts.setdefault(_PREFIX.sub("", name[: found.start()]), {})[side] = tensor
    return {module: _pair(module, halves, alpha) for module, halves in parts.items()}


def _pair(module: str, halves: dict[str, Tensor], alpha: float | None) -> Pair:
    for side in ("down", "up"):
        if side not in halves:
            raise ValueError(f"the LoRA of {module} has no {'A (down)' if side == 'down' else 'B (up)'}")
    down, up = halves["down"], halves["up"]
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank:
        raise ValueError(f"the LoRA of {module} has A {list(down.shape)} and B {list(up.shape)}: they do not fit")
    given = float(halves["alpha"]) if "alpha" in halves else alpha
    return Pair(down, up, 1.0 if given is None else given / rank)


def merged(
    tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor], alpha: float | None = None
) -> dict[str, Tensor]:
    """Weights with an adapter put in, each in its own dtype; the given ones stay as they are.

    Raises ValueError naming a module that the weights do not have, or whose matrix has another size; see `pairs`.
    """
    out = dict(tensors)
    for module, pair in pairs(adapter, alpha).items():
        name = f"{module}.weight"
        if name not in out:
            raise ValueError(f"the LoRA changes {module}, which the model does not have")
        weight, update = out[name], pair.update()
        if weight.shape[0] != update.shape[0] or weight[0].numel() != update.shape[1]:
            raise ValueError(f"the LoRA of {module} is {list(update.shape)}, the matrix {list(weight.shape)}")
        out[name] = (weight.float() + update.view_as(weight)).to(weight.dtype)
    return out


def freed(tensors: Mapping[str, Tensor], alpha: float = INSIDE_ALPHA) -> dict[str, Tensor]:
    """A model that still carries its adapters -> the model with them put in. ValueError as `merged`."""
    adapter = {name: tensor for name, tensor in tensors.items() if _PART.search(name)}
    base = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if name not in adapter}
    return merged(base, adapter, alpha)


# Live Avatar: one adapter, of which every module must be there

LIVE_AVATAR_ALPHA = 64.0
"""Of rank 128; the file does not say it, the release's configuration does."""
_S2V = "casual_audio_encoder.weights"
_LIVE_AVATAR = re.compile(
    r"^(blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]|blocks\.\d+\.ffn\.[02]|audio_injector\.injector\.\d+\.[qkvo])\.weight$"
)


def put_in(tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with an adapter put in, by the rules of the family they are of; ValueError as `merged`."""
    return live_avatar(tensors, adapter) if _S2V in tensors else merged(tensors, adapter)


def live_avatar_modules(names: Iterable[str]) -> set[str]:
    """Modules of Wan2.2-S2V that Live Avatar's adapter changes: 448 of the tensors of the 14B model."""
    return {name.removesuffix(".weight") for name in names if _LIVE_AVATAR.match(name)}


def live_avatar(tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan2.2-S2V with Live Avatar's adapter put in; tensors of its file that are no part of one replace the model's.

    Raises ValueError as `whole_live_avatar`, and naming tensors that the model has not.
    """
    parts, whole = whole_live_avatar(tensors, adapter)
    for name, tensor in whole.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            held = list(tensors[name].shape) if name in tensors else "nothing of that name"
            raise ValueError(f"{name} {list(tensor.shape)} is no part of a LoRA, and the model has {held}")
    replaced = {name: t.to(tensors[name].dtype) for name, t in whole.items()}
    return merged({**tensors, **replaced}, parts, LIVE_AVATAR_ALPHA)


def whole_live_avatar(
    names: Iterable[str], adapter: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Live Avatar's adapter as (parts of the adapter, other tensors under the model's names).

    names: tensors of the model. Raises ValueError naming modules that the adapter lacks or has too many.
    """
    parts = {name: t for name, t in adapter.items() if _PART.search(name)}
    others = {_PREFIX.sub("", name): t for name, t in adapter.items() if name not in parts}
    found, wanted = set(pairs(parts)), live_avatar_modules(names)
    for word, surplus in (("lacks", wanted - found), ("has too many", found - wanted)):
        if surplus:
            raise ValueError(
                f"the LoRA {word} {len(surplus)} modules, e.g. {min(surplus)}: it changes {len(found)}, "
                f"Live Avatar's {len(wanted)}; fetch it again"
            )
    return parts, others


# The host's spelling


def spelled(adapter: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """An adapter in ComfyUI's own spelling, every module's alpha said, for its reader takes a missing one for the rank.

    names: tensors of the model, under our names. What is no adapter of such modules comes back as it is: the host
    reads more kinds and spellings than this.
    Raises ValueError naming a module that the model does not have; of Live Avatar's adapter, which is told by the
    modules it shares with no other, as `whole_live_avatar`, and naming a tensor that would replace one of the model.
    """
    names, alpha, parts = set(names), None, dict(adapter)
    if _S2V in names and any(".injector." in name for name in adapter):
        parts, others = whole_live_avatar(names, adapter)
        if others:
            raise ValueError(f"{min(others)} is no part of a LoRA: join it with the model by joyavatar convert")
        alpha = LIVE_AVATAR_ALPHA
    if not parts or not all(_PART.search(name) for name in parts):
        return dict(adapter)
    found = pairs(parts, alpha)
    foreign = [module for module in found if f"{module}.weight" not in names]
    if len(foreign) == len(found):
        return dict(adapter)
    if foreign:
        raise ValueError(f"the LoRA changes {foreign[0]}, which the model does not have")
    out: dict[str, Tensor] = {}
    for module, pair in found.items():
        name = f"diffusion_model.{module}"
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = pair.down, pair.up
        out[f"{name}.alpha"] = pair.down.new_tensor(pair.scale * pair.down.shape[0], dtype=torch.float32)
    return out
