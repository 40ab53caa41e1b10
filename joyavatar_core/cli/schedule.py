"""`joyavatar schedule`: the denoising schedule as a table."""

from __future__ import annotations

import argparse
from collections import Counter

from ..policy import RolloutPolicy
from ..schedule import warp
from .options import policy_of


def run(args: argparse.Namespace) -> int:
    """Print every forward of a clip of --blocks blocks."""
    if not 1 <= args.blocks <= 10_000:
        raise ValueError(f"--blocks {args.blocks} must lie in 1 .. 10000")
    policy = policy_of(args)
    print("\n".join(_lines(policy, args.blocks)))
    return 0


def _lines(policy: RolloutPolicy, blocks: int) -> list[str]:
    lines, counts, forward = [], Counter(), 0
    for window in range(policy.num_windows(blocks)):
        for i, step in enumerate(policy.window_steps(window, blocks)):
            forward += 1
            counts.update(step.blocks)
            name = f"{'S' if i and policy.window_blocks > 1 else 'M'}{window + 1}"
            levels = " ".join(
                f"B{b + 1}@{t:g} ({warp(t, policy.shift):.1f})"
                for b, t in zip(step.blocks, step.timesteps, strict=True)
            )
            done = f" -> B{step.blocks[0] + 1} clean" if step.finishes else ""
            start = policy.window_start(policy.first_block(window))
            lines.append(f"{forward:4d}  {name:5s} rope {start:3d}  {levels}{done}")
    lines.append("steps per block: " + ", ".join(str(counts[b]) for b in range(blocks)))
    lines.append(f"forwards: {forward}")
    return lines
