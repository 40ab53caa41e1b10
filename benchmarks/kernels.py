"""Whether the fast path is right on this machine's GPU, before any figure is taken of it; the last line is JSON.

    python benchmarks/kernels.py --config flash-1.3b
    python benchmarks/kernels.py --device cpu --config tiny

Every kernel against the eager code in float32, every attention that is there against torch's, a forward played from a
recording against the same launched, q, k and v as one product, and the error that eight bits make. Exit status 1 if one
of those that should be rounding is more. On a CPU kernels are left out (tests run them in Triton's interpreter).

Shape legend: B batch, L tokens, D dim, F latent frames, n heads, d head dimension.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from joyavatar_core import attention, kernels
from joyavatar_core.avatar import default_dtype
from joyavatar_core.bench import plan, subject, timing
from joyavatar_core.cache import EVERY
from joyavatar_core.cli.options import device_of
from joyavatar_core.config import MODELS, ModelConfig
from joyavatar_core.eight_bits import shrink_products
from joyavatar_core.fast import stack_projections
from joyavatar_core.model import JoyAvatarDiT, SelfAttention, Table, _gated, _modulate_sum, modulate
from joyavatar_core.policy import RolloutPolicy
from joyavatar_core.rollout import Fast
from joyavatar_core.rope import rotary_table

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
"""Of the largest value; in bfloat16 a rounding of the result, and its like in the eager code."""
WHOLE = 3e-2
"""Of the norm of a block's latents, after a whole rollout in bfloat16, for what is rounding only."""
POLICY = RolloutPolicy()


def noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def off(fused: Tensor, eager: Tensor) -> float:
    return float((fused.double() - eager.double()).abs().max() / eager.double().abs().max())


@torch.no_grad()
def each_kernel(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float, list[float]]]:
    """(name, error against the eager code in float32, milliseconds of kernel and of eager code)"""
    frames, tokens, dim = 13, 64, config.dim
    x, y = (noise(device, 1, frames * tokens, dim + i).narrow(2, 0, dim).contiguous() for i in range(2))
    shift, scale, gate = (t.unsqueeze(2) for t in noise(device, 1, frames, 3, dim).unbind(2))
    layer = SelfAttention(config, torch.nn, attention.sdpa).to(device).requires_grad_(False)
    turn = rotary_table(tuple(range(28)), (8, 8), config.head_dim, torch.float32, device)
    table = Table(turn[15 * tokens :], turn)
    q, k, _ = noise(device, 1, frames * tokens, 3 * dim).chunk(3, dim=-1)
    past = noise(device, 1, 15 * tokens, config.heads, config.head_dim)
    cases: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
        "modulated_norm": (lambda *t: (modulate(*t, 1e-6),), (x, shift, scale)),
        "added_modulated_norm": (lambda *t: _modulate_sum(*t, 1e-6), (x, y, shift, scale)),
        "gated": (lambda *t: (_gated(*t),), (x, y, gate)),
        "turn_into": (lambda *t: layer.to(t[0].dtype)._rotated(t[0], t[1], table, t[2], EVERY), (q, k, past)),
    }
    for name, (call, given) in cases.items():
        exact = call(*given)
        small = [t.to(dtype) for t in given]

        def eager(call=call, small=small) -> tuple[Tensor, ...]:
            with kernels.using("never"):
                return call(*small)

        def fused(name=name, call=call, small=small) -> tuple[Tensor, ...]:
            with kernels.using("always"):
                return (
                    layer._turned(small[0], small[1], table, small[2], EVERY) if name == "turn_into" else call(*small)
                )

        layer.to(dtype)
        error = max(off(a, b) for a, b in zip(fused(), exact, strict=True))
        taken = [1e3 * min(timing.seconds(way, device, 10)) for way in (fused, eager)]
        layer.float()
        yield name, error, taken


@torch.inference_mode()
def latents(model: JoyAvatarDiT, device: torch.device, size: tuple[int, int], fast: Fast, blocks: int = 10) -> Tensor:
    """Clean latents of a stream of random sound, ramp-up and steady state."""
    geometry = plan.geometry_of(model.config, size, POLICY)
    rollout = subject.random_rollout(model, POLICY, geometry, device, 10, fast=fast)
    state, out = rollout.start(), []
    for window in range(blocks + POLICY.lead_blocks):
        state.audio[window] = subject._heard(rollout, window)
        out += [done.latents.clone() for done in rollout.run_window(state)]
    return torch.cat(out, dim=2).float()


def whole_rollouts(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, size: tuple[int, int]
) -> dict[str, float]:
    """Error of every way of running it against the eager one: norm over norm."""
    model = subject.random_model(config, device, dtype, attention=attention.fitting)
    eager = latents(model, device, size, Fast(kernels="never"))

    def error(fast: Fast) -> float:
        return float((latents(model, device, size, fast) - eager).norm() / eager.norm())

    found = {"kernels": error(Fast()), "captured": error(Fast(kernels="never", capture=True))}
    found["fp8 kv"] = error(Fast(small_cache=True))
    stack_projections(model)
    found["stacked, kernels, captured"] = error(Fast(capture=True))
    if config.dim % 16 == 0:
        shrink_products(model)
        found["fp8 linear"] = error(Fast())
        found["fp8 both, captured"] = error(Fast(capture=True, small_cache=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flash-1.3b", choices=tuple(subject.SIZES))
    parser.add_argument(
        "--layers", type=int, default=4, help="of the model that rollouts are compared with (%(default)s)"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = torch.device(device_of(args.device))
    dtype, config, start = default_dtype(device), MODELS[args.config], time.perf_counter()
    figures: dict[str, object] = {"kernels": {}, "wrong": []}
    wrong: list[str] = []
    for precision in (torch.float32, torch.bfloat16) if kernels.available(device) else ():
        for name, error, (fused, eager) in each_kernel(config, device, precision):
            key = f"{name} {str(precision).removeprefix('torch.')}"
            figures["kernels"][key] = {"error": error, "ms": round(fused, 4), "eager_ms": round(eager, 4)}  # pyright: ignore
            wrong += [key] if not error <= ROUNDING[precision] else []
    names = [n for n in attention.BACKENDS if n == "sdpa" or device.type == "cuda"]
    figures["attention"] = {n: attention.works(n, device, dtype, config.head_dim) for n in names}
    figures["attention_taken"] = attention.chosen(device, dtype, config.head_dim)
    errors = whole_rollouts(replace(config, layers=min(args.layers, config.layers)), device, dtype, (128, 128))
    wrong += [name for name, error in errors.items() if "fp8" not in name and not error <= WHOLE]
    figures |= {"rollouts": {n: round(e, 5) for n, e in errors.items()}, "wrong": wrong}
    figures["seconds"] = round(time.perf_counter() - start, 1)
    print("\n".join(f"{name:26s} {value}" for name, value in figures.items()))
    print(line := json.dumps({"config": args.config, "device": str(device), **figures}))
    if wrong:
        print(line, file=sys.stderr)  # what `gpu.py` keeps of a part that failed
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
