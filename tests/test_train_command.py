"""`joyavatar train`: presets, files that change them, dry runs, one plain line for what is wrong, a whole run, bars."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from joyavatar_core.avatar import load_model
from joyavatar_core.cli import main as command_line
from joyavatar_core.cli import train
from joyavatar_core.training import common, presets, trainer
from joyavatar_core.training.presets import PRESETS, Preset, Scale, Stage

from .small_training import add_small_preset, drawn_clips, small_autoencoder, small_training

Run = Callable[..., tuple[int, str, str]]

STAGES = [(name, stage) for name, preset in PRESETS.items() for stage in preset.stages()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command; status and what it printed."""

    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser(prog="joyavatar")
        made.add_argument("-v", "--verbose", action="store_true")
        train.add_options(made)
        made.set_defaults(run=train.run)
        return made

    monkeypatch.setattr(command_line, "build_parser", parser)

    def call(*words: object) -> tuple[int, str, str]:
        status = command_line.main([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Presets


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_survive_json_and_fit_their_recipes(preset: Preset):
    assert Preset.from_json(preset.to_json()) == preset
    presets.check(preset)
    with pytest.raises(FrozenInstanceError):
        preset.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_paper_s_figures():
    """JoyAvatar-Flash 4.1."""
    ode, dmd = PRESETS["flash-1.3b"].stage("ode"), PRESETS["flash-1.3b"].stage("dmd")
    recipe = presets.recipe("dmd", dmd)
    assert (recipe.steps, recipe.learning_rate, recipe.critic_rate) == (10_000, 2e-6, 4e-7)
    assert recipe.optimiser == "adamw" and recipe.betas == (0.9, 0.999) and recipe.odds.noisy_motion == 0.7
    assert dmd.scale.processes * dmd.clip.batch == 64 and dmd.clip.latents == 27 == 3 * recipe.odds.blocks[1]
    assert dmd.teacher == "teacher-14b" and presets.recipe("ode", ode).pairs == 10_000


def test_a_file_changes_single_values(tmp_path: Path):
    path = toml(
        tmp_path / "mine.toml",
        'preset = "flash-1.3b"\n[dmd.recipe]\nlearning_rate = 1e-6\n'
        "[dmd.recipe.odds]\nmain = 1.0\n[dmd.scale]\nprocesses = 8",
    )
    read, base = presets.read(str(path)), PRESETS["flash-1.3b"]
    recipe = presets.recipe("dmd", read.stage("dmd"))
    assert (recipe.learning_rate, recipe.odds.main, recipe.odds.noisy_motion) == (1e-6, 1.0, 0.7)
    assert read.stage("dmd").scale == replace(base.stage("dmd").scale, processes=8)
    assert read.ode == base.ode
    as_json = tmp_path / "mine.json"
    as_json.write_text(json.dumps({"preset": "flash-1.3b", "dmd": {"scale": {"processes": 8}}}))
    assert presets.read(str(as_json)).stage("dmd").scale == read.stage("dmd").scale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preset = "flash"', "preset 'flash' is not known; known: tiny, bidirectional-1.3b"),
        ("[dmd]", "names no preset"),
        ("preset =", "cannot be read"),
        ('preset = "tiny"\n[dmb]\nmodel = "tiny"', "unknown dmb; known: autoencoder, flow"),
        ('preset = "tiny"\n[dmd.clip]\nwidht = 3', "unknown dmd.clip.widht; known: width"),
        ('preset = "tiny"\n[dmd.recipe]\nstepz = 3', "dmd: recipe: unknown keys ['stepz']; known: policy, seed"),
        ('preset = "tiny"\n[dmd.recipe]\nsteps = 0', "dmd: recipe: steps 0 must be positive"),
        ('preset = "tiny"\n[dmd]\nmodel = "huge"', "model 'huge' is not known; known: tiny"),
        ('preset = "tiny"\n[dmd.clip]\nwidth = "wide"', "dmd.clip.width = 'wide': a value like 256 is needed"),
        ('preset = "tiny"\n[dmd.scale]\nlora_rank = 8\nlora_alpha = 8', "set sharded = true"),
        ('preset = "tiny"\n[dmd.scale]\ncompute = "int8"', "use bfloat16 or float32"),
    ],
)
def test_a_file_with_a_mistake_ends_in_one_line(text: str, message: str, tmp_path: Path, run: Run):
    status, out, err = run("dmd", "--config", toml(tmp_path / "c.toml", text), "--dry-run")
    assert status == 2 and not out and err.count("\n") == 1 and message in err


def test_a_stage_that_a_preset_has_not_can_be_given_one(tmp_path: Path):
    path = toml(tmp_path / "c.toml", 'preset = "bidirectional-1.3b"\n[dmd]\nmodel = "flash-1.3b"')
    assert presets.read(str(path)).stage("dmd") == Stage(model="flash-1.3b")
    with pytest.raises(ValueError, match="both positive"):
        Scale(sharded=True, lora_rank=4)


# Dry runs


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_dry_runs_are_quick_and_say_it_as_json_too(name: str, stage: str, run: Run):
    begun = time.process_time()
    status, out, err = run(stage, "--config", name, "--dry-run", "--json")
    assert time.process_time() - begun < 6, "2 s on a quiet machine"
    made = json.loads(out)
    assert status == 0 and not err
    assert made["memory_bytes"] > 0 and made["step"] == sum(made["parts"].values()) > 0
    assert made["run"] is None or made["run"] >= made["steps"] * made["processes"] * made["step"]


