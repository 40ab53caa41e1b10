"""`joyavatar doctor --models`: which weights lie in the folders given."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from joyavatar_core.cli import doctor
from joyavatar_core.known_weights import KNOWN


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measuring the machine."""
    monkeypatch.setattr(doctor, "_machine", lambda: iter(()))


def put(folder: Path, name: str) -> Path:
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"")
    return place


def said(capsys: pytest.CaptureFixture, *folders: Path) -> list[str]:
    assert doctor.run(argparse.Namespace(models=[str(f) for f in folders])) == 0
    return capsys.readouterr().out.splitlines()


def line_of(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith("weights") and line.split()[2] == name)


def test_without_folders_nothing_is_looked_for(capsys: pytest.CaptureFixture) -> None:
    for args in (argparse.Namespace(models=None), argparse.Namespace()):
        assert doctor.run(args) == 0
        assert "give --models FOLDER" in capsys.readouterr().out


def test_what_is_there_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In ComfyUI's folders, in a plain folder, and half of a system."""
    models, plain = tmp_path / "models", tmp_path / "plain"
    vae = put(models, "vae/wan_2.1_vae.safetensors")
    talk = put(plain, "livetalk-1.3b-v0.1.safetensors")
    put(models, "loras/liveavatar.safetensors")
    lines = said(capsys, models, plain)
    assert line_of(lines, "wan-vae") == f"weights  found  {'wan-vae':24s} {vae}"
    assert str(talk) in line_of(lines, "livetalk") and line_of(lines, "livetalk").split()[1] == "found"
    assert "contradicts itself" in lines[lines.index(line_of(lines, "livetalk")) + 1]
    partly = lines.index(line_of(lines, "live-avatar"))
    assert lines[partly].split()[1] == "partly"
    assert lines[partly + 1].strip() == "missing diffusion_models/wan2.2_s2v_14B_bf16.safetensors"
    assert line_of(lines, "taehv").split()[1] == "none"
    assert {line.split()[2] for line in lines if line.startswith("weights")} == KNOWN.keys()


def test_files_of_other_names_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = put(tmp_path, "diffusion_models/LiveTalk_fp8.safetensors")
    put(tmp_path, "diffusion_models/something_else.safetensors")
    put(tmp_path, "diffusion_models/livetalk.txt")
    alike = [line for line in said(capsys, tmp_path) if line.startswith("weights  alike")]
    assert len(alike) == 1 and str(small) in alike[0] and "CC BY-NC-SA 4.0" in alike[0]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--models .*none: no such folder"):
        doctor.run(argparse.Namespace(models=[str(tmp_path / "none")]))
