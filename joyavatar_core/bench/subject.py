"""What is measured: systems with random weights, made on their device in their precision, and rollouts at work.

Speed does not depend on the weights, so random ones serve. Nothing is made in float32 first: 14B would take 56 GB so.

Shape legend: B batch, C latent channels, n latents, h w latent size, H W pixels, L tokens, W audio tokens of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionFn, fitting
from ..audio import AudioFrontEnd, AudioTokens, AudioTrack, LogMel
from ..autoencoder import AUTOENCODERS, LightAutoencoder
from ..avatar import (
    Avatar,
    Encoded,
    FrontEndMaker,
    build_model,
    folded,
    load_embedded,
    random_embedded,
    takes_reference_tokens,
)
from ..conditioning import ImageChannels
from ..config import MODELS, ModelConfig
from ..geometry import Geometry
from ..model import JoyAvatarDiT
from ..policy import RolloutPolicy
from ..rollout import Condition, Fast, Rollout, RolloutState
from ..wan_vae import WanVAE, WanVAEConfig
from ..wav2vec import TokenWindows, Wav2Vec2Windows, samples_of

CLIP_TOKENS = 257
SIZES = {"tiny": (256, 256), "flash-1.3b": (512, 512), "teacher-14b": (384, 704)}
"""Configurations that are measured, and (width, height) where none is asked for."""

Weights = Literal["bf16", "fp8", "offload"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Setup:
    """What is measured: a system, a picture [1, 3, H, W], the encoders' outputs, blocks to make.

    hears, writes: what stands in where a package is missing, in words; empty: the real thing.
    """

    avatar: Avatar
    picture: Tensor
    blocks: int
    encoded: Encoded = field(default_factory=Encoded)
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)
    hears: str = ""

    @property
    def geometry(self) -> Geometry:
        return self.avatar.geometry((self.picture.shape[3], self.picture.shape[2]), self.policy)

    @property
    def frames(self) -> int:
        return self.geometry.frames_of_block(self.blocks - 1).stop

    def rollout(self) -> Rollout:
        """The model's rollout with random conditions, without anything around it."""
        settled = self.avatar.autoencoder.settled_latents
        avatar = self.avatar
        return random_rollout(avatar.model, self.policy, self.geometry, avatar.device, settled, fast=avatar.fast)


class Borrowed(nn.Linear):
    """A layer whose weight lies elsewhere, or in fewer bits, and is brought for each use, as the host's layers do."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.device, input.dtype)
        return F.linear(input, self.weight.to(input.device, input.dtype, copy=True), bias)


_BORROWING = SimpleNamespace(**{**vars(nn), "Linear": Borrowed})


def random_module(build: Callable[[], ModuleT], device: torch.device, dtype: torch.dtype, seed: int = 0) -> ModuleT:
    """A module with random weights that keep variance, made on its device in its precision; on meta: without."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).eval().requires_grad_(False)
    if device.type == "meta":
        return module
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif p.dim() == 1 or name.endswith("gamma"):
            p.fill_(1)
        else:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
    return module


def random_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    weights: Weights = "bf16",
    attention: AttentionFn = fitting,
    home: torch.device | None = None,
) -> JoyAvatarDiT:
    """A transformer with random weights.

    weights: "fp8" stores the matrices of the blocks in eight bits, "offload" leaves them at `home` (the CPU).
    """
    ops: Any = nn if weights == "bf16" else _BORROWING
    place = (home or torch.device("cpu")) if weights == "offload" else device
    model = random_module(lambda: build_model(config, ops, attention, dtype), place, dtype)
    for layer in model.blocks.modules():
        if weights == "fp8" and isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return _keep_matrices(model, device) if weights == "offload" else model


def _keep_matrices(model: JoyAvatarDiT, device: torch.device) -> JoyAvatarDiT:
    """All of a model to the device but the matrices of its blocks."""
    kept = {id(m.weight) for m in model.blocks.modules() if isinstance(m, nn.Linear)}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in kept:
                module._parameters[name] = nn.Parameter(p.to(device), requires_grad=False)
    return model


