"""`joyavatar evaluate VIDEO|FOLDER` and `--pairs FOLDER`: measures of finished videos, and of videos made for it."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..measures import measure as measures
from ..measures import plots
from ..measures.face import given_face
from ..measures.measure import Measured, Options
from ..measures.mouth_reader import load_mouth_reader
from ..measures.readable import check_readable
from ..measures.report import TABLE_1, Report, collect
from ..measures.statistics import Interval
from ..measures.truth import Truth, measure_truth
from ..measures.video import ENDINGS, PICTURES, SOUNDS, Blocks, Frames, Video, files_in, open_video
from ..measures.weights import Weights
from ..media import MediaError
from ..media.picture import read_picture

_PASSED_ON = ("policy", "rope_limit", "sink_blocks", "local_blocks", "kv_level", "threads", "size")


def run(args: argparse.Namespace) -> int:
    """Measure `args.video`, or the videos made of `args.pairs`."""
    options = _options(args)
    _check_files(args)
    if args.pairs:
        with _made(args) as (videos, speeds):
            report = _measured(args, options, videos)
            _add_speed(report, speeds)
    else:
        path = Path(args.video)
        videos = files_in(path, ENDINGS, "video") if path.is_dir() else [path]
        report = _measured(args, options, videos)
    if args.out:
        out = Path(args.out)
        report.about["pictures"] = [file.name for file in plots.write(report.videos, out)]
        (out / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print(json.dumps(report.as_json(), indent=1) if args.json else table(report))
    return 0


def _options(args: argparse.Namespace) -> Options:
    """What can be known to be wrong is refused here, before any work."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads} must be at least 1")
        torch.set_num_threads(args.threads)
    return Options(
        load_mouth_reader(args.reader) if args.reader else load_mouth_reader(),
        Weights(Path(args.weights) if args.weights else None, args.q_align),
        Blocks.parse(args.block_frames) if args.block_frames else None,
        given_face(args.face) if args.face else None,
    )


def _check_files(args: argparse.Namespace) -> None:
    """Raises MediaError for a file that cannot be read, before videos are made and measured that rest on it."""
    pairs = pairs_in(Path(args.pairs)) if args.pairs else []
    truth = files_in(Path(args.truth), ENDINGS, "video") if args.truth else []
    for files in filter(None, ([file for pair in pairs for file in pair], truth)):
        with _bar(len(files), "file") as bar:
            check_readable(files, bar.update)


def _measured(args: argparse.Namespace, options: Options, videos: list[Path]) -> Report:
    """Of several videos, those that cannot be read are left out and named; one alone is an error."""
    found: list[Measured] = []
    left_out: dict[str, str] = {}
    first: Video | None = None
    references, sounds = args.reference or args.pairs, args.audio or args.pairs
    with _bar(len(videos)) as bar:
        for path in videos:
            try:
                video = open_video(path)
                reference, audio = _reference(references, path), _matching(sounds, path, SOUNDS, "--audio")
                found.append(measures.measure(video, options, reference, audio))
                first = first or video
            except MediaError as error:
                if len(videos) == 1:
                    raise
                left_out[path.name] = str(error)
            bar.update()
    if not found:
        raise MediaError(f"none of {len(videos)} videos can be measured; the first: {next(iter(left_out.values()))}")
    report = collect(found, _truth(args, options, first))
    report.left_out = left_out
    report.about = {"reference": args.reference and str(args.reference), "audio": args.audio and str(args.audio)}
    return report


def _truth(args: argparse.Namespace, options: Options, made: Video | None) -> Truth | None:
    """Clips of --truth, looked at where `made` has its seams."""
    if not args.truth or made is None:
        return None
    clips = [open_video(path) for path in files_in(Path(args.truth), ENDINGS, "video")]
    # with --block-frames the blocks are not those our writer cut the file by
    layout = None if options.blocks else made.layout
    return measure_truth(clips, options.blocks or made.blocks, layout, options.weights)


