"""Pictures and voices that come with the package, by name: made by this project, see assets/samples/LICENSE.md."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "assets" / "samples"
DEFAULT = "demo"
_PICTURE, _VOICE = ".png", ".ogg"


def pictures() -> tuple[str, ...]:
    """Names of the pictures, the default first."""
    return _names(_PICTURE)


def voices() -> tuple[str, ...]:
    """Names of the voices, the default first."""
    return _names(_VOICE)


def picture(name: str) -> Path:
    """The file of a picture of ours, or the path itself where it is not one of our names."""
    return _path(name, _PICTURE)


def voice(name: str) -> Path:
    """The file of a voice of ours, or the path itself where it is not one of our names."""
    return _path(name, _VOICE)


def _names(suffix: str) -> tuple[str, ...]:
    found = (path.stem for path in FOLDER.glob(f"*{suffix}"))
    return tuple(sorted(found, key=lambda name: (name != DEFAULT, name)))


def _path(name: str, suffix: str) -> Path:
    return FOLDER / f"{name}{suffix}" if name in _names(suffix) else Path(name)
