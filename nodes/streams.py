"""What travels between the nodes: plain values, and lazy streams that start afresh each time they are run through.

A stream holds settings and references, never tensors on a GPU: the weights are loaded by the host when somebody runs
it, and all memory of the run goes when it ends. So several consumers may share one, and the host may cache it.

Shape legend: H W pixels, T pixel frames, C channels, n sound samples, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..joyavatar_core.audio import AudioFrontEnd, LogMel
from ..joyavatar_core.avatar import Avatar, Encoded, takes_reference_tokens
from ..joyavatar_core.config import AudioConfig
from ..joyavatar_core.estimate import Estimate, estimate
from ..joyavatar_core.families import hearing
from ..joyavatar_core.generate import FrameSink, from_uint8, to_uint8
from ..joyavatar_core.geometry import Geometry
from ..joyavatar_core.policy import RolloutPolicy
from ..joyavatar_core.rollout import Reseed
from ..joyavatar_core.stream import AvatarStream, LatentBlock, spoken
from . import host
from .host import HostAutoencoder, HostModel

if TYPE_CHECKING:
    from ..joyavatar_core.view import View

PIECE_SECONDS = 1
FULL_SIZES = ((512, 512), (480, 832), (832, 480))
LIVE_AVATAR_SIZES = ((704, 384), (384, 704))
EMBEDDED_SIZES = ((256, 256), (192, 320), (320, 192))
WAV2VEC2_OF = {
    "wav2vec2-frames": "wav2vec2-base-960h, a base model",
    "wav2vec2-s2v": "wav2vec2_large_english_fp16.safetensors",
}
"""What to load for hearing that takes all hidden states."""
HINT = "lower the size, local_blocks or steps, choose dtype fp8, or start ComfyUI with --lowvram"


@dataclass(frozen=True)
class Reference:
    """Who speaks: a picture, how it is to be fitted, and what the encoders say of it.

    picture: uint8 [H, W, 3]. fit: crop, pad, region, or close-up: as crop, but a small drawn face is taken closer and
    laid back (joyavatar_core/view.py). size: (width, height), None for the one nearest in shape.
    region: x, y, width, height in the picture's pixels; the rest is only seen again by Paste Back.
    """

    picture: np.ndarray
    fit: str = "crop"
    size: tuple[int, int] | None = None
    region: tuple[int, int, int, int] | None = None
    encoded: Encoded = field(default_factory=Encoded)
    autoencoder: HostAutoencoder | None = None

    @property
    def seen(self) -> np.ndarray:
        """The part of the picture that the model gets to see, before it is fitted."""
        if self.region is None:
            return self.picture
        x, y, width, height = self.region
        return self.picture[y : y + height, x : x + width]

    def view(self, whole: Geometry, closer: Geometry | None) -> View:
        """How it becomes a video of the geometry `whole`, or, as a close-up, of `closer`, if the model has one."""
        from ..joyavatar_core.view import view_of

        return view_of(self.seen, whole, closer if self.fit == "close-up" else None, self.core_fit)

    @property
    def core_fit(self) -> Literal["crop", "pad"]:
        """What the core calls it."""
        return "pad" if self.fit == "pad" else "crop"

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(x, y, width, height) of what a video of this size shows of the picture. ValueError where it shows more."""
        from ..joyavatar_core.media.picture import crop_box

        if self.fit == "pad":
            raise ValueError(
                "Paste Back needs a Reference that cuts a part out: set its fit to crop, close-up or region"
            )
        x, y, w, h = crop_box(self.seen.shape[1], self.seen.shape[0], width, height)
        left, top = self.region[:2] if self.region else (0, 0)
        return left + x, top + y, w, h


