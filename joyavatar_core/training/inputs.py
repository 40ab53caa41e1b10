"""What a training gives a model beside noised latents, and what the model says of whole clips that it is given with.

Shape legend: B batch, C latent channels, F latent frames of a clip, h w latent size, W audio tokens of a
latent, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conditioning import ImageChannels
from ..model import AudioKV, JoyAvatarDiT
from ..rollout import Condition


@dataclass(frozen=True)
class Inputs:
    """What B clips give the model, raw, so that the gradient reaches the projectors too.

    picture: reference tokens [B, L, image_dim]; channels: mask and image channels of B clips; audio: front-end tokens
    of all their latents [B, F, W, channels], and which of them are valid [F, W], None: all; manner [B, F, T, K]: what
    no sound tells (`manner`), None: nothing; text [B, L, text_dim], and the negative prompt that guidance goes away
    from, of the same shape; face [B, 512].
    """

    picture: Tensor | None = None
    channels: ImageChannels | None = None
    audio: Tensor | None = None
    text: Tensor | None = None
    face: Tensor | None = None
    valid: Tensor | None = None
    negative: Tensor | None = None
    manner: Tensor | None = None

    @property
    def batch(self) -> int:
        """B. ValueError when nothing is given."""
        channels = None if self.channels is None else self.channels.at([0])
        for tensor in (self.picture, self.audio, self.text, self.face, channels):
            if tensor is not None:
                return len(tensor)
        raise ValueError("a rollout needs at least one of picture, channels, audio, text and face")

    def condition(self, model: JoyAvatarDiT) -> Condition:
        """Keys and values of all that does not change, with or without gradient as the caller's mode is."""
        like = next(model.parameters())
        dtype = model.compute or like.dtype
        text, image, face = (t if t is None else t.to(like.device, dtype) for t in (self.text, self.picture, self.face))
        return Condition(model.condition(text=text, image=image, face=face), self.channels)

    def part(self, latents: slice) -> Inputs:
        """What belongs to single latents, of some of them; all else as it is."""
        audio = None if self.audio is None else self.audio[:, latents]
        valid = None if self.valid is None else self.valid[latents]
        manner = None if self.manner is None else self.manner[:, latents]
        return replace(self, audio=audio, valid=valid, manner=manner)

    def untold(self) -> Inputs:
        """The same without what guidance goes away from: zeros for the sound, the negative prompt for the prompt."""
        return replace(
            self,
            audio=None if self.audio is None else torch.zeros_like(self.audio),
            text=self.text if self.negative is None else self.negative,
        )


def hear(model: JoyAvatarDiT, audio: Tensor, manner: Tensor | None, valid: Tensor | None = None) -> AudioKV:
    """Keys and values of front-end tokens [B, F, W, C] and manner [B, F, T, K], which may lie on a CPU."""
    like = next(model.parameters())
    dtype = model.compute or like.dtype
    return model.audio(audio.to(dtype), valid, None if manner is None else manner.to(like.device, dtype))


def velocity(model: JoyAvatarDiT, x_t: Tensor, timesteps: Tensor, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
    """Velocity [B, C, F, h, w] of clips x_t whose latents stand at timesteps [B, F]; mask: of the attention."""
    condition, frames = inputs.condition(model), x_t.shape[2]
    x = x_t if condition.image is None else torch.cat([x_t, condition.image.at(range(frames)).to(x_t)], dim=1)
    audio = None
    heard = inputs.part(slice(frames))
    if heard.audio is not None:
        audio = hear(model, heard.audio, heard.manner, heard.valid)
    return model(x, timesteps, range(frames), condition.kv, audio, None, mask)[0]


def guided(model: JoyAvatarDiT, x_t: Tensor, timesteps: Tensor, inputs: Inputs, guidance: float | Tensor) -> Tensor:
    """Velocity under classifier-free guidance: away from silence and the negative prompt. timesteps [B, F].

    guidance: one number, or one for each cell, [B, 1, F, h, w].
    """
    told = velocity(model, x_t, timesteps, inputs)
    if not isinstance(guidance, Tensor) and guidance == 1:
        return told
    untold = velocity(model, x_t, timesteps, inputs.untold())
    return untold + guidance * (told - untold)
