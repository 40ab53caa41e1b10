"""From clips to samples: the encoders of a training, run once over every clip, in the main process.

Shape legend: T pixel frames, H W pixel size, C latent channels, F latent frames, n latents of [picture, grey ...],
h w latent size, W audio tokens of a latent, L text or image tokens, D their channels, s sound samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import checkpoint
from ...audio import AudioFrontEnd
from ...autoencoder import LightAutoencoder
from ...conditioning import image_channels
from ...geometry import Geometry
from ...media import face
from ...wan_vae import WanVAE
from ..encoded import as_track, as_video, cell_shares, encode_video, picture_channels
from .jobs import Clip

_PIECE = 16  # pixel frames encoded together: bounds the memory, changes nothing

Autoencoder = WanVAE | LightAutoencoder
PictureEncoder = Callable[[NDArray[np.uint8]], Tensor]
"""uint8 [H, W, 3] -> tokens [1, L, D], or for a face in ArcFace's place, [112, 112, 3], 512 numbers of length one."""


class EncodingError(ValueError):
    """A clip whose encoding cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Encoders:
    """What turns a clip into the tensors of its sample.

    front_end: hears the clip as a stream that begins there. text: tokens of a prompt, [1, L, D]. Those that are None
    leave their tensor out; a sample always has a face, zeros where it is not known, which is what a model without a
    face sees.
    """

    autoencoder: Autoencoder
    front_end: AudioFrontEnd
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    text: Callable[[str], Tensor] | None = None
    clip_vision: PictureEncoder | None = None
    face: PictureEncoder | None = None

    @torch.inference_mode()
    def encode(self, clip: Clip, given_face: Tensor | None = None) -> checkpoint.Tensors:
        """The tensors of a sample.

        latents [F, C, h, w], image [n, C, h, w], mouth, eyes [F, h, w] (share of each cell inside the box), audio
        [F, W, C] in float16; audio_valid [F, W] bool; sound [s] int16 at 16 kHz; seed int64; face [512] float32;
        text, clip_vision [L, D] bfloat16 where they are encoded.
        Raises EncodingError for numbers that are not finite in half precision.
        """
        count = self.geometry.latents_of_frames(len(clip.frames))
        video = as_video(torch.from_numpy(clip.frames))
        track = as_track(torch.from_numpy(clip.sound), clip.rate)
        heard = self.front_end.features(track, range(count))
        tensors = {
            "seed": torch.tensor(clip.seed),
            "latents": self._latents(video)[0].transpose(0, 1).half().contiguous(),
            "image": self._image(video[:, :, 0])[0].transpose(0, 1).half().contiguous(),
            "audio": heard.tokens.half(),
            "audio_valid": heard.valid,
            "sound": (track.read(0, track.end).clamp(-1, 1) * 32767).round().to(torch.int16),
            "mouth": cell_shares(torch.from_numpy(clip.mouth), self.geometry).half(),
            "eyes": cell_shares(torch.from_numpy(clip.eyes), self.geometry).half(),
            "face": self._face(clip, given_face),
            **self._tokens(clip),
        }
        wrong = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
        if wrong:
            raise EncodingError(f"{wrong[0]} not finite")
        return tensors

    def _latents(self, video: Tensor) -> Tensor:
        """[1, 3, T, H, W] -> [1, C, F, h, w] float32."""
        if isinstance(self.autoencoder, LightAutoencoder) and self.device.type == "cpu":
            return encode_video(self.autoencoder, video)
        state, parts = None, []
        for piece in (video[:, :, :1], *video[:, :, 1:].split(_PIECE, dim=2)):
            if piece.shape[2]:
                latents, state = self.autoencoder.encode_stream(piece.to(self.device, self.dtype), state)
                parts.append(latents.float().cpu())
        return torch.cat(parts, dim=2)

    def _image(self, picture: Tensor) -> Tensor:
        """[1, 3, H, W] -> latents [1, C, n, h, w] of [picture, grey, grey ...]: the engine's image channels."""
        if isinstance(self.autoencoder, LightAutoencoder) and self.device.type == "cpu":
            channels = picture_channels(self.autoencoder, picture).channels
        else:
            channels = image_channels(self.autoencoder, picture.to(self.device, self.dtype)).channels.float().cpu()
        return channels[:, self.geometry.temporal :]

    def _face(self, clip: Clip, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        if self.face is not None and clip.face is not None:
            return self.face(clip.face)
        return torch.zeros(face.NUMBERS)

    def _tokens(self, clip: Clip) -> checkpoint.Tensors:
        tokens: checkpoint.Tensors = {}
        if self.text:
            tokens["text"] = self.text(clip.facts["prompt"])[0].bfloat16().contiguous()
        if self.clip_vision:
            tokens["clip_vision"] = self.clip_vision(clip.frames[0])[0].bfloat16().contiguous()
        return tokens


class Prompts:
    """Text embeddings on disk, one file for each prompt, so that a dataset of many prompts takes no memory.

    encode: a prompt to tokens [1, L, D], called once for each prompt there ever was in this folder.
    """

    def __init__(self, folder: Path, encode: Callable[[str], Tensor]) -> None:
        self.folder, self._encode = folder, encode

    def __call__(self, prompt: str) -> Tensor:
        """Tokens [1, L, D]."""
        path = self.path(prompt)
        if not path.exists():
            checkpoint.write(path, {"text": self._encode(prompt).bfloat16()}, {"prompt": prompt})
        return checkpoint.read(path)[0]["text"]

    def path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}.safetensors"


def clip_geometry(width: int, height: int, fps: int, autoencoder: Autoencoder) -> Geometry:
    """Geometry of the clips for an autoencoder. ValueError for a size that does not fit."""
    return Geometry(width, height, Fraction(fps), spatial=autoencoder.spatial)
