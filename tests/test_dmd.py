"""The distillation: its gradient where it is known, what it moves, and that it goes on where it stopped."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from joyavatar_core import flow
from joyavatar_core.avatar import load_light_autoencoder
from joyavatar_core.conditioning import ImageChannels
from joyavatar_core.manner import HEARD
from joyavatar_core.training import bidirectional, dmd, trainer
from joyavatar_core.training.inputs import Inputs
from joyavatar_core.training.lips import LipLoss, LipReader, Lips
from joyavatar_core.training.self_forcing import Odds

from .small_training import add_small_preset, random_clips, small_autoencoder, small_training


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A transformer that has learned a little, and an autoencoder."""
    out = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_small_preset(monkeypatch)
        state = small_training(out)
        for _ in range(20):
            trainer.train_step(state)
        trainer.save(state)
    return out / "transformer.safetensors", small_autoencoder(out / "autoencoder.safetensors")


RECIPE = {"model": "small", "tokens": 64, "held_out": 2, "warmup_steps": 1, "average": 0.5}


def distillation(out: Path, files: tuple[Path, Path], **options) -> dmd.Training:
    recipe = dmd.Recipe(**{**RECIPE, **options})
    return dmd.begin(recipe, out, (random_clips(6),), files[0], files[0], files[1])


# The gradient


def denoised(x_t: Tensor, timestep: float, mean: Tensor, deviation: Tensor) -> Tensor:
    """Expected clean value behind x_t where the clean ones are normal: known in closed form."""
    sigma = timestep / 1000
    gain = (1 - sigma) * deviation**2 / ((1 - sigma) ** 2 * deviation**2 + sigma**2)
    return mean + gain * (x_t - (1 - sigma) * mean)


def test_gradient_is_fake_minus_real_in_one_dimension():
    """Two normal distributions: the step at every x is (fake - real) over the distance, and leads to the real one."""
    torch.manual_seed(0)
    real_mean, fake_mean = torch.tensor(2.0), torch.tensor(-1.0)
    x = (fake_mean + 0.5 * torch.randn(64, 1, 3, 1, 1)).requires_grad_()
    noise = torch.randn(x.shape)
    x_t = flow.add_noise(x.detach(), noise, torch.full((64, 3), 600.0))
    real, fake = (denoised(x_t, 600, mean, torch.tensor(0.5)) for mean in (real_mean, fake_mean))
    expected = (fake - real) / (x.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = dmd.distribution_gradient(x.detach(), real, fake)
    assert torch.allclose(gradient, expected)
    dmd.distribution_loss(x, gradient, torch.ones(64, 3, 1, 1)).backward()
    assert x.grad is not None and torch.allclose(x.grad * x.numel(), expected, atol=1e-6)
    assert (x.grad < 0).all()  # a step against it goes up, to the real mean
    same = dmd.distribution_gradient(x.detach(), real, real)
    assert not same.any()
    assert not dmd.distribution_gradient(real, real, real).isnan().any()


def test_weights_scale_the_gradient():
    x = torch.zeros(1, 2, 3, 2, 2, requires_grad=True)
    weights = torch.ones(1, 3, 2, 2)
    weights[:, 0] = 0
    weights[0, 1, 0, 0] = 5
    dmd.distribution_loss(x, torch.ones_like(x), weights).backward()
    assert x.grad is not None
    scaled = x.grad * x.numel()
    assert not scaled[:, :, 0].any() and (scaled[0, :, 1, 0, 0] == 5).all() and (scaled[:, :, 2] == 1).all()


def test_distillation_finds_a_known_distribution():
    """A generator of one number and a learned fake score: mean and spread come to those of the real one."""
    torch.manual_seed(0)
    shift, spread = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor(0.3))
    fake_shift, fake_spread = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor(0.3))
    generator = torch.optim.Adam([shift, spread], lr=2e-2)
    critic = torch.optim.Adam([fake_shift, fake_spread], lr=5e-2)

    def fake_x0(x_t: Tensor, timestep: float) -> Tensor:
        return denoised(x_t, timestep, fake_shift, fake_spread)

    distances = []
    for step in range(1200):
        x = shift + spread * torch.randn(256, 1, 1, 1, 1)
        timestep = float(torch.empty(1).uniform_(100, 900))
        x_t = flow.add_noise(x.detach(), torch.randn(x.shape), torch.full((256, 1), timestep))
        loss = (fake_x0(x_t, timestep) - x.detach()).square().mean()
        critic.zero_grad()
        loss.backward()
        critic.step()
        if step % 2:
            with torch.no_grad():
                direction = fake_x0(x_t, timestep) - denoised(x_t, timestep, torch.tensor(1.0), torch.tensor(0.8))
            distances.append(float(direction.abs().mean()))
            generator.zero_grad()
            dmd.distribution_loss(x, direction, torch.ones(256, 1, 1, 1)).backward()
            generator.step()
    assert shift.item() == pytest.approx(1.0, abs=0.15) and abs(spread.item()) == pytest.approx(0.8, abs=0.15)
    assert sum(distances[-50:]) < 0.2 * sum(distances[:50])


