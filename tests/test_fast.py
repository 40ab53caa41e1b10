"""A step that never waits for the device, with the same shapes every time, and forwards that are played again.

Shape legend: B batch, C channels, F latent frames, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from joyavatar_core import attention, captured
from joyavatar_core.bench import subject
from joyavatar_core.cli import bench
from joyavatar_core.cli.main import build_parser
from joyavatar_core.conditioning import ImageChannels
from joyavatar_core.config import AudioConfig, FaceConfig, ModelConfig
from joyavatar_core.eight_bits import EightBitLinear, quantised, restored, shrink_products
from joyavatar_core.fast import stack_projections
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import JoyAvatarDiT
from joyavatar_core.noise import Ahead, Draw, gaussian
from joyavatar_core.policy import POLICIES, RolloutPolicy
from joyavatar_core.rollout import Fast, Rollout

from .helpers import audio_tokens, roll, small_rollout

META = torch.device("meta")
CONFIG = ModelConfig(
    dim=96, ffn_dim=192, layers=1, heads=3, text_dim=20, text_len=8, image_dim=24,
    audio=AudioConfig(features=12, width=16), face=FaceConfig(12, 32, 2, 2, 4, 16),
)  # fmt: skip
FLASH = RolloutPolicy()
WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "lift_fresh", "masked_select", "unique")
"""Operators that make the host wait for the device, or bring something to it that is not page-locked."""


class Lists(TorchFunctionMode):
    """Fails where a list is brought to the device (meta stands for it): torch hides that copy from dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor):
            device = torch.device((kwargs or {}).get("device") or "cpu")
            assert device != META, "a list is brought to the device"
        if func is Tensor.__getitem__ and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert all(i is None or i is ... or isinstance(i, (int, slice)) for i in index), f"index {index}"
        return func(*args, **(kwargs or {}))


class Guard(TorchDispatchMode):
    """Fails where the host would wait for the device (meta stands for it); keeps names and shapes of what it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[torch.Size, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._overloadpacket.__name__
        if any(t.device == META for t in (*given, *made)):
            assert name not in WAITING, f"{name} waits for the device"
            if any(t.device != META and t.dim() for t in given):
                assert name == "_to_copy" and (kwargs or {}).get("non_blocking"), f"{name} brings something and waits"
            self.steps.append((name, tuple(t.shape for t in made)))
        return out


def meta_rollout(policy: RolloutPolicy) -> Rollout:
    geometry = Geometry(32, 48, **policy.block_sizes)
    model = subject.random_model(CONFIG, META, torch.bfloat16)
    with torch.no_grad():
        return subject.random_rollout(model, policy, geometry, META, 30)


@pytest.mark.parametrize("name", ["joyavatar-flash", "self-forcing", "rolling-forcing"])
@torch.no_grad()
def test_a_steady_step_waits_for_nothing_and_keeps_its_shapes(name: str) -> None:
    rollout = meta_rollout(POLICIES[name])
    state = subject.steady_state(rollout)
    for _ in range(5):  # tables of every place in the ring
        subject.run_steady_window(rollout, state)
    seen = []
    for _ in range(3):
        with Lists(), Guard() as guard:
            subject.run_steady_window(rollout, state)
        seen.append([step for step in guard.steps if step[0] != "_to_copy"])  # new tables, where indices grow
    if rollout.policy.rope_limit is not None:
        assert seen[0] == seen[1] == seen[2] and len(seen[0]) > 100


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.tensor([1.0, 2.0], device=META),
        lambda x: x[[0, 1]],
        lambda x: torch.ones(3).to(META),
        lambda x: x * torch.ones(3),
    ],
)
def test_the_guard_sees_what_waits(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((AssertionError, RuntimeError)), Lists(), Guard():
        call(torch.empty(3, device=META))


@torch.no_grad()
def test_noise_is_drawn_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a steady step takes is there when the window before it ends, and is what it would have been."""
    rollout = meta_rollout(FLASH)
    state, taken = subject.steady_state(rollout), []
    subject.run_steady_window(rollout, state)
    take = Ahead.take
    monkeypatch.setattr(Ahead, "take", lambda self, draw: taken.append(draw in self.drawn) or take(self, draw))
    subject.run_steady_window(rollout, state)
    assert len(taken) == 6 and all(taken)  # a new block, the motion frame, four blocks to their next level
    ahead, draws = Ahead(), [Draw((3,), block, 1, (1, 2, 3)) for block in range(3)]
    ahead.foresee(draws[:2])
    ahead.foresee(draws[1:])
    assert list(ahead.drawn) == draws[1:]
    assert all(torch.equal(ahead.take(d), gaussian(3, *d[1:])) for d in draws) and not ahead.drawn


def test_channels_of_latents_are_those_of_an_index() -> None:
    channels = ImageChannels(torch.randn(1, 6, 4, 2, 2))
    for latents in (range(3), range(2, 7), range(3, 5), range(9, 11), [0]):
        wanted = channels.channels[:, :, [min(i, 3) for i in latents]]
        assert torch.equal(channels.at(latents), wanted)


