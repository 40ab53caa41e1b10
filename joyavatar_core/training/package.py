"""Puts trained weights into the package: bfloat16, our metadata, the names the engine looks for.

    python -m joyavatar_core.training.package --autoencoder FILE --transformer FILE [--out DIR]

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

log = logging.getLogger(__name__)

LIMIT_MB = 16
"""No single file of the package may be larger."""


def package(autoencoder: Path, transformer: Path, out: Path = ASSETS) -> None:
    """Write both files of the embedded model. CheckpointError if one does not load as what it should be."""
    load_light_autoencoder(autoencoder)
    load_model(transformer)
    for source, name in ((transformer, EMBEDDED_FILES["model"]), (autoencoder, EMBEDDED_FILES["autoencoder"])):
        tensors, metadata = checkpoint.read(source)
        small = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
        megabytes = sum(t.numel() * t.element_size() for t in small.values()) / 1e6
        if megabytes > LIMIT_MB:
            raise checkpoint.CheckpointError(f"{source.name} has {megabytes:.1f} MB: at most {LIMIT_MB} fit")
        checkpoint.write(out / name, small, metadata)
        log.info("%s: %.1f MB", out / name, megabytes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put trained weights into the package.")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSETS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    package(options.autoencoder, options.transformer, options.out)


if __name__ == "__main__":
    main()