def test_guidance_goes_from_deaf_to_hearing(files: tuple[Path, Path], tmp_path: Path):
    state = distillation(tmp_path, files)
    inputs = dmd.conditions(state.data[0], torch.arange(2), 6, (4, 4), state.recipe).inputs
    x_t, timesteps = torch.randn(2, 16, 6, 4, 4), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        state.real.float()  # in bfloat16 the sum is rounded elsewhere
        heard, deaf = (dmd.clean(state.real, x_t, timesteps, i) for i in (inputs, inputs.untold()))
        assert not torch.equal(heard, deaf)
        assert torch.equal(dmd.clean(state.real, x_t, timesteps, inputs, 1), heard)
        assert torch.allclose(dmd.clean(state.real, x_t, timesteps, inputs, 4), deaf + 4 * (heard - deaf), atol=1e-4)


def test_guidance_about_the_mouth_and_elsewhere(tmp_path: Path, files: tuple[Path, Path]):
    """A clip's cells have the one or the other, by their share of mouth; so has what the real score sees."""
    state = distillation(tmp_path, files, guidance=3.0, guidance_elsewhere=1.0)
    given = dmd.conditions(state.data[0], torch.arange(2), 6, (4, 4), state.recipe)
    assert given.lips is not None
    each = state._guidance(given)
    assert isinstance(each, Tensor) and each.shape == (2, 1, 6, *given.weights.shape[2:])
    assert torch.equal(each[:, 0], 1 + 2 * given.lips.mouth)
    with torch.no_grad():
        x_t, timesteps = torch.randn(2, 16, *each.shape[2:]), torch.tensor([700.0, 300.0])
        mixed, plain, far = (dmd.clean(state.real, x_t, timesteps, given.inputs, g) for g in (each, 1.0, 3.0))
    assert torch.allclose(mixed, plain + given.lips.mouth[:, None] * (far - plain), atol=1e-4)
    whole = distillation(tmp_path, files, guidance=3.0)
    assert whole._guidance(given) == 3.0


def test_scores_are_told_what_the_rollout_is_told(tmp_path: Path, files: tuple[Path, Path]):
    """The drawn truth of clips that have one, nothing that is heard; guidance goes away from the sound alone."""
    state = distillation(tmp_path, files)
    (data,) = state.data
    given = dmd.conditions(data, torch.arange(2), 6, (4, 4), state.recipe).inputs
    assert given.manner is not None and data.told is not None and not given.manner[..., : len(HEARD)].any()
    assert torch.equal(given.manner[..., len(HEARD) :], data.told[:2, :6, :, len(HEARD) :].float())
    x_t, timesteps = torch.randn(2, 16, 6, 4, 4), torch.tensor([300.0, 900.0])
    still = replace(given, manner=torch.zeros_like(given.manner))
    drawn = dmd.draw(random.Random(0), state.policy, Odds(main=0, blocks=(2, 2)))
    dtype = next(state.model.parameters()).dtype
    with torch.no_grad():
        scores = [dmd.clean(state.real, x_t, timesteps, told) for told in (given, still, replace(given, manner=None))]
        geometry = state._geometry(torch.ones(2, 6, 4, 4))
        rolled = [
            dmd.roll_out(state.model, state.policy, geometry, told, drawn, gradient=False, dtype=dtype).latents
            for told in (given, still, replace(given, manner=None))
        ]
    for moved, stood, untold in (scores, rolled):
        assert not torch.allclose(moved, stood) and torch.equal(stood, untold)
    assert given.untold().manner is given.manner
    for clips in (replace(data, told=None), data):
        told = dmd.conditions(clips, torch.arange(2), 6, (4, 4), state.recipe).inputs.manner
        assert (told is None) == (clips.told is None)


# Clips for the scores


