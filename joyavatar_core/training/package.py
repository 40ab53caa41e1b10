"""Puts trained weights into the package: bfloat16, our metadata, the names the engine looks for.

    python -m joyavatar_core.training.package --autoencoder FILE --transformer FILE --reader FILE [--out DIR]

Metadata (recipe, data seed, steps, figures) comes along from the training's own files.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import checkpoint
from ..avatar import ASSETS, EMBEDDED_FILES, load_light_autoencoder, load_model
from ..measures.mouth_reader import WEIGHTS, load_mouth_reader

log = logging.getLogger(__name__)

FILE_MB, TOTAL_MB = 16, 20
"""No single file of the package may be larger, nor all of them together."""


def package(autoencoder: Path, transformer: Path, reader: Path, out: Path = ASSETS) -> None:
    """Write the files of the embedded model. CheckpointError if one is not what it should be, or they are too large."""
    load_light_autoencoder(autoencoder)
    load_model(transformer)
    load_mouth_reader(reader)
    names = (EMBEDDED_FILES["model"], EMBEDDED_FILES["autoencoder"], WEIGHTS.name)
    files = {name: _small(source) for name, source in zip(names, (transformer, autoencoder, reader), strict=True)}
    sizes = {name: _megabytes(tensors) for name, (tensors, _) in files.items()}
    if max(sizes.values()) > FILE_MB or sum(sizes.values()) > TOTAL_MB:
        listed = ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items())
        raise checkpoint.CheckpointError(f"{listed}: at most {FILE_MB} MB a file and {TOTAL_MB} MB in all fit")
    for name, (tensors, metadata) in files.items():
        checkpoint.write(out / name, tensors, metadata)
        log.info("%s: %.1f MB", out / name, sizes[name])


def _small(source: Path) -> tuple[checkpoint.Tensors, dict[str, str]]:
    tensors, metadata = checkpoint.read(source)
    return {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, metadata


def _megabytes(tensors: checkpoint.Tensors) -> float:
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put trained weights into the package.")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--reader", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    package(options.autoencoder, options.transformer, options.reader, options.out)


if __name__ == "__main__":
    main()
