"""Clips of the truth: what their frames do at the places where generated videos have seams, and features of them.

Our files begin a new group of pictures with every block, and a coder begins a group with a picture of its own kind:
part of the jump in a file is the coder's (a third and more). So the truth is coded the same way before its seams are
measured.

Shape legend: N pictures or clips, D features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import curves, frechet, seams
from .face import assumed_face
from .measure import FVD_FRAMES, SPREAD, spread
from .video import Blocks, Video, open_video
from .weights import Weights

if TYPE_CHECKING:
    from ..media.mp4 import Layout


@dataclass(frozen=True)
class Truth:
    """seam: the jump of each clip that is long enough. pictures, clips: features [N, D], None without a network."""

    seam: list[float]
    pictures: NDArray[np.float64] | None = None
    clips: NDArray[np.float64] | None = None


def measure_truth(videos: Sequence[Video], blocks: Blocks | None, layout: Layout | None, weights: Weights) -> Truth:
    """blocks: those of the generated videos (None: no seams are compared). layout: of one of them, if it is ours."""
    jumps: list[float] = []
    shown: list[NDArray[np.float64]] = []
    clips: list[NDArray[np.float64]] = []
    for video in videos:
        traced = curves.trace(video.pieces(), video.fps, assumed_face(video.width, video.height), None)
        places = blocks.seams(traced.frames) if blocks else np.array([], int)
        if len(places):
            # a file of ours is coded so already: twice would be once too often
            change = _coded_change(video, layout) if layout and not video.layout else traced.change
            jumps.append(seams.jump(change, places).mean)
        if weights.inception is not None:
            shown.append(frechet.picture_features(weights.inception, video.at(spread(traced.frames, SPREAD))))
        if weights.i3d is not None and traced.frames >= frechet.CLIP_FRAMES:
            clips.append(frechet.clip_features(weights.i3d, np.concatenate(list(video.pieces(FVD_FRAMES)))))
    return Truth(jumps, np.concatenate(shown) if shown else None, np.concatenate(clips) if clips else None)


def _coded_change(video: Video, layout: Layout) -> NDArray[np.float64]:
    """Change from frame to frame after coding the frames as our writer codes those of `layout`."""
    from ..media.writer import VideoWriter

    width, height = video.width // 2 * 2, video.height // 2 * 2  # H.264 wants even sides
    with tempfile.TemporaryDirectory(prefix="joyavatar-") as folder:
        path = Path(folder) / "truth.mp4"
        options = {"crf": layout.crf, "preset": layout.preset, "segment_frames": layout.segment_frames}
        rates = {"source_fps": layout.source_fps, "audio_rate": 16000, "audio_channels": 1}
        first = layout.first_segment_frames
        with VideoWriter(path, width, height, settings={}, first_segment_frames=first, **rates, **options) as writer:
            for piece in video.pieces():
                writer.write(np.ascontiguousarray(piece[:, :height, :width]))
        face = assumed_face(width, height)
        coded = open_video(path)
        return curves.trace(coded.pieces(), coded.fps, face, None).change
