"""Teaching a finished generator its mouths, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from joyavatar_core.training import articulation, batches, trainer

from .small_training import (
    add_small_preset,
    drawn_clips,
    random_clips,
    small_autoencoder,
    small_recipe,
    small_training,
)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    add_small_preset(monkeypatch)


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    """A generator that has learnt for a few steps."""
    state = small_training(tmp_path / "generator")
    state.out.mkdir()
    for _ in range(3):
        trainer.train_step(state)
    trainer.save(state)
    return state.out / "transformer.safetensors"


def begin(generator: Path, out: Path, **changes: object) -> articulation.Training:
    plain = vars(small_recipe()) | {"learning_rate": 6e-3, "optimiser": "adamw", "drop_audio": 0.0} | changes
    return articulation.begin(articulation.Recipe(**plain), out, (random_clips(6),), generator)  # pyright: ignore


def test_the_truth_counts_at_the_mouth_and_the_answers_of_before_elsewhere(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path, mouth=3.0)
    batch = state.batch()
    nowhere, everywhere = (replace(batch, mouth=torch.full_like(batch.mouth, share)) for share in (0.0, 1.0))
    assert state.loss(nowhere).item() < 1e-9  # it still is what it was
    v = batches.predict(state.model, batch)
    truth = batches.regression_loss(batch, v, 1.0, 1.0, state.recipe.past)
    assert torch.isclose(state.loss(everywhere), 3 * truth, rtol=1e-4)


def test_mouths_move_and_the_rest_stays(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path)
    batch = state.batch()
    before = batches.clean(batch, batches.predict(state.model, batch)).detach()
    for _ in range(20):
        trainer.train_step(state)
    after = batches.clean(batch, batches.predict(state.model, batch)).detach()
    cells = batch.mouth[:, None].expand_as(after) * (batch.timesteps > 0)[:, None, :, None, None]
    at_mouth, elsewhere = cells.bool(), batch.mouth[:, None].expand_as(after) == 0
    wrong = [(x - batch.x0).square()[at_mouth].mean() for x in (before, after)]
    assert wrong[1] < 0.8 * wrong[0]
    moved = (after - before).square()
    assert moved[elsewhere].mean() < 0.5 * moved[at_mouth].mean()


def test_the_ears_stay_and_their_readings_may_be_laid_out_anew(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path)
    was = {name: p.detach().clone() for name, p in state.model.proj_model.named_parameters()}
    for _ in range(3):
        trainer.train_step(state)
    now = dict(state.model.proj_model.named_parameters())
    assert {name for name, p in was.items() if not torch.equal(p, now[name])} == {"proj.weight", "proj.bias"}


def test_the_command(generator: Path, tmp_path: Path):
    folder = tmp_path / "clips"
    folder.mkdir()
    out, files = tmp_path / "out", ["--autoencoder", str(small_autoencoder(tmp_path / "autoencoder.safetensors"))]
    recipe = '{"model": "small", "held_out": 1, "tokens": 60}'
    options = ["--clips", str(drawn_clips(folder)), "--out", str(out), "--steps", "2", "--recipe", recipe]
    articulation.main(["--initial", str(generator), *files, *options])
    assert {path.name for path in out.iterdir()} >= {"transformer.safetensors", "train.pt", "curve.jsonl"}
