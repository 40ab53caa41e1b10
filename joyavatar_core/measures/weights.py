"""The networks of other people that some measures need: found in a folder of the user's, never downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import frechet, identity, syncnet

SYNCNET = "syncnet_v2.model"
INCEPTION = "inception-2015-12-05.pt"
I3D = "i3d_torchscript.pt"
DINO = "dinov2*"

MISSING = {
    "IDC": f"put a folder of DINOv2 in the layout of transformers ({DINO}, e.g. dinov2-base) into --weights DIR",
    "Sync-C": f"put {SYNCNET} into --weights DIR",
    "Sync-D": f"put {SYNCNET} into --weights DIR",
    "Q_score": "give --q-align COMMAND, which scores pictures in an environment of its own",
    "Q_face": "give --q-align COMMAND, which scores pictures in an environment of its own",
    "FID": f"put {INCEPTION} into --weights DIR and give --truth FOLDER",
    "FVD": f"put {I3D} into --weights DIR and give --truth FOLDER",
}
"""What to supply for each measure."""


@dataclass(frozen=True)
class Weights:
    """Networks by their files in `folder`; each is loaded when it is first asked for, None where it is not there."""

    folder: Path | None = None
    q_align: str | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--weights {self.folder}: no such folder")

    @cached_property
    def dino(self) -> Any:
        """DINOv2, for IDC."""
        found = sorted(p for p in self.folder.glob(DINO) if (p / "config.json").is_file()) if self.folder else []
        return identity.load_dino(found[0]) if found else None

    @cached_property
    def syncnet(self) -> syncnet.SyncNet | None:
        """SyncNet, for Sync-C and Sync-D."""
        path = self._file(SYNCNET)
        return syncnet.load_syncnet(path) if path else None

    @cached_property
    def inception(self) -> Any:
        """Inception v3 as TorchScript, for FID."""
        path = self._file(INCEPTION)
        return frechet.load_network(path) if path else None

    @cached_property
    def i3d(self) -> Any:
        """I3D as TorchScript, for FVD."""
        path = self._file(I3D)
        return frechet.load_network(path) if path else None

    def _file(self, name: str) -> Path | None:
        path = self.folder / name if self.folder else None
        return path if path and path.is_file() else None
