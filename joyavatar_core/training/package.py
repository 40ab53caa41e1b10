"""Puts trained weights into the package: bfloat16, our metadata, the names the engine looks for.

    python -m joyavatar_core.training.package --autoencoder FILE --transformer FILE --reader FILE [--out DIR]
        [--blend FILE=0.4 ...] [--blend-autoencoder FILE=0.15 ...] [--reading NAME=GAIN,OFFSET ...]

--blend mixes into the transformer the weights of trainings that went on from one another: 0.4 of a teacher makes a
student's guidance milder; 0.6 of what a training became and -0.6 of what it began from add to another what it learned.
--blend-autoencoder does so with autoencoders: a little of one that learnt from true frames alone brings detail back.
--reading stretches what the ears tell of a face: they give the mean of what may be, which is less than what is; a lid
half shut is nobody's, and a nod is a part of the true one.
Metadata (recipe, data seed, steps, figures) comes along from the training's own files.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import checkpoint
from ..avatar import ASSETS, EMBEDDED_FILES, config_of, load_light_autoencoder, load_model
from ..manner import HEARD, LIMITS
from ..measures.mouth_reader import WEIGHTS, load_mouth_reader
from .rehearsal import to_be_told

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


def blend(source: Path, others: Mapping[Path, float], out: Path) -> Path:
    """Write the weighted sum of the other files and of as much of the source as is missing to 1; gives `out`.

    The metadata is the source's, with the weights and checksums of what was mixed in. Raises ValueError for a
    weight outside -1 .. 1, CheckpointError for files of different kinds.
    """
    for path, weight in others.items():
        if not -1 <= weight <= 1:
            raise ValueError(f"{path.name}={weight:g}: the weight of what is mixed in must be in -1 .. 1")
    ours, metadata = checkpoint.read(source)
    mixed = {name: (1 - sum(others.values())) * tensor.float() for name, tensor in ours.items()}
    for path, weight in others.items():
        theirs = _told_weights(path)
        if {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in ours.items()}:
            raise checkpoint.CheckpointError(f"{path.name} has other tensors than {source.name}: not of its kind")
        for name, tensor in theirs.items():
            mixed[name] += weight * tensor.float()
    before = json.loads(metadata.get("blend", "[]"))
    facts = [{"weight": weight, "of": checkpoint.sha256_of(path)} for path, weight in others.items()]
    metadata = metadata | {"blend": json.dumps([*(before if isinstance(before, list) else [before]), *facts])}
    checkpoint.write(out, {name: tensor.to(ours[name].dtype) for name, tensor in mixed.items()}, metadata)
    return out


def _told_weights(path: Path) -> checkpoint.Tensors:
    """Weights of a file; a transformer that hears readings gets places for what is drawn, if it has none yet."""
    tensors, _ = checkpoint.read(path)
    return dict(to_be_told(load_model(path)).state_dict()) if "proj_model.conv_out.weight" in tensors else tensors


def stretch(transformer: Path, readings: Mapping[str, tuple[float, float]], out: Path) -> Path:
    """Write the transformer with other readings of its ears, gain times what they were and an offset; gives `out`.

    The limits become those of today. ValueError for a reading that is not heard.
    """
    if unknown := set(readings) - set(HEARD):
        raise ValueError(f"--reading {', '.join(sorted(unknown))}: not heard; what is: {', '.join(HEARD)}")
    tensors, metadata = checkpoint.read(transformer)
    weight, bias = (tensors[f"proj_model.conv_out.{part}"].float() for part in ("weight", "bias"))
    for name, (gain, offset) in readings.items():
        row = HEARD.index(name)
        weight[row] *= gain
        bias[row] = gain * bias[row] + offset
    stretched = {"proj_model.conv_out.weight": weight, "proj_model.conv_out.bias": bias}
    config = config_of(metadata, tensors)
    assert config.audio is not None
    told = replace(config, audio=replace(config.audio, limits=LIMITS))
    metadata = metadata | {"model_config": checkpoint.config_to_json(told), "readings": json.dumps(readings)}
    checkpoint.write(out, {name: stretched.get(name, t).to(t.dtype) for name, t in tensors.items()}, metadata)
    return out


def _reading(text: str) -> tuple[str, tuple[float, float]]:
    name, _, numbers = text.partition("=")
    try:
        gain, offset = (float(number) for number in numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=GAIN,OFFSET, e.g. blink=4,-0.8") from None
    return name, (gain, offset)


def _weighted(text: str) -> tuple[Path, float]:
    path, _, weight = text.rpartition("=")
    try:
        return Path(path), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as FILE=WEIGHT, e.g. teacher.safetensors=0.4") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put trained weights into the package.")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--reader", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSETS)
    mixed = {"type": _weighted, "action": "append", "metavar": "FILE=WEIGHT"}
    parser.add_argument("--blend", help="weights to be mixed into the transformer, any number", **mixed)
    parser.add_argument("--blend-autoencoder", help="the same for the autoencoder", **mixed)
    parser.add_argument("--reading", type=_reading, action="append", metavar="NAME=GAIN,OFFSET", help="of the ears")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder:
        autoencoder, transformer = options.autoencoder, options.transformer
        if options.blend:
            transformer = blend(transformer, dict(options.blend), Path(folder) / "blended.safetensors")
        if options.blend_autoencoder:
            autoencoder = blend(autoencoder, dict(options.blend_autoencoder), Path(folder) / "autoencoder.safetensors")
        if options.reading:
            transformer = stretch(transformer, dict(options.reading), Path(folder) / "stretched.safetensors")
        package(autoencoder, transformer, options.reader, options.out)


if __name__ == "__main__":
    main()
