"""What the engine does cleverly, each beside the plain way of the same: predicted from the ceilings, and measured.

    python benchmarks/optimisations.py --config tiny --repeats 15
    python benchmarks/optimisations.py --config flash-1.3b --size 512x512 --device cuda

Times are of one steady forward, or one block of the decoder. On a CPU they are those that one thread spends, so that
other work on the machine counts for little. The last line is JSON.

Shape legend: L tokens, D dim, heads, d head dimension, F latent frames of the window, h w latent size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from joyavatar_core.avatar import default_dtype
from joyavatar_core.bench import ceilings, plan, subject, timing
from joyavatar_core.bench.trace import Ledger, counted
from joyavatar_core.cli.options import device_of, size_of
from joyavatar_core.config import MODELS, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT, modulate, modulation
from joyavatar_core.plain import _complex_rotate, _frequency_table
from joyavatar_core.policy import RolloutPolicy
from joyavatar_core.rope import rotary_table, rotate

Call = Callable[[], object]
POLICY = RolloutPolicy()
SEEN = POLICY.span_latents + 1  # latents that a steady forward sees, the motion frame with them
ASKED = POLICY.window_blocks * POLICY.block_latents + 1


@dataclass(frozen=True)
class Place:
    """A model of a size, on a device in a precision."""

    config: ModelConfig
    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    model: JoyAvatarDiT

    def noise(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(self.device, dtype or self.dtype)


def constant_conditions(place: Place) -> tuple[Call, Call]:
    """Text, image and face once a stream, audio once a block: or all of them at every forward."""
    config = place.config
    made = subject._encoded(config, torch.Generator().manual_seed(0), place.geometry.tokens_per_latent)
    given = [None if t is None else t.to(place.device, place.dtype) for t in (made.text, made.image, made.face)]
    assert config.audio
    heard = place.noise(1, ASKED, subject.audio_tokens(config, place.geometry), config.audio.features)

    def plain() -> object:
        return place.model.condition(*given), place.model.audio(heard)

    return plain, lambda: place.model.audio(heard[:, : POLICY.block_latents])


def real_rotation(place: Place) -> tuple[Call, Call]:
    """Keys and queries of all layers turned by complex numbers in float32: or in float64."""
    _frequency_table.cache_clear()  # of another device, perhaps
    config, grid = place.config, place.geometry.grid
    x = place.noise(1, SEEN * place.geometry.tokens_per_latent, config.heads, config.head_dim)
    window = x[:, -ASKED * place.geometry.tokens_per_latent :]
    positions = tuple(range(SEEN))
    table = rotary_table(positions, grid, config.head_dim, place.dtype, place.device)
    queries = rotary_table(positions[-ASKED:], grid, config.head_dim, place.dtype, place.device)

    def plain() -> None:
        with place.device:
            for _ in range(config.layers):
                _complex_rotate(x, list(positions), torch.Size(grid))
                _complex_rotate(window, list(positions[-ASKED:]), torch.Size(grid))

    def ours() -> None:
        for _ in range(config.layers):
            rotate(x, table)
            rotate(window, queries)

    return plain, ours


def modulation_by_latent(place: Place) -> tuple[Call, Call]:
    """Norm and modulation of all layers with levels of a latent: or spread over its tokens, in float32."""
    dim, tokens = place.config.dim, place.geometry.tokens_per_latent
    x, time, levels = place.noise(1, ASKED * tokens, dim), place.noise(1, ASKED, 6, dim), place.noise(1, 6, dim)

    def plain() -> None:
        for _ in range(place.config.layers):
            e = (levels.float() + time.float()).repeat_interleave(tokens, dim=1).unbind(2)
            for shift, scale in (e[:2], e[3:5]):
                (F.layer_norm(x.float(), x.shape[-1:]) * (1 + scale) + shift).to(x.dtype)

    def ours() -> None:
        for _ in range(place.config.layers):
            e = modulation(levels, time, x)
            for shift, scale in (e[:2], e[3:5]):
                modulate(x, shift, scale, 1e-6)

    return plain, ours


def no_clean_pass(place: Place) -> tuple[Call, Call]:
    """Keys of a block's last step kept: or the finished block run once more at timestep 0."""
    return _window(place, replace(POLICY, kv_level="clean")), _window(place, POLICY)