def test_the_table_names_what_is_counted(run: Run):
    status, out, _ = run("dmd", "--config", "flash-1.3b", "--dry-run")
    assert status == 0 and out.startswith("dmd of flash-1.3b: 2.03 billion parameters, 2.03 billion in training")
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert "counted" in lines["critic optimiser"] and "about" in lines["activations"]
    assert "10000" in lines["steps"] and "work of rollout" in lines and "GPU-h" in lines["at 400 TFLOP/s"]


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dmd", "--config", "nothing"), "preset 'nothing' is not known"),
        (("dmd", "--config", "nothing.toml"), "nothing.toml"),
        (("ode", "--config", "teacher-14b"), "teacher-14b has no stage ode; it has bidirectional"),
        (("flow",), "--out is missing"),
        (("dmd", "--config", "flash-1.3b", "--out", "x"), "--data is missing: name a folder of shards"),
        (("dmd", "--config", "flash-1.3b", "--out", "x", "--data", "y", "--minutes", "3"), "--minutes 3: not known"),
        (("dmd", "--config", "flash-1.3b", "--out", "x", "--data", "y"), "y holds no samples"),
        (("dmd", "--config", "flash-1.3b", "--out", "x", "--data", "y", "--resume"), "nothing to resume in x"),
        (("dmd", "--config", "flash-1.3b", "--out", "x", "--data", "y", "--teacher", "z"), "--teacher z: there is no"),
        (("flow", "--out", "x", "--data", "y", "--resume"), "nothing to resume in x"),
        (("flow", "--out", "x", "--data", "y", "--autoencoder", "z"), "--autoencoder z: there is no such file"),
        (("autoencoder", "--out", "x", "--resume"), "nothing to resume in x"),
    ],
)
def test_mistakes_end_in_one_line(
    words: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*words)
    assert status == 2 and err.count("\n") == 1 and message in err, err


def test_files_that_are_wrong_end_in_one_line(run: Run, tmp_path: Path):
    decoder = small_autoencoder(tmp_path / "autoencoder.safetensors")
    empty, words = tmp_path / "empty", ("flow", "--out", tmp_path / "out", "--threads", "1")
    empty.mkdir()
    status, _, err = run(*words, "--data", empty, "--autoencoder", decoder)
    assert status == 2 and f"no clips in {empty}" in err and err.count("\n") == 1
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no model")
    status, _, err = run(*words, "--data", empty, "--autoencoder", bad)
    assert status == 2 and "bad.safetensors is not a readable" in err and err.count("\n") == 1


# A run


def test_the_embedded_stages_run_from_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps, and two more by --resume; the recipe comes from the file, the trainer's own options are taken too."""
    add_small_preset(monkeypatch)
    (tmp_path / "clips").mkdir()
    data = drawn_clips(tmp_path / "clips")
    config = toml(
        tmp_path / "small.toml",
        'preset = "tiny"\n[flow]\nmodel = "small"\n[flow.recipe]\nsteps = 2\ntokens = 200\nheld_out = 1',
    )
    words = ("flow", "--config", config, "--data", data, "--out", tmp_path / "out", "--threads", "1")
    decoder = small_autoencoder(tmp_path / "autoencoder.safetensors")
    assert run(*words, "--autoencoder", decoder)[0] == 0
    status, _, said = run(*words, "--autoencoder", decoder, "--steps", "4")
    assert status and "holds a training: go on with --resume, or give another folder" in said
    assert run(*words, "--autoencoder", decoder, "--resume", "--steps", "4")[0] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "curve.jsonl").read_text().splitlines()]
    assert max(steps) == 4 and load_model(tmp_path / "out" / "transformer.safetensors").config.dim == 32


# Curves and bars


def test_figures_go_to_tensorboard_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[tuple[str, str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((self.folder, name, value, step))

        def flush(self) -> None:
            pass

    board = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    common.record(tmp_path / "with" / "curve.jsonl", {"step": 3, "loss": 0.5, "what": "words"})
    assert written == [(str(tmp_path / "with" / "tensorboard"), "loss", 0.5, 3)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    common.record(tmp_path / "without" / "curve.jsonl", {"step": 4, "loss": 0.25})
    assert len(written) == 1 and (tmp_path / "without" / "curve.jsonl").read_text() == '{"step": 4, "loss": 0.25}\n'


@pytest.mark.parametrize(("terminal", "steps"), [(True, 4), (True, None), (False, 4)])
def test_a_terminal_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, steps: int | None):
    add_small_preset(monkeypatch)
    shown = io.StringIO()
    shown.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", shown)
    state = small_training(tmp_path)
    state.recipe = replace(state.recipe, steps=steps, minutes=1.0)
    with trainer.Curve(state) as curve:
        for _ in range(2):
            curve.note({"latents": 1.0, "loss": 0.0})
            state.steps += 1
            curve.last -= 15
            curve.tick()
        assert curve.bar.n == ((2 if steps else 30) if terminal else 0)
    assert bool(shown.getvalue()) == terminal
