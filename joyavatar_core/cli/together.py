"""`joyavatar generate` with several pictures, sounds or seeds: several videos at a time through one rollout."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..avatar import Avatar, Encoded
from ..generate import Progress, from_uint8
from ..geometry import Geometry
from ..media.picture import read_picture
from ..media.sound import SoundFile
from ..media.writer import checked_path
from ..policy import RolloutPolicy
from ..together import Speaker, generate_together
from ..view import View
from .generate import HeardSound, check, decoder_of, progress_bar, seen, settings_of, state_path, system_of, writer_of
from .options import overlap_of, policy_of, several_gpus


def run(args: argparse.Namespace) -> int:
    """Make them all; the model is loaded once."""
    jobs = jobs_of(args)
    _refuse(args, jobs)
    for job in jobs:
        check(job)
        checked_path(job.output)
    if args.threads:
        torch.set_num_threads(args.threads)
    sounds = [SoundFile(job.audio) for job in jobs]
    pictures = [read_picture(job.image) for job in jobs]
    avatar, encoded = system_of(jobs[0], pictures)
    policy = policy_of(args, avatar.policy)
    views = [seen(job, avatar, policy, picture) for job, picture in zip(jobs, pictures, strict=True)]
    started, made = time.perf_counter(), dict[int, Progress]()
    batch = min(args.batch or len(jobs), len(jobs))
    videos = list(zip(jobs, sounds, views, encoded, strict=True))
    for some in _batches([view.geometry for view in views], batch):
        made |= zip(some, _together(avatar, policy, [videos[i] for i in some]), strict=True)
    if args.json:
        _report(Path(args.json), jobs, [made[i] for i in range(len(jobs))], batch, time.perf_counter() - started)
    return 0


def jobs_of(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each video. What is given once serves all. ValueError where numbers or names do not fit."""
    given = {name: _listed(vars(args)[name]) for name in ("image", "audio", "seed", "output")}
    count = max(len(values) for values in given.values())
    odd = {name: len(values) for name, values in given.items() if name != "output" and len(values) not in (1, count)}
    if odd:
        counts = " and ".join(f"{len(values)} of --{name}" for name, values in given.items() if len(values) > 1)
        raise ValueError(f"{counts}: give as many of each, or one for all")
    rows = {name: values * (count if len(values) == 1 else 1) for name, values in given.items()}
    rows["output"] = [str(path) for path in _outputs(given["output"], rows["image"], rows["audio"])]
    named = ({name: values[i] for name, values in rows.items()} for i in range(count))
    return [argparse.Namespace(**{**vars(args), **each}) for each in named]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _outputs(given: Sequence[str], images: Sequence[str], sounds: Sequence[str]) -> list[Path]:
    """A file for each video: as named, or in a folder by what tells them apart."""
    count = len(images)
    if len(given) == count:
        twice = sorted({path for path in given if given.count(path) > 1})
        if twice:
            raise ValueError(f"--output {twice[0]} is named twice: give each video a name of its own, or name a folder")
        return [Path(path) for path in given]
    if len(given) > 1:
        raise ValueError(f"{len(given)} of --output for {count} videos: give one each, or a folder")
    folder = Path(given[0])
    stems = [(Path(image).stem, Path(sound).stem) for image, sound in zip(images, sounds, strict=True)]
    ways = ([a for a, _ in stems], [b for _, b in stems], [f"{a}-{b}" for a, b in stems])
    apart = next((names for names in ways if len({name.casefold() for name in names}) == count), None)
    names = apart or [f"{name}-{i + 1}" for i, name in enumerate(ways[2])]
    return [folder / f"{name}.mp4" for name in names]


def _refuse(args: argparse.Namespace, jobs: Sequence[argparse.Namespace]) -> None:
    """What several avatars at a time cannot do."""
    if any(job.audio == "-" for job in jobs):
        raise ValueError("--audio -: live sound is one; give a single --image, --seed and --output with it")
    if args.resume:
        raise ValueError("--resume: several avatars at a time save no states; resume them one by one, or start anew")
    if several_gpus(args):
        raise ValueError(
            "--gpus: several avatars at a time run in one process; leave --gpus out, or run them one by one"
        )
    several = len({job.image for job in jobs}) > 1
    if args.face and several:
        raise ValueError("--face is of one person: leave it out, or run the pictures one by one")
    if args.clip_vision and Path(args.clip_vision).is_file() and several:
        raise ValueError(f"--clip-vision {args.clip_vision} is of one picture: give the encoder's folder")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch} must be at least 1")


def _batches(geometries: Sequence[Geometry], batch: int) -> Iterator[list[int]]:
    """Places of up to `batch` videos each, whose model pictures have one size; a close-up may have another."""
    for geometry in dict.fromkeys(geometries):
        alike = [i for i, other in enumerate(geometries) if other == geometry]
        for first in range(0, len(alike), batch):
            yield alike[first : first + batch]


def _together(
    avatar: Avatar,
    policy: RolloutPolicy,
    videos: Sequence[tuple[argparse.Namespace, SoundFile, View, Encoded]],
) -> list[Progress]:
    """One batch."""
    options = videos[0][0]
    decoder = decoder_of(options, avatar) or avatar.autoencoder
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar())
        speakers = []
        for job, sound, view, said in videos:
            rollout = avatar.rollout(from_uint8(view.picture), policy, job.seed, said)
            output = Path(job.output)
            state_path(output).unlink(missing_ok=True)  # of an earlier run, whose part this one replaces
            writer = stack.enter_context(writer_of(output, view, sound, job.fps, settings_of(job, policy, view)))
            front_end, seconds = avatar.front_end(view.geometry), sound.duration or 0.0
            speakers.append(Speaker(rollout, front_end, decoder, HeardSound(sound), view.into(writer), seconds))
        frames = dict.fromkeys(range(len(videos)), 0)

        def tell(place: int, progress: Progress) -> None:
            frames[place] = progress.frames
            bar.set_postfix_str(f"{sum(frames.values()) / max(progress.seconds, 1e-9):.1f} fps")
            bar.update(1)

        return generate_together(speakers, tell, overlap_of(options.overlap, avatar.device))


def _report(
    path: Path, jobs: Sequence[argparse.Namespace], made: Sequence[Progress], batch: int, seconds: float
) -> None:
    """Figures of the run as JSON."""
    frames = sum(progress.frames for progress in made)
    files = [
        {
            "output": job.output,
            "frames": progress.frames,
            "blocks": progress.blocks,
            "first_frame_s": progress.first_frame_s and round(progress.first_frame_s, 3),
        }
        for job, progress in zip(jobs, made, strict=True)
    ]
    report = {
        "batch": batch,
        "frames": frames,
        "seconds": round(seconds, 3),
        "end_to_end_fps": round(frames / max(seconds, 1e-9), 2),
        "files": files,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
