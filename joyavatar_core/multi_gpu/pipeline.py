"""Ranks in a line: Live Avatar's timestep-forcing pipeline (2512.04677), and a decoder on a GPU of its own.

A stream's loop (`LatentStream`) runs on every rank, over the same sound; what differs is what a window does. `Stage`
runs one step of each block with a cache of its own and passes the block on, `Sender` runs all steps, `Receiver` takes
clean blocks. So nothing of the denoising is written twice, and latents alone travel.

Shape legend: B batch, C latent channels, n latents of a block, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..audio import AudioFrontEnd, AudioTokens, AudioTrack
from ..policy import RolloutPolicy
from ..rollout import FinishedBlock, Rollout, RolloutState
from .links import REFERENCE, Inlet, Outlet
from .members import Member
from .timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Ranked(Rollout):
    """A rank's part of a rollout. outlets: everything that leaves it."""

    timeline: Timeline
    outlets: tuple[Outlet, ...] = ()

    def close(self, state: RolloutState) -> None:
        """After the last block: wait until what has left here has come there."""
        for outlet in self.outlets:
            outlet.settle()


RankedT = TypeVar("RankedT", bound=Ranked)


@dataclass(frozen=True, kw_only=True)
class Stage(Ranked):
    """One step of every block: rank k of the pipeline runs step k, and holds only its cache.

    inlet: noisy blocks of the step before; None: this step draws the noise. outlets: the next step, or the decoder;
    none where this last rank decodes. refresh_from: the latent of block 0 that the reference is made again of, from the
    last step; refresh_to: where that sends it.
    """

    stage: int
    inlet: Inlet | None = None
    refresh_from: Inlet | None = None
    refresh_to: tuple[Outlet, ...] = ()

    def start(self) -> RolloutState:
        """A fresh state: one empty cache."""
        return RolloutState((self._cache(),))

    def ring(self, step: object) -> int:
        """The only one."""
        return 0

    def run_window(self, state: RolloutState, num_blocks: int | None = None) -> list[FinishedBlock]:
        """This rank's step of the next block; the last one returns it clean."""
        block = state.window
        step = self.policy.window_steps(block, num_blocks)[self.stage]
        if self.refresh_from and block == self.policy.reference_refresh:
            with self.timeline.span("wait", block):
                state.first = self.refresh_from.receive().to(self.device)
        if self.inlet:
            with self.timeline.span("wait", block):
                state.noisy[block] = self.inlet.receive().to(self.device)
        with self.timeline.span("compute", block):
            if self.policy.reference_sink:
                self._make_reference(state)
            done = self.step(state, step)
            latents = self.leave(state, block) if done is None else done.latents
        self._pass_on(state, block, latents)
        state.window += 1
        return [] if done is None else [done]

    def close(self, state: RolloutState) -> None:
        """See Ranked; a latent for a refresh that did not come to be is taken too."""
        if self.refresh_from and 0 < state.window <= (self.policy.reference_refresh or 0):
            self.refresh_from.receive()
        for outlet in self.refresh_to:
            outlet.settle()
        super().close(state)

    def _pass_on(self, state: RolloutState, block: int, latents: Tensor) -> None:
        with self.timeline.span("wait", block):
            if block == 0 and state.first is not None:
                for outlet in self.refresh_to:
                    outlet.send(state.first)
            for outlet in self.outlets:
                outlet.send(latents)


@dataclass(frozen=True, kw_only=True)
class Sender(Ranked):
    """A whole rollout whose clean blocks leave for the decoder's rank."""

    def run_window(self, state: RolloutState, num_blocks: int | None = None) -> list[FinishedBlock]:
        """See Rollout."""
        block = self.policy.first_block(state.window)
        with self.timeline.span("compute", block):
            finished = super().run_window(state, num_blocks)
        with self.timeline.span("wait", block):
            for clean in finished:
                for outlet in self.outlets:
                    outlet.send(clean.latents[:, :, -self.policy.block_latents :])
        return finished


@dataclass(frozen=True, kw_only=True)
class Receiver(Ranked):
    """Clean blocks of another rank, in place of a rollout."""

    inlet: Inlet

    def start(self) -> RolloutState:
        """A fresh state: nothing is remembered here."""
        return RolloutState(())

    def run_window(self, state: RolloutState, num_blocks: int | None = None) -> list[FinishedBlock]:
        """The block that the next window finishes, if it finishes one."""
        block = state.window - self.policy.lead_blocks
        state.audio.clear()
        state.window += 1
        if block < 0:
            return []
        with self.timeline.span("wait", block):
            return [FinishedBlock(block, self.shown(block, self.inlet.receive().to(self.device)))]


