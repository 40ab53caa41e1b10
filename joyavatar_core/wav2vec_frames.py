"""wav2vec2 at the frame rate of the video, as OmniAvatar and its distilled children hear (LiveTalk, AvatarForcing).

The convolutions' features are brought to one a pixel frame, by linear interpolation, *before* the transformer of
wav2vec2 runs; a frame is then the last hidden state followed by every hidden state, 14 * 768 numbers of a base model.

Shape legend: n samples at 16 kHz, L convolution features (one per 320 samples), N pixel frames, F latent frames,
C channels of a frame, D hidden size.

What streaming does to it. The originals encode the whole sound at once and stretch its L features over N frames, so a
frame's place, j (L - 1) / (N - 1), depends on how long the sound is: LiveTalk's lies 0 (at the start) to 2 (at the end)
places before 50 j / fps, AvatarForcing's on it. Here it always lies one place before it, or on it: at most 20 ms from
the original's. And block b is heard in one window of sound fixed by b alone, as `wav2vec.Wav2Vec2Windows` has it: the
first convolution's normalisation and that of the samples run over the window, attention sees nothing before it, and the
positional convolution (64 frames to each side) sees zeros past its end. `Wav2Vec2FramesWhole` does as the originals do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .audio import SAMPLE_RATE, AudioTokens, AudioTrack
from .geometry import Geometry
from .wav2vec import FIELD, HOP, TOKEN_RATE, Encoder, WholeSound, WindowedSound

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model


class FrameEncoder(Encoder):
    """Samples of one window -> pixel frames at given places. Remembers the last window only.

    Args:
        model: a base model (normalisation after the attention), of transformers or with its parts and names.
        normalise, epsilon: see Encoder.
    """

    def __init__(self, model: Wav2Vec2Model, normalise: bool = True, epsilon: float = 1e-7) -> None:
        super().__init__(model, "all", normalise, epsilon)
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None

    @property
    def channels(self) -> int:
        return self.model.config.hidden_size * (self.model.config.num_hidden_layers + 2)

    def frames(self, samples: Tensor, sounding: int, places: Tensor) -> Tensor:
        """Features of a window, of which the first `sounding` samples are sound.

        samples: float32 [n]. places: float32 [N], in convolution features from the start of the window; those
        before the first or past the last one take that one. Returns [N, C].
        """
        if self._last and self._last[1] == sounding and _same(self._last, samples, places):
            return self._last[3]
        given = self._normalised(samples, sounding)[None].to(self.model.device, self.model.dtype)
        frames = self._heard(given, places)
        self._last = (samples, sounding, places, frames)
        return frames

    @torch.no_grad()
    def _heard(self, samples: Tensor, places: Tensor) -> Tensor:
        features = self.model.feature_extractor(samples)[0].T  # [L, channels]
        projected = self.model.feature_projection(_between(features, places)[None])
        hidden: list[Tensor] = []
        with _noted(list(self.model.encoder.layers), hidden):
            last = self.model.encoder(_first(projected))
        hidden.insert(0, _first(last))
        return torch.cat(hidden, dim=-1)[0].float().cpu()


def _same(kept: tuple[Tensor, int, Tensor, Tensor], samples: Tensor, places: Tensor) -> bool:
    return torch.equal(kept[0], samples) and torch.equal(kept[2], places)


def _between(features: Tensor, places: Tensor) -> Tensor:
    """Rows of [L, C] at fractional places [N], linearly; past the end the last row."""
    places = places.clamp(0, len(features) - 1)
    before = places.floor().long()
    share = (places - before).to(features.device, features.dtype).unsqueeze(1)
    before = before.to(features.device)
    after = (before + 1).clamp(max=len(features) - 1)
    return features[before] * (1 - share) + features[after] * share


@contextlib.contextmanager
def _noted(layers: Sequence[Any], hidden: list[Tensor]) -> Iterator[None]:
    """Collect what enters the first layer and leaves each: versions of transformers and the host return it in ways of
    their own.
    """

    def enters(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append(args[0] if args else named["hidden_states"])

    handles = [layers[0].register_forward_pre_hook(enters, with_kwargs=True)]
    handles += [layer.register_forward_hook(lambda _, __, out: hidden.append(_first(out))) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(value: Any) -> Tensor:
    """A tensor, or the first of a tuple or of one of transformers' outputs."""
    return value if isinstance(value, Tensor) else value[0]


class _Frames:
    """What both front ends share: which pixel frames a latent frame hears.

    delay: 0: latent i hears the pixel frames it shows, 4i-3 .. 4i, and latent 0 four times frame 0 (LiveTalk);
        1: everything is heard a frame later and latent 0 hears nothing (AvatarForcing, whose first row is zeros).
    """

    def __init__(self, geometry: Geometry, encoder: FrameEncoder, delay: int) -> None:
        if delay not in (0, 1):
            raise ValueError(f"delay {delay}: must be 0 or 1 pixel frames")
        self.geometry, self.encoder, self.delay = geometry, encoder, delay

    @property
    def channels(self) -> int:
        return self.encoder.channels

    @property
    def tokens_per_latent(self) -> int:
        return self.geometry.temporal

    def frames_of(self, latent: int) -> list[int]:
        """Encoded frames of a latent frame, -1 for nothing."""
        if latent == 0:
            return [-1 if self.delay else 0] * self.geometry.temporal
        return [frame - self.delay for frame in self.geometry.frames_of_latent(latent)]

    def _rows(self, frames: Tensor, first: int, wanted: Sequence[int]) -> Tensor:
        """Rows of encoded frames [N, C] that begin with frame `first`; past their end the last one."""
        rows = frames[[min(max(f - first, 0), len(frames) - 1) for f in wanted]]
        return torch.where(torch.tensor(wanted)[:, None] < 0, torch.zeros(()), rows)


