"""`joyavatar convert`: any family to one file in our layout, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from joyavatar_core import checkpoint, families
from joyavatar_core.avatar import load_profiled
from joyavatar_core.cli.main import main

from .test_families import PACKED, PEFT, TEXT, Harm, adapter, saved, scaled, weights


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What the command says, in one line, when it fails; it wrote nothing."""
    folder = Path(str(words[0])).parent
    before = sorted(folder.iterdir())
    assert main(["convert", *map(str, words)]) == 2
    assert sorted(folder.iterdir()) == before
    said = capsys.readouterr().err
    assert said.startswith("joyavatar: ") and said.count("\n") == 1
    return said


def test_base_and_adapter_become_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, (parts, updates) = weights(TEXT), adapter(PEFT, TEXT)
    torch.save({"generator": {f"model.{n}": t for n, t in base.items()}}, tmp_path / "longlive_base.pt")
    torch.save({"generator_lora": parts}, tmp_path / "longlive_lora.pt")
    sources = [tmp_path / "longlive_base.pt", tmp_path / "longlive_lora.pt"]
    out = tmp_path / "mine.safetensors"
    assert main(["convert", *map(str, sources), str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: LongLive: silent text to video; {len(base)} tensors")
    tensors, metadata = checkpoint.read(out)
    assert tensors.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.allclose(tensors[name], tensor + updates.get(name, torch.zeros(())), atol=1e-6)
    assert metadata["profile"] == "longlive" and "Apache-2.0" in metadata["licence"]
    assert json.loads(metadata["sources"]) == [
        {"name": p.name, "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sources
    ]
    model, profile = load_profiled(out)  # under a name that says nothing
    assert model.config == TEXT and profile == families.PROFILES["longlive"]


def test_which_weights_and_precision(tmp_path: Path) -> None:
    ema, plain = weights(PACKED, 1), weights(PACKED, 2)
    torch.save({"generator": plain, "generator_ema": ema}, tmp_path / "both.pt")
    for words, wanted in (([], ema), (["--weights", "plain", "--dtype", "bfloat16"], plain)):
        out = tmp_path / f"{len(words)}.safetensors"
        assert main(["convert", str(tmp_path / "both.pt"), str(out), *words]) == 0
        tensors, _ = checkpoint.read(out)
        dtype = torch.bfloat16 if words else torch.float32
        assert all(torch.equal(t, wanted[n].to(dtype)) and t.dtype == dtype for n, t in tensors.items())


def test_fp8_is_multiplied_out_and_the_profile_can_be_said(tmp_path: Path) -> None:
    stored, meant = scaled(PACKED, "scale_weight")
    source, out = saved(tmp_path / "a.safetensors", stored), tmp_path / "out.safetensors"
    assert main(["convert", str(source), str(out), "--profile", "avatarforcing"]) == 0
    tensors, metadata = checkpoint.read(out)
    assert all(torch.equal(t, meant[n]) for n, t in tensors.items()) and tensors.keys() == meant.keys()
    assert metadata["profile"] == "avatarforcing" and "contradicts itself" in metadata["licence"]
    assert checkpoint.config_from_json(type(PACKED), metadata["model_config"]) == PACKED
    again = tmp_path / "again.safetensors"  # its own layout is as good a source
    assert main(["convert", str(out), str(again)]) == 0
    assert checkpoint.read(again)[1]["profile"] == "avatarforcing"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "a.safetensors", weights(TEXT))
    out = tmp_path / "out.safetensors"
    assert "must be called .safetensors" in refused(capsys, source, tmp_path / "out.pt")
    assert "is one of the files that are read" in refused(capsys, source, source)
    assert "--profile nobody is not known; known: embedded" in refused(capsys, source, out, "--profile", "nobody")
    said = refused(capsys, source, out, "--profile", "livetalk")
    assert "they may be self-forcing, longlive, rolling-forcing" in said
    assert "no checkpoint at" in refused(capsys, tmp_path / "none.safetensors", out)
    broken = weights(TEXT)
    del broken["blocks.1.norm3.bias"]
    assert "1 missing: blocks.1.norm3.bias" in refused(capsys, saved(tmp_path / "b.safetensors", broken), out)
    saved(out, {"x": torch.ones(1)})
    assert "is there already" in refused(capsys, source, out)
    assert main(["convert", str(source), str(out), "--force"]) == 0 and len(checkpoint.read(out)[0]) > 1


def test_pickle_with_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator": Harm(tmp_path / "harm")}, tmp_path / "a.pt")
    assert "holds more than weights" in refused(capsys, tmp_path / "a.pt", tmp_path / "out.safetensors")


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after half of it: no part of a file stays, and an older one is as it was."""
    source = saved(tmp_path / "a.safetensors", weights(TEXT))
    older = saved(tmp_path / "out.safetensors", {"x": torch.ones(1)}).read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    assert "No space left" in refused(capsys, source, tmp_path / "out.safetensors", "--force")
    assert (tmp_path / "out.safetensors").read_bytes() == older
