"""The rollout the plain way: written once, then frozen. A second opinion for the tests and the bench's baseline.

Everything the engine is clever about is done here as the public code of this family does it: keys of all held blocks
are kept in Python lists, concatenated and rotated by complex numbers in float64 at every forward; keys and values of
audio, text and image are made anew at every forward; modulation is spread over every token; the finished block
passes the model once more at timestep 0 (`clean_pass`); latents are decoded in one go at the end.
It shares the weights with the engine and nothing of its loops, cache, positions or attention.

Shape legend: B batch (1), C channels, F latent frames, P tokens of a latent, L = F * P, D dim, n heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoder import LightAutoencoder, MemoryBlock
from .model import Block, JoyAvatarDiT

MAIN, SUB = (1000.0, 750.0, 500.0, 250.0), (875.0, 625.0, 375.0, 125.0)
BLOCK, WINDOW, LOCAL = 3, 4, 4

Noise = Callable[[int, int, tuple[int, ...], str], Tensor]
"""(block, pass, shape, "latents" or "motion") -> noise."""


@dataclass
class PlainRollout:
    """JoyAvatar-Flash with absolute positions that grow for ever (so the sink glides along in front of the locals).

    image: [1, 4 + C, n, h, w] image channels, the last latent repeated; tokens: image tokens [1, L, C];
    audio: [frames, W, C] tokens of all latents.
    """

    model: JoyAvatarDiT
    image: Tensor
    tokens: Tensor
    audio: Tensor
    noise: Noise
    shift: float = 5.0
    clean_pass: bool = True
    history: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)  # per held block, per layer (k, v)

    @torch.no_grad()
    def run(self, blocks: int) -> Tensor:
        """Clean latents [1, C, 3 blocks, h, w] of the whole clip."""
        noisy: dict[int, Tensor] = {}
        clean: list[Tensor] = []
        passes = [0] * blocks
        for window in range(blocks + WINDOW - 1):
            members = list(range(max(0, window - WINDOW + 1), min(window, blocks - 1) + 1))
            stage = {b: window - b for b in members}
            levels = [{b: MAIN[stage[b]] for b in members}]
            if window < WINDOW:
                levels.append({b: SUB[stage[b]] for b in members})
            levels.append({b: (*MAIN, 0.0)[stage[b] + 1] for b in members})
            kv = []
            for here, after in pairwise(levels):
                kv = self._pass(members, noisy, passes, here, after, clean)
                for b in members:
                    passes[b] += 1
            if window >= WINDOW - 1:
                self._finish(members[0], noisy.pop(members[0]), kv, clean)
        return torch.cat(clean, dim=2)

    def _pass(self, members, noisy, passes, here, after, clean):
        shape = (1, self.model.config.out_channels, BLOCK, *self.image.shape[-2:])
        for b in members:
            if b not in noisy:
                noisy[b] = self.noise(b, 0, shape, "latents")
        x = torch.cat([noisy[b] for b in members], dim=2)
        t = torch.tensor([self._warp(here[b]) for b in members for _ in range(BLOCK)], dtype=x.dtype)
        first = members[0] * BLOCK
        motion = bool(clean)
        if motion:
            noise = self.noise(members[0], passes[members[0]], (*shape[:2], 1, *shape[3:]), "motion")
            frame = (1 - t[0] / 1000) * clean[-1][:, :, -1:] + t[0] / 1000 * noise
            x, t = torch.cat([frame, x], dim=2), torch.cat([t[:1], t])
        v, kv = self._forward(x, t, first - motion, len(clean))
        x0 = (x - (t / 1000).view(1, 1, -1, 1, 1) * v)[:, :, int(motion) :]
        for i, b in enumerate(members):
            sigma = self._warp(after[b]) / 1000
            noise = self.noise(b, passes[b] + 1, shape, "latents")
            noisy[b] = (1 - sigma) * x0[:, :, i * BLOCK : (i + 1) * BLOCK] + sigma * noise
        return [
            (k[:, motion * p : (motion + BLOCK) * p], val[:, motion * p : (motion + BLOCK) * p]) for k, val, p in kv
        ]

    def _finish(self, block: int, latents: Tensor, kv: list, clean: list[Tensor]) -> None:
        if self.clean_pass:
            t = torch.zeros(BLOCK, dtype=latents.dtype)
            kv = [(k, v) for k, v, _ in self._forward(latents, t, block * BLOCK, block)[1]]
        self.history.append(kv)
        if len(self.history) > 1 + LOCAL:
            self.history.pop(1)
        clean.append(latents)

    def _forward(self, x: Tensor, t: Tensor, first: int, finished: int) -> tuple[Tensor, list]:
        model, frames = self.model, x.shape[2]
        last = self.image.shape[2] - 1
        index = [min(first + i, last) for i in range(frames)]
        x = torch.cat([x, self.image[:, :, index].to(x)], dim=1)
        held = [b for b in [0, *range(max(1, finished - LOCAL), finished)] if b < finished]
        starts = {b: b * BLOCK for b in held}
        if held:
            starts[0] = (held[1] if len(held) > 1 else finished) * BLOCK - BLOCK
        places = [starts[b] + i for b in held for i in range(BLOCK)]
        window = list(range(first, first + frames))
        dtype = model.patch_embedding.weight.dtype
        tokens = model.patch_embedding(x.to(dtype))
        grid = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        time = model.time_embedding(_sinusoid(t, model.config.freq_dim).to(dtype))  # [F, D]
        levels = model.time_projection(time).unflatten(-1, (6, -1))[None]
        audio = model.proj_model(self.audio[first : first + frames].to(dtype))
        kv = []
        for i, block in enumerate(model.blocks):
            past = [h[i] for h in self.history]
            assert isinstance(block, Block)
            tokens, k, v = self._block(block, tokens, levels, past, (places, window, grid), audio)
            kv.append((k, v, grid[0] * grid[1]))
        out = self._head(tokens, time, frames, grid).to(x.dtype)
        if model.config.prediction == "x0":
            sigma = (t.clamp(min=50.0) / 1000).to(x.dtype).view(1, 1, -1, 1, 1)
            out = (x[:, : model.config.out_channels] - out) / sigma
        return out, kv

    def _block(self, block: Block, x: Tensor, levels: Tensor, past: list, where: tuple, audio: Tensor) -> tuple:
        config = self.model.config
        wide = torch.promote_types(x.dtype, torch.float32)
        p = x.shape[1] // levels.shape[1]
        e = (block.modulation.to(wide) + levels.to(wide)).repeat_interleave(p, dim=1).unbind(2)  # 6 of [1, L, D]
        y = (F.layer_norm(x.to(wide), x.shape[-1:], eps=config.eps) * (1 + e[1]) + e[0]).to(x.dtype)
        att = block.self_attn
        q, k = (
            norm(proj(y)).unflatten(-1, (config.heads, -1)) for norm, proj in ((att.norm_q, att.q), (att.norm_k, att.k))
        )
        v = att.v(y).unflatten(-1, (config.heads, -1))
        places, window, grid = where
        keys = torch.cat([*(h[0] for h in past), k], dim=1)
        values = torch.cat([*(h[1] for h in past), v], dim=1)
        out = _attend(_complex_rotate(q, window, grid), _complex_rotate(keys, [*places, *window], grid), values)
        x = (x.to(wide) + att.o(out).to(wide) * e[2]).to(x.dtype)
        x = x + self._cross(block, block.norm3(x), audio)
        y = (F.layer_norm(x.to(wide), x.shape[-1:], eps=config.eps) * (1 + e[4]) + e[3]).to(x.dtype)
        return (x.to(wide) + block.ffn(y).to(wide) * e[5]).to(x.dtype), k, v

    def _cross(self, block: Block, x: Tensor, audio: Tensor) -> Tensor:
        att, heads = block.cross_attn, self.model.config.heads
        q = att.norm_q(att.q(x)).unflatten(-1, (heads, -1))
        image = self.model.img_emb(self.tokens.to(x.dtype))
        k, v = (t.unflatten(-1, (heads, -1)) for t in (att.norm_k_img(att.k_img(image)), att.v_img(image)))
        out = _attend(q, k, v)
        per_frame = q.unflatten(1, (len(audio), -1))[0]
        k, v = (f(audio).unflatten(-1, (heads, -1)) for f in (att.processor.k_proj, att.processor.v_proj))
        out = out + att.audio_scale * _attend(per_frame, k, v).flatten(0, 1)[None]
        return att.o(out)

    def _head(self, x: Tensor, time: Tensor, frames: int, grid: torch.Size) -> Tensor:
        head, config = self.model.head, self.model.config
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens = x.shape[1] // frames
        e = (head.modulation.to(wide) + time.to(wide)[:, None]).repeat_interleave(tokens, dim=0)  # [L, 2, D]
        y = F.layer_norm(x.to(wide), x.shape[-1:], eps=config.eps) * (1 + e[:, 1]) + e[:, 0]
        out = head.head(y.to(x.dtype)).reshape(frames, *grid, *config.patch, -1)  # F rows cols p q C
        out = torch.einsum("frcpqz->zfrpcq", out)
        return out.reshape(1, -1, frames, grid[0] * config.patch[0], grid[1] * config.patch[1])

    def _warp(self, timestep: float) -> float:
        return 1000 * self.shift * timestep / (1000 + (self.shift - 1) * timestep)


@torch.no_grad()
def plain_decode(autoencoder: LightAutoencoder, latents: Tensor) -> Tensor:
    """All latents [1, C, F, h, w] at once -> video [1, 3, T, H, W]: every layer over the whole clip."""
    x = autoencoder._denormalise(latents)[0].transpose(0, 1).contiguous()
    for layer in autoencoder.decoder:
        past = [torch.cat([torch.zeros_like(x[:1]), x[:-1]])] if isinstance(layer, MemoryBlock) else []
        x = layer(x, *past)
    frames = F.pixel_shuffle(x, autoencoder.config.patch)[3:]
    return frames.clamp(0, 1).transpose(0, 1)[None] * 2 - 1


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, n, d] -> [B, L, n d]"""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _sinusoid(t: Tensor, dim: int) -> Tensor:
    angles = t.double()[:, None] * 10000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=4)
def _frequency_table(d: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit complex numbers [rows, width / 2] of time, height and width."""
    plane = 2 * (d // 6)
    tables = []
    for width in (d - 2 * plane, plane, plane):
        frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(rows, dtype=torch.float64), frequency)
        tables.append(torch.polar(torch.ones_like(angles), angles))
    return tables[0], tables[1], tables[2]


def _complex_rotate(x: Tensor, places: list[int], grid: torch.Size) -> Tensor:
    """x [B, L, n, d]; one unit complex number per pair of channels and token."""
    time, height, width = _frequency_table(x.shape[-1], 1024)
    full = (len(places), *grid, -1)
    turn = torch.cat(
        [
            time[places].view(len(places), 1, 1, -1).expand(full),
            height[: grid[0]].view(1, grid[0], 1, -1).expand(full),
            width[: grid[1]].view(1, 1, grid[1], -1).expand(full),
        ],
        dim=-1,
    ).flatten(0, 2)
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * turn[:, None]).flatten(-2).to(x.dtype)
