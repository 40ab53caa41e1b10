"""ODE trajectories of a teacher, and the regression of a student on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from joyavatar_core import flow
from joyavatar_core.audio import AudioTokens
from joyavatar_core.avatar import load_model
from joyavatar_core.cache import EVERY
from joyavatar_core.checkpoint import read
from joyavatar_core.config import AudioConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.manner import HEARD
from joyavatar_core.model import AudioKV, ConditionKV
from joyavatar_core.noise import gaussian
from joyavatar_core.policy import POLICIES, RolloutPolicy, policy
from joyavatar_core.rollout import Condition
from joyavatar_core.schedule import levels, warp
from joyavatar_core.training import batches, flow_matching, ode_regression, trainer, trajectories
from joyavatar_core.training.encoded import EncodedClips
from joyavatar_core.training.sequences import Layout, Mixture
from joyavatar_core.training.trajectories import PairStore, Trace, follow, refine

from .helpers import GEOMETRY, audio_tokens, roll, small_rollout
from .small_training import (
    PRESET,
    add_small_preset,
    drawn_clips,
    random_clips,
    small_autoencoder,
    small_training,
)

FLASH = policy("joyavatar-flash")
BLOCKS = 6


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    add_small_preset(monkeypatch)


# The schedule of the teacher


def test_the_levels_are_those_of_bootstrapping():
    assert levels(FLASH.timesteps) == (1000, 875, 750, 625, 500, 375, 250, 125)


@pytest.mark.parametrize("name", sorted(n for n, p in POLICIES.items() if p.kv_level != "per_step"))
@pytest.mark.parametrize("each", [1, 3])
def test_small_steps_lead_every_block_down_all_levels(name: str, each: int):
    coarse = policy(name)
    fine, every = refine(coarse, each * len(levels(coarse.timesteps))), each
    paths: dict[int, list[float]] = {}
    for window in range(coarse.num_windows(BLOCKS)):
        steps = fine.window_steps(window, BLOCKS)
        assert steps[0].timesteps == coarse.window_steps(window, BLOCKS)[0].timesteps
        for step in steps:
            for block, here, there, passed in zip(
                step.blocks, step.timesteps, step.next_timesteps, step.passes, strict=True
            ):
                path = paths.setdefault(block, [1000.0])
                assert here == path[-1] and there < here and passed == len(path) - 1
                path.append(there)
    assert list(paths) == list(range(BLOCKS))
    for path in paths.values():
        assert path[::every] == [*levels(coarse.timesteps), 0]
        assert len(path) == each * len(levels(coarse.timesteps)) + 1


def test_steps_that_miss_a_level_are_refused():
    for steps in (4, 12, 0):
        with pytest.raises(ValueError, match=f"ode_steps {steps}: must be a multiple of 8"):
            refine(FLASH, steps)
    live = RolloutPolicy(window_blocks=1, bootstrap=0, kv_level="per_step", rope_limit=None)
    with pytest.raises(ValueError, match="per_step"):
        refine(live, 24)


# The flow


class Field(nn.Module):
    """A model whose velocity is a formula of x [B, C, F, h, w] and sigma [F]; its keys are the timesteps."""

    def __init__(self, formula: Any) -> None:
        super().__init__()
        self.formula = formula
        self.config = SimpleNamespace(layers=1, heads=1, head_dim=2, out_channels=4, audio=None)

    def forward(
        self, x: Tensor, timesteps: Tensor, positions: Any, *_: Any, kept: slice = EVERY
    ) -> tuple[Tensor, list]:
        v = self.formula(x[:, :4], (timesteps / 1000).to(x)[None, None, :, None, None])
        timesteps = timesteps[kept]
        key = timesteps.to(x).repeat_interleave(GEOMETRY.tokens_per_latent)[None, :, None, None].expand(1, -1, 1, 2)
        return v, [(key, key)]


def traced(formula: Any, ode_steps: int, coarse: RolloutPolicy = FLASH) -> tuple[Trace, trajectories.Trajectory, Any]:
    rollout = Trace(
        model=Field(formula),  # type: ignore[arg-type]
        policy=refine(coarse, ode_steps),
        coarse=coarse,
        geometry=GEOMETRY,
        condition=Condition(ConditionKV()),
        seed=4,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    state = rollout.start()
    return rollout, follow(rollout, state, BLOCKS), state


class Hearing(Field):
    """A model whose velocity is the mean of what it hears."""

    def __init__(self) -> None:
        super().__init__(lambda x, sigma: torch.zeros_like(x))
        self.config.audio = AudioConfig()

    def audio(self, tokens: Tensor, valid: Tensor | None, manner: Tensor | None) -> AudioKV:
        assert manner is None
        return AudioKV(((tokens, tokens),), valid)

    def forward(self, x: Tensor, timesteps: Tensor, positions: Any, kv: Any, audio: Any, *_: Any, kept: slice) -> tuple:
        v, keys = super().forward(x, timesteps, positions, kept=kept)
        return v + audio.layers[0][0].mean(), keys


def sigmas() -> Tensor:
    return torch.tensor([warp(t, FLASH.shift) / 1000 for t in levels(FLASH.timesteps)], dtype=torch.float64)


def start_noise() -> Tensor:
    """[F, C, h, w]"""
    noise = [gaussian(4, b, 0, (1, 4, 3, *GEOMETRY.latent_size), "latents") for b in range(BLOCKS)]
    return torch.cat(noise, dim=2)[0].transpose(0, 1).double()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_goes_from_deaf_to_hearing(guidance: float):
    """Heard 0.4, unheard 0: the flow goes 0.4 times the guidance from the noise; the state hears as before."""
    rollout = Trace(
        model=Hearing(),  # type: ignore[arg-type]
        policy=refine(FLASH, 8),
        coarse=FLASH,
        guidance=guidance,
        geometry=GEOMETRY,
        condition=Condition(ConditionKV()),
        seed=4,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    state = rollout.start()
    heard = {b: AudioTokens(torch.full((3, 2, 5), 0.4), torch.ones(3, 2, dtype=torch.bool)) for b in range(BLOCKS)}
    state.audio = dict(heard)
    assert torch.allclose(follow(rollout, state, BLOCKS).end, start_noise() - 0.4 * guidance, atol=1e-6)
    assert all(state.audio[b] is heard[b] for b in state.audio)


def test_a_linear_field_is_followed_and_better_in_smaller_steps():
    """dx / d sigma = a x has x(sigma) = x(1) exp(a (sigma - 1)); Euler's error falls with the step."""
    a, errors = 0.7, []
    for ode_steps in (24, 48, 96):
        _, path, _ = traced(lambda x, _: a * x, ode_steps)
        assert torch.equal(path.states[0], start_noise())
        exact = start_noise()[None] * torch.exp(a * (sigmas() - 1))[:, None, None, None, None]
        end = start_noise() * torch.exp(torch.tensor(-a))
        errors.append(max(float((path.states - exact).abs().max()), float((path.end - end).abs().max())))
    assert errors[0] < 0.15
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.5, abs=0.1)


