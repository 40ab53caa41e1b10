"""The causal autoencoder of Wan2.1 (Wan2.1_VAE.pth): video to latents and back, at once or piece by piece.

Parameter names and shapes are the published ones; the code is not. Every layer that looks at the past gets it as an
argument: `_Memory` reads what the last piece left behind and writes what the next piece will need. A piece of any
length therefore gives what the whole clip would give, and no module remembers anything.

Shape legend: B batch, T pixel frames, F latent frames, C channels (in a layer: width), Z latent channels,
H W pixel size, h w latent size. Inside the layers a video is [B, C, T, H, W] with T and H W of the current level.

Causality (Wan2.1 VAE): latent 0 holds pixel frame 0, latent i >= 1 holds frames 4i-3 .. 4i. A convolution over time
sees its own frame and the two before it; before the stream there are zeros. The first frame of a stream is neither
doubled nor halved in time, and the two layers that change the frame rate treat it so:
doubling starts after it with an empty past, halving passes it on and takes it as the past of the second frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .types import StreamTensors

EncoderState = StreamTensors
DecoderState = StreamTensors

_ONEDNN_MIN_CELLS = 20480
_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class WanVAEConfig:
    """Widths of the autoencoder; the defaults are Wan2.1's.

    dim: width at pixel size; level i is `dim * multipliers[i]` wide.
    blocks: residual blocks of an encoder level (the decoder has one more).
    halve_time: for each step down in picture size, whether it halves the frame rate too.
    latent_mean, latent_std: one number per latent channel; latents leave as (mu - mean) / std.
    latents_per_pass: latents decoded together. More is no more exact, but larger kernels and more memory.
    """

    dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    halve_time: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = _WAN_MEAN
    latent_std: tuple[float, ...] = _WAN_STD
    latents_per_pass: int = 1

    def __post_init__(self) -> None:
        if len(self.latent_mean) != len(self.latent_std):
            raise ValueError(
                f"latent_mean has {len(self.latent_mean)} numbers and latent_std {len(self.latent_std)}: "
                "give one of each per latent channel"
            )
        if len(self.halve_time) != len(self.multipliers) - 1:
            raise ValueError(
                f"halve_time has {len(self.halve_time)} entries for {len(self.multipliers)} levels: "
                f"give {len(self.multipliers) - 1}"
            )
        if self.latents_per_pass < 1:
            raise ValueError(f"latents_per_pass {self.latents_per_pass} must be at least 1")

    @property
    def latent_channels(self) -> int:
        return len(self.latent_mean)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.dim * m for m in self.multipliers)

    @property
    def spatial(self) -> int:
        return 2 ** len(self.halve_time)

    @property
    def temporal(self) -> int:
        return 2 ** sum(self.halve_time)

    @property
    def encoder_reach(self) -> int:
        """Latents after its own that a pixel frame can still change (28 for Wan2.1)."""
        step, frames = 1, 2  # frame distance at this level; the first convolution reaches two frames
        for halve in (*self.halve_time, False):
            frames += self.blocks * 4 * step + (2 * step if halve else 0)
            step *= 2 if halve else 1
        frames += (2 * 4 + 2) * step  # two middle blocks and the head
        return -(-frames // step)


class _Memory:
    """The past of the layers of one pass: `past` is read, `next` is written, `at` names a part of the network."""

    def __init__(self, past: StreamTensors, after: StreamTensors, prefix: str = "") -> None:
        self._past, self._after, self._prefix = past, after, prefix

    def at(self, name: str | int) -> _Memory:
        return _Memory(self._past, self._after, f"{self._prefix}{name}.")

    def recall(self, name: str, like: Tensor) -> Tensor | None:
        """What the layer kept in the last piece; None at the start of the stream."""
        kept = self._past.get(self._prefix + name)
        return None if kept is None else kept.to(like)

    def keep(self, name: str, frames: Tensor) -> None:
        # a copy: a view would keep the whole activation alive
        self._after[self._prefix + name] = frames.clone(memory_format=torch.contiguous_format)


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x) by the faster of two equal ways; x [B, C, T, H, W] carries its past, conv pads no time.

    Layers of a host (any subclass) keep their own forward, since it places and casts the weights. So does a plain
    layer on an accelerator, or where oneDNN takes the 3-D convolution.
    """
    return convolve_as_images(conv, x) if _is_slow_in_3d(conv, x) else conv(x)


