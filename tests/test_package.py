"""What goes into the package, and what is too large for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from joyavatar_core import checkpoint
from joyavatar_core.avatar import ASSETS, EMBEDDED_FILES, load_light_autoencoder, load_model
from joyavatar_core.config import MODELS
from joyavatar_core.manner import HEARD
from joyavatar_core.measures.mouth_reader import WEIGHTS, load_mouth_reader
from joyavatar_core.training import package, trainer

from .small_training import HEARING, PRESET, add_small_preset, small_autoencoder, small_training


def test_the_package_takes_files_that_load_and_keeps_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)
    state = small_training(tmp_path)
    trainer.save(state)
    sources = (small_autoencoder(tmp_path / "autoencoder.safetensors"), tmp_path / "transformer.safetensors", WEIGHTS)
    out = tmp_path / "assets"
    out.mkdir()
    package.package(*sources, out)
    model = load_model(out / EMBEDDED_FILES["model"])
    assert model.config == state.model.config
    assert load_light_autoencoder(out / EMBEDDED_FILES["autoencoder"]).latent_channels == 16
    load_mouth_reader(out / WEIGHTS.name)
    monkeypatch.setattr(package, "TOTAL_MB", 0.5)
    with pytest.raises(checkpoint.CheckpointError, match=r"tiny.safetensors .* at most 16 MB a file and 0.5 MB in all"):
        package.package(*sources, out)


def test_autoencoders_are_mixed_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)
    trainer.save(small_training(tmp_path))
    ours, theirs = (small_autoencoder(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    out = tmp_path / "assets"
    out.mkdir()
    files = ["--transformer", str(tmp_path / "transformer.safetensors"), "--reader", str(WEIGHTS), "--out", str(out)]
    package.main(["--autoencoder", str(ours), "--blend-autoencoder", f"{theirs}=0.25", *files])
    found, one, other = (checkpoint.read(path)[0] for path in (out / EMBEDDED_FILES["autoencoder"], ours, theirs))
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), 0.75 * one[name] + 0.25 * other[name], atol=5e-3), name


def test_what_is_in_the_package_keeps_the_limits_and_says_where_it_comes_from():
    sizes = [path.stat().st_size / 1e6 for path in ASSETS.glob("*.safetensors")]
    assert len(sizes) == 3 and max(sizes) <= package.FILE_MB and sum(sizes) <= package.TOTAL_MB
    for path in ASSETS.glob("*.safetensors"):
        _, metadata = checkpoint.read(path)
        told = " ".join(metadata.values())
        assert all(word in told for word in ("steps", "seed", "minutes")), path.name


def test_readings_of_the_ears_may_be_stretched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)
    state = small_training(tmp_path)
    trainer.save(state)
    source, out = tmp_path / "transformer.safetensors", tmp_path / "out.safetensors"
    package.stretch(source, {"open": (2.0, -0.5), "head_y": (0.5, 0.25)}, out)
    before, after = (load_model(path).float().proj_model for path in (source, out))
    tokens = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(0))
    read, stretched = (ears.read(tokens)[0] for ears in (before, after))  # pyright: ignore
    for i, name in enumerate(HEARD):
        gain, offset = {"open": (2.0, -0.5), "head_y": (0.5, 0.25)}.get(name, (1.0, 0.0))
        assert torch.allclose(stretched[:, i], gain * read[:, i] + offset, atol=2e-2)
    assert json.loads(checkpoint.read(out)[1]["readings"]) == {"open": [2.0, -0.5], "head_y": [0.5, 0.25]}
    with pytest.raises(ValueError, match="--reading gaze_x: not heard"):
        package.stretch(source, {"gaze_x": (1.0, 0.0)}, out)


def test_a_blend_with_one_that_was_never_told_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_small_preset(monkeypatch)
    state = small_training(tmp_path / "now")
    state.out.mkdir()
    trainer.save(state)
    monkeypatch.setitem(MODELS, "small", replace(PRESET, audio=replace(HEARING, limits=())))
    old = small_training(tmp_path / "old")
    old.out.mkdir()
    trainer.save(old)
    path = package.blend(
        state.out / "transformer.safetensors", {old.out / "transformer.safetensors": 0.5}, tmp_path / "both.safetensors"
    )
    assert load_model(path).config == state.model.config


def test_a_blend_is_the_weighted_sum(tmp_path: Path):
    kinds = {"student": 2.0, "teacher": 1.0, "other": 5.0}
    for name, value in kinds.items():
        checkpoint.write(tmp_path / f"{name}.safetensors", {"a": torch.full((3,), value)}, {"recipe": name})
    student, teacher, other, out = (tmp_path / f"{name}.safetensors" for name in (*kinds, "out"))
    tensors, metadata = checkpoint.read(package.blend(student, {teacher: 0.25}, out))
    assert tensors["a"].tolist() == [1.75] * 3
    assert metadata["recipe"] == "student" and [b["weight"] for b in json.loads(metadata["blend"])] == [0.25]
    tensors, metadata = checkpoint.read(package.blend(out, {other: 0.5, teacher: -0.5}, tmp_path / "again"))
    assert tensors["a"].tolist() == [3.75] * 3
    assert [b["weight"] for b in json.loads(metadata["blend"])] == [0.25, 0.5, -0.5]
    checkpoint.write(teacher, {"a": torch.ones(4)}, {})
    with pytest.raises(checkpoint.CheckpointError, match="other tensors than student"):
        package.blend(student, {teacher: 0.5}, out)
    with pytest.raises(ValueError, match=r"teacher\.safetensors=2"):
        package.blend(student, {teacher: 2.0}, out)
