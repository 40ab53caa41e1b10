"""What Wan2.2-S2V hears: all hidden states of wav2vec2, brought to 30 a second; a pixel frame takes the nearest.

Shape legend: n samples at 16 kHz, L tokens of wav2vec2 (50 a second), F latent frames, W = 4 pixel frames of a latent,
C channels: all hidden states side by side, the embedding first.

The release of Live Avatar feeds latent i the frames 4i .. 4i+3 but shows it as 4i-3 .. 4i, for it drops the first
three decoded frames and leaves the sound where it is: the picture leads by 3 frames, 0.12 s. Here a latent hears the
frames it shows, and latent 0, which shows one, four times frame 0 (the model itself repeats a first frame for what lay
before it). `lead` 3 is the release.

The release encodes the whole sound and stretches its L tokens over int(0.6 L) places, end to end: `S2VFramesWhole`.
Streaming, place k lies at token 5 k / 3 for ever, off by less than a token; frames past the end are zeros in both.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .audio import AudioTokens, AudioTrack
from .geometry import Geometry
from .wav2vec import FIELD, TOKEN_RATE, Encoder, WholeSound, WindowedSound, tokens_of

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

PLACES = 30  # a second


class _S2VFrames:
    """What both front ends share.

    lead: pixel frames by which the picture runs ahead of its sound.
    """

    def __init__(self, geometry: Geometry, encoder: Encoder, lead: int) -> None:
        if lead < 0:
            raise ValueError(f"lead {lead}: must be at least 0 pixel frames")
        self.geometry, self.encoder, self.lead = geometry, encoder, lead

    @property
    def channels(self) -> int:
        return self.encoder.channels

    @property
    def tokens_per_latent(self) -> int:
        return self.geometry.temporal

    def places(self, latent: int) -> list[int]:
        """Of the pixel frames that a latent frame hears, on the grid of 30 a second."""
        last = self.geometry.frames_of_latent(latent).stop - 1 + self.lead
        frames = range(last - self.geometry.temporal + 1, last + 1)
        return [round(Fraction(PLACES * max(frame, 0)) / self.geometry.fps) for frame in frames]

    def _tokens(self, rows: list[Tensor]) -> AudioTokens:
        """Rows [W, C] of some latent frames."""
        tokens = torch.stack(rows) if rows else torch.zeros(0, self.tokens_per_latent, self.channels)
        return AudioTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


def places_of(tokens: int) -> int:
    """Places that the release gives to so many tokens, in its own arithmetic."""
    return int(tokens / float(TOKEN_RATE) * PLACES)


def between(encoded: Tensor, places: Tensor) -> Tensor:
    """Rows of [L, C] at fractional places float32 [N], linearly, as torch.nn.functional.interpolate blends them."""
    before = places.long()
    share = (places - before)[:, None]
    after = (before + 1).clamp(max=len(encoded) - 1)
    later = (encoded[after] * share).double()  # rounded once on the way, as the fused kernel does
    return (encoded[before].double() * (1 - share).double() + later).float()


class S2VFrames(WindowedSound, _S2VFrames):
    """Streaming: block b is encoded from one window of sound, fixed by b alone.

    The window ends `lookahead_tokens` after the last token the block needs and is `history` + look-ahead long; while
    the sound is younger than that it starts with the sound. Beyond the end of the sound it holds zeros, which take no
    part in the statistics.

    Args:
        model: transformers' Wav2Vec2Model, large; put into eval mode. Its weights must not change afterwards.
        history: seconds of sound before the end of a block. lookahead_tokens: of 20 ms.
        lead: see above. normalise, epsilon: see wav2vec.Encoder.
    Raises:
        ValueError: history shorter than a block, or a negative look-ahead.
    """

    def __init__(
        self,
        model: Wav2Vec2Model,
        geometry: Geometry,
        history: float = 8.0,
        lookahead_tokens: int = 4,
        lead: int = 0,
        normalise: bool = True,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(geometry, Encoder(model, "all", normalise, epsilon), lead)
        self.history_tokens, self.lookahead_tokens = round(history * TOKEN_RATE), lookahead_tokens
        block = floor(len(geometry.frames_of_block(1)) * TOKEN_RATE / geometry.fps) + 4
        if self.history_tokens < block or lookahead_tokens < 0:
            raise ValueError(
                f"history {history:g} s and lookahead_tokens {lookahead_tokens}: a block needs at least "
                f"{block / TOKEN_RATE:g} s and 0 tokens"
            )

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        return self._tokens([self._latent(track, latent) for latent in latents])

    def _latent(self, track: AudioTrack, latent: int) -> Tensor:
        span, places = self._window(latent), self.places(latent)
        encoded = self.encoder.encode(*self._sound(track, span))
        at = torch.tensor([float(_token(place) - span.start) for place in places])
        heard = [not track.finished or place < places_of(tokens_of(track.end)) for place in places]
        return torch.where(torch.tensor(heard)[:, None], between(encoded, at), 0.0)

    def _span(self, block: int) -> range:
        last = self.geometry.latents_of_block(block).stop - 1
        stop = floor(_token(self.places(last)[-1])) + 2 + self.lookahead_tokens
        return range(max(0, stop - self.history_tokens - self.lookahead_tokens), stop)


def _token(place: int) -> Fraction:
    """Where a place lies among the tokens of a stream."""
    return Fraction(place * TOKEN_RATE, PLACES)


class S2VFramesWhole(WholeSound, _S2VFrames):
    """The whole sound at once, as the release runs it: for parity, and for short clips only.

    Args:
        limit: longest sound, seconds.
        model, lead, normalise, epsilon: see S2VFrames.
    """

    instead = "the streaming windows (S2VFrames)"

    def __init__(
        self,
        model: Wav2Vec2Model,
        geometry: Geometry,
        limit: float = 60.0,
        lead: int = 0,
        normalise: bool = True,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(geometry, Encoder(model, "all", normalise, epsilon), lead)
        self.limit = limit

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        """Tokens of consecutive latent frames. Raises ValueError if the sound is unfinished or too long."""
        self._check_whole(track)
        encoded = self.encoder.encode(track.read(0, max(track.end, FIELD)), track.end)
        return self._tokens([stretched(encoded, self.places(latent)) for latent in latents])


def stretched(encoded: Tensor, places: list[int]) -> Tensor:
    """Features [len(places), C] of a whole sound [L, C] stretched over its places; past its end zeros."""
    count, at = places_of(len(encoded)), torch.tensor(places)
    scale = torch.tensor((len(encoded) - 1) / max(1, count - 1), dtype=torch.float32)
    rows = between(encoded, (scale * at).clamp(max=len(encoded) - 1))
    return torch.where((at < count)[:, None], rows, 0.0)
