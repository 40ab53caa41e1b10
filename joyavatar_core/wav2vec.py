"""wav2vec2 as a streaming front end: fixed absolute windows of sound, FantasyTalking's token windows per latent frame.

Shape legend: n samples at 16 kHz, L tokens of a window, F latent frames, W tokens of a latent frame, C channels, D
hidden size.
Token t of a stream is the one whose receptive field is the samples [320 t, 320 t + 400): a window that starts at sample
320 s gives tokens s, s + 1, ... The encoder is never run over more than one window, so memory and time are bounded.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import floor, prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .audio import SAMPLE_RATE, AudioTokens, AudioTrack, require
from .geometry import Geometry

if TYPE_CHECKING:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

HOP, FIELD = 320, 400  # samples between wav2vec2's tokens, and under each of them
TOKEN_RATE = SAMPLE_RATE // HOP
UNTIL_FINISHED = sys.maxsize
"""What `needs` says when no amount of sound is enough and the stream must be finished."""

Layers = Literal["last", "all"]


def tokens_of(samples: int) -> int:
    """Whole tokens in so many samples from the start of the sound; at least one."""
    return max(1, (samples - FIELD) // HOP + 1)


def samples_of(tokens: int) -> int:
    """Samples under the first `tokens` tokens."""
    return HOP * (tokens - 1) + FIELD


@dataclass(frozen=True)
class TokenWindows:
    """Which tokens a latent frame sees: FantasyTalking's windows, by absolute time (tokens a frame = 50 / fps).

    Latent i >= 1 covers pixel frames 4i-3 .. 4i; its centre is c = floor((4i - 1) * 50 / fps) - 1 and its window
    [c - half, c + half] with half = floor(2 * 50 / fps), then 4 more on both sides. Latent 0 ends where latent 1's
    inner window starts. All windows are 2 * half + 9 wide.
    """

    geometry: Geometry
    expand: int = 4

    @property
    def per_frame(self) -> Fraction:
        return TOKEN_RATE / self.geometry.fps

    @property
    def half(self) -> int:
        return floor(self.per_frame * self.geometry.temporal / 2)

    @property
    def width(self) -> int:
        return 2 * (self.half + self.expand) + 1

    def of(self, latent: int) -> range:
        """Token indices of a latent frame; negative ones lie before the sound."""
        first = self._inner_start(max(latent, 1))
        if latent == 0:
            first -= 2 * self.half
        return range(first - self.expand, first - self.expand + self.width)

    def _inner_start(self, latent: int) -> int:
        middle = self.geometry.temporal * latent + 1 - Fraction(self.geometry.temporal, 2)
        return floor(middle * self.per_frame) - 1 - self.half


class Encoder:
    """Samples of one window -> tokens. Remembers the last window only, found again by its samples.

    Args:
        layers: "last" gives the last hidden state (C = D); "all" every hidden state side by side, the embedding
            first (C = (layers + 1) * D).
        normalise: bring the window to zero mean and unit variance, as the processors of most checkpoints do.
        epsilon: added to the variance. 1e-7 is transformers' value: sound below -70 dBFS stays near silence.
    """

    def __init__(self, model: Wav2Vec2Model, layers: Layers, normalise: bool, epsilon: float) -> None:
        _check_grid(model)
        if layers not in ("last", "all"):
            raise ValueError(f"layers {layers!r}: must be 'last' or 'all'")
        self.model = model.eval()
        self.layers, self.normalise, self.epsilon = layers, normalise, epsilon
        self._memo: tuple[Tensor, int, Tensor] | None = None

    @property
    def channels(self) -> int:
        config = self.model.config
        return config.hidden_size * (config.num_hidden_layers + 1 if self.layers == "all" else 1)

    def encode(self, samples: Tensor, sounding: int) -> Tensor:
        """samples: float32 [n], of which the first `sounding` are sound and the rest filled with zeros -> [L, C]."""
        if self._memo and self._memo[1] == sounding and torch.equal(self._memo[0], samples):
            return self._memo[2]
        tokens = self._run(self._normalised(samples, sounding))
        self._memo = (samples, sounding, tokens)
        return tokens

    def _normalised(self, samples: Tensor, sounding: int) -> Tensor:
        if not self.normalise or not sounding:
            return samples
        sound = samples[:sounding].double()
        sound = (sound - sound.mean()) / (sound.var(correction=0) + self.epsilon).sqrt()
        return torch.cat([sound.float(), samples[sounding:]])

    @torch.no_grad()
    def _run(self, samples: Tensor) -> Tensor:
        given = samples[None].to(self.model.device, self.model.dtype)
        out = self.model(given, output_hidden_states=self.layers == "all")
        hidden = torch.cat(out.hidden_states, dim=-1) if self.layers == "all" else out.last_hidden_state
        return hidden[0].float().cpu()


def _check_grid(model: Wav2Vec2Model) -> None:
    """Raises ValueError unless the model gives one token per 320 samples with a receptive field of 400."""
    config = model.config
    hop = prod(config.conv_stride)
    layers = reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True)))
    field = reduce(lambda size, layer: (size - 1) * layer[1] + layer[0], layers, 1)
    if (hop, field) != (HOP, FIELD) or config.add_adapter:
        raise ValueError(
            f"the audio encoder gives a token per {hop} samples (field {field}, adapter {config.add_adapter}): "
            f"a wav2vec2 model with {HOP}, {FIELD} and no adapter is needed"
        )


def _cut(encoded: Tensor, first: int, windows: list[range], width: int) -> AudioTokens:
    """Windows (absolute tokens, none empty) out of `encoded` [L, C], whose first token is `first`; zeros fill up."""
    tokens = torch.zeros(len(windows), width, encoded.shape[-1])
    valid = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        assert 0 < len(window) <= width and first <= window.start and window.stop <= first + len(encoded), window
        tokens[row, : len(window)] = encoded[window.start - first : window.stop - first]
        valid[row, : len(window)] = True
    return AudioTokens(tokens, valid)


class _Wav2Vec2:
    """What both front ends of wav2vec2 share: an encoder and the token windows cut from what it gives."""

    def __init__(self, geometry: Geometry, encoder: Encoder) -> None:
        self.geometry, self.windows, self.encoder = geometry, TokenWindows(geometry), encoder

    @property
    def channels(self) -> int:
        return self.encoder.channels

    @property
    def tokens_per_latent(self) -> int:
        return self.windows.width


class WindowedSound:
    """What streaming front ends share: a block is heard in one window of sound, fixed by its number alone."""

    geometry: Geometry

    def needs(self, latent_stop: int) -> int:
        return samples_of(self._window(latent_stop - 1).stop) if latent_stop > 0 else 0

    def keeps(self, latent_start: int) -> int:
        return HOP * self._window(latent_start).start

    def _window(self, latent: int) -> range:
        """Tokens of the window in which a latent frame's block is heard."""
        return self._span(self.geometry.block_of_latent(latent))

    def _span(self, block: int) -> range:
        """Tokens of a block's window."""
        raise NotImplementedError

    def _sound(self, track: AudioTrack, window: range) -> tuple[Tensor, int]:
        """Samples of a window [n], and how many of them are sound; zeros follow."""
        start, stop = HOP * window.start, samples_of(window.stop)
        return track.read(start, stop), min(max(track.end - start, 0), stop - start)


