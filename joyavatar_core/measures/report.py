"""Figures over several videos: each with its 95 % interval over clips, and why others are not there.

Shape legend: C videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import frechet, statistics
from .measure import MEANINGS, Measured
from .statistics import Interval
from .truth import Truth
from .weights import MISSING

TABLE_1 = ("Sync-C", "Sync-D", "IDC", "Q_score", "Q_face", "FPS")
"""Columns of the paper's Table 1, in its order."""


@dataclass
class Report:
    """figures by name (see MEANINGS), over videos; not_computed: name -> what to supply; left_out: file -> why."""

    figures: dict[str, Interval]
    not_computed: dict[str, str]
    videos: list[Measured]
    left_out: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The figures by name, then `videos`, `not_computed`, `left_out`, `about`."""
        videos = [
            {
                "path": str(one.path),
                "seconds": round(one.curves.seconds, 3),
                "fps": round(one.fps, 4),
                "face": {"box": [round(float(v), 1) for v in one.face.box], "source": one.face.source},
                "figures": {name: _plain(value) for name, value in one.values.items()},
                "not_computed": one.missing,
            }
            for one in self.videos
        ]
        figures = {name: _plain(value) for name, value in self.figures.items()}
        meanings = {name: MEANINGS[name] for name in (*self.figures, *self.not_computed) if name in MEANINGS}
        about = {**self.about, "meanings": meanings}
        return {
            **figures,
            "videos": videos,
            "not_computed": self.not_computed,
            "left_out": self.left_out,
            "about": about,
        }


def _plain(value: Interval) -> dict[str, Any]:
    return {k: (round(v, 5) if np.isfinite(v) else None) if isinstance(v, float) else v for k, v in vars(value).items()}


def collect(videos: Sequence[Measured], truth: Truth | None = None) -> Report:
    """Figures over all videos. One video keeps the intervals it has of its own (over blocks, over pieces of time)."""
    figures: dict[str, Interval] = {}
    for name in MEANINGS:
        found = [one.values[name] for one in videos if name in one.values]
        if len(found) == 1:
            figures[name] = found[0]
        elif found:
            figures[name] = statistics.mean_interval([value.mean for value in found])
    if truth:
        figures |= _against(videos, truth)
    missing: dict[str, str] = {}
    for name in MEANINGS:
        why = next((one.missing[name] for one in videos if name in one.missing), None)
        if why and name not in figures:
            missing[name] = why
    missing |= {name: MISSING[name] for name in ("FID", "FVD") if name not in figures}
    return Report({name: figures[name] for name in MEANINGS if name in figures}, missing, list(videos))


def _against(videos: Sequence[Measured], truth: Truth) -> dict[str, Interval]:
    """Seams and features beside the truth's."""
    found: dict[str, Interval] = {}
    made = [one.values["seam.jump"].mean for one in videos if "seam.jump" in one.values]
    if truth.seam and made:
        found["seam.on_truth"] = statistics.mean_interval(truth.seam)
        below = found["seam.on_truth"].mean
        if below > 0:  # the interval is over the videos that are judged: the truth is what it is
            found["seam.ratio"] = statistics.mean_interval([value / below for value in made])
    for name, true, own in (
        ("FID", truth.pictures, [one.pictures for one in videos if one.pictures is not None]),
        ("FVD", truth.clips, [one.clips for one in videos if one.clips is not None]),
    ):
        if true is not None and own and len(true) > 1 and sum(map(len, own)) > 1:
            value = frechet.distance(np.concatenate(own), true)
            found[name] = Interval(value, value, value, len(own))
    return found