@dataclass(frozen=True)
class Voice:
    """What is said: samples [C, n] float32 at `rate`, and who hears it (None: the model's own log-mel)."""

    samples: Tensor
    rate: int
    encoder: host.HearingEncoder | None = None
    history: float = 8.0
    layers: str = "last"

    @property
    def duration(self) -> Fraction:
        """Seconds."""
        return Fraction(self.samples.shape[1], self.rate)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces of a second: float32 [C, m] and the rate."""
        step = PIECE_SECONDS * self.rate
        for start in range(0, self.samples.shape[1], step):
            yield self.samples[:, start : start + step].numpy(), self.rate


@dataclass(frozen=True)
class LatentPlan:
    """A stream of latent blocks, not yet run: model, picture, voice, policy and seed."""

    model: HostModel
    reference: Reference
    voice: Voice
    policy: RolloutPolicy
    seed: int

    @property
    def autoencoder(self) -> HostAutoencoder:
        """What encodes the picture, and decodes where no other VAE is given."""
        own = self.model.autoencoder or self.reference.autoencoder
        if own is None:
            raise ValueError(f"{self.model.name} has no autoencoder: connect Load VAE to the Reference's vae")
        return own

    @property
    def geometry(self) -> Geometry:
        """Of what the model makes. Raises ValueError, naming the sizes that fit, for one that does not."""
        return self.view.geometry

    @property
    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3] as the model sees it."""
        return self.view.picture

    @cached_property
    def view(self) -> View:
        """What of the picture the model makes, and how that becomes the video."""
        from ..joyavatar_core.view import needs_close_ups

        whole = self._geometry(*(self.reference.size or self._nearest_size()))
        closer = self._geometry(*EMBEDDED_SIZES[0]) if needs_close_ups(self.model.config) else None
        return self.reference.view(whole, closer)

    def _geometry(self, width: int, height: int) -> Geometry:
        return Geometry(
            width,
            height,
            self.model.profile.fps,
            **self.policy.block_sizes,
            spatial=self.autoencoder.patcher.model.spatial,
            patch=self.model.config.patch,
        )

    def _nearest_size(self) -> tuple[int, int]:
        rows, columns = self.reference.seen.shape[:2]
        sizes = EMBEDDED_SIZES if self.model.name == host.EMBEDDED else FULL_SIZES
        if self.model.config.s2v:
            sizes = (FULL_SIZES[0], *LIVE_AVATAR_SIZES)
        return min(sizes, key=lambda size: abs(np.log(columns / rows) - np.log(size[0] / size[1])))

    def estimate(self) -> Estimate:
        return estimate(
            self.model.config, self.policy, self.geometry, self.voice.duration, torch.finfo(self.model.dtype).bits // 8
        )

    def check(self) -> None:
        """Raises ValueError, in one sentence that names the remedy, for parts that do not go together."""
        config, encoded = self.model.config, self.reference.encoded
        if self.autoencoder.channels != config.out_channels:
            raise ValueError(
                f"{self.autoencoder.name} has {self.autoencoder.channels} latent channels, {self.model.name} makes "
                f"{config.out_channels}: connect the VAE that the model was trained with"
            )
        if config.text_dim and encoded.text is None:
            raise ValueError(f"{self.model.name} needs text: connect CLIP Text Encode to the Reference's conditioning")
        if config.text_dim and encoded.text is not None and encoded.text.shape[-1] != config.text_dim:
            raise ValueError(
                f"the conditioning has {encoded.text.shape[-1]} channels, {self.model.name} takes {config.text_dim}: "
                "load the umT5 text encoder with CLIP type wan"
            )
        if config.image_dim and not takes_reference_tokens(config) and encoded.image is None:
            raise ValueError(f"{self.model.name} needs CLIP vision: connect CLIP Vision Encode to the Reference")
        self._check_hearing()
        _ = self.geometry

    def _check_hearing(self) -> None:
        audio = self.model.config.audio
        if audio is None or audio.kind == "window":
            return
        if self.voice.encoder is None:
            raise ValueError(
                f"{self.model.name} listens through wav2vec2: connect Audio Encoder Loader to the Audio Encoder node"
            )
        from ..joyavatar_core.front_ends import all_states

        config = self.voice.encoder.config
        kind = hearing(self.model.config)
        if channels := all_states(kind, config.hidden_size, config.num_hidden_layers):
            _check_width(self.model.name, channels, audio, WAV2VEC2_OF[kind])
            return
        channels = config.hidden_size * (config.num_hidden_layers + 1 if self.voice.layers == "all" else 1)
        if channels != audio.features:
            raise ValueError(
                f"the audio encoder gives {channels} channels, {self.model.name} takes {audio.features}: load another "
                "wav2vec2 model, or change `layers` of the Audio Encoder node"
            )

    @contextmanager
    def run(self, decoder: HostAutoencoder | None = None, reseed: Reseed | None = None) -> Iterator[AvatarStream]:
        """A fresh stream with its weights loaded; everything it held is let go at the end."""
        encoder, hearing = self.autoencoder, self.voice.encoder
        users = [self.model, encoder, *([decoder] if decoder else []), *([hearing] if hearing else [])]
        with host.loaded([u.patcher for u in users], self.estimate().memory_bytes, HINT):
            avatar = Avatar(
                self.model.patcher.model.diffusion_model,
                encoder.module,
                self._front_end,
                host.device_of(self.model.patcher),
                self.model.dtype,
                self.geometry.fps,
            )
            yield avatar.stream(
                from_uint8(self.picture),
                self.policy,
                self.seed,
                self.reference.encoded,
                decoder.module if decoder else None,
                host.check_interrupt,
                reseed,
            )

    def _front_end(self, geometry: Geometry) -> AudioFrontEnd:
        audio = self.model.config.audio
        if audio is None or audio.kind == "window" or self.voice.encoder is None:
            return LogMel(geometry)
        from ..joyavatar_core.front_ends import streaming

        layers: Any = self.voice.layers
        encoder: Any = self.voice.encoder
        return streaming(
            self.model.config, encoder, geometry, self.voice.history, layers, self.model.profile.audio_delay
        )

    def __iter__(self) -> Iterator[LatentBlock]:
        """The blocks of a fresh run."""
        with self.run() as stream:
            yield from spoken(stream.latents, self.voice)