def shapes(policy: RolloutPolicy, blocks: int, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Latents of the window and tokens it sees, of every forward of a clip."""
    seen, denoise = set(), JoyAvatarDiT.denoise

    def noted(self: JoyAvatarDiT, x: Tensor, timesteps: Tensor, table: Any, *more: Any, **named: Any) -> Any:
        seen.add((x.shape[2], len(table.all)))
        return denoise(self, x, timesteps, table, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(JoyAvatarDiT, "denoise", noted)
        roll(small_rollout(policy, dtype=torch.float32), blocks)
    return seen


def test_ramp_up_and_tail_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the clip: 4 windows of ramp-up, 5 while the ring fills (the last is steady), 3 of tail."""
    assert shapes(FLASH, 12, monkeypatch) == shapes(FLASH, 21, monkeypatch)
    assert len(shapes(FLASH, 12, monkeypatch)) == 12


# Forwards played again


def fast(rollout: Rollout) -> Rollout:
    return replace(rollout, fast=Fast(capture=True))


@pytest.mark.parametrize("name", POLICIES)
def test_played_forwards_are_the_eager_ones(name: str) -> None:
    """Bit for bit, over ramp-up, steady state and tail; live-avatar's reference is made anew on the way."""
    rollout = small_rollout(POLICIES[name], seed=3, dtype=torch.float32)
    state = fast(rollout).start()
    assert torch.equal(roll(fast(rollout), 16, state), roll(rollout, 16))
    assert state.captured and state.captured.recordings


@torch.no_grad()
def test_buffers_stay_where_they_are() -> None:
    rollout = fast(small_rollout(FLASH, dtype=torch.float32))
    state, places = rollout.start(), []
    for window in range(20):
        state.audio[window] = audio_tokens(window)
        rollout.run_window(state)
        assert state.captured
        places.append(
            [t.data_ptr() for b, r, _ in state.captured.recordings.values() for t in (*b.tensors(), r.made[0])]
        )  # pyright: ignore
    assert len(state.captured.recordings) == 1, "only the steady forward comes more than twice"
    assert places[9] == []  # windows 0-3 ramp-up, 4-7 the ring fills; of the steady kind the third is captured
    assert places[10] == places[19] != []


@pytest.mark.parametrize("left_out", ["x", "table", "audio"])
def test_a_buffer_that_is_not_filled_is_noticed(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def partly(self: captured.Buffers, given: captured.Buffers) -> None:
        stale = {"x": [self.x], "table": [self.table], "audio": [t for kv in self.audio.layers for t in kv]}  # pyright: ignore
        skip = {id(t) for t in stale[left_out]}
        for place, new in zip(self.tensors(), given.tensors(), strict=True):
            if id(place) not in skip:
                place.copy_(new)

    rollout = small_rollout(FLASH, dtype=torch.float32)
    wanted = roll(rollout, 16)
    monkeypatch.setattr(captured.Buffers, "fill", partly)
    assert not torch.allclose(roll(fast(rollout), 16), wanted, atol=1e-4)


@torch.no_grad()
def test_a_resumed_stream_captures_anew() -> None:
    """Its keys and values lie elsewhere."""
    rollout = fast(small_rollout(FLASH, dtype=torch.float32))
    whole, state, out = roll(rollout, 18), rollout.start(), []
    for window in range(15):
        state.audio[window] = audio_tokens(window)
        out += [d.latents for d in rollout.run_window(state)]
    again = rollout.restore({k: t.clone() for k, t in state.tensors().items()}, state.window)
    assert torch.equal(torch.cat([*out, *rest(rollout, again, 18)], dim=2), whole)


def rest(rollout: Rollout, state: Any, blocks: int) -> Iterator[Tensor]:
    while state.window < rollout.policy.num_windows(blocks):
        if state.window < blocks:
            state.audio[state.window] = audio_tokens(state.window)
        yield from (d.latents for d in rollout.run_window(state, blocks))


# Weights side by side, eight bits, the choice of attention


@torch.no_grad()
def test_stacked_projections_are_those_apart() -> None:
    rollout = small_rollout(FLASH, dtype=torch.float32)
    model = rollout.model.requires_grad_(False)
    x, before = torch.randn(2, 5, 24), {n: t.clone() for n, t in model.state_dict().items()}
    mine = model.blocks[0].self_attn
    apart = mine._projected(x)  # pyright: ignore
    assert stack_projections(model) == len(model.blocks)
    assert (
        all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        and model.state_dict().keys() == before.keys()
    )
    together = mine._projected(x)  # pyright: ignore
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together, apart, strict=True))
    assert together[0]._base is not None, "one product"
    mine.q.weight.mul_(2)  # pyright: ignore - in place, as a patch of weights does
    assert torch.allclose(mine._projected(x)[0] - mine.q.bias, 2 * (apart[0] - mine.q.bias), atol=1e-5)  # pyright: ignore
    mine.v.register_forward_hook(lambda *_: torch.zeros(1))  # pyright: ignore
    assert mine._projected(x)[2].numel() == 1  # pyright: ignore - what hangs on a layer is not passed by