def test_a_long_rollout_is_cut_to_what_the_scores_know(files: tuple[Path, Path]):
    autoencoder = load_light_autoencoder(files[1])
    latents, audio = torch.randn(2, 16, 9, 4, 4, requires_grad=True), torch.randn(2, 9, 3, 5)
    channels = ImageChannels(torch.randn(2, 20, 9, 4, 4))
    manner = torch.randn(2, 9, 4, 11)
    inputs = Inputs(picture=torch.zeros(2, 1, 8), channels=channels, audio=audio, manner=manner)
    weights = torch.ones(2, 9, 4, 4)
    true = Lips(torch.arange(9).expand(2, -1), torch.rand(2, 9, 4, 4), torch.rand(2, 9, 4, 3))
    given = dmd.Given(inputs, weights, true)
    same = dmd.last_latents(latents, given, 9, 3, autoencoder)
    assert same.latents is latents and same.given is given
    made = dmd.last_latents(latents, given, 6, 3, autoencoder)
    inputs, lips = made.given.inputs, made.given.lips
    assert torch.equal(made.latents[:, :, 1:], latents[:, :, 4:])
    assert inputs.audio is not None and torch.equal(inputs.audio, audio[:, 3:])
    assert inputs.manner is not None and torch.equal(inputs.manner, manner[:, 3:])
    assert inputs.channels is not None and inputs.channels.at([0]).shape == (2, 20, 1, 4, 4)
    assert torch.equal(made.latents[:, :, 0], inputs.channels.picture)
    assert lips is not None and true.wanted is not None and lips.wanted is not None
    assert torch.equal(lips.wanted, true.wanted[:, 3:]) and lips.frames[0, 0] == 3
    assert torch.equal(lips.mouth, true.mouth[:, 3:])
    dmd.distribution_loss(made.latents, torch.ones_like(made.latents), made.given.weights).backward()
    assert latents.grad is not None and not latents.grad[:, :, :6].any() and latents.grad[:, :, 6:].all()
    assert weights.all()
    with pytest.raises(ValueError, match="9 latents is shorter than the 12"):
        dmd.last_latents(latents, given, 12, 3, autoencoder)


# Training


@pytest.mark.parametrize(("critic", "generator"), [(3, 1), (1, 3), (1, 1)])
def test_one_learns_more_often_than_the_other(tmp_path: Path, files: tuple[Path, Path], critic: int, generator: int):
    """The rarer one at every third step, from the first on."""
    state = distillation(tmp_path, files, critic_steps=critic, generator_steps=generator, odds=Odds(blocks=(7, 7)))
    seen = {name: [weights_of(learner)] for name, learner in state.learners().items()}
    for _ in range(4):
        assert {"loss", "norm", "latents"} <= trainer.train_step(state).keys()
        for name, learner in state.learners().items():
            seen[name].append(weights_of(learner))
    for name, every in (("generator", critic), ("critic", generator)):
        moved = [not torch.equal(one, other) for one, other in pairwise(seen[name])]
        assert moved == [step % every == 0 for step in range(4)], name


def weights_of(learner: trainer.Learner) -> Tensor:
    """All that it trains, in one row."""
    return torch.cat([p.detach().float().flatten() for p in learner.weights.master.values()])


def test_only_one_of_two_may_be_the_rarer():
    for counts in ({"critic_steps": 2, "generator_steps": 2}, {"critic_steps": 1, "generator_steps": 0}):
        with pytest.raises(ValueError, match="one must be 1"):
            dmd.Recipe(**counts)


@pytest.mark.parametrize("odds", [Odds(main=1), Odds(main=0)], ids=["main", "auxiliary"])
@pytest.mark.parametrize("block_by_block", [False, True], ids=["at once", "block by block"])
def test_only_what_should_move_moves(tmp_path: Path, files: tuple[Path, Path], odds: Odds, block_by_block: bool):
    state = distillation(tmp_path, files, odds=odds, critic_steps=2, block_by_block=block_by_block)
    real = {n: p.clone() for n, p in state.real.named_parameters()}
    before = {k: {n: p.detach().clone() for n, p in v.weights.master.items()} for k, v in state.learners().items()}
    trainer.train_step(state)
    for name, learner in state.learners().items():
        for n, p in learner.weights.master.items():
            assert torch.equal(p, before[name][n]) == n.startswith("proj_model."), f"{name} {n}"
    assert all(torch.equal(p, real[n]) for n, p in state.real.named_parameters())
    before = {n: p.clone() for n, p in state.model.named_parameters()}
    figures = trainer.train_step(state)
    assert all(torch.equal(p, before[n]) for n, p in state.model.named_parameters())
    assert {"loss", "norm", "distance", "latents"} <= set(figures) and figures["norm"] > 0


def test_block_by_block_gives_the_same_step(tmp_path: Path, files: tuple[Path, Path]):
    masters = []
    torch.manual_seed(0)
    judge = LipLoss(LipReader(16).eval().requires_grad_(False), 0.1, 3.0)
    for block_by_block in (False, True):
        state = distillation(tmp_path, files, block_by_block=block_by_block, clip_norm=1e9)
        state.judge = judge
        state.learner.model.float(), state.critic.model.float(), state.real.float()
        state._teach_generator()
        masters.append({n: p.grad for n, p in state.learner.weights.master.items() if p.grad is not None})
    assert masters[0].keys() == masters[1].keys() and masters[0]
    for name, gradient in masters[0].items():
        assert torch.allclose(gradient, masters[1][name], atol=1e-6, rtol=1e-3), name