def _check_width(name: str, channels: int, audio: AudioConfig, remedy: str) -> None:
    if channels != audio.features:
        raise ValueError(f"the audio encoder gives {channels} channels, {name} takes {audio.features}: load {remedy}")


@dataclass(frozen=True)
class FramePlan:
    """A stream of pixel frames, not yet run.

    feather: of Paste Back, which makes the frames those of the whole picture (media.paste.Paste); None: there is none.
    """

    latents: LatentPlan
    decoder: HostAutoencoder
    feather: float | None = None

    @cached_property
    def paste(self) -> Any:
        """The Paste, or None: Paste Back's, or that of a close-up."""
        view, reference = self.latents.view, self.latents.reference
        if self.feather is None:
            return view.paste
        from ..joyavatar_core.media.paste import Paste, Region

        region = Region(*reference.box(*view.size))
        if view.paste:
            region = view.paste.region.inside(region, view.size)
        return Paste(reference.picture, region, self.feather)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the frames."""
        return self.paste.size if self.paste else (self.latents.geometry.width, self.latents.geometry.height)

    def run(self, reseed: Reseed | None = None) -> Any:
        """Context manager of a fresh AvatarStream; its frames are those before pasting."""
        return self.latents.run(self.decoder, reseed)

    def finished(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, h, w, 3] of the model -> as they are shown."""
        return self.paste(frames) if self.paste else frames

    def into(self, sink: FrameSink) -> FrameSink:
        """A sink that takes the model's frames and passes on finished ones."""
        from ..joyavatar_core.media.paste import PastingSink

        return PastingSink(self.paste, sink) if self.paste else sink

    def __iter__(self) -> Iterator[np.ndarray]:
        """Finished frames uint8 [T, H, W, 3] of a fresh run, a block at a time."""
        with self.run() as stream:
            for frames in spoken(stream, self.latents.voice):
                yield self.finished(to_uint8(frames))
