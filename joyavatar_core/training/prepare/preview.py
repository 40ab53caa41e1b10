"""A contact sheet of prepared clips: what the training will see, and where it will look hardest.

Shape legend: T pixel frames, F latent frames, h w latent size, H W pixel size; pictures uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...geometry import Geometry
from ...media.opencv import opencv
from ...media.picture import resize
from ..encoded import cell_shares
from .jobs import Clip

log = logging.getLogger(__name__)

_COLUMNS = 6
_HEIGHT = 224
_LABEL = 18
_INSIDE = 0.5  # share of a cell from which it counts as lips
_LIPS, _EYES = (255, 64, 160), (64, 200, 255)


class ContactSheet:
    """Collects the first clips, two of a video at most, and makes a sheet: a row each, lip mask outlined.

    The mask is the one in the sample: the latent cells of which half or more lie inside the box. Eyes thinner.
    """

    def __init__(self, geometry: Geometry, rows: int = 12) -> None:
        self.geometry, self.rows = geometry, rows
        self._made: list[NDArray[np.uint8]] = []
        self._of: Counter[str] = Counter()

    def add(self, clip: Clip) -> None:
        """Take a clip, if there is room."""
        if len(self._made) == self.rows or (clip.facts["kind"] == "video" and self._of[clip.facts["source"]] == 2):
            return
        self._of[clip.facts["source"]] += 1
        self._made.append(self._row(clip))

    def write(self, path: Path) -> None:
        """Write the PNG, or say that no clip came by. OSError where it cannot be written."""
        if not self._made:
            log.warning("no clip was made in this run: %s is left as it is", path)
            return
        cv2 = opencv()
        data = cv2.imencode(".png", np.concatenate(self._made)[..., ::-1])[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())

    def _row(self, clip: Clip) -> NDArray[np.uint8]:
        cv2 = opencv()
        lips, eyes = (cell_shares(torch.from_numpy(boxes), self.geometry).numpy() for boxes in (clip.mouth, clip.eyes))
        chosen = np.linspace(0, len(clip.frames) - 1, _COLUMNS).round().astype(int)
        tiles = []
        for frame in chosen:
            latent = self.geometry.latents_of_frames(int(frame) + 1) - 1
            picture = resize(clip.frames[frame], round(_HEIGHT * self.geometry.width / self.geometry.height), _HEIGHT)
            _outline(picture, eyes[latent], _EYES, 1)
            _outline(picture, lips[latent], _LIPS, 2)
            tiles.append(picture)
        row = np.concatenate(tiles, axis=1)
        label = np.full((_LABEL, row.shape[1], 3), 24, np.uint8)
        words = f"{clip.key}  {clip.facts['source']}  {clip.facts['start']:.2f} s"
        cv2.putText(label, words, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
        return np.concatenate([label, row])


def _outline(picture: NDArray[np.uint8], share: NDArray[np.float32], colour: tuple[int, int, int], width: int) -> None:
    """Draw the edge of the cells [h, w] that count, into a picture."""
    cv2 = opencv()
    mask = (share >= min(_INSIDE, float(share.max()))).astype(np.uint8) * (share.max() > 0)
    large = cv2.resize(mask.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    edges = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(picture, edges, -1, colour, width)
