"""What every trainer here needs: a curve, a wall-clock schedule, a process beside it, averaged weights, Muon.

Shape legend: M [rows, columns] matrices; other tensors are parameters of any shape.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Full
from typing import Any

import torch
from torch import Tensor, nn

from ..avatar import default_dtype
from . import parallel

log = logging.getLogger(__name__)

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic: quick to about one, never exactly


def check_start(out: Path, begun: bool, again: bool) -> None:
    """Refuse, by ValueError, to go on where no training was begun, and to begin anew where one was."""
    if again and not begun:
        raise ValueError(f"nothing to resume in {out}: start without --resume")
    if begun and not again:
        raise ValueError(f"{out} holds a training: go on with --resume, or give another folder")


def record(path: Path, line: Mapping[str, object]) -> None:
    """Append one line of JSON to a curve, and to the log; its figures to TensorBoard, where that is installed."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    log.info("%s", " ".join(f"{key} {value}" for key, value in line.items()))
    step, board = line["step"], _board(path.parent)
    if board and isinstance(step, int):
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                board.add_scalar(name, value, step)
        board.flush()


@lru_cache
def _board(folder: Path) -> Any:
    """Writer of event files in a folder of their own; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def training_dtype() -> torch.dtype:
    """What a CPU trains in: bfloat16 where it multiplies that fast; without such units it is seventy times slower."""
    return default_dtype(torch.device("cpu"))


def autocast() -> torch.autocast:
    """Products in `training_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=training_dtype() == torch.bfloat16)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename: `path` never holds half a file."""
    part = path.with_suffix(path.suffix + ".part")
    write(part)
    os.replace(part, path)


@contextmanager
def beside(make: Callable[[], Iterable[Any]], most: int) -> Iterator[Queue]:
    """A queue filled by a process of its own with what `make` gives; one of `most` keeps it from running ahead.

    make must be picklable, and so must what it gives: arrays, no tensors, each of which would keep a file open.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue(maxsize=most)
    process = context.Process(target=_fill, args=(make, queue), daemon=True)
    process.start()
    try:
        yield queue
    finally:
        process.terminate()
        process.join()


def _fill(make: Callable[[], Iterable[Any]], queue: Queue) -> None:
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    for item in make():
        while True:
            try:
                queue.put(item, timeout=10)
                break
            except Full:  # the trainer may have been killed, which leaves a daemon behind
                if parent is None or not parent.is_alive():
                    queue.cancel_join_thread()  # or the exit waits for a reader
                    return


def rate_scale(step: int, warmup_steps: int, progress: float, floor: float = 0.02) -> float:
    """Share of the peak learning rate: linear warm-up by steps, then a cosine over progress (0..1) down to `floor`."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def kept_share(decay: float, step: int) -> float:
    """How much of a running average stays at this step: young averages forget faster."""
    return min(decay, (1 + step) / (20 + step))


class Weights:
    """Weights in three precisions of time: the model's own (any dtype), float32 masters, and their running average.

    A model in bfloat16 is updated through its masters, or steps below a 256th of a weight would be lost.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.master = {n: nn.Parameter(p.detach().float().clone()) for n, p in model.named_parameters()}
        self.average = {n: p.detach().clone() for n, p in self.master.items()}

    def collect(self) -> float:
        """Move the model's gradients, averaged over the processes, to the masters; their norm."""
        for name, own in self.model.named_parameters():
            self.master[name].grad = None if own.grad is None else own.grad.float()
            own.grad = None
        grads = [p.grad for p in self.master.values() if p.grad is not None]
        parallel.average(grads)
        return float(torch.stack([g.norm() for g in grads]).norm())

    def clip(self, norm: float, limit: float) -> None:
        """Shorten the masters' gradients, of this norm, to the limit."""
        if norm > limit:
            for p in self.master.values():
                if p.grad is not None:
                    p.grad.mul_(limit / norm)

    @torch.no_grad()
    def publish(self, step: int) -> None:
        """After an optimiser step: masters to the model, and into the average (young averages forget faster)."""
        keep = kept_share(self.decay, step)
        for name, own in self.model.named_parameters():
            own.copy_(self.master[name])
            self.average[name].lerp_(self.master[name].detach(), 1 - keep)

    def state(self) -> dict[str, Any]:
        return {"master": {n: p.detach() for n, p in self.master.items()}, "average": self.average}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        for name, p in self.master.items():
            p.copy_(state["master"][name])
            self.average[name].copy_(state["average"][name])
        for name, own in self.model.named_parameters():
            own.copy_(self.master[name])


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), for the matrices of the blocks; a convolution's weights
    [out, in, ...] count as a matrix [out, in ...].

    The update is scaled to the root mean square of an AdamW step (0.2 sqrt(max(rows, columns)), Liu et al. 2025),
    so one learning rate serves both.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for alike in _by_shape(p for p in group["params"] if p.grad is not None):
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]).flatten(1) for p in alike]))
                scale = 0.2 * math.sqrt(max(updates.shape[1:]))
                for p, update in zip(alike, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor, keep: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - keep)
        return p.grad.lerp(state["momentum"], keep)


def orthogonal(m: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices, nearly: singular values of m [n, rows, columns] brought to about 0.7 .. 1.2."""
    a, b, c = _NEWTON_SCHULZ
    x = m.to(training_dtype())
    wide = x.shape[-2] > x.shape[-1]
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if wide else x).to(m.dtype)


def _by_shape(params: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        groups.setdefault(p.shape, []).append(p)
    return list(groups.values())
