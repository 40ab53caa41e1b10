"""Streams: sound in any chunking -> clean latent blocks -> pixel frames, with all memory in one StreamState.

`LatentStream` drives the rollout as far as the sound heard so far allows; `FrameStream` decodes its blocks;
`AvatarStream` is both. What comes out depends on the sound and the seed, never on how the sound was cut up.

Shape legend: B batch, C latent channels, n latents of a block, h w latent size, T pixel frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint
from .audio import AudioFrontEnd, AudioTrack
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


class LatentStream:
    """Sound in, finished latent blocks out.

    Args:
        rollout: model, policy, geometry, condition and seed.
        front_end: makes audio tokens of the sound.
        state: from `load_state`, to go on where an earlier stream was saved.
    """

    def __init__(self, rollout: Rollout, front_end: AudioFrontEnd, state: StreamState | None = None) -> None:
        self.rollout, self.front_end = rollout, front_end
        self.state = state or StreamState(rollout.start(), AudioTrack(), identity(rollout))

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
        self.state.track.push(samples, sample_rate)
        self.state.heard = checksum(samples, self.state.heard)
        yield from self._advance()

    def finish(self) -> Iterator[LatentBlock]:
        """The sound has ended: yield the remaining blocks. ValueError if there was no sound at all."""
        self.state.track.finish()
        if not self.frames_total:
            raise ValueError("the audio has 0 samples: there is nothing to speak")
        yield from self._advance()

    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state. CheckpointError if it belongs to another model, picture, policy or seed."""
        tensors, metadata = checkpoint.read(path)
        if "stream_state" not in metadata:
            raise checkpoint.CheckpointError(f"{Path(path).name} is not a saved stream")
        header = json.loads(metadata["stream_state"])
        if header["identity"] != self.state.identity:
            raise checkpoint.CheckpointError(
                f"{Path(path).name} belongs to another run (model, picture, policy, size or seed differ): "
                "use the same settings, or start without resuming"
            )
        parts: dict[str, StreamTensors] = {"rollout": {}, "track": {}, "decoder": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.state.rollout = self.rollout.restore(parts["rollout"], header["window"])
        self.state.track.load_state(parts["track"])
        self.state.heard = header["heard"]
        device = self.rollout.device
        decoder = {k: t.to(device) for k, t in parts["decoder"].items()}
        self.state.decoder = decoder if header["started"] else None

    def _advance(self) -> Iterator[LatentBlock]:
        geometry, state = self.rollout.geometry, self.state.rollout
        while self._ready():
            block = state.window
            if self.blocks_total is None or block < self.blocks_total:
                latents = geometry.latents_of_block(block)
                state.audio[block] = self.front_end.features(self.state.track, latents)
                self.state.track.drop(self.front_end.keeps(latents.stop))
            with torch.inference_mode():
                finished = self.rollout.run_window(state, self.blocks_total)
            for clean in finished:
                yield LatentBlock(clean.index, clean.latents, self._shown(clean.index))

    def _ready(self) -> bool:
        """Whether the next window can run: the block that enters it has its sound, or the sound has ended."""
        window, total = self.state.rollout.window, self.blocks_total
        if total is not None:
            return window < self.rollout.policy.num_windows(total)
        needed = self.front_end.needs(self.rollout.geometry.latents_of_block(window).stop)
        return self.state.track.end >= needed

    def _shown(self, block: int) -> int:
        frames = self.rollout.geometry.frames_of_block(block)
        total = self.frames_total
        return len(frames) if total is None else min(len(frames), total - frames.start)


class AvatarStream:
    """Sound in, pixel frames out: a LatentStream and a streaming decoder over one state.

    Frames are [B, 3, T, H, W] in [-1, 1], a block at a time: 9 frames first, then 12, fewer at the end.
    """

    def __init__(self, latents: LatentStream, autoencoder: VideoAutoencoder) -> None:
        self.latents, self.autoencoder = latents, autoencoder

    @property
    def state(self) -> StreamState:
        return self.latents.state

    def feed(self, samples: Tensor, sample_rate: int) -> Iterator[Tensor]:
        """Take sound and yield the frames it completes; see LatentStream.feed."""
        yield from map(self._decode, self.latents.feed(samples, sample_rate))

    def finish(self) -> Iterator[Tensor]:
        """The sound has ended: yield the remaining frames."""
        yield from map(self._decode, self.latents.finish())

    def _decode(self, block: LatentBlock) -> Tensor:
        with torch.inference_mode():
            latents = block.latents.to(self.latents.rollout.dtype)
            video, self.state.decoder = self.autoencoder.decode_stream(latents, self.state.decoder)
        return video[:, :, : block.frames]


def checksum(samples: Tensor, before: int = 0) -> int:
    """CRC-32 of sound [channels, m] or [m] that follows sound of the checksum `before`, however it was cut up."""
    return zlib.crc32(samples.float().T.contiguous().numpy().tobytes(), before)


def identity(rollout: Rollout) -> str:
    """A short hash of all that decides a stream besides its sound: two runs with one identity may share a state."""
    digest = hashlib.blake2b(digest_size=16)
    parts = (rollout.policy, rollout.geometry, rollout.seed, rollout.dtype, rollout.batch, rollout.model.config)
    digest.update(repr(parts).encode())
    digest.update(_sample(rollout.model))
    image, kv = rollout.condition.image, rollout.condition.kv
    constant = [t for layers in (kv.text, kv.image, kv.face) for pair in layers or () for t in pair]
    for tensor in constant if image is None else [image.channels, *constant]:
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _sample(model: nn.Module) -> bytes:
    """A few values of every parameter: tells two checkpoints apart without reading them whole."""
    picked = [p.detach().flatten()[:: max(1, p.numel() // 4)][:4].float().cpu() for p in model.parameters()]
    return torch.cat(picked).numpy().tobytes()
