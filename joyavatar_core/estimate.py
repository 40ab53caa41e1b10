"""What a run will need: blocks, forwards, memory and disk, worked out before anything is loaded. No weights here.

Counts of forwards and cache bytes are exact; activations, decoding and the video's size are estimates from the shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise

from .config import ModelConfig
from .geometry import Geometry
from .policy import RolloutPolicy

_VIDEO_BITS_PER_PIXEL = 0.08  # H.264 at crf 18 of talking heads, measured on the samples: 0.03 to 0.12
_SOUND_BYTES_PER_SECOND = 12_000
_WINDOW_COPIES = 12  # tensors of the window's size alive at once in a block of the transformer, its widest layer apart
_DECODER_FLOATS_PER_PIXEL = 420  # widest layer of Wan2.1's decoder for the four frames of a latent, inputs and outputs


@dataclass(frozen=True)
class Estimate:
    """frames, blocks, forwards: of the clip. cache_bytes: keys and values. work_bytes: the most that one forward, or
    decoding one block, holds besides. video_bytes: of the file. lookahead_s: sound that must be heard ahead of a frame.
    """

    frames: int
    blocks: int
    forwards: int
    cache_bytes: int
    work_bytes: int
    video_bytes: int
    lookahead_s: float

    @property
    def memory_bytes(self) -> int:
        """Besides the weights."""
        return self.cache_bytes + self.work_bytes


@dataclass(frozen=True)
class Forward:
    """One forward of the model, in tokens: of the latents it works on, and of all that they attend to."""

    queries: int
    keys: int


def reference_tokens(config: ModelConfig, geometry: Geometry) -> int:
    """Of a reference sink: a latent frame, and in Wan2.2-S2V another for the newest of 19 motion latents, a quarter for
    the two before it, and four sixteenths for the rest.
    """
    rows, columns = geometry.grid
    if not config.s2v:
        return rows * columns
    return 2 * rows * columns + (rows // 2) * (columns // 2) + 4 * (rows // 4) * (columns // 4)


def window_forwards(
    config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, window: int, num_blocks: int | None = None
) -> tuple[Forward, ...]:
    """Every forward of a window, in order: those that make a reference and that run a clean block again as well."""
    latent, finished = geometry.tokens_per_latent, policy.first_block(window)
    block = policy.block_latents * latent
    reference = reference_tokens(config, geometry) if policy.reference_sink else 0

    def past(blocks: int, clean: bool = False) -> int:
        return reference + policy.seen_latents(finished, blocks, clean) * latent

    found: list[Forward] = []
    if policy.reference_sink and (window == 0 or finished == policy.reference_refresh):
        found.append(Forward(reference, reference))
    for step in policy.window_steps(window, num_blocks):
        queries = len(step.blocks) * block + (latent if policy.motion_frame and finished else 0)
        found.append(Forward(queries, past(len(step.blocks)) + queries))
        if step.finishes and policy.kv_level == "clean":
            found.append(Forward(block, past(1, clean=True) + block))
    return tuple(found)


def window_costs(
    config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, num_blocks: int
) -> Iterator[tuple[range, tuple[Forward, ...]]]:
    """All windows of a clip in order, those that cost the same in one range: (windows, the forwards of each)."""
    windows = policy.num_windows(num_blocks)
    settled, ramp = _settled(policy), max(0, windows - policy.window_blocks)
    edges = [*range(min(settled, windows) + 1), *range(max(settled, ramp), windows + 1)]  # between: all alike
    spans = [range(a, b) for a, b in pairwise(sorted(set(edges)))]
    costs = [(span, window_forwards(config, policy, geometry, span.start, num_blocks)) for span in spans]
    for cost, alike in groupby(costs, key=lambda found: found[1]):
        joined = [span for span, _ in alike]
        yield range(joined[0].start, joined[-1].stop), cost


def _settled(policy: RolloutPolicy) -> int:
    """First window from which on, until the clip ends, all are alike."""
    finished = max(policy.sink_blocks + policy.kept_blocks, policy.reference_refresh or 0)
    return max(policy.bootstrap, finished + policy.window_blocks)


def cost_lines(
    config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, num_blocks: int, bytes_each: int = 2
) -> Iterator[str]:
    """What the blocks of a clip cost, in words: forwards, latents that ask (q) and that are seen (k), bytes of K/V.

    bytes_each: of a number in the cache.
    """
    size, latent = f"{geometry.width}x{geometry.height}", geometry.tokens_per_latent
    yield f"cost at {size}, {latent} tokens a latent frame (q, k: latents that ask and that are seen):"
    for windows, cost in window_costs(config, policy, geometry, num_blocks):
        name = f"{windows.start + 1}" if len(windows) == 1 else f"{windows.start + 1}-{windows.stop}"
        yield f"  window {name}: {len(cost)} forwards: {', '.join(_runs(cost, latent))}"
    held, waiting = (f(config, policy, geometry, bytes_each) / 2**20 for f in (cache_bytes, pending_bytes))
    yield f"  K/V: {held:,.1f} MiB held" + (f", {waiting:,.1f} MiB more within a window" if waiting else "")


def _runs(cost: Iterable[Forward], latent: int) -> Iterator[str]:
    for forward, alike in groupby(cost):
        yield f"{len(list(alike))} x {forward.queries / latent:g} q {forward.keys / latent:g} k"


def cache_bytes(config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, bytes_each: int) -> int:
    """Of the keys and values a rollout holds between two windows: see KVCache and RolloutState."""
    tokens = (
        _caches(policy) * (policy.sink_blocks + policy.kept_blocks) * policy.block_latents * geometry.tokens_per_latent
    )
    tokens += reference_tokens(config, geometry) if policy.reference_sink else 0
    return _kv_bytes(config, tokens, bytes_each)


def pending_bytes(config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, bytes_each: int) -> int:
    """Of the keys and values of a window's earlier steps that wait for its end, at the most."""
    steps = _caches(policy) if policy.kv_level == "per_step" else 0
    return _kv_bytes(config, steps * policy.block_latents * geometry.tokens_per_latent, bytes_each)


