"""Projectors: front-end features (audio windows, face embedding, image tokens) to tokens the blocks attend to.

Key names: `proj_model.*` as FantasyTalking's audio projector; `audio_proj.*` as OmniAvatar's; `img_emb.*` as Wan2.1
I2V; `face_proj.*` as the perceiver resampler of FantasyPortrait and Lynx.

Shape legend: B batch, F latent frames, W audio tokens of a latent frame, T pixel frames of a latent, K readings,
L tokens, C channels, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionFn
from .config import AudioConfig, FaceConfig


class AudioTokenProjector(nn.Module):
    """Each wav2vec2 token by itself: [B, F, W, C] -> [B, F, W, D] (FantasyTalking)."""

    def __init__(self, config: AudioConfig, ops: Any) -> None:
        super().__init__()
        self.proj = ops.Linear(config.features, config.width, bias=False)
        self.norm = ops.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.proj(tokens))


class AudioWindowProjector(nn.Module):
    """The log-mel window of a latent frame, heard: [B, F, W, C] -> [B, F, tokens, D].

    A token is `columns` columns of the spectrogram. Convolutions along them, none of them padded, say a few numbers of
    each pixel frame of the latent, whose place in the window does not matter; these alone go on, and beside them what
    is drawn of the frame (`manner`). A voice has much else to tell, and a transformer that hears it learns the few
    voices of its clips by heart.
    """

    def __init__(self, config: AudioConfig, ops: Any) -> None:
        super().__init__()
        self.tokens, self.columns, step = config.tokens, config.columns, config.columns // 2
        self.dilations = config.dilations
        self.limits, self.drawn = config.limits, config.told - config.readings
        channels, numbers = config.channels, config.frames_read * config.told
        self.conv_in = ops.Conv1d(config.features // config.columns, channels, step + 4, stride=step)
        self.convs = nn.ModuleList(ops.Conv1d(channels, channels, 3, dilation=d) for d in config.dilations)
        self.conv_out = ops.Conv1d(channels, config.readings, 4, stride=2)
        self.proj = ops.Linear(numbers, config.tokens * config.width)
        self.norm = ops.LayerNorm(config.width)

    def read(self, tokens: Tensor) -> Tensor:
        """Tokens of consecutive pixel frames [n, W, C] -> readings [n, W less both reaches, readings]."""
        x = self.conv_in(tokens.unflatten(-1, (self.columns, -1)).flatten(1, 2).transpose(1, 2))
        for conv, reach in zip(self.convs, self.dilations, strict=True):
            x = x[..., reach:-reach] + conv(nn.functional.silu(x))
        return self.conv_out(nn.functional.silu(x)).transpose(1, 2)

    def forward(self, tokens: Tensor, manner: Tensor | None = None) -> Tensor:
        """manner [B, F, T, K]: added to what is heard; without it nothing is drawn."""
        told = self.read(tokens.flatten(0, -3)).unflatten(0, tokens.shape[:-2])
        told = nn.functional.pad(told, (0, self.drawn))
        return self.lay_out(told if manner is None else told + manner)

    def lay_out(self, told: Tensor) -> Tensor:
        """Readings [B, F, T, K], within their limits, as tokens [B, F, tokens, D]."""
        if self.limits:
            least, most = told.new_tensor(self.limits).unbind(1)
            told = told.clamp(least, most)
        return self.norm(self.proj(told.flatten(-2)).unflatten(-1, (self.tokens, -1)))


class AudioPack(nn.Module):
    """The frames of a latent as one short vector: [B, F, W, C] -> [B, F, D] (OmniAvatar: 4 frames of 10752 -> 32)."""

    def __init__(self, config: AudioConfig, ops: Any) -> None:
        super().__init__()
        self.proj = ops.Linear(config.window * config.features, config.width)
        self.norm_out = ops.LayerNorm(config.width)

    def forward(self, frames: Tensor) -> Tensor:
        return self.norm_out(self.proj(frames.flatten(-2)))


class ImageProjector(nn.Module):
    """Image tokens [B, L, C] -> [B, L, D] (Wan2.1 I2V: LayerNorm, Linear, GELU, Linear, LayerNorm)."""

    def __init__(self, image_dim: int, dim: int, ops: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ops.LayerNorm(image_dim),
            ops.Linear(image_dim, image_dim),
            nn.GELU(),
            ops.Linear(image_dim, dim),
            ops.LayerNorm(dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class PerceiverAttention(nn.Module):
    """Queries attend to [tokens, queries]."""

    def __init__(self, config: FaceConfig, ops: Any, attention: AttentionFn) -> None:
        super().__init__()
        self.heads, self.attention = config.heads, attention
        self.norm1 = ops.LayerNorm(config.dim)
        self.norm2 = ops.LayerNorm(config.dim)
        self.to_q = ops.Linear(config.dim, config.dim, bias=False)
        self.to_kv = ops.Linear(config.dim, 2 * config.dim, bias=False)
        self.to_out = ops.Linear(config.dim, config.dim, bias=False)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        tokens, queries = self.norm1(tokens), self.norm2(queries)
        k, v = self.to_kv(torch.cat([tokens, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.to_q(queries), k, v))
        return self.to_out(self.attention(q, k, v, None).flatten(-2))


class FaceResampler(nn.Module):
    """Face embedding [B, 512] -> [B, 16, D] identity tokens."""

    def __init__(self, config: FaceConfig, ops: Any, attention: AttentionFn) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, config.queries, config.dim) * config.dim**-0.5)
        self.proj_in = ops.Linear(config.features, config.dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config, ops, attention), _feed_forward(config.dim, ops)])
            for _ in range(config.depth)
        )
        self.proj_out = ops.Linear(config.dim, config.width)
        self.norm_out = ops.LayerNorm(config.width)

    def forward(self, embedding: Tensor) -> Tensor:
        tokens = self.proj_in(embedding).unsqueeze(1)
        queries = self.latents.to(tokens).expand(len(tokens), -1, -1)
        for attend, feed_forward in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            queries = queries + attend(tokens, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


def _feed_forward(dim: int, ops: Any) -> nn.Sequential:
    return nn.Sequential(
        ops.LayerNorm(dim), ops.Linear(dim, 4 * dim, bias=False), nn.GELU(), ops.Linear(4 * dim, dim, bias=False)
    )
