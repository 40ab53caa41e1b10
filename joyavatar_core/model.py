"""The transformer: Wan2.1's, with per-latent timesteps, audio and face cross-attention, and a cache passed in.

Parameter names are Wan2.1's (825 tensors for text to video at 1.3B, 983 for image to video), FantasyTalking's for
audio (`proj_model`, `cross_attn.processor`) and Lynx's for the face (`to_k_ip`, `to_v_ip`);
docs/key_names.md lists them.

Shape legend: B batch, C channels, F latent frames of the window (motion frame included), h w latent size,
P tokens of a latent frame, L = F * P, W audio tokens of a latent frame, D dim, heads, head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flow, kernels
from .attention import AttentionFn, sdpa
from .cache import EVERY, KV, kept_of
from .config import ModelConfig
from .projectors import AudioPack, AudioTokenProjector, AudioWindowProjector, FaceResampler, ImageProjector
from .rope import rotary_table, rotate


@dataclass(frozen=True)
class ConditionKV:
    """Keys and values of what never changes in a stream, one entry per layer; None where the model has no branch."""

    text: tuple[KV, ...] | None = None
    image: tuple[KV, ...] | None = None
    face: tuple[KV, ...] | None = None


@dataclass(frozen=True)
class AudioKV:
    """What some latent frames hear, per layer: tensors [B, F, ...], here keys and values [B, F, W, heads, head_dim].

    valid [F, W], or [B, F, W] where it differs; None: all tokens.
    """

    layers: tuple[tuple[Tensor, ...], ...]
    valid: Tensor | None = None

    def select(self, frames: slice) -> AudioKV:
        """The same for a slice of the latent frames."""
        valid = None if self.valid is None else self.valid[..., frames, :]
        return AudioKV(tuple(tuple(t[:, frames] for t in layer) for layer in self.layers), valid)

    @staticmethod
    def join(parts: Sequence[AudioKV]) -> AudioKV:
        """Consecutive latent frames as one."""
        layers = tuple(
            tuple(torch.cat(same, dim=1) for same in zip(*layer, strict=True))
            for layer in zip(*(p.layers for p in parts), strict=True)
        )
        known = [p.valid for p in parts if p.valid is not None]
        if not known:
            return AudioKV(layers, None)
        batch = known[0].shape[:-2]
        valid = [known[0].new_ones(*batch, *p.shape) if p.valid is None else p.valid for p in parts]
        return AudioKV(layers, torch.cat(valid, dim=-2))

    @property
    def shape(self) -> tuple[int, int]:
        """Latent frames and tokens of each: (F, W)."""
        frames, tokens = self.layers[0][0].shape[1:3]
        return frames, tokens


class Context(Protocol):
    """What the window may see of the past; KVCache is one."""

    def context(self, layer: int) -> KV:
        """Keys before RoPE and values, [B, L, heads, head_dim]."""
        ...


@dataclass(frozen=True)
class Past:
    """A context and the temporal RoPE index of each of its latent frames, in its order.

    reference: index of the prefilled reference (`prefill`), whose keys follow those of the latent frames; None: there
        is none. shift: by how much what lies before the stream has moved along (`reference_table`).
    """

    context: Context
    positions: tuple[int, ...]
    reference: int | None = None
    shift: int = 0


@dataclass(frozen=True)
class WithReference:
    """A context, or none, and behind it the keys and values of a reference, each [layers, B, R, heads, head_dim]."""

    before: Context | None
    reference: KV

    def context(self, layer: int) -> KV:
        """As Context.context, the R tokens of the reference last."""
        keys, values = self.reference[0][layer], self.reference[1][layer]
        if self.before is None:
            return keys, values
        past_keys, past_values = self.before.context(layer)
        return torch.cat([past_keys, keys], dim=1), torch.cat([past_values, values], dim=1)


class Attention(nn.Module):
    """Queries, keys and values of tokens, by head; queries and keys normalised over all heads."""

    def __init__(self, config: ModelConfig, ops: Any, attention: AttentionFn) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.eps, self.attention = config.heads, config.eps, attention
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim) for _ in range(4))
        self.norm_q = ops.RMSNorm(dim, eps=config.eps)
        self.norm_k = ops.RMSNorm(dim, eps=config.eps)

    def queries(self, x: Tensor) -> Tensor:
        """[.., L, D] -> [.., L, heads, head_dim]"""
        return self._heads(self.norm_q(self.q(x)))

    def kv(self, x: Tensor) -> KV:
        """[.., L, D] -> keys and values [.., L, heads, head_dim]."""
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


@dataclass(frozen=True)
class Stacked:
    """Weights of several linear layers as one product: weight [n D', D], bias [n D']; the layers' own are parts of it.

    Made by `fast.stack_projections`.
    """

    weight: Tensor
    bias: Tensor

    def holds(self, *layers: nn.Module) -> bool:
        """Whether the layers still are what was stacked: plain, at the same place, nothing hung onto them."""
        step = self.weight.stride(0) * self.weight.element_size() * (len(self.weight) // len(layers))
        first = self.weight.data_ptr()
        return all(
            type(layer) is nn.Linear and not is_hooked(layer) and layer.weight.data_ptr() == first + i * step
            for i, layer in enumerate(layers)
        )


def is_hooked(layer: nn.Module) -> bool:
    """Whether something is to happen before or after a layer that a shortcut past it would leave out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _norm_left(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x and the weight of a norm that a kernel is to do; or what the layer makes of x, where it is not a plain one."""
    if type(norm) is nn.RMSNorm and not is_hooked(norm) and norm.weight.device == x.device:
        return x, norm.weight
    return norm(x), None


class SelfAttention(Attention):
    """Window attends to [past, window]; keys leave before rotation so that they can be cached."""

    stacked: Stacked | None = None

    def forward(
        self, x: Tensor, table: Table, past: KV | None, mask: Tensor | None, kept: slice = EVERY
    ) -> tuple[Tensor, KV]:
        """x [B, L, D]; table rotates the window, and past keys where there are any -> output, (keys, values) of the
        kept tokens.
        """
        q, k, v = self._projected(x)
        v = self._heads(v)
        turned = self._turned if kernels.take(q, k) else self._rotated
        q, keys, k = turned(q, k, table, None if past is None else past[0], kept)
        values = v if past is None else torch.cat([past[1], v], dim=1)
        v = kept_of(v, kept)
        return self.o(self.attention(q, keys, values, mask).flatten(-2)), (k, v)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> queries, keys and values before their norms, [B, L, D]."""
        if self.stacked is not None and self.stacked.holds(self.q, self.k, self.v):
            q, k, v = F.linear(x, self.stacked.weight, self.stacked.bias).chunk(3, dim=-1)
            return q, k, v
        return self.q(x), self.k(x), self.v(x)

    def _rotated(
        self, q: Tensor, k: Tensor, table: Table, past: Tensor | None, kept: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q and k before their norms, past keys [B, P, heads, d] -> rotated queries [B, L, heads, d], rotated keys of
        all [B, P + L, heads, d], and keys before rotation of the kept tokens.
        """
        q, k = self._heads(self.norm_q(q)), self._heads(self.norm_k(k))
        keys = k if past is None else torch.cat([past, k], dim=1)
        return rotate(q, table.window), rotate(keys, table.all), kept_of(k, kept)

    def _turned(
        self, q: Tensor, k: Tensor, table: Table, past: Tensor | None, kept: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same by kernels, which write each where it is to be."""
        (q, weight_q), (k, weight_k) = _norm_left(self.norm_q, q), _norm_left(self.norm_k, k)
        batch, window, width = q.shape
        before = 0 if past is None else past.shape[1]
        start, stop, _ = kept.indices(window)
        like = (self.heads, width // self.heads)
        queries, keys = q.new_empty(batch, window, *like), q.new_empty(batch, before + window, *like)
        own = k.new_empty(batch, stop - start, *like)
        turns = torch.view_as_real(table.all)
        kernels.turn_into(q, weight_q, self.eps, turns[before:], queries, None, 0)
        kernels.turn_into(k, weight_k, self.eps, turns[before:], keys[:, before:], own, start)
        if past is not None:
            kernels.turn_into(past.flatten(2), None, self.eps, turns[:before], keys[:, :before], None, 0)
        return queries, keys, own


@dataclass(frozen=True)
class Table:
    """Rotation of the window, and of the past followed by the window."""

    window: Tensor
    all: Tensor


class AudioProcessor(nn.Module):
    """Audio keys and values of a block (FantasyTalking's names)."""

    def __init__(self, width: int, dim: int, ops: Any) -> None:
        super().__init__()
        self.k_proj = ops.Linear(width, dim, bias=False)
        self.v_proj = ops.Linear(width, dim, bias=False)


class CrossAttention(nn.Module):
    """out = o(text + image + audio_scale * audio + face_scale * face), each an attention of the same queries."""

    def __init__(self, config: ModelConfig, ops: Any, attention: AttentionFn) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.heads, self.attention = config.heads, attention
        self.audio_scale = config.audio.scale if config.audio else 0.0
        self.face_scale = config.face.scale if config.face else 0.0
        self.q, self.o = ops.Linear(dim, dim), ops.Linear(dim, dim)
        self.norm_q = ops.RMSNorm(dim, eps=eps)
        if config.text_dim:
            self.k, self.v = ops.Linear(dim, dim), ops.Linear(dim, dim)
            self.norm_k = ops.RMSNorm(dim, eps=eps)
        if config.image_dim:
            self.k_img, self.v_img = ops.Linear(dim, dim), ops.Linear(dim, dim)
            self.norm_k_img = ops.RMSNorm(dim, eps=eps)
        if config.audio and config.audio.kind != "added":
            self.processor = AudioProcessor(config.audio.width, dim, ops)
        if config.face:
            self.to_k_ip = ops.Linear(config.face.width, dim, bias=False)
            self.to_v_ip = ops.Linear(config.face.width, dim, bias=False)

    def text_kv(self, tokens: Tensor) -> KV:
        return self._heads(self.norm_k(self.k(tokens))), self._heads(self.v(tokens))

    def image_kv(self, tokens: Tensor) -> KV:
        return self._heads(self.norm_k_img(self.k_img(tokens))), self._heads(self.v_img(tokens))

    def face_kv(self, tokens: Tensor) -> KV:
        return self._heads(self.to_k_ip(tokens)), self._heads(self.to_v_ip(tokens))

    def audio_kv(self, tokens: Tensor) -> KV:
        return self._heads(self.processor.k_proj(tokens)), self._heads(self.processor.v_proj(tokens))

    def forward(
        self, x: Tensor, frames: int, condition: Sequence[KV | None], audio: KV | None, valid: Tensor | None
    ) -> Tensor:
        """x [B, L, D]; condition: (text, image, face); audio per latent frame, valid [F, W] or [B, F, W]."""
        q = self._heads(self.norm_q(self.q(x)))
        text, image, face = condition
        out = sum(self.attention(q, *kv, None) for kv in (text, image) if kv is not None)
        if audio is not None:
            out = out + _scaled(self._attend_audio(q, frames, audio, valid), self.audio_scale)
        if face is not None:
            out = out + _scaled(self.attention(q, *face, None), self.face_scale)
        assert isinstance(out, Tensor), "a model needs at least one of text, image, audio and face"
        return self.o(out.flatten(-2))

    def _attend_audio(self, q: Tensor, frames: int, audio: KV, valid: Tensor | None) -> Tensor:
        """Each latent frame attends to its own audio tokens: the batch is B * F."""
        batch = q.shape[0]
        q = q.unflatten(1, (frames, -1)).flatten(0, 1)
        k, v = (t.flatten(0, 1) for t in audio)
        mask = None if valid is None else valid.expand(batch, -1, -1).flatten(0, 1)[:, None, None]
        return self.attention(q, k, v, mask).unflatten(0, (batch, frames)).flatten(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, config: ModelConfig, ops: Any, attention: AttentionFn) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config, ops, attention)
        self.norm3 = ops.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, ops, attention)
        self.ffn = nn.Sequential(
            ops.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), ops.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        table: Table,
        past: KV | None,
        mask: Tensor | None,
        condition: Sequence[KV | None],
        audio: KV | None,
        valid: Tensor | None,
        kept: slice = EVERY,
    ) -> tuple[Tensor, KV]:
        """x [B, L, D], time [B, F, 6, D] in float32 -> x, (keys before RoPE, values) of the kept tokens."""
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation(self.modulation, time, x)
        frames = time.shape[1]
        y, kv = self.self_attn(modulate(x, shift_sa, scale_sa, self.eps), table, past, mask, kept)
        x = _gated(x, y, gate_sa)
        x, y = _modulate_sum(
            x, self.cross_attn(self.norm3(x), frames, condition, audio, valid), shift_ff, scale_ff, self.eps
        )
        return _gated(x, self.ffn(y), gate_ff), kv


