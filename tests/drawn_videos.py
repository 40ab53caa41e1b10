"""Videos of drawn avatars with sound, and a face detector that knows where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from joyavatar_core.media.writer import VideoWriter
from joyavatar_core.training import drawn
from joyavatar_core.training.drawn.scene import _features, frame
from joyavatar_core.training.prepare.faces import Face, Moment

FPS = 16


def five_points(avatar: drawn.Avatar, pose: drawn.Pose, size: tuple[int, int]) -> np.ndarray:
    """Eyes, nose and corners of the mouth of a drawing, as a detector would give them: [5, 2]."""
    features = frame(avatar, size).head(pose).moved(*_features(pose))
    x, y, mouth = avatar.eyes.x, 0.0, avatar.mouth
    points = [[-x, y], [x, y], [0, 0.25], [-mouth.width, mouth.y], [mouth.width, mouth.y]]
    return features.place(np.array(points))


def faces_of(clip: drawn.Clip, seed: int) -> list[Face]:
    """The face in each picture of the clip of a seed."""
    avatar, size = drawn.Avatar.random(seed), clip.video.shape[1:3]
    points = [five_points(avatar, pose, (size[0], size[1])).astype(np.float32) for pose in clip.poses]
    return [Face(box, five) for box, five in zip(clip.boxes[:, 2], points, strict=True)]


@dataclass
class KnownFaces:
    """A detector for videos whose faces are known, one list of faces for each picture at 16 a second."""

    videos: dict[str, list[list[Face]]] = field(default_factory=dict)

    def detect(self, picture: np.ndarray, moment: Moment) -> list[Face]:
        return self.videos[moment.source][int(moment.seconds * FPS)]


def write_video(path: Path, video: np.ndarray, speech: np.ndarray, rate: int) -> None:
    """An mp4 of [T, H, W, 3] at 16 frames a second, with sound [n]."""
    height, width = video.shape[1:3]
    options = {"source_fps": FPS, "audio_rate": rate, "audio_channels": 1, "settings": {}}
    with VideoWriter(path, width, height, **options) as writer:
        writer.write(video)
        writer.write_audio(speech[None].astype(np.float32))


def drawn_video(
    path: Path, seeds: Sequence[int], frames: int, known: KnownFaces, size: tuple[int, int] = (96, 128)
) -> list[drawn.Clip]:
    """A video of drawn people, one shot each; what the detector should find goes into `known` under the file's name."""
    clips = [drawn.sample_clip(seed, frames, size) for seed in seeds]
    sound = np.concatenate([np.asarray(clip.speech.audio, np.float32) for clip in clips])
    write_video(path, np.concatenate([clip.video for clip in clips]), sound, clips[0].speech.sample_rate)
    known.videos[path.name] = [[face] for clip, seed in zip(clips, seeds, strict=True) for face in faces_of(clip, seed)]
    return clips
