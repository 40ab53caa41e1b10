"""`joyavatar evaluate`: measure videos, or the embedded model (or files of its kind) on held-out drawn people."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..avatar import ASSETS, EMBEDDED_FILES, Avatar, assemble_embedded, load_light_autoencoder, load_model
from ..checkpoint import read
from ..measures.mouth_reader import load_mouth_reader
from ..measures.video import SOUNDS, files_in, read_sound
from .options import dtype_of, policy_of

if TYPE_CHECKING:
    from ..training.drawn_suite import Report, Suite


def run(args: argparse.Namespace) -> int:
    """`joyavatar evaluate`: videos where they are named, otherwise the suite."""
    if args.video and args.pairs:
        raise ValueError("give a video (or a folder of videos) or --pairs, not both")
    if args.video or args.pairs:
        from . import evaluate_videos

        return evaluate_videos.run(args)
    return _run_suite(args)


def _run_suite(args: argparse.Namespace) -> int:
    try:
        from ..training.drawn_suite import QUICK, Subject, Suite, run_suite, write_pictures
    except ModuleNotFoundError as error:
        if error.name and not error.name.endswith("training"):
            raise
        raise ValueError("the registry's copy of the pack has no trainer, which draws the suite: clone it") from error

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads} must be at least 1")
        torch.set_num_threads(args.threads)
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers} must be at least 0")
    wanted = {"clips": args.clips, "seconds": args.seconds, "long_seconds": args.long_seconds}
    wanted["long_clips"] = 0 if args.long_seconds == 0 else args.long_clips
    suite = replace(QUICK if args.quick else Suite(), **{k: v for k, v in wanted.items() if v is not None})
    reader = load_mouth_reader(args.reader) if args.reader else load_mouth_reader()
    subject = Subject(_avatar(args), policy_of(args), reader)
    with _bar(suite.clips + suite.long_clips) as bar:
        recorded = _recorded(Path(args.speech)) if args.speech else []
        report = run_suite(suite, subject, on_clip=bar.update, recorded=recorded, workers=args.workers)
    report.about.update(command=_command(args, suite), policy=asdict(subject.policy), weights=_weights(args))
    if args.out:
        out = Path(args.out)
        report.about["pictures"] = [path.name for path in write_pictures(report, out)]
        (out / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print(json.dumps(report.as_json(), indent=1) if args.json else table(report))
    return 0


def _recorded(folder: Path) -> list[tuple[NDArray[np.float32], int]]:
    """Mono samples [n] and rate of each file of recorded speech."""
    return [read_sound(path) for path in files_in(folder, SOUNDS, "recorded speech")]


def _paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """Files of the transformer and the autoencoder."""
    model = Path(args.model) if args.model else ASSETS / EMBEDDED_FILES["model"]
    return model, Path(args.autoencoder) if args.autoencoder else ASSETS / EMBEDDED_FILES["autoencoder"]


def _avatar(args: argparse.Namespace) -> Avatar:
    model, autoencoder = _paths(args)
    return assemble_embedded(load_model(model), load_light_autoencoder(autoencoder), dtype=dtype_of(args.dtype))


def _command(args: argparse.Namespace, suite: Suite) -> str:
    """The words that measure the same again; the rollout is under `policy`."""
    long = suite.long_seconds if suite.long_clips else 0
    words = f"joyavatar evaluate --suite {args.suite} --clips {suite.clips} --seconds {suite.seconds:g}"
    words += f" --long-seconds {long:g} --long-clips {suite.long_clips}"
    return f"{words} --policy {args.policy} --json"


def _weights(args: argparse.Namespace) -> dict[str, Any]:
    """What the files say of themselves: the recipe of the report."""
    return {path.name: read(path)[1] for path in _paths(args)}


def table(report: Report) -> str:
    """The figures, one a line; those that miss their target are marked."""
    marks = {True: "met", False: "MISSED", None: ""}
    lines = [f"{'figure':<26}{'mean':>9}{'95 % interval':>20}{'n':>4}  {'target':<12}"]
    for name, f in report.figures.items():
        span = f"{f.low:.3f} .. {f.high:.3f}"
        lines.append(f"{name:<26}{f.mean:>9.3f}{span:>20}{f.n:>4}  {f.target or '':<12}{marks[f.met]}")
    shares = ", ".join(f"{what} {share:.0%}" for what, share in report.about["time_share"].items())
    return "\n".join([*lines, f"{report.about['seconds']:.0f} s: {shares}"])


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="clip", disable=None, dynamic_ncols=True)