def _is_slow_in_3d(conv: nn.Conv3d, x: Tensor) -> bool:
    """True where torch on a CPU has only its generic 3-D kernel (up to 5 times slower than the 2-D one).

    That is for float64 and float16, and for float32 inputs too small for oneDNN; above that size and in bfloat16
    the 3-D kernel of oneDNN is the faster one. The choice moves the result by rounding only.
    """
    if type(conv) is not nn.Conv3d or x.device.type != "cpu":
        return False
    small = x.shape[0] == 1 and x.shape[:4].numel() <= _ONEDNN_MIN_CELLS
    return x.dtype != torch.bfloat16 and (x.dtype != torch.float32 or small)


def convolve_as_images(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x) as one 2-D convolution: the frames under the kernel's time taps are stacked on the channel axis."""
    taps, step = conv.kernel_size[0], conv.stride[0]
    count = (x.shape[2] - taps) // step + 1
    frames = x.transpose(1, 2)
    stacked = torch.cat([frames[:, tap : tap + step * (count - 1) + 1 : step] for tap in range(taps)], dim=2)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # [out, (taps in), kh, kw]
    padding, stride = cast(tuple[int, ...], conv.padding)[1:], conv.stride[1:]
    y = F.conv2d(stacked.flatten(0, 1), weight, conv.bias, stride, padding)
    return y.unflatten(0, (x.shape[0], count)).transpose(1, 2)


def _causal(conv: nn.Module, x: Tensor, memory: _Memory, name: str) -> Tensor:
    """Convolution over the frames of x and the taps - 1 frames before them; T stays."""
    conv = cast(nn.Conv3d, conv)
    reach = conv.kernel_size[0] - 1
    past = memory.recall(name, x)
    if past is None:
        past = x.new_zeros(*x.shape[:2], reach, *x.shape[3:])
    x = torch.cat([past, x], dim=2)
    memory.keep(name, x[:, :, -reach:])
    return convolve(conv, x) if x.shape[2] > reach else x[:, :0]


def _causal_layer(ops: Any, width: int, out: int) -> nn.Module:
    """3x3x3 convolution that pads the picture only; `_causal` brings the frames before."""
    return ops.Conv3d(width, out, 3, padding=(0, 1, 1))


def _each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A picture layer [N, C, H, W] on every frame of [B, C, T, H, W]."""
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channel axis (1), in float32 at least."""

    def __init__(self, width: int, axes_after: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes_after))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.normalize(wide, dim=1) * x.shape[1] ** 0.5 * self.gamma.to(wide)
        return y.to(x.dtype)


class ResidualBlock(nn.Module):
    """Twice (norm, SiLU, causal convolution), added to the input."""

    def __init__(self, width: int, out: int, ops: Any) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(width, 3),
                "2": _causal_layer(ops, width, out),
                "3": RMSNorm(out, 3),
                "6": _causal_layer(ops, out, out),
            }
        )
        self.shortcut = ops.Conv3d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        memory, part = memory.at("residual"), self.residual
        y = _causal(part["2"], F.silu(part["0"](x)), memory, "2")
        y = _causal(part["6"], F.silu(part["3"](y)), memory, "6")
        return y + self.shortcut(x)


class SpatialAttention(nn.Module):
    """Single-head attention among the cells of each frame."""

    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(width, 2)
        self.to_qkv = ops.Conv2d(width, 3 * width, 1)
        self.proj = ops.Conv2d(width, width, 1)

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        return x + _each_frame(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (three c) h w -> three n 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=x.shape[2]))


class Shrink(nn.Module):
    """Half the picture size, and half the frame rate if `time`."""

    def __init__(self, width: int, time: bool, ops: Any) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": ops.Conv2d(width, width, 3, stride=2)})
        self.time_conv = ops.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        x = _each_frame(self._half_size, x)
        return x if self.time_conv is None else self._half_rate(self.time_conv, x, memory)

    def _half_size(self, x: Tensor) -> Tensor:
        return self.resample["1"](F.pad(x, (0, 1, 0, 1)))

    def _half_rate(self, conv: nn.Conv3d, x: Tensor, memory: _Memory) -> Tensor:
        past = memory.recall("time_conv", x)
        memory.keep("time_conv", x[:, :, -1:])
        if past is None:
            assert x.shape[2] == 1, f"a stream starts with one frame, not {x.shape[2]}"
            return x
        return convolve(conv, torch.cat([past, x], dim=2))


