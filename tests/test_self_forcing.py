"""Training rollouts against the engine's own, and where their gradient goes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from joyavatar_core.conditioning import ImageChannels, reference_tokens
from joyavatar_core.config import FaceConfig
from joyavatar_core.model import JoyAvatarDiT, Past
from joyavatar_core.noise import gaussian
from joyavatar_core.policy import POLICIES, RolloutPolicy
from joyavatar_core.rollout import Rollout
from joyavatar_core.schedule import warp
from joyavatar_core.training import self_forcing
from joyavatar_core.training.inputs import Inputs
from joyavatar_core.training.self_forcing import (
    Draw,
    Odds,
    Sample,
    block_gradients,
    branch_policy,
    carriers,
    draw,
    roll_out,
)

from .helpers import GEOMETRY, SMALL, audio_tokens, small_model, small_rollout

FLASH = RolloutPolicy()
SHORT = replace(FLASH, local_blocks=1)
"""A cache that is full after two blocks."""
LIVE_AVATAR = replace(
    FLASH, bootstrap=0, window_blocks=1, update="euler", kv_level="per_step", motion_frame=False, rope_limit=None
)
ALL = replace(SMALL, text_dim=5, text_len=6, face=FaceConfig(features=7, dim=8, depth=1, heads=2, queries=2, width=8))
MAIN = Draw("main", 6, 1, True, False, (False,) * 4, (True,) * 9, 7)
AUXILIARY = replace(MAIN, branch="auxiliary", blocks=4, exit=4, substeps=(True, False, True, True))
BRANCHES = pytest.mark.parametrize("drawn", [MAIN, AUXILIARY], ids=["main", "auxiliary"])


@pytest.fixture(scope="module")
def model() -> Iterator[JoyAvatarDiT]:
    yield small_model()


@pytest.fixture(autouse=True)
def forget_gradients(model: JoyAvatarDiT) -> None:
    model.zero_grad()


def inputs(batch: int = 1, blocks: int = 9) -> Inputs:
    """Pictures and sounds of clips; the first are the same in a batch of any size."""
    made = [torch.Generator().manual_seed(5 + clip) for clip in range(batch)]
    channels = torch.stack([torch.randn(8, 30, *GEOMETRY.latent_size, generator=g, dtype=torch.float64) for g in made])
    audio = torch.stack([torch.randn(3 * blocks, 5, 6, generator=g, dtype=torch.float64) for g in made])
    return Inputs(reference_tokens(channels[:, 4:, 0], SMALL.patch), ImageChannels(channels), audio)


def sample(model: JoyAvatarDiT, drawn: Draw, policy: RolloutPolicy = FLASH, given: Inputs | None = None, **options):
    return roll_out(model, policy, GEOMETRY, given or inputs(), drawn, dtype=torch.float64, **options)


def weights(like: Sample) -> Tensor:
    """The derivative of a linear loss."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(like.latents.shape, generator=generator, dtype=torch.float64)


