"""Shards of training samples, read at random and in a fixed order: tar files, found again by the place of their bytes.

    index = ShardIndex([Path("data")])
    stream = BatchStream(index, batch=4, seed=0, rank=0, world=8)
    for batch in stream.from_step(1200): ...

`prepare/writer.py` writes them; they are ordinary webdataset shards, but nothing here needs webdataset. The standard
library reads the headers once; afterwards a sample is one seek. So the order can be any permutation of all samples, and
what a rank sees at a step is a function of (seed, step): a training that is stopped goes on with the very next batch.

Shape legend: N samples, B batch, C latent channels, F latent frames, n latents of [picture, grey ...], h w latent size,
W audio tokens of a latent, L text or image tokens, D their channels.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .. import checkpoint
from .encoded import EncodedClips

TENSORS, FACTS = "safetensors", "json"
NEGATIVE = "negative.safetensors"
_CLIPS = ("seed", "latents", "image", "audio", "mouth", "eyes")


class Place(NamedTuple):
    """Where the bytes of a member lie."""

    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One sample in a shard; group: number of the folder it belongs to."""

    key: str
    shard: Path
    tensors: Place
    facts: Place
    group: int

    def read(self) -> checkpoint.Tensors:
        """Its tensors, see `prepare/encode.py:Encoders.encode`. OSError for a shard that is damaged or gone."""
        try:
            return load(self._bytes(self.tensors))
        except SafetensorError as error:
            raise OSError(
                f"{self.shard}: the sample {self.key} is damaged ({error}); prepare the shard again"
            ) from error

    def read_facts(self) -> dict[str, Any]:
        """What it says of itself: source, times, crop, prompt."""
        return json.loads(self._bytes(self.facts))

    def _bytes(self, place: Place) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(place.offset)
            return file.read(place.size)


@dataclass(frozen=True)
class ShardBatch:
    """B samples of one folder, so of one size and the same encoders.

    clips: what the trainings of the embedded model take. audio_valid [B, F, W]: tokens with sound under them. face
    [B, 512]: zeros where it is not known. text [B, L, D], zeros behind the shorter ones (the model attends to those in
    any case, as Wan2.1 does); clip_vision [B, L, D]; negative [L, D]: the negative prompt. None where the folder was
    prepared without.
    """

    keys: tuple[str, ...]
    clips: EncodedClips
    audio_valid: Tensor
    face: Tensor
    text: Tensor | None
    clip_vision: Tensor | None
    negative: Tensor | None


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:06d}.tar"