def random_light(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LightAutoencoder:
    """The light autoencoder that belongs to a model's latents, folded."""
    name = {16: "taew2_1", AUTOENCODERS["tiny"].latent_channels: "tiny"}.get(config.out_channels)
    widths = AUTOENCODERS[name] if name else replace(AUTOENCODERS["tiny"], latent_channels=config.out_channels)
    return folded(random_module(lambda: LightAutoencoder(widths), device, dtype), device, dtype)


def random_wan(device: torch.device, dtype: torch.dtype, config: WanVAEConfig | None = None) -> WanVAE:
    """Wan2.1's autoencoder."""
    return random_module(lambda: WanVAE(config or WanVAEConfig()), device, dtype)


def random_setup(
    config: ModelConfig, size: tuple[int, int], device: torch.device, dtype: torch.dtype, blocks: int
) -> Setup:
    """A whole system with random weights, all conditions of its kind on.

    Its light autoencoder both encodes and decodes. size: (width, height).
    """
    make, hears = _front_end(config, device)
    model, autoencoder = random_model(config, device, dtype), random_light(config, device, dtype)
    avatar = Avatar(model, autoencoder, make, device, dtype, size=size)
    encoded = _encoded(config, torch.Generator().manual_seed(0))
    return Setup(avatar, _picture(size).to(dtype), blocks, encoded, hears=hears)


def embedded_setup(random: bool, size: tuple[int, int], device: torch.device, dtype: torch.dtype, blocks: int) -> Setup:
    """The embedded model, with its own weights or random ones."""
    avatar = (random_embedded if random else load_embedded)(device=str(device), dtype=dtype)
    make, hears = _front_end(avatar.model.config, device)
    return Setup(replace(avatar, front_end=make), _picture(size), blocks, hears=hears)


def _picture(size: tuple[int, int]) -> Tensor:
    """Soft noise [1, 3, H, W] in [-1, 1]."""
    picture = torch.rand(1, 3, size[1], size[0], generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.avg_pool2d(picture, 9, 1, 4)


def random_rollout(
    model: JoyAvatarDiT,
    policy: RolloutPolicy,
    geometry: Geometry,
    device: torch.device,
    settled: int,
    dtype: torch.dtype | None = None,
    fast: Fast | None = None,
) -> Rollout:
    """A rollout with random text, image, face and picture of which the first `settled` latents differ."""
    config = model.config
    dtype = dtype or model.compute or cast(Tensor, model.patch_embedding.weight).dtype
    made = _encoded(config, torch.Generator().manual_seed(1), geometry.tokens_per_latent)
    given = (None if t is None else t.to(device, dtype) for t in (made.text, made.image, made.face))
    with torch.inference_mode(device.type != "meta"):
        kv = model.condition(*given)
    channels = None
    if config.has_image_channels:
        shape = (1, config.in_channels - config.out_channels, settled, *geometry.latent_size)
        channels = ImageChannels(torch.zeros(shape, dtype=dtype, device=device), config.mask_channels == 1)
    return Rollout(model, policy, geometry, Condition(kv, channels), 0, device, dtype, fast=fast or Fast())


def steady_state(rollout: Rollout) -> RolloutState:
    """As after many blocks: the cache and the window full, a motion frame; contents are random."""
    policy, geometry = rollout.policy, rollout.geometry
    state = rollout.start()
    state.window = policy.bootstrap + policy.lead_blocks + policy.context_blocks
    first = policy.first_block(state.window)
    for cache in state.caches:
        cache.committed = first
        for tensor in (cache.keys, cache.values):
            if tensor.device.type != "meta":
                tensor.copy_(torch.randn(tensor.shape[1:], device=tensor.device))  # eight bits are not drawn themselves
    channels = rollout.model.config.out_channels
    state.motion = torch.randn(rollout.batch, channels, 1, *geometry.latent_size).to(rollout.device)
    heard = [*range(first - 1, state.window), *([0] if policy.picture_alone else [])]
    state.audio = {block: _heard(rollout, block) for block in heard}
    return state


def run_steady_window(rollout: Rollout, state: RolloutState) -> None:
    """The next window, with something to hear for the block that enters it."""
    state.audio[state.window] = _heard(rollout, state.window)
    rollout.run_window(state)


def audio_tokens(config: ModelConfig, geometry: Geometry) -> int:
    """W: audio tokens of a latent frame."""
    if config.audio is None:
        return 1
    return config.audio.window or TokenWindows(geometry).width


def _heard(rollout: Rollout, block: int) -> AudioTokens:
    config = rollout.model.config
    return random_tokens(
        len(rollout.geometry.latents_of_block(block)),
        audio_tokens(config, rollout.geometry),
        config.audio.features if config.audio else 1,
        block,
    )


def random_tokens(latents: int, width: int, channels: int, seed: int) -> AudioTokens:
    """Noise in place of an audio encoder's tokens, all valid."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(latents, width, channels, generator=generator)
    return AudioTokens(tokens, torch.ones(latents, width, dtype=torch.bool))


def _encoded(config: ModelConfig, generator: torch.Generator, reference: int = 0) -> Encoded:
    """Random outputs of the encoders; the embedded model's image tokens only where their number is given."""
    own = takes_reference_tokens(config)
    places = reference if own else CLIP_TOKENS
    return Encoded(
        text=torch.randn(1, config.text_len, config.text_dim, generator=generator) if config.text_dim else None,
        image=torch.randn(1, places, config.image_dim, generator=generator) if config.image_dim and places else None,
        face=torch.randn(1, config.face.features, generator=generator) if config.face else None,
    )


# Front ends


class Noise(AudioFrontEnd):
    """Hears as wav2vec2 would, and when it would, but gives noise: where transformers is missing."""

    def __init__(self, geometry: Geometry, channels: int, width: int) -> None:
        self.geometry, self._channels, self._width = geometry, channels, width
        self.windows = TokenWindows(geometry)

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def tokens_per_latent(self) -> int:
        return self._width

    def needs(self, latent_stop: int) -> int:
        return samples_of(self.windows.of(latent_stop - 1).stop) if latent_stop > 0 else 0

    def keeps(self, latent_start: int) -> int:
        return 0 if latent_start <= 1 else samples_of(max(1, self.windows.of(latent_start).start))

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        return random_tokens(len(latents), self._width, self._channels, latents.start)


def _front_end(config: ModelConfig, device: torch.device) -> tuple[FrontEndMaker, str]:
    """The model's front end with random weights, and in words what stands in for it."""
    audio = config.audio
    if audio is not None and audio.kind == "window":
        return _log_mel(audio.features // audio.columns)
    if audio is not None and audio.kind == "tokens" and audio.features == MODELS["flash-1.3b"].audio.features:  # pyright: ignore
        try:
            from transformers import Wav2Vec2Config, Wav2Vec2Model
        except ImportError:
            return _noise(config), "noise for wav2vec2 (transformers is not installed)"
        with torch.random.fork_rng(devices=[]):
            encoder = cast(nn.Module, Wav2Vec2Model(Wav2Vec2Config())).to(device).eval().requires_grad_(False)
        return lambda geometry: Wav2Vec2Windows(cast(Any, encoder), geometry), ""
    return _noise(config), "noise for the audio encoder"


def _noise(config: ModelConfig) -> FrontEndMaker:
    channels = config.audio.features if config.audio else 1
    return lambda geometry: Noise(geometry, channels, audio_tokens(config, geometry))


def _log_mel(mels: int) -> tuple[FrontEndMaker, str]:
    try:
        import librosa  # noqa: F401
    except ImportError:
        filters = torch.rand(mels, LogMel.n_fft // 2 + 1, generator=torch.Generator().manual_seed(0)) / 100
        return lambda geometry: LogMel(geometry, mels, filters=filters), "random mel filters (librosa is not installed)"
    return lambda geometry: LogMel(geometry, mels), ""
