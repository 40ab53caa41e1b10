"""`joyavatar bench`: speed and memory of this machine, end to end and by part; the last line is JSON.

End to end is what `generate` does, sound to finished file. The baseline is `plain.py` with the same weights, threads
and precision, as many frames out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..audio import AudioTrack
from ..autoencoder import LightAutoencoder
from ..avatar import Avatar, load_embedded, random_embedded
from ..conditioning import reference_tokens
from ..generate import generate, to_uint8
from ..media.writer import VideoWriter
from ..noise import gaussian
from ..plain import PlainRollout, plain_decode
from ..policy import RolloutPolicy
from ..stream import AvatarStream
from .options import dtype_of, size_of

RATE = 16000


@dataclass(frozen=True)
class Setup:
    """What is measured: a system, a picture [1, 3, H, W], blocks to make."""

    avatar: Avatar
    picture: Tensor
    blocks: int
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)

    def stream(self) -> AvatarStream:
        return self.avatar.stream(self.picture, self.policy, seed=0)

    @property
    def frames(self) -> int:
        geometry = self.avatar.geometry((self.picture.shape[3], self.picture.shape[2]), self.policy)
        return geometry.frames_of_block(self.blocks - 1).stop


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    if not 8 <= args.blocks <= 20_000:
        raise ValueError(f"--blocks {args.blocks} must lie in 8 .. 20000")
    width, height = size_of(args.size)
    make = random_embedded if args.random else load_embedded
    avatar = make(dtype=dtype_of(args.dtype))
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    setup = Setup(avatar, torch.nn.functional.avg_pool2d(picture, 9, 1, 4), args.blocks)
    figures: dict[str, object] = {
        "config": args.config,
        "size": args.size,
        "threads": torch.get_num_threads(),
        "dtype": str(avatar.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "frames": setup.frames,
    }
    figures |= parts(setup) | end_to_end(setup)
    if args.soak:
        figures |= soak(setup)
    if args.baseline:
        figures["baseline_end_to_end_fps"] = plain_end_to_end(setup)
        figures["speedup"] = round(float(str(figures["end_to_end_fps"])) / figures["baseline_end_to_end_fps"], 2)
    figures["peak_rss_mb"] = round(peak_rss_mb(), 1)
    if not args.json:
        for name, value in figures.items():
            print(f"{name:24s} {value}")
    print(json.dumps(figures))
    return 0


def parts(setup: Setup) -> dict[str, float]:
    """Frames a second of each part alone, in steady state."""
    stream = setup.stream()
    blocks = _blocks(setup, stream)
    finished = [next(blocks) for _ in range(8)]
    rollout, state = stream.latents.rollout, stream.state
    track = AudioTrack()
    track.push(_sound(30.0), RATE)
    frames = len(rollout.geometry.frames_of_block(1))
    video, decoder = setup.avatar.autoencoder.decode_stream(finished[1].to(setup.avatar.dtype), None)

    def denoise() -> None:
        state.rollout.audio[state.rollout.window] = state.rollout.audio[state.rollout.window - 1]
        rollout.run_window(state.rollout)

    latents = finished[1].to(setup.avatar.dtype)
    latent_range = rollout.geometry.latents_of_block(6)
    return {
        "dit_fps": round(frames / _median(denoise), 1),
        "decode_fps": round(frames / _median(lambda: setup.avatar.autoencoder.decode_stream(latents, decoder)), 1),
        "features_fps": round(frames / _median(lambda: stream.latents.front_end.features(track, latent_range)), 1),
        "write_fps": _write_fps(setup, to_uint8(video)),
    }


def end_to_end(setup: Setup) -> dict[str, float]:
    """Sound to finished file: all frames over all seconds, and the time to the first frame."""
    stream = setup.stream()
    sound = _sound(setup.frames / float(setup.avatar.fps))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stream = setup.stream()
        with _writer(setup, Path(folder)) as writer:
            progress = generate(stream, _chunks(sound), lambda _: writer)
        seconds = time.perf_counter() - start
    assert progress.frames == setup.frames, (progress.frames, setup.frames)
    return {
        "end_to_end_fps": round(progress.frames / seconds, 2),
        "first_frame_s": round((progress.first_frame_s or 0) + (seconds - progress.seconds), 3),
        "state_mb": round(stream.state.nbytes() / 1e6, 2),
    }


def plain_end_to_end(setup: Setup) -> float:
    """Frames a second of the plain way: features, rollout with a clean pass, decode and encode at the end."""
    avatar = setup.avatar
    stream = setup.stream()
    rollout = stream.latents.rollout
    sound = _sound(setup.frames / float(avatar.fps))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        start = time.perf_counter()
        condition = avatar.condition(setup.picture)
        assert condition.image is not None
        track = AudioTrack()
        track.push(sound, RATE)
        track.finish()
        latents = rollout.geometry.latents_of_frames(setup.frames)
        plain = PlainRollout(
            avatar.model,
            condition.image.channels,
            reference_tokens(condition.image.picture, avatar.model.config.patch),
            stream.latents.front_end.features(track, range(latents)).tokens,
            lambda block, forward, shape, purpose: gaussian(0, block, forward, shape, purpose),  # pyright: ignore
        )
        clip = plain.run(setup.blocks)
        video = plain_decode(_unfolded(avatar), clip.to(avatar.dtype))
        with _writer(setup, Path(folder)) as writer:
            writer.write_audio(sound[None].numpy())
            writer.write(to_uint8(video))
        return round(video.shape[2] / (time.perf_counter() - start), 2)


def soak(setup: Setup) -> dict[str, float]:
    """Median seconds of a block (rollout and decode) among blocks 10-110 and 10,000-10,100 of one stream."""
    stream = setup.stream()
    times = {"early": [], "late": []}
    last = time.perf_counter()
    for i, latents in enumerate(_blocks(setup, stream, endless=True)):
        _, stream.state.decoder = setup.avatar.autoencoder.decode_stream(
            latents.to(setup.avatar.dtype), stream.state.decoder
        )
        now = time.perf_counter()
        if 10 <= i < 110:
            times["early"].append(now - last)
        if 10_000 <= i < 10_100:
            times["late"].append(now - last)
        last = now
        if i == 10_100:
            break
    early, late = statistics.median(times["early"]), statistics.median(times["late"])
    return {"block_s_10_110": early, "block_s_10000_10100": late, "late_over_early": late / early}


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far; not a number where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _blocks(setup: Setup, stream: AvatarStream, endless: bool = False) -> Iterator[Tensor]:
    """Finished latents of a stream fed second by second."""
    second = 0
    sound = _sound(60.0)
    while endless or second < 60:
        start = second % 59 * RATE
        for block in stream.latents.feed(sound[start : start + RATE], RATE):
            yield block.latents
        second += 1


def _sound(seconds: float) -> Tensor:
    """Noise with the rhythm of speech: float32 [m] at 16 kHz."""
    samples = round(seconds * RATE)
    rhythm = torch.sin(torch.arange(samples) / RATE * 8 * torch.pi).clamp(min=0)
    return torch.randn(samples, generator=torch.Generator().manual_seed(1)) * 0.1 * rhythm


def _chunks(sound: Tensor) -> Iterator[tuple[np.ndarray, int]]:
    for piece in sound[None].split(RATE, dim=1):
        yield piece.numpy(), RATE


def _writer(setup: Setup, folder: Path) -> VideoWriter:
    height, width = setup.picture.shape[2:]
    return VideoWriter(
        folder / "bench.mp4", width, height, source_fps=setup.avatar.fps, audio_rate=RATE, audio_channels=1, settings={}
    )


def _write_fps(setup: Setup, frames: np.ndarray, repeats: int = 20) -> float:
    with tempfile.TemporaryDirectory() as folder, _writer(setup, Path(folder)) as writer:
        start = time.perf_counter()
        for _ in range(repeats):
            writer.write(frames)
        return round(repeats * len(frames) / (time.perf_counter() - start), 1)


def _unfolded(avatar: Avatar) -> LightAutoencoder:
    """The decoder as it is trained: the same weights, not folded."""
    assert isinstance(avatar.autoencoder, LightAutoencoder) and avatar.autoencoder.original is not None
    return avatar.autoencoder.original.to(memory_format=torch.contiguous_format)  # pyright: ignore


@torch.inference_mode()
def _median(call: Callable[[], object], repeats: int = 15) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
