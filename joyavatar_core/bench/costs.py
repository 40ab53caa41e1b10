"""What a configuration costs at a size, reckoned from its shapes: work of a steady forward, memory of every part.

Shape legend: B batch, C latent channels, n latents of a block, h w latent size, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..autoencoder import LightAutoencoder
from ..conditioning import image_channels
from ..config import ModelConfig
from ..geometry import Geometry
from ..model import ConditionKV
from ..policy import RolloutPolicy
from ..rollout import Fast
from ..types import nbytes
from ..wan_vae import WanVAE
from .subject import random_light, random_model, random_rollout, random_wan, run_steady_window, steady_state
from .trace import Ledger, Work, counted, flops, storage_bytes

META = torch.device("meta")


@dataclass(frozen=True)
class ModelCost:
    """Of the transformer, bytes but for `work`, which is that of the steady forward that finishes a block.

    weights; matrices: those of them that fp8 halves and offloading leaves on the host; largest: the largest of these.
    conditions: keys and values of text, image and face, and the image channels. cache: keys and values of finished
    blocks. state: the cache, and all else between two windows. temporary: the most that a window holds besides.
    """

    work: Counter[Work]
    weights: int
    matrices: int
    largest: int
    conditions: int
    cache: int
    state: int
    temporary: int


@dataclass(frozen=True)
class DecoderCost:
    """Of an autoencoder: bytes of weights, of the stream's state, and the most that decoding a block or encoding the
    picture holds besides; FLOPs of decoding a block.
    """

    weights: int
    state: int
    decode: int
    encode: int
    flops: int


@lru_cache(maxsize=16)
def model_cost(
    config: ModelConfig,
    policy: RolloutPolicy,
    geometry: Geometry,
    dtype: torch.dtype,
    settled: int = 30,
    cuda: bool = True,
    fused: bool = False,
) -> ModelCost:
    """Of a model rolled out under a policy. settled: latents of the image channels that are kept. cuda: whether it is
    for a CUDA device, which norms in one kernel. fused: with the kernels of `kernels`.
    """
    ledger = Ledger(fused_norm=cuda and hasattr(torch.ops.aten, "_fused_rms_norm"))
    model = random_model(config, META, dtype, attention=ledger.attention)
    ledger.name_weights(model)
    with torch.inference_mode(False), torch.no_grad():
        fast = Fast(kernels="always" if fused else "never")
        rollout = random_rollout(model, policy, geometry, META, settled, fast=fast)
        state = steady_state(rollout)
        run_steady_window(rollout, state)  # what a block brings once is there for the older ones
    counted(lambda: run_steady_window(rollout, state), ledger)
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    image = rollout.condition.image
    return ModelCost(
        work=ledger.work,
        weights=storage_bytes(model.parameters()),
        matrices=storage_bytes(matrices),
        largest=max(storage_bytes([m]) for m in matrices),
        conditions=storage_bytes([*_pairs(rollout.condition.kv), *([image.channels] if image else [])]),
        cache=sum(nbytes(cache.tensors()) for cache in state.caches),
        state=state.nbytes(),
        temporary=ledger.peak,
    )


@lru_cache(maxsize=16)
def decoder_cost(kind: str, config: ModelConfig, geometry: Geometry, dtype: torch.dtype) -> DecoderCost:
    """Of the autoencoder for a model's latents: kind "light", or "wan" for Wan2.1's."""
    autoencoder = random_wan(META, dtype) if kind == "wan" else random_light(config, META, dtype)
    shape = (1, autoencoder.latent_channels, geometry.block_latents, *geometry.latent_size)
    latents = torch.empty(shape, dtype=dtype, device=META)
    with torch.inference_mode(False), torch.no_grad():
        state = autoencoder.decode_stream(latents, None)[1]
    decoding = counted(lambda: autoencoder.decode_stream(latents, state), Ledger())
    picture = torch.empty(1, 3, geometry.height, geometry.width, dtype=dtype, device=META)
    encoding = counted(lambda: image_channels(autoencoder, picture), Ledger())
    return DecoderCost(_weights(autoencoder), nbytes(state), decoding.peak, encoding.peak, flops(decoding.work))


def _weights(autoencoder: WanVAE | LightAutoencoder) -> int:
    return storage_bytes([*autoencoder.parameters(), *autoencoder.buffers()])


def _pairs(kv: ConditionKV) -> list[Tensor]:
    parts = [getattr(kv, f.name) for f in fields(kv)]
    return [t for part in parts if part for pair in part for t in pair]