def members(path: Path) -> dict[str, tuple[Place, Place]]:
    """Key -> where its tensors and its facts lie. Reads headers only. OSError for a file that is no whole shard."""
    found: dict[str, dict[str, Place]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                found.setdefault(key, {})[suffix] = Place(info.offset_data, info.size)
    except tarfile.TarError as error:
        raise OSError(f"{path} is not a shard that can be read ({error}): delete it and prepare it again") from error
    halves = [key for key, parts in found.items() if parts.keys() != {TENSORS, FACTS}]
    if halves:
        raise OSError(f"{path}: the sample {halves[0]} is not whole: delete the shard and prepare it again")
    return {key: (parts[TENSORS], parts[FACTS]) for key, parts in found.items()}


class ShardIndex:
    """All samples of one or more prepared folders, by folder, shard and place.

    folders: as `joyavatar prepare` left them; several are trained on together, each batch from one of them.
    ValueError for a folder without samples; OSError for a damaged shard.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self.groups = tuple(self._samples(group, folder) for group, folder in enumerate(self.folders))

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @staticmethod
    def _samples(group: int, folder: Path) -> tuple[Sample, ...]:
        shards = sorted(folder.glob("shard-*.tar"))
        samples = [Sample(k, shard, *places, group) for shard in shards for k, places in members(shard).items()]
        if not samples:
            raise ValueError(f"{folder} holds no samples: make some with joyavatar prepare --out {folder}")
        return tuple(samples)

    def negative(self, group: int) -> Tensor | None:
        """Embedding [L, D] of the negative prompt of a folder, None where it has no text."""
        return _negative(self.folders[group])

    def load(self, limit: int | None = None) -> tuple[EncodedClips, ...]:
        """All samples, or the first `limit` of each folder, in memory, clips of one size together, the most first.

        What the trainings of the embedded model take; a folder of full-size latents does not belong in memory.
        """
        sizes: dict[torch.Size, list[checkpoint.Tensors]] = {}
        for group in self.groups:
            for sample in group[:limit]:
                tensors = sample.read()
                sizes.setdefault(tensors["latents"].shape, []).append(tensors)
        return tuple(_clips(parts) for parts in sorted(sizes.values(), key=len, reverse=True))

    def batch(self, samples: Sequence[Sample]) -> ShardBatch:
        """The given samples, of one folder."""
        parts = [sample.read() for sample in samples]
        return ShardBatch(
            keys=tuple(sample.key for sample in samples),
            clips=_clips(parts),
            audio_valid=torch.stack([p["audio_valid"] for p in parts]),
            face=torch.stack([p["face"] for p in parts]),
            text=_texts(parts),
            clip_vision=torch.stack([p["clip_vision"] for p in parts]) if "clip_vision" in parts[0] else None,
            negative=self.negative(samples[0].group),
        )


def _clips(parts: Sequence[checkpoint.Tensors]) -> EncodedClips:
    return EncodedClips(**{name: torch.stack([p[name] for p in parts]) for name in _CLIPS})


def _texts(parts: Sequence[checkpoint.Tensors]) -> Tensor | None:
    if "text" not in parts[0]:
        return None
    return torch.nn.utils.rnn.pad_sequence([p["text"] for p in parts], batch_first=True)


@lru_cache(maxsize=8)
def _negative(folder: Path) -> Tensor | None:
    path = folder / NEGATIVE
    return checkpoint.read(path)[0]["text"] if path.exists() else None


class BatchStream(IterableDataset[ShardBatch]):
    """Batches without an end, each a function of (seed, step, rank).

    An epoch goes through every sample at least once: the samples of each folder in an order of their own, cut into
    batches for all ranks together (the last one filled up from the beginning), the batches of all folders mixed. At a
    step every rank reads from the same folder, so shapes agree, and no two ranks read the same sample unless a folder
    holds fewer than batch x world.

    batch: samples a rank gets at a step. rank, world: of the process (`training/parallel.py`). start: first step when
    it is iterated by a DataLoader (with batch_size=None): its workers take steps in turn and are asked in turn, so
    their number does not change the order.
    """

    def __init__(
        self, index: ShardIndex, batch: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise ValueError(f"batch {batch} must be at least 1 and rank {rank} lie in 0 .. {world - 1}")
        self.index, self.batch, self.seed = index, batch, seed
        self.rank, self.world, self.start = rank, world, start

    @property
    def steps_per_epoch(self) -> int:
        return sum(-(-len(group) // self._together) for group in self.index.groups)

    @property
    def _together(self) -> int:
        return self.batch * self.world

    def samples_at(self, step: int) -> list[Sample]:
        """The samples of this rank at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        group, number = self._epoch(epoch)[0][place]
        samples, order = self.index.groups[group], self._epoch(epoch)[1][group]
        first = number * self._together + self.rank * self.batch
        return [samples[order[(first + i) % len(order)]] for i in range(self.batch)]

    def from_step(self, step: int) -> Iterator[ShardBatch]:
        """Batches of the steps from this one on."""
        while True:
            yield self.index.batch(self.samples_at(step))
            step += 1

    def __iter__(self) -> Iterator[ShardBatch]:
        worker = get_worker_info()
        step, stride = (self.start + worker.id, worker.num_workers) if worker else (self.start, 1)
        while True:
            yield self.index.batch(self.samples_at(step))
            step += stride

    def _epoch(self, epoch: int) -> tuple[list[tuple[int, int]], list[Any]]:
        """(folder, number of its batch) of each step of an epoch, and the order of the samples in each folder."""
        if getattr(self, "_drawn", (None,))[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            orders = [rng.permutation(len(group)) for group in self.index.groups]
            steps = [(g, b) for g, order in enumerate(orders) for b in range(-(-len(order) // self._together))]
            rng.shuffle(steps)
            self._drawn = (epoch, ([(int(g), int(b)) for g, b in steps], orders))
        return self._drawn[1]
