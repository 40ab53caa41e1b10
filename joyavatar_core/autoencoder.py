"""The light causal autoencoder (TAEHV kind): frame-wise 2-D convolutions joined in time by memory blocks.

One class serves twice: with small widths it is the embedded model's autoencoder, with the published widths and keys
it is the fast decoder for Wan latents (TAEHV's taew2_1 and taew2_2, LightX2V's lighttaew2_1). It streams by nature: a
memory block sees its own previous input and nothing else of the past, so all memory is one frame per block.

Shape legend: B batch, T pixel frames, F latent frames, C channels, H W pixel size, h w latent size; inside the
layers time is folded into the batch axis: [(B T), C, H, W].

Causality: three copies of the first pixel frame stand before the clip, so latent 0 holds frame 0 and latent i >= 1
frames 4i-3 .. 4i. The decoder makes four frames of every latent and the first three are dropped. The published
encoders were trained with the copies behind the clip instead: their latent i is made of frames 4i .. 4i+3 (`ahead`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import CheckpointError, config_from_json
from .types import StreamTensors
from .wan_vae import WanVAEConfig

logger = logging.getLogger(__name__)

TEMPORAL = 4
_ENCODER_STRIDES = (2, 2, 1)
_DECODER_STRIDES = (1, 2, 2)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths of the light autoencoder; the defaults are those of taew2_1.

    patch: pixel-unshuffle at the input and pixel-shuffle at the output; spatial compression is 8 * patch.
    latent_mean, latent_std: per channel; empty for models whose latents are normalised already.
    ahead: latent i is encoded from frames 4i .. 4i+3 (the published ones), and not from 4i-3 .. 4i.
    last_blocks: memory blocks of half the inner width at the frames' own rate, before the decoder's last convolution;
    TAEHV has none.
    """

    latent_channels: int = 16
    patch: int = 1
    encoder_widths: tuple[int, int, int] = (64, 64, 64)
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_blocks: tuple[int, int, int] = (3, 3, 3)
    decoder_blocks: tuple[int, int, int] = (3, 3, 3)
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    ahead: bool = False
    last_blocks: int = 0

    @property
    def spatial(self) -> int:
        return 8 * self.patch


AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "tiny": AutoencoderConfig(  # the embedded model: 16x16x4 with 48 channels, the latent shape of Wan 2.2
        latent_channels=48,
        patch=2,
        encoder_widths=(32, 64, 96),
        decoder_widths=(128, 96, 64, 32),
        encoder_blocks=(1, 2, 2),
        decoder_blocks=(1, 3, 3),
        last_blocks=1,
    ),
    "taew2_1": AutoencoderConfig(ahead=True),
    "taew2_2": AutoencoderConfig(latent_channels=48, patch=2, ahead=True),
}


class Clamp(nn.Module):
    """Soft limit of the latents to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Residual block that sees its input and its previous input; `inner` is the width between its convolutions."""

    def __init__(self, width: int, ops: Any, inner: int | None = None) -> None:
        super().__init__()
        conv, inner = ops.Conv2d, inner or width
        self.conv = nn.Sequential(
            conv(2 * width, inner, 3, padding=1),
            nn.ReLU(),
            conv(inner, inner, 3, padding=1),
            nn.ReLU(),
            conv(inner, width, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TemporalPool(nn.Module):
    """`stride` frames to one by a 1x1 convolution over their channels."""

    def __init__(self, width: int, stride: int, ops: Any) -> None:
        super().__init__()
        self.stride = stride
        self.conv = ops.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.permute(0, 2, 3, 1).unflatten(0, (-1, self.stride))  # [n, s, h, w, C]: the layout convolutions like
        return self.conv(frames.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2))


class TemporalGrow(nn.Module):
    """One frame to `stride` frames by a 1x1 convolution."""

    def __init__(self, width: int, stride: int, ops: Any) -> None:
        super().__init__()
        self.stride = stride
        self.conv = ops.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (self.stride, -1))  # [n, h, w, s, C]
        return frames.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