class Grow(nn.Module):
    """Twice the picture size at half the width, and twice the frame rate if `time`."""

    def __init__(self, width: int, time: bool, ops: Any) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": ops.Conv2d(width, width // 2, 3, padding=1)})
        self.time_conv = ops.Conv3d(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        if self.time_conv is not None:
            x = self._double_rate(self.time_conv, x, memory)
        return _each_frame(self._double_size, x)

    def _double_size(self, x: Tensor) -> Tensor:
        return self.resample["1"](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))

    def _double_rate(self, conv: nn.Conv3d, x: Tensor, memory: _Memory) -> Tensor:
        single = 1 if memory.recall("time_conv", x) is None else 0
        pairs = _causal(conv, x[:, :, single:], memory, "time_conv")
        if x.shape[2] == single:
            return x
        pairs = rearrange(pairs, "b (two c) t h w -> b c (t two) h w", two=2)
        return torch.cat([x[:, :, :single], pairs], dim=2)


class _Path(nn.Module):
    """What encoder and decoder share: first convolution, middle, head, and running a row of layers."""

    def __init__(self, ends: tuple[int, int, int, int], middle: int, ops: Any) -> None:
        super().__init__()
        channels_in, first, last, channels_out = ends
        self.conv1 = _causal_layer(ops, channels_in, first)
        self.middle = nn.ModuleList(
            [ResidualBlock(middle, middle, ops), SpatialAttention(middle, ops), ResidualBlock(middle, middle, ops)]
        )
        self.head = nn.ModuleDict({"0": RMSNorm(last, 3), "2": _causal_layer(ops, last, channels_out)})

    def _enter(self, x: Tensor, memory: _Memory) -> Tensor:
        return _causal(self.conv1, x, memory, "conv1")

    def _leave(self, x: Tensor, memory: _Memory) -> Tensor:
        return _causal(self.head["2"], F.silu(self.head["0"](x)), memory.at("head"), "2")


def _run(layers: nn.ModuleList, x: Tensor, memory: _Memory) -> Tensor:
    for index, layer in enumerate(layers):
        x = layer(x, memory.at(index))
    return x


class Encoder(_Path):
    """[B, 3, T, H, W] -> [B, 2 Z, F, h, w]: mean and log-variance before the last 1x1x1 convolution."""

    def __init__(self, config: WanVAEConfig, ops: Any) -> None:
        widths = config.widths
        super().__init__((3, config.dim, widths[-1], 2 * config.latent_channels), widths[-1], ops)
        self.downsamples = nn.ModuleList(self._levels(config, ops))

    @staticmethod
    def _levels(config: WanVAEConfig, ops: Any) -> Iterator[nn.Module]:
        before = config.dim
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                yield ResidualBlock(before, width, ops)
                before = width
            if level < len(config.halve_time):
                yield Shrink(width, config.halve_time[level], ops)

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        x = _run(self.downsamples, self._enter(x, memory), memory.at("downsamples"))
        return self._leave(_run(self.middle, x, memory.at("middle")), memory)


class Decoder(_Path):
    """[B, Z, F, h, w] -> [B, 3, T, H, W]."""

    def __init__(self, config: WanVAEConfig, ops: Any) -> None:
        widths = config.widths
        super().__init__((config.latent_channels, widths[-1], widths[0], 3), widths[-1], ops)
        self.upsamples = nn.ModuleList(self._levels(config, ops))

    @staticmethod
    def _levels(config: WanVAEConfig, ops: Any) -> Iterator[nn.Module]:
        before = config.widths[-1]
        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                yield ResidualBlock(before, width, ops)
                before = width
            if level > 0:
                yield Grow(width, config.halve_time[level - 1], ops)
                before = width // 2

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        x = _run(self.middle, self._enter(x, memory), memory.at("middle"))
        return self._leave(_run(self.upsamples, x, memory.at("upsamples")), memory)


