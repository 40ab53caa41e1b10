"""A loaded system: weights and what fits them, from which streams are made. The one place that puts the parts together.

Shape legend: B batch, H W pixels, L tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .attention import AttentionFn, fitting
from .audio import AudioFrontEnd, LogMel
from .autoencoder import AUTOENCODERS, LightAutoencoder, light_config
from .conditioning import image_channels, reference_tokens, repeated_picture
from .config import MODELS, ModelConfig
from .eight_bits import EightBits, shrink_products
from .families import PROFILES, Profile, detect_config, numbered, profile_of
from .fast import stack_projections
from .geometry import Geometry
from .model import JoyAvatarDiT
from .policy import RolloutPolicy
from .rollout import Condition, Fast, Reference, Reseed, Rollout
from .s2v import MOTION_FRAMES, S2VDiT
from .stream import AvatarStream, LatentStream
from .types import VideoAutoencoder
from .wan_vae import WanVAE, WanVAEConfig

FrontEndMaker = Callable[[Geometry], AudioFrontEnd]

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_FILES = {"model": "tiny.safetensors", "autoencoder": "tiny-autoencoder.safetensors"}


@dataclass(frozen=True)
class Encoded:
    """Outputs of the encoders a full-size model asks for; all optional.

    text [1, L, 4096] (umT5), image [1, 257, 1280] (CLIP-vision), face [1, 512].
    """

    text: Tensor | None = None
    image: Tensor | None = None
    face: Tensor | None = None


@dataclass(frozen=True)
class Avatar:
    """Weights, audio front end and frame rate of one system; makes streams.

    front_end: from a geometry to an audio front end; in models without audio it only says when sound has come.
    size: (width, height) used when none is asked for. policy: name of the one the model was trained with.
    fast: how the forwards of its streams are run; `quickened` sets it.
    """

    model: JoyAvatarDiT
    autoencoder: VideoAutoencoder
    front_end: FrontEndMaker
    device: torch.device
    dtype: torch.dtype
    fps: Fraction = Fraction(16)
    size: tuple[int, int] = (256, 256)
    policy: str = "joyavatar-flash"
    fast: Fast = field(default_factory=Fast)

    def geometry(self, size: tuple[int, int] | None, policy: RolloutPolicy) -> Geometry:
        """Geometry of a stream of (width, height) pixels. ValueError names the sizes that fit."""
        width, height = size or self.size
        return Geometry(
            width=width,
            height=height,
            fps=self.fps,
            **policy.block_sizes,
            spatial=self.autoencoder.spatial,
            patch=self.model.config.patch,
        )

    @torch.inference_mode()
    def condition(self, picture: Tensor, encoded: Encoded | None = None) -> Condition:
        """What a picture [1, 3, H, W] in [-1, 1], and the encoders' outputs, give to a whole stream."""
        encoded = encoded or Encoded()
        channels = None
        if self.model.config.has_image_channels:
            encode = repeated_picture if self.model.config.mask_channels == 1 else image_channels
            channels = encode(self.autoencoder, picture.to(self.device))
        image = encoded.image
        if image is None and channels is not None and takes_reference_tokens(self.model.config):
            image = reference_tokens(channels.picture, self.model.config.patch)
        kv = self.model.condition(
            *(None if t is None else t.to(self.device, self.dtype) for t in (encoded.text, image, encoded.face))
        )
        reference = still_reference(self.autoencoder, picture.to(self.device)) if self.model.config.s2v else None
        return Condition(kv, channels, reference)

    def stream(
        self,
        picture: Tensor,
        policy: RolloutPolicy,
        seed: int,
        encoded: Encoded | None = None,
        decoder: VideoAutoencoder | None = None,
        before_forward: Callable[[], None] = lambda: None,
        reseed: Reseed | None = None,
    ) -> AvatarStream:
        """A fresh stream for a picture [1, 3, H, W] in [-1, 1]; its size is the stream's size.

        decoder: another than the system's own. before_forward, reseed: see Rollout.
        """
        rollout = self.rollout(picture, policy, seed, encoded)
        rollout = replace(rollout, before_forward=before_forward, reseed=reseed)
        return AvatarStream(LatentStream(rollout, self.front_end(rollout.geometry)), decoder or self.autoencoder)

    def rollout(self, picture: Tensor, policy: RolloutPolicy, seed: int, encoded: Encoded | None = None) -> Rollout:
        """The rollout of a stream for a picture [1, 3, H, W] in [-1, 1]."""
        geometry = self.geometry((picture.shape[3], picture.shape[2]), policy)
        condition = self.condition(picture, encoded)
        return Rollout(self.model, policy, geometry, condition, seed, self.device, self.dtype, fast=self.fast)