def test_a_judge_of_lips_pulls_them_to_the_true_ones(tmp_path: Path, files: tuple[Path, Path]):
    """With hardly anything but the judge, a step leaves lips that read more like the clips'."""
    torch.manual_seed(0)
    odds = Odds(main=0, substep=0, noisy_motion=0, blocks=(7, 7))
    state = distillation(tmp_path, files, critic_steps=1, learning_rate=1e-3, betas=(0.9, 0.98), odds=odds)
    state.judge = LipLoss(LipReader(16).eval().requires_grad_(False), 1000.0, 1.0)
    lips = []
    for _ in range(20):
        state.steps = 4  # the same draws again
        lips.append(trainer.train_step(state)["lips"])
    assert lips[-1] < 0.8 * lips[0]


def test_regression_keeps_the_generator_near_true_clips(tmp_path: Path, files: tuple[Path, Path]):
    """With hardly anything but the regression, the same draws again and again are learnt; without it there is none."""
    torch.manual_seed(0)
    options = {"critic_steps": 1, "learning_rate": 1e-3, "betas": (0.9, 0.98)}
    state = distillation(tmp_path, files, regression=1000.0, **options)
    errors = []
    for _ in range(12):
        state.steps = 4  # the same draws again
        errors.append(trainer.train_step(state)["regression"])
    assert errors[-1] < 0.8 * errors[0]
    assert "regression" not in trainer.train_step(distillation(tmp_path, files, **options))


def test_new_speech_brings_its_lips(tmp_path: Path, files: tuple[Path, Path]):
    """The same pictures, another sound at every step, and the true lips of that sound; the same at the same step."""
    state = distillation(tmp_path, files)
    given = dmd.conditions(state.data[0], torch.arange(2), 6, (4, 4), state.recipe)
    anew = dmd.spoken_anew(given, 6, random.Random(1))
    assert anew.inputs.picture is given.inputs.picture and anew.weights is given.weights
    assert anew.inputs.audio is not None and anew.inputs.audio.shape == (2, 6, 16, 256)
    assert anew.lips is not None and anew.lips.wanted is not None and anew.lips.wanted.shape == (2, 6, 4, 3)
    again, other = (dmd.spoken_anew(given, 6, random.Random(seed)) for seed in (1, 2))
    assert again.inputs.audio is not None and torch.equal(again.inputs.audio, anew.inputs.audio)
    assert other.inputs.audio is not None and not torch.equal(other.inputs.audio, anew.inputs.audio)


def test_two_and_two_steps_are_four(tmp_path: Path, files: tuple[Path, Path]):
    state = distillation(tmp_path, files, critic_steps=2, steps=4)
    for _ in range(2):
        trainer.train_step(state)
    trainer.save(state)
    for _ in range(2):
        trainer.train_step(state)
    again = distillation(tmp_path, files, critic_steps=2, steps=4)
    trainer.resume(again)
    for _ in range(2):
        trainer.train_step(again)
    assert again.steps == 4 and state.progress == 1
    for name, learner in state.learners().items():
        for n, p in learner.weights.master.items():
            assert torch.equal(p, again.learners()[name].weights.master[n]), (name, n)
    state.held_out = replace(state.held_out, latents=torch.randn(state.held_out.latents.shape))
    assert set(state.measure()) == {"lively_mouth", "lively_eyes"} and min(state.measure().values()) > 0


def test_the_bidirectional_model_learns_whole_clips(tmp_path: Path, files: tuple[Path, Path]):
    recipe = bidirectional.Recipe(**RECIPE, latents=9, learning_rate=1e-3)
    state = bidirectional.begin(recipe, tmp_path, (random_clips(6),), files[0])
    state.held_out = state.data[0]
    before = state.measure()
    for _ in range(40):
        trainer.train_step(state)
    after = state.measure()
    assert after["all_950"] < before["all_950"] and after["all_500"] < before["all_500"]
    silent = sum(
        not batch.audio[i].any()
        for batch in (state.batch() for state.steps in range(60))
        for i in range(len(batch.audio))
    )
    assert silent > 0
    layout = state.batch().layout
    assert layout.mask(4) is None and layout.positions() == tuple(range(9)) and layout.motion == 0
    made = bidirectional.sample(state.averaged(), state.policy, recipe, state.held_out.select(slice(0, 1)), steps=4)
    assert made.shape == (1, 16, 9, 4, 4) and made.isfinite().all()
    with pytest.raises(ValueError, match="latents 10: must be a multiple of the 3"):
        bidirectional.whole_clips(state.policy, 10)
