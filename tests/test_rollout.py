"""The rollout against its laws: URCR, brute force, determinism, bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from joyavatar_core import rollout as rollout_module
from joyavatar_core import rope
from joyavatar_core.cache import KVCache
from joyavatar_core.model import Past
from joyavatar_core.noise import gaussian
from joyavatar_core.plain import PlainRollout
from joyavatar_core.policy import POLICIES, RolloutPolicy
from joyavatar_core.rope import rotary_table, rotate

from .helpers import GEOMETRY, SMALL, audio_tokens, roll, small_model, small_rollout

FLASH = RolloutPolicy()


@pytest.fixture(scope="module")
def unlimited() -> torch.Tensor:
    return roll(small_rollout(replace(FLASH, rope_limit=None)), 80)


@pytest.mark.parametrize("limit", [27, 60, 100])
def test_rope_limit_changes_nothing(limit: int, unlimited: torch.Tensor) -> None:
    """Engine note 5.3: a reset moves every index alike, so the rollout is independent of N."""
    out = roll(small_rollout(replace(FLASH, rope_limit=limit)), 80)
    assert unlimited.std() > 0.5
    assert (out - unlimited).abs().max() < 1e-10


def test_a_pinned_sink_fails_the_law() -> None:
    pinned = replace(FLASH, sink_position="absolute")
    a = roll(small_rollout(replace(pinned, rope_limit=27)), 12)
    b = roll(small_rollout(replace(pinned, rope_limit=None)), 12)
    assert (a - b).abs().max() > 1e-3


class RotatedKeys:
    """Negative control: keys cached after RoPE, at the index they had when their block was finished."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.now = cache, ()

    def context(self, layer: int):
        k, v = self.cache.context(layer)
        grid, dim = GEOMETRY.grid, SMALL.head_dim
        stored = tuple(self.start[b] + i for b in self.cache.blocks for i in range(3))
        then, now = (rotary_table(places, grid, dim, k.dtype, k.device) for places in (stored, self.now))
        return rotate(rotate(k, then), now.conj()), v


def test_keys_cached_after_rope_fail_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model will rotate by `now`; undoing that and applying the stored rotation is a post-RoPE cache."""

    def past_after_rope(self, state, sight, ring=0):
        past = original(self, state, sight, ring)
        if past is None:
            return None
        control = RotatedKeys(past.context)
        control.now = past.positions
        control.start = {b: self.policy.window_start(b) for b in past.context.blocks}
        return Past(control, past.positions)

    original = rollout_module.Rollout._past
    monkeypatch.setattr(rollout_module.Rollout, "_past", past_after_rope)
    outs = [roll(small_rollout(replace(FLASH, rope_limit=n)), 14) for n in (27, None)]
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kv_level, prediction", [("last_step", "velocity"), ("clean", "velocity"), ("clean", "x0")])
def test_cached_rollout_is_brute_force(kv_level: str, prediction: str) -> None:
    """The engine against the plain way: own loop, lists of keys, complex rotation at absolute places."""
    blocks = 9
    policy = replace(FLASH, kv_level=kv_level)
    engine = small_rollout(policy, seed=5, config=replace(SMALL, prediction=prediction))

    def noise(block: int, forward: int, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        return gaussian(5, block, forward, shape, purpose).double()

    from joyavatar_core.conditioning import reference_tokens

    image = engine.condition.image.channels
    audio = torch.cat([audio_tokens(b).tokens for b in range(blocks)]).double()
    tokens = reference_tokens(engine.condition.image.picture, SMALL.patch)
    plain = PlainRollout(engine.model, image, tokens, audio, noise, clean_pass=kv_level == "clean")
    assert (plain.run(blocks) - roll(engine, blocks)).abs().max() < 1e-10


def test_a_table_further_on_takes_only_the_angles_of_its_places_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that grow for ever: height and width are not computed again, and what is kept has a limit."""
    computed: list[int] = []

    def counted(positions: torch.Tensor, dim: int) -> torch.Tensor:
        computed.append(len(positions))
        return angles(positions, dim)

    angles = rope._angles
    monkeypatch.setattr(rope, "_angles", counted)
    place = ((5, 7), 20, torch.float64, torch.device("cpu"))
    for kept in (rope._turns, rotary_table):
        kept.cache_clear()
    tables = [rotary_table(tuple(range(start, start + 6)), *place) for start in (0, 3, 300_000)]
    assert computed == [6, 5, 7, 6, 6]
    table = tables[2]
    row = 2 * 35 + 4 * 7 + 6  # the third latent, row 4, column 6
    turned = torch.cat([angles(torch.tensor([at]), dim)[0] for at, dim in ((300_002, 8), (4, 6), (6, 6))])
    assert torch.allclose(table[row], torch.polar(torch.ones_like(turned), turned))
    assert rope._turns.cache_info().maxsize == 64 and rotary_table.cache_info().maxsize == 8