class WanVAE(nn.Module):
    """Wan2.1's autoencoder with the published parameter names. Results have the dtype of what was given.

    Args:
        config: widths; see WanVAEConfig.
        ops: namespace of layer classes (torch.nn, or the host's, which then places and casts the weights).
            With torch.nn the computation is in the dtype of the weights, else in that of the input.
        compute: dtype of the computation where that is another.
    """

    def __init__(self, config: WanVAEConfig, ops: Any = nn, compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        self.encoder = Encoder(config, ops)
        self.conv1: nn.Conv3d = ops.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2: nn.Conv3d = ops.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config, ops)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def settled_latents(self) -> int:
        return self.config.encoder_reach + 2

    @property
    def spatial(self) -> int:
        return self.config.spatial

    def encode(self, video: Tensor) -> Tensor:
        """video [B, 3, T, H, W] in [-1, 1], T = 1 + 4 (F - 1) -> latents [B, Z, F, h, w], (mu - mean) / std.

        Raises ValueError as `encode_stream` does.
        """
        return self.encode_stream(video, None)[0]

    def encode_stream(self, video: Tensor, state: EncoderState | None) -> tuple[Tensor, EncoderState]:
        """Encode the next pixel frames: 1 + 4 k of them at the start (state None), 4 k later.

        Frames are taken 1, 4, 4, ... at a time, so only the input and the latents grow with T.

        Returns latents [B, Z, F, h, w] and the state to pass with the next piece; `state` itself is left as it is.
        Raises ValueError for another frame count, channel count or size, or a state of another picture size.
        """
        self._check_video(video, state)
        step, lead = self.config.temporal, 1 if state is None else 0
        sizes = [1] * lead + [step] * (video.shape[2] // step)
        latents, after = [], state or {}
        for piece in video.split(sizes, dim=2):
            past, after = after, {}
            moments = self.encoder(self._computed(piece), _Memory(past, after, "encoder."))
            latents.append(self._normalise(self.conv1(moments).chunk(2, dim=1)[0], video.dtype))
        return torch.cat(latents, dim=2), after

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, Z, F, h, w], normalised -> video [B, 3, 1 + 4 (F - 1), H, W] in [-1, 1].

        Raises ValueError as `decode_stream` does.
        """
        return self.decode_stream(latents, None)[0]

    def decode_stream(self, latents: Tensor, state: DecoderState | None) -> tuple[Tensor, DecoderState]:
        """Decode the next latents [B, Z, F, h, w], any F >= 1 in every call; state None at the start of a stream.

        Returns video [B, 3, T, H, W] in [-1, 1] (T = 4 F, at the start 4 F - 3) and the state to pass with the next
        latents; `state` itself is left as it is, so a stream can be resumed from any point.
        Raises ValueError for no latents, another channel count, or a state of another picture size.
        """
        self._check_latents(latents, state)
        video, after = [], state or {}
        for piece in latents.split(self.config.latents_per_pass, dim=2):
            past, after = after, {}
            z = self.conv2(self._computed(self.denormalised(piece)))
            video.append(self.decoder(z, _Memory(past, after, "decoder.")).clamp(-1, 1).to(latents.dtype))
        return torch.cat(video, dim=2), after

    def _computed(self, x: Tensor) -> Tensor:
        """Layers of a host cast their weights to what comes in, or are told by `compute` what that should be."""
        if self.compute or type(self.conv1) is nn.Conv3d:
            return x.to(self.compute or self.conv1.weight.dtype)
        return x

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.tensor((self.config.latent_mean, self.config.latent_std), dtype=like.dtype, device=like.device)
        mean, std = pair.view(2, 1, -1, 1, 1, 1)
        return mean, std

    def _normalise(self, mu: Tensor, dtype: torch.dtype) -> Tensor:
        mu = mu.to(torch.promote_types(mu.dtype, torch.float32))
        mean, std = self._scale(mu)
        return ((mu - mean) / std).to(dtype)

    def denormalised(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder itself gives them, which is what the host's LATENT holds."""
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        mean, std = self._scale(wide)
        return (wide * std + mean).to(latents.dtype)

    def _check_video(self, video: Tensor, state: EncoderState | None) -> None:
        config = self.config
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] % config.spatial or video.shape[4] % config.spatial:
            raise ValueError(
                f"video {list(video.shape)} must be [B, 3, T, H, W] with H and W multiples of {config.spatial}"
            )
        frames, step = video.shape[2], config.temporal
        if frames == 0 or (frames - (state is None)) % step:
            raise ValueError(f"{frames} pixel frames: give 1 + {step} k frames at the start, {step} k later")
        _check_state(state, "encoder.conv1", video)

    def _check_latents(self, latents: Tensor, state: DecoderState | None) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or latents.shape[2] == 0:
            raise ValueError(
                f"latents {list(latents.shape)} must be [B, {self.latent_channels}, F, h, w] with F at least 1"
            )
        _check_state(state, "decoder.conv1", latents)


def _check_state(state: StreamTensors | None, name: str, x: Tensor) -> None:
    """The first convolution remembers its input, so its entry tells which stream the state belongs to."""
    if state is None:
        return
    if name not in state:
        raise ValueError(f"the state has no {name!r}: pass what the last call returned, or None to start a stream")
    kept, wanted = list(state[name].shape), [*x.shape[:2], 2, *x.shape[3:]]
    if kept != wanted:
        raise ValueError(f"the state is of a stream {kept}, the input needs {wanted}: pass None to start a new stream")
