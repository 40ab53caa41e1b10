"""From command-line words to the engine's values."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from ..policy import RolloutPolicy, changed, policy

if TYPE_CHECKING:
    import torch


def dtype_of(word: str) -> torch.dtype | None:
    """The precision an option names; None for auto."""
    import torch  # `joyavatar schedule` needs none

    return None if word == "auto" else getattr(torch, word)


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
    return changed(chosen, changes)


def size_of(text: str) -> tuple[int, int]:
    """(width, height) from "WxH"."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match:
        raise ValueError(f"size {text!r}: write it as WIDTHxHEIGHT, e.g. 256x256")
    return int(match[1]), int(match[2])