class Wav2Vec2Frames(WindowedSound, _Frames):
    """Streaming: block b is encoded from one window of sound, fixed by b alone.

    The window ends `lookahead` seconds after the block and is `history` + `lookahead` long, on the grid of the
    convolutions; while the sound is younger than that it starts with the sound. Beyond the end of the sound it holds
    zeros, which take no part in the statistics.

    Args:
        model: a base model; put into eval mode. Its weights must not change afterwards.
        delay: see _Frames.
        history, lookahead: seconds of sound before and after the end of a block.
        normalise, epsilon: see Encoder.
    Raises:
        ValueError: history shorter than a block and a frame, or look-ahead shorter than a convolution feature.
    """

    def __init__(
        self,
        model: Wav2Vec2Model,
        geometry: Geometry,
        history: float = 8.0,
        lookahead: float = 0.08,
        delay: int = 0,
        normalise: bool = True,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(geometry, FrameEncoder(model, normalise, epsilon), delay)
        self.history, self.lookahead = round(history * TOKEN_RATE), round(lookahead * TOKEN_RATE)
        block = Fraction(geometry.block_latents * geometry.temporal + 2) * self._per_frame
        if self.history < block or self.lookahead < 1:
            raise ValueError(
                f"history {history:g} s and lookahead {lookahead:g} s: a block needs at least "
                f"{float(block / TOKEN_RATE):.2f} s and {1 / TOKEN_RATE:g} s"
            )

    @property
    def _per_frame(self) -> Fraction:
        """Convolution features a pixel frame."""
        return TOKEN_RATE / self.geometry.fps

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        tokens = torch.zeros(len(latents), self.tokens_per_latent, self.channels)
        for row, latent in enumerate(latents):
            tokens[row] = self._latent(track, latent)
        return AudioTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))

    def _latent(self, track: AudioTrack, latent: int) -> Tensor:
        span = self._window(latent)
        first, last = -floor(-span.start / self._per_frame), floor((span.stop - 1) / self._per_frame)
        early = 1 - self.delay
        places = torch.tensor([float(j * self._per_frame) - early - span.start for j in range(first, last + 1)])
        return self._rows(self.encoder.frames(*self._sound(track, span), places), first, self.frames_of(latent))

    def _span(self, block: int) -> range:
        """Convolution features of a block's window."""
        frames = self.geometry.frames_of_block(block)
        stop = floor(frames.stop * self._per_frame) + self.lookahead
        return range(max(0, stop - self.history - self.lookahead), stop)


class Wav2Vec2FramesWhole(WholeSound, _Frames):
    """The whole sound at once, as the offline pipelines run it: for parity, and for short clips only.

    Without delay the sound is filled with silence to a whole number of latent frames (LiveTalk's 4 n - 3 frames last
    (4 n - 4) / fps seconds) and stretched over them; with one it is stretched over ceil(seconds * fps) frames.

    Args:
        limit: longest sound, seconds.
        model, delay, normalise, epsilon: see Wav2Vec2Frames.
    """

    def __init__(
        self,
        model: Wav2Vec2Model,
        geometry: Geometry,
        limit: float = 60.0,
        delay: int = 0,
        normalise: bool = True,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(geometry, FrameEncoder(model, normalise, epsilon), delay)
        self.limit = limit

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        """Tokens of consecutive latent frames. Raises ValueError if the sound is unfinished or too long."""
        self._check_whole(track)
        frames = self._frames(track)
        tokens = [self._rows(frames, 0, self.frames_of(latent)) for latent in latents]
        shaped = torch.stack(tokens) if tokens else torch.zeros(0, self.tokens_per_latent, self.channels)
        return AudioTokens(shaped, torch.ones(shaped.shape[:2], dtype=torch.bool))

    def _frames(self, track: AudioTrack) -> Tensor:
        """All encoded frames of the sound, [N, C]."""
        fps, samples, count = self.geometry.fps, track.end, self._count(track)
        if not self.delay:
            samples = max(samples, floor((count - 1) / fps * SAMPLE_RATE))
        samples = max(samples, FIELD)
        features = (samples - FIELD) // HOP + 1
        places = torch.arange(count) * torch.tensor((features - 1) / max(1, count - 1))  # in float32, as theirs
        return self.encoder.frames(track.read(0, samples), track.end, places)

    def _count(self, track: AudioTrack) -> int:
        seconds = Fraction(track.end, SAMPLE_RATE)
        if self.delay:
            return max(1, -floor(-seconds * self.geometry.fps))
        shown = self.geometry.frames_of_duration(seconds)
        return self.geometry.frames_of_latents(self.geometry.latents_of_frames(shown))