def window_of_blocks(place: Place) -> tuple[Call, Call]:
    """Four blocks denoised together, one forward a block: or block after block, four steps and a clean pass each."""
    alone = replace(POLICY, window_blocks=1, bootstrap=0, kv_level="clean", motion_frame=False)
    return _window(place, alone), _window(place, POLICY)


def folded_decoder(place: Place) -> tuple[Call, Call]:
    """The light decoder's upsampling, growing in time and convolution as one: or as three."""
    ours = subject.random_light(place.config, place.device, place.dtype)
    assert ours.original is not None
    latents = place.noise(1, ours.latent_channels, POLICY.block_latents, *place.geometry.latent_size)
    plain, state = ours.original, ours.decode_stream(latents, None)[1]
    return lambda: plain.decode_stream(latents, state), lambda: ours.decode_stream(latents, state)


CASES: tuple[Callable[[Place], tuple[Call, Call]], ...] = (
    constant_conditions,
    real_rotation,
    modulation_by_latent,
    no_clean_pass,
    window_of_blocks,
    folded_decoder,
)


def _window(place: Place, policy: RolloutPolicy) -> Call:
    geometry = replace(place.geometry, **policy.block_sizes)
    rollout = subject.random_rollout(place.model, policy, geometry, place.device, 10, place.dtype)
    state = subject.steady_state(rollout)
    return lambda: subject.run_steady_window(rollout, state)


def measured(calls: tuple[Call, Call], device: torch.device, repeats: int) -> list[float]:
    """Median seconds of the plain way and of ours, run in turn."""
    both: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for call, times in zip(calls, both, strict=True):
                start = time.process_time()
                taken = timing.seconds(call, device, repeats=1, warm_up=0)
                times += taken if device.type != "cpu" else [time.process_time() - start]
    return [statistics.median(times[1:]) for times in both]


def predicted(case: Callable[[Place], tuple[Call, Call]], place: Place, best: ceilings.Ceilings) -> list[float]:
    """Seconds of both at the ceilings, by their shapes."""
    found = []
    for i in (0, 1):
        ledger = Ledger(fused_norm=place.device.type == "cuda")
        model = subject.random_model(place.config, torch.device("meta"), place.dtype, attention=ledger.attention)
        with torch.inference_mode(False), torch.no_grad():
            call = case(replace(place, device=torch.device("meta"), model=model))[i]
            call()
        found.append(sum(best.seconds(counted(call, ledger).work).values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", choices=tuple(subject.SIZES))
    parser.add_argument("--size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    device, config = torch.device(device_of(args.device)), MODELS[args.config]
    dtype = default_dtype(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    geometry = plan.geometry_of(config, size_of(args.size) if args.size else subject.SIZES[args.config], POLICY)
    place = Place(config, geometry, device, dtype, subject.random_model(config, device, dtype))
    best = ceilings.measure(device, dtype, config.heads, config.head_dim)
    figures = {}
    for case in CASES:
        with torch.inference_mode():
            calls = case(place)
        real, said = measured(calls, device, args.repeats), predicted(case, place, best)
        figures[case.__name__] = {
            "plain_ms": round(1e3 * real[0], 3),
            "ours_ms": round(1e3 * real[1], 3),
            "gain": round(real[0] / real[1], 2),
            "predicted_gain": round(said[0] / said[1], 2),
            "predicted_ms": [round(1e3 * s, 3) for s in said],
        }
        print(f"{case.__name__:22s} {figures[case.__name__]}")
    print(json.dumps({"config": args.config, "size": [geometry.width, geometry.height], "cases": figures}))


if __name__ == "__main__":
    main()
