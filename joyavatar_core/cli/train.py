"""`joyavatar train`: one stage of a preset or a file, for the embedded model or, over many processes, the full size."""

from __future__ import annotations

import argparse
import json
import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.estimate import Estimate
    from ..training.presets import Stage

STAGES = ("autoencoder", "flow", "bidirectional", "ode", "dmd")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The words after `joyavatar train`: those of a stage are read by the stage."""
    parser.add_argument("stage", choices=STAGES, help="what to train")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="options: joyavatar train STAGE --help")


def run(args: argparse.Namespace) -> int:
    """`joyavatar train`."""
    try:
        from ..training import presets
    except ModuleNotFoundError as error:
        if error.name and not error.name.endswith("training"):
            raise
        raise ValueError("the registry's copy of the pack has no trainer: clone it") from error

    parser = stage_parser(args.stage)
    options, rest = parser.parse_known_args(args.words)
    if options.help:
        parser.print_help()
        print("\nAnd for the embedded model (--config tiny) those of its trainer:\n")
        import_module(f"..training.{presets.MODULES[args.stage]}", __package__).main(["--help"])
    preset = presets.read(options.config)
    stage = preset.stage(args.stage)
    presets.check(preset)
    if options.dry_run:
        from ..training.estimate import estimate

        made = estimate(preset, args.stage)
        print(json.dumps(made.as_json(), indent=1) if options.json else table(made))
        return 0
    logging.getLogger().setLevel(logging.INFO)
    if options.out is None:
        raise ValueError("--out is missing: name a folder for what is trained")
    if stage.scale.sharded:
        return _full_size(args.stage, stage, options, rest)
    return _embedded(args.stage, stage, options, rest)


def stage_parser(stage: str) -> argparse.ArgumentParser:
    """The options of a stage that are not its trainer's."""
    p = argparse.ArgumentParser(prog=f"joyavatar train {stage}", add_help=False, allow_abbrev=False)
    p.add_argument("--help", "-h", action="store_true")
    p.add_argument(
        "--config", default="tiny", metavar="PRESET|FILE", help="preset, or a TOML or JSON file (%(default)s)"
    )
    p.add_argument("--dry-run", action="store_true", help="print memory and work, train nothing")
    p.add_argument("--json", action="store_true", help="of --dry-run, as JSON")
    p.add_argument("--out", type=Path, metavar="DIR", help="where everything is written")
    p.add_argument(
        "--data", type=Path, action="append", metavar="DIR", help="clips; full size: shards, may be repeated"
    )
    p.add_argument("--resume", action="store_true", help="go on with the training in --out")
    full = p.add_argument_group("full size")
    full.add_argument("--initial", metavar="FILE[,FILE]", help="weights to start from, read as one")
    full.add_argument("--teacher", metavar="FILE[,FILE]", help="frozen model: maker of the pairs, real score")
    full.add_argument("--critic", metavar="FILE[,FILE]", help="fake score (dmd); else it starts as the generator")
    full.add_argument("--autoencoder", metavar="FILE", help="of the latents (dmd)")
    return p


# Embedded


def _embedded(name: str, stage: Stage, options: argparse.Namespace, rest: list[str]) -> int:
    """The stage's own trainer, with the options it shares with the full size and all others as they are."""
    from ..training.common import check_start
    from ..training.presets import MODULES, values

    words = ["--out", str(options.out), "--recipe", json.dumps(values(name, stage)), *rest]
    if options.data and len(options.data) > 1:
        raise ValueError(
            f"--data is given {len(options.data)} times: a training of the embedded model takes one folder"
        )
    if options.data:
        words += ["--clips", str(options.data[0])]
    for option in ("initial", "teacher", "autoencoder"):
        if value := getattr(options, option):
            words += [f"--{option}", _present(option, value)]
    saved = "train.safetensors" if name == "autoencoder" else "train.pt"
    check_start(options.out, (options.out / saved).exists(), options.resume)
    import_module(f"..training.{MODULES[name]}", __package__).main(words + ["--resume"] * options.resume)
    return 0


def _present(option: str, value: str) -> str:
    if not Path(value).is_file():
        raise ValueError(f"--{option} {value}: there is no such file")
    return value


# Full size


def _full_size(name: str, stage: Stage, options: argparse.Namespace, rest: list[str]) -> int:
    from ..training import full_size, presets

    if rest:
        raise ValueError(
            f"{' '.join(rest)}: not known to the full size; values of the recipe go into the --config file"
        )
    if not options.data:
        raise ValueError("--data is missing: name a folder of shards, made with joyavatar prepare")
    files = full_size.Files(
        out=options.out,
        data=tuple(options.data),
        initial=_files("initial", options),
        teacher=_files("teacher", options),
        critic=_files("critic", options),
        autoencoder=Path(_present("autoencoder", options.autoencoder)) if options.autoencoder else None,
    )
    full_size.run(name, stage, presets.recipe(name, stage), files, options.resume)
    return 0


def _files(option: str, options: argparse.Namespace) -> tuple[Path, ...]:
    words = getattr(options, option)
    return tuple(Path(_present(option, word)) for word in words.split(",")) if words else ()


# Dry run


def table(made: Estimate) -> str:
    """What an estimate says, for people."""
    lines = [
        f"{made.stage} of {made.model}: {_number(made.parameters)} parameters, {_number(made.trained)} in training"
    ]
    lines += [f"one process of {made.processes}:"]
    rows: list[tuple[str, str, str]] = []
    for name, size in made.memory.items():
        rows.append(
            (name, _size(size), "counted" if name.removesuffix(" on the CPU").split()[-1] in made.exact else "about")
        )
    rows.append(("memory", _size(made.memory_bytes), "without what is on the CPU"))
    rows += [(f"work of {name}", _flop(work), "") for name, work in made.parts.items()]
    rows.append(("work of a step", _flop(made.step), "in the mean"))
    lines += [f"  {name:<32}{value:>12}  {note}".rstrip() for name, value, note in rows]
    lines.append("the run:")
    if made.run is None:
        lines.append(f"  {'length':<32}{'by the clock':>12}")
    else:
        rows = [("steps", str(made.steps), ""), ("work", _flop(made.run), ""), ("at 400 TFLOP/s", _hours(made.run), "")]
        lines += [f"  {name:<32}{value:>12}" for name, value, _ in rows]
    return "\n".join([*lines, *(f"  {note}" for note in made.notes)])


def _number(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _flop(work: int) -> str:
    return f"{work:.2e} FLOP"


def _hours(work: int) -> str:
    return f"{work / 4e14 / 3600:,.0f} GPU-h"
