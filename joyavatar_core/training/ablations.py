"""The ablations of JoyAvatar-Flash (Tables 2, 3 and 4) on the embedded model, beside the paper's figures.

    python -m joyavatar_core.training.ablations train --initial ODE --teacher FILE --autoencoder FILE --clips CLIPS
        --out DIR --steps 400 [--only NAME ...]
    python -m joyavatar_core.training.ablations measure --autoencoder FILE --out DIR [--clips 6] [--long-clips 6]
        [--seconds 120]

`train` distils every trained variant from one and the same ODE checkpoint, the full model twice; what is there is
resumed or skipped. `measure` runs every row of the tables with several seeds of the noise on the held-out suite
(`drawn_suite`) and writes ablations.json and ablations.md in DIR; a run that is there is not measured again.

Shape legend: none; this file runs trainings and reports.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..avatar import assemble_embedded, load_light_autoencoder, load_model
from ..measures.mouth_reader import load_mouth_reader
from ..policy import RolloutPolicy, changed
from ..policy import policy as policy_named
from . import dmd, flow_matching, trainer
from .common import write_whole
from .drawn_suite import Report, Subject, Suite, run_suite
from .encoded import EncodedClips

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
_UNASKED: dict[str, Any] = {"fit_clips": 2, "compared": 1.0}  # loudness predictor, autoencoder: no column asks for them

COLUMNS: dict[str, str] = {
    "sync.correlation": "mouth against sound, up",
    "closures.rate": "m, b, p closed, up",
    "seam.ratio": "jump at block seams, to 1",
    "person.feature": "person lost after the run, down",
    "drift.colour_change": "colour drift, to 0",
    "drift.sharpness_change": "sharpness drift, to 0",
    "noise.slope": "growth of noise a minute, to 0",
}
"""Figures of the suite that stand where the paper has Sync-C, Sync-D, IDC, Q_score and Q_face."""


@dataclass(frozen=True)
class Trained:
    """A training: what it changes in the odds of the full model's rollouts, and in the policy they run under; seed is
    added to the recipe's.
    """

    odds: Mapping[str, float] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def recipe(self, full: dmd.Recipe) -> dmd.Recipe:
        """That of the variant."""
        return replace(full, seed=full.seed + self.seed, odds=replace(full.odds, **self.odds))


TRAININGS: dict[str, Trained] = {
    "full": Trained(),
    "full-again": Trained(seed=1),
    "no-main": Trained({"main": 0}),
    "no-auxiliary": Trained({"main": 1}),
    "no-sub-steps": Trained({"bootstrap": 0, "substep": 0}, {"bootstrap": 0}),
    "no-mci": Trained({}, {"motion_frame": False}),
}


@dataclass(frozen=True)
class Row:
    """A line of the tables: whose weights, what its run changes in the policy, and the paper's figures, if any.

    paper: Sync-C, Sync-D, IDC, Q_score, Q_face.
    """

    training: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    paper: tuple[float, ...] = ()


_FULL = (5.25, 8.30, 0.72, 0.84, 0.53)
ROWS: dict[str, Row] = {
    "full": Row("full", {}, _FULL),
    "full, trained again": Row("full-again", {}, _FULL),
    "w/o main branch": Row("no-main", {}, (4.09, 9.32, 0.76, 0.82, 0.52)),
    "w/o auxiliary branch": Row("no-auxiliary", {}, (5.24, 8.35, 0.70, 0.80, 0.51)),
    "w/o sub-steps": Row("no-sub-steps", {"bootstrap": 0}, (5.24, 8.32, 0.71, 0.82, 0.51)),
    "w/o MCI training": Row("no-mci", {"motion_frame": False}, (5.19, 8.33, 0.71, 0.83, 0.52)),
    "MCI without noise": Row("full", {"motion_noise": False}, (5.19, 8.33, 0.72, 0.82, 0.52)),
    "w/o sink": Row("full", {"sink_blocks": 0}, (5.03, 8.43, 0.65, 0.58, 0.37)),
    "sink without URCR": Row("full", {"sink_position": "absolute", "rope_limit": None}, (5.20, 8.32, 0.72, 0.83, 0.52)),
    "N = 100": Row("full", {"rope_limit": 100}, (5.24, 8.31, 0.72, 0.84, 0.53)),
    "K/V of the clean block": Row("full", {"kv_level": "clean"}),
}


# Training


def begin(
    name: str, recipe: dmd.Recipe, out: Path, data: tuple[EncodedClips, ...], files: tuple[Path, Path, Path]
) -> dmd.Training:
    """The training of a variant at step 0. files: generator to start from, teacher, autoencoder."""
    state = dmd.begin(recipe, out, data, *files)
    state.policy = changed(state.policy, TRAININGS[name].policy)
    return state


def train(names: Iterable[str], recipe: dmd.Recipe, out: Path, clips: Path, files: tuple[Path, Path, Path]) -> None:
    """Every variant in its folder of `out`: what was begun is resumed, what has all its steps is left.

    Raises ValueError when the recipe counts no steps: variants are compared at equal numbers of them.
    """
    if recipe.steps is None:
        raise ValueError("variants are compared at equal numbers of steps: give --steps")
    for name in names:
        own, home = TRAININGS[name].recipe(recipe), out / name
        if steps_done(home) < recipe.steps:
            log.info("training %s", name)
            start = partial(begin, name, own, home, files=files)
            flow_matching.train(own, home, clips, files[2], start, (home / "train.pt").exists())


def steps_done(home: Path) -> int:
    """Steps behind the weights of a training's folder, 0 without any."""
    weights = home / "transformer.safetensors"
    return json.loads(checkpoint.read(weights)[1]["notes"])["steps"] if weights.exists() else 0


