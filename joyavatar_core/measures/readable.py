"""Whether files can be read to their end: asked before hours of work that would be lost for one that cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..media import MediaError
from .video import PICTURES, SOUNDS, open_video


def check_readable(files: Sequence[Path], on_file: Callable[[], object]) -> None:
    """Reads all `files` of one folder whole and calls `on_file` after each.

    Raises MediaError that names every one that cannot be read and tells what is wrong with the first. A sound or a
    video that only breaks off gives a warning: what could be decoded of it is used.
    """
    wrong: dict[str, str] = {}
    for path in files:
        try:
            _read_whole(path)
        except MediaError as error:
            wrong[path.name] = str(error)
        on_file()
    if wrong:
        raise MediaError(
            f"{files[0].parent}: {len(wrong)} of {len(files)} files cannot be read ({', '.join(wrong)}); mend them or "
            f"take them out; the first: {next(iter(wrong.values()))}"
        )


def _read_whole(path: Path) -> None:
    """A picture, a sound or a video, by its ending. Memory does not grow with its length."""
    if path.suffix.lower() in PICTURES:
        from ..media.picture import read_picture

        read_picture(path)
    elif path.suffix.lower() in SOUNDS:
        from ..media.sound import SoundFile

        for _ in SoundFile(path):
            pass
    else:
        for _ in open_video(path).pieces():
            pass
