"""What `joyavatar bench` reckons, against what runs really do; and that it measures on a CPU what it does on a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from joyavatar_core.bench import ceilings, costs, measure, plan, subject, timing
from joyavatar_core.bench.trace import Ledger, Work, counted, flops, moved_bytes, storage_bytes
from joyavatar_core.cli import bench as command
from joyavatar_core.cli.main import build_parser, main
from joyavatar_core.config import MODELS, AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.overlap import Overlap
from joyavatar_core.policy import RolloutPolicy
from joyavatar_core.wan_vae import WanVAEConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
POLICY = RolloutPolicy()
SMALL = ModelConfig(
    dim=96, ffn_dim=192, layers=3, heads=3, text_dim=20, text_len=8, image_dim=24,
    audio=AudioConfig(features=12, width=16), face=FaceConfig(12, 32, 2, 2, 4, 16),
)  # fmt: skip
NARROW = replace(SMALL, out_channels=48, in_channels=100)  # latents of the embedded model, whose autoencoder is small
SIZE = (64, 96)
GEOMETRY = Geometry(*SIZE)


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by products that torch's own counter knows."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


def steady(config: ModelConfig = SMALL, **options: object) -> Callable[[], None]:
    """The steady window of a random model on the CPU, once run."""
    model = subject.random_model(config, CPU, torch.float32, **options)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        rollout = subject.random_rollout(model, POLICY, GEOMETRY, CPU, 30)
        state = subject.steady_state(rollout)
        subject.run_steady_window(rollout, state)
    return lambda: subject.run_steady_window(rollout, state)


@torch.no_grad()
def allocated(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator gave out at once during a call, beyond what was out before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        call()
    held = peak = 0
    for event in made.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# Work


@pytest.mark.parametrize(
    ("size", "linear", "self_attention", "cross"), [((512, 512), 33.3, 70.4, 1.9), ((480, 832), 50.7, 163.3, 2.9)]
)
def test_work_of_the_full_size_is_what_the_shapes_say(size, linear, self_attention, cross) -> None:
    """Against counts made by hand for 30 layers, 13 latents beside 28; audio and face come on top of them."""
    geometry = Geometry(*size)
    one, two = (
        costs.model_cost(replace(MODELS["flash-1.3b"], layers=n), POLICY, geometry, torch.bfloat16).work for n in (1, 2)
    )

    def all_layers(kind: str, place: str | None = None) -> float:
        return (flops(one, kind, place) + 29 * (flops(two, kind, place) - flops(one, kind, place))) / 1e12  # pyright: ignore

    tokens = geometry.tokens_per_latent
    heard = 4 * 13 * tokens * (subject.audio_tokens(MODELS["flash-1.3b"], geometry) + 16) * 1536 * 30 / 1e12
    assert all_layers("linear") == pytest.approx(linear, rel=0.003)
    assert all_layers("attention", "self_attn") == pytest.approx(self_attention, rel=0.001)
    assert all_layers("attention", "cross_attn") - heard == pytest.approx(cross, abs=0.05)


def test_work_is_what_torch_counts_in_a_real_run() -> None:
    call = steady(attention=two_products)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    work = costs.model_cost(SMALL, POLICY, GEOMETRY, torch.float32, cuda=False).work
    assert flops(work) == counter.get_total_flops()
    places = {p: flops(work, "linear", p) for p in ("self_attn", "cross_attn", "ffn", "other")}
    assert all(places.values()) and sum(places.values()) == flops(work, "linear")


def test_decoding_costs_what_the_published_widths_say() -> None:
    """13.55 TFLOP for a latent of 480x832: by area, its attention apart."""
    wan, ledger = subject.random_wan(torch.device("meta"), torch.bfloat16), Ledger()
    latent = torch.empty(1, 16, 1, 8, 8, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        state = wan.decode_stream(latent, wan.decode_stream(latent, None)[1])[1]
    work = counted(lambda: wan.decode_stream(latent, state), ledger).work
    assert flops(work) * (480 * 832) / 64**2 == pytest.approx(13.55e12, rel=0.03)


def test_the_roofline_takes_the_longer_of_arithmetic_and_bytes() -> None:
    best = ceilings.Ceilings(100.0, 50.0, 10.0, {}, ceilings.Sizes(1, 1, 1))
    work = Counter(
        {
            Work("linear", "ffn", 200, 10): 2,  # 2 s of arithmetic, 1 of bytes
            Work("linear", "other", 10, 30): 1,  # 0.1 and 3
            Work("attention", "self_attn", 100, 10): 1,
            Work("memory", "other", 0, 5): 4,
        }
    )
    assert best.seconds(work) == {"linear": 7.0, "attention": 2.0, "memory": 2.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "linear"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<...>", "memory"),
        ("void at::native::CatArrayBatchedCopy<...>", "memory"),
        ("aten::addmm", "linear"),
        ("aten::mm", "linear"),
        ("aten::addcmul", "memory"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_kernels_are_told_apart(name: str, kind: str) -> None:
    assert timing.kind_of(name) == kind


# Memory


def test_a_window_takes_the_memory_that_is_reckoned() -> None:
    cost = costs.model_cost(SMALL, POLICY, GEOMETRY, torch.float32, cuda=False)
    assert allocated(steady()) == pytest.approx(cost.temporary, rel=0.1)
    seen = counted(steady(), Ledger("cpu")).peak
    assert seen == pytest.approx(cost.temporary, rel=0.05)  # noise is drawn on the device itself there


def test_decoding_takes_the_memory_that_is_reckoned() -> None:
    light = subject.random_light(SMALL, CPU, torch.float32)
    latents = torch.randn(1, 16, 3, *GEOMETRY.latent_size)
    with torch.no_grad():
        state = light.decode_stream(latents, None)[1]
    cost = costs.decoder_cost("light", SMALL, GEOMETRY, torch.float32)
    assert allocated(lambda: light.decode_stream(latents, state)) == pytest.approx(cost.decode, rel=0.15)
    assert cost.state == sum(t.numel() * 4 for t in state.values())


def test_steady_state_is_that_of_a_long_stream() -> None:
    setup = subject.random_setup(SMALL, SIZE, CPU, torch.float32, 8)
    stream = setup.avatar.stream(setup.picture, POLICY, 0, setup.encoded)
    for second in measure.sound(14.0).split(16000):
        for _ in stream.latents.feed(second, 16000):
            pass
    assert stream.state.rollout.window > POLICY.bootstrap + 8
    rollout = setup.rollout()
    with torch.inference_mode():
        state = subject.steady_state(rollout)
        subject.run_steady_window(rollout, state)
    assert state.nbytes() == stream.state.rollout.nbytes()
    cost = costs.model_cost(SMALL, POLICY, GEOMETRY, torch.float32, cuda=False)
    assert (cost.state, cost.cache) == (state.nbytes(), storage_bytes(state.caches[0].tensors().values()))


def test_eight_bits_and_offloading_take_what_the_plan_says() -> None:
    cost = costs.model_cost(SMALL, POLICY, GEOMETRY, torch.float32, cuda=False)
    model = subject.random_model(SMALL, CPU, torch.float32, "fp8")
    held = storage_bytes(model.parameters())
    arranged = plan.need(SMALL, POLICY, GEOMETRY, plan.Arrangement("fp8", "light"), torch.float32)
    decoder = costs.decoder_cost("light", SMALL, GEOMETRY, torch.float32).weights
    assert arranged.weights == held + decoder == cost.weights - cost.matrices * 3 // 4 + decoder
    for weights in ("fp8", "offload"):
        peak = counted(steady(weights=weights), Ledger("cpu")).peak
        assert cost.temporary <= peak * 1.05 and peak <= (cost.temporary + cost.largest) * 1.05


def test_a_norm_in_one_kernel_moves_less() -> None:
    one, many = (costs.model_cost(SMALL, POLICY, GEOMETRY, torch.bfloat16, cuda=cuda) for cuda in (True, False))
    tokens = 13 * GEOMETRY.tokens_per_latent
    norms = 3 * 3 * 2 * tokens * 96 * 2  # of q and k, and of the queries of the cross-attention: read and written
    assert norms < moved_bytes(many.work, "memory") - moved_bytes(one.work, "memory") < 12 * norms
    assert flops(one.work) == flops(many.work)


@pytest.mark.parametrize("weights", ["bf16", "fp8", "offload"])
def test_every_arrangement_runs(weights) -> None:
    plan.exercise(SMALL, POLICY, GEOMETRY, plan.Arrangement(weights, "light"), CPU)


def test_a_model_is_made_in_its_own_precision() -> None:
    """Nothing wider than the weights is ever there."""
    ledger = Ledger("cpu")
    made = []
    counted(lambda: made.append(subject.random_model(SMALL, CPU, torch.bfloat16)), ledger)
    parameters = list(made[0].parameters())
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in parameters)
    assert ledger.peak <= 1.1 * storage_bytes(parameters)


# The plan


@pytest.fixture
def small_aims(monkeypatch: pytest.MonkeyPatch) -> list[plan.Row]:
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setattr(plan, "usable", lambda card: card << 20)  # MiB: the small model fills them
    decoders = {"wan": (9, 2, 30, 40, 10**9), "light": (1, 1, 3, 2, 10**8)}
    mib = {k: costs.DecoderCost(*(n << 20 for n in sizes[:4]), sizes[4]) for k, sizes in decoders.items()}
    monkeypatch.setattr(plan, "decoder_cost", lambda kind, *_: mib[kind])
    needs = {a: plan.need(SMALL, POLICY, GEOMETRY, a) for a in plan.choices(SMALL)}
    sizes = sorted({1, *(-(-n.peak >> 20) + 1 for n in needs.values()), 10_000})
    return plan.plan(sizes, (("small", SIZE),))


def test_larger_cards_run_better_arrangements(small_aims: list[plan.Row]) -> None:
    order = [plan.ARRANGEMENTS.index(r.arrangement) for r in small_aims if r.arrangement]
    assert order == sorted(order, reverse=True) and len(set(order)) > 1
    assert small_aims[0].arrangement is None, "nothing fits into 1 MiB"
    assert small_aims[-1].arrangement == plan.ARRANGEMENTS[0]
    for row in small_aims:
        assert (row.need.peak <= row.card << 20) == (row.arrangement is not None)
        assert row.checked == "computed" and row.real_time == pytest.approx(row.flops / 0.75)
        assert bool(row.brought) == (row.arrangement is None or row.arrangement.weights == "offload")


def test_the_embedded_model_fits_the_smallest_card() -> None:
    (row,) = plan.plan((8,), (("tiny", (64, 64)),))
    assert row.arrangement == plan.Arrangement("bf16", "light") and row.need.peak < plan.usable(8) < 8 * plan.GIB


def test_plan_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rows = plan.plan((8, 24), (("tiny", (64, 64)),))
    monkeypatch.setattr(plan, "plan", lambda device: rows)
    assert main(["bench", "--plan", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 5 and "computed" in said[1] and "tiny" in said[2]
    assert [row["card"] for row in json.loads(said[-1])["plan"]] == [8, 24]


# Measuring


def test_a_system_with_all_conditions_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the packages are missing that a bare machine lacks."""
    monkeypatch.setitem(sys.modules, "joyavatar_core.media.writer", None)
    setup = subject.random_setup(NARROW, (32, 32), CPU, torch.float32, 8)
    figures = command.figures_of(setup, baseline=True, sizes=ceilings.Sizes(64, 64, 1 << 16))
    json.dumps(figures)
    for name in ("dit_fps", "decode_fps", "end_to_end_fps", "features_fps", "first_frame_s", "dit_speedup"):
        assert figures[name] > 0, name
    assert figures["write_fps"] is None and "H.264" not in figures["end_to_end"]
    assert figures["first_frame_live_s"] == pytest.approx(figures["first_frame_s"] + 2.25, abs=1e-3)
    assert figures["kv_bytes"] == 2 * 3 * 15 * setup.geometry.tokens_per_latent * 96 * 4
    assert sum(figures["flops"].values()) == figures["flops_per_block"] > 0
    share = sum(figures["predicted_s"].values()) / figures["window_s"]
    assert figures["share_of_all"] == pytest.approx(share, abs=2e-3)
    assert figures["finite"] and setup.hears
    two = measure.together(setup, 2, Overlap(hear=True, write=True))
    assert two["kv_bytes"] == 2 * figures["kv_bytes"] and two["avatars"] == 2
    assert two["dit_fps"] > 0 and two["end_to_end_fps"] > 0 and two["first_frame_s"] > 0
    assert measure.end_to_end(setup, Overlap(write=True))["frames_crc32"] == figures["frames_crc32"] != 0


