"""`joyavatar bench`: speed and memory of this machine, end to end and by part; the last line is JSON.

End to end is what `generate` does, sound to finished file. The baseline is `plain.py` with the same weights, threads
and precision, as many frames out. `--plan` measures nothing: what runs on cards of several sizes, and how.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from ..avatar import default_dtype
from ..bench import ceilings, measure, plan, subject, timing
from ..config import MODELS
from ..model import Block
from ..overlap import Overlap
from .options import device_of, dtype_of, overlap_of, quickened_by, size_of

_FRAMES_OF_SECOND = 16  # of a video in real time


def run(args: argparse.Namespace) -> int:
    """Measure, or plan, and print."""
    device = torch.device(device_of(args.device))
    if args.plan:
        return _plan(args, device)
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    setup = _setup(args, device)
    overlap = overlap_of(args.overlap, device)
    figures = _machine(args, setup) | figures_of(setup, args.wan_vae, args.baseline, args.soak, None, overlap)
    if args.batch:
        figures["together"] = measure.together(setup, args.batch, overlap)
    if not args.json:
        print("\n".join(_lines(figures)))
    print(json.dumps(figures))
    return 0


def figures_of(
    setup: subject.Setup,
    wan_vae: bool = False,
    baseline: bool = False,
    soak: int | None = None,
    sizes: ceilings.Sizes | None = None,
    overlap: Overlap | None = None,
) -> dict[str, Any]:
    """All that is measured of a system. sizes: of what the ceilings are measured with. overlap: of `end_to_end`."""
    avatar = setup.avatar
    config, attention = avatar.model.config, cast(Block, avatar.model.blocks[0]).self_attn.attention
    best = ceilings.measure(avatar.device, avatar.dtype, config.heads, config.head_dim, sizes, attention)
    figures: dict[str, Any] = {"ceilings": _rates(best)} | measure.transformer(setup, best)
    figures["decode"] = {"light": measure.decoder(setup, avatar.autoencoder)}
    figures["decode_fps"] = figures["decode"]["light"]["fps"]
    if wan_vae:
        figures["decode"]["wan"] = measure.decoder(setup, subject.random_wan(avatar.device, avatar.dtype))
    figures["features_fps"] = measure.features(setup)
    figures["write_fps"] = measure.writing(setup)
    figures |= measure.end_to_end(setup, overlap)
    if soak:
        figures["soak"] = measure.soak(setup, soak)
    if baseline:
        figures |= measure.plain_transformer(setup)
        if config.audio is not None and config.audio.kind == "window":  # it has neither wav2vec2 nor text
            figures["baseline_end_to_end_fps"] = measure.plain_end_to_end(setup)
            figures["speedup"] = round(figures["end_to_end_fps"] / figures["baseline_end_to_end_fps"], 2)
    if (resident := timing.peak_resident_bytes()) is not None:
        figures["peak_rss_mb"] = round(resident / 1e6, 1)
    return figures


def _check(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be at least 1")
    if not 8 <= args.blocks <= 20_000:
        raise ValueError(f"--blocks {args.blocks} must lie in 8 .. 20000")
    if args.batch is not None and not 1 <= args.batch <= 64:
        raise ValueError(f"--batch {args.batch} must lie in 1 .. 64 avatars")
    if args.soak is not None and not 210 <= args.soak <= 1_000_000:
        raise ValueError(f"--soak {args.soak} must lie in 210 .. 1000000: the first and the last hundred blocks")
    if args.wan_vae and args.config == "tiny":
        raise ValueError("--wan-vae: the embedded model's latents have a decoder of their own; take another --config")


def _setup(args: argparse.Namespace, device: torch.device) -> subject.Setup:
    size = size_of(args.size) if args.size else subject.SIZES[args.config]
    dtype = dtype_of(args.dtype) or default_dtype(device)
    if args.config == "tiny":
        setup = subject.embedded_setup(args.random, size, device, dtype, args.blocks)
    else:
        setup = subject.random_setup(MODELS[args.config], size, device, dtype, args.blocks)
    return replace(setup, avatar=quickened_by(args, setup.avatar))


def _machine(args: argparse.Namespace, setup: subject.Setup) -> dict[str, Any]:
    device, geometry = setup.avatar.device, setup.geometry
    random = args.random or args.config != "tiny"
    config = setup.avatar.model.config
    parts = {"text": config.text_len, "image": subject.CLIP_TOKENS if config.text_dim else geometry.tokens_per_latent}
    return {
        "config": args.config,
        "size": f"{geometry.width}x{geometry.height}",
        "weights": "random (speed does not depend on them)" if random else "embedded",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(setup.avatar.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "frames": setup.frames,
        "fast": asdict(setup.avatar.fast) | {"fp8": args.fp8 or "none"},
        "latents": {
            "query": setup.policy.window_blocks * setup.policy.block_latents + setup.policy.motion_frame,
            "key": setup.policy.span_latents + setup.policy.motion_frame,
        },
        "keys": {
            **parts,
            "audio": subject.audio_tokens(config, geometry),
            "face": config.face.queries if config.face else 0,
        },
        **({"stands_in": setup.hears} if setup.hears else {}),
    }


def _rates(best: ceilings.Ceilings) -> dict[str, Any]:
    return {
        "linear_tflops": round(best.linear / 1e12, 3),
        "attention_tflops": round(best.attention / 1e12, 3),
        "attentions_tflops": {name: round(rate / 1e12, 3) for name, rate in best.attentions.items()},
        "copy_gbytes": round(best.memory / 1e9, 2),
        "sizes": vars(best.sizes),
    }


def _lines(figures: Mapping[str, Any], indent: str = "") -> list[str]:
    """A figure a line; figures of figures below their name."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:{26 - len(indent)}s} {_shown(name, value)}")
    return lines


