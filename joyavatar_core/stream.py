"""Streams: sound in any chunking -> clean latent blocks -> pixel frames, with all memory in one StreamState.

`LatentStream` drives the rollout as far as the sound heard so far allows; `FrameStream` decodes finished blocks;
`AvatarStream` is both over one state.
What comes out depends on the sound and the seed, never on how the sound was cut up.

Shape legend: B batch, C latent channels, n latents of a block, h w latent size, T pixel frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from .audio import AudioFrontEnd, AudioTokens, AudioTrack
from .geometry import Geometry
from .rollout import Rollout, RolloutState
from .types import StreamTensors, VideoAutoencoder, nbytes


@dataclass(frozen=True)
class LatentBlock:
    """A finished block of a stream.

    latents: [B, C, n, h, w]; frames: how many of its pixel frames are shown (fewer in the last block of a clip).
    """

    index: int
    latents: Tensor
    frames: int


@dataclass
class StreamState:
    """All that survives from one block to the next; its size does not grow.

    rollout: cache, window latents, motion frame, position. track: sound still needed. decoder: the autoencoder's
    memory, None before the first frame. identity: what the state belongs to (model, picture, policy, seed).
    heard: checksum of all sound so far, so that a resumed run can tell whether it is given the same.
    """

    rollout: RolloutState
    track: AudioTrack
    identity: str
    decoder: StreamTensors | None = None
    heard: int = 0

    def nbytes(self) -> int:
        """Bytes of all tensors of the stream."""
        return self.rollout.nbytes() + self.track.nbytes() + nbytes(self.decoder or {})

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, atomically."""
        tensors = {f"rollout.{k}": t for k, t in self.rollout.tensors().items()}
        tensors |= {f"track.{k}": t for k, t in self.track.state().items()}
        tensors |= {f"decoder.{k}": t for k, t in (self.decoder or {}).items()}
        header = {
            "window": self.rollout.window,
            "identity": self.identity,
            "started": self.decoder is not None,
            "heard": self.heard,
        }
        checkpoint.write(path, tensors, {"stream_state": json.dumps(header)})


@dataclass(frozen=True)
class Heard:
    """What an ear has done: taken up sound (tokens None), or heard a block.

    track, checksum: of the sound from then on. block: the next one that will be heard, or, with tokens, this one.
    """

    track: AudioTrack
    checksum: int
    block: int
    tokens: AudioTokens | None = None


@dataclass
class Ear:
    """Sound -> audio tokens, block after block; the sound before them is dropped.

    track: sound still needed. checksum: of all sound so far. block: the next to hear.
    """

    front_end: AudioFrontEnd
    geometry: Geometry
    track: AudioTrack
    checksum: int
    block: int

    def feed(self, samples: Tensor, sample_rate: int) -> Iterator[Heard]:
        """Take sound [channels, m] or [m] and hear the blocks it completes."""
        after = checksum(samples, self.checksum)
        with torch.inference_mode():  # wherever the caller stands: buffers must not change between the modes
            self.track.push(samples, sample_rate)
        self.checksum = after
        yield self._now()
        while self.track.end >= self.front_end.needs(self.geometry.latents_of_block(self.block).stop):
            yield self._hear()

    def finish(self) -> Iterator[Heard]:
        """The sound has ended: hear the remaining blocks. ValueError if there was no sound at all."""
        with torch.inference_mode():
            self.track.finish()
        frames = self.geometry.frames_of_duration(self.track.duration)
        if not frames:
            raise ValueError("the audio has 0 samples: there is nothing to speak")
        yield self._now()
        while self.block < self.geometry.blocks_of_frames(frames):
            yield self._hear()

    @staticmethod
    def apart(heard: Heard) -> Heard:
        """The same with a track that stays as it is while the ear hears on."""
        return replace(heard, track=heard.track.copy())

    def _now(self, block: int | None = None, tokens: AudioTokens | None = None) -> Heard:
        return Heard(self.track, self.checksum, self.block if block is None else block, tokens)

    def _hear(self) -> Heard:
        block, latents = self.block, self.geometry.latents_of_block(self.block)
        with torch.inference_mode():
            tokens = self.front_end.features(self.track, latents)
            self.track.drop(self.front_end.keeps(latents.stop))
        self.block += 1
        return self._now(block, tokens)


