"""The ablations: what each variant leaves out, that trainings and measures go on where they stopped, the table."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from joyavatar_core.policy import policy
from joyavatar_core.training import ablations, dmd, trainer
from joyavatar_core.training.drawn_suite import Figure, Report, Subject, Suite
from joyavatar_core.training.self_forcing import Odds

from .small_training import add_small_preset, drawn_clips, random_clips, small_autoencoder, small_training

RECIPE = {"model": "small", "tokens": 64, "held_out": 2, "warmup_steps": 1, "average": 0.5, "critic_steps": 1}
CHANGED = {"no-main", "no-auxiliary", "no-sub-steps", "no-mci"}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Generator, teacher and autoencoder, none of which was trained."""
    out = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_small_preset(monkeypatch)
        trainer.save(small_training(out))
    transformer = out / "transformer.safetensors"
    return transformer, transformer, small_autoencoder(out / "autoencoder.safetensors")


@pytest.mark.parametrize("name", ablations.TRAININGS)
def test_variants_roll_out_without_what_they_leave_out(name: str, files: tuple[Path, Path, Path], tmp_path: Path):
    """Of two hundred rollouts none has what the variant is trained without, and some have all the rest."""
    full = dmd.Recipe(**RECIPE, odds=Odds(blocks=(2, 3), noisy_motion=0.4))
    recipe = ablations.TRAININGS[name].recipe(full)
    assert recipe.odds.blocks == (2, 3) and recipe.odds.noisy_motion == 0.4
    state = ablations.begin(name, recipe, tmp_path, (random_clips(6),), files)
    draws = [dmd.draw(random.Random(i), state.policy, state.recipe.odds) for i in range(200)]
    seen = {
        "no-main": any(d.branch == "main" for d in draws),
        "no-auxiliary": any(d.branch == "auxiliary" for d in draws),
        "no-sub-steps": any(d.bootstrap or any(d.substeps) for d in draws),
        "no-mci": state.policy.motion_frame,
    }
    assert set(seen) == CHANGED and {variant for variant, there in seen.items() if not there} == {name} & CHANGED


def test_rows_change_one_thing_of_the_full_policy():
    full = policy("joyavatar-flash")
    assert {row.training for row in ablations.ROWS.values()} == set(ablations.TRAININGS)
    for name, row in ablations.ROWS.items():
        own = ablations.row_policy(row)
        assert {key for key in vars(full) if getattr(own, key) != getattr(full, key)} == set(row.policy), name
        assert len(row.paper) in (0, 5)
    alike = [(row.training, ablations.row_policy(row)) for row in ablations.ROWS.values()]
    assert all(row not in alike[:i] for i, row in enumerate(alike))


def test_trainings_go_on_and_are_not_done_twice(files: tuple[Path, Path, Path], tmp_path: Path):
    (tmp_path / "clips").mkdir()
    clips, out = drawn_clips(tmp_path / "clips"), tmp_path / "out"
    recipe = dmd.Recipe(**{**RECIPE, "tokens": 32}, steps=1, odds=Odds(blocks=(7, 7)))
    with pytest.raises(ValueError, match="give --steps"):
        ablations.train(["full"], replace(recipe, steps=None), out, clips, files)
    ablations.train(["full", "no-mci"], recipe, out, clips, files)
    done = {name: out / name / "transformer.safetensors" for name in ("full", "no-mci")}
    first = {name: path.read_bytes() for name, path in done.items()}
    assert first["full"] != first["no-mci"] and not (out / "no-main").exists()
    stamps = {path: path.stat().st_mtime_ns for path in done.values()}
    ablations.train(["full", "no-mci"], recipe, out, clips, files)
    assert {path: path.stat().st_mtime_ns for path in done.values()} == stamps
    ablations.train(["full"], replace(recipe, steps=2), out, clips, files)
    assert ablations.steps_done(out / "full") == 2 and done["full"].read_bytes() != first["full"]


def test_rows_are_measured_once(
    files: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Rows without a training are left out and named; a run that broke off is gone on with."""
    for name in ("full", "no-mci"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "transformer.safetensors").write_bytes(files[0].read_bytes())
    runs: list[tuple[str, int]] = []

    def run(suite: Suite, subject: Subject, workers: int = 0) -> Report:
        if len(runs) == 4:
            raise KeyboardInterrupt
        runs.append((str(subject.policy), suite.noise_seed))
        value = float(len(runs))
        return Report({"sync.correlation": Figure(value, value, value, 2, None, None)}, {}, [])

    monkeypatch.setattr(ablations, "run_suite", run)
    suite = Suite(clips=2, long_clips=0)
    with pytest.raises(KeyboardInterrupt):
        ablations.measure(tmp_path, files[2], suite)
    assert not (tmp_path / "ablations.md").exists()
    kept = json.loads((tmp_path / "ablations.json").read_text())
    assert [len(kept["full"]["runs"]), sum(len(row["runs"]) for row in kept.values())] == [3, 4]
    runs[:] = [("", -1)] * 5  # never four again
    found = ablations.measure(tmp_path, files[2], suite)
    assert {name: len(row["runs"]) for name, row in found.items()} == {
        name: 3 for name, row in ablations.ROWS.items() if row.training in ("full", "no-mci")
    }
    assert len(runs) - 5 == 3 * len(found) - 4 and found["full"] == kept["full"]
    assert "w/o main branch: no training no-main" in caplog.text
    runs[:] = [("", -1)] * 5
    ablations.measure(tmp_path, files[2], replace(suite, seconds=3.0))
    assert len(runs) - 5 == 3 * len(found)  # another suite: all anew
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert len(lines) == 2 + len(found) and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| full | 7.000 ± 1.000 |") and lines[2].endswith("| 5.25 | 8.3 | 0.72 | 0.84 | 0.53 |")
