"""Shards: tar files of samples in webdataset's layout, each written whole or not at all.

A sample is two members, KEY.safetensors (tensors) and KEY.json (facts). The standard library's tarfile writes them: the
layout is no more than names in a tar, and it leaves dates, owners and order to us, so that the same samples make the
same bytes, on any machine and after any interruption. Any reader of webdataset reads them.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from safetensors.torch import save

from ... import checkpoint
from ..shards import FACTS, TENSORS, members, shard_path

_END = bytes(2 * tarfile.BLOCKSIZE)
_SPARE = 1 << 26  # bytes left free on the disk: other files of the folder, and other programs


class ShardWriter:
    """Adds samples to shards of at most `limit` bytes (more only for a single sample that is larger).

    Use as a context: what is whole when it is left, by an error too, is kept. A shard in the making is NAME.tar.part;
    one that a kill left behind is removed at the start.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("shard-*.tar.part"):
            part.unlink()
        self.keys = {key for path in sorted(folder.glob("shard-*.tar")) for key in members(path)}
        numbers = [int(path.stem.rpartition("-")[2]) for path in folder.glob("shard-*.tar")]
        self._next = max(numbers, default=-1) + 1
        self._file: BinaryIO | None = None
        self._whole = 0  # bytes of the whole samples in it

    def add(self, key: str, tensors: checkpoint.Tensors, facts: Mapping[str, Any]) -> None:
        """One sample. Raises OSError, with the sample left out and all before it kept, when the disk is full."""
        payload = _member(key, TENSORS, save(tensors)) + _member(key, FACTS, json.dumps(facts).encode())
        if self._file and self._whole + len(payload) > self.limit:
            self._publish()
        if self._file is None:
            self._start()
        assert self._file is not None
        try:
            self._file.seek(self._whole)
            _write_all(self._file, payload + _END)
        except OSError as error:
            self._take_back()
            raise self._full(error) from error
        self._whole += len(payload)
        self.keys.add(key)

    def close(self) -> None:
        """Publish the shard in the making, if it holds anything."""
        if self._file:
            self._publish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.limit + _SPARE:
            raise OSError(
                errno.ENOSPC,
                f"{self.folder} has {free / 1e6:.0f} MB free, the next shard may take {self.limit / 1e6:.0f}: free "
                "some and run the same command again, which goes on from here (or choose a smaller --shard-mb)",
            )
        self._file = open(self._part, "wb", buffering=0)  # noqa: SIM115
        self._whole = 0

    @property
    def _part(self) -> Path:
        return Path(f"{shard_path(self.folder, self._next)}.part")

    def _take_back(self) -> None:
        """Leave the last sample out. The end of the tar goes where one was before, which needs no room."""
        assert self._file is not None
        self._file.seek(self._whole)
        if self._whole:
            _write_all(self._file, _END)
        self._file.truncate()

    def _publish(self) -> None:
        """The part is a tar with its end at every moment between two samples: it only needs its name."""
        assert self._file is not None
        file, self._file = self._file, None
        with file:
            os.fsync(file.fileno())
        if self._whole:
            os.replace(self._part, shard_path(self.folder, self._next))
            self._next += 1
        else:
            self._part.unlink()

    def _full(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"{self._part} cannot grow ({error.strerror}): free some room and run the same command again, which "
            "goes on from here",
        )


def _write_all(file: BinaryIO, content: bytes) -> None:
    """All of it: a file without a buffer may take less at a time (and holds nothing back after an error)."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _member(key: str, suffix: str, content: bytes) -> bytes:
    """A file of a tar: header, content, padding; no date and no owner."""
    info = tarfile.TarInfo(f"{key}.{suffix}")
    info.size, info.mode = len(content), 0o644
    out = io.BytesIO()
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    out.write(content)
    out.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return out.getvalue()