class FoldedGrow(nn.Module):
    """Upsample (nearest, 2x), TemporalGrow and the 3x3 convolution after it as one convolution on the small picture.

    There is no nonlinearity between the three, so they are one linear map. Seen from the small picture each of the
    four output phases is a 2x2 kernel: 4/9 of the multiplications, and the large picture is written once.
    """

    def __init__(self, grow: TemporalGrow, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = grow.stride
        self.width = conv.out_channels
        self.weight: Tensor
        self.register_buffer("weight", _fold(grow, conv), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = F.conv2d(x, self.weight, padding=1).permute(0, 2, 3, 1)  # [n, h + 1, w + 1, (2 2 s m)]
        y = y.unflatten(3, (2, 2, self.stride, self.width))
        out = y.new_empty(n, self.stride, h, 2, w, 2, self.width)
        for a in (0, 1):
            for b in (0, 1):
                out[:, :, :, a, :, b] = y[:, a : a + h, b : b + w, a, b].permute(0, 3, 1, 2, 4)
        return out.view(n * self.stride, 2 * h, 2 * w, self.width).permute(0, 3, 1, 2)  # channels last, as it came


def _fold(grow: TemporalGrow, conv: nn.Conv2d) -> Tensor:
    """Weight [(2 2 s m), n, 2, 2] of a FoldedGrow; phase (a, b) covers rows i-1+a, i+a and columns j-1+b, j+b."""
    width = conv.in_channels
    w_time = grow.conv.weight.detach().double().reshape(grow.stride, width, -1)  # [s, k, n]
    w_space = conv.weight.detach().double()  # [m, k, 3, 3]
    w = torch.einsum("mkyx,skn->smnyx", w_space, w_time).flatten(0, 1)  # [(s m), n, 3, 3]
    rows = {0: ((0,), (1, 2)), 1: ((0, 1), (2,))}  # taps of the 3-kernel that fall on each of the two small rows
    phases = [
        torch.stack([torch.stack([w[:, :, ys][..., xs].sum((2, 3)) for xs in rows[b]], -1) for ys in rows[a]], -2)
        for a in (0, 1)
        for b in (0, 1)
    ]
    return torch.cat(phases).to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)


class LightAutoencoder(nn.Module):
    """Causal autoencoder with streaming encode and decode. Parameter names are TAEHV's.

    Args:
        config: widths; see AutoencoderConfig.
        ops: namespace of layer classes (torch.nn, or the host's).
    """

    def __init__(self, config: AutoencoderConfig, ops: Any = nn) -> None:
        super().__init__()
        self.config = config
        self.original: LightAutoencoder | None = None  # of a folded copy: what it was folded from
        self.encoder = nn.Sequential(*_encoder_layers(config, ops))
        self.decoder = nn.Sequential(*_decoder_layers(config, ops))

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def spatial(self) -> int:
        return self.config.spatial

    @property
    def settled_latents(self) -> int:
        """A memory block looks one of its frames back: two pixel frames at the first level, a latent at the others."""
        first, second, third = self.config.encoder_blocks
        return 2 + -(-first // 2) + second + third

    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, T, H, W] in [-1, 1], T = 1 + 4 (F - 1) -> latents [B, C, F, h, w], normalised."""
        if not self.config.ahead:
            return self.encode_stream(video, None)[0]
        _check_frames(video.shape[2], start=True)
        return self._encode(torch.cat([video, video[:, :, -1:].expand(-1, -1, TEMPORAL - 1, -1, -1)], dim=2), None)[0]

    def encode_stream(self, video: Tensor, state: StreamTensors | None) -> tuple[Tensor, StreamTensors]:
        """Encode the next pixel frames: 1 + 4 k of them at the start (state None), 4 k later.

        Raises ValueError for other counts, and for an encoder that looks ahead: it would need what is yet to come.
        """
        if self.config.ahead:
            raise ValueError(
                "this autoencoder's encoder looks three frames ahead, so it cannot encode piece by piece: "
                "encode the whole clip at once, or with the VAE it stands for"
            )
        _check_frames(video.shape[2], start=state is None)
        if state is None:
            video = torch.cat([video[:, :, :1].expand(-1, -1, TEMPORAL - 1, -1, -1), video], dim=2)
        return self._encode(video, state)

    def _encode(self, video: Tensor, state: StreamTensors | None) -> tuple[Tensor, StreamTensors]:
        """Pixel frames, four for every latent."""
        x = F.pixel_unshuffle(_fold_time((video + 1) / 2), self.config.patch)
        x, state = _run(self.encoder, x, video.shape[0], state)
        return self._normalise(_unfold_time(x, video.shape[0]).to(video.dtype)), state

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, F, h, w] -> video [B, 3, 1 + 4 (F - 1), H, W] in [-1, 1]."""
        return self.decode_stream(latents, None)[0]

    def decode_stream(self, latents: Tensor, state: StreamTensors | None) -> tuple[Tensor, StreamTensors]:
        """Decode the next latents, any number of them; state None at the start of a stream.

        Returns the pixel frames [B, 3, T, H, W] (T = 4 F, three fewer at the start) and the state to pass next.
        """
        video, state = self.decode_unclamped(latents, state)
        return video.clamp_(-1, 1), state

    def decode_unclamped(self, latents: Tensor, state: StreamTensors | None = None) -> tuple[Tensor, StreamTensors]:
        """`decode_stream` without the limit to [-1, 1], beyond which there is no gradient: for training."""
        start = state is None
        x, state = _run(self.decoder, _fold_time(self._denormalise(latents)), latents.shape[0], state)
        video = _unfold_time(F.pixel_shuffle(x, self.config.patch), latents.shape[0]).to(latents.dtype)
        return (video[:, :, TEMPORAL - 1 :] if start else video).mul(2).sub_(1), state

    def folded(self) -> LightAutoencoder:
        """The same autoencoder with a faster decoder, for inference only: equal up to rounding, not to be saved."""
        other = LightAutoencoder.__new__(LightAutoencoder)
        nn.Module.__init__(other)
        other.config, other.encoder = self.config, self.encoder
        object.__setattr__(other, "original", self)  # not a submodule: its weights are counted once
        other.decoder = nn.Sequential(*_fold_layers(list(self.decoder)))
        return other.eval()

    def _normalise(self, latents: Tensor) -> Tensor:
        if not self.config.latent_mean:
            return latents
        return (latents - _channels(self.config.latent_mean, latents)) / _channels(self.config.latent_std, latents)

    def _denormalise(self, latents: Tensor) -> Tensor:
        if not self.config.latent_mean:
            return latents
        return latents * _channels(self.config.latent_std, latents) + _channels(self.config.latent_mean, latents)


def _check_frames(frames: int, start: bool) -> None:
    if (frames - start) % TEMPORAL or frames == 0:
        raise ValueError(f"{frames} pixel frames: the first piece must hold 1 + 4 k frames, later ones 4 k")


def _encoder_layers(config: AutoencoderConfig, ops: Any) -> Iterable[nn.Module]:
    width = config.encoder_widths[0]
    yield ops.Conv2d(3 * config.patch**2, width, 3, padding=1)
    yield nn.ReLU()
    for level, stride in enumerate(_ENCODER_STRIDES):
        yield TemporalPool(width, stride, ops)
        yield ops.Conv2d(width, config.encoder_widths[level], 3, stride=2, padding=1, bias=False)
        width = config.encoder_widths[level]
        for _ in range(config.encoder_blocks[level]):
            yield MemoryBlock(width, ops)
    yield ops.Conv2d(width, config.latent_channels, 3, padding=1)


def _decoder_layers(config: AutoencoderConfig, ops: Any) -> Iterable[nn.Module]:
    widths = config.decoder_widths
    yield Clamp()
    yield ops.Conv2d(config.latent_channels, widths[0], 3, padding=1)
    yield nn.ReLU()
    for level, stride in enumerate(_DECODER_STRIDES):
        for _ in range(config.decoder_blocks[level]):
            yield MemoryBlock(widths[level], ops)
        yield nn.Upsample(scale_factor=2)
        yield TemporalGrow(widths[level], stride, ops)
        yield ops.Conv2d(widths[level], widths[level + 1], 3, padding=1, bias=False)
    yield nn.ReLU()
    for _ in range(config.last_blocks):
        yield MemoryBlock(widths[3], ops, widths[3] // 2)
    yield ops.Conv2d(widths[3], 3 * config.patch**2, 3, padding=1)


def _fold_layers(layers: list[nn.Module]) -> Iterable[nn.Module]:
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.Upsample):
            grow, conv = layers.pop(0), layers.pop(0)
            assert isinstance(grow, TemporalGrow) and isinstance(conv, nn.Conv2d)
            layer = FoldedGrow(grow, conv)
        yield layer


def _run(layers: nn.Sequential, x: Tensor, batch: int, state: StreamTensors | None) -> tuple[Tensor, StreamTensors]:
    """Run [(B T), C, H, W] through the layers; `state` holds the last input of each memory block, by its place."""
    blocks = [layer for layer in layers if isinstance(layer, MemoryBlock)]
    names = {layer: f"memory.{i}" for i, layer in enumerate(blocks)}
    after: StreamTensors = {}
    weight = next(p for layer in layers for p in (*layer.parameters(), *layer.buffers()))
    if not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)):
        x = x.to(weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            name = names[layer]
            frames = x.unflatten(0, (batch, -1))
            first = torch.zeros_like(frames[:, :1]) if state is None else state[name]
            after[name] = frames[:, -1:].clone()
            past = torch.cat([first, frames[:, :-1]], dim=1).flatten(0, 1)
            x = layer(x, past.contiguous(memory_format=torch.channels_last))  # a loaded state must not change the bits
        else:
            x = layer(x)
    return x, after


def _fold_time(video: Tensor) -> Tensor:
    return video.transpose(1, 2).flatten(0, 1)


def _unfold_time(frames: Tensor, batch: int) -> Tensor:
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)


