"""`joyavatar schedule`: the denoising schedule as a table, and what its windows cost."""

from __future__ import annotations

import argparse
from collections import Counter

from ..config import MODELS
from ..estimate import cost_lines
from ..geometry import Geometry
from ..policy import RolloutPolicy
from ..schedule import DenoiseStep, warp
from .options import policy_of, size_of

MOST_BLOCKS = 100_000


def run(args: argparse.Namespace) -> int:
    """Print every forward of a clip of --blocks blocks."""
    if not 1 <= args.blocks <= MOST_BLOCKS:
        raise ValueError(f"--blocks {args.blocks} must lie in 1 .. {MOST_BLOCKS}")
    policy, config = policy_of(args), MODELS[args.config]
    width, height = size_of(args.size)
    spatial = 16 if args.config == "tiny" else 8
    geometry = Geometry(width, height, **policy.block_sizes, spatial=spatial, patch=config.patch)
    print("\n".join([*_lines(policy, args.blocks), *cost_lines(config, policy, geometry, args.blocks)]))
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
            start = policy.window_start(step.blocks[0])
            lines.append(f"{forward:4d}  {name:5s} rope {start:3d}{_reference(policy, step)}  {levels}{done}")
    lines.append("steps per block: " + ", ".join(str(counts[b]) for b in range(blocks)))
    lines.append(f"forwards: {forward}")
    return lines


def _reference(policy: RolloutPolicy, step: DenoiseStep) -> str:
    """Where the reference stands beside the window of a step."""
    if not policy.reference_sink:
        return ""
    finished = step.blocks[0]
    start = policy.window_start(finished)
    if policy.reference_ahead is None:
        seen = policy.seen_latents(finished, len(step.blocks))
        return f"  reference {policy.reference_before(start, seen, clean=False)}"
    least, most = (policy.reference_position(start, ahead) for ahead in policy.reference_ahead)
    return f"  reference {least}" + (f"..{most}" if most > least else "")
