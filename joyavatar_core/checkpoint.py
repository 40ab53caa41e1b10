"""Weights on disk: safetensors with metadata, read strictly; foreign names are translated at this edge.

Every key of a file is accounted for: it fills a parameter or the error names it. `.pt` and `.ckpt` files of public
families are read with `torch.load(weights_only=True)` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import struct
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import lora

Tensors = dict[str, Tensor]
_PIECE = 1 << 24  # bytes of a file read at once
Module = TypeVar("Module", bound=nn.Module)

TRANSLATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    # family: (pattern, replacement), applied in order to every key
    "joyavatar": (),
    "wan": (),
    "comfyui": ((r"^(model\.)?diffusion_model\.", ""),),
    "self-forcing": (
        (r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", ""),
        (r"^(module\.)*((generator_ema|generator)\.)?(module\.)*(model\.)?", ""),
    ),
    "fantasytalking": ((r"^audio_processor\.", ""),),
}
"""How the key names of each family become ours."""
_WRAPPED = ("model.", "module.", "generator.", "generator_ema.", "_fsdp_wrapped_module.", "_orig_mod.")

Variant = Literal["ema", "plain"]
"""Which of a trainer's two sets of weights is taken, where a file holds both: the averaged ones, or not."""
_VARIANTS: dict[Variant, tuple[str, str]] = {
    "ema": ("generator_ema", "generator"),
    "plain": ("generator", "generator_ema"),
}


PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
"""Ends of the names of files that torch's own reader writes: read as weights only, nothing in them is executed."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_SCALED_REST = (".scale_input", ".input_scale", ".comfy_quant")
SCALES = (*_WEIGHT_SCALES, *_SCALED_REST)
"""Ends of the names of what goes with a matrix in scaled fp8."""


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
    if any(n.startswith(_WRAPPED) for n in names):
        return "self-forcing"
    if any(n.startswith("audio_processor.") for n in names):
        return "fantasytalking"
    return "wan"


def read(path: str | Path, variant: Variant = "ema") -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a checkpoint file.

    variant: of a file that holds a generator twice; the other set is not returned, nor a critic beside them.
    Raises CheckpointError for a missing, empty, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a .safetensors file")
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path.name} is GGUF, which only ComfyUI with the node pack ComfyUI-GGUF reads")
    if path.suffix in PICKLES:
        return _read_pickle(path, variant), {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: _aligned(file.get_tensor(name)) for name in _chosen(file.keys(), variant)}
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is not a readable safetensors file ({error}); fetch it again") from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


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
    _check_fit(module.state_dict(), tensors, what)
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module


def load_stored(
    module: Module, twin: nn.Module, tensors: Mapping[str, Tensor], what: str, beside: tuple[str, ...] = ()
) -> Module:
    """Fill a module whose layers keep matrices in a form of their own (the host's, for fp8 with scales and for GGUF).

    twin: the same of torch's layers, on the meta device, which says the names and shapes there must be. beside: ends
    of the names of what such a layer takes besides. Raises CheckpointError as `load_into`.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(beside)} if beside else tensors
    _check_fit(twin.state_dict(), own, what)
    module.load_state_dict(dict(tensors), strict=False, assign=True)
    return module


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
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


def is_scaled(path: str | Path) -> bool:
    """Whether a safetensors file has matrices in scaled fp8 (`multiplied_out`); only its header is read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return any(name.endswith(_WEIGHT_SCALES) for name in file.keys())  # noqa: SIM118
    except (safetensors.SafetensorError, OSError):
        return False


def read_merged(paths: Sequence[str | Path], variant: Variant = "ema") -> tuple[Tensors, dict[str, str]]:
    """Tensors of several files under our names, and their metadata; the last file that has an entry wins.

    Matrices in scaled fp8 are multiplied out, and adapters (LoRA), in files of their own or inside, put in.
    Raises CheckpointError if two files hold the same tensor, or an adapter belongs to another model.
    """
    merged: Tensors = {}
    metadata: dict[str, str] = {}
    adapters: list[tuple[str, Tensors]] = []
    for path in paths:
        name = Path(path).name
        tensors, entries = read(path, variant)
        tensors = multiplied_out(translate(tensors, detect_family(tensors)))
        if lora.is_adapter(tensors):
            adapters.append((name, tensors))
            continue
        if lora.is_inside(tensors):
            with _said_of(name):
                tensors, entries = lora.freed(tensors), {**entries, "adapters_inside": name}
        twice = sorted(merged.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{name} repeats tensors of another file: {_listed('twice', twice)[0]}")
        merged |= tensors
        metadata |= entries
    for name, adapter in adapters:
        if not merged:
            raise CheckpointError(f"{name} is a LoRA: give the file of the model it belongs to as well")
        with _said_of(name):
            merged = lora.put_in(merged, adapter)
    return merged, metadata


@contextlib.contextmanager
def _said_of(name: str) -> Iterator[None]:
    """ValueErrors become CheckpointErrors of a file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def multiplied_out(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Matrices stored as fp8 beside one scale for each, as the host's files have them, in a dtype that needs none.

    Both of the host's spellings: `NAME.scale_weight` with a marker `scaled_fp8`, and `NAME.weight_scale` with
    `NAME.comfy_quant`. What they say of the inputs concerns multiplication in fp8 only. Other tensors stay.
    Raises CheckpointError for a scale that is no single number (a finer format), or without its matrix.
    """
    scales = {name: name.removesuffix(end) for name in tensors for end in _WEIGHT_SCALES if name.endswith(end)}
    out = {n: t for n, t in tensors.items() if n not in scales and not n.endswith(_SCALED_REST) and n != "scaled_fp8"}
    for name, module in scales.items():
        weight, scale = f"{module}.weight", tensors[name]
        if weight not in out:
            raise CheckpointError(f"{name} scales {weight}, which is not there")
        if scale.numel() != 1 or (out[weight].element_size() == 1 and out[weight].dtype not in FP8):
            raise CheckpointError(
                f"{weight} is quantised as {out[weight].dtype} with {scale.numel()} scales: only fp8 with one scale "
                "for a matrix is read; take the fp8_scaled or the bf16 file"
            )
        if out[weight].dtype in FP8:
            out[weight] = (out[weight].float() * scale.float()).to(dtype)
    return out


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
    return tuple(_build(object, item) for item in value) if isinstance(value, list) else value


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


def _chosen(names: Iterable[str], variant: Variant) -> list[str]:
    """Names of one set of weights, of a file that holds both side by side."""
    names = list(names)
    ema = [n for n in names if n.startswith("generator_ema.")]
    plain = [n for n in names if n.startswith("generator.")]
    if not (ema and plain):
        return names
    return ema if variant == "ema" else plain


def _read_pickle(path: Path, variant: Variant) -> Tensors:
    """A public .pth file: a state dict, possibly one level down under a well-known name."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "holds more than weights, and no code of a file is run here: take a safetensors file instead"
        raise CheckpointError(f"{path.name} {reason}") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path.name} cannot be read as weights only ({error})") from error
    for name in (*_VARIANTS[variant], "generator_lora", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if isinstance(content, dict) and content and all(isinstance(v, dict) for v in content.values()):
        # FantasyTalking's file
        content = {f"{part}.{name}": v for part, inner in content.items() for name, v in inner.items()}
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path.name} is not a plain dictionary of tensors")
    return content
