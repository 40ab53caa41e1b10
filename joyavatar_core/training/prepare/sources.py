"""Which files are videos to prepare, and what lies beside them: a text, a face embedding."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

BESIDE = {".txt", ".md", ".json", ".npy", ".safetensors", ".srt", ".vtt", ".csv", ".png", ".jpg", ".jpeg", ".webp",
          ".onnx", ".part", ".tar", ".ini", ".xml", ".html", ".zip"}  # fmt: skip
"""Endings of files that lie beside videos and are none; all others are opened to see."""

FACE_SUFFIXES = (".face.npy", ".face.safetensors", ".face.json")


@dataclass(frozen=True)
class Source:
    """One video. name: its path inside the folder, with slashes. prompt: of NAME.txt beside it, else the common one."""

    path: Path
    name: str
    prompt: str
    face: Path | None

    @property
    def id(self) -> str:
        """Name for files and keys: letters of the name, and digits that tell equal ones apart.

        No dots: readers of webdataset end a key at the first.
        """
        letters = re.sub(r"[^a-z0-9]+", "-", self.name.rsplit(".", 1)[0].lower()).strip("-")[:40]
        return f"{letters or 'video'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def list_sources(folder: Path, prompt: str) -> list[Source]:
    """Videos of a folder and the folders in it, by name; hidden files and what lies beside videos are left out.

    Raises ValueError for no folder, no files, or a text beside a video that is not UTF-8.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of the videos")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and _may_be_video(p.relative_to(folder)))
    if not paths:
        raise ValueError(f"{folder}: holds no videos")
    return [Source(p, p.relative_to(folder).as_posix(), _prompt_of(p, prompt), _face_of(p)) for p in paths]


def _may_be_video(path: Path) -> bool:
    return path.suffix.lower() not in BESIDE and not any(part.startswith(".") for part in path.parts)


def _prompt_of(path: Path, default: str) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return default
    try:
        return " ".join(text.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: the prompt must be UTF-8 text ({error.reason})") from error


def _face_of(path: Path) -> Path | None:
    beside = (path.with_name(path.stem + suffix) for suffix in FACE_SUFFIXES)
    return next((p for p in beside if p.is_file()), None)
