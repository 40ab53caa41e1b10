"""Weights on disk: strict both ways, foreign names translated, and errors that say what is wrong with which file."""

from __future__ import annotations

import json
import pickle
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from joyavatar_core import checkpoint
from joyavatar_core.autoencoder import AUTOENCODERS, AutoencoderConfig
from joyavatar_core.avatar import build_model, load_light_autoencoder, load_model
from joyavatar_core.checkpoint import CheckpointError
from joyavatar_core.config import MODELS, ModelConfig, S2VConfig
from joyavatar_core.model import JoyAvatarDiT

from .helpers import SMALL

OURS = {
    "patch_embedding.weight": torch.zeros(1),
    "blocks.0.self_attn.q.weight": torch.ones(2),
    "head.head.weight": torch.ones(3),
}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def refused(path: Path) -> str:
    """The message about a file; one line, naming it."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    message = " ".join(str(caught.value).split())
    assert path.name in message
    return message


# names


@pytest.mark.parametrize(
    ("family", "foreign"),
    [
        ("wan", "{}"),
        ("comfyui", "diffusion_model.{}"),
        ("comfyui", "model.diffusion_model.{}"),
        ("self-forcing", "model.{}"),
        ("self-forcing", "model._fsdp_wrapped_module.{}"),
        ("fantasytalking", "audio_processor.{}"),
    ],
)
def test_names_of_every_family(family: str, foreign: str) -> None:
    theirs = {foreign.format(name): tensor for name, tensor in OURS.items()}
    assert checkpoint.detect_family(theirs) == family
    assert checkpoint.translate(theirs, family) == OURS


@pytest.mark.parametrize("family", list(checkpoint.TRANSLATIONS))
@pytest.mark.parametrize("name", [n for n in MODELS if n != "tiny"])
def test_our_names_pass_every_table(family: str, name: str) -> None:
    """A table removes what its family puts in front, and nothing inside a name such as proj_model.proj.weight."""
    with torch.device("meta"):
        config = MODELS[name]
        own = build_model(replace(config, layers=1, s2v=config.s2v and S2VConfig((0,)))).state_dict()
    assert checkpoint.translate(own, family).keys() == own.keys()


def test_wrapped_parts_are_unwrapped() -> None:
    """Averaged weights of Self-Forcing carry the wrapper's name inside too."""
    name = "model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.ffn.0.weight"
    assert list(checkpoint.translate({name: torch.ones(1)}, "self-forcing")) == ["blocks.3.ffn.0.weight"]
    assert list(checkpoint.translate({"model.proj_model.proj.weight": torch.ones(1)}, "self-forcing")) == [
        "proj_model.proj.weight"
    ]


def test_two_names_that_fall_together() -> None:
    theirs = {"model.diffusion_model.a": torch.ones(1), "diffusion_model.a": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="two keys of the file become 'a'"):
        checkpoint.translate(theirs, "comfyui")


def test_unknown_family() -> None:
    with pytest.raises(CheckpointError, match=r"'nobody' is not known; known: joyavatar, wan, comfyui"):
        checkpoint.translate(OURS, "nobody")


# strict loading


def test_loading_fills_a_module_on_meta() -> None:
    torch.manual_seed(0)
    source = small().bfloat16()
    with torch.device("meta"):
        empty = small()
    filled = checkpoint.load_into(empty, source.state_dict(), "it")
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    assert torch.equal(filled(x), source(x))


def spoiled(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = dict(small().state_dict())
    for name, tensor in changes.items():
        name = name.replace("_", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (spoiled(**{"0_bias": None}), "it does not fit: 1 missing: 0.bias"),
        (spoiled(extra=torch.ones(1)), "it does not fit: 1 left over: extra"),
        (spoiled(**{"1_bias": torch.ones(7)}), r"it does not fit: 1 of another shape: 1.bias \(7,\) instead of \(2,\)"),
        (spoiled(**{"0_bias": None}, more=torch.ones(1)), "1 missing: 0.bias; 1 left over: more"),
        ({}, "4 missing: 0.bias, 0.weight, 1.bias, 1.weight"),
        (spoiled(**{f"n{i}": torch.ones(1) for i in range(9)}), "9 left over: n0, n1, n2, n3, n4 and 4 more"),
    ],
)
def test_every_key_is_accounted_for(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load_into(small(), tensors, "it")


def test_module_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = JoyAvatarDiT(SMALL)
    metadata = {"model_config": checkpoint.config_to_json(SMALL)}
    checkpoint.write(tmp_path / "own.safetensors", model.state_dict(), metadata)
    loaded = load_model(tmp_path / "own.safetensors")
    assert loaded.config == SMALL and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    prefixed = {f"diffusion_model.{n}": t for n, t in model.state_dict().items()}
    checkpoint.write(tmp_path / "host.safetensors", prefixed, metadata)
    assert load_model(tmp_path / "host.safetensors").state_dict().keys() == model.state_dict().keys()


def test_files_read_as_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "a.safetensors", {"model.x": torch.ones(1)}, {"who": "a", "only": "a"})
    checkpoint.write(tmp_path / "b.safetensors", {"audio_processor.y": torch.ones(1)}, {"who": "b"})
    tensors, metadata = checkpoint.read_merged([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert set(tensors) == {"x", "y"} and metadata == {"who": "b", "only": "a"}
    with pytest.raises(CheckpointError, match=r"a\.safetensors repeats tensors of another file: 1 twice: x"):
        checkpoint.read_merged([tmp_path / "a.safetensors"] * 2)


def test_wrong_kind_of_file_is_named(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "odd.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"not a Wan2\.1-shaped transformer: 'patch_embedding.weight' is missing"):
        load_model(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors as light autoencoder does not fit: \d+ missing"):
        load_light_autoencoder(tmp_path / "odd.safetensors")
    flat = {"patch_embedding.weight": torch.ones(8, 4), "blocks.0.ffn.0.weight": torch.ones(2, 2)}
    checkpoint.write(tmp_path / "flat.safetensors", flat, {})
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight is \[8, 4\]"):
        load_model(tmp_path / "flat.safetensors")


# files that cannot be used


def test_no_such_file(tmp_path: Path) -> None:
    assert "no checkpoint at" in refused(tmp_path / "none.safetensors")
    assert "no checkpoint at" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"hello world, this is text\n" * 100])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".ckpt", ".bin"])
