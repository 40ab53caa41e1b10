"""The judge of lips: where it looks, what it is told, what its loss wants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from joyavatar_core.avatar import load_model
from joyavatar_core.checkpoint import CheckpointError
from joyavatar_core.training import lips, ode_regression, trainer
from joyavatar_core.training.clips import list_clips, read_clip
from joyavatar_core.training.lips import LipLoss, LipReader, Lips, LipTruth

from .small_training import add_small_preset, drawn_clips, small_autoencoder, small_training


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)


def shown(
    frames: Tensor, mouth: tuple[slice, slice] = (slice(5, 7), slice(3, 5)), size: int = 10
) -> tuple[Tensor, Lips]:
    """Random latents of 4 channels, mouths in some cells."""
    where = torch.zeros(*frames.shape, size, size)
    where[:, :, mouth[0], mouth[1]] = 1.0
    return torch.randn(len(frames), 4, frames.shape[1], size, size), Lips(frames, where)


def test_the_window_holds_the_mouth():
    latents, some = shown(torch.arange(3).expand(2, -1))
    found = lips.windows(latents, some.mouth)
    assert found.shape == (6, 4, 6, 6)
    assert torch.equal(found[4], latents[1, :, 1, 3:9, 1:7])  # the middle is (6, 4)


def test_beyond_the_picture_there_is_nothing():
    latents, some = shown(torch.arange(1)[None], (slice(9, 10), slice(0, 1)))
    found = lips.windows(latents, some.mouth)[0]
    assert not found[:, 4:].any() and not found[:, :, :2].any()
    assert found[:, :3, 3:].all()
    nowhere = lips.windows(latents, torch.zeros_like(some.mouth))[0]
    assert torch.equal(nowhere, latents[0, :, 0, 2:8, 2:8])  # the middle of the picture


def test_a_latent_is_read_beside_the_one_before_it_if_it_is_there():
    torch.manual_seed(0)
    reader = LipReader(4).eval()
    for layer in reader.person:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)  # the mean of all latents would tell of each
    latents, some = shown(torch.tensor([[0, 1, 7, 8]]))
    other = latents.clone()
    other[:, :, 1] += 1
    changed = (reader(latents, some) - reader(other, some)).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False, False]
    together = replace(some, frames=torch.tensor([[0, 1, 2, 8]]))
    changed = (reader(latents, together) - reader(other, together)).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, True, False]


def test_lips_that_should_touch_count_more():
    wanted = torch.full((1, 2, 4, 3), 0.5)
    wanted[:, 1, :, 0] = 0.0
    error = lips.lip_error(wanted + 0.1, wanted, shut=3.0)
    assert error[0, 1] == pytest.approx(3 * float(error[0, 0]), rel=1e-5)
    assert error[0, 0] == pytest.approx((2 * 0.1**2 / 0.25**2 + 0.1**2 / 0.5**2) / 3, rel=1e-4)


def test_the_loss_is_nothing_for_the_true_lips_and_moves_what_counts():
    torch.manual_seed(0)
    judge = LipLoss(LipReader(4).eval().requires_grad_(False), 0.5, 1.0)
    latents, some = shown(torch.tensor([[0, 1, 5, 6]]))
    some = judge.seen(latents, some)
    assert judge(latents, some, torch.ones(1, 4)) == 0
    made = torch.randn(latents.shape, requires_grad=True)
    judge(made, some, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).backward()
    assert made.grad is not None
    near = made.grad[0, :, 2:, 3:9, 1:7].abs().mean()
    assert near > 0 and not made.grad[..., :1].any(), "beyond the window nothing moves"


def test_it_learns_to_read_and_is_kept(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    clips = drawn_clips(tmp_path / "clips")
    weights = small_autoencoder(tmp_path / "autoencoder.safetensors")
    recipe = lips.Recipe(minutes=4 / 60, batch=4, frames=4, held_out=1, noise=0.0)
    figures = lips.train(recipe, tmp_path / "out", clips, weights)
    assert set(figures) == {"read_open", "read_wide", "read_teeth"}
    reader = lips.load_lip_reader(tmp_path / "out" / "lips.safetensors")
    assert not any(p.requires_grad for p in reader.parameters()) and not reader.training
    with pytest.raises(CheckpointError):
        lips.load_lip_reader(weights)


def test_a_step_makes_the_error_small():
    """Lips that are a plain function of the latents are learnt."""
    torch.manual_seed(0)
    reader = LipReader(4)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    errors = []
    for _ in range(150):
        latents, some = shown(torch.arange(4).expand(8, -1))
        wanted = latents[:, 0, :, 5:7, 3:5].mean((2, 3))[..., None, None].expand(-1, -1, 4, 3).sigmoid()
        error = lips.lip_error(reader(latents, some), wanted).mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


def test_the_truth_is_that_of_the_clip(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    clips = drawn_clips(tmp_path / "clips")
    first = read_clip(list_clips(clips)[0])
    told = LipTruth(clips).of(torch.tensor([first.seed]), torch.tensor([[0, 2]]))
    assert told.shape == (1, 2, 4, 3)
    assert torch.equal(told[0, 0, :, 0], first.open[:1].expand(4))
    assert torch.equal(told[0, 1, :, 2], first.truth("teeth")[5:9])
    list_clips(clips)[0].write_bytes(b"nothing")
    with pytest.raises(OSError, match="draw the clips again"):
        LipTruth(clips).of(torch.tensor([first.seed]), torch.tensor([[0]]))


def test_the_regression_listens_to_the_judge(tmp_path: Path):
    """The command with a judge and a student to go on from; the loss has the lips in it."""
    (tmp_path / "clips").mkdir()
    clips, weights = drawn_clips(tmp_path / "clips"), small_autoencoder(tmp_path / "autoencoder.safetensors")
    state = small_training(tmp_path)
    trainer.save(state)
    teacher, judge = tmp_path / "transformer.safetensors", tmp_path / "lips" / "lips.safetensors"
    lips.train(lips.Recipe(minutes=1 / 60, batch=4, frames=4, held_out=1), judge.parent, clips, weights)
    recipe = ode_regression.Recipe(
        tokens=200, held_out=1, steps=1, pairs=3, ode_steps=8, lip_weight=0.0, warmup_steps=1
    )
    losses = []
    for weight in (0.0, 1000.0):
        out = tmp_path / f"out{weight}"
        ode_regression.train(
            replace(recipe, lip_weight=weight), out, clips, weights, teacher, lips=judge, start=teacher
        )
        assert load_model(out / "transformer.safetensors").config == state.model.config
        losses.append(out)
    first, second = (load_model(out / "transformer.safetensors").state_dict() for out in losses)
    assert any(not torch.equal(first[name], second[name]) for name in first)
