"""Weights on disk: safetensors with metadata, read strictly; foreign names are translated at this edge.

Every key of a file is accounted for: it fills a parameter or the error names it. `.pt` and `.ckpt` files of public
families are read with `torch.load(weights_only=True)` only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import struct
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

TRANSLATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    # family: (pattern, replacement), applied in order to every key
    "joyavatar": (),
    "wan": (),
    "comfyui": ((r"^(model\.)?diffusion_model\.", ""),),
    "self-forcing": ((r"_fsdp_wrapped_module\.", ""), (r"^model\.", "")),
    "fantasytalking": ((r"^audio_processor\.", ""),),
}
"""How the key names of each family become ours."""


class CheckpointError(ValueError):
    """A file that cannot be used, with the reason in one line."""


def translate(tensors: Mapping[str, Tensor], family: str) -> Tensors:
    """Rename the keys of a family to ours. ValueError for an unknown family or two keys that fall together."""
    if family not in TRANSLATIONS:
        raise CheckpointError(f"family {family!r} is not known; known: {', '.join(TRANSLATIONS)}")
    out: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in TRANSLATIONS[family]:
            name = re.sub(old, new, name)
        if name in out:
            raise CheckpointError(f"two keys of the file become {name!r}: is this really a {family} checkpoint?")
        out[name] = tensor
    return out


def detect_family(names: typing.Iterable[str]) -> str:
    """Family of a checkpoint by its key names."""
    names = list(names)
    if any("diffusion_model." in n for n in names):
        return "comfyui"
    if any(n.startswith("model.") for n in names):
        return "self-forcing"
    if any(n.startswith("audio_processor.") for n in names):
        return "fantasytalking"
    return "wan"


def read(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a checkpoint file.

    Raises CheckpointError for a missing, empty, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .safetensors file")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return _read_pickle(path), {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: _aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is not a readable safetensors file ({error}); fetch it again") from error


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file through a temporary name, so that the path never holds half a file.

    Raises OSError if it cannot be written; an older file at the path is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")  # one name: a kill leaves at most one file behind
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(mode)  # safetensors makes files that nobody else can read
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_into(module: Module, tensors: Mapping[str, Tensor], what: str) -> Module:
    """Fill a module, strictly. The module may be on the meta device; tensors keep their dtype.

    Raises CheckpointError naming missing, left-over and misshapen keys.
    """
    own = module.state_dict()
    problems = _listed("missing", sorted(own.keys() - tensors.keys()))
    problems += _listed("left over", sorted(tensors.keys() - own.keys()))
    wrong = [
        f"{n} {tuple(tensors[n].shape)} instead of {tuple(t.shape)}"
        for n, t in own.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    problems += _listed("of another shape", wrong)
    if problems:
        raise CheckpointError(f"{what} does not fit: " + "; ".join(problems))
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


def read_merged(paths: Sequence[str | Path]) -> tuple[Tensors, dict[str, str]]:
    """Tensors of several files under our names, and their metadata; the last file that has an entry wins.

    Raises CheckpointError if two files hold the same tensor.
    """
    merged: Tensors = {}
    metadata: dict[str, str] = {}
    for path in paths:
        tensors, entries = read(path)
        tensors = translate(tensors, detect_family(tensors))
        twice = sorted(merged.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{Path(path).name} repeats tensors of another file: {_listed('twice', twice)[0]}")
        merged |= tensors
        metadata |= entries
    return merged, metadata


def load_module(
    paths: str | Path | Sequence[str | Path], build: Callable[[dict[str, str], Tensors], Module], what: str
) -> Module:
    """Read a file, or several as one, build the module described there on the meta device and fill it.

    build: from (metadata, translated tensors) to an empty module.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    tensors, metadata = read_merged(paths)
    with torch.device("meta"):
        module = build(metadata, tensors)
    return load_into(module, tensors, f"{', '.join(Path(p).name for p in paths)} as {what}").eval()


def config_to_json(config: Any) -> str:
    """A frozen config dataclass as JSON for metadata."""
    return json.dumps(dataclasses.asdict(config))


Config = TypeVar("Config")


def config_from_json(kind: type[Config], text: str) -> Config:
    """The config dataclass back from its JSON. CheckpointError for unknown or missing keys or anything else."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise TypeError(f"{text[:40]!r} is not a JSON object")
        return _build(kind, value)
    except (TypeError, ValueError) as error:  # of JSON, or of the config itself
        raise CheckpointError(f"the file's {kind.__name__} cannot be read: {error}") from error


def _build(kind: Any, value: Any) -> Any:
    """JSON value -> value of an annotated type: nested dataclasses, tuples, optionals."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise TypeError(f"unknown keys {sorted(unknown)}")
        return kind(**{k: _build(hints[k], v) for k, v in value.items()})  # pyright: ignore[reportCallIssue]
    if typing.get_origin(kind) in (typing.Union, types.UnionType) and value is not None:
        return _build(next(a for a in typing.get_args(kind) if a is not type(None)), value)
    return tuple(value) if isinstance(value, list) else value


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address as torch would choose it: on a CPU the bits of a matrix product depend on that."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _listed(what: str, names: list[str], most: int = 5) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"]


# what torch's unpickler runs into on bytes that are no pickle
_UNREADABLE = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, AssertionError,
               struct.error)  # fmt: skip


def _read_pickle(path: Path) -> Tensors:
    """A public .pth file: a state dict, possibly one level down under a well-known name."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path.name} holds more than weights: convert it to safetensors") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path.name} cannot be read as weights only ({error})") from error
    for name in ("generator_ema", "generator", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if isinstance(content, dict) and content and all(isinstance(v, dict) for v in content.values()):
        # FantasyTalking's file
        content = {f"{part}.{name}": v for part, inner in content.items() for name, v in inner.items()}
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path.name} is not a plain dictionary of tensors")
    return content