def gradients(model: JoyAvatarDiT) -> dict[str, Tensor]:
    """What has been added up, which is forgotten."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients_of(model: JoyAvatarDiT, drawn: Draw, policy: RolloutPolicy = FLASH) -> dict[str, Tensor]:
    made = sample(model, drawn, policy)
    (weights(made) * made.latents).sum().backward()
    return gradients(model)


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to their size."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@contextmanager
def forwards(model: JoyAvatarDiT) -> Iterator[list[tuple[bool, list[float]]]]:
    """Every forward of the model: whether it has gradient, and the timesteps of its latents."""
    seen: list[tuple[bool, list[float]]] = []

    def note(_, arguments) -> None:
        seen.append((torch.is_grad_enabled(), [round(t, 3) for t in arguments[1].tolist()]))

    hook = model.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def checkpointed(*modules: nn.Module) -> Iterator[None]:
    """Each of the modules forgets its activations and makes them again in the backward."""
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


# What is drawn


def test_equal_seeds_draw_equal_rollouts_within_the_odds():
    drawn = [draw(random.Random(seed), FLASH, Odds()) for seed in range(2000)]
    assert drawn == [draw(random.Random(seed), FLASH, Odds()) for seed in range(2000)]
    main = [d for d in drawn if d.branch == "main"]
    rest = [d for d in drawn if d.branch == "auxiliary"]
    assert 0.45 < len(main) / len(drawn) < 0.55
    assert {d.blocks for d in drawn} == {7, 8, 9} and len({d.seed for d in drawn}) == len(drawn)
    assert {d.exit for d in main} == set(range(4)) and {d.exit for d in rest} == set(range(8))
    assert all(len(d.noisy_motion) == d.blocks + 3 for d in main) and all(len(d.substeps) == 4 for d in rest)
    assert all(len(d.noisy_motion) == d.blocks for d in rest)
    noisy = [coin for d in drawn for coin in d.noisy_motion]
    assert 0.68 < sum(noisy) / len(noisy) < 0.72
    assert 0.45 < sum(d.bootstrap for d in main) / len(main) < 0.55


def test_policies_without_bootstrap_or_window_draw_what_they_can_run():
    rolling = [draw(random.Random(seed), POLICIES["rolling-forcing"], Odds()) for seed in range(200)]
    assert {d.branch for d in rolling} == {"main", "auxiliary"} and not any(d.bootstrap for d in rolling)
    single = [draw(random.Random(seed), POLICIES["self-forcing"], Odds()) for seed in range(200)]
    assert {d.branch for d in single} == {"auxiliary"} and {d.exit for d in single} == {0, 2, 4, 6}
    assert not any(any(d.substeps) for d in single)


@pytest.mark.parametrize("wrong", [{"main": 1.5}, {"noisy_motion": -0.1}, {"blocks": (0, 3)}, {"blocks": (9, 7)}])
def test_impossible_odds_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
        Odds(**wrong)


@given(
    policy=st.sampled_from([*POLICIES.values(), SHORT, LIVE_AVATAR, replace(FLASH, bootstrap=2)]),
    blocks=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_the_forwards_with_gradient_hold_every_block_once(policy: RolloutPolicy, blocks: int, seed: int):
    drawn = draw(random.Random(seed), policy, Odds(blocks=(blocks, blocks)))
    branch = branch_policy(policy, drawn)
    chosen = carriers(branch, drawn)
    assert [b for step in chosen for b in step.blocks] == list(range(blocks))
    every = [s for w in range(branch.num_windows(blocks)) for s in branch.window_steps(w, blocks)]
    assert set(chosen) <= set(every)
    most = -(-blocks // policy.window_blocks) + 1 if drawn.branch == "main" else blocks
    assert len(chosen) <= most


def test_the_auxiliary_branch_always_takes_the_main_steps():
    for seed in range(100):
        drawn = replace(draw(random.Random(seed), FLASH, Odds(main=0)), exit=7)
        steps = branch_policy(FLASH, drawn).window_steps(2)
        here = [step.timesteps[0] for step in steps]
        assert {1000, 750, 500, 250, 125} <= set(here) and here == sorted(here, reverse=True)
        assert [t in here for t in (875, 625, 375)] == list(drawn.substeps[:3])
        assert [step.finishes for step in steps] == [False] * (len(steps) - 1) + [True]


# The rollout


@pytest.mark.parametrize("kv_level", ["last_step", "clean"])
def test_the_main_branch_is_the_rollout_of_inference(kv_level: str):
    """Bit for bit: every noisy block in every window, and the clean ones."""
    blocks, policy = 9, replace(FLASH, kv_level=kv_level)
    engine = small_rollout(policy, seed=7)
    audio = torch.stack([t for b in range(blocks) for t in audio_tokens(b).tokens])[None]
    given = Inputs(reference_tokens(engine.condition.image.picture, SMALL.patch), engine.condition.image, audio)
    drawn = replace(MAIN, blocks=blocks, noisy_motion=(True,) * 12)
    student = self_forcing._begin(engine.model, policy, GEOMETRY, given, drawn, "policy", torch.float64)
    a, b = engine.start(), student.start()
    a.audio = {block: audio_tokens(block) for block in range(blocks)}
    with torch.no_grad():
        for _ in range(policy.num_windows(blocks)):
            clean = [rollout.run_window(state, blocks) for rollout, state in ((engine, a), (student, b))]
            assert all(torch.equal(x.latents, y.latents) for x, y in zip(*clean, strict=True))
            assert a.noisy.keys() == b.noisy.keys()
            assert all(torch.equal(a.noisy[block], b.noisy[block]) for block in a.noisy)
    assert student.sample().latents.shape[2] == 3 * blocks


@BRANCHES
def test_equal_draws_give_equal_samples_with_and_without_gradient(model: JoyAvatarDiT, drawn: Draw):
    made, again, still = sample(model, drawn), sample(model, drawn), sample(model, drawn, gradient=False)
    assert torch.equal(made.latents, again.latents) and torch.equal(made.latents, still.latents)
    assert made.latents.requires_grad and not still.latents.requires_grad
    assert made.latents.shape == (1, 4, 3 * drawn.blocks, 2, 4) and made.latents.std() > 0.3
    assert not torch.allclose(made.latents, sample(model, replace(drawn, seed=8)).latents, atol=1e-3)
    with torch.no_grad():
        assert not sample(model, drawn).latents.requires_grad


def test_levels_say_where_every_latent_was_made(model: JoyAvatarDiT):
    def levels(drawn: Draw) -> list[float]:
        return sample(model, drawn, gradient=False).levels[::3].tolist()

    def warped(*indices: float) -> list[float]:
        return pytest.approx([warp(i, 5.0) for i in indices])

    assert levels(MAIN) == warped(750, 1000, 250, 500, 750, 1000)
    assert levels(replace(MAIN, substep=True)) == warped(625, 875, 250, 500, 750, 1000)
    assert levels(replace(MAIN, exit=3, substep=True)) == warped(125, 375, 625, 875, 250, 500)
    assert levels(AUXILIARY) == warped(500, 500, 500, 500)
    assert levels(replace(AUXILIARY, exit=5)) == warped(375, 375, 375, 375)


def test_gradient_is_cut_to_one_forward_of_a_block(model: JoyAvatarDiT):
    with forwards(model) as seen:
        sample(model, MAIN)
    assert [has for has, _ in seen] == [False, False, True, *[False] * 6, True]  # windows 0 .. 5, two in each of 4
    with forwards(model) as seen:
        sample(model, AUXILIARY, history="exit")
    assert [has for has, _ in seen] == [False, False, False, True] * 4  # 1000, 875, 750 and 500 of each block


def test_history_enters_the_cache_at_the_level_asked_for(model: JoyAvatarDiT):
    """The forward after the exit of each block but the last: timesteps of [motion frame |] block."""

    def commits(history: str) -> list[list[float]]:
        with forwards(model) as seen:
            sample(model, AUXILIARY, history=history)
        exits = [i for i, (has, _) in enumerate(seen) if has]
        return [seen[i + 1][1] for i in exits[:-1]]

    first, later = round(warp(125, 5.0), 3), 625.0
    assert commits("policy") == [[first] * 3, [later] * 4, [later] * 4]
    assert commits("clean") == [[0.0] * 3] * 3
    assert commits("exit") == [[1000.0] * 4] * 3  # the next block, no forward in between
    made = [sample(model, AUXILIARY, gradient=False, history=h).latents for h in ("policy", "clean", "exit")]
    assert all(torch.equal(made[0][:, :, :3], other[:, :, :3]) for other in made)
    assert all((made[i] - made[j])[:, :, 3:].abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_exit_at_the_level_of_the_cache_needs_no_other_forward(model: JoyAvatarDiT):
    """Then keys and values are what inference keeps: those of the last forward."""
    drawn = replace(AUXILIARY, exit=6, substeps=(False,) * 4)
    with forwards(model) as seen:
        sample(model, drawn)
    assert len(seen) == 4 * 4 + 1  # block 0 is kept from its sub-step 125 at inference


def test_a_motion_frame_is_clean_now_and_then_and_the_model_knows(model: JoyAvatarDiT):
    noisy = tuple(window != 5 for window in range(9))
    with forwards(model) as seen:
        clean = sample(model, replace(MAIN, noisy_motion=noisy))
    assert [level[0] for _, level in seen if len(level) == 13] == [625.0, 0.0]  # windows 4 and 5
    assert not torch.allclose(clean.latents, sample(model, MAIN).latents, atol=1e-4)


def test_a_batch_is_its_clips_one_by_one(model: JoyAvatarDiT, monkeypatch: pytest.MonkeyPatch):
    """With the same noise for every clip; sounds and pictures differ."""
    one = gaussian

    def same(seed: int, block: int, forward: int, shape: tuple[int, ...], purpose: str) -> Tensor:
        return one(seed, block, forward, (1, *shape[1:]), purpose).expand(shape)

    monkeypatch.setattr("joyavatar_core.noise.gaussian", same)
    both = inputs(2)
    for drawn in (MAIN, AUXILIARY):
        together = sample(model, drawn, given=both).latents
        assert (together[0] - together[1]).abs().max() > 0.1
        for clip in range(2):
            row = slice(clip, clip + 1)
            alone = Inputs(both.picture[row], ImageChannels(both.channels.channels[row]), both.audio[row])
            assert torch.allclose(together[row], sample(model, drawn, given=alone).latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, policy", [*POLICIES.items(), ("live-avatar", LIVE_AVATAR)])
@pytest.mark.parametrize("history", ["policy", "exit"])
def test_every_policy_trains(model: JoyAvatarDiT, name: str, policy: RolloutPolicy, history: str):
    policy = replace(policy, block_latents=GEOMETRY.block_latents, picture_alone=False)  # clips are whole blocks
    main = policy.window_blocks > 1
    drawn = draw(random.Random(1), policy, Odds(main=float(main), blocks=(5, 5)))
    made = sample(model, drawn, policy, history=history)
    made.latents.square().mean().backward()
    assert made.latents.isfinite().all() and len(gradients(model)) == len(list(model.parameters()))


def test_one_cache_for_every_step_is_kept_as_at_inference(model: JoyAvatarDiT):
    """Live Avatar's timestep forcing: an exit at the last step is the engine's own rollout."""
    given = inputs()
    drawn = replace(AUXILIARY, exit=6, substeps=(False,) * 4)
    engine = Rollout(model, LIVE_AVATAR, GEOMETRY, given.condition(model), 7, torch.device("cpu"), torch.float64)
    state = engine.start()
    silent = replace(given, audio=None)
    with torch.no_grad():
        truth = torch.cat([block.latents for block in engine.run(state, 4)], dim=2)
    assert torch.equal(sample(model, drawn, LIVE_AVATAR, silent).latents, truth)


# Where the gradient goes


@BRANCHES
def test_gradient_reaches_every_parameter(drawn: Draw):
    model, clips = small_model(config=ALL), inputs()
    given = replace(clips, text=torch.randn(1, 4, 5).double(), face=torch.randn(1, 7).double())
    sample(model, drawn, given=given).latents.square().mean().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("history", ["policy", "clean", "exit"])
@BRANCHES
def test_no_gradient_comes_from_the_past(model: JoyAvatarDiT, drawn: Draw, history: str):
    """Through cache, motion frame or noisy latents the sound of earlier blocks reaches later ones: in values alone."""
    given = inputs()
    leaf = given.audio.clone().requires_grad_()
    made = sample(model, drawn, given=replace(given, audio=leaf), history=history)
    policy = branch_policy(FLASH, drawn, history)
    for step in carriers(policy, drawn):
        first, end = 3 * step.blocks[0], 3 * (step.blocks[-1] + 1)
        part = made.latents[:, :, first:end].sum()
        (grad,) = torch.autograd.grad(part, leaf, retain_graph=True)
        heard = grad.abs().amax((0, 2, 3)).nonzero().flatten().tolist()
        motion = int(first > 0)
        assert heard == list(range(first - motion, end))
    other = replace(given, audio=given.audio.clone().index_fill_(1, torch.tensor([0]), 0.0))
    assert (sample(model, drawn, given=other, history=history).latents - made.latents)[:, :, -3:].abs().max() > 1e-6


@BRANCHES
def test_gradient_is_that_of_the_forwards_alone(model: JoyAvatarDiT, drawn: Draw):
    """Each forward with gradient done again from what it was given as plain numbers."""
    expected = gradients_of(model, drawn)
    made, given, seen = sample(model, drawn), inputs(), []

    def note(_, arguments) -> None:
        if torch.is_grad_enabled():
            x, timesteps, positions, _, _, past = arguments
            layers = [past.context.context(i) for i in range(SMALL.layers)] if past else None
            seen.append((x.detach().clone(), timesteps, positions, past and past.positions, layers))

    class Plain:
        def __init__(self, layers) -> None:
            self.context = lambda i: layers[i]

    hook = model.register_forward_pre_hook(note)
    sample(model, drawn)
    hook.remove()
    total, weight = 0.0, weights(made)
    for step, (x, timesteps, positions, before, layers) in zip(
        carriers(branch_policy(FLASH, drawn), drawn), seen, strict=True
    ):
        lead = len(timesteps) - 3 * len(step.blocks)
        first, end = 3 * step.blocks[0], 3 * (step.blocks[-1] + 1)
        past = None if layers is None else Past(Plain(layers), before)
        kv = model.condition(image=given.picture)
        audio = model.audio(given.audio[:, first - lead : end])
        v, _ = model(x, timesteps, positions, kv, audio, past)
        x0 = x[:, :4] - timesteps.reshape(1, 1, -1, 1, 1) / 1000 * v
        total = total + (weight[:, :, first:end] * x0[:, :, lead:]).sum()
    total.backward()
    assert furthest(expected, gradients(model)) < 1e-10


@pytest.mark.parametrize("policy", [FLASH, SHORT], ids=["flash", "short cache"])
@BRANCHES
def test_checkpointing_changes_no_gradient(model: JoyAvatarDiT, drawn: Draw, policy: RolloutPolicy):
    drawn = replace(drawn, blocks=9, exit=1, noisy_motion=(True,) * 12)
    plain = gradients_of(model, drawn, policy)
    for modules in (model.blocks, [model]):
        with checkpointed(*modules):
            assert furthest(plain, gradients_of(model, drawn, policy)) < 1e-12


def test_a_ring_would_change_gradients(model: JoyAvatarDiT, monkeypatch: pytest.MonkeyPatch):
    """Negative control of the test before: written over before the backward reads it."""
    monkeypatch.setattr(self_forcing.SelfForcing, "_cache", Rollout._cache)
    drawn = replace(AUXILIARY, blocks=6, exit=1)
    plain = gradients_of(model, drawn, SHORT)
    with checkpointed(*model.blocks):
        assert furthest(plain, gradients_of(model, drawn, SHORT)) > 1e-3


@pytest.mark.parametrize("policy", [FLASH, SHORT], ids=["flash", "short cache"])
@BRANCHES
def test_gradients_block_by_block_add_up(model: JoyAvatarDiT, drawn: Draw, policy: RolloutPolicy):
    """Live Avatar's algorithm 2, for a loss that is linear in the clip."""
    plain, whole = gradients_of(model, drawn, policy), sample(model, drawn, policy, gradient=False)
    weight, order = weights(whole), []
    for made in block_gradients(model, policy, GEOMETRY, inputs(), drawn, dtype=torch.float64):
        assert torch.equal(made.latents, whole.latents) and torch.equal(made.levels, whole.levels)
        (live,) = torch.autograd.grad((weight * made.latents).sum(), made.latents, retain_graph=True)
        assert torch.equal(live, weight)
        order.append(made)
        (weight * made.latents).sum().backward()
    assert len(order) == len(carriers(branch_policy(policy, drawn), drawn))
    assert furthest(plain, gradients(model)) < 1e-12