class Head(nn.Module):
    """Modulated linear head to the patch."""

    def __init__(self, config: ModelConfig, ops: Any) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = ops.Linear(config.dim, math.prod(config.patch) * config.out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time [B, F, D] -> [B, L, patch * channels]."""
        shift, scale = modulation(self.modulation, time.unsqueeze(2), x)
        return self.head(modulate(x, shift, scale, self.eps))


class JoyAvatarDiT(nn.Module):
    """The generator of JoyAvatar-Flash; with other sizes and inputs also its teacher, real score and fake score.

    Args:
        config: sizes; MODELS has the presets.
        ops: namespace of layer classes (torch.nn, or the host's for offloading and fp8).
        attention: see attention.AttentionFn.
        compute: dtype of the activations; None: that of the weights (fp8 weights need one of their own).
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Any = nn,
        attention: AttentionFn = sdpa,
        compute: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.s2v is not None:
            raise ValueError("sizes of Wan2.2-S2V: build S2VDiT (avatar.build_model knows which)")
        self.config, self.compute = config, compute
        dim, patch = config.dim, (1, *config.patch)
        self.patch_embedding = ops.Conv3d(config.in_channels, dim, patch, stride=patch)
        if config.text_dim:
            self.text_embedding = nn.Sequential(
                ops.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), ops.Linear(dim, dim)
            )
        self.time_embedding = nn.Sequential(ops.Linear(config.freq_dim, dim), nn.SiLU(), ops.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), ops.Linear(dim, 6 * dim))
        if config.image_dim:
            self.img_emb = ImageProjector(config.image_dim, dim, ops)
        if config.audio and config.audio.kind == "added":
            self.audio_proj = AudioPack(config.audio, ops)
            self.audio_cond_projs = nn.ModuleList(ops.Linear(config.audio.width, dim) for _ in config.audio_layers)
        elif config.audio:
            projector = AudioTokenProjector if config.audio.kind == "tokens" else AudioWindowProjector
            self.proj_model = projector(config.audio, ops)
        if config.face:
            self.face_proj = FaceResampler(config.face, ops, attention)
        self.blocks = nn.ModuleList(Block(config, ops, attention) for _ in range(config.layers))
        self.head = Head(config, ops)

    def condition(
        self, text: Tensor | None = None, image: Tensor | None = None, face: Tensor | None = None
    ) -> ConditionKV:
        """Keys and values of what does not change: computed once per stream.

        Args:
            text: [B, L, text_dim], padded with zeros to text_len here (all positions are attended, as in Wan2.1).
            image: [B, L, image_dim] image tokens (CLIP-vision: 257 of 1280).
            face: [B, features] face embedding.
        """
        attend = [cast(Block, b).cross_attn for b in self.blocks]
        parts: dict[str, tuple[KV, ...]] = {}
        if self.config.text_dim:
            tokens = self.text_embedding(_padded(_given("text", text), self.config.text_len))
            parts["text"] = tuple(a.text_kv(tokens) for a in attend)
        if self.config.image_dim:
            tokens = self.img_emb(_given("image", image))
            parts["image"] = tuple(a.image_kv(tokens) for a in attend)
        if self.config.face and face is not None:
            tokens = self.face_proj(face)
            parts["face"] = tuple(a.face_kv(tokens) for a in attend)
        return ConditionKV(**parts)

    def audio(self, tokens: Tensor, valid: Tensor | None = None, manner: Tensor | None = None) -> AudioKV:
        """Front-end tokens [B, F, W, C], valid [F, W] or [B, F, W] -> keys and values: computed once per block.

        manner [B, F, T, K]: what is drawn beside what is heard; models that are not told it (`AudioConfig.limits`) do
        without.

        Packed audio ("added") gives one [B, F, 1, D] for each of `config.audio_layers` instead.
        """
        if self._adds:
            packed = self.audio_proj(tokens).unsqueeze(2)
            return AudioKV(tuple((project(packed),) for project in self.audio_cond_projs), None)
        if self.config.audio and self.config.audio.kind == "window":
            manner = manner if self.config.audio.takes_manner else None
            return self.audio_of(self.proj_model(tokens, manner))  # the projector has mixed the tokens: all are valid
        return self.audio_of(self.proj_model(tokens), valid)

    def told(self, readings: Tensor) -> AudioKV:
        """Readings [B, F, T, K] in place of front-end tokens (`AudioWindowProjector`) -> keys and values."""
        return self.audio_of(cast(AudioWindowProjector, self.proj_model).lay_out(readings))

    def audio_of(self, projected: Tensor, valid: Tensor | None = None) -> AudioKV:
        """Projected tokens [B, F, W, D] -> keys and values."""
        return AudioKV(tuple(cast(Block, b).cross_attn.audio_kv(projected) for b in self.blocks), valid)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        positions: Sequence[int],
        condition: ConditionKV,
        audio: AudioKV | None = None,
        past: Past | None = None,
        mask: Tensor | None = None,
        kept: slice = EVERY,
    ) -> tuple[Tensor, list[KV]]:
        """Velocity of a window of latents.

        Args:
            x: [B, in_channels, F, h, w] noisy latents (and mask and image channels).
            timesteps: [B, F] or [F], 0 .. 1000, after the warp.
            positions: temporal RoPE index of each latent frame.
            condition, audio: from `condition` and `audio`.
            past: finished blocks the window may see.
            mask: optional boolean [L, past + L] (True: may attend), for training.
            kept: latent frames whose keys and values are handed out; those of the others live no longer than a layer.

        Returns:
            velocity [B, out_channels, F, h, w] in the dtype of x, and per layer keys before RoPE and values of `kept`.
        """
        frames, h, w = x.shape[2:]
        assert len(positions) == frames == timesteps.shape[-1], (len(positions), frames, timesteps.shape)
        table = self.table(tuple(positions), past, (h, w), x.device)
        return self.denoise(x, timesteps, table, condition, audio, past and past.context, mask, kept)

    def denoise(
        self,
        x: Tensor,
        timesteps: Tensor,
        table: Table,
        condition: ConditionKV,
        audio: AudioKV | None = None,
        past: Context | None = None,
        mask: Tensor | None = None,
        kept: slice = EVERY,
    ) -> tuple[Tensor, list[KV]]:
        """`forward` for positions that are a table already: tensors in, tensors out, nothing for the host to know."""
        batch, _, frames, h, w = x.shape
        tokens = self._embed(x)
        time = self._time(timesteps.expand(batch, frames), tokens.dtype)  # [B, F, D]
        levels = self.time_projection(time).unflatten(-1, (6, -1))
        of_latent = math.prod(self._grid((h, w)))
        tokens, kvs = self._layers(
            tokens, levels, table, condition, audio, past, mask, _tokens_of(kept, frames, of_latent)
        )
        out = self._unpatchify(self.head(tokens, time), frames, h, w).to(x.dtype)
        if self.config.prediction == "x0":
            out = flow.to_velocity(x[:, : self.config.out_channels], out, timesteps)
        return out, kvs

    def prefill(
        self,
        x: Tensor,
        condition: ConditionKV,
        position: int,
        motion: Tensor | None = None,
        audio: AudioKV | None = None,
    ) -> list[KV]:
        """Keys before RoPE and values of a reference, made once and seen by all blocks: a clean latent frame alone.

        Args:
            x: [B, in_channels, 1, h, w] its latent (and mask and image channels); a generated one, later, as well.
            condition: as in `forward`. position: RoPE index it is made at.
            motion: [B, out_channels, n, h, w] latents of a still past, for families that take one.
            audio: what it hears, for families that let it.
        """
        return self(x, x.new_zeros(1), (position,), condition, audio)[1]

    def reference_table(self, position: int, shift: int, size: tuple[int, int], device: torch.device) -> Tensor:
        """Rotation of what `prefill` gave for latents of `size` (h, w), the reference at an index of its own.

        shift: by how much tokens of a past before the stream are moved along, in families that have some.
        """
        return rotary_table((position,), self._grid(size), self.config.head_dim, self._compute, device)

    def _layers(
        self,
        tokens: Tensor,
        levels: Tensor,
        table: Table,
        condition: ConditionKV,
        audio: AudioKV | None = None,
        past: Context | None = None,
        mask: Tensor | None = None,
        kept: slice = EVERY,
    ) -> tuple[Tensor, list[KV]]:
        """All blocks: tokens [B, L, D], levels [B, F, 6, D] -> tokens for the head, keys before RoPE and values of the
        kept tokens.
        """
        kvs: list[KV] = []
        for i, block in enumerate(self.blocks):
            tokens = self._inject(i, tokens, audio)
            tokens, kv = block(
                tokens,
                levels,
                table,
                past.context(i) if past else None,
                mask,
                [kv and kv[i] for kv in (condition.text, condition.image, condition.face)],
                self._attended(i, audio),
                audio and audio.valid,
                kept,
            )
            kvs.append(kv)
        return self._inject(len(self.blocks), tokens, audio), kvs

    def _attended(self, layer: int, audio: AudioKV | None) -> KV | None:
        """Audio keys and values for the cross-attention of a layer."""
        return None if audio is None or self._adds else cast(KV, audio.layers[layer])

    def _inject(self, layer: int, tokens: Tensor, audio: AudioKV | None) -> Tensor:
        """Tokens [B, L, D] on their way into a layer, or (layer = number of layers) into the head: families whose
        audio goes there, and not into the cross-attention, add it here.
        """
        if audio is None or not self._adds or layer not in self.config.audio_layers:
            return tokens
        (added,) = audio.layers[layer - self.config.audio_layers.start]
        return (tokens.unflatten(1, (added.shape[1], -1)) + added).flatten(1, 2)

    @property
    def _adds(self) -> bool:
        return self.config.audio is not None and self.config.audio.kind == "added"

    def _embed(self, x: Tensor) -> Tensor:
        """[B, C, F, h, w] -> [B, L, D]; one memory layout, so that a loaded state cannot change the bits."""
        x = x.to(self._compute).contiguous()
        return self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()

    def _time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, F] -> time embedding [B, F, D]"""
        half = self.config.freq_dim // 2
        wide = torch.float32 if timesteps.device.type == "mps" else torch.float64  # MPS has no float64
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=wide, device=timesteps.device) / half)
        angles = timesteps.to(wide)[..., None] * frequency
        return self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))

    @property
    def _compute(self) -> torch.dtype:
        """Of the activations."""
        return self.compute or self.patch_embedding.weight.dtype

    def table(
        self, positions: tuple[int, ...], past: Past | None, size: tuple[int, int], device: torch.device
    ) -> Table:
        """Rotation of a window of latents of `size` (h, w) at these indices, and of what it sees of the past."""
        grid = self._grid(size)
        before = past.positions if past else ()
        table = rotary_table((*before, *positions), grid, self.config.head_dim, self._compute, device)
        start = len(before) * math.prod(grid)
        window = table[start:]
        if past is None or past.reference is None:
            return Table(window, table)
        between = self.reference_table(past.reference, past.shift, size, device)
        return Table(window, torch.cat([table[:start], between, window]))

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of size (h, w)."""
        return size[0] // self.config.patch[0], size[1] // self.config.patch[1]

    def _unpatchify(self, x: Tensor, frames: int, h: int, w: int) -> Tensor:
        """[B, L, (p q c)] -> [B, C, F, h, w]"""
        p, q = self.config.patch
        x = x.unflatten(1, (frames, h // p, w // q)).unflatten(-1, (p, q, -1))  # [B, F, rows, cols, p, q, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def modulation(table: Tensor, time: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Learned table [1, n, D] + time [B, F, n or 1, D], summed in float32 -> n tensors [B, F, 1, D]."""
    wide = torch.promote_types(like.dtype, torch.float32)
    levels = (table.to(time.device, wide).unsqueeze(1) + time.to(wide)).to(like.dtype)
    return tuple(level.unsqueeze(2) for level in levels.unbind(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then per-latent scale and shift. x [B, L, D], shift and scale [B, F, 1, D]."""
    if kernels.take(x, shift, scale):
        return kernels.modulated_norm(x, shift, scale, eps)
    frames = shift.shape[1]
    y = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (frames, -1))
    return torch.addcmul(shift, y, 1 + scale).flatten(1, 2)


def _modulate_sum(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and what `modulate` makes of it."""
    if kernels.take(x, y, shift, scale):
        return kernels.added_modulated_norm(x, y, shift, scale, eps)
    x = x + y
    return x, modulate(x, shift, scale, eps)


def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y per latent frame."""
    if kernels.take(x, y, gate):
        return kernels.gated(x, y, gate)
    frames = gate.shape[1]
    return torch.addcmul(x.unflatten(1, (frames, -1)), y.unflatten(1, (frames, -1)), gate).flatten(1, 2)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else scale * x


def _tokens_of(latents: slice, frames: int, tokens: int) -> slice:
    """Tokens of some of a window's latent frames, which have so many each."""
    if latents == EVERY:
        return EVERY
    start, stop, _ = latents.indices(frames)
    return slice(start * tokens, stop * tokens)


def _padded(text: Tensor, length: int) -> Tensor:
    if text.shape[1] > length:
        raise ValueError(f"text of {text.shape[1]} tokens: the model takes at most {length}; shorten the prompt")
    return F.pad(text, (0, 0, 0, length - text.shape[1]))


def _given(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"this model needs {name} tokens and got none; connect the {name} encoder")
    return value