def test_window_over_a_clip_is_the_bidirectional_forward() -> None:
    """One window that holds the whole clip, at one timestep, without past: the plain way's attention of all with all.

    test_wan_reference.py holds the same forward to the numbers of the public model.
    """
    model = small_model()
    torch.manual_seed(2)
    x = torch.randn(1, 12, 6, *GEOMETRY.latent_size, dtype=torch.float64)
    image = torch.randn(1, 5, 4, dtype=torch.float64)
    kv = model.condition(image=image)
    t = torch.full((6,), 400.0, dtype=torch.float64)
    tokens = torch.randn(1, 6, 5, 6, dtype=torch.float64)
    audio = model.audio(tokens)
    whole, _ = model(x, t, range(6), kv, audio)
    plain = PlainRollout(model, x[:, 4:], image, tokens[0], lambda *_: x[:, :4])
    independent, _ = plain._forward(x[:, :4], t, first=0, finished=0)
    assert whole.std() > 0.5 and torch.allclose(whole, independent, rtol=0, atol=1e-12)
    shifted, _ = model(x, t, range(50, 56), kv, audio)
    full_mask = torch.ones(6 * 8, 6 * 8, dtype=torch.bool)
    masked, _ = model(x, t, range(6), kv, audio, mask=full_mask)
    causal, _ = model(x, t, range(6), kv, audio, mask=full_mask.tril())
    assert torch.allclose(whole, shifted, atol=1e-10) and torch.allclose(whole, masked, atol=1e-10)
    assert not torch.allclose(whole, causal, atol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_deterministic_and_bounded(name: str) -> None:
    rollout = small_rollout(POLICIES[name], seed=3)
    a, b = roll(rollout, 16), roll(rollout, 16)
    assert torch.equal(a, b)
    assert not torch.allclose(a, roll(replace(rollout, seed=4), 16))
    state = rollout.start()
    sizes = []
    for window in range(24):
        state.audio[window] = audio_tokens(window, len(rollout.geometry.latents_of_block(window)))
        with torch.no_grad():
            rollout.run_window(state)
        sizes.append(state.nbytes())
    assert len(set(sizes[12:])) == 1


def test_euler_with_one_cache_per_step_runs() -> None:
    """Live Avatar's update and cache rule on the same loop."""
    policy = RolloutPolicy(
        timesteps=(1000, 857.6923, 602.1506, 8.9286),
        shift=1.0,
        bootstrap=0,
        window_blocks=1,
        update="euler",
        kv_level="per_step",
        local_blocks=3,
        motion_frame=False,
    )
    rollout = small_rollout(policy)
    out = roll(rollout, 7)
    assert out.shape[2] == 21 and out.isfinite().all()
    assert len(rollout.start().caches) == 4


def test_motion_frame_reaches_the_window_and_is_noised() -> None:
    policies = (FLASH, replace(FLASH, motion_frame=False), replace(FLASH, motion_noise=False))
    noised, without, clean = (roll(small_rollout(policy), 6) for policy in policies)
    first = slice(0, 3 * 1)  # block 0 is finished before there is any motion frame
    for a, b in ((noised, without), (noised, clean), (clean, without)):
        assert torch.equal(a[:, :, first], b[:, :, first])
        assert not torch.allclose(a[:, :, 3:], b[:, :, 3:])


def test_state_round_trip_is_bit_identical() -> None:
    rollout = small_rollout(FLASH, dtype=torch.float32)
    whole = roll(rollout, 12)
    state = rollout.start()
    out = []
    with torch.no_grad():
        for window in range(9):
            state.audio[window] = audio_tokens(window)
            out += [d.latents for d in rollout.run_window(state)]
        saved = {k: t.clone() for k, t in state.tensors().items()}
        again = rollout.restore(saved, state.window)
        while again.window < FLASH.num_windows(12):
            if again.window < 12:
                again.audio[again.window] = audio_tokens(again.window)
            out += [d.latents for d in rollout.run_window(again, 12)]
    assert torch.equal(torch.cat(out, dim=2), whole)


def test_hundred_thousand_blocks_stay_below_the_limit() -> None:
    for limit in (27, 51, 1024):
        policy = replace(FLASH, rope_limit=limit)
        top = max(policy.window_start(n) + 12 for n in range(100_000))
        low = min(policy.context_start(b, n) for n in (1, 5, 99_999) for b in {0, max(1, n - 4), n - 1} if b < n)
        assert top <= limit and low >= 0