def test_layers_that_are_no_plain_ones_are_left_apart() -> None:
    class Host(torch.nn.Linear):
        """A layer class of a host."""

    model = small_rollout(FLASH, dtype=torch.float32).model
    assert stack_projections(model) == 0, "in training"
    model.requires_grad_(False)
    model.blocks[1].self_attn.k.__class__ = Host  # pyright: ignore
    assert stack_projections(model) == 1


@torch.no_grad()
def test_eight_bits_err_by_what_their_mantissa_says() -> None:
    """e4m3 has 3 bits of mantissa: 2**-4 of a number at most, and a third of that in the mean over products."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 64, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    small, scale = quantised(x)
    assert small.dtype == torch.float8_e4m3fn and scale.shape == (7, 1)
    error = (restored(small, scale, torch.float32) - x).abs()
    assert (error <= x.abs() * 2**-4 + scale * 2**-9).all() and error.max() > 0
    assert torch.equal(restored(*quantised(torch.zeros(2, 4)), torch.float32), torch.zeros(2, 4))
    linear = torch.nn.Linear(64, 48)
    wanted = linear(x[3:4].expand(32, 64))
    found = EightBitLinear(linear)(x[3:4].expand(32, 64))
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.05


@torch.no_grad()
def test_a_cache_in_eight_bits_takes_half_and_is_close() -> None:
    rollout = small_rollout(FLASH, dtype=torch.bfloat16)
    small = replace(rollout, fast=Fast(small_cache=True))
    states = [r.start() for r in (rollout, small)]
    exact, rough = (roll(r, 12, s).float() for r, s in zip((rollout, small), states, strict=True))
    held = [sum(t.nbytes for t in s.caches[0].tensors().values()) for s in states]
    assert held[1] == held[0] * (1 + 4 / 12) / 2  # a scale of 4 bytes for a head of 12
    assert torch.equal(exact[:, :, :3], rough[:, :, :3]), "nothing is cached yet"
    assert 0 < (exact - rough).norm() / exact.norm() < 0.2
    again = small.restore({k: t.clone() for k, t in states[1].tensors().items()}, states[1].window)
    for mine, saved in zip(again.caches[0].tensors().values(), states[1].caches[0].tensors().values(), strict=True):
        assert torch.equal(mine.float(), saved.float())


@torch.no_grad()
def test_products_in_eight_bits_run_a_stream() -> None:
    config = replace(CONFIG, text_dim=0, text_len=0, face=None)
    model = subject.random_model(config, torch.device("cpu"), torch.float32)
    geometry = Geometry(32, 32)
    exact, rough = [], []
    for out in (exact, rough):
        rollout = subject.random_rollout(model, FLASH, geometry, torch.device("cpu"), 4)
        state = rollout.start()
        for window in range(5):
            state.audio[window] = subject._heard(rollout, window)
            out += [d.latents for d in rollout.run_window(state)]
        shrink_products(model) if out is exact else None
    error = (torch.cat(exact, 2) - torch.cat(rough, 2)).norm() / torch.cat(exact, 2).norm()
    assert 0 < error < 0.1
    with pytest.raises(ValueError, match="multiples of 16"):
        shrink_products(small_rollout(FLASH).model)


def test_attention_is_chosen_by_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    q, k, v = (torch.randn(1, n, 2, 8) for n in (3, 5, 5))
    assert torch.equal(attention.fitting(q, k, v), attention.sdpa(q, k, v))
    assert attention.works("sdpa", cpu, torch.float32, 8)
    assert not attention.works("flash3", cpu, torch.bfloat16, 128), "not installed"
    monkeypatch.setitem(attention.BACKENDS, "cudnn", lambda q, k, v, mask: v[:, : q.shape[1]])
    assert not attention.works("cudnn", cpu, torch.float32, 8), "what it gives is looked at"
    monkeypatch.setitem(attention.BACKENDS, "cudnn", attention.sdpa)
    gpu = torch.device("cuda")
    monkeypatch.setattr(attention, "works", lambda name, *_: name == "cudnn")
    for capability, name in (((9, 0), "cudnn"), ((10, 0), "cudnn"), ((8, 9), "sdpa")):
        attention.chosen.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert attention.chosen(gpu, torch.bfloat16, 128) == name
    attention.chosen.cache_clear()
    assert attention.chosen(cpu, torch.bfloat16, 128) == "sdpa"


def test_options_of_the_command(capsys: pytest.CaptureFixture) -> None:
    words = ["bench", "--random", "--size", "32x32", "--blocks", "8", "--device", "cpu", "--dtype", "float32", "--json"]
    args = build_parser().parse_args([*words, "--fast", "--fp8", "kv"])
    setup = bench._setup(args, torch.device("cpu"))
    assert setup.avatar.fast == Fast(capture=True, small_cache=True) == setup.rollout().fast
    assert setup.avatar.model.blocks[0].self_attn.stacked is not None  # pyright: ignore
    plain = bench._setup(build_parser().parse_args([*words, "--kernels", "never"]), torch.device("cpu"))
    assert plain.avatar.fast == Fast(kernels="never") and plain.avatar.model.blocks[0].self_attn.stacked is None  # pyright: ignore
