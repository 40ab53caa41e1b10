"""What a card of so many GiB runs, and how: weights, keys and values, activations and decoder, reckoned from shapes.

With a CUDA device of that size or more at hand, an arrangement is run under a cap of the memory.

Shape legend: no tensors of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..conditioning import image_channels
from ..config import MODELS, ModelConfig
from ..geometry import Geometry
from ..policy import RolloutPolicy
from ..types import VideoAutoencoder
from . import timing
from .costs import decoder_cost, model_cost
from .subject import Weights, random_light, random_model, random_rollout, random_wan, run_steady_window, steady_state
from .trace import flops

GIB = 1 << 30
CARDS = (8, 12, 16, 24, 48, 80)
AIMS = (
    ("tiny", (256, 256)),
    ("flash-1.3b", (512, 512)),
    ("flash-1.3b", (480, 832)),
    ("teacher-14b", (384, 704)),
)
"""Configurations and (width, height) that are planned for."""

CONTEXT_BYTES = 768 << 20  # CUDA's context, and the libraries' own rooms
WHOLE = 0.93  # of the rest: an allocator cannot join all that is free

Decoder = Literal["wan", "light"]


@dataclass(frozen=True)
class Arrangement:
    """weights: bf16, fp8 (matrices of the blocks in eight bits, computed in bf16) or offload (on the host, brought
    layer by layer). decoder: Wan2.1's autoencoder, or the light one; it encodes the picture too.
    """

    weights: Weights
    decoder: Decoder


ARRANGEMENTS = tuple(Arrangement(w, d) for w in ("bf16", "fp8", "offload") for d in ("wan", "light"))
"""In the order in which they are wished for."""


@dataclass(frozen=True)
class Need:
    """Bytes of an arrangement. weights: of transformer and decoder. kv: cache and constant conditions. state: all else
    that outlives a window. activations: the most that a window, decoding a block or encoding the picture takes besides,
    `widest` of the three. Text, image and audio encoders are not in it: they run before, or are small.
    """

    weights: int
    kv: int
    state: int
    activations: int
    widest: str

    @property
    def peak(self) -> int:
        return self.weights + self.kv + self.state + self.activations


@dataclass(frozen=True)
class Row:
    """What a card does with a configuration. arrangement: None where nothing fits, and `need` is then of the leanest.

    flops: of a block (transformer and decoder). real_time: FLOP a second that must be sustained for it. brought: bytes
    from the host for every forward. checked: how it was found out.
    """

    card: int
    config: str
    size: tuple[int, int]
    arrangement: Arrangement | None
    need: Need
    flops: int
    real_time: float
    brought: int
    checked: str = "computed"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.need.peak}


def usable(card: int) -> int:
    """Bytes a run can have of a card of so many GiB."""
    return int((card * GIB - CONTEXT_BYTES) * WHOLE)


def geometry_of(config: ModelConfig, size: tuple[int, int], policy: RolloutPolicy) -> Geometry:
    """Geometry of a configuration whose latents are the light autoencoder's that `random_light` takes."""
    spatial = 8 if config.out_channels == MODELS["flash-1.3b"].out_channels else 16
    return Geometry(*size, **policy.block_sizes, spatial=spatial, patch=config.patch)


