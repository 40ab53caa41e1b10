"""What decides a data set, and the file that holds a folder to it.

`Content` decides what the numbers in a sample mean: samples of one content can be trained on together, and its hash
names it. `VideoOptions` decide which clips are taken from videos. Nothing else (workers, device, size of a shard) does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ...geometry import Geometry
from ..common import write_whole

FORMAT = 1
FILE = "dataset.json"
RATES = (16, 25)
"""Pixel frames a second that models of this kind are trained at: Wan2.1's own, and that of most video."""

_EDGE = 1 << 20  # bytes read at either end of a weight file to know it again


@dataclass(frozen=True)
class Content:
    """Size and encoders of the samples. "" for an encoder that is not used.

    width, height: pixels. fps: pixel frames a second. latents: latent frames of a clip. The others name the weights by
    `fingerprint`; audio also says how they are heard.
    """

    width: int = 256
    height: int = 256
    fps: int = 16
    latents: int = 27
    autoencoder: str = ""
    audio: str = "log-mel"
    text_encoder: str = ""
    negative_prompt: str = ""
    clip_vision: str = ""
    face_embedder: str = ""

    def __post_init__(self) -> None:
        if self.fps not in RATES:
            raise ValueError(f"--fps {self.fps}: clips are made at {' or '.join(map(str, RATES))} frames a second")
        if self.latents < 1:
            raise ValueError(f"--latents {self.latents}: a clip holds at least 1 latent frame")

    def geometry(self, spatial: int) -> Geometry:
        """Geometry of a clip for an autoencoder. ValueError for a size that does not fit."""
        return Geometry(self.width, self.height, Fraction(self.fps), spatial=spatial)

    @property
    def frames(self) -> int:
        """Pixel frames of a clip: 105 for 27 latents."""
        return Geometry(16, 16).frames_of_latents(self.latents)

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this content."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class VideoOptions:
    """What is taken from videos.

    detector: what finds the faces, by `fingerprint`. prompt: of videos without a text file of their own.
    min_face: least height of a face, pixels of the video. face_share: height of the face in the height of the crop.
    detect_every: frames from one look for faces to the next. cut: least change of a picture that is a cut, of 255.
    quietest: loudness, dB of full scale, under which a clip is silent.
    """

    detector: str = ""
    prompt: str = ""
    min_face: int = 80
    face_share: float = 0.45
    detect_every: int = 2
    cut: float = 12.0
    quietest: float = -50.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.face_share <= 0.9:
            raise ValueError(f"--face-share {self.face_share}: must be 0.1 to 0.9 of the height of the crop")
        if self.min_face < 16:
            raise ValueError(f"--min-face {self.min_face}: must be at least 16 pixels")
        if self.detect_every < 1:
            raise ValueError(f"--detect-every {self.detect_every}: must be at least 1 frame")


def fingerprint(path: str | Path) -> str:
    """A short name of weights that changes when they do: of a file, or of the files of a folder.

    Size and both ends of each file are read: safetensors and onnx files begin with names and shapes, and hashing the
    eleven gigabytes of a text encoder at every start would take longer than many a run. OSError where nothing is.
    """
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{path}: no such file or folder of weights; check the path")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''} {size}".encode())
        with file.open("rb") as data:
            digest.update(data.read(_EDGE))
            data.seek(max(0, size - _EDGE))
            digest.update(data.read(_EDGE))
    return f"{path.name}:{digest.hexdigest()[:12]}"


def claim(out: Path, content: Content, video: VideoOptions | None) -> None:
    """Bind a folder to its settings, or check them against those it is bound to.

    video: None where no videos are prepared in this run; what the folder says of them then stays.
    Raises ValueError naming the first setting that differs.
    """
    before = read_settings(out) if (out / FILE).exists() else {}
    _compare(out, before.get("content"), asdict(content))
    if video:
        _compare(out, before.get("video"), asdict(video))
    facts = {
        "format": FORMAT,
        "hash": content.hash,
        "content": asdict(content),
        "video": asdict(video) if video else before.get("video"),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / FILE, lambda part: part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8"))


def read_settings(folder: Path) -> dict[str, Any]:
    """The facts in dataset.json. ValueError where it is missing or not one of ours."""
    path = folder / FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {FILE}: make the data with joyavatar prepare --out {folder}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable ({error}): prepare the data into another folder") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: prepare the data again with this version")
    return facts


def content_of(folder: Path) -> Content:
    """The content a folder is bound to. ValueError as `read_settings`."""
    return Content(**read_settings(folder)["content"])


def _compare(out: Path, before: Mapping[str, object] | None, now: Mapping[str, object]) -> None:
    for name in now if before else ():
        if before is not None and before.get(name) != now[name]:
            raise ValueError(
                f"{out} was prepared with {name.replace('_', ' ')} {before.get(name)!r}, this run has {now[name]!r}: "
                "use the same setting, or another --out"
            )