def _shown(name: str, value: object) -> str:
    if isinstance(value, float) and name.endswith("_s"):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# The plan


def _plan(args: argparse.Namespace, device: torch.device) -> int:
    """What runs where; with a CUDA device, tried."""
    rows = plan.plan(device=device if device.type == "cuda" else None)
    if not args.json:
        print("\n".join(_table(rows)))
    print(json.dumps({"plan": [row.as_json() for row in rows]}))
    return 0


def _table(rows: list[plan.Row]) -> list[str]:
    """Memory in GiB; work of 12 frames in TFLOP, and what must be sustained for real time in TFLOP/s."""
    head = (
        "card",
        "config",
        "size",
        "weights",
        "decoder",
        "peak",
        "of it",
        "kv",
        "state",
        "activations",
        "work",
        "rate",
    )
    form = "{:>5} {:11} {:8} {:8} {:8} {:>6} {:>9} {:>6} {:>6} {:>12} {:>7} {:>6}  {}"
    lines = [form.format(*head, "how")]
    for row in rows:
        need, way = row.need, row.arrangement
        shown = (way.weights, way.decoder) if way else ("no", "")
        parts = [f"{size / plan.GIB:.1f}" for size in (need.peak, need.weights, need.kv, need.state, need.activations)]
        work = (f"{row.flops / 1e12:.3g}", f"{row.real_time / 1e12:.3g}")
        note = row.checked if way else "does not fit: the leanest way needs this much"
        if row.brought:
            note += f"; {row.brought / 1e9:.1f} GB from the host a forward"
        lines.append(form.format(row.card, row.config, "x".join(map(str, row.size)), *shown, *parts, *work, note))
    lines.append(
        f"Memory in GiB. A card is taken to give {plan.usable(24) / plan.GIB:.1f} of 24 GiB. work: TFLOP of "
        f"12 frames; rate: TFLOP/s to sustain for {_FRAMES_OF_SECOND} frames a second. Computed: from shapes, without "
        "workspaces of libraries. Text and image encoders run before and are not counted."
    )
    return lines
