"""Q_score and Q_face through Q-Align (Wu et al. 2023), which needs an environment of its own: a command of the user's.

The command gets the paths of PNG pictures on standard input, one a line, and prints a JSON list of as many numbers
from 0 (bad) to 1 (excellent), in the same order.

Shape legend: T pixel frames, H W pixel size. Frames are uint8 [T, H, W, 3] RGB.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..media.opencv import opencv
from . import pictures
from .face import Face
from .video import Frames


def score(command: str, frames: Frames, face: Face) -> tuple[float, float]:
    """(Q_score, Q_face): means over the frames and over their faces. Raises ValueError or OSError as `ask`."""
    cv2 = opencv()
    rows, columns = pictures.region(face.box, frames.shape[1:3])
    with tempfile.TemporaryDirectory(prefix="joyavatar-") as folder:
        paths = []
        for kind, images in (("frame", frames), ("face", frames[:, rows, columns])):
            for i, image in enumerate(images):
                paths.append(Path(folder) / f"{kind}_{i:03d}.png")
                cv2.imwrite(str(paths[-1]), image[..., ::-1])
        scores = ask(command, paths)
    return float(np.mean(scores[: len(frames)])), float(np.mean(scores[len(frames) :]))


def ask(command: str, paths: Sequence[Path]) -> list[float]:
    """The command's numbers for the pictures.

    Raises OSError where it cannot be started, ValueError where it fails or answers otherwise than agreed.
    """
    words = shlex.split(command)
    if not words:
        raise ValueError("--q-align: give the command that scores pictures")
    lines = "".join(f"{path}\n" for path in paths)
    done = subprocess.run(words, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"--q-align: {words[0]} ended with status {done.returncode} ({last})")
    try:
        scores = [float(value) for value in json.loads(done.stdout)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"--q-align: {words[0]} must print a JSON list of numbers ({error})") from None
    if len(scores) != len(paths) or not all(0 <= value <= 1 for value in scores):
        raise ValueError(
            f"--q-align: {words[0]} gave {len(scores)} numbers for {len(paths)} pictures; each must be in 0 .. 1 "
            "(a score x of 1 .. 5 is (x - 1) / 4)"
        )
    return scores
