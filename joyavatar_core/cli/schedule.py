"""`joyavatar schedule`: the denoising schedule as a table, and what its windows cost."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

from ..config import MODELS, ModelConfig
from ..estimate import Forward, cache_bytes, pending_bytes, window_forwards
from ..geometry import Geometry
from ..policy import RolloutPolicy
from ..schedule import warp
from .options import policy_of, size_of

MOST_BLOCKS = 100_000


def run(args: argparse.Namespace) -> int:
    """Print every forward of a clip of --blocks blocks."""
    if not 1 <= args.blocks <= MOST_BLOCKS:
        raise ValueError(f"--blocks {args.blocks} must lie in 1 .. {MOST_BLOCKS}")
    policy, config = policy_of(args), MODELS[args.config]
    width, height = size_of(args.size)
    spatial = 16 if args.config == "tiny" else 8
    geometry = Geometry(width, height, block_latents=policy.block_latents, spatial=spatial, patch=config.patch)
    print("\n".join([*_lines(policy, args.blocks), *_costs(config, policy, geometry, args.blocks)]))
    return 0


def _costs(config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, blocks: int) -> Iterator[str]:
    """Windows that cost the same in one line; bytes for keys and values of two bytes a number."""
    size, latent = f"{geometry.width}x{geometry.height}", geometry.tokens_per_latent
    yield f"cost at {size}, {latent} tokens a latent frame (q, k: latents that ask and that are seen):"
    windows = range(policy.num_windows(blocks))
    forwards = ((w, window_forwards(config, policy, geometry, w, blocks)) for w in windows)
    for cost, alike in groupby(forwards, key=lambda found: found[1]):
        numbers = [w + 1 for w, _ in alike]
        name = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        yield f"  window {name}: {len(cost)} forwards: {', '.join(_runs(cost, latent))}"
    held, waiting = (f(config, policy, geometry, 2) / 2**20 for f in (cache_bytes, pending_bytes))
    yield f"  K/V: {held:,.1f} MiB held" + (f", {waiting:,.1f} MiB more within a window" if waiting else "")


def _runs(cost: Iterable[Forward], latent: int) -> Iterator[str]:
    for forward, alike in groupby(cost):
        yield f"{len(list(alike))} x {forward.queries / latent:g} q {forward.keys / latent:g} k"


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
            lines.append(f"{forward:4d}  {name:5s} rope {start:3d}{_reference(policy, start)}  {levels}{done}")
    lines.append("steps per block: " + ", ".join(str(counts[b]) for b in range(blocks)))
    lines.append(f"forwards: {forward}")
    return lines


def _reference(policy: RolloutPolicy, start: int) -> str:
    """Where the reference stands beside a window that starts at an index."""
    if not policy.reference_sink:
        return ""
    least, most = (policy.reference_position(start, ahead) for ahead in policy.reference_ahead)
    return f"  reference {least}" + (f"..{most}" if most > least else "")