def test_foreign_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    refused(path)


@given(share=st.floats(0, 0.999))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_truncated_files(tmp_path_factory: pytest.TempPathFactory, kind: str, share: float) -> None:
    path = tmp_path_factory.mktemp("cut") / f"cut.{kind}"
    if kind == "pth":
        torch.save(small().state_dict(), path)
    else:
        checkpoint.write(path, small().state_dict(), {})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("content", [{"a": Harm()}, Harm()])
def test_pickles_that_run_code_are_refused(tmp_path: Path, content: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "a.pth")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    assert "holds more than weights" in refused(tmp_path / "a.pth")
    refused(tmp_path / "b.ckpt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, 3, {"generator": {"a": "text"}}])
def test_pickles_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pth")
    assert "not a plain dictionary of tensors" in refused(tmp_path / "odd.pth")


@pytest.mark.parametrize("level", [None, "generator", "generator_ema", "state_dict", "model"])
def test_public_pickles(tmp_path: Path, level: str | None) -> None:
    tensors = {"a": torch.ones(2)}
    torch.save(tensors if level is None else {level: tensors, "step": 3}, tmp_path / "w.pt")
    read, metadata = checkpoint.read(tmp_path / "w.pt")
    assert torch.equal(read["a"], tensors["a"]) and metadata == {}


def test_fantasytalking_pickle(tmp_path: Path) -> None:
    """Two dictionaries side by side; the safetensors variant has their names as prefixes."""
    name = "blocks.0.cross_attn.processor.k_proj.weight"
    content = {"proj_model": {"proj.weight": torch.ones(2)}, "audio_processor": {name: torch.ones(3)}}
    torch.save(content, tmp_path / "audio.ckpt")
    tensors, _ = checkpoint.read_merged([tmp_path / "audio.ckpt"])
    assert set(tensors) == {"proj_model.proj.weight", name}


# writing


def test_write_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(3, 4, dtype=torch.bfloat16), "turned": torch.arange(6.0).view(2, 3).T}
    path = tmp_path / "new folder" / "w.safetensors"
    checkpoint.write(path, tensors, {"note": "öß"})
    read, metadata = checkpoint.read(path)
    assert metadata == {"note": "öß"} and all(torch.equal(read[n], tensors[n]) for n in tensors)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.write(path, {"a": torch.ones(2)}, {})
    shared = torch.zeros(4)
    for broken in ({"a": torch.zeros(2, device="meta")}, {"a": shared, "b": shared}):
        with pytest.raises((RuntimeError, NotImplementedError)):
            checkpoint.write(path, broken, {})
    assert torch.equal(checkpoint.read(path)[0]["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_unwritable_place_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        checkpoint.write(tmp_path / "file" / "w.safetensors", {"a": torch.ones(2)}, {})


def test_full_disk_is_an_os_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "w.safetensors"
    checkpoint.write(path, {"a": torch.ones(2)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError):
            checkpoint.write(path, {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(checkpoint.read(path)[0]["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# configs


@pytest.mark.parametrize("name", list(MODELS))
def test_model_config_round_trip(name: str) -> None:
    text = checkpoint.config_to_json(MODELS[name])
    assert checkpoint.config_from_json(ModelConfig, text) == MODELS[name]


@pytest.mark.parametrize("name", list(AUTOENCODERS))
def test_autoencoder_config_round_trip(name: str) -> None:
    config = replace(AUTOENCODERS[name], latent_mean=(0.5, 1.5), latent_std=(2.0, 3.0))
    assert checkpoint.config_from_json(AutoencoderConfig, checkpoint.config_to_json(config)) == config


@dataclass(frozen=True)
class Old:
    dim: int
    forgotten: int = 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (checkpoint.config_to_json(Old(8)), r"unknown keys \['forgotten'\]"),
        ('{"dim": 8}', "missing"),
        ('{"dim": 8', "cannot be read"),
        ("", "cannot be read"),
        ("[1, 2]", "not a JSON object"),
        ("null", "not a JSON object"),
    ],
)
def test_unusable_configs(text: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        checkpoint.config_from_json(ModelConfig, text)


def test_unknown_keys_inside_a_config() -> None:
    value = asdict(MODELS["flash-1.3b"])
    value["audio"]["colour"] = 1
    with pytest.raises(CheckpointError, match=r"unknown keys \['colour'\]"):
        checkpoint.config_from_json(ModelConfig, json.dumps(value))