# Which autoencoder a file holds

_FOREIGN = {
    "taehv": "Hunyuan Video",
    "lighttaehy": "Hunyuan Video",
    "taecvx": "CogVideoX",
    "taeos": "Open-Sora",
    "taeltx": "LTX",
    "taeh3": "MiniMax H3",
}
"""Light autoencoders of other models, by the beginnings of their file names; some have the very keys of taew2_1."""

_ENCODER_LAYOUT = re.compile("c-" + 3 * "tc(m*)" + "c")
_DECODER_LAYOUT = re.compile("-c-(m*)" + 2 * "-tc(m*)" + "-tc-(m*)c")


def light_config(name: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> AutoencoderConfig:
    """Config of a light autoencoder's file: from our metadata, else from the shapes, its name and its precision.

    name: of the file. taew2_1 and lighttaew2_1 have the same keys and shapes but other latents, see `_takes_raw`.
    Where the layout is not TAEHV's the answer is taew2_1, so that a strict loading names the keys that are wrong.
    Raises CheckpointError for the autoencoder of another model.
    """
    if "autoencoder_config" in metadata:
        return config_from_json(AutoencoderConfig, metadata["autoencoder_config"])
    stem = Path(name).stem.lower()
    model = next((model for start, model in _FOREIGN.items() if stem.startswith(start)), None)
    if model:
        raise CheckpointError(f"{name} is the light autoencoder of {model}: use taew2_1 or lighttaew2_1 for Wan2.1")
    if "decoder.1.conv.0.weight" in tensors:
        raise CheckpointError(
            f"{name} is a large variant of TAEHV ('super'), which is not known here: use the plain one"
        )
    config = _config_of_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    if not _takes_raw(stem, tensors):
        return config
    wan = WanVAEConfig()
    if config.latent_channels != wan.latent_channels:
        raise CheckpointError(
            f"{name} seems to be LightTAE for {config.latent_channels} latent channels, whose scale is not known here: "
            f"known is lighttaew2_1, of {wan.latent_channels}; a file of TAEHV's keeps its name, taew2_2"
        )
    return replace(config, latent_mean=wan.latent_mean, latent_std=wan.latent_std)


def _takes_raw(stem: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the decoder takes the VAE's own latents (LightTAE) and not the normalised ones that models make (TAEHV).

    LightX2V goes by the name alone, so it comes first; a renamed file is told by its precision: TAEHV publishes
    float16, LightTAE float32 (the host goes by that too).
    """
    if "taew" in stem:
        return "lighttaew" in stem
    first = tensors.get("decoder.1.weight")
    raw = first is not None and first.dtype != torch.float16
    logger.warning(
        "%s: taken for %s by its precision; name it taew2_1 or lighttaew2_1 if that is wrong",
        stem,
        "LightTAE" if raw else "TAEHV",
    )
    return raw


def _config_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderConfig:
    """Widths and numbers of memory blocks; those of taew2_1 or taew2_2 where the layout is another."""
    encoder, decoder = _layout(shapes, "encoder"), _layout(shapes, "decoder")
    down, up = _ENCODER_LAYOUT.fullmatch(encoder), _DECODER_LAYOUT.fullmatch(decoder)
    if not down or not up:
        first = shapes.get("decoder.1.weight", (0, 0))
        return AUTOENCODERS["taew2_2" if first[1:2] == (48,) else "taew2_1"]
    encoder_convs = [i for i, kind in enumerate(encoder) if kind == "c"]
    decoder_convs = [i for i, kind in enumerate(decoder) if kind == "c"]
    blocks = [[len(match[level]) for level in (1, 2, 3)] for match in (down, up)]
    widths = [shapes[f"decoder.{i}.weight"][0] for i in decoder_convs]
    return AutoencoderConfig(
        latent_channels=shapes["decoder.1.weight"][1],
        patch=round((widths[-1] / 3) ** 0.5),
        encoder_widths=_three(shapes[f"encoder.{i}.weight"][0] for i in encoder_convs[1:4]),
        decoder_widths=(widths[0], *_three(widths[1:4])),
        encoder_blocks=_three(blocks[0]),
        decoder_blocks=_three(blocks[1]),
        ahead=True,
        last_blocks=len(up[4]),
    )


def _three(numbers: Iterable[int]) -> tuple[int, int, int]:
    first, second, third = numbers
    return first, second, third


def _layout(shapes: Mapping[str, tuple[int, ...]], part: str) -> str:
    """A letter for every layer: c convolution, t change of the frame rate, m memory block, - without weights."""
    numbers = [int(key.split(".")[1]) for key in shapes if re.match(rf"{part}\.\d+\.", key)]
    letters = {"weight": "c", "conv.weight": "t", "conv.0.weight": "m"}
    return "".join(
        next((letter for end, letter in letters.items() if f"{part}.{i}.{end}" in shapes), "-")
        for i in range(max(numbers, default=-1) + 1)
    )
