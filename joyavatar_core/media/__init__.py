"""Pictures and sound in, a growing video file out. The only part of the core that touches files of other programs.

`picture` reads and fits a reference picture, `sound` reads a sound file or a pipe of PCM, `writer` writes the video.
They need Pillow, OpenCV and PyAV; nothing else of the core does, so this package imports none of them by itself.
"""

from __future__ import annotations


class MediaError(ValueError):
    """A file that cannot be read or written. The message is one line: the file, what is wrong, what to do."""
