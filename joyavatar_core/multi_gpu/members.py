"""A process among several that make one video: its number, its device, how it meets the others and loses them.

gloo carries what goes by way of the host (latents, figures), NCCL what goes from GPU to GPU (shares of tokens).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MEETING = timedelta(minutes=30)
"""How long ranks wait for each other while weights are loaded."""


class RankLostError(ChildProcessError):
    """Another process of the run is gone, or says nothing: the run cannot go on."""


@dataclass(frozen=True)
class Member:
    """One process of `world`.

    rank: 0 .. world - 1. local: its number on this machine, which chooses its GPU. patience: seconds that it waits for
    something of another rank, once all are at work.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    patience: float = 600.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def device(self, word: str = "auto") -> str:
        """The device of this rank: its own GPU, or the CPU. ValueError where there are fewer GPUs than ranks."""
        if word == "cpu":
            return word
        if word not in ("auto", "cuda"):
            raise ValueError(f"--device {word}: several processes take their GPUs in order; use auto, cuda or cpu")
        if not torch.cuda.is_available():
            raise ValueError(f"{self.world} processes and no CUDA GPU here: --device cpu runs them on the CPU")
        if self.local >= (count := torch.cuda.device_count()):
            raise ValueError(f"{self.name} finds {count} GPUs on this machine: give --gpus of at most {count}")
        torch.cuda.set_device(self.local)
        return f"cuda:{self.local}"

    def wait(self) -> None:
        """Until all ranks are here; RankLostError if one never comes."""
        with reaching(f"{self.name}, meeting the others"):
            dist.all_reduce(torch.zeros(1))  # on the host: a barrier would choose a device


def backend() -> str:
    """gloo, and beside it NCCL for the tensors of GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def started_by_torchrun() -> Member | None:
    """This process as torchrun's environment describes it; None where it was started otherwise, or is alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return None
    return Member(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))


@contextmanager
def met(member: Member, store: Any = None) -> Iterator[Member]:
    """The process group of all ranks, while it lasts. store: torch.distributed's, where they meet; None: torchrun's.

    Whoever leaves in good order waits for the others, so that nobody finds a connection closed.
    """
    with reaching(f"{member.name}, meeting the others"):
        if store is None:
            dist.init_process_group(backend(), timeout=MEETING)
        else:
            dist.init_process_group(backend(), store=store, rank=member.rank, world_size=member.world, timeout=MEETING)
    yield member
    member.wait()
    dist.destroy_process_group()


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """Around a word to or from another rank: gloo's and NCCL's errors of a lost one become RankLostError."""
    try:
        yield
    except RuntimeError as error:  # dist.DistBackendError and the plain ones of gloo
        said = re.sub(r"^(\[[^]]*\]\s*)+", "", str(error)).splitlines() or [type(error).__name__]
        reason = said[0].split(". ")[0].removesuffix(".")
        raise RankLostError(f"{what}: another process of the run is gone ({reason})") from error
