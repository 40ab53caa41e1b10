"""Two processes that train together."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from joyavatar_core.training import parallel, trainer

from .small_training import add_small_preset, small_training


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_process(rank: int, port: int, out: str) -> None:
    """Three steps of a small training as one of two processes; weights and draws go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    patch = pytest.MonkeyPatch()
    add_small_preset(patch)
    state = small_training(Path(out))
    common, own = state.draws()
    losses = [trainer.train_step(state)["loss"] for _ in range(3)]
    tensors = [torch.full((2, 3), float(rank)), torch.full((4,), 10.0 * rank)]
    parallel.average(tensors)
    result = {
        "weights": state.learner.weights.master,
        "draws": (common.random(), own.random()),
        "losses": losses,
        "mean": tensors,
        "agreed": parallel.agreed(7.0 + rank),
        "tokens": state.tokens,
    }
    torch.save(result, Path(out) / f"{rank}.pt")
    parallel.wait()
    dist.destroy_process_group()


def test_processes_draw_apart_and_learn_the_same(tmp_path: Path):
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [context.Process(target=one_process, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert first["draws"][0] == second["draws"][0] and first["draws"][1] != second["draws"][1]
    assert first["losses"] != second["losses"]
    for result in (first, second):
        assert (result["mean"][0] == 0.5).all() and (result["mean"][1] == 5).all()
        assert result["agreed"] == 7.0 and result["tokens"] == 100


def test_one_process_needs_nobody():
    parallel.join()
    tensor = torch.arange(3.0)
    parallel.average([tensor])
    parallel.wait()
    assert parallel.world() == 1 and parallel.rank() == 0 and parallel.agreed(2.5) == 2.5
    assert torch.equal(tensor, torch.arange(3.0))