# Measuring


def measure(
    out: Path, autoencoder: Path, suite: Suite, seeds: Sequence[int] = SEEDS, workers: int = 0
) -> dict[str, Any]:
    """Every row whose training is there, once for each seed; ablations.json is written after each.

    What was measured of other weights, another autoencoder or on another suite is measured anew.
    """
    path = out / "ablations.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    reader, decoder = load_mouth_reader(), load_light_autoencoder(autoencoder)
    for name, row in ROWS.items():
        weights = out / row.training / "transformer.safetensors"
        if not weights.exists():
            log.warning("%s: no training %s in %s, left out", name, row.training, out)
            continue
        avatar = assemble_embedded(load_model(weights), decoder)
        of = f"{checkpoint.sha256_of(weights)} {checkpoint.sha256_of(autoencoder)} {replace(suite, noise_seed=0)}"
        if found.get(name, {}).get("of") != of:
            found[name] = {"of": of, "runs": {}}
        runs = found[name]["runs"]
        for seed in seeds:
            if str(seed) not in runs:
                subject = Subject(avatar, row_policy(row), reader)
                report = run_suite(replace(suite, noise_seed=seed), subject, workers=workers)
                runs[str(seed)] = _figures(report)
                write_whole(path, lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
                log.info("%s, seed %d: %s", name, seed, runs[str(seed)])
    write_whole(out / "ablations.md", lambda part: part.write_text(table(found)))
    return found


def row_policy(row: Row) -> RolloutPolicy:
    """The policy that a row is run under."""
    return changed(policy_named("joyavatar-flash"), row.policy)


def _figures(report: Report) -> dict[str, float]:
    return {name: round(report.figures[name].mean, 4) for name in COLUMNS if name in report.figures}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds of each figure, then the paper's figures."""
    heads = [*COLUMNS.values(), "paper: Sync-C", "Sync-D", "IDC", "Q_score", "Q_face"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, row in found.items():
        paper = ROWS[name].paper or ("",) * 5
        cells = [*_spreads(list(row["runs"].values())), *(str(value) for value in paper)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spreads(runs: Sequence[Mapping[str, float]]) -> Iterator[str]:
    for name in COLUMNS:
        values = [run[name] for run in runs if name in run]
        if not values:
            yield ""
        else:
            yield f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train and measure the ablations of the paper.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    trainer.add_options(training)
    training.add_argument("--initial", type=Path, required=True, help="transformer.safetensors of ode_regression")
    training.add_argument("--teacher", type=Path, required=True, help="transformer.safetensors of bidirectional")
    training.add_argument("--critic-steps", type=int)
    training.add_argument("--critic-rate", type=float)
    training.add_argument("--guidance", type=float)
    training.add_argument("--only", nargs="+", choices=tuple(TRAININGS), default=tuple(TRAININGS))
    measuring = commands.add_parser("measure")
    measuring.add_argument("--autoencoder", type=Path, required=True)
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--clips", type=int, default=6, help="short clips of a row (%(default)s)")
    measuring.add_argument("--long-clips", type=int, default=6, help="long clips of a row (%(default)s)")
    measuring.add_argument("--seconds", type=float, default=120.0, help="length of the long ones (%(default)s)")
    measuring.add_argument("--workers", type=int, default=0, help="processes that share the clips (%(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        suite = Suite(options.clips, long_clips=options.long_clips, long_seconds=options.seconds, **_UNASKED)
        measure(options.out, options.autoencoder, suite, workers=options.workers)
    else:
        _, recipe = trainer.parse(parser, dmd.Recipe, arguments)
        files = (options.initial, options.teacher, options.autoencoder)
        train(options.only, recipe, options.out, options.clips, files)


if __name__ == "__main__":
    main()
