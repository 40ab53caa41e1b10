"""The whole preparation: worker processes look and cut, this process encodes and writes, in a fixed order.

The order of the samples is that of the names of the videos, whatever the number of workers, so a run that was killed
and started again makes the shards it would have made. What was found in a video lies in sources/ID.json: it is looked
through once. A clip is done when it is in a whole shard, or was refused.

Shape legend: no tensors of its own.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ... import checkpoint
from .. import workers
from ..common import write_whole
from ..shards import NEGATIVE
from . import jobs
from .encode import Encoders, EncodingError
from .faces import FaceDetector
from .jobs import Clip, Plan, Refusal
from .preview import ContactSheet
from .report import Report, Video
from .settings import Content, VideoOptions, claim
from .sources import Source
from .writer import ShardWriter

log = logging.getLogger(__name__)

_REMEDY = ", or move a video away that upsets the decoder; the same command goes on from here"


class Progress(Protocol):
    """Told how far it is."""

    def planned(self, clips: int) -> None:
        """So many more clips are to be made."""
        ...

    def made(self, key: str) -> None:
        """One of them is made, or turned down."""
        ...


@dataclass(frozen=True)
class Task:
    """What to prepare, and where.

    video, detector: None without sources. drawn: seeds of avatars to draw. faces: reads the face embedding beside a
    video. workers: processes; 0: none but this one. shard_bytes: size of a shard.
    """

    out: Path
    content: Content
    sources: Sequence[Source] = ()
    video: VideoOptions | None = None
    detector: FaceDetector | None = None
    drawn: range = range(0)
    workers: int = 0
    shard_bytes: int = 256 << 20
    faces: Callable[[Path], Tensor] | None = None


@dataclass
class _Run:
    task: Task
    encoders: Encoders
    progress: Progress
    writer: ShardWriter
    sheet: ContactSheet
    videos: dict[str, Video] = field(default_factory=dict)

    def clips(self, pool: Executor | None) -> Iterator[tuple[Source | None, Clip | Refusal]]:
        """All clips that are not done, in their order."""
        yield from workers.in_order(pool, self._calls(pool), self.task.workers + 1, _REMEDY)

    def _calls(self, pool: Executor | None) -> Iterator[tuple[Source | None, Callable[[], Clip | Refusal]]]:
        task = self.task
        for source, plan in workers.in_order(pool, map(self._scan, task.sources), 2 * task.workers + 1, _REMEDY):
            self._planned(source, plan)
            for cut in plan.cuts:
                key = plan.key(cut)
                if key not in self.writer.keys and key not in plan.refused:
                    assert task.video is not None
                    yield source, partial(jobs.cut, source, replace(plan, cuts=()), cut, task.content, task.video)
        for seed in task.drawn:
            if jobs.drawn_key(seed) not in self.writer.keys:
                self.progress.planned(1)
                yield None, partial(jobs.draw, seed, task.content)

    def _scan(self, source: Source) -> tuple[Source, Callable[[], Plan]]:
        path, task = plan_path(self.task.out, source), self.task
        if path.exists():
            return source, partial(_same, read_plan(path, source))
        assert task.detector is not None and task.video is not None
        return source, partial(jobs.scan, source, task.detector, task.content, task.video)

    def _planned(self, source: Source, plan: Plan) -> None:
        path = plan_path(self.task.out, source)
        if not path.exists():
            write_plan(path, plan)
        video = Video.of(plan)
        video.kept = sum(plan.key(cut) in self.writer.keys for cut in plan.cuts)
        for reason in plan.refused.values():
            video.refused[reason] = video.refused.get(reason, 0) + 1
        self.videos[source.id] = video
        self.progress.planned(len(plan.cuts) - video.kept - len(plan.refused))
        if plan.error:
            log.info("%s: %s", plan.name, plan.error)

    def take(self, source: Source | None, clip: Clip | Refusal) -> None:
        """Encode a clip and put it into a shard, or note why not."""
        if isinstance(clip, Refusal):
            assert source is not None
            self._refuse(source, clip)
            return
        try:
            tensors = self.encoders.encode(clip, self._face(source, clip))
        except EncodingError as error:
            if source is None:
                raise
            self._refuse(source, Refusal(clip.key, str(error)))
            return
        self.writer.add(clip.key, tensors, {"key": clip.key, **clip.facts, "content": self.task.content.hash})
        self.sheet.add(clip)
        if source is not None:
            self.videos[source.id].kept += 1
        self.progress.made(clip.key)

    def _face(self, source: Source | None, clip: Clip) -> Tensor | None:
        given = self.task.faces(source.face) if source and source.face and self.task.faces else None
        known = "file" if given is not None else "embedder" if self.encoders.face and clip.face is not None else ""
        clip.facts["face"] = known
        return given

    def _refuse(self, source: Source, refusal: Refusal) -> None:
        path = plan_path(self.task.out, source)
        plan = read_plan(path, source)
        write_plan(path, replace(plan, refused={**plan.refused, refusal.key: refusal.reason}))
        refused = self.videos[source.id].refused
        refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
        self.progress.made(refusal.key)


def prepare(task: Task, encoders: Encoders, progress: Progress, preview: Path | None = None) -> Report:
    """Make all samples of a task that are not there yet; the report is of the whole folder.

    Raises ValueError for settings that differ from those of the folder or a video that changed, OSError for a full disk
    or a worker that died. Whatever was finished by then stays.
    """
    with _room(task.out):
        claim(task.out, task.content, task.video)
        _write_negative(task, encoders)
        with ShardWriter(task.out, task.shard_bytes) as writer:
            run = _Run(task, encoders, progress, writer, ContactSheet(encoders.geometry))
            with workers.pool(task.workers) as pool:
                for source, clip in run.clips(pool):
                    run.take(source, clip)
        report = _report(run)
        report.write(task.out)
        if preview:
            run.sheet.write(preview)
    return report


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """Say in words that the disk is full, where the system says it in three."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename or "goes on" in str(error):
            raise
        raise OSError(
            errno.ENOSPC, f"the disk of {out} is full: free some room and run the same command again, which goes on"
        ) from error


