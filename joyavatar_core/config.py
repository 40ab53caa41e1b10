"""Sizes of the transformer: frozen dataclasses and one table of presets. No torch here.

Sources: Wan2.1 (engine note 1.1), FantasyTalking and its relatives for audio and face (checkpoint note 3.2-3.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from .manner import HEARD, LIMITS


@dataclass(frozen=True)
class AudioConfig:
    """How audio features become keys and values.

    kind: "tokens" projects every token (FantasyTalking: Linear without bias, LayerNorm);
        "window" mixes all tokens of a latent frame into `tokens` new ones (embedded model, log-mel);
        "added" packs them into one of `width` numbers that is added to the hidden states (OmniAvatar);
        "injected" mixes those of a latent frame's pixel frames into `tokens`, attended to between layers (Wan2.2-S2V).
    features: channels of a front-end token. width: channels after the projector.
    window: tokens per latent frame that the front end gives; columns: of the spectrogram in a token; tokens: how many
        the mixing leaves; channels: its width; dilations: of its convolutions; readings: numbers it passes on of each
        pixel frame; limits: least and most of each, and of those that are drawn besides (`manner`), or none
        ("window" only).
    scale: weight of the audio term in the cross-attention sum.
    """

    kind: Literal["tokens", "window", "added", "injected"] = "tokens"
    features: int = 768
    width: int = 2048
    window: int = 0
    columns: int = 4
    tokens: int = 0
    channels: int = 0
    dilations: tuple[int, ...] = ()
    readings: int = 0
    limits: tuple[tuple[float, float], ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind in ("added", "injected") and self.window < 1:
            raise ValueError(f"{self}: this audio needs a window, the pixel frames of a latent")
        if self.kind == "window":
            self._check_window()

    def _check_window(self) -> None:
        if min(self.tokens, self.channels, self.readings) < 1:
            raise ValueError(f"{self}: a window projector needs tokens, channels and readings of at least 1")
        if self.limits and len(self.limits) < self.readings:
            raise ValueError(f"{len(self.limits)} limits of {self.readings} readings: each needs its own")
        if self.columns < 2 or self.columns % 2 or self.features % self.columns:
            raise ValueError(
                f"{self.columns} columns of a token: must be even, and features {self.features} a multiple of them"
            )
        if 2 * self.reach % self.columns or self.frames_read < 1:
            raise ValueError(
                f"a window of {self.window} tokens of {self.columns} columns: the convolutions take {self.reach} "
                "columns at either end, and whole tokens must be left"
            )

    @property
    def told(self) -> int:
        """Numbers of a pixel frame that a "window" projector lays out: its readings and those that are drawn."""
        return len(self.limits) or self.readings

    @property
    def takes_manner(self) -> bool:
        """Whether the model is told more of a pixel frame than its ears say (`manner`)."""
        return self.told > self.readings

    @property
    def reach(self) -> int:
        """Columns of the spectrogram that the convolutions of a "window" projector take before and after a frame."""
        return 2 + self.columns // 2 * (sum(self.dilations) + 1)

    @property
    def frames_read(self) -> int:
        """Pixel frames of a window that a "window" projector tells of: those whose surroundings are in it."""
        return self.window - 2 * self.reach // self.columns


@dataclass(frozen=True)
class FaceConfig:
    """Perceiver resampler of a face embedding (FantasyPortrait and Lynx give the sizes)."""

    features: int = 512
    dim: int = 1280
    depth: int = 4
    heads: int = 20
    queries: int = 16
    width: int = 2048
    scale: float = 0.5


@dataclass(frozen=True)
class S2VConfig:
    """What Wan2.2-S2V has beside Wan2.1's text to video; its audio is of the kind "injected".

    inject_layers: layers after which audio is attended to. audio_layers: hidden states of the audio encoder that are
        mixed, side by side in a front-end token.
    """

    inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    audio_layers: int = 25


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer. head_dim = dim / heads.

    text_dim, image_dim: channels of the text and image tokens; 0 leaves the branch, and its parameters, out.
    in_channels: noisy latents, and for image-to-video `out_channels` image channels and four of mask (Wan2.1) or one
        (OmniAvatar).
    s2v: the further parts of Wan2.2-S2V (s2v.py), or none.
    prediction: what the head gives: the velocity, or the clean latents it is then worked out from (easier to learn
        where a patch holds about as many numbers as a token is wide: Li and He 2025, "Back to basics").
    """

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    in_channels: int = 36
    out_channels: int = 16
    patch: tuple[int, int] = (2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int = 1280
    audio: AudioConfig | None = None
    face: FaceConfig | None = None
    eps: float = 1e-6
    prediction: Literal["velocity", "x0"] = "velocity"
    s2v: S2VConfig | None = field(default=None, repr=False)  # newer than saved streams, whose identity is a repr

    def __post_init__(self) -> None:
        if min(self.dim, self.heads, self.layers) < 1 or self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"dim {self.dim} must be an even multiple of heads {self.heads}, and layers {self.layers} positive"
            )
        if self.in_channels - self.out_channels not in (0, self.out_channels + 1, self.out_channels + 4):
            raise ValueError(
                f"in_channels {self.in_channels}: must be {self.out_channels} (text to video), "
                f"{2 * self.out_channels + 4} (image to video) or {2 * self.out_channels + 1} (OmniAvatar)"
            )
        if (self.audio is not None and self.audio.kind == "injected") != (self.s2v is not None):
            raise ValueError("injected audio and an S2VConfig belong together: give both or none")
        if self.s2v and self.audio:
            layers = self.s2v.inject_layers
            if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < self.layers:
                raise ValueError(f"inject_layers {layers}: give ascending layers in 0 .. {self.layers - 1}")
            if self.audio.features % self.s2v.audio_layers or self.dim % 4:
                raise ValueError(
                    f"features {self.audio.features} must be a multiple of the {self.s2v.audio_layers} layers, "
                    f"dim {self.dim} of 4"
                )
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction {self.prediction!r} is not known: use velocity or x0")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def has_image_channels(self) -> bool:
        return self.in_channels != self.out_channels

    @property
    def mask_channels(self) -> int:
        """Of the image-to-video channels, those that say where the picture stands: 4, 1 or none."""
        return max(0, self.in_channels - 2 * self.out_channels)

    @property
    def audio_layers(self) -> range:
        """Layers before which packed audio ("added") is added: 2 .. layers / 2."""
        return range(2, self.layers // 2 + 1)


_WAN_1_3B = ModelConfig(dim=1536, ffn_dim=8960, layers=30, heads=12)
_WAN_14B = ModelConfig(dim=5120, ffn_dim=13824, layers=40, heads=40)
_TALKING = {"audio": AudioConfig(), "face": FaceConfig()}

MODELS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        dim=256,
        ffn_dim=576,
        layers=5,
        heads=4,
        in_channels=100,
        out_channels=48,
        text_dim=0,
        text_len=0,
        image_dim=192,
        prediction="x0",
        audio=AudioConfig(
            kind="window",
            features=256,
            width=256,
            window=16,
            tokens=4,
            channels=160,
            dilations=(1, 2, 4, 1, 2),
            readings=len(HEARD),
            limits=LIMITS,
        ),
    ),
    "wan-t2v-1.3b": replace(_WAN_1_3B, in_channels=16, image_dim=0),
    "wan-i2v-1.3b": _WAN_1_3B,
    "wan-t2v-14b": replace(_WAN_14B, in_channels=16, image_dim=0),
    "wan-i2v-14b": _WAN_14B,
    "omniavatar-1.3b": replace(
        _WAN_1_3B, in_channels=33, image_dim=0, audio=AudioConfig(kind="added", features=10752, width=32, window=4)
    ),
    "wan-s2v-14b": replace(
        _WAN_14B,
        in_channels=16,
        image_dim=0,
        audio=AudioConfig(kind="injected", features=25 * 1024, window=4, tokens=4),
        s2v=S2VConfig(),
    ),
    "flash-1.3b": replace(_WAN_1_3B, **_TALKING),
    "teacher-14b": replace(_WAN_14B, **_TALKING),
}
