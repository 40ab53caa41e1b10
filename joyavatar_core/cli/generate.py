"""`joyavatar generate` and `demo`: from files to a video file, with a progress bar and a report."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import samples
from ..avatar import Avatar, Encoded, load_embedded
from ..generate import FrameSink, Progress, Resume, from_uint8, generate
from ..geometry import Geometry
from ..media.picture import read_picture
from ..media.sound import PcmPipe, SoundFile
from ..media.writer import VideoWriter, checked_path, part_path
from ..overlap import Overlap
from ..policy import RolloutPolicy
from ..stream import AvatarStream
from ..types import VideoAutoencoder
from ..view import View, view_for
from .options import (
    device_of,
    dtype_of,
    overlap_of,
    policy_of,
    quickened_by,
    several_gpus,
    several_videos,
    size_of,
)

logger = logging.getLogger(__name__)

OpenSink = Callable[[int], FrameSink]


@dataclass
class HeardSound:
    """Sound on its way to the engine. Live sound is read by a thread of its own, which notes when each piece came."""

    source: SoundFile | PcmPipe
    arrivals: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=4096))

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        pieces = self._live(self.source) if isinstance(self.source, PcmPipe) else iter(self.source)
        return ((samples, self.source.sample_rate) for samples in pieces)

    def _live(self, pipe: PcmPipe) -> Iterator[np.ndarray]:
        pieces: queue.Queue[np.ndarray | BaseException | None] = queue.Queue(maxsize=4096)

        def read() -> None:
            total = 0
            try:
                for samples in pipe:
                    total += samples.shape[1]
                    self.arrivals.append((total / pipe.sample_rate, time.perf_counter()))
                    pieces.put(samples)
                pieces.put(None)
            except (ValueError, OSError) as error:
                pieces.put(error)

        threading.Thread(target=read, daemon=True).start()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def arrival(self, second: float) -> float | None:
        """When the sound had reached this second; None if it never did."""
        return next((moment for heard, moment in tuple(self.arrivals) if heard >= second), None)


def run(args: argparse.Namespace) -> int:
    """`joyavatar generate`."""
    if several_videos(args):
        from . import together

        return together.run(args)
    output = checked_path(args.output)
    check(args)
    if several_gpus(args):
        from . import several

        return several.run(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    sound = sound_of(args)
    picture = read_picture(args.image)
    avatar, encoded = system(args, picture)
    policy = policy_of(args, avatar.policy)
    view = seen(args, avatar, policy, picture)
    stream = avatar.stream(from_uint8(view.picture), policy, args.seed, encoded, decoder_of(args, avatar))
    job = Job(stream, view, sound, output, args)
    progress = job.run(settings_of(args, policy, view))
    if args.json:
        job.report(Path(args.json), progress)
    return 0


def demo(args: argparse.Namespace) -> int:
    """`joyavatar demo`: generate with a picture and a voice of the package."""
    if args.list:
        print(f"pictures: {', '.join(samples.pictures())}\nvoices: {', '.join(samples.voices())}")
        return 0
    out = Path(args.out)
    words = ["generate", "--image", str(samples.picture(args.image)), "--audio", str(samples.voice(args.audio))]
    words += ["--output", str(out / "avatar.mp4"), "--seed", str(args.seed)]
    words += ["--size", args.size] if args.size else []
    words += ["--policy", args.policy] if args.policy else []
    from .main import build_parser

    status = run(build_parser().parse_args(words))
    print(f"{out / 'avatar.mp4'}")
    return status


@dataclass
class Job:
    """One run: where its parts meet while it lasts. cancelled_by, file_options: see VideoWriter."""

    stream: AvatarStream
    view: View
    sound: HeardSound
    output: Path
    args: argparse.Namespace
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    cancelled_by: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    file_options: dict[str, Any] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        """Of what the model makes."""
        return self.view.geometry

    @property
    def state_path(self) -> Path:
        """Of the saved state."""
        return state_path(self.output)

    @property
    def overlap(self) -> Overlap:
        """Which stages work beside the rollout."""
        return overlap_of(self.args.overlap, self.stream.latents.rollout.device, live=self.args.audio == "-")

    def run(self, settings: dict[str, str]) -> Progress:
        resume = Resume(self.state_path, self.args.checkpoint_blocks, self.args.resume)
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget, resume)
            open_sink, tell = stack.enter_context(self.shown(settings))
            return generate(self.stream, self.sound, open_sink, resume, tell, self.overlap)

    @contextlib.contextmanager
    def shown(self, settings: dict[str, str]) -> Iterator[tuple[OpenSink, Callable[[Progress], None]]]:
        """What opens the file and what moves the bar, while the run lasts; both are closed after it."""
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(progress_bar())

            def open_sink(frames_done: int) -> FrameSink:
                return self.view.into(stack.enter_context(self._writer(frames_done, settings)))

            def tell(progress: Progress) -> None:
                self._note_lag(progress)
                _show(bar, progress, self._expected_blocks())

            yield open_sink, tell

    def _forget(self, resume: Resume) -> None:
        """A saved state lives as long as the unfinished video it belongs to."""
        if not part_path(self.output).exists():
            resume.path.unlink(missing_ok=True)

    def _expected_blocks(self) -> int | None:
        """Blocks of the clip by what the sound file says of its length."""
        source = self.sound.source
        seconds = source.duration if isinstance(source, SoundFile) else None
        if not seconds:
            return None
        return self.geometry.blocks_of_frames(self.geometry.frames_of_duration(Fraction(seconds)))

    def report(self, path: Path, progress: Progress, more: Mapping[str, Any] | None = None) -> None:
        """Figures of the run, and `more`, as JSON."""
        report: dict[str, Any] = {
            "output": str(self.output),
            "frames": progress.frames,
            "blocks": progress.blocks,
            "seconds": round(progress.seconds, 3),
            "end_to_end_fps": round(progress.fps, 2),
            "first_frame_s": progress.first_frame_s and round(progress.first_frame_s, 3),
            "state_bytes": self.stream.state.nbytes(),
        }
        if self.lags:
            report["live_latency_median_s"] = round(float(np.median(self.lags)), 3)
            report["live_latency_max_s"] = round(max(self.lags), 3)
        report |= more or {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")

    def _writer(self, frames_done: int, settings: dict[str, str]) -> VideoWriter:
        more = {"frames_done": frames_done, "cancelled_by": self.cancelled_by, **self.file_options}
        return writer_of(self.output, self.view, self.sound.source, self.args.fps, settings, **more)

    def _note_lag(self, progress: Progress) -> None:
        """Live input: time from the arrival of a block's last sound to the block's frames being written."""
        if self.args.audio != "-":
            return
        stop = self.geometry.frames_of_block(progress.blocks - 1).stop
        came = self.sound.arrival(float(stop / self.geometry.fps))
        if came is not None:
            self.lags.append(progress.moment - came)


def writer_of(
    output: Path,
    view: View,
    source: SoundFile | PcmPipe,
    fps: Fraction | None,
    settings: dict[str, str],
    frames_done: int = 0,
    **more: Any,
) -> VideoWriter:
    """A file whose segments are the blocks of the stream: it grows, and can be resumed, block by block.

    more: see VideoWriter.
    """
    geometry = view.geometry
    return VideoWriter.resume(
        output,
        *view.size,
        frames_done=frames_done,
        source_fps=geometry.fps,
        output_fps=fps,
        audio_rate=source.sample_rate,
        audio_channels=source.channels,
        settings=settings,
        segment_frames=len(geometry.frames_of_block(1)),
        first_segment_frames=len(geometry.frames_of_block(0)),
        **more,
    )


def state_path(output: Path) -> Path:
    """Of the saved state of a run into a file."""
    return output.with_suffix(".state.safetensors")


def check(args: argparse.Namespace) -> None:
    """What can be known to be wrong before a model is loaded."""
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"seed {args.seed} must lie in 0 .. 2**64 - 1")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be at least 1")
    if args.checkpoint_blocks < 0:
        raise ValueError(f"--checkpoint-blocks {args.checkpoint_blocks} must be at least 0 (0: no states)")


def sound_of(args: argparse.Namespace) -> HeardSound:
    if args.audio != "-":
        return HeardSound(SoundFile(args.audio))
    if args.resume:
        raise ValueError("--resume needs an audio file: live sound cannot be heard again")
    rate, _, rest = args.pcm.partition(":")
    channels, _, form = rest.partition(":")
    if not (rate.isdigit() and channels.isdigit() and form):
        raise ValueError(f"--pcm {args.pcm!r}: write it as RATE:CHANNELS:FORMAT, e.g. 16000:1:s16le")
    return HeardSound(PcmPipe(sys.stdin.buffer, int(rate), int(channels), form))


def system(args: argparse.Namespace, picture: np.ndarray) -> tuple[Avatar, Encoded]:
    """The model the options name, and what its encoders say of the picture and the prompt."""
    avatar, encoded = system_of(args, [picture])
    return avatar, encoded[0]


def system_of(args: argparse.Namespace, pictures: Sequence[np.ndarray]) -> tuple[Avatar, list[Encoded]]:
    """The same for several pictures."""
    device = device_of(args.device)
    dtype = dtype_of(args.dtype)
    if args.model == "tiny":
        return quickened_by(args, load_embedded(device, dtype)), [Encoded() for _ in pictures]
    from .full_size import load_for_pictures

    avatar, encoded = load_for_pictures(args, pictures, device, dtype)
    return quickened_by(args, avatar), encoded


def decoder_of(args: argparse.Namespace, avatar: Avatar) -> VideoAutoencoder | None:
    if not args.decoder:
        return None
    from .full_size import load_decoder

    return load_decoder(args.decoder, avatar)


def seen(args: argparse.Namespace, avatar: Avatar, policy: RolloutPolicy, picture: np.ndarray) -> View:
    """What of the picture the model makes."""
    size = size_of(args.size) if args.size else None
    view = view_for(avatar, policy, picture, size, args.fit, args.close_up == "auto")
    if view.paste:
        logger.info("the face is small: made at its own size and laid back at %s", view.paste.region)
    return view


def settings_of(args: argparse.Namespace, policy: RolloutPolicy, view: View) -> dict[str, str]:
    """What the file's metadata says of how it was made."""
    width, height = view.size
    close_up = {} if view.paste is None else {"close_up": ",".join(str(n) for n in astuple(view.paste.region))}
    return {
        "seed": str(args.seed),
        "model": ",".join(Path(part).name for part in args.model.split(",")),
        "prompt": args.prompt,
        "size": f"{width}x{height}",
        **close_up,
        "policy": json.dumps(asdict(policy)),
    }


def progress_bar() -> Any:
    from tqdm import tqdm

    return tqdm(unit="block", disable=None, dynamic_ncols=True)


def _show(bar: Any, progress: Progress, expected: int | None) -> None:
    """Blocks, frames a second; tqdm adds the time left."""
    bar.total = progress.blocks_total or expected
    if bar.n == 0 and progress.blocks > 1:
        bar.initial = bar.n = progress.blocks - 1
    bar.set_postfix_str(f"{progress.fps:.1f} fps")
    bar.update(progress.blocks - bar.n)