@dataclass(frozen=True)
class Unheard:
    """A front end that waits for the sound as another does and makes no tokens of it: of ranks that do not denoise."""

    heard: AudioFrontEnd

    @property
    def channels(self) -> int:
        return self.heard.channels

    @property
    def tokens_per_latent(self) -> int:
        return self.heard.tokens_per_latent

    def needs(self, latent_stop: int) -> int:
        return self.heard.needs(latent_stop)

    def keeps(self, latent_start: int) -> int:
        return self.heard.keeps(latent_start)

    def features(self, track: AudioTrack, latents: range) -> AudioTokens:
        """None of each latent."""
        return AudioTokens(torch.zeros(len(latents), 0, self.channels), torch.ones(len(latents), 0, dtype=torch.bool))


def check_pipeline(policy: RolloutPolicy, ranks: int) -> None:
    """ValueError if a policy cannot be run a step a rank on so many ranks."""
    steps = len(policy.timesteps)
    if policy.window_blocks != 1 or policy.kv_level != "per_step":
        raise ValueError(
            f"a rank per timestep needs a policy of one block and a cache per step (live-avatar); this one has "
            f"window_blocks {policy.window_blocks} and kv_level {policy.kv_level}: use --parallel vae or sequence"
        )
    if policy.motion_frame:
        raise ValueError("motion_frame: a step would need the block before it clean, so ranks would wait: use --no-mci")
    if ranks not in (steps, steps + 1):
        raise ValueError(
            f"a rank per timestep: {steps} timesteps take {steps} processes, or {steps + 1} with one that decodes, "
            f"not {ranks}"
        )


def pipeline_rank(rollout: Rollout, member: Member, timeline: Timeline) -> Stage | Receiver:
    """This rank's part of a pipeline: ranks 0 .. steps - 1 denoise, one more decodes (else the last step's does)."""
    check_pipeline(rollout.policy, member.world)
    steps, me = len(rollout.policy.timesteps), member.rank
    last = steps - 1
    shape, dtype = block_shape(rollout), latents_dtype(rollout)
    inlet = Inlet(member, me - 1, shape, dtype) if me else None
    if me == steps:
        assert inlet
        return as_ranked(Receiver, rollout, timeline=timeline, inlet=inlet)
    refresh = rollout.policy.reference_sink and rollout.policy.reference_refresh is not None
    first = Inlet(member, last, (*shape[:2], 1, *shape[3:]), dtype, REFERENCE)
    return as_ranked(
        Stage,
        rollout,
        timeline=timeline,
        stage=me,
        inlet=inlet,
        outlets=(Outlet(member, me + 1),) if me + 1 < member.world else (),
        refresh_from=first if refresh and me != last else None,
        refresh_to=tuple(Outlet(member, k, REFERENCE) for k in range(last)) if refresh and me == last else (),
    )


def decoder_rank(rollout: Rollout, member: Member, timeline: Timeline) -> Sender | Receiver:
    """Two ranks: rank 0 runs the rollout, rank 1 decodes. ValueError for another number of them."""
    if member.world != 2:
        raise ValueError(f"the decoder on a GPU of its own takes 2 processes, not {member.world}")
    if member.rank == 0:
        return as_ranked(Sender, rollout, timeline=timeline, outlets=(Outlet(member, 1),))
    inlet = Inlet(member, 0, block_shape(rollout), latents_dtype(rollout))
    return as_ranked(Receiver, rollout, timeline=timeline, inlet=inlet)


def block_shape(rollout: Rollout) -> tuple[int, ...]:
    """[B, C, n, h, w]"""
    channels, latents = rollout.model.config.out_channels, rollout.policy.block_latents
    return (rollout.batch, channels, latents, *rollout.geometry.latent_size)


def latents_dtype(rollout: Rollout) -> torch.dtype:
    """In which the rollout holds noisy and clean latents."""
    return torch.float64 if rollout.dtype == torch.float64 else torch.float32


def as_ranked(kind: type[RankedT], rollout: Rollout, **more: Any) -> RankedT:
    """The same rollout as one rank's part of it. Nothing is captured: ranks talk between, and inside, the forwards."""
    own = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return kind(**{**own, "fast": replace(rollout.fast, capture=False)}, **more)