def quickened(avatar: Avatar, eight_bits: EightBits = "none") -> Avatar:
    """The same on the fast path: q, k and v as one product, forwards played from recordings, eight bits as asked.

    The model itself is changed. For models of plain layers that stay on their device: not the host's, which moves them.
    Raises ValueError where the device cannot do what is asked: see eight_bits.shrink_products.
    """
    if eight_bits in ("linear", "both"):
        shrink_products(avatar.model)
    else:
        stack_projections(avatar.model)
    return replace(avatar, fast=Fast(capture=True, small_cache=eight_bits in ("kv", "both")))


def still_reference(autoencoder: VideoAutoencoder, picture: Tensor) -> Reference:
    """What Wan2.2-S2V is shown: a picture [1, 3, H, W] in [-1, 1], and a past in which it stood still."""
    frame = picture.unsqueeze(2)
    motion = autoencoder.encode(frame.expand(-1, -1, MOTION_FRAMES, -1, -1))
    return Reference(autoencoder.encode(frame), motion)


def takes_reference_tokens(config: ModelConfig) -> bool:
    """Whether the model's image tokens are patches of the picture's latent (embedded model) and not CLIP-vision's."""
    return config.image_dim == config.out_channels * config.patch[0] * config.patch[1]


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it fast, else float32.

    On a CPU that is AVX512-BF16 or AMX; torch has no public question for it yet, hence the guarded private one.
    """
    if device.type != "cpu":
        return torch.bfloat16
    fast = [name for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if hasattr(torch.cpu, name)]
    return torch.bfloat16 if any(vars(torch.cpu)[name]() for name in fast) else torch.float32


def load_embedded(
    device: str = "cpu", dtype: torch.dtype | None = None, ops: Any = nn, attention: AttentionFn = fitting
) -> Avatar:
    """The model in the package: drawn avatars, 16 fps, log-mel audio; no download."""
    model = load_model(ASSETS / EMBEDDED_FILES["model"], ops, attention)
    autoencoder = load_light_autoencoder(ASSETS / EMBEDDED_FILES["autoencoder"], ops)
    return assemble_embedded(model, autoencoder, device, dtype)


def random_embedded(
    seed: int = 0, device: str = "cpu", dtype: torch.dtype | None = None, config: ModelConfig = MODELS["tiny"]
) -> Avatar:
    """The embedded model's shapes with random weights: for benchmarks and tests of everything but the picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, autoencoder = JoyAvatarDiT(config), LightAutoencoder(AUTOENCODERS["tiny"])
    return assemble_embedded(model, autoencoder, device, dtype)


def assemble_embedded(
    model: JoyAvatarDiT, autoencoder: LightAutoencoder, device: str = "cpu", dtype: torch.dtype | None = None
) -> Avatar:
    """An Avatar of the embedded kind from its two modules, ready for inference."""
    place = torch.device(device)
    dtype = dtype or default_dtype(place)
    model = model.to(place, dtype).eval().requires_grad_(False)
    return Avatar(model, folded(autoencoder, place, dtype), LogMel, place, dtype)


def folded(autoencoder: LightAutoencoder, device: torch.device, dtype: torch.dtype) -> LightAutoencoder:
    """A light autoencoder in place, laid out and folded for speed."""
    light = autoencoder.to(device, dtype).to(memory_format=torch.channels_last)  # pyright: ignore
    return light.eval().requires_grad_(False).folded()


def load_model(
    paths: str | Path | Sequence[str | Path],
    ops: Any = nn,
    attention: AttentionFn = fitting,
    compute: torch.dtype | None = None,
) -> JoyAvatarDiT:
    """The transformer alone of `load_profiled`."""
    return load_profiled(paths, ops, attention, compute)[0]