def need(
    config: ModelConfig,
    policy: RolloutPolicy,
    geometry: Geometry,
    arrangement: Arrangement,
    dtype: torch.dtype = torch.bfloat16,
) -> Need:
    """Memory of a run. Activations and states are those of `dtype`, by running it on no device."""
    model = model_cost(config, policy, geometry, dtype)
    decoder = decoder_cost(arrangement.decoder, config, geometry, dtype)
    resident = {"bf16": model.matrices, "fp8": model.matrices // dtype.itemsize, "offload": 0}[arrangement.weights]
    brought = 0 if arrangement.weights == "bf16" else model.largest
    # the picture is encoded before there are any keys and values
    kept = model.conditions + model.state + decoder.state
    moments = {
        "window": model.temporary + brought,
        "decoding": decoder.decode,
        "picture": max(0, decoder.encode - kept),
    }
    widest = max(moments, key=lambda name: moments[name])
    return Need(
        weights=model.weights - model.matrices + resident + decoder.weights,
        kv=model.cache + model.conditions,
        state=model.state - model.cache + decoder.state,
        activations=moments[widest],
        widest=widest,
    )


def choices(config: ModelConfig) -> Iterator[Arrangement]:
    """Arrangements of a configuration, best first; the embedded model has one decoder and needs no fp8."""
    wan = config.out_channels == MODELS["flash-1.3b"].out_channels
    for arrangement in ARRANGEMENTS:
        if wan or arrangement == Arrangement("bf16", "light"):
            yield arrangement


def plan(
    cards: Iterable[int] = CARDS,
    aims: Iterable[tuple[str, tuple[int, int]]] = AIMS,
    policy: RolloutPolicy | None = None,
    device: torch.device | None = None,
) -> list[Row]:
    """For each card and configuration the best arrangement that fits.

    device: a CUDA device on which those are run, under a cap, that it has the memory for.
    """
    rows, seen = [], set()
    policy = policy or RolloutPolicy()
    for card in sorted(cards):
        for name, size in aims:
            row = _row(card, name, size, policy)
            key = (name, size, row.arrangement)
            if device is not None and row.arrangement and key not in seen and fits(card, device):
                row = Row(**{**vars(row), "checked": check(row, policy, device)})
                seen.add(key)
            rows.append(row)
    return rows


def _row(card: int, name: str, size: tuple[int, int], policy: RolloutPolicy) -> Row:
    config = MODELS[name]
    geometry = geometry_of(config, size, policy)
    needs = {a: need(config, policy, geometry, a) for a in choices(config)}
    found = next((a for a, n in needs.items() if n.peak <= usable(card)), None)
    leanest = min(needs, key=lambda a: needs[a].peak)
    shown = found or leanest
    model = model_cost(config, policy, geometry, torch.bfloat16)
    work = flops(model.work) + decoder_cost(shown.decoder, config, geometry, torch.bfloat16).flops
    seconds = len(geometry.frames_of_block(1)) / float(geometry.fps)
    brought = model.matrices if shown.weights == "offload" else 0
    return Row(card, name, size, found, needs[shown], work, work / seconds, brought)


def fits(card: int, device: torch.device) -> bool:
    """Whether a device can stand for a card."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= card * GIB


def check(row: Row, policy: RolloutPolicy, device: torch.device) -> str:
    """Run an arrangement with the card's share of the device's memory: what it took, or that it failed."""
    assert row.arrangement is not None
    config = MODELS[row.config]
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((row.card * GIB - CONTEXT_BYTES) / total, index)
    try:
        timing.restart_peak(device)
        exercise(config, policy, geometry_of(config, row.size, policy), row.arrangement, device)
        taken = timing.peak_bytes(device)
    except torch.cuda.OutOfMemoryError:
        return f"out of memory under a cap of {row.card} GiB"
    finally:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, index)
    return f"run: {taken['allocated'] / GIB:.1f} GiB allocated, {taken['reserved'] / GIB:.1f} reserved"


@torch.inference_mode()
def exercise(
    config: ModelConfig,
    policy: RolloutPolicy,
    geometry: Geometry,
    arrangement: Arrangement,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Everything that takes memory, once: the picture, two windows in steady state, two decoded blocks."""
    make = random_wan if arrangement.decoder == "wan" else lambda *place: random_light(config, *place)
    autoencoder: VideoAutoencoder = make(device, dtype)
    model = random_model(config, device, dtype, arrangement.weights)
    if config.has_image_channels:
        image_channels(autoencoder, torch.zeros(1, 3, geometry.height, geometry.width, dtype=dtype, device=device))
    rollout = random_rollout(model, policy, geometry, device, 30, dtype)
    state, memory = steady_state(rollout), None
    for _ in range(2):
        run_steady_window(rollout, state)
        assert state.motion is not None
        latents = state.motion.expand(-1, -1, policy.block_latents, -1, -1).to(dtype)
        memory = autoencoder.decode_stream(latents, memory)[1]
    timing.synchronise(device)
