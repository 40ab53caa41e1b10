"""Several processes on one training: each draws its own sequences of a common layout, gradients are averaged.

Started by torchrun (`torchrun --nproc-per-node 2 -m joyavatar_core.training.flow_matching ...`). On a CPU a process
of one thread on every core is half as fast again as one process with as many threads. Without torchrun there is one
process, and everything here does nothing.

Shape legend: tensors of any shape.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Meet the other processes that torchrun started, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group(backend())


def backend() -> str:
    """gloo, and beside it NCCL for the tensors of GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def average(tensors: Sequence[Tensor]) -> None:
    """Give every process the mean over all of them, in place; all must bring the same shapes."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.div_(world()).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def agreed(value: float) -> float:
    """The value of process 0."""
    if world() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()
