"""What every rank did when: compute, wait and write, by block; a table, JSON, a picture.

Times are seconds since all ranks met. On a GPU a span ends when its work is done, not when it was handed over.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

Kind = Literal["wait", "compute", "write"]
KINDS: tuple[Kind, ...] = ("wait", "compute", "write")
_COLOURS = {"wait": "#d0d0d0", "compute": "#3070b0", "write": "#e08030"}
_DRAWN = 24  # newest blocks in the picture


@dataclass(frozen=True)
class Span:
    """block: of the stream. start, stop: seconds."""

    block: int
    kind: Kind
    start: float
    stop: float


@dataclass
class Timeline:
    """One rank's spans, the newest 20,000 of them.

    role: what the rank does, in words. origin: of the clock (time.perf_counter). device: whose work a span waits for.
    """

    rank: int
    role: str
    device: str = "cpu"
    origin: float = field(default_factory=time.perf_counter)
    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=20_000))

    @contextmanager
    def span(self, kind: Kind, block: int) -> Iterator[None]:
        """Around a piece of work, or of waiting, for a block."""
        start = time.perf_counter()
        yield
        if kind == "compute" and self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.add(kind, block, start, time.perf_counter())

    def add(self, kind: Kind, block: int, start: float, stop: float) -> None:
        """The same of two readings of time.perf_counter."""
        self.spans.append(Span(block, kind, start - self.origin, stop - self.origin))


@dataclass(frozen=True)
class RankFigures:
    """A row of the table: medians of a block in ms, and the share of the time, from first to last span, at work."""

    rank: int
    role: str
    blocks: int
    compute_ms: float
    wait_ms: float
    write_ms: float
    busy: float


def figures(timeline: Timeline) -> RankFigures:
    """What the spans of a rank come to; the first block, which warms up, is left out where there are others."""
    spans = timeline.spans
    blocks = sorted({s.block for s in spans})
    counted = set(blocks[1:] or blocks)
    each = {kind: dict.fromkeys(counted, 0.0) for kind in KINDS}
    for s in spans:
        if s.block in counted:
            each[s.kind][s.block] += s.stop - s.start
    middle = {kind: 1000 * median(values.values()) if values else 0.0 for kind, values in each.items()}
    lasted = max((s.stop for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    worked = sum(s.stop - s.start for s in spans if s.kind != "wait")
    busy = worked / lasted if lasted else 0.0
    waits, writes = middle["wait"], middle["write"]
    return RankFigures(timeline.rank, timeline.role, len(blocks), middle["compute"], waits, writes, busy)


def table(timelines: Sequence[Timeline]) -> str:
    """Lines of text, a rank each: medians of a block in ms."""
    rows = [figures(t) for t in timelines]
    wide = max(len(r.role) for r in rows)
    lines = [f"rank  {'role':<{wide}}  blocks  compute ms  wait ms  write ms  busy"]
    for r in rows:
        numbers = f"{r.compute_ms:10.1f}  {r.wait_ms:7.1f}  {r.write_ms:8.1f}  {r.busy:4.0%}"
        lines.append(f"{r.rank:4d}  {r.role:<{wide}}  {r.blocks:6d}  {numbers}")
    return "\n".join(lines)


def as_json(timelines: Sequence[Timeline]) -> list[dict[str, Any]]:
    """Figures of every rank, for reports."""
    rows = [asdict(figures(t)) for t in timelines]
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def write(timelines: Sequence[Timeline], path: Path) -> list[Path]:
    """All spans as JSON, and where matplotlib is installed the picture NAME.png beside it; returns the files."""
    ranks = [f | {"spans": [asdict(s) for s in t.spans]} for f, t in zip(as_json(timelines), timelines, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"unit": "seconds", "ranks": ranks}, indent=1) + "\n")
    try:
        figure = picture(timelines)
    except ImportError:
        return [path]
    figure.savefig(path.with_suffix(".png"), dpi=100)
    figure.clear()
    return [path, path.with_suffix(".png")]


def picture(timelines: Sequence[Timeline]) -> Any:
    """A figure of matplotlib: a bar a rank, its newest blocks numbered. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 1.2 + 0.6 * len(timelines)), layout="constrained")
    axis = figure.subplots()
    newest = max((s.block for t in timelines for s in t.spans), default=0)
    for row, timeline in enumerate(timelines):
        shown = [s for s in timeline.spans if s.block > newest - _DRAWN]
        for kind in KINDS:
            bars = [(s.start, s.stop - s.start) for s in shown if s.kind == kind]
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[kind], label=kind if not row else None)
        for s in shown:
            if s.kind == "compute":
                axis.text((s.start + s.stop) / 2, row, str(s.block), ha="center", va="center", fontsize=6, color="w")
    axis.set_yticks(range(len(timelines)), [f"{t.rank}: {t.role}" for t in timelines])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(loc="upper right", fontsize=8, ncols=3)
    return figure