def load_profiled(
    paths: str | Path | Sequence[str | Path],
    ops: Any = nn,
    attention: AttentionFn = fitting,
    compute: torch.dtype | None = None,
) -> tuple[JoyAvatarDiT, Profile]:
    """A transformer from a file of ours (config in the metadata) or of the Wan2.1 family (config from the shapes), and
    the system it is of.

    Several files are read as one, e.g. Wan2.1 image-to-video and FantasyTalking's audio weights, or LongLive's base and
    its LoRA. compute: see JoyAvatarDiT.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    profile = ""

    def build(metadata: dict[str, str], tensors: checkpoint.Tensors) -> JoyAvatarDiT:
        nonlocal profile
        config = config_of(metadata, tensors)
        profile = profile_of(config, metadata, paths)
        return build_model(config, ops, attention, compute)

    model = checkpoint.load_module(paths, build, "transformer")
    return model, PROFILES[profile]


def stored_model(
    tensors: checkpoint.Tensors,
    metadata: Mapping[str, str],
    name: str,
    ops: Any,
    attention: AttentionFn,
    compute: torch.dtype,
    beside: tuple[str, ...] = (),
) -> tuple[JoyAvatarDiT, Profile]:
    """As `load_profiled`, of tensors under our names that `ops` keeps in a form of its own: see checkpoint.load_stored.

    name: of the file.
    """
    config = config_of(metadata, {n: t for n, t in tensors.items() if not (beside and n.endswith(beside))})
    with torch.device("meta"):
        model, twin = build_model(config, ops, attention, compute), build_model(config)
    model = checkpoint.load_stored(model, twin, tensors, f"{name} as transformer", beside).eval()
    return model, PROFILES[profile_of(config, metadata, [name])]


def build_model(
    config: ModelConfig, ops: Any = nn, attention: AttentionFn = fitting, compute: torch.dtype | None = None
) -> JoyAvatarDiT:
    """The transformer that sizes describe, its weights not yet loaded: see JoyAvatarDiT."""
    return (S2VDiT if config.s2v else JoyAvatarDiT)(config, ops, attention, compute)


def config_of(metadata: Mapping[str, str], tensors: checkpoint.Tensors) -> ModelConfig:
    """Sizes of a transformer: from the metadata, else from the shapes. CheckpointError when it is something else."""
    if "model_config" in metadata:
        return checkpoint.config_from_json(ModelConfig, metadata["model_config"])
    return detect_config(tensors)


def load_autoencoder(path: str | Path, ops: Any = nn) -> WanVAE | LightAutoencoder:
    """The autoencoder of Wan2.1 (published names; widths from the shapes) or a light one, told apart by the names."""

    def build(metadata: dict[str, str], tensors: checkpoint.Tensors) -> WanVAE | LightAutoencoder:
        if "conv2.weight" in tensors:
            return WanVAE(detect_vae_config(tensors), ops)
        return LightAutoencoder(light_config(Path(path).name, metadata, tensors), ops)

    return checkpoint.load_module(path, build, "autoencoder")


def wan_vae_of(tensors: checkpoint.Tensors, ops: Any = nn) -> WanVAE:
    """Wan2.1's autoencoder around tensors that are in memory already. CheckpointError for another one's."""
    with torch.device("meta"):
        empty = WanVAE(detect_vae_config(tensors), ops)
    return checkpoint.load_into(empty, tensors, "the VAE").eval()


def load_light_autoencoder(path: str | Path, ops: Any = nn) -> LightAutoencoder:
    """A light autoencoder from a file of ours, or TAEHV's or LightTAE's published weights (see `light_config`)."""

    def build(metadata: dict[str, str], tensors: checkpoint.Tensors) -> LightAutoencoder:
        return LightAutoencoder(light_config(Path(path).name, metadata, tensors), ops)

    return checkpoint.load_module(path, build, "light autoencoder")


def detect_vae_config(tensors: checkpoint.Tensors) -> WanVAEConfig:
    """Widths of an autoencoder of Wan2.1's kind from its tensors. CheckpointError when it is something else."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        dim, latent_channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        levels = _vae_levels(shapes)
    except KeyError as missing:
        raise checkpoint.CheckpointError(f"not the autoencoder of Wan2.1: {missing} is missing") from missing
    known = WanVAEConfig().latent_channels
    if latent_channels != known:  # mean and deviation of the latents are not in the file
        raise checkpoint.CheckpointError(f"an autoencoder of {latent_channels} latent channels: Wan2.1's has {known}")
    return WanVAEConfig(
        dim=dim,
        multipliers=tuple(widths[-1] // dim for widths, _ in levels),
        blocks=len(levels[0][0]),
        halve_time=tuple(halves for _, halves in levels[:-1]),
    )


def _vae_levels(shapes: dict[str, tuple[int, ...]]) -> list[tuple[list[int], bool]]:
    """Of each level of the encoder: widths of its residual blocks, and whether the frame rate is halved after it."""
    levels: list[tuple[list[int], bool]] = [([], False)]
    for i in range(numbered(shapes, "encoder.downsamples")):
        layer = f"encoder.downsamples.{i}"
        if f"{layer}.resample.1.weight" in shapes:
            levels[-1] = (levels[-1][0], f"{layer}.time_conv.weight" in shapes)
            levels.append(([], False))
        else:
            levels[-1][0].append(shapes[f"{layer}.residual.2.weight"][0])
    if not all(widths for widths, _ in levels):
        raise KeyError("a residual block of encoder.downsamples")
    return levels
