"""Live Avatar's rules on the one loop: the reference sink, its place, its refresh, a cache per step, no limit."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from joyavatar_core.audio import AudioTokens, LogMel
from joyavatar_core.config import MODELS
from joyavatar_core.estimate import cache_bytes, estimate, pending_bytes, window_forwards
from joyavatar_core.geometry import Geometry
from joyavatar_core.model import Past, WithReference
from joyavatar_core.noise import integer
from joyavatar_core.policy import POLICIES, RolloutPolicy, changed
from joyavatar_core.rollout import Condition, Reference, Reseed, Rollout, RolloutState
from joyavatar_core.s2v import S2VDiT
from joyavatar_core.stream import AvatarStream, LatentStream, identity

from .helpers import SMALL, audio_tokens, fill, roll, small_rollout
from .test_s2v import CONFIG, given, model
from .test_stream import RATE, make_stream

LIVE = POLICIES["live-avatar"]


class CancelledError(Exception):
    """What a cancel raises between two forwards."""


def s2v_rollout(policy: RolloutPolicy = LIVE, dit: S2VDiT | None = None, side: int = 8) -> Rollout:
    """Of latents side x side: 16 tokens a frame, the least that motion latents can have."""
    dit, inputs = dit or model(torch.float32), given(torch.float32)
    with torch.no_grad():
        kv = dit.condition(inputs.text)
    reference = Reference(inputs.picture[..., :side, :side], inputs.motion[..., :side, :side])
    geometry, condition = Geometry(8 * side, 8 * side, fps=Fraction(25)), Condition(kv, reference=reference)
    return Rollout(dit, policy, geometry, condition, 5, torch.device("cpu"), torch.float32)


def hear(state: RolloutState, rollout: Rollout) -> None:
    """Sound for the block that enters the next window."""
    block, n = state.window, len(rollout.geometry.latents_of_block(state.window))
    if rollout.model.config.s2v:
        frames = torch.randn(n, 4, 150, generator=torch.Generator().manual_seed(block))
        state.audio[block] = AudioTokens(frames, torch.ones(n, 4, dtype=torch.bool))
    else:
        state.audio[block] = audio_tokens(block, n)


@torch.no_grad()
def advance(rollout: Rollout, state: RolloutState, windows: int) -> list[Tensor]:
    done: list[Tensor] = []
    for _ in range(windows):
        hear(state, rollout)
        done += [block.latents for block in rollout.run_window(state)]
    return done


def kept(state: RolloutState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The schedule


def test_four_euler_steps_after_a_warp_of_three_twice() -> None:
    """sigma -> 3 sigma / (1 + 2 sigma), once on the ends of the scale and once more on four values between them."""

    def warped(sigma: Fraction) -> Fraction:
        return 3 * sigma / (1 + 2 * sigma)

    least = warped(Fraction(1, 1000))
    sigmas = [warped(1 - Fraction(i, 3) * (1 - least)) for i in range(4)]
    assert LIVE.timesteps == pytest.approx([float(1000 * s) for s in sigmas], rel=1e-15)
    assert [round(t, 4) for t in LIVE.timesteps] == [1000, 857.6923, 602.1505, 8.9286]
    (first, *_, last) = LIVE.window_steps(7)
    assert first.timesteps == (1000,) and last.finishes and len(LIVE.window_steps(7)) == 4
    assert LIVE.update == "euler" and LIVE.shift == 1 and LIVE.kv_level == "per_step"


def test_the_reference_lies_at_30_and_then_ahead() -> None:
    for ahead in range(4, 31):
        places = [LIVE.reference_position(start, ahead) for start in range(0, 90, 3)]
        assert places == [max(30, start + ahead) for start in range(0, 90, 3)]
    assert LIVE.reference_ahead == (30, 30) and LIVE.reference_floor == 30 and LIVE.reference_refresh == 4


def test_ten_thousand_seconds_have_no_limit() -> None:
    geometry = Geometry(704, 384, fps=Fraction(25))
    found = estimate(MODELS["wan-s2v-14b"], LIVE, geometry, Fraction(10_000))
    assert (found.frames, found.blocks, found.forwards) == (250_000, 20_834, 4 * 20_834)
    last = found.blocks - 1
    assert LIVE.window_start(last) == 62_499 and LIVE.reference_position(62_499, 30) == 62_529
    assert found.memory_bytes == estimate(MODELS["wan-s2v-14b"], LIVE, geometry, Fraction(10)).memory_bytes


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"reference_ahead": (5, 4)}, r"reference_ahead \(5, 4\)"),
        ({"rope_limit": 100}, "rope_limit 100: a reference lies ahead"),
        ({"reference_refresh": 0}, "reference_refresh 0: must be at least 1"),
        ({"reference_floor": -1}, "reference_floor -1"),
        ({"reference_reach": -1}, "reference_reach -1"),
    ],
)
def test_what_a_reference_cannot_be(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        changed(LIVE, change)


# What a forward sees


def test_keys_of_every_forward_are_the_release_s() -> None:
    """64 tokens a latent frame: 192 of the block and 160 of the condition, up to 768 and 160, one ring a step."""
    seen: list[tuple[int, int]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if k.shape[1] > 16:  # of the self-attentions
            seen.append((q.shape[1], k.shape[1]))
        return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    rollout = s2v_rollout(dit=fill(S2VDiT(CONFIG, attention=spy)), side=16)
    state = rollout.start()
    for window, keys in enumerate((352, 544, 736, 928, 928, 928)):
        seen.clear()
        advance(rollout, state, 1)
        made = [(160, 160)] * 3 if window in (0, 4) else []  # three layers
        assert seen == made + [(192, keys)] * 12
        cost = window_forwards(CONFIG, LIVE, rollout.geometry, window)
        assert [(f.queries, f.keys) for f in cost] == seen[::3]


@pytest.mark.parametrize("name", POLICIES)
def test_costs_are_those_of_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, blocks = small_rollout(POLICIES[name], dtype=torch.float32), 9
    state, seen, forward = rollout.start(), [], type(rollout.model).forward

    def spy(self, x, timesteps, positions, condition, audio=None, past=None, mask=None, **kept):
        keys = past.context.context(0)[0].shape[1] if past else 0
        seen.append((8 * x.shape[2], 8 * x.shape[2] + keys))
        return forward(self, x, timesteps, positions, condition, audio, past, mask, **kept)

    monkeypatch.setattr(type(rollout.model), "forward", spy)
    for window in range(rollout.policy.num_windows(blocks)):
        seen.clear()
        hear(state, rollout)
        with torch.no_grad():
            rollout.run_window(state, blocks)
        cost = window_forwards(SMALL, rollout.policy, rollout.geometry, window, blocks)
        assert [(f.queries, f.keys) for f in cost] == seen
    held = [t for n, t in state.tensors().items() if n.startswith(("cache", "reference"))]
    assert cache_bytes(SMALL, rollout.policy, rollout.geometry, 4) == sum(t.numel() * 4 for t in held)


def test_keys_and_values_of_the_published_size() -> None:
    """384x704: 10.4 GB for each of four rings of four blocks, the present one among them, and 2.2 of the reference."""
    sizes = (MODELS["wan-s2v-14b"], LIVE, Geometry(384, 704, fps=Fraction(25)), 2)
    rings = 4 * 4 * 3 * 1056 * 5120 * 2 * 2 * 40
    assert cache_bytes(*sizes) + pending_bytes(*sizes) == rings + 2640 * 5120 * 2 * 2 * 40
    assert rings / 4 == pytest.approx(10.4e9, rel=0.01)


def places(rollout: Rollout, windows: int, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Index of the reference in every forward."""
    found, original = [], Rollout._beside

    def note(self, *args):
        past = original(self, *args)
        found.append(past.reference)
        return past

    monkeypatch.setattr(Rollout, "_beside", note)
    advance(rollout, rollout.start(), windows)
    monkeypatch.undo()
    return found