def _caches(policy: RolloutPolicy) -> int:
    return len(policy.timesteps) if policy.kv_level == "per_step" else 1


def _kv_bytes(config: ModelConfig, tokens: int, bytes_each: int) -> int:
    return config.layers * 2 * tokens * config.dim * bytes_each


def work_bytes(config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, bytes_each: int) -> int:
    """Activations of the widest forward, or of decoding a block where that is more."""
    latents = policy.window_blocks * policy.block_latents + policy.motion_frame
    window = latents * geometry.tokens_per_latent
    seen = (policy.span_latents + policy.motion_frame) * geometry.tokens_per_latent
    seen += reference_tokens(config, geometry) if policy.reference_sink else 0
    transformer = (window * (_WINDOW_COPIES * config.dim + config.ffn_dim) + 4 * seen * config.dim) * bytes_each
    decoder = geometry.width * geometry.height * _DECODER_FLOATS_PER_PIXEL * bytes_each
    return max(transformer + pending_bytes(config, policy, geometry, bytes_each), decoder)


def estimate(
    config: ModelConfig, policy: RolloutPolicy, geometry: Geometry, seconds: Fraction, bytes_each: int = 2
) -> Estimate:
    """Of a clip of so many seconds of sound. bytes_each: of a number in the activations and the cache."""
    frames = geometry.frames_of_duration(seconds)
    blocks = geometry.blocks_of_frames(frames)
    pixels = geometry.width * geometry.height * frames
    return Estimate(
        frames=frames,
        blocks=blocks,
        forwards=_forwards(policy, blocks),
        cache_bytes=cache_bytes(config, policy, geometry, bytes_each),
        work_bytes=work_bytes(config, policy, geometry, bytes_each),
        video_bytes=round(pixels * _VIDEO_BITS_PER_PIXEL / 8 + float(seconds) * _SOUND_BYTES_PER_SECOND),
        lookahead_s=float(policy.lead_blocks * len(geometry.frames_of_block(1)) / geometry.fps),
    )


def _forwards(policy: RolloutPolicy, blocks: int) -> int:
    """Forwards of the model; the steady windows in the middle are all alike."""
    windows, settled = policy.num_windows(blocks), _settled(policy)
    ends = min(windows, settled), max(0, windows - max(settled, windows - policy.window_blocks))
    first = sum(len(policy.window_steps(w, blocks)) for w in range(ends[0]))
    last = sum(len(policy.window_steps(w, blocks)) for w in range(windows - ends[1], windows))
    middle = windows - sum(ends)
    return first + last + middle * (len(policy.window_steps(ends[0], blocks)) if middle else 0)