class WholeSound:
    """What front ends share that hear the whole sound at once: nothing comes out before it is finished.

    limit: longest sound, seconds. instead: what hears longer ones.
    """

    limit: float
    instead = "the streaming windows"

    def needs(self, latent_stop: int) -> int:
        return UNTIL_FINISHED if latent_stop > 0 else 0

    def keeps(self, latent_start: int) -> int:
        return 0

    def _check_whole(self, track: AudioTrack) -> None:
        """ValueError if the sound is unfinished or too long."""
        if track.end > self.limit * SAMPLE_RATE:
            raise ValueError(
                f"the sound lasts {track.end / SAMPLE_RATE:.1f} s or more, the limit for encoding it at once is "
                f"{self.limit:g} s: use {self.instead} or cut it"
            )
        if not track.finished:
            raise ValueError("whole-utterance encoding needs all of the sound: finish the track first")


class Wav2Vec2Windows(WindowedSound, _Wav2Vec2):
    """Streaming wav2vec2: block b is encoded from one window of sound, fixed by b alone.

    The window ends `lookahead_tokens` after the block (more if a token window reaches further) and is `history` +
    look-ahead long on the 50 Hz grid. While the sound is younger than that, the window starts with the sound: zeros in
    its place would be attended to and would upset the group normalisation of base models. Beyond the end of the sound
    it holds zeros, which take no part in the statistics. Token windows are cut at the true end, save that a latent
    frame wholly beyond it sees the silence.

    Args:
        model: transformers' Wav2Vec2Model (base or large); put into eval mode. Its weights must not change afterwards.
        history: seconds of sound before the end of a block.
        lookahead_tokens: tokens of 20 ms after the end of a block; 4 is the least the token windows need.
        layers, normalise, epsilon: see Encoder.
    Raises:
        ValueError: look-ahead or history shorter than the token windows of a block.
    """

    def __init__(
        self,
        model: Wav2Vec2Model,
        geometry: Geometry,
        history: float = 8.0,
        lookahead_tokens: int = 4,
        layers: Layers = "last",
        normalise: bool = True,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(geometry, Encoder(model, layers, normalise, epsilon))
        self.lookahead_tokens = lookahead_tokens
        self.history_tokens = round(history * TOKEN_RATE)
        self._check_sizes()

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        parts = [self._features(track, latent) for latent in latents]
        if not parts:
            return _cut(torch.zeros(0, self.channels), 0, [], self.tokens_per_latent)
        return AudioTokens(torch.cat([p.tokens for p in parts]), torch.cat([p.valid for p in parts]))

    def _features(self, track: AudioTrack, latent: int) -> AudioTokens:
        span = self._window(latent)
        encoded = self.encoder.encode(*self._sound(track, span))
        window, true_end = self.windows.of(latent), tokens_of(track.end) if track.finished else span.stop
        first = max(window.start, 0)
        window = range(first, min(window.stop, true_end) if first < true_end else window.stop)
        return _cut(encoded, span.start, [window], self.tokens_per_latent)

    def _span(self, block: int) -> range:
        end = floor(self.geometry.frames_of_block(block).stop * self.windows.per_frame)
        latents = self.geometry.latents_of_block(block)
        stop = max(end + self.lookahead_tokens, max(self.windows.of(i).stop for i in latents))
        return range(max(0, stop - self.history_tokens - self.lookahead_tokens), stop)

    def _check_sizes(self) -> None:
        least = self.windows.expand
        if self.lookahead_tokens < least:
            raise ValueError(f"lookahead_tokens {self.lookahead_tokens}: the token windows need at least {least}")
        starts = {b: self.windows.of(self.geometry.latents_of_block(b).start).start for b in range(1, 65)}
        needed = 1 + max(self._span(b).stop - start for b, start in starts.items()) - self.lookahead_tokens
        if needed > self.history_tokens:
            raise ValueError(
                f"history {self.history_tokens / TOKEN_RATE:g} s: the token windows of a block need at least "
                f"{needed / TOKEN_RATE:g} s"
            )


class Wav2Vec2Whole(WholeSound, _Wav2Vec2):
    """wav2vec2 over the whole sound at once, as the offline pipelines run it: for parity, and for short clips only.

    Nothing comes out before the sound is finished, and memory grows with its length. Token windows are cut at the true
    end; a latent frame wholly beyond it sees the last token.

    Args:
        limit: longest sound, seconds.
        model, layers, normalise, epsilon: see Wav2Vec2Windows and Encoder.
    """

    instead = "the streaming windows (Wav2Vec2Windows)"

    def __init__(
        self,
        model: Wav2Vec2Model,
        geometry: Geometry,
        limit: float = 60.0,
        layers: Layers = "last",
        normalise: bool = True,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(geometry, Encoder(model, layers, normalise, epsilon))
        self.limit = limit

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        """Tokens of consecutive latent frames. Raises ValueError if the sound is unfinished or too long."""
        self._check_whole(track)
        encoded = self.encoder.encode(track.read(0, max(track.end, FIELD)), track.end)
        windows = [self._seen(latent, len(encoded)) for latent in latents]
        return _cut(encoded, 0, windows, self.tokens_per_latent)

    def _seen(self, latent: int, true_end: int) -> range:
        window = self.windows.of(latent)
        return range(min(max(window.start, 0), true_end - 1), min(window.stop, true_end))


def load_wav2vec2(path: str | Path) -> Wav2Vec2Model:
    """A wav2vec2 model from this machine, in eval mode, float32, without gradients. The network is never asked.

    Args:
        path: a folder as transformers saves it (config.json and weights), or a .safetensors file of a Wav2Vec2Model or
            Wav2Vec2ForCTC; beside a file, config.json is used if there is one, else sizes are read from the tensors.
    Raises:
        OSError: nothing readable at the path.
        ValueError: not a wav2vec2 checkpoint, or tensors are missing.
    """
    path = Path(path)
    if path.is_file():
        return _frozen(_load_file(path))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no folder with a config.json and no .safetensors file of a wav2vec2 model")
    return _frozen(_load_folder(path))


def _frozen(model: Wav2Vec2Model) -> Wav2Vec2Model:
    _check_grid(model)
    model.requires_grad_(False)
    return model.eval()


def _load_folder(folder: Path) -> Wav2Vec2Model:
    transformers = require("transformers", "the wav2vec2 front end")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "wav2vec2":
        raise ValueError(f"{folder}: its config.json is of a model of type {kind}: a wav2vec2 model is needed")
    try:
        model, info = transformers.Wav2Vec2Model.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise OSError(f"{folder}: its weights are not readable ({error})") from error
    _check_missing(set(info["missing_keys"]), folder)
    return model.float()


def _load_file(path: Path) -> Wav2Vec2Model:
    transformers = require("transformers", "the wav2vec2 front end")
    try:
        with safe_open(path, "pt") as file:
            tensors = {_model_key(key): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path}: not a readable .safetensors file ({error})") from error
    beside = path.with_name("config.json")
    config = transformers.Wav2Vec2Config.from_json_file(beside) if beside.is_file() else _config_of(tensors, path)
    model = transformers.Wav2Vec2Model(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    _check_missing(set(missing), path)
    leftover = sorted(k for k in unexpected if not k.startswith(_HEADS) and k not in _TRAINING_ONLY)
    if leftover:
        raise ValueError(f"{path}: tensors {leftover[:4]} do not belong to a wav2vec2 model")
    return model


_HEADS = ("lm_head.", "quantizer.", "project_hid.", "project_q.", "projector.", "classifier.")
_TRAINING_ONLY = {"masked_spec_embed"}


def _check_missing(missing: set[str], path: Path) -> None:
    missing = missing - _TRAINING_ONLY
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors of a wav2vec2 model are missing, e.g. {sorted(missing)[:4]}")


def _model_key(key: str) -> str:
    """A name in a checkpoint -> the name in Wav2Vec2Model (head prefix off, weight norm in its present spelling)."""
    key = key.removeprefix("wav2vec2.")
    key = key.replace("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0")
    return key.replace("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1")


def _config_of(tensors: dict[str, Tensor], path: Path) -> Wav2Vec2Config:
    """Sizes of a wav2vec2 model from its tensors. All published sizes have heads of 64 channels."""
    transformers = require("transformers", "the wav2vec2 front end")
    try:
        hidden = tensors["encoder.layer_norm.weight"].shape[0]
        position = tensors["encoder.pos_conv_embed.conv.parametrizations.weight.original1"].shape
        feed_forward = tensors["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0]
        convolutions = [tensors[f"feature_extractor.conv_layers.{i}.conv.weight"].shape for i in range(7)]
    except KeyError as error:
        raise ValueError(f"{path}: not a wav2vec2 model, it has no tensor {error}") from error
    layer_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in tensors
    return transformers.Wav2Vec2Config(
        hidden_size=hidden,
        num_hidden_layers=1 + max(int(m[1]) for k in tensors if (m := re.match(r"encoder\.layers\.(\d+)\.", k))),
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=feed_forward,
        conv_dim=[shape[0] for shape in convolutions],
        conv_kernel=[shape[2] for shape in convolutions],
        conv_bias="feature_extractor.conv_layers.0.conv.bias" in tensors,
        feat_extract_norm="layer" if layer_norms else "group",
        do_stable_layer_norm=layer_norms,
        num_conv_pos_embeddings=position[2],
        num_conv_pos_embedding_groups=hidden // position[1],
    )
