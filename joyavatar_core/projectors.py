"""Projectors: front-end features (audio windows, face embedding, image tokens) to tokens the blocks attend to.

Key names: `proj_model.*` as FantasyTalking's audio projector; `audio_proj.*` as OmniAvatar's; `img_emb.*` as Wan2.1
I2V; `face_proj.*` as the perceiver resampler of FantasyPortrait and Lynx.

Shape legend: B batch, F latent frames, W audio tokens of a latent frame, L tokens, C channels, D width.
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
    """All log-mel tokens of a latent frame mixed: [B, F, W, C] -> [B, F, tokens, D].

    A latent holds four pixel frames: the mixing layers see where in the window each column stands, which attention
    over tokens without positions would not. A token is `columns` columns of the spectrogram; convolutions along them
    hear a sound wherever in the window it falls, and two of stride 2 lead back to one place per token at four columns.
    """

    def __init__(self, config: AudioConfig, ops: Any) -> None:
        super().__init__()
        self.tokens, self.columns = config.tokens, config.columns
        mels, places = config.features // config.columns, config.window * config.columns
        self.conv_in = ops.Conv1d(mels, config.channels, 5, padding=2)
        self.conv_mid = ops.Conv1d(config.channels, config.channels, 5, stride=2, padding=2)
        self.conv_out = ops.Conv1d(config.channels, config.channels, 3, stride=2, padding=1)
        self.proj_in = ops.Linear(config.channels * -(-places // 4), config.hidden)
        self.proj_out = ops.Linear(config.hidden, config.tokens * config.width)
        self.norm = ops.LayerNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        spectrogram = tokens.unflatten(-1, (self.columns, -1)).flatten(-3, -2)  # [B, F, W columns, mels]
        x = spectrogram.flatten(0, -3).transpose(1, 2)
        for layer in (self.conv_in, self.conv_mid, self.conv_out):
            x = nn.functional.silu(layer(x))
        x = nn.functional.silu(self.proj_in(x.flatten(1)))
        x = self.proj_out(x).unflatten(-1, (self.tokens, -1))
        return self.norm(x).unflatten(0, tokens.shape[:-2])


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
