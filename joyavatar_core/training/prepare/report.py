"""What was kept and what was rejected, and why: report.json and a table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common import write_whole
from .jobs import Plan
from .settings import Content

FILE = "report.json"


@dataclass
class Video:
    """What became of one video. lost: seconds by reason; refused: clips by reason."""

    name: str
    seconds: float
    planned: int
    kept: int = 0
    error: str = ""
    damage: str = ""
    lost: dict[str, float] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan) -> Video:
        return Video(plan.name, plan.seconds, len(plan.cuts), 0, plan.error, plan.damage, plan.lost)


@dataclass
class Report:
    """Figures of a prepared folder, all runs together."""

    content: Content
    videos: list[Video]
    drawn: int = 0
    shards: int = 0
    bytes: int = 0

    @property
    def clips(self) -> int:
        return self.drawn + sum(video.kept for video in self.videos)

    def reasons(self) -> dict[str, dict[str, float]]:
        """Reason -> videos it was met in, clips refused for it, seconds lost to it; the costliest first."""
        length = self.content.frames / self.content.fps
        videos: Counter[str] = Counter()
        clips: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for video in self.videos:
            videos.update({*video.lost, *video.refused, *filter(None, [video.error])})
            clips.update(video.refused)
            seconds.update(video.lost)
            seconds.update({reason: n * length for reason, n in video.refused.items()})
        ordered = sorted(videos, key=lambda reason: (-seconds[reason], reason))
        return {r: {"videos": videos[r], "clips": clips[r], "seconds": round(seconds[r], 2)} for r in ordered}

    def as_json(self) -> dict[str, Any]:
        seconds = self.clips * self.content.frames / self.content.fps
        return {
            "hash": self.content.hash,
            "clips": self.clips,
            "seconds": round(seconds, 2),
            "drawn": self.drawn,
            "shards": self.shards,
            "bytes": self.bytes,
            "rejected": self.reasons(),
            "videos": [asdict(video) for video in self.videos],
        }

    def write(self, out: Path) -> None:
        text = json.dumps(self.as_json(), indent=1) + "\n"
        write_whole(out / FILE, lambda part: part.write_text(text, encoding="utf-8"))


def table(report: Report) -> str:
    """The report for a terminal: a line for each video with what went wrong, then the sums."""
    lines = [f"{'video':<40}{'seconds':>9}{'clips':>7}  what was left out"]
    for video in report.videos:
        lines.append(f"{video.name[-39:]:<40}{video.seconds:>9.1f}{video.kept:>7}  {_said(video)}")
    if report.drawn:
        lines.append(f"{'drawn avatars':<49}{report.drawn:>7}")
    lines.append("")
    for reason, n in report.reasons().items():
        lines.append(f"{reason:<40}{n['seconds']:>9.1f} s in {n['videos']:.0f} video(s)")
    facts = report.as_json()
    lines.append(
        f"{facts['clips']} clips, {facts['seconds'] / 60:.1f} minutes, {report.shards} shards, "
        f"{report.bytes / 1e6:.1f} MB, content {facts['hash']}"
    )
    return "\n".join(lines)


def _said(video: Video) -> str:
    parts = [video.error] if video.error else [f"{reason} {seconds:.1f} s" for reason, seconds in video.lost.items()]
    parts += [f"{reason}: {n} clip(s)" for reason, n in video.refused.items()]
    parts += [f"damaged ({video.damage})"] if video.damage else []
    return ", ".join(parts)
