"""`joyavatar generate --gpus N`, or under torchrun: one video by several processes."""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..generate import from_uint8
from ..media.picture import read_picture
from ..media.writer import cancelled_path, checked_path, part_path
from ..multi_gpu import child, timeline
from ..multi_gpu.child import Asked
from ..multi_gpu.launcher import interruptible, launch
from ..multi_gpu.members import Member, RankLostError, met, started_by_torchrun
from ..multi_gpu.run import Plan, RankedRun, ranked_run
from ..overlap import Overlap
from ..policy import RolloutPolicy
from .generate import Job, decoder_of, seen, settings_of, sound_of, system
from .options import policy_of


def run(args: argparse.Namespace) -> int:
    """Start the processes, unless torchrun has; the one that writes prints the table at the end."""
    if args.audio == "-":
        raise ValueError("--audio -: live sound reaches one process only; leave --gpus out, or give a file")
    if args.resume:
        raise ValueError("--resume: runs of several processes save no states; leave --gpus out, or start anew")
    started = time.time()
    if args.child:
        interruptible()  # also where the host was started with Ctrl-C ignored
        child.stop_with_parent()
    try:
        member = started_by_torchrun()
        if member is None:
            launch(partial(rank, args), args.gpus)
            return 0
        if args.gpus not in (None, member.world):
            raise ValueError(f"--gpus {args.gpus}: torchrun has started {member.world} processes; leave --gpus out")
        interruptible()
        with met(member):
            rank(args, member)
    except RankLostError as error:
        raise RankLostError(f"{error}; {_left(Path(args.output), started)}") from error
    return 0


def rank(args: argparse.Namespace, member: Member) -> None:
    """One process of the run."""
    logging.basicConfig(
        level=logging.ERROR if member.rank else logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    args.device = member.device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // member.world))
    sound, picture = sound_of(args), read_picture(args.image)
    avatar, encoded = system(args, picture)
    policy = Asked.read(args.child).policy if args.child else policy_of(args, avatar.policy)
    plan = Plan(args.parallel, member.world) if args.parallel else Plan.suited(policy, member.world)
    view = seen(args, avatar, policy, picture)
    decoder = decoder_of(args, avatar) if member.rank == plan.writer else None
    ranked = ranked_run(member, plan, avatar, from_uint8(view.picture), policy, args.seed, encoded, decoder)
    job = Job(ranked.stream, view, sound, checked_path(args.output), args)
    if member.rank == plan.writer:
        _write(ranked, job, policy)
    else:
        ranked.run(sound)
        ranked.timelines()


def _write(ranked: RankedRun, job: Job, policy: RolloutPolicy) -> None:
    """The writer's part: the file, then the table."""
    tqdm.set_lock(threading.RLock())  # its own would be left in the system by a process that is killed
    job.cancelled_by = (KeyboardInterrupt, RankLostError)
    job.state_path.unlink(missing_ok=True)  # of an earlier run, whose part this one replaces
    asked = Asked.read(job.args.child) if job.args.child else None
    job.file_options = {} if asked is None else {"tags": asked.tags, **asked.writer}
    settings = settings_of(job.args, policy, job.view) if asked is None else asked.settings
    with job.shown(settings) as (open_sink, show):
        tell = child.tell if asked else show
        # hearing and decoding stay where they are: ranks keep step, and a timeline waits for what it times
        progress = ranked.run(job.sound, open_sink, tell, Overlap(write=job.overlap.write))
    assert progress
    rows = ranked.timelines()
    print(timeline.table(rows), flush=True)
    if job.args.timeline:
        timeline.write(rows, Path(job.args.timeline))
    if job.args.json:
        more = {"parallel": ranked.plan.parallel, "ranks": timeline.as_json(rows)}
        job.report(Path(job.args.json), progress, more)


def _left(output: Path, started: float) -> str:
    """Which file holds what was made."""
    for path in (cancelled_path(output), part_path(output), output):
        if path.exists() and path.stat().st_mtime >= started - 1:
            return f"{path.name} {'is complete' if path == output else 'plays, with the frames so far'}"
    return "no frame was made"