class LatentStream:
    """Sound in, finished latent blocks out.

    Args:
        rollout: model, policy, geometry, condition and seed.
        front_end: makes audio tokens of the sound.
        state: from `load_state`, to go on where an earlier stream was saved.
    """

    def __init__(self, rollout: Rollout, front_end: AudioFrontEnd, state: StreamState | None = None) -> None:
        self.rollout, self.front_end = rollout, front_end
        self.state = state or StreamState(rollout.start(), AudioTrack(), identity(rollout, front_end))

    @property
    def frames_total(self) -> int | None:
        """Pixel frames of the clip; None until the sound has ended."""
        track = self.state.track
        return self.rollout.geometry.frames_of_duration(track.duration) if track.finished else None

    @property
    def blocks_total(self) -> int | None:
        """Blocks of the clip; None until the sound has ended."""
        frames = self.frames_total
        return None if frames is None else self.rollout.geometry.blocks_of_frames(frames)

    @property
    def blocks_done(self) -> int:
        return self.rollout.policy.first_block(self.state.rollout.window)

    def feed(self, samples: Tensor, sample_rate: int) -> Iterator[LatentBlock]:
        """Take sound [channels, m] or [m] float32 in [-1, 1] and yield the blocks it completes.

        Consume the iterator before feeding again; between two blocks the state may be saved.
        """
        yield from self.follow(self.ear().feed(samples, sample_rate))

    def finish(self) -> Iterator[LatentBlock]:
        """The sound has ended: yield the remaining blocks. ValueError if there was no sound at all."""
        yield from self.follow(self.ear().finish())

    def ear(self, apart: bool = False) -> Ear:
        """What hears for this stream; apart: on a track of its own, so that it may run ahead (see `Ear.apart`)."""
        state, block = self.state, self.state.rollout.window
        while block in state.rollout.audio:  # heard before the window was broken off
            block += 1
        track = state.track.copy() if apart else state.track
        return Ear(self.front_end, self.rollout.geometry, track, state.heard, block)

    def follow(self, heard: Iterable[Heard]) -> Iterator[LatentBlock]:
        """Take up what an ear of this stream has heard, in order, and yield the blocks it completes."""
        for now in heard:
            self.state.track, self.state.heard = now.track, now.checksum
            if now.tokens is not None:
                self.state.rollout.audio[now.block] = now.tokens
            yield from self._run()

    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state. CheckpointError if it belongs to another model, picture, policy or seed."""
        tensors, metadata = checkpoint.read(path)
        if "stream_state" not in metadata:
            raise checkpoint.CheckpointError(f"{Path(path).name} is not a saved stream")
        header = json.loads(metadata["stream_state"])
        if header["identity"] != self.state.identity:
            raise checkpoint.CheckpointError(
                f"{Path(path).name} belongs to another run (model, picture, policy, size, seed, threads or machine "
                "differ): use the same settings, or start without resuming"
            )
        parts: dict[str, StreamTensors] = {"rollout": {}, "track": {}, "decoder": {}}
        track = AudioTrack()
        try:
            for name, tensor in tensors.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            rollout = self.rollout.restore(parts["rollout"], header["window"])
            with torch.inference_mode():
                track.load_state(parts["track"])
        except (KeyError, ValueError) as error:
            raise checkpoint.CheckpointError(f"{Path(path).name} is not whole: {error}") from error
        decoder = {k: t.to(self.rollout.device) for k, t in parts["decoder"].items()} if header["started"] else None
        self.state = StreamState(rollout, track, self.state.identity, decoder, header["heard"])

    def _run(self) -> Iterator[LatentBlock]:
        """All windows whose sound is there."""
        state = self.state.rollout
        while self._ready():
            with torch.inference_mode():
                finished = self.rollout.run_window(state, self.blocks_total)
            for clean in finished:
                yield LatentBlock(clean.index, clean.latents, self._shown(clean.index))

    def _ready(self) -> bool:
        """Whether the next window can run: the block that enters it is heard, or none enters any more."""
        state, total = self.state.rollout, self.blocks_total
        if total is None or state.window < total:
            return state.window in state.audio
        return state.window < self.rollout.policy.num_windows(total)

    def _shown(self, block: int) -> int:
        frames = self.rollout.geometry.frames_of_block(block)
        total = self.frames_total
        return len(frames) if total is None else min(len(frames), total - frames.start)


LEAD_LATENTS = 7


class FrameStream:
    """Finished blocks in, pixel frames out; `state` is the decoder's memory, None before the first block.

    lead: [B, C, n, h, w] latents of a past that is decoded and thrown away before the first block: of models whose
        first latent is no picture but goes on from a past (Live Avatar decodes seven of the still picture).
    extra: pixel frames that the first latent then holds beyond its one.
    """

    def __init__(
        self,
        autoencoder: VideoAutoencoder,
        state: StreamTensors | None = None,
        lead: Tensor | None = None,
        extra: int = 0,
    ) -> None:
        self.autoencoder, self.state, self.lead, self.extra = autoencoder, state, lead, extra

    @staticmethod
    def of(rollout: Rollout, autoencoder: VideoAutoencoder, state: StreamTensors | None = None) -> FrameStream:
        """The decoder of a rollout's blocks."""
        reference = rollout.condition.reference
        motion = None if reference is None else reference.motion
        lead = None if motion is None else motion[:, :, :LEAD_LATENTS]
        return FrameStream(autoencoder, state, lead, rollout.geometry.temporal - 1)

    def decode(self, block: LatentBlock) -> Tensor:
        """The next block of a stream -> the frames of it that are shown, [B, 3, T, H, W] in [-1, 1]."""
        state, first = self.state, 0
        with torch.inference_mode():
            if state is None and self.lead is not None:
                _, state = self.autoencoder.decode_stream(self.lead.to(block.latents), None)
                first = self.extra
            video, self.state = self.autoencoder.decode_stream(block.latents, state)
        return video[:, :, first : first + block.frames]


