"""Pictures of a report: curves over time and a contact sheet, as PNG.

Shape legend: T pixel frames, H W pixel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..media.opencv import opencv
from .measure import Measured, spread
from .video import Frames

_HEIGHT = 128
_COLUMNS = 10
_CLOSE = 10.0  # seconds of mouth and sound that are drawn
_BINS = 600  # points of a curve that are drawn, of a long video


def write(videos: Sequence[Measured], out: Path) -> list[Path]:
    """sheet.png (a row a video) and curves_NAME.png for each, in `out`, which is made. OSError if it cannot be."""
    out.mkdir(parents=True, exist_ok=True)
    sheet = out / "sheet.png"
    cv2 = opencv()
    if not cv2.imwrite(str(sheet), contact_sheet(videos)[..., ::-1]):
        raise OSError(f"cannot write {sheet}: is the folder writable?")
    names = _names(videos)
    for one, name in zip(videos, names, strict=True):
        figure = curves(one)
        figure.savefig(out / f"curves_{name}.png", dpi=100)
        figure.clear()
    return [sheet, *(out / f"curves_{name}.png" for name in names)]


def _names(videos: Sequence[Measured]) -> list[str]:
    """Stems; those that occur twice (one name, two endings) with their ending."""
    stems = [one.path.stem for one in videos]
    return [s if stems.count(s) == 1 else one.path.name.replace(".", "_") for s, one in zip(stems, videos, strict=True)]


def contact_sheet(videos: Sequence[Measured]) -> Frames:
    """Ten frames a video, evenly spaced in time, the box of the face drawn on the first: [H, W, 3]."""
    cv2, rows = opencv(), []
    for one in videos:
        frames = one.shown[spread(len(one.shown), _COLUMNS)].copy()
        x0, y0, x1, y1 = (round(float(v)) for v in one.face.box)
        cv2.rectangle(frames[0], (x0, y0), (x1, y1), (255, 255, 255), max(1, frames.shape[1] // 128))
        width = max(1, round(frames.shape[2] * _HEIGHT / frames.shape[1]))
        small = [cv2.resize(frame, (width, _HEIGHT), interpolation=cv2.INTER_AREA) for frame in frames]
        rows.append(np.concatenate(small, axis=1))
    widest = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, widest - r.shape[1]), (0, 0)), constant_values=255) for r in rows])


def curves(one: Measured) -> Any:
    """A figure of matplotlib: change with the seams, mouth and sound, colour, sharpness, distance from the reference.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    traced, figure = one.curves, Figure(figsize=(11, 10), layout="constrained")
    axes = figure.subplots(5, 1)
    seconds = np.arange(traced.frames) / one.fps
    axes[0].plot(*_thinned(seconds[1:], traced.change[1:]), lw=0.8, label="change")
    if one.seams is not None and len(one.seams):
        axes[0].plot(seconds[one.seams], traced.change[one.seams], "r.", ms=3, label="at block seams")
    axes[0].set_ylabel("grey levels")
    _plot_mouth(axes[1], one, seconds)
    for i, name in enumerate(("L*", "a*", "b*")):
        axes[2].plot(*_thinned(seconds, traced.lab[:, i] - traced.lab[0, i]), lw=0.8, label=name)
    axes[2].set_ylabel("from frame 0")
    axes[3].plot(*_thinned(seconds, traced.sharpness), lw=0.8, label="sharpness")
    axes[3].set_ylabel("grey levels")
    axes[4].plot(seconds[traced.looks], traced.layout, lw=0.8, label="layout")
    axes[4].plot(seconds[traced.looks], traced.colours, lw=0.8, label="colours")
    axes[4].set_ylabel("from reference")
    axes[4].set_xlabel("seconds")
    for axis in axes:
        axis.legend(loc="upper right", fontsize=8, ncols=3)
        axis.margins(x=0)
        axis.grid(alpha=0.3)
    figure.suptitle(one.path.name)
    return figure


def _plot_mouth(axis: Any, one: Measured, seconds: np.ndarray) -> None:
    """Of the first ten seconds: more would be a blur."""
    shown = slice(0, max(2, round(_CLOSE * one.fps)))
    motion = one.curves.mouth_change[shown] / max(float(one.curves.mouth_change[shown].max()), 1e-9)
    axis.plot(seconds[shown], motion, lw=0.8, label="change at the mouth")
    if one.sound is not None:
        axis.plot(seconds[shown], one.sound[shown], lw=0.8, label="loudness")
    if one.opening is not None:
        axis.plot(seconds[shown], one.opening[shown], lw=0.8, label="opening read")
    axis.set_ylabel("first ten seconds")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours where there are more points than can be seen."""
    step = max(1, len(x) // _BINS)
    count = len(x) // step * step
    return x[:count].reshape(-1, step).mean(1), y[:count].reshape(-1, step).mean(1)
