"""Where one shot ends and the next begins.

Shape legend: H W pixel size; a picture is uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...media.opencv import opencv

_SIDE = 24  # pixels of the picture that is compared: motion inside a cell does not count
_MEMORY = 8  # frames that say how much change is usual
_FACTOR = 4.0


class ShotFilter:
    """Tells for each picture of a video, in order, whether it begins a shot.

    A cut is a change, mean absolute difference of pictures brought to 24 x 24, that is at least `floor` (of 255) and
    four times the median of the last eight: a waving hand and a panning camera change much, but not all at once.
    Fades are not seen here; a face that jumps ends a clip too (`track.py`).
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self._last: NDArray[np.float32] | None = None
        self._usual: list[float] = []

    def begins(self, picture: NDArray[np.uint8]) -> bool:
        """Whether the picture [H, W, 3] begins a shot; the first one does."""
        cv2 = opencv()
        small = cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        last, self._last = self._last, small
        if last is None:
            return True
        change = float(np.abs(small - last).mean())
        cut = change >= self.floor and change >= _FACTOR * float(np.median(self._usual or [0.0]))
        self._usual = [*self._usual[1 - _MEMORY :], change]
        return cut