def _write_negative(task: Task, encoders: Encoders) -> None:
    """The negative prompt's embedding, once for the folder."""
    path = task.out / NEGATIVE
    if encoders.text and not path.exists():
        tokens = encoders.text(task.content.negative_prompt)[0].bfloat16()
        checkpoint.write(path, {"text": tokens}, {"prompt": task.content.negative_prompt})


def _report(run: _Run) -> Report:
    shards = sorted(run.task.out.glob("shard-*.tar"))
    drawn = sum(key.startswith("drawn-") for key in run.writer.keys)
    others = _other_videos(run)
    size = sum(path.stat().st_size for path in shards)
    return Report(run.task.content, [*run.videos.values(), *others], drawn, len(shards), size)


def _other_videos(run: _Run) -> list[Video]:
    """Videos of earlier runs on the same folder that are not part of this one."""
    found = []
    for path in sorted((run.task.out / "sources").glob("*.json")):
        if path.stem not in run.videos:
            plan = Plan.from_json(path.read_text(encoding="utf-8"))
            video = Video.of(plan)
            video.kept = sum(plan.key(cut) in run.writer.keys for cut in plan.cuts)
            for reason in plan.refused.values():
                video.refused[reason] = video.refused.get(reason, 0) + 1
            found.append(video)
    return found


# Plans on disk


def plan_path(out: Path, source: Source) -> Path:
    """Where it lies what was found in a video."""
    return out / "sources" / f"{source.id}.json"


def read_plan(path: Path, source: Source) -> Plan:
    """The plan of a video. ValueError if it cannot be read, or was made of another file of that name."""
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not readable ({error}): delete it, the video is then looked through again"
        ) from error
    size = source.path.stat().st_size
    if plan.bytes != size:
        raise ValueError(
            f"{source.path} had {plan.bytes} bytes when it was looked through, now {size}: give the new video another "
            "name, or prepare into another --out"
        )
    return plan


def write_plan(path: Path, plan: Plan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(plan.to_json(), encoding="utf-8"))


def _same(plan: Plan) -> Plan:
    return plan