def test_a_drawn_place_comes_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = replace(LIVE, reference_ahead=(4, 30))
    first = places(small_rollout(drawn, seed=1), 8, monkeypatch)
    assert first == places(small_rollout(drawn, seed=1), 8, monkeypatch)
    assert first != places(small_rollout(drawn, seed=2), 8, monkeypatch)
    for i, place in enumerate(first):
        start = 3 * (i // 4)
        assert place == max(30, start + integer(1, i // 4, i % 4, (4, 30)))
    assert places(small_rollout(LIVE), 8, monkeypatch) == [30 + 3 * (i // 4) for i in range(32)]
    reseeded = replace(small_rollout(drawn, seed=1), reseed=Reseed(range(6, 8), 9))
    other = places(reseeded, 8, monkeypatch)
    assert other[:24] == first[:24] and other[24:] != first[24:]


def test_an_even_draw_within_its_bounds() -> None:
    counts = [0] * 31
    for block in range(2700):
        counts[integer(7, block, 1, (4, 30))] += 1
    assert sum(counts[:4]) == 0 and min(counts[4:]) > 60 and max(counts) < 145


# Refresh


@pytest.mark.parametrize("make", [small_rollout, s2v_rollout])
def test_after_four_blocks_a_generated_latent_takes_the_picture_s_place(make) -> None:
    with_it, without = make(LIVE), make(replace(LIVE, reference_refresh=None))
    a, b = with_it.start(), without.start()
    out, plain = advance(with_it, a, 4), advance(without, b, 4)
    assert all(map(torch.equal, out, plain)) and torch.equal(a.first, out[0][:, :, :1]) and b.first is None
    assert torch.equal(a.reference[0], b.reference[0])
    fifth, other = advance(with_it, a, 1), advance(without, b, 1)
    assert not torch.allclose(fifth[0], other[0], atol=1e-4) and a.first is None
    picture = with_it.condition.picture
    x = out[0][:, :, :1]
    if with_it.condition.image is not None:
        x = torch.cat([x, with_it.condition.image.at([0]).to(x)], dim=1)
    with torch.no_grad():
        made = with_it.model.prefill(x, with_it.condition.kv, 30, picture.motion)
    assert torch.equal(a.reference[0], torch.stack([k for k, _ in made]))
    assert torch.equal(a.reference[1], torch.stack([v for _, v in made]))


def test_the_picture_reaches_every_block() -> None:
    rollout = s2v_rollout()
    reference = rollout.condition.reference
    for other in (replace(reference, latent=-reference.latent), replace(reference, motion=-reference.motion)):
        changed_ = replace(rollout, condition=replace(rollout.condition, reference=other))
        pairs = zip(advance(rollout, rollout.start(), 3), advance(changed_, changed_.start(), 3), strict=True)
        assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairs)


# State


@pytest.mark.parametrize("make", [small_rollout, s2v_rollout])
@pytest.mark.parametrize("windows", [1, 4, 5])
def test_resumed_anywhere_it_goes_on_to_the_bit(make, windows: int) -> None:
    rollout = make(replace(LIVE, reference_ahead=(4, 30)))
    whole = advance(rollout, rollout.start(), 6)
    state = rollout.start()
    advance(rollout, state, windows)
    again = rollout.restore(kept(state), state.window)
    assert all(map(torch.equal, advance(rollout, again, 6 - windows), whole[windows:]))
    saved = kept(state)
    del saved["reference.values"]
    with pytest.raises(KeyError):
        rollout.restore(saved, state.window)


def test_memory_is_constant() -> None:
    rollout = s2v_rollout()
    state, sizes = rollout.start(), []
    for _ in range(9):
        advance(rollout, state, 1)
        sizes.append(state.nbytes())
        assert not state.pending
    assert len(set(sizes[5:])) == 1, "the first latent is let go after the refresh"
    assert sizes[3] - sizes[5] == state.caches[0].keys.element_size() * 16 * 8 * 8


@pytest.mark.parametrize("name", POLICIES)
def test_a_forward_that_raises_leaves_the_state_as_it_was(name: str) -> None:
    """Wherever in a window it raises, before and after the ring is full; the window then runs as if nothing was."""
    policy, calls = POLICIES[name], [0]

    def count() -> None:
        calls[0] -= 1
        if not calls[0]:
            raise CancelledError

    rollout = replace(small_rollout(policy, dtype=torch.float32), before_forward=count)
    state, stops = rollout.start(), 0
    for window in range(6):
        hear(state, rollout)
        before, forwards = kept(state), len(window_forwards(SMALL, policy, rollout.geometry, window))
        for stop in range(1, forwards + 1):
            calls[0] = stop
            with pytest.raises(CancelledError), torch.no_grad():
                rollout.run_window(state)
            stops += 1
            assert state.window == window and same(before, kept(state)), (window, stop)
        calls[0] = 0
        advance(rollout, state, 1)
    assert stops >= 6 and torch.equal(kept(state)["cache.0.keys"], run_through(rollout, 6)["cache.0.keys"])


def run_through(rollout: Rollout, windows: int) -> dict[str, Tensor]:
    state = rollout.start()
    advance(rollout, state, windows)
    return kept(state)


FRONT_END = LogMel(Geometry(64, 64), mels=4)


def test_the_identity_of_a_saved_stream() -> None:
    """Older policies keep theirs: a new option is no part of their repr. Of this one, every option counts."""
    assert "reference" not in repr(RolloutPolicy()) and "s2v" not in repr(SMALL)
    rollout, names = s2v_rollout(), set()
    others = [replace(rollout, policy=p) for p in (replace(LIVE, reference_ahead=(4, 30)),
              replace(LIVE, reference_refresh=None), replace(LIVE, reference_reach=40))]  # fmt: skip
    reference = rollout.condition.reference
    for other in (replace(reference, latent=-reference.latent), replace(reference, motion=-reference.motion)):
        others.append(replace(rollout, condition=replace(rollout.condition, reference=other)))
    for each in (rollout, *others):
        names.add(identity(each, FRONT_END))
    assert len(names) == 6 and identity(s2v_rollout(), FRONT_END) in names


def test_without_a_picture_there_is_no_reference() -> None:
    rollout = s2v_rollout()
    with pytest.raises(ValueError, match="the policy needs the picture"):
        replace(rollout, condition=replace(rollout.condition, reference=None))
    small = small_rollout(LIVE)
    assert torch.equal(small.condition.picture.latent[:, :, 0], small.condition.image.picture)


# Long streams


def window_at(start: int, shift: int, dtype: torch.dtype) -> Tensor:
    """Velocity of a block that starts at an index, three blocks of noise behind it."""
    dit, inputs = model(dtype), given(dtype)
    picture, motion, x = (t[..., :8, :8] for t in (inputs.picture, inputs.motion, inputs.x))
    with torch.no_grad():
        condition = dit.condition(inputs.text)
        keys, values = zip(*dit.prefill(picture, condition, 30, motion), strict=True)
        torch.manual_seed(3)
        past = torch.randn(2, 1, 9 * 16, 2, 48, dtype=torch.float64).to(dtype)

        class Ring:
            def context(self, layer: int) -> tuple[Tensor, Tensor]:
                return past[0], past[1]

        seen = WithReference(Ring(), (torch.stack(keys), torch.stack(values)))
        before = Past(seen, tuple(range(start - 9, start)), start + 30, shift)
        level = torch.full((3,), 602.15, dtype=dtype)
        return dit(x, level, range(start, start + 3), condition, None, before)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_a_million_latents_on_nothing_has_moved(dtype: torch.dtype, tolerance: float) -> None:
    """Angles are worked out in float64, so only differences of indices matter, however large the indices."""
    near, far = window_at(9, 0, dtype), window_at(1_000_009, 1_000_000, dtype)
    assert near.abs().max() > 1 and (near - far).abs().max() < tolerance * near.abs().max()


def test_motion_tokens_fall_behind_as_released_or_stay_within_reach() -> None:
    """Left where they are, a still past moves away from the block for ever; a reach stops it."""
    assert [LIVE.reference_shift(s) for s in (0, 300, 10**6)] == [0, 0, 0]
    near = replace(LIVE, reference_reach=60)
    assert [near.reference_shift(s) for s in (0, 60, 300, 10**6)] == [0, 0, 240, 999_940]
    left, follows = window_at(10**6, 0, torch.float64), window_at(10**6, 10**6 - 60, torch.float64)
    assert left.isfinite().all() and (left - follows).abs().max() > 1e-3
    assert torch.allclose(follows, window_at(60, 0, torch.float64), rtol=0, atol=1e-7)


def test_it_runs_under_every_policy() -> None:
    """The options are orthogonal: the reference beside a rolling window, and its model under other rules."""
    rolling = replace(POLICIES["joyavatar-flash"], rope_limit=None, reference_sink=True, reference_refresh=2)
    assert roll(small_rollout(rolling), 6).isfinite().all()
    dit = s2v_rollout()
    for name in ("joyavatar-flash", "self-forcing"):
        rollout = replace(dit, policy=POLICIES[name])
        out = advance(rollout, rollout.start(), 5)
        assert out and all(latents.isfinite().all() and latents.std() > 0.1 for latents in out)


@pytest.mark.parametrize("blocks", [2, 5])
def test_a_stream_saved_to_a_file_goes_on_to_the_bit(tmp_path: Path, blocks: int) -> None:
    """Before and after the reference was made again; sound goes in by pieces of half a second."""

    def fresh() -> AvatarStream:
        stream = make_stream()
        rollout = replace(stream.latents.rollout, policy=replace(LIVE, reference_ahead=(4, 30)))
        return AvatarStream(LatentStream(rollout, stream.latents.front_end), stream.frames.autoencoder)

    sound = torch.randn(6 * RATE, generator=torch.Generator().manual_seed(0)).mul(0.1).split(RATE // 2)
    whole, one, path = fresh(), fresh(), tmp_path / "state.safetensors"
    frames = [f for piece in sound for f in whole.feed(piece, RATE)]
    heard, done = 0, []
    while len(done) < blocks:
        done += one.feed(sound[heard], RATE)
        heard += 1
    one.state.save(path)
    two = fresh()
    two.load_state(path)
    done += [f for piece in sound[heard:] for f in two.feed(piece, RATE)]
    assert len(done) == len(frames) >= 7 and all(map(torch.equal, done, frames))
