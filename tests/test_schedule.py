"""The schedule as data: the whole table of the engine note 4.1, tails, chains, the one-block branch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joyavatar_core.policy import POLICIES, RolloutPolicy, policy
from joyavatar_core.schedule import blockwise_schedule, midpoints, rolling_schedule, rolling_window, warp

MAIN = (1000, 750, 500, 250)

# forward: {block (1-based): timestep index}; then which block is clean
TABLE = [
    ({1: 1000}, None),
    ({1: 875}, None),
    ({1: 750, 2: 1000}, None),
    ({1: 625, 2: 875}, None),
    ({1: 500, 2: 750, 3: 1000}, None),
    ({1: 375, 2: 625, 3: 875}, None),
    ({1: 250, 2: 500, 3: 750, 4: 1000}, None),
    ({1: 125, 2: 375, 3: 625, 4: 875}, 1),
    ({2: 250, 3: 500, 4: 750, 5: 1000}, 2),
    ({3: 250, 4: 500, 5: 750, 6: 1000}, 3),
    ({4: 250, 5: 500, 6: 750, 7: 1000}, 4),
    ({5: 250, 6: 500, 7: 750, 8: 1000}, 5),
]


def test_the_paper_table() -> None:
    steps = list(islice(rolling_schedule(MAIN, 4), len(TABLE)))
    for step, (levels, clean) in zip(steps, TABLE, strict=True):
        assert {b + 1: t for b, t in zip(step.blocks, step.timesteps, strict=True)} == levels
        assert (step.blocks[0] + 1 if step.finishes else None) == clean


def test_steps_per_block_8_7_6_5_4() -> None:
    counts = Counter(b for step in rolling_schedule(MAIN, 4, 9) for b in step.blocks)
    assert [counts[b] for b in range(9)] == [8, 7, 6, 5, 4, 4, 4, 4, 4]
    assert len(list(rolling_schedule(MAIN, 4, 9))) == 9 + 3 + 4


def test_the_end_of_a_clip_ramps_down() -> None:
    tail = list(rolling_schedule(MAIN, 4, 8))[-3:]
    assert [s.timesteps for s in tail] == [(250, 500, 750), (250, 500), (250,)]
    assert [s.blocks for s in tail] == [(5, 6, 7), (6, 7), (7,)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 6), st.integers(1, 6))
def test_chain_every_block_starts_noisy_ends_clean_in_order(blocks: int, bootstrap: int, length: int) -> None:
    """A block's next level is the level of its next visit, passes count up, blocks finish in order."""
    main = tuple(1000 - 1000 * i / length for i in range(length))
    level: dict[int, float] = {}
    visits: Counter[int] = Counter()
    finished = []
    for step in rolling_schedule(main, bootstrap, blocks):
        assert list(step.timesteps) == sorted(step.timesteps)
        for b, here, after, seen in zip(step.blocks, step.timesteps, step.next_timesteps, step.passes, strict=True):
            assert level.get(b, 1000) == here > after and visits[b] == seen
            level[b] = after
            visits[b] += 1
        finished += [step.blocks[0]] if step.finishes else []
    assert finished == list(range(blocks)) and set(level.values()) == {0}


def test_an_endless_schedule_equals_the_beginning_of_a_finite_one() -> None:
    endless = list(islice(rolling_schedule(MAIN, 4), 24))
    assert endless == list(rolling_schedule(MAIN, 4, 30))[:24]
    assert rolling_window(MAIN, 4, 1_000_000)[0].blocks == (999_997, 999_998, 999_999, 1_000_000)


def test_blockwise_branch_interleaves_sub_steps() -> None:
    steps = list(blockwise_schedule(MAIN, 1, 2))
    assert [s.timesteps[0] for s in steps] == [1000, 875, 750, 625, 500, 375, 250, 125, 1000, 750, 500, 250]
    assert [s.next_timesteps[0] for s in steps][-1] == 0


def test_midpoints_and_warp() -> None:
    assert midpoints(MAIN) == (875, 625, 375, 125)
    warped = [round(warp(t, 5.0), 3) for t in (1000, 875, 750, 625, 500, 375, 250, 125)]
    assert warped == [1000, 972.222, 937.5, 892.857, 833.333, 750.0, 625.0, 416.667]


def test_urcr_index_table_for_27() -> None:
    """Engine note 5.2: window start, sink and local starts after n finished blocks."""
    p = RolloutPolicy()
    held = {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4], 6: [0, 2, 3, 4, 5]}
    rows = {n: [p.context_start(b, n) for b in blocks] + [p.window_start(n)] for n, blocks in held.items()}
    assert rows == {
        1: [0, 3],
        2: [0, 3, 6],
        3: [0, 3, 6, 9],
        4: [0, 3, 6, 9, 12],
        5: [0, 3, 6, 9, 12, 15],
        6: [0, 3, 6, 9, 12, 15],
    }


def test_urcr_sawtooth_for_51() -> None:
    p = RolloutPolicy(rope_limit=51)
    starts = [p.window_start(n) for n in range(5, 23)]
    assert starts == [15, 18, 21, 24, 27, 30, 33, 36, 39] * 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"timesteps": (250, 500)}, "descending"),
        ({"window_blocks": 3}, "window_blocks 3"),
        ({"rope_limit": 26}, "at least 27"),
        ({"kv_level": "per_step"}, "window_blocks 1"),
        ({"local_blocks": -1}, ">= 0"),
        ({"update": "heun"}, "heun"),
    ],
)
def test_a_policy_that_cannot_run_says_why(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RolloutPolicy(**change)


def test_presets() -> None:
    assert POLICIES["joyavatar-flash"].span_latents == 27
    assert POLICIES["rolling-forcing"].span_latents == 21
    assert POLICIES["self-forcing"].span_latents == 21
    with pytest.raises(ValueError, match="known: joyavatar-flash"):
        policy("dreaming")


def test_schedule_needs_no_torch() -> None:
    code = "import sys, joyavatar_core.schedule, joyavatar_core.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=".").returncode == 0