def _matching(given: str | None, video: Path, endings: frozenset[str], option: str) -> Path | None:
    """The file itself, or the one of the same stem in a folder. Raises MediaError where the folder has none."""
    if given is None or not Path(given).is_dir():
        return Path(given) if given else None
    found = sorted(p for p in Path(given).iterdir() if p.stem == video.stem and p.suffix.lower() in endings)
    if not found:
        raise MediaError(f"{option} {given}: has no file named {video.stem} ({', '.join(sorted(endings))})")
    return found[0]


def _reference(given: str | None, video: Path) -> Frames | None:
    path = _matching(given, video, PICTURES, "--reference")
    return read_picture(path) if path else None


# Pairs


@contextmanager
def _made(args: argparse.Namespace) -> Iterator[tuple[list[Path], dict[str, float]]]:
    """Videos of all pairs, and frames a second of each; kept in OUT/videos, or only as long as they are needed."""
    pairs = pairs_in(Path(args.pairs))
    with tempfile.TemporaryDirectory(prefix="joyavatar-") as scratch:
        folder = Path(args.out) / "videos" if args.out else Path(scratch)
        speeds = {}
        for picture, voice in pairs:
            video = folder / f"{picture.stem}.mp4"
            speeds[video.name] = _generate(args, picture, voice, video, Path(scratch) / "report.json")
        yield [folder / name for name in speeds], speeds


def pairs_in(folder: Path) -> list[tuple[Path, Path]]:
    """(picture, voice) of the same stem. Raises MediaError for a stem without its other half, or no pair at all."""
    pictures = {p.stem: p for p in files_in(folder, PICTURES, "picture")}
    voices = {p.stem: p for p in files_in(folder, SOUNDS, "voice")}
    alone = sorted(pictures.keys() ^ voices.keys())
    if alone:
        other = "voice" if alone[0] in pictures else "picture"
        raise MediaError(f"{folder}: {alone[0]} has no {other}; give both the same name")
    return [(pictures[stem], voices[stem]) for stem in sorted(pictures)]


def _generate(args: argparse.Namespace, picture: Path, voice: Path, video: Path, report: Path) -> float:
    """One video by `joyavatar generate`; returns frames a second."""
    from . import generate
    from .main import build_parser

    words = ["generate", "--image", str(picture), "--audio", str(voice), "--output", str(video), "--json", str(report)]
    words += ["--dtype", args.dtype, "--seed", str(args.seed), "--checkpoint-blocks", "0"]
    for name in _PASSED_ON:
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += [f"--{name}" for name in ("no-psb", "no-mci") if getattr(args, name.replace("-", "_"))]
    words += shlex.split(args.generate) if args.generate else []
    words += ["--model", args.model] if args.model else []
    words += ["--vae", args.autoencoder] if args.autoencoder else []
    generate.run(build_parser().parse_args(words))
    return float(json.loads(report.read_text())["end_to_end_fps"])


def _add_speed(report: Report, speeds: dict[str, float]) -> None:
    for one in report.videos:
        one.put("FPS", speeds[one.path.name])
    report.figures["FPS"] = collect(report.videos).figures["FPS"]


# What is printed


def table(report: Report) -> str:
    """The figures, one a line; the paper's columns in one row; what was not computed, and why."""
    lines = [f"{'figure':<26}{'mean':>10}{'95 % interval':>22}{'n':>4}"]
    for name, f in report.figures.items():
        span = "" if f.low == f.high == f.mean else f"{f.low:.3f} .. {f.high:.3f}"
        lines.append(f"{name:<26}{f.mean:>10.3f}{span:>22}{f.n:>4}")
    if any(name in report.figures for name in TABLE_1):
        lines += ["", *table_1(report.figures)]
    lines += [""] if report.not_computed or report.left_out else []
    lines += [f"not computed: {name}: {why}" for name, why in report.not_computed.items()]
    lines += [f"left out: {why}" for why in report.left_out.values()]
    return "\n".join(lines)


def table_1(figures: dict[str, Interval]) -> Iterable[str]:
    """The columns of the paper's Table 1, as a row of Markdown."""
    cells = [f"{figures[name].mean:.2f}" if name in figures else "not computed" for name in TABLE_1]
    return ("| " + " | ".join(TABLE_1) + " |", "|---" * len(TABLE_1) + "|", "| " + " | ".join(cells) + " |")


def _bar(total: int, unit: str = "video") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True)