def test_a_teacher_that_knows_the_answer_goes_straight_there():
    """Velocity (x - c) / sigma: every state is c and the first noise at its level, and the end is c."""
    _, path, _ = traced(lambda x, sigma: (x - 2.0) / sigma, 24)
    assert (path.end - 2).abs().max() < 1e-9
    s = sigmas()[:, None, None, None, None]
    assert torch.allclose(path.states, (1 - s) * 2 + s * start_noise(), atol=1e-9)


def test_the_last_step_is_to_x0():
    """With one step a level the end is what the model says at the lowest level, and each state one Euler step on."""

    def formula(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.sin(x) + sigma * x

    _, path, _ = traced(formula, 8)
    s = sigmas()
    for k in range(8):
        x, after = path.states[k], (*s, torch.zeros(()))[k + 1]
        step = x + (after - s[k]) * formula(x, s[k])
        expected = path.states[k + 1] if k < 7 else path.end
        assert torch.allclose(step, expected, atol=1e-12)


def test_blocks_enter_the_cache_at_the_levels_of_the_policy():
    """The sink was finished by a sub-step, the others by a main step; the teacher saw no other pasts."""
    _, _, state = traced(lambda x, _: 0 * x, 24)
    keys, _ = state.caches[0].context(0)
    found = keys[0, :, 0, 0].reshape(5, -1)
    assert torch.allclose(found[0], torch.full_like(found[0], warp(125, 5)))
    assert torch.allclose(found[1:], torch.full_like(found[1:], warp(250, 5)))


@torch.no_grad()
def test_the_trajectory_is_the_engines_rollout():
    """One step a level = the engine under Euler with sub-steps in every window, all that it depends on included."""
    euler = replace(FLASH, bootstrap=1000, update="euler")
    engine = small_rollout(euler, seed=5)
    rollout = Trace(
        model=engine.model, policy=refine(euler, 8), coarse=euler, geometry=GEOMETRY, condition=engine.condition,
        seed=5, device=engine.device, dtype=engine.dtype,
    )  # fmt: skip
    state = rollout.start()
    state.audio = {b: audio_tokens(b) for b in range(BLOCKS)}
    path = follow(rollout, state, BLOCKS)
    expected = roll(engine, BLOCKS)
    assert expected.std() > 0.5 and torch.equal(path.end, expected[0].transpose(0, 1))


# Pairs


WIDE = replace(random_clips(3, (4, 8)), seed=torch.arange(100, 103))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer that has learned a little."""
    out = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_small_preset(monkeypatch)
        state = small_training(out)
        for _ in range(40):
            trainer.train_step(state)
        trainer.save(state)
    return out / "transformer.safetensors"


def make(store: PairStore, clips: EncodedClips) -> None:
    height, width = (16 * cells for cells in clips.latents.shape[-2:])
    geometry = Geometry(width, height, spatial=16, patch=PRESET.patch)
    store.make(load_model(store.teacher).eval().requires_grad_(False), clips, geometry)


@pytest.fixture(scope="module")
def store(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """Pairs of random_clips(6) and of WIDE."""
    store = PairStore(tmp_path_factory.mktemp("pairs"), teacher, FLASH, 8)
    for clips in (random_clips(6), WIDE):
        make(store, clips)
    return store


def test_pairs_are_kept_and_made_once(store: PairStore):
    files = sorted(store.home.glob("*.safetensors"))
    assert len(files) == 9
    tensors, facts = read(files[1])
    assert tensors["states"].shape == (8, 30, 16, 4, 4) and tensors["end"].shape == (30, 16, 4, 4)
    assert facts["seed"] == "1" and facts["teacher"] == store.teacher_hash and facts["ode_steps"] == "8"
    assert json.loads(facts["levels"]) == list(levels(FLASH.timesteps))
    ages = [f.stat().st_mtime_ns for f in files]
    files[2].unlink()
    make(store, random_clips(6))
    again = [f.stat().st_mtime_ns for f in files]
    assert [a == b for a, b in zip(ages, again, strict=True)] == [i != 2 for i in range(9)]
    for other in (replace(store, ode_steps=16), replace(store, policy=policy("self-forcing"))):
        assert other.home != store.home
    with pytest.raises(OSError, match="no trajectory of clip 6 "):
        store.load(replace(random_clips(6), seed=torch.arange(2, 8)))


def test_a_batch_stands_on_the_trajectories(store: PairStore):
    pairs = store.load(random_clips(6))
    layout = Layout(FLASH, 2, (250.0, 500.0, 750.0, 1000.0))
    mixture = Mixture(exact=1.0)
    batch = batches.make_batch(pairs.clips, layout, torch.tensor([3, 0, 1]), PRESET.patch, mixture, 0)
    placed = pairs.on_trajectory(batch)
    x_t = flow.add_noise(placed.x0, placed.noise, placed.timesteps)
    for row, clip in enumerate([3, 0, 1]):
        tensors, _ = read(pairs.paths[clip])
        for i, timestep in enumerate(layout.timesteps):
            place = slice(layout.lead + 3 * i, layout.lead + 3 * i + 3)
            frames = placed.frames[row, place]
            state = tensors["states"][levels(FLASH.timesteps).index(timestep), frames].float().transpose(0, 1)
            assert torch.allclose(x_t[row, :, place], state, atol=1e-3)
            assert torch.equal(placed.x0[row, :, place], tensors["end"][frames].float().transpose(0, 1))
    before = slice(0, layout.lead)
    assert torch.equal(placed.noise[:, :, before], batch.noise[:, :, before])
    first = gaussian(3, int(placed.frames[0, -1]) // 3, 0, (1, 16, 3, 4, 4), "latents")
    assert torch.allclose(placed.noise[0, :, -3:], first[0], atol=2e-3)


def small_regression(tmp_path: Path, store: PairStore, **options: Any) -> ode_regression.Training:
    recipe = ode_regression.Recipe(tokens=200, held_out=2, warmup_steps=1, average=0.5, **options)
    return ode_regression.begin(recipe, tmp_path, (random_clips(6), WIDE), (random_clips(6), WIDE), store)


def test_the_teacher_knows_the_end_better_the_closer_it_is(tmp_path: Path, store: PairStore):
    scores = small_regression(tmp_path, store).measure()
    assert set(scores) == {f"{kind}_{t:.0f}" for kind in ("all", "mouth", "deaf") for t in levels(FLASH.timesteps)}
    assert scores["all_125"] < 0.5 * scores["all_500"] and scores["all_250"] < scores["all_1000"]


def test_regression_learns_and_resumes_where_it_stopped(tmp_path: Path, store: PairStore):
    state = small_regression(tmp_path, store, learning_rate=1e-3)
    state.held_out, forgotten = state.pairs[0], state.learner.weights.state()
    for part in forgotten.values():
        part["head.head.weight"] *= 0.5  # the teacher's own trajectories are easy for it
    state.learner.weights.load(forgotten)
    before = state.measure()
    for _ in range(30):
        trainer.train_step(state)
    trainer.save(state)
    for _ in range(3):
        trainer.train_step(state)
    after = state.measure()
    assert after["all_1000"] < 0.5 * before["all_1000"] and after["all_375"] < 0.5 * before["all_375"]
    again = small_regression(tmp_path, store, learning_rate=1e-3)
    trainer.resume(again)
    for _ in range(3):
        trainer.train_step(again)
    for name, p in state.learner.weights.master.items():
        assert torch.equal(p, again.learner.weights.master[name]), name
    heard = read(store.teacher)[0]
    for name, p in state.model.proj_model.state_dict().items():
        assert torch.equal(p, heard[f"proj_model.{name}"]), name


def test_some_batches_are_the_truth(tmp_path: Path, store: PairStore):
    state = small_regression(tmp_path, store, flow_share=0.3)
    truths = 0
    for state.steps in range(100):
        batch = state.batch()
        data = state.data[batch.x0.shape[-1] == 8]
        own = data.latents[batch.clips[:, None], batch.frames].float().transpose(1, 2)
        truths += torch.equal(batch.x0, own)
    assert 15 < truths < 45
    with pytest.raises(ValueError, match="flow_share 2"):
        ode_regression.Recipe(flow_share=2)


def test_other_voices_say_the_same_at_the_same_time():
    """Peaks move along the frequencies, each sequence's by a factor of its own; silence stays silence."""
    audio = torch.full((2, 3, 2, 4, 64), -1.0)
    audio[..., 20] = 0.5
    layout = Layout(FLASH, 0, (1000.0,))
    batch = batches.make_batch(random_clips(6), layout, torch.arange(2), PRESET.patch, Mixture(), 0)
    batch = replace(batch, audio=audio.flatten(-2))
    said = batches.other_voices(batch, 4, 0.2, torch.Generator().manual_seed(1)).audio.unflatten(-1, (4, 64))
    peaks = said.argmax(-1)
    assert all(len(peaks[i].unique()) == 1 and 16 <= peaks[i].unique() <= 25 for i in range(2))
    assert peaks[0].unique() != peaks[1].unique() and said.min() >= -1
    same = batches.other_voices(batch, 4, 0.0, torch.Generator().manual_seed(1)).audio.unflatten(-1, (4, 64))
    assert (same.argmax(-1) == 20).all() and (said - same).abs().max() > 0


def test_the_loss_is_one_of_clean_latents(store: PairStore):
    """An error of 1 in x0 is a loss of 1 whatever the level; the velocity's would be 1 / sigma squared."""
    pairs = store.load(random_clips(6))
    for timesteps in ((250.0, 500.0, 750.0, 1000.0), (125.0, 375.0, 625.0, 875.0)):
        layout = Layout(FLASH, 0, timesteps)
        batch = batches.make_batch(pairs.clips, layout, torch.arange(2), PRESET.patch, Mixture(exact=1.0), 0)
        batch = pairs.on_trajectory(batch)
        x_t = flow.add_noise(batch.x0, batch.noise, batch.timesteps)
        v = flow.to_velocity(x_t, batch.x0 + 1, batch.timesteps)
        recipe = ode_regression.Recipe()
        assert float(batches.regression_loss(batch, v, recipe.mouth, recipe.eyes, recipe.past)) == pytest.approx(
            1, abs=1e-4
        )
        assert float(flow_matching.flow_loss(batch, v, recipe)) > 1.2


def test_the_whole_regression_runs_and_goes_on(tmp_path: Path, teacher: Path):
    """Drawn clips, their latents, pairs, training, files."""
    (tmp_path / "clips").mkdir()
    clips, out = drawn_clips(tmp_path / "clips"), tmp_path / "out"
    weights = small_autoencoder(tmp_path / "autoencoder.safetensors")
    recipe = ode_regression.Recipe(tokens=200, held_out=1, minutes=0.5 / 60, pairs=3, ode_steps=8)
    with pytest.raises(ValueError, match="5 pairs need as many clips"):
        ode_regression.train(replace(recipe, pairs=5), out, clips, weights, teacher)
    ode_regression.train(recipe, out, clips, weights, teacher)
    assert len(list(clips.glob("pairs-*/*.safetensors"))) == 3
    lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and "deaf_875" in lines[0] and lines[-1].keys() >= {"sync", "drift"}
    assert (out / "preview.png").exists()
    student = load_model(out / "transformer.safetensors")
    assert student.config == PRESET
    assert json.loads(read(out / "transformer.safetensors")[1]["recipe"])["pairs"] == 3
    ode_regression.train(replace(recipe, minutes=1 / 60), out, clips, weights, teacher, again=True)
    again = json.loads((out / "curve.jsonl").read_text().splitlines()[-1])
    assert again["step"] > lines[-1]["step"]


def test_trajectories_are_told_what_the_student_is_told(tmp_path: Path) -> None:
    """What no sound tells of the true clip, in teacher and student; its true mouth is left to the ears."""
    state = small_training(tmp_path)
    clips = random_clips(1, blocks=3)
    assert clips.told is not None
    geometry, model = clips.geometry(16, PRESET.patch), state.model.float()
    with torch.no_grad():
        for p in model.parameters():  # a model at step 0 says nothing
            p.normal_(std=0.2)
    drawn, heard = clips.told.clone(), clips.told.clone()
    drawn[..., len(HEARD) :] += 1
    heard[..., : len(HEARD)] += 1

    def end(told: Tensor | None) -> Tensor:
        return trajectories.trace(model, FLASH, 8, replace(clips, told=told), 0, geometry, seed=0).end

    assert torch.equal(end(clips.told), end(heard)) and not torch.allclose(end(clips.told), end(drawn))
    assert torch.equal(end(None), end(torch.zeros_like(drawn)))
    layout = Layout(FLASH, 0, (1000.0,))
    batch = batches.make_batch(clips, layout, torch.tensor([0]), PRESET.patch, Mixture(), seed=0)
    assert batch.manner is not None and torch.equal(
        batch.manner[0, ..., len(HEARD) :], clips.told[0, :3, :, len(HEARD) :].float()
    )
    with torch.no_grad():
        told, still = (batches.predict(model, b) for b in (batch, replace(batch, manner=None)))
    assert not torch.allclose(told, still)
