"""Time, memory and waits of a device. Marks are CUDA events on CUDA: nothing waits for the device but at the end.

Shape legend: no tensors of its own.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from .trace import Kind

Mark = float | torch.cuda.Event

_KINDS: tuple[tuple[Kind, str], ...] = (  # of kernels on CUDA, of operators elsewhere; the first that is found counts
    ("attention", r"scaled_dot_product|attention|flash|fmha|sdpa|sage"),
    ("linear", r"gemm|gemv|cutlass|nvjet|xmma|splitk|conv|(^|[:_])(add|b|badd)?mm($|[_<])|linear"),
)


def mark(device: torch.device) -> Mark:
    """This moment in the device's work."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    synchronise(device)
    return time.perf_counter()


def between(marks: Sequence[Mark]) -> list[float]:
    """Seconds between neighbouring marks; waits for the last."""
    if marks and isinstance(marks[-1], torch.cuda.Event):
        marks[-1].synchronize()
    return [_seconds(a, b) for a, b in pairwise(marks)]


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 15, warm_up: int = 2) -> list[float]:
    """Seconds of each of some calls, after others that are not counted."""
    for _ in range(warm_up):
        call()
    marks = [mark(device)]
    for _ in range(repeats):
        call()
        marks.append(mark(device))
    return between(marks)


def synchronise(device: torch.device) -> None:
    """Wait for all work given to a device."""
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).synchronize()


def waits(call: Callable[[], object], device: torch.device) -> int | None:
    """How often a call makes the host wait for a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(w.message) for w in said)


def by_kind(call: Callable[[], object], device: torch.device) -> tuple[dict[Kind, float], int]:
    """Seconds the device works on each kind in a call, by a profiler, and the number of kernels (operators on a CPU).

    The profiler slows a CPU down, and gaps between kernels are in no kind: the sum is not the time of the call.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as made:
        call()
        synchronise(device)
    spent: Counter[Kind] = Counter()
    count = 0
    for event in made.key_averages():
        if ("CUDA" in str(event.device_type)) != on_cuda:
            continue
        micro = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        spent[kind_of(event.key)] += micro * 1e-6
        count += event.count
    return {kind: spent[kind] for kind in ("linear", "attention", "memory")}, count


def kind_of(name: str) -> Kind:
    """What a kernel or operator does, by its name."""
    for kind, pattern in _KINDS:
        if re.search(pattern, name.lower()):
            return kind
    return "memory"


def restart_peak(device: torch.device) -> None:
    """Forget the highest use of memory so far, where that can be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Highest use of memory: of the device since `restart_peak`, else of this process since it began."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    resident = peak_resident_bytes()
    return {} if resident is None else {"resident": resident}


def peak_resident_bytes() -> int | None:
    """Highest resident memory of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds(a: Mark, b: Mark) -> float:
    if isinstance(a, torch.cuda.Event):
        assert isinstance(b, torch.cuda.Event)
        return a.elapsed_time(b) / 1e3
    assert not isinstance(b, torch.cuda.Event)
    return b - a
