"""Sequence parallelism, Ulysses style (2309.14509): every rank has a share of each latent frame's tokens.

Of the P tokens of a frame rank r has the r-th run of P / N, so that what belongs to a latent frame (modulation, audio)
serves its share as it served the whole. Only self-attention needs all tokens: there the ranks exchange (my tokens, all
heads) for (all tokens, my heads) before keys are cached, so that a cache holds H / N heads and rotation stays as it is.
Velocities are put together again; what follows is the same arithmetic on every rank. All of it is hooks on the layers
of the one model, which knows nothing of it.

Shape legend: B batch, F latent frames, P tokens of a latent frame, N ranks, p = P / N, L = F * P, l = F * p, D = H * d
dim, H heads, d head dimension, C numbers of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..cache import KV
from ..model import Block, JoyAvatarDiT
from ..rollout import FinishedBlock, Rollout, RolloutState
from .members import Member, reaching
from .pipeline import Ranked, as_ranked
from .timeline import Timeline


@dataclass
class Exchange:
    """Shares of tokens and heads between the ranks.

    share: tokens of a latent frame on each rank (p). group: torch.distributed's, of the ranks. whole: while True this
    rank has all tokens by itself and nothing is exchanged. waited: seconds in exchanges (on a CPU).
    """

    member: Member
    share: int
    group: Any
    whole: bool = False
    waited: float = field(default=0.0)

    @property
    def ranks(self) -> int:
        return self.member.world

    def mine(self, tokens: Tensor) -> Tensor:
        """[B, C, F, rows, columns] with rows * columns = P -> [B, C, F, p]"""
        start = self.member.rank * self.share
        return tokens.flatten(3)[..., start : start + self.share]

    def gathered(self, tokens: Tensor) -> Tensor:
        """[B, l, C] of every rank -> [B, L, C]"""
        parts = [torch.empty_like(tokens) for _ in range(self.ranks)]
        with self._talking("velocities"):
            dist.all_gather(parts, tokens.contiguous(), group=self.group)
        return torch.cat([part.unflatten(1, (-1, self.share)) for part in parts], dim=2).flatten(1, 2)

    def to_heads(self, x: Tensor) -> Tensor:
        """My tokens, all heads [B, l, D] -> all tokens, my heads [B, L, D / N]"""
        by_rank = x.unflatten(2, (self.ranks, -1)).movedim(2, 0)  # [N, B, l, D / N]: whose heads they are
        came = self._swapped(by_rank).unflatten(2, (-1, self.share))  # [N, B, F, p, D / N]: whose tokens they are
        return came.permute(1, 2, 0, 3, 4).flatten(1, 3)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All tokens, my heads [B, L, D / N] -> my tokens, all heads [B, l, D]"""
        by_rank = x.unflatten(1, (-1, self.ranks, self.share)).movedim(2, 0).flatten(2, 3)  # [N, B, l, D / N]
        return self._swapped(by_rank).movedim(0, 2).flatten(2, 3)

    def my_heads(self, x: Tensor) -> Tensor:
        """[B, L, H, d] -> [B, L, H / N, d]"""
        return x.chunk(self.ranks, dim=2)[self.member.rank].contiguous()

    def _swapped(self, x: Tensor) -> Tensor:
        """[N, ...]: what is at i goes to rank i -> [N, ...]: what came from rank i is at i."""
        x = x.contiguous()
        out = torch.empty_like(x)
        with self._talking("tokens and heads"):
            dist.all_to_all_single(out, x, group=self.group)
        return out

    @contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        start = perf_counter()
        with reaching(f"{self.member.name}, {what}"):
            yield
        self.waited += perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Shared(Ranked):
    """A rollout whose every forward is shared by all ranks; each holds the keys and values of its heads."""

    exchange: Exchange

    @property
    def heads(self) -> int:
        """Of this rank."""
        return self.model.config.heads // self.exchange.ranks

    def run_window(self, state: RolloutState, num_blocks: int | None = None) -> list[FinishedBlock]:
        """See Rollout; all ranks return the same blocks."""
        block, start, waited = self.policy.first_block(state.window), perf_counter(), self.exchange.waited
        finished = super().run_window(state, num_blocks)
        waited = self.exchange.waited - waited
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        stop = perf_counter()
        self.timeline.add("compute", block, start, stop - waited)
        self.timeline.add("wait", block, stop - waited, stop)
        return finished


def check_sequence(heads: int, grid: tuple[int, int], ranks: int) -> None:
    """ValueError if heads, or tokens of a latent frame (rows, columns), cannot be shared by so many ranks."""
    if heads % ranks:
        fit = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"the {heads} heads of the model cannot be shared by {ranks} processes: use one of {fit}")
    rows, columns = grid
    if rows * columns % ranks:
        raise ValueError(
            f"the {rows * columns} tokens ({columns}x{rows}) of a latent frame cannot be shared by {ranks} processes: "
            f"choose a --size whose width or height is a multiple of {ranks} tokens, or another number of processes"
        )


def sequence_rank(rollout: Rollout, member: Member, timeline: Timeline, group: Any = None) -> Shared:
    """This rank's part of a rollout over all ranks of the group (None: of the run); the model's layers get hooks."""
    geometry = rollout.geometry
    check_sequence(rollout.model.config.heads, geometry.grid, member.world)
    group = group or dist.new_group(timeout=timedelta(seconds=member.patience))
    exchange = Exchange(member, geometry.tokens_per_latent // member.world, group)
    share_layers(rollout.model, exchange)
    return as_ranked(Shared, rollout, timeline=timeline, exchange=exchange)


def share_layers(model: JoyAvatarDiT, exchange: Exchange) -> None:
    """Make a model run on this rank's share of the tokens, from its latents to its velocity."""

    def after(layer: nn.Module, change: Any) -> None:
        layer.register_forward_hook(lambda _, __, out: out if exchange.whole else change(out))

    def before(layer: nn.Module, change: Any) -> None:
        layer.register_forward_pre_hook(lambda _, given: given if exchange.whole else (change(given[0]),))

    after(model.patch_embedding, exchange.mine)
    after(model.head, exchange.gathered)
    attentions = [cast(Block, block).self_attn for block in model.blocks]
    for attention in attentions:
        for layer in (attention.norm_q, attention.norm_k, attention.v):
            after(layer, exchange.to_heads)
        before(attention.o, exchange.to_tokens)
        attention.heads //= exchange.ranks
    prefill = model.prefill

    def whole(*given: Any, **named: Any) -> list[KV]:
        """A reference is run once: every rank runs all of it, and keeps its heads."""
        exchange.whole = True
        for attention in attentions:
            attention.heads *= exchange.ranks
        try:
            made = prefill(*given, **named)
        finally:
            exchange.whole = False
            for attention in attentions:
                attention.heads //= exchange.ranks
        return [(exchange.my_heads(k), exchange.my_heads(v)) for k, v in made]

    model.prefill = whole
