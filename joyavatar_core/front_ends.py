"""The front end through which a model hears, around a wav2vec2 encoder: one place for every way of hearing.

Shape legend: C channels of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .audio import AudioFrontEnd
from .config import ModelConfig
from .families import Hearing, hearing
from .geometry import Geometry
from .s2v_audio import S2VFrames, S2VFramesWhole
from .wav2vec import Layers, Wav2Vec2Whole, Wav2Vec2Windows
from .wav2vec_frames import Wav2Vec2Frames, Wav2Vec2FramesWhole

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model


def all_states(kind: Hearing, hidden_size: int, layers: int) -> int | None:
    """C of hearing that takes every hidden state of an encoder; None for hearing that may take the last one alone."""
    more = {"wav2vec2-frames": 2, "wav2vec2-s2v": 1}.get(kind)  # the embedding, and for frames the last state twice
    return None if more is None else hidden_size * (layers + more)


def streaming(
    config: ModelConfig,
    encoder: Wav2Vec2Model,
    geometry: Geometry,
    history: float = 8.0,
    layers: Layers = "last",
    delay: int = 0,
) -> AudioFrontEnd:
    """What hears in windows of sound. history: seconds of one. layers, delay: of the kinds that have a choice."""
    kind = hearing(config)
    if kind == "wav2vec2-frames":
        return Wav2Vec2Frames(encoder, geometry, history, delay=delay)
    if kind == "wav2vec2-s2v":
        return S2VFrames(encoder, geometry, history)
    return Wav2Vec2Windows(encoder, geometry, history, layers=layers)


def whole(
    config: ModelConfig, encoder: Wav2Vec2Model, geometry: Geometry, layers: Layers = "last", delay: int = 0
) -> AudioFrontEnd:
    """The same over the whole sound at once, as the offline pipelines do."""
    kind = hearing(config)
    if kind == "wav2vec2-frames":
        return Wav2Vec2FramesWhole(encoder, geometry, delay=delay)
    if kind == "wav2vec2-s2v":
        return S2VFramesWhole(encoder, geometry)
    return Wav2Vec2Whole(encoder, geometry, layers=layers)
