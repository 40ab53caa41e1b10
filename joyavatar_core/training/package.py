"""Puts trained weights into the package: bfloat16, our metadata, the names the engine looks for.

    python -m joyavatar_core.training.package --autoencoder FILE --transformer FILE --reader FILE [--out DIR]
        [--blend FILE --share 0.6]

--blend mixes a student's weights with those of its teacher, which it began from: a milder guidance than it learned.
Metadata (recipe, data seed, steps, figures) comes along from the training's own files.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
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


def blend(student: Path, teacher: Path, share: float, out: Path) -> Path:
    """Write `share` of the student's weights and the rest of the teacher's, with the student's metadata; gives `out`.

    Raises ValueError for a share outside 0 .. 1, CheckpointError where the two are not of one kind.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: must be in 0 .. 1")
    (ours, metadata), (theirs, _) = checkpoint.read(student), checkpoint.read(teacher)
    sizes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise checkpoint.CheckpointError(f"{teacher.name} has other tensors than {student.name}: no teacher of it")
    mixed = {n: (share * ours[n].float() + (1 - share) * theirs[n].float()).to(ours[n].dtype) for n in ours}
    facts = {"share": share, "with": checkpoint.sha256_of(teacher)}
    checkpoint.write(out, mixed, metadata | {"blend": json.dumps(facts)})
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put trained weights into the package.")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--reader", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--blend", type=Path, help="the transformer's teacher, to be mixed in")
    parser.add_argument("--share", type=float, default=0.6, help="of --transformer in the blend (%(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        transformer = options.transformer
        if options.blend:
            transformer = blend(transformer, options.blend, options.share, Path(folder) / transformer.name)
        package(options.autoencoder, transformer, options.reader, options.out)


if __name__ == "__main__":
    main()
