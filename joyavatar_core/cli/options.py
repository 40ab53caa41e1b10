"""From command-line words to the engine's values."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ..policy import RolloutPolicy, changed, policy

if TYPE_CHECKING:
    import torch

    from ..avatar import Avatar
    from ..overlap import Overlap

logger = logging.getLogger(__name__)


def dtype_of(word: str) -> torch.dtype | None:
    """The precision an option names; None for auto."""
    import torch  # `joyavatar schedule` needs none

    return None if word == "auto" else getattr(torch, word)


def device_of(word: str) -> str:
    """The device an option names. ValueError if this torch or this machine has no such device."""
    import torch

    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {word}: {str(error).splitlines()[0]}; use auto, cpu, cuda, ...") from error
    return word


class Repeatable(argparse.Action):
    """An option that may be given several times: its value, or a list of more than one."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option_string: object = None
    ) -> None:
        given = [*vars(namespace).get(f"{self.dest}_given", []), values]
        setattr(namespace, f"{self.dest}_given", given)
        setattr(namespace, self.dest, given if len(given) > 1 else values)


def several_videos(args: argparse.Namespace) -> bool:
    """Whether options of `generate` ask for several videos. Into one FILE.mp4 goes one: the last of each counts."""
    given = [name for name in ("image", "audio", "output", "seed") if isinstance(vars(args)[name], list)]
    into = args.output
    if not given or isinstance(into, list) or not into.lower().endswith(".mp4"):
        return bool(given)
    for name in given:
        values = vars(args)[name]
        logger.warning("--%s %s is used, the last of %d: for a video each give a folder", name, values[-1], len(values))
        setattr(args, name, values[-1])
    return False


def add_overlap(parser: argparse.ArgumentParser) -> None:
    """The option of `overlap_of`."""
    parser.add_argument(
        "--overlap",
        choices=("auto", "on", "off"),
        default="auto",
        help="hear, decode and write beside the transformer; auto: where that is a GPU's",
    )


def overlap_of(word: str, device: torch.device, live: bool = False) -> Overlap:
    """The overlap an option names. live: sound that comes as it is spoken, which cannot be heard ahead."""
    from ..overlap import Overlap

    ways = {"auto": Overlap.suited(device), "on": Overlap(hear=True, decode=True, write=True), "off": Overlap()}
    return replace(ways[word], hear=ways[word].hear and not live)


def policy_of(args: argparse.Namespace, own: str = "joyavatar-flash") -> RolloutPolicy:
    """The rollout policy the options describe; own: the model's, where they name none."""
    chosen = policy(args.policy or own)
    changes: dict[str, object] = {}
    if args.no_psb:
        changes["bootstrap"] = 0
    if args.no_mci:
        changes["motion_frame"] = False
    for name in ("rope_limit", "sink_blocks", "local_blocks", "kv_level"):
        value = vars(args)[name]
        if value is not None:
            changes[name] = value
    if args.reference_ahead is not None:
        changes["reference_ahead"] = span_of(args.reference_ahead)
    if args.reference_refresh is not None:
        changes["reference_refresh"] = args.reference_refresh or None
    return changed(chosen, changes)


def span_of(text: str) -> tuple[int, int]:
    """(least, most) from "N" or "N-M"."""
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    if not match:
        raise ValueError(f"--reference-ahead {text!r}: write a number, e.g. 30, or the least and the most, e.g. 4-30")
    return int(match[1]), int(match[2] or match[1])


def add_fast(parser: argparse.ArgumentParser) -> None:
    """Options of the fast path."""
    p = parser.add_argument_group("fast path (docs/performance.md)")
    p.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="q, k and v as one product, forwards played from a recording (a CUDA graph); --no-fast: not (default)",
    )
    p.add_argument(
        "--fp8", choices=("linear", "kv", "both"), help="eight bits for products, kept keys and values, both"
    )
    p.add_argument(
        "--kernels",
        choices=("auto", "compiled", "never"),
        default="auto",
        help="auto: Triton's on a GPU, where they work (default); compiled: torch.compile's, on any device",
    )


def quickened_by(args: argparse.Namespace, avatar: Avatar) -> Avatar:
    """The system as the options of `add_fast` want it run."""
    from ..avatar import quickened

    if args.fast or args.fp8:
        avatar = quickened(avatar, args.fp8 or "none")
    return replace(avatar, fast=replace(avatar.fast, kernels=args.kernels, capture=args.fast))


def add_several_gpus(parser: argparse.ArgumentParser) -> None:
    """Options of a run by several processes."""
    p = parser.add_argument_group("several GPUs (docs/several_gpus.md)")
    p.add_argument("--gpus", type=int, metavar="N", help="processes, a GPU each (with --device cpu: on the CPU)")
    p.add_argument(
        "--parallel",
        choices=("tpp", "vae", "sequence"),
        help="a process per timestep and one that decodes; one denoises, one decodes; or each a share of the tokens "
        "(what suits policy and N)",
    )
    p.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)  # of another program: see multi_gpu/child.py
    p.add_argument("--timeline", metavar="FILE.json", help="what each process did when; with matplotlib FILE.png too")


def several_gpus(args: argparse.Namespace) -> bool:
    """Whether several processes make the video: asked for, or started by torchrun."""
    from ..multi_gpu.members import started_by_torchrun

    if args.gpus is not None and args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus} must be at least 1")
    if (args.gpus or 1) > 1 or started_by_torchrun():
        return True
    if args.parallel or args.timeline:
        raise ValueError("--parallel and --timeline are of several processes: give their number with --gpus")
    return False


def size_of(text: str) -> tuple[int, int]:
    """(width, height) from "WxH"."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match:
        raise ValueError(f"size {text!r}: write it as WIDTHxHEIGHT, e.g. 256x256")
    return int(match[1]), int(match[2])
