"""`joyavatar convert`: weights of any family this engine runs, as one safetensors file in our layout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import checkpoint, families, known_weights
from ..avatar import build_model, config_of
from .options import dtype_of


def run(args: argparse.Namespace) -> int:
    """Read, check against the model, write; nothing is written unless everything fits."""
    sources, out = [Path(file) for file in args.files], _checked_output(Path(args.out), args.files, args.force)
    tensors, entries = checkpoint.read_merged(sources, args.weights)
    config = config_of(entries, tensors)
    name = _profile(args.profile, families.profile_of(config, entries, sources))
    if families.PROFILES[name].layout != families.layout_of(config):
        fitting = [n for n, p in families.PROFILES.items() if p.layout == families.layout_of(config)]
        raise ValueError(f"--profile {name} has other parts than these files: they may be {', '.join(fitting)}")
    with torch.device("meta"):
        empty = build_model(config)
    checkpoint.load_into(empty, tensors, f"{', '.join(p.name for p in sources)} as transformer")
    dtype = None if args.dtype == "keep" else dtype_of(args.dtype)
    written = {n: t if dtype is None or not t.is_floating_point() else t.to(dtype) for n, t in tensors.items()}
    metadata = {
        "model_config": checkpoint.config_to_json(config),
        "profile": name,
        "licence": licence_note(name),
        "sources": json.dumps([source_of(path) for path in sources]),
    }
    checkpoint.write(out, written, metadata)
    size = sum(t.numel() * t.element_size() for t in written.values()) / 2**30
    print(f"{out}: {families.PROFILES[name].what}; {len(written)} tensors, {size:.2f} GiB\n{metadata['licence']}")
    return 0


def source_of(path: Path) -> dict[str, str | int]:
    """Name, bytes and SHA-256 of a file."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}


def licence_note(profile: str) -> str:
    """What is known of the licence of a profile's weights; converting changes nothing in it."""
    known = families.PROFILES[profile].known
    if not known:
        return "the licence of the files this was made from"
    names = "; ".join(f"{licence.name} ({licence.read_in})" for licence in known_weights.known(known).licences)
    return " ".join(filter(None, (f"{known}: {names}.", known_weights.licence_warning(known))))


def _profile(asked: str | None, found: str) -> str:
    if asked is not None and asked not in families.PROFILES:
        raise ValueError(f"--profile {asked} is not known; known: {', '.join(families.PROFILES)}")
    return asked or found


def _checked_output(out: Path, files: Sequence[str], force: bool) -> Path:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must be called .safetensors: that is what is written")
    if any(out.resolve() == Path(file).resolve() for file in files):
        raise ValueError(f"{out} is one of the files that are read: give another name")
    if out.exists() and not force:
        raise ValueError(f"{out} is there already: give another name, or --force to replace it")
    return out