def test_one_block_at_a_time_has_gradient_the_last_first(model: JoyAvatarDiT):
    with forwards(model) as seen:
        made = block_gradients(model, FLASH, GEOMETRY, inputs(), AUXILIARY, dtype=torch.float64, history="exit")
        last = next(made)
        assert sum(has for has, _ in seen) == 1 and torch.is_grad_enabled()
        assert last.latents.requires_grad
        assert len(list(made)) == 3 and sum(has for has, _ in seen) == 4
    leaf = replace(inputs(), audio=inputs().audio.requires_grad_())
    blocks = []
    for clip in block_gradients(model, FLASH, GEOMETRY, leaf, AUXILIARY, dtype=torch.float64):
        (grad,) = torch.autograd.grad(clip.latents.sum(), leaf.audio)
        blocks.append(int(grad.abs().amax((0, 2, 3)).nonzero().max()) // 3)
    assert blocks == [3, 2, 1, 0]


def test_inputs_know_their_batch():
    assert inputs(3).batch == Inputs(channels=inputs(3).channels).batch == Inputs(face=torch.zeros(3, 512)).batch == 3
    with pytest.raises(ValueError, match="at least one of picture"):
        _ = Inputs().batch


# Errors


@pytest.mark.parametrize(
    "drawn, policy, given, message",
    [
        (MAIN, POLICIES["self-forcing"], inputs(), "main branch needs a rolling window"),
        (replace(MAIN, exit=4), FLASH, inputs(), "exit 4 of the main branch: must be in 0 .. 3"),
        (replace(AUXILIARY, exit=8), FLASH, inputs(), "exit 8 of the auxiliary branch: must be in 0 .. 7"),
        (replace(MAIN, noisy_motion=(True,)), FLASH, inputs(), "6 blocks with 1 noisy_motion"),
        (AUXILIARY, LIVE_AVATAR, inputs(), "no cache for sub-steps"),
        (MAIN, FLASH, inputs(blocks=5), "audio of 15 latents: 18 are needed"),
        (MAIN, FLASH, Inputs(), "needs image tokens"),
        (MAIN, POLICIES["avatarforcing"], inputs(), "picture_alone: clips are trained in whole blocks"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: JoyAvatarDiT, drawn: Draw, policy: RolloutPolicy, given: Inputs, message: str
):
    with pytest.raises(ValueError, match=message):
        sample(model, drawn, policy, given)
