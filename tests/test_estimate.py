"""Estimates against the real thing, and frames pasted back into their picture."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from joyavatar_core.avatar import random_embedded
from joyavatar_core.config import MODELS
from joyavatar_core.estimate import cache_bytes, cost_lines, estimate, window_costs, window_forwards
from joyavatar_core.geometry import Geometry
from joyavatar_core.media.paste import Paste, Region
from joyavatar_core.policy import POLICIES, changed, policy, with_steps

GEOMETRY = Geometry(64, 32, spatial=16)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seconds", [Fraction(1, 100), Fraction(1), Fraction(9, 2), Fraction(40)])
def test_forwards_are_those_of_the_schedule(name: str, seconds: Fraction) -> None:
    chosen = policy(name)
    found = estimate(MODELS["tiny"], chosen, GEOMETRY, seconds)
    assert found.frames == GEOMETRY.frames_of_duration(seconds)
    assert found.blocks == GEOMETRY.blocks_of_frames(found.frames)
    windows = range(chosen.num_windows(found.blocks))
    assert found.forwards == sum(len(chosen.window_steps(w, found.blocks)) for w in windows)


def test_cache_bytes_are_those_of_the_cache() -> None:
    avatar, chosen = random_embedded(dtype=torch.float32), policy("joyavatar-flash")
    stream = avatar.stream(torch.zeros(1, 3, 32, 64), chosen, 0)
    cache = stream.state.rollout.caches[0]
    held = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values))
    assert cache_bytes(MODELS["tiny"], chosen, GEOMETRY, 4) == held
    per_step = replace(policy("self-forcing"), kv_level="per_step")
    assert cache_bytes(MODELS["tiny"], per_step, GEOMETRY, 4) == 4 * 6 * 3 * 2 * 256 * 2 * 5 * 4


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("blocks", [1, 2, 5, 12, 1000])
def test_costs_that_are_told_are_those_of_every_window(name: str, blocks: int) -> None:
    """test_live_avatar.py:test_costs_are_those_of_the_run holds those of a window to the run."""
    chosen, config = policy(name), MODELS["tiny"]
    geometry = replace(GEOMETRY, **chosen.block_sizes)
    told = {w: cost for span, cost in window_costs(config, chosen, geometry, blocks) for w in span}
    windows = range(chosen.num_windows(blocks))
    assert told == {w: window_forwards(config, chosen, geometry, w, blocks) for w in windows}
    lines = list(cost_lines(config, chosen, geometry, blocks, 4))
    assert len(lines) < 24 and lines[-1].startswith(f"  K/V: {cache_bytes(config, chosen, geometry, 4) / 2**20:,.1f}")


def test_an_hour_needs_no_more_memory_than_a_second() -> None:
    short, long = (estimate(MODELS["flash-1.3b"], policy("joyavatar-flash"), Geometry(512, 512), Fraction(s))
                   for s in (1, 3600))  # fmt: skip
    assert short.memory_bytes == long.memory_bytes and long.video_bytes > 1000 * short.video_bytes / 2


def test_steps_and_wider_contexts_move_what_depends_on_them() -> None:
    wide = changed(policy("joyavatar-flash"), {"local_blocks": 8})
    assert wide.rope_limit == wide.span_latents == 39
    assert with_steps(policy("joyavatar-flash"), 2).timesteps == (1000, 500)
    assert with_steps(policy("joyavatar-flash"), 8).window_blocks == 8
    assert with_steps(policy("self-forcing"), 8).window_blocks == 1
    with pytest.raises(ValueError, match="at least 1"):
        with_steps(policy("self-forcing"), 0)


def test_pasted_frames_have_a_soft_edge_and_leave_the_rest() -> None:
    picture = np.zeros((40, 61, 3), np.uint8)
    paste = Paste(picture, Region(10, 8, 20, 16), feather=0.25)
    assert paste.size == (60, 40)
    out = paste(np.full((2, 32, 40, 3), 200, np.uint8))
    assert out.shape == (2, 40, 60, 3)
    assert (out[:, 13:19, 15:25] == 200).all(), "the middle is the frame"
    outside = out.copy()
    outside[:, 8:24, 10:30] = 0
    assert not outside.any(), "beyond the region the picture stays"
    edge = out[0, 16, 10:15, 0].astype(int)
    assert (np.diff(edge) > 0).all() and 0 < edge[0] < 30


def test_pasting_at_the_picture_s_own_edge_stays_hard() -> None:
    out = Paste(np.zeros((20, 20, 3), np.uint8), Region(0, 0, 20, 20), 0.5)(np.full((1, 8, 8, 3), 9, np.uint8))
    assert (out == 9).all()
    with pytest.raises(ValueError, match="does not lie inside the picture of 20x20"):
        Paste(np.zeros((20, 20, 3), np.uint8), Region(5, 0, 16, 8), 0.5)
