"""One rank's part of a run from picture and sound to a file: which stream it has, and whether it decodes and writes.

Shape legend: H W pixels, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ..avatar import Avatar, Encoded
from ..generate import Chunks, FrameSink, Progress, generate
from ..overlap import Overlap
from ..policy import RolloutPolicy
from ..rollout import Rollout
from ..stream import AvatarStream, LatentBlock, LatentStream, spoken
from ..types import VideoAutoencoder
from .members import Member, reaching
from .pipeline import Ranked, Receiver, Unheard, decoder_rank, pipeline_rank
from .sequence import sequence_rank
from .timeline import Timeline

Parallel = Literal["tpp", "vae", "sequence"]


@dataclass(frozen=True)
class Plan:
    """How the ranks of a run share the work.

    parallel: "tpp": a rank per timestep, and one more that decodes; "vae": one denoises, one decodes; "sequence": each
    has a share of the tokens, rank 0 decodes.
    """

    parallel: Parallel
    world: int

    @staticmethod
    def suited(policy: RolloutPolicy, world: int) -> Plan:
        """What suits a policy and a number of processes."""
        steps = len(policy.timesteps)
        if policy.kv_level == "per_step" and not policy.motion_frame and world in (steps, steps + 1):
            return Plan("tpp", world)
        return Plan("vae" if world == 2 else "sequence", world)

    @property
    def writer(self) -> int:
        """The rank that decodes and writes."""
        return 0 if self.parallel == "sequence" else self.world - 1

    def role(self, rank: int, policy: RolloutPolicy) -> str:
        """What a rank does, in words."""
        if self.parallel == "sequence":
            return f"share {rank + 1} of {self.world}" + (", decoder" if rank == self.writer else "")
        if self.parallel == "vae":
            return "decoder" if rank == self.writer else "rollout"
        steps = len(policy.timesteps)
        if rank == steps:
            return "decoder"
        return f"step {rank + 1} of {steps}" + (", decoder" if rank == self.writer else "")

    def rollout(self, rollout: Rollout, member: Member, timeline: Timeline) -> Ranked:
        """A rank's part of a rollout. ValueError where policy, sizes and number of ranks do not go together."""
        make = {"tpp": pipeline_rank, "vae": decoder_rank, "sequence": sequence_rank}[self.parallel]
        return make(rollout, member, timeline)


class TimedStream(AvatarStream):
    """An AvatarStream that notes how long a block is decoded."""

    def __init__(self, latents: LatentStream, autoencoder: VideoAutoencoder, timeline: Timeline) -> None:
        super().__init__(latents, autoencoder)
        self.timeline = timeline

    def decode(self, block: LatentBlock) -> Tensor:
        """See AvatarStream."""
        with self.timeline.span("compute", block.index):
            return super().decode(block)


@dataclass
class TimedSink:
    """A sink that notes how long the frames of a block are written."""

    sink: FrameSink
    timeline: Timeline
    blocks: int = 0

    def write(self, frames: np.ndarray) -> None:
        with self.timeline.span("write", self.blocks):
            self.sink.write(frames)
        self.blocks += 1

    def write_audio(self, samples: np.ndarray) -> None:
        self.sink.write_audio(samples)


def _timed(open_sink: Callable[[int], FrameSink] | None, timeline: Timeline, frames_done: int) -> TimedSink:
    assert open_sink, "the writer's rank needs a sink"
    return TimedSink(open_sink(frames_done), timeline)


@dataclass(frozen=True)
class RankedRun:
    """What a rank runs: a stream over the whole sound; the writer decodes its blocks and has the sink."""

    member: Member
    plan: Plan
    stream: TimedStream

    @property
    def writes(self) -> bool:
        return self.member.rank == self.plan.writer

    def run(
        self,
        sound: Chunks,
        open_sink: Callable[[int], FrameSink] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        overlap: Overlap | None = None,
    ) -> Progress | None:
        """This rank's part of a run over a sound, which every rank hears for itself. Figures on the writer's rank.

        open_sink, overlap: as in `generate`; only the writer's rank needs them.
        Raises RankLostError when another rank is gone; the frames made until then are in the sink.
        """
        timeline, rollout, progress = self.stream.timeline, self.stream.latents.rollout, None
        self.member.wait()
        timeline.origin = perf_counter()
        if self.writes:
            progress = generate(self.stream, sound, partial(_timed, open_sink, timeline), None, on_progress, overlap)
        else:
            for _ in spoken(self.stream.latents, sound):
                pass
        assert isinstance(rollout, Ranked)
        rollout.close(self.stream.state.rollout)
        return progress

    def timelines(self) -> list[Timeline]:
        """Those of all ranks, on the writer's; empty on the others. All must call it."""
        gathered: list[Any] | None = [None] * self.member.world if self.writes else None
        with reaching(f"{self.member.name}, figures"):
            dist.gather_object(self.stream.timeline, gathered, dst=self.plan.writer)
        return gathered or []


def ranked_run(
    member: Member,
    plan: Plan,
    avatar: Avatar,
    picture: Tensor,
    policy: RolloutPolicy,
    seed: int,
    encoded: Encoded | None = None,
    decoder: VideoAutoencoder | None = None,
) -> RankedRun:
    """A rank's part of what `avatar.stream` would do for a picture [1, 3, H, W] in [-1, 1].

    Ranks that do not denoise give the transformer's memory back. ValueError where plan and policy do not fit.
    """
    geometry = avatar.geometry((picture.shape[3], picture.shape[2]), policy)
    timeline = Timeline(member.rank, plan.role(member.rank, policy), str(avatar.device))
    condition = avatar.condition(picture, encoded)
    whole = Rollout(avatar.model, policy, geometry, condition, seed, avatar.device, avatar.dtype)
    rollout = plan.rollout(whole, member, timeline)
    front_end = avatar.front_end(geometry)
    resting = isinstance(rollout, Receiver)
    latents = LatentStream(rollout, Unheard(front_end) if resting else front_end)
    if resting:
        avatar.model.to("meta")
    return RankedRun(member, plan, TimedStream(latents, decoder or avatar.autoencoder, timeline))
