"""Wan2.2-S2V, the base of Live Avatar: Wan's text-to-video transformer that hears between its layers and looks at a
reference prefilled once.

Parameter names are the published ones (1260 tensors at 14B; `casual_audio_encoder` is spelled so there). The release
of Live Avatar (arXiv 2512.04677) runs the noisy latents at their timestep and the reference at timestep 0: here these
are two kinds of forward, `forward` and `prefill`, with one modulation each. The pose branch (`cond_encoder`) is given
zeros there, so of it only the bias is heard.

Shape legend: B batch, C channels, F latent frames, T pixel frames, P tokens of a latent frame, L = F * P, D dim,
W audio tokens of a latent frame, h w latent size, n heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, sdpa
from .cache import KV
from .config import AudioConfig, ModelConfig, S2VConfig
from .model import Attention, AudioKV, ConditionKV, JoyAvatarDiT, Table, modulate
from .rope import axes_table

NOISY, REFERENCE, MOTION = range(3)
"""Rows of `trainable_cond_mask`."""
BUCKETS = (1, 2, 16)
"""FramePack: the newest motion latent at full size, the two before it halved on every axis, sixteen quartered."""
MOTION_LATENTS = sum(BUCKETS)
MOTION_FRAMES = 1 + 4 * (MOTION_LATENTS - 1)
"""Pixel frames of a still picture that give the motion latents (73)."""


class CausalConv1d(nn.Module):
    """A convolution of 3 over time whose first input is repeated before it: [B, C, T] -> [B, C', ceil(T / stride)]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, ops: Any) -> None:
        super().__init__()
        self.conv = ops.Conv1d(channels_in, channels_out, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (2, 0), mode="replicate"))


class FrameMixer(nn.Module):
    """Features of pixel frames -> tokens of latent frames; local and global ones share the later layers."""

    def __init__(self, features: int, dim: int, tokens: int, ops: Any) -> None:
        super().__init__()
        self.tokens = tokens
        self.conv1_local = CausalConv1d(features, dim // 4 * tokens, 1, ops)
        self.conv1_global = CausalConv1d(features, dim // 4, 1, ops)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, 2, ops)
        self.conv3 = CausalConv1d(dim // 2, dim, 2, ops)
        self.final_linear = ops.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, C] with T = 1 + 4 (F - 1) -> local tokens [B, F, tokens + 1, D], global [B, F, D]."""
        x = frames.transpose(1, 2)
        local = self._halved_twice(self.conv1_local(x).unflatten(1, (self.tokens, -1)).flatten(0, 1))
        local = local.unflatten(0, (-1, self.tokens)).transpose(1, 2)
        padding = self.padding_tokens.to(local).expand(*local.shape[:2], -1, -1)
        return torch.cat([local, padding], dim=2), self.final_linear(self._halved_twice(self.conv1_global(x)))

    def _halved_twice(self, x: Tensor) -> Tensor:
        """[B, D / 4, T] -> [B, ceil(T / 4), D]"""
        x = self.conv2(_norm(x.transpose(1, 2)).transpose(1, 2))
        x = self.conv3(_norm(x.transpose(1, 2)).transpose(1, 2))
        return _norm(x.transpose(1, 2))


def _norm(x: Tensor) -> Tensor:
    """SiLU of the LayerNorm of [.., C]."""
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))


class AudioEncoder(nn.Module):
    """All hidden states of wav2vec2, mixed by learned weights, then over time.

    Tokens [B, F, W, layers * C] of a block (a token a pixel frame, W = 4 a latent) -> local and global tokens of its
    latent frames. Nothing before the block is heard: its first frame is repeated instead, as the release does.
    """

    def __init__(self, audio: AudioConfig, s2v: S2VConfig, dim: int, ops: Any) -> None:
        super().__init__()
        self.layers = s2v.audio_layers
        self.weights = nn.Parameter(torch.full((1, self.layers, 1, 1), 0.01))
        self.encoder = FrameMixer(audio.features // self.layers, dim, audio.tokens, ops)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        frames = tokens.flatten(1, 2).unflatten(-1, (self.layers, -1))  # [B, T, layers, C]
        weights = F.silu(self.weights.to(frames)).flatten()
        mixed = torch.einsum("btlc,l->btc", frames, weights) / weights.sum()
        local, whole = self.encoder(torch.cat([mixed[:, :1], mixed], dim=1))  # one frame before it: one latent more
        return local[:, 1:], whole[:, 1:]


class Injector(Attention):
    """Cross-attention from the picture's tokens to the audio tokens of their latent frame."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x [B, F, P, D] -> [B, F, P, D]"""
        q = self.queries(x)
        out = self.attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), None)
        return self.o(out.flatten(-2)).unflatten(0, x.shape[:2])