def test_wan_decoder_is_measured() -> None:
    setup = subject.random_setup(SMALL, (32, 32), CPU, torch.float32, 8)
    small = subject.random_wan(CPU, torch.float32, WanVAEConfig(dim=8, multipliers=(1, 1, 1, 1), blocks=1))
    assert measure.decoder(setup, small, repeats=2)["fps"] > 0


def test_soak_compares_early_and_late() -> None:
    setup = subject.embedded_setup(True, (32, 32), CPU, torch.float32, 8)
    found = measure.soak(setup, 36, span=8)
    assert found["late_over_early"] == pytest.approx(found["block_s_late"] / found["block_s_early"])
    assert len(set(found["held_bytes"].values())) == 1 and list(found["held_bytes"]) == ["18", "36"]


def test_stand_ins_for_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "librosa" in subject.embedded_setup(True, (32, 32), CPU, torch.float32, 8).hears
    make, said = subject._front_end(MODELS["flash-1.3b"], CPU)
    assert "transformers" in said and make(GEOMETRY).channels == 768


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--soak", "100"], "--soak 100"), (["--wan-vae"], "--config"), (["--device", "warp"], "--device warp")],
)
def test_errors_name_the_option(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_configurations_of_the_command_are_those_with_sizes() -> None:
    for name in subject.SIZES:
        assert build_parser().parse_args(["bench", "--config", name]).config == name


# The scripts


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_gpu_script_asks_for_what_there_is() -> None:
    for words in script("gpu").JOBS.values():
        if "joyavatar_core.cli.main" in words:
            build_parser().parse_args(words[2:])
        else:
            assert (ROOT / words[0]).is_file()


def test_the_gpu_script_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    jobs = {
        "good": ("-c", "print('noise'); print('{\"dit_fps\": 3}')"),
        "bad": ("-c", "raise SystemExit('no such GPU')"),
        "slow": ("-c", "import time; time.sleep(60)"),
        "late": ("-c", "print(1)"),
    }
    monkeypatch.setattr(gpu, "JOBS", jobs)
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.06"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["good"] == {"dit_fps": 3} and found["bad"]["failed"] == ["no such GPU"]
    assert "not done" in found["slow"]["failed"] and found["late"] == {"left out": "no time was left"}
    assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert "failed" in json.loads((tmp_path / "gpu.json").read_text())["bad"], "other parts stay"


def test_ways_of_running_are_compared() -> None:
    """On a CPU, where kernels are none: a rollout from recordings and one product are rounding, eight bits are more."""
    model = replace(NARROW, layers=1, text_dim=0, text_len=0, face=None)
    errors = script("kernels").whole_rollouts(model, CPU, torch.float32, (32, 32))
    assert errors["kernels"] == errors["captured"] == 0 and errors["stacked, kernels, captured"] < 1e-4
    assert all(1e-4 < errors[name] < 0.2 for name in ("fp8 kv", "fp8 linear", "fp8 both, captured"))


def test_optimisations_compare_equal_results() -> None:
    tricks = script("optimisations")
    config, geometry = replace(NARROW, layers=1), Geometry(32, 32, spatial=16)
    model = subject.random_model(config, CPU, torch.float32)
    place = tricks.Place(config, geometry, CPU, torch.float32, model)
    best = ceilings.Ceilings(1e11, 1e11, 1e10, {}, ceilings.SMALL)
    for case in tricks.CASES:
        with torch.inference_mode():
            calls = case(place)
        assert min(tricks.measured(calls, CPU, 1)) > 0
        said = tricks.predicted(case, place, best)
        assert min(said) > 0, case
    plain, ours = tricks.folded_decoder(place)
    with torch.no_grad():
        assert torch.allclose(plain()[0], ours()[0], atol=1e-5)
