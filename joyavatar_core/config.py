"""Sizes of the transformer: frozen dataclasses and one table of presets. No torch here.

Sources: Wan2.1 (engine note 1.1), FantasyTalking and its relatives for audio and face (checkpoint note 3.2-3.4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class AudioConfig:
    """How audio features become keys and values.

    kind: "tokens" projects every token (FantasyTalking: Linear without bias, LayerNorm);
        "window" mixes all tokens of a latent frame into `tokens` new ones (embedded model, log-mel).
    features: channels of a front-end token. width: channels after the projector.
    window: tokens per latent frame that the front end gives; columns: of the spectrogram in a token; tokens: how many
        the mixing leaves; channels, hidden: its widths ("window" only).
    scale: weight of the audio term in the cross-attention sum.
    """

    kind: Literal["tokens", "window"] = "tokens"
    features: int = 768
    width: int = 2048
    window: int = 0
    columns: int = 4
    tokens: int = 0
    channels: int = 0
    hidden: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind == "window" and min(self.window, self.tokens, self.channels, self.hidden) < 1:
            raise ValueError(f"{self}: a window projector needs window, tokens, channels and hidden of at least 1")
        if self.kind == "window" and (self.columns < 1 or self.features % self.columns):
            raise ValueError(f"features {self.features} must be a multiple of the {self.columns} columns of a token")


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
class ModelConfig:
    """Sizes of the transformer. head_dim = dim / heads.

    text_dim, image_dim: channels of the text and image tokens; 0 leaves the branch, and its parameters, out.
    in_channels: noisy latents, and for image-to-video four mask and `out_channels` image channels.
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

    def __post_init__(self) -> None:
        if min(self.dim, self.heads, self.layers) < 1 or self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"dim {self.dim} must be an even multiple of heads {self.heads}, and layers {self.layers} positive"
            )
        if self.in_channels not in (self.out_channels, 2 * self.out_channels + 4):
            raise ValueError(
                f"in_channels {self.in_channels}: must be {self.out_channels} (text to video) or "
                f"{2 * self.out_channels + 4} (image to video)"
            )
        if self.prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction {self.prediction!r} is not known: use velocity or x0")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def has_image_channels(self) -> bool:
        return self.in_channels != self.out_channels


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
        audio=AudioConfig(kind="window", features=256, width=256, window=10, tokens=4, channels=96, hidden=256),
    ),
    "wan-t2v-1.3b": replace(_WAN_1_3B, in_channels=16, image_dim=0),
    "wan-i2v-1.3b": _WAN_1_3B,
    "wan-t2v-14b": replace(_WAN_14B, in_channels=16, image_dim=0),
    "wan-i2v-14b": _WAN_14B,
    "flash-1.3b": replace(_WAN_1_3B, **_TALKING),
    "teacher-14b": replace(_WAN_14B, **_TALKING),
}