class AdaIN(nn.Module):
    """Shift and scale that the sound as a whole gives to the picture's tokens: [B, F, D] -> twice [B, F, D]."""

    def __init__(self, dim: int, ops: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(dim, 2 * dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.linear(F.silu(tokens)).chunk(2, dim=-1)
        return shift, scale


class AudioInjector(nn.Module):
    """What follows each of the layers that hear: an AdaIN before a cross-attention."""

    def __init__(self, config: ModelConfig, count: int, ops: Any, attention: AttentionFn) -> None:
        super().__init__()
        self.injector = nn.ModuleList(Injector(config, ops, attention) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaIN(config.dim, ops) for _ in range(count))


class FramePacker(nn.Module):
    """Motion latents [B, C, n, h, w] -> tokens, the newest first: finer patches the newer they are.

    Fewer than 19 latents are preceded by zeros; of more the last 19 count.
    """

    def __init__(self, config: ModelConfig, ops: Any) -> None:
        super().__init__()
        one, two, four = ((t, s * config.patch[0], s * config.patch[1]) for t, s in ((1, 1), (2, 2), (4, 4)))
        self.proj = ops.Conv3d(config.out_channels, config.dim, one, stride=one)
        self.proj_2x = ops.Conv3d(config.out_channels, config.dim, two, stride=two)
        self.proj_4x = ops.Conv3d(config.out_channels, config.dim, four, stride=four)

    def forward(self, motion: Tensor) -> Tensor:
        """-> [B, P + P / 4 + 4 (P / 16), D]"""
        motion = motion[:, :, -MOTION_LATENTS:]
        motion = F.pad(motion, (0, 0, 0, 0, MOTION_LATENTS - motion.shape[2], 0))
        parts = motion.split(BUCKETS[::-1], dim=2)
        layers = (self.proj_4x, self.proj_2x, self.proj)
        tokens = [layer(part).flatten(2).transpose(1, 2) for layer, part in zip(layers, parts, strict=True)]
        return torch.cat(tokens[::-1], dim=1)


class S2VDiT(JoyAvatarDiT):
    """Wan2.2-S2V behind the interface of the engine's transformer.

    Args: as JoyAvatarDiT; config.s2v must be there.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Any = nn,
        attention: AttentionFn = sdpa,
        compute: torch.dtype | None = None,
    ) -> None:
        if config.s2v is None or config.audio is None:
            raise ValueError("a config without s2v is not of Wan2.2-S2V: build JoyAvatarDiT")
        super().__init__(replace(config, audio=None, s2v=None), ops, attention, compute)
        self.config = config
        patch = (1, *config.patch)
        self.inject_layers = config.s2v.inject_layers
        self.cond_encoder = ops.Conv3d(config.out_channels, config.dim, patch, stride=patch)
        self.trainable_cond_mask = ops.Embedding(3, config.dim)  # only its rows are used
        self.casual_audio_encoder = AudioEncoder(config.audio, config.s2v, config.dim, ops)
        self.audio_injector = AudioInjector(config, len(self.inject_layers), ops, attention)
        self.frame_packer = FramePacker(config, ops)

    def audio(self, tokens: Tensor, valid: Tensor | None = None, manner: Tensor | None = None) -> AudioKV:
        """Front-end tokens [B, F, 4, C] of whole blocks, a block at a time -> for each injector its keys and values
        [B, F, W, n, d] and the shift and scale before it [B, F, D]. Frames beyond the end are zeros that are heard.
        """
        local, whole = self.casual_audio_encoder(tokens)
        parts = zip(self.audio_injector.injector, self.audio_injector.injector_adain_layers, strict=True)
        return AudioKV(tuple((*cast(Injector, attend).kv(local), *adain(whole)) for attend, adain in parts), None)

    def prefill(
        self,
        x: Tensor,
        condition: ConditionKV,
        position: int,
        motion: Tensor | None = None,
        audio: AudioKV | None = None,
    ) -> list[KV]:
        """Reference [B, C, 1, h, w] and motion latents [B, C, n, h, w] among themselves, at timestep 0; they hear
        nothing, whatever audio there is.

        Raises ValueError if the motion latents are missing, or too small for the coarsest patch.
        """
        if motion is None:
            raise ValueError("Wan2.2-S2V needs the motion latents of the picture: its latents, standing still")
        least = 4 * max(self.config.patch)
        if min(motion.shape[3:]) < least:
            raise ValueError(f"latents of {motion.shape[4]}x{motion.shape[3]}: must be at least {least} on each side")
        tokens = super()._embed(x)
        packed = self.frame_packer(motion.to(tokens))
        tokens = torch.cat([tokens + self._mark(REFERENCE, tokens), packed + self._mark(MOTION, packed)], dim=1)
        time = self._time(torch.zeros(len(x), 1, device=x.device), tokens.dtype)
        levels = self.time_projection(time).unflatten(-1, (6, -1))
        table = self.reference_table(position, 0, (x.shape[3], x.shape[4]), x.device)
        return self._layers(tokens, levels, Table(table, table), condition)[1]

    def reference_table(self, position: int, shift: int, size: tuple[int, int], device: torch.device) -> Tensor:
        """As JoyAvatarDiT; motion latents stand at -1, -3 and -19, -14, -9, -4 (as released), plus the shift."""
        return _reference_table(position, shift, self._grid(size), self.config.head_dim, self._compute, device)

    def _embed(self, x: Tensor) -> Tensor:
        tokens = super()._embed(x)
        return tokens + self.cond_encoder.bias.to(tokens) + self._mark(NOISY, tokens)

    def _mark(self, row: int, like: Tensor) -> Tensor:
        return self.trainable_cond_mask.weight[row].to(like)

    def _attended(self, layer: int, audio: AudioKV | None) -> None:
        """Nothing of the sound in the cross-attention."""

    def _inject(self, layer: int, tokens: Tensor, audio: AudioKV | None) -> Tensor:
        """Audio that is heard after the layer before this one."""
        if audio is None or layer - 1 not in self.inject_layers:
            return tokens
        which = self.inject_layers.index(layer - 1)
        k, v, shift, scale = audio.layers[which]
        tuned = modulate(tokens, shift[:, :, None], scale[:, :, None], 1e-5).unflatten(1, (k.shape[1], -1))
        heard = self.audio_injector.injector[which](tuned, k, v)
        return tokens + heard.flatten(1, 2)


@lru_cache(maxsize=8)
def _reference_table(
    position: int, shift: int, grid: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """See S2VDiT.reference_table; the last ones are kept, since all steps of a block ask for the same."""
    rows, columns = grid
    groups = [((position,), 1)]
    groups += [(tuple(t + shift for t in times), coarse) for times, coarse in (((-1,), 1), ((-3,), 2))]
    groups += [(tuple(t + shift for t in (-19, -14, -9, -4)), 4)]
    axes = [(times, _spread(rows, coarse), _spread(columns, coarse)) for times, coarse in groups]
    tables = [axes_table(each, head_dim, dtype, device) for each in axes]
    with torch.inference_mode(False):  # a kept table may be used in training later
        return torch.cat(tables)


def _spread(cells: int, coarse: int) -> tuple[int, ...]:
    """Indices, along an axis of so many tokens, of those of a patch `coarse` times as large."""
    if coarse == 1:
        return tuple(range(cells))
    return tuple(np.linspace(0, cells - 1, cells // coarse).astype(int).tolist())
