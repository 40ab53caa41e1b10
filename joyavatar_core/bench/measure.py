"""Frames a second of every part of a system, end to end, over a long stream, and of the plain way beside it.

Shape legend: B batch, C latent channels, n latents of a block, T pixel frames, H W pixels, m sound samples.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..audio import AudioTrack
from ..autoencoder import LightAutoencoder
from ..avatar import Avatar
from ..conditioning import reference_tokens
from ..generate import FrameSink, generate, to_uint8
from ..noise import gaussian
from ..overlap import Overlap
from ..plain import PlainRollout, _frequency_table, plain_decode
from ..rollout import Rollout
from ..stream import AvatarStream
from ..together import Speaker, generate_together
from ..types import VideoAutoencoder, nbytes
from . import timing
from .ceilings import Ceilings
from .costs import model_cost
from .subject import Setup, run_steady_window, steady_state
from .trace import KINDS, flops, moved_bytes

RATE = 16000
KEPT_BLOCKS = 8
Figures = dict[str, Any]


@torch.inference_mode()
def transformer(setup: Setup, ceilings: Ceilings, repeats: int = 15) -> Figures:
    """The rollout alone in steady state: speed, work, and its share of the ceilings."""
    rollout, device = setup.rollout(), setup.avatar.device
    state = steady_state(rollout)

    def window() -> None:
        run_steady_window(rollout, state)

    warm_up = timing.seconds(window, device, repeats=3, warm_up=0)
    timing.restart_peak(device)
    taken = statistics.median(timing.seconds(window, device, repeats, warm_up=0))
    peak = timing.peak_bytes(device)
    spent, kernels = timing.by_kind(window, device)
    figures: Figures = {
        "dit_fps": round(len(setup.geometry.frames_of_block(1)) / taken, 2),
        "window_s": round(taken, 6),
        "warm_up_s": [round(s, 4) for s in warm_up],
        "window_peak_bytes": peak,
        "measured_s": {k: round(s, 6) for k, s in spent.items()},
        "kernels": kernels,
        "finite": all(bool(t.isfinite().all()) for t in state.noisy.values()),
    }
    if (waits := timing.waits(window, device)) is not None:
        figures["host_waits"] = waits
    return figures | _against(setup, ceilings, taken)


def _against(setup: Setup, ceilings: Ceilings, taken: float) -> Figures:
    """What the steady window costs by its shapes, and its time at the ceilings beside the time taken."""
    avatar = setup.avatar
    settled, cuda = avatar.autoencoder.settled_latents, avatar.device.type == "cuda"
    fused = kernels.fused(avatar.device, avatar.fast.kernels)
    cost = model_cost(avatar.model.config, setup.policy, setup.geometry, avatar.dtype, settled, cuda, fused)
    predicted = ceilings.seconds(cost.work)
    products = predicted["linear"] + predicted["attention"]
    return {
        "flops_per_block": flops(cost.work),
        "flops": {kind: flops(cost.work, kind) for kind in KINDS[:2]},
        "moved_bytes": {kind: moved_bytes(cost.work, kind) for kind in KINDS},
        "kv_bytes": cost.cache,
        "predicted_s": {k: round(s, 6) for k, s in predicted.items()},
        "achieved_tflops": round(flops(cost.work) / taken / 1e12, 3),
        "share_of_products": round(products / taken, 3),
        "share_of_all": round(sum(predicted.values()) / taken, 3),
    }


@torch.inference_mode()
def decoder(setup: Setup, autoencoder: VideoAutoencoder, repeats: int = 15) -> Figures:
    """Frames a second of decoding a block, and the most memory that takes."""
    avatar, geometry = setup.avatar, setup.geometry
    shape = (1, autoencoder.latent_channels, geometry.block_latents, *geometry.latent_size)
    latents = torch.randn(shape).to(avatar.device, avatar.dtype)
    state = autoencoder.decode_stream(latents, None)[1]
    timing.restart_peak(avatar.device)
    taken = timing.seconds(lambda: autoencoder.decode_stream(latents, state), avatar.device, repeats)
    return {
        "fps": round(len(geometry.frames_of_block(1)) / statistics.median(taken), 2),
        "peak_bytes": timing.peak_bytes(avatar.device),
    }


@torch.inference_mode()
def features(setup: Setup) -> float:
    """Frames a second of the audio front end."""
    geometry = setup.geometry
    front_end, track = setup.avatar.front_end(geometry), AudioTrack()
    track.push(sound(30.0), RATE)
    blocks = chain.from_iterable(iter(lambda: range(11, 20), None))  # another block each time: the last is remembered

    def hear() -> None:
        front_end.features(track, geometry.latents_of_block(next(blocks)))

    taken = timing.seconds(hear, setup.avatar.device, repeats=9, warm_up=2)
    return round(len(geometry.frames_of_block(1)) / statistics.median(taken), 1)


def writing(setup: Setup, repeats: int = 20) -> float | None:
    """Frames a second of encoding the video; None without PyAV."""
    picture = to_uint8(setup.picture.unsqueeze(2).expand(-1, -1, 12, -1, -1))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        writer = _writer(setup, Path(folder), stack)
        if writer is None:
            return None
        start = time.perf_counter()
        for _ in range(repeats):
            writer.write(picture)
        return round(repeats * len(picture) / (time.perf_counter() - start), 1)


# End to end


def end_to_end(setup: Setup, overlap: Overlap | None = None) -> Figures:
    """Sound to finished file: all frames over all seconds, the time to the first frame, the most memory.

    overlap: see `generate`. `frames_crc32`, of the first blocks, is to be the same with any.
    """
    avatar = setup.avatar
    timing.restart_peak(avatar.device)
    pieces = list(_chunks(sound(setup.frames / float(avatar.fps))))
    with tempfile.TemporaryDirectory() as folder:
        timing.synchronise(avatar.device)
        start = time.perf_counter()
        stream = _stream(setup)
        with ExitStack() as stack:
            writer = _writer(setup, Path(folder), stack)
            sink = _Sink(writer)
            progress = generate(stream, pieces, lambda _: sink, overlap=overlap)
        taken = time.perf_counter() - start
    assert progress.frames == setup.frames, (progress.frames, setup.frames)
    lead = setup.policy.lead_blocks * len(setup.geometry.frames_of_block(1)) / float(avatar.fps)
    first = sink.first - start
    return {
        "end_to_end_fps": round(progress.frames / taken, 2),
        "end_to_end": "features, transformer, decoder, frames to the host" + (", H.264" if writer else ""),
        "first_frame_s": round(first, 3),
        "lookahead_s": lead,
        "first_frame_live_s": round(first + lead, 3),
        "overlap": [name for name in ("hear", "decode", "write") if overlap and getattr(overlap, name)],
        "frames_crc32": sink.checksum,
        "state_mb": round(stream.state.nbytes() / 1e6, 2),
        "peak_bytes": timing.peak_bytes(avatar.device),
    }


def together(setup: Setup, count: int, overlap: Overlap | None = None) -> Figures:
    """So many avatars through one rollout: frames a second of all of them, transformer and end to end; memory."""
    return {"avatars": count} | _transformer_together(setup, count) | _end_to_end_together(setup, count, overlap)


@torch.inference_mode()
def _transformer_together(setup: Setup, count: int) -> Figures:
    device, rollout = setup.avatar.device, Rollout.together([setup.rollout()] * count)
    state = steady_state(rollout)

    def window() -> None:
        run_steady_window(rollout, state)

    timing.seconds(window, device, repeats=2, warm_up=0)
    timing.restart_peak(device)
    taken = statistics.median(timing.seconds(window, device, repeats=8, warm_up=0))
    return {
        "dit_fps": round(count * len(setup.geometry.frames_of_block(1)) / taken, 2),
        "window_s": round(taken, 6),
        "window_peak_bytes": timing.peak_bytes(device),
        "kv_bytes": sum(nbytes(cache.tensors()) for cache in state.caches),
    }


def _end_to_end_together(setup: Setup, count: int, overlap: Overlap | None) -> Figures:
    avatar, sinks = setup.avatar, []
    timing.restart_peak(avatar.device)
    pieces = list(_chunks(sound(setup.frames / float(avatar.fps))))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with ExitStack() as stack:
            speakers = []
            for i in range(count):
                rollout = avatar.rollout(setup.picture, setup.policy, i, setup.encoded)
                sinks.append(_Sink(_writer(setup, Path(folder), stack, f"{i}.mp4")))
                front_end = avatar.front_end(setup.geometry)
                speakers.append(Speaker(rollout, front_end, avatar.autoencoder, pieces, sinks[-1]))
            made = generate_together(speakers, None, overlap)
        taken = time.perf_counter() - start
    return {
        "end_to_end_fps": round(sum(progress.frames for progress in made) / taken, 2),
        "first_frame_s": round(max(sink.first for sink in sinks) - start, 3),
        "peak_bytes": timing.peak_bytes(avatar.device),
    }


class _Sink:
    """A writer, or none, and when the first frames came. The frames are on the host by then."""

    def __init__(self, writer: FrameSink | None) -> None:
        self.writer, self.first = writer, 0.0
        self.kept: list[np.ndarray] = []

    @property
    def checksum(self) -> int:
        """CRC-32 of the frames of the first blocks, made after the run."""
        return reduce(lambda before, frames: zlib.crc32(frames.data, before), self.kept, 0)

    def write(self, frames: np.ndarray) -> None:
        self.first = self.first or time.perf_counter()
        if len(self.kept) < KEPT_BLOCKS:
            self.kept.append(frames)
        if self.writer:
            self.writer.write(frames)

    def write_audio(self, samples: np.ndarray) -> None:
        if self.writer:
            self.writer.write_audio(samples)


def soak(setup: Setup, blocks: int = 10_101, span: int = 100) -> Figures:
    """Seconds of a block (rollout and decoder) and memory, early and late in one stream of so many blocks.

    Medians of blocks 10 to 10 + span and of the last `span`.
    """
    device, stream = setup.avatar.device, _stream(setup)
    early, late = range(10, 10 + span), range(blocks - span, blocks)
    marks: dict[str, list[timing.Mark]] = {"early": [], "late": []}
    held: dict[str, int] = {}
    for i, latents in enumerate(_endless(stream)):
        decoded = setup.avatar.autoencoder.decode_stream(latents.to(setup.avatar.dtype), stream.state.decoder)
        stream.state.decoder = decoded[1]
        for name, counted in (("early", early), ("late", late)):
            if i in counted:
                marks[name].append(timing.mark(device))
        if i in (early[-1], late[-1]):
            held[str(i + 1)] = torch.cuda.memory_allocated(device) if device.type == "cuda" else stream.state.nbytes()
        if i + 1 == blocks:
            break
    first, last = (statistics.median(timing.between(marks[n])) for n in ("early", "late"))
    return {"block_s_early": first, "block_s_late": last, "late_over_early": last / first, "held_bytes": held}


# The plain way


def plain_end_to_end(setup: Setup) -> float:
    """Frames a second of the plain way: features, rollout with a clean pass, decode and encode at the end."""
    avatar = setup.avatar
    heard = sound(setup.frames / float(avatar.fps))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, torch.inference_mode():
        start = time.perf_counter()
        track = AudioTrack()
        track.push(heard, RATE)
        track.finish()
        latents = setup.geometry.latents_of_frames(setup.frames)
        tokens = avatar.front_end(setup.geometry).features(track, range(latents)).tokens
        clip = _plain(setup, tokens).run(setup.blocks)
        video = plain_decode(_unfolded(avatar), clip.to(avatar.dtype))
        writer = _writer(setup, Path(folder), stack)
        frames = to_uint8(video)
        if writer is not None:
            writer.write_audio(heard[None].numpy())
            writer.write(frames)
        stack.close()
        return round(video.shape[2] / (time.perf_counter() - start), 2)


def plain_transformer(setup: Setup) -> Figures:
    """A clip's latents by the engine's rollout and by the plain one; which attends neither to text nor to a face."""
    device, blocks, frames = setup.avatar.device, setup.blocks, setup.frames
    with torch.inference_mode():
        rollout = setup.rollout()
        heard = steady_state(rollout).audio
        block = next(iter(heard.values()))
        tokens = block.tokens.repeat(blocks, 1, 1)

        def engine() -> None:
            state = rollout.start()
            state.audio = dict.fromkeys(range(blocks), block)
            for _ in rollout.run(state, blocks):
                pass

        plain = _plain(setup, tokens)
        _frequency_table.cache_clear()  # of another device, perhaps
        with device:  # it makes its tables where tensors are made by default
            plain.run(2)
            slow = timing.seconds(lambda: _again(plain).run(blocks), device, repeats=1, warm_up=0)[0]
        _frequency_table.cache_clear()
        fast = timing.seconds(engine, device, repeats=1, warm_up=1)[0]
    return {
        "clip_dit_fps": round(frames / fast, 2),
        "baseline_dit_fps": round(frames / slow, 2),
        "dit_speedup": round(slow / fast, 2),
    }


def _plain(setup: Setup, tokens: Tensor) -> PlainRollout:
    avatar = setup.avatar
    device = avatar.device
    image = avatar.condition(setup.picture, setup.encoded).image
    assert image is not None
    given = setup.encoded.image
    if given is None:
        given = reference_tokens(image.picture, avatar.model.config.patch)

    def noise(block: int, forward: int, shape: tuple[int, ...], purpose: str) -> Tensor:
        return gaussian(0, block, forward, shape, purpose).to(device)  # pyright: ignore[reportArgumentType]

    return PlainRollout(avatar.model, image.channels, given.to(device, avatar.dtype), tokens.to(device), noise)


def _again(plain: PlainRollout) -> PlainRollout:
    plain.history.clear()
    return plain


def _unfolded(avatar: Avatar) -> LightAutoencoder:
    """The decoder as it is trained: the same weights, not folded."""
    assert isinstance(avatar.autoencoder, LightAutoencoder) and avatar.autoencoder.original is not None
    return avatar.autoencoder.original.to(memory_format=torch.contiguous_format)  # pyright: ignore


# Sound and files


def sound(seconds: float) -> Tensor:
    """Noise with the rhythm of speech: float32 [m] at 16 kHz."""
    samples = round(seconds * RATE)
    rhythm = torch.sin(torch.arange(samples) / RATE * 8 * torch.pi).clamp(min=0)
    return torch.randn(samples, generator=torch.Generator().manual_seed(1)) * 0.1 * rhythm


def _chunks(samples: Tensor) -> Iterator[tuple[np.ndarray, int]]:
    for piece in samples[None].split(RATE, dim=1):
        yield piece.numpy(), RATE


def _stream(setup: Setup) -> AvatarStream:
    return setup.avatar.stream(setup.picture, setup.policy, 0, setup.encoded)


def _endless(stream: AvatarStream) -> Iterator[Tensor]:
    """Finished latents of a stream fed second by second."""
    minute = sound(60.0).split(RATE)
    for second in chain.from_iterable(iter(lambda: minute, None)):
        for block in stream.latents.feed(second, RATE):
            yield block.latents


def _writer(setup: Setup, folder: Path, stack: ExitStack, name: str = "bench.mp4") -> Any:
    """A video file that is closed with the stack; None without PyAV."""
    try:
        from ..media.writer import VideoWriter
    except ImportError:
        return None
    height, width = setup.picture.shape[2:]
    writer: Callable[..., Any] = VideoWriter
    return stack.enter_context(
        writer(
            folder / name,
            width,
            height,
            source_fps=setup.avatar.fps,
            audio_rate=RATE,
            audio_channels=1,
            settings={},
        )
    )
