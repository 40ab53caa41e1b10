"""From command-line words to the engine's values."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from ..policy import RolloutPolicy, policy


def policy_of(args: argparse.Namespace) -> RolloutPolicy:
    """The rollout policy the options describe."""
    chosen = policy(args.policy)
    changes: dict[str, object] = {}
    if args.no_psb:
        changes["bootstrap"] = 0
    if args.no_mci:
        changes["motion_frame"] = False
    for name in ("rope_limit", "sink_blocks", "local_blocks", "kv_level"):
        value = vars(args)[name]
        if value is not None:
            changes[name] = value
    wider = "rope_limit" not in changes and ("sink_blocks" in changes or "local_blocks" in changes)
    if wider and chosen.rope_limit is not None:  # a larger context moves the smallest possible limit along
        free = replace(chosen, **{**changes, "rope_limit": None})  # pyright: ignore[reportArgumentType]
        changes["rope_limit"] = max(chosen.rope_limit, free.span_latents)
    return replace(chosen, **changes)  # pyright: ignore[reportArgumentType]


def size_of(text: str) -> tuple[int, int]:
    """(width, height) from "WxH"."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match:
        raise ValueError(f"size {text!r}: write it as WIDTHxHEIGHT, e.g. 256x256")
    return int(match[1]), int(match[2])