class AvatarStream:
    """Sound in, pixel frames out: a LatentStream and a FrameStream over one state.

    Frames are [B, 3, T, H, W] in [-1, 1], a block at a time: 9 frames first, then 12, fewer at the end.
    """

    def __init__(self, latents: LatentStream, autoencoder: VideoAutoencoder) -> None:
        self.latents = latents
        self.frames = FrameStream.of(latents.rollout, autoencoder, latents.state.decoder)
        if isinstance(autoencoder, nn.Module):  # a state belongs to its decoder too
            latents.state.identity = _digest(latents.state.identity.encode(), _sample(autoencoder))

    @property
    def state(self) -> StreamState:
        return self.latents.state

    def feed(self, samples: Tensor, sample_rate: int) -> Iterator[Tensor]:
        """Take sound and yield the frames it completes; see LatentStream.feed."""
        yield from map(self.decode, self.latents.feed(samples, sample_rate))

    def finish(self) -> Iterator[Tensor]:
        """The sound has ended: yield the remaining frames."""
        yield from map(self.decode, self.latents.finish())

    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state; see LatentStream.load_state."""
        self.latents.load_state(path)
        self.frames.state = self.state.decoder

    def decode(self, block: LatentBlock) -> Tensor:
        """Frames of the next block of `latents`."""
        frames = self.frames.decode(block)
        self.state.decoder = self.frames.state
        return frames


def spoken(stream: LatentStream | AvatarStream, sound: Iterable[tuple[np.ndarray, int]]) -> Iterator[Any]:
    """The blocks, or frames, that a fresh stream makes of a sound: pieces float32 [channels, m] with their rate."""
    for samples, rate in sound:
        yield from stream.feed(torch.from_numpy(samples), rate)
    yield from stream.finish()


def checksum(samples: Tensor, before: int = 0) -> int:
    """CRC-32 of sound [channels, m] or [m] that follows sound of the checksum `before`, however it was cut up."""
    return zlib.crc32(samples.detach().cpu().float().movedim(0, -1).contiguous().numpy().tobytes(), before)


def identity(rollout: Rollout, front_end: AudioFrontEnd) -> str:
    """A short hash of all that decides a stream besides its sound: two runs with one identity may share a state.

    Weights are sampled, and of the constant keys and values the first layer is enough. The bits of a picture's
    latents may differ between machines, thread counts and precisions: then the identity does too.
    """
    settings = (rollout.policy, rollout.geometry, rollout.seed, rollout.dtype, rollout.batch, rollout.model.config)
    settings += (newer,) if (newer := rollout.policy.newer_options) else ()
    settings += ("keys and values in eight bits",) if rollout.fast.small_cache else ()
    hearing = (type(front_end).__name__, front_end.channels, front_end.tokens_per_latent)
    image, kv = rollout.condition.image, rollout.condition.kv
    constant = [t for layers in (kv.text, kv.image, kv.face) if layers for t in layers[0]]
    constant += [] if image is None else [image.channels]
    if (reference := rollout.condition.reference) is not None:
        constant += [reference.latent, *([] if reference.motion is None else [reference.motion])]
    pictures = (t.float().cpu().numpy().tobytes() for t in constant)
    return _digest(repr((settings, hearing)).encode(), _sample(rollout.model), *pictures)


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sample(module: nn.Module) -> bytes:
    """A few values of every parameter: tells two checkpoints apart without reading them whole."""
    picked = [p.detach().flatten()[:: max(1, p.numel() // 4)][:4].float().cpu() for p in module.parameters()]
    return torch.cat(picked).numpy().tobytes()
