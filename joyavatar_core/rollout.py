"""The rollout: executes the steps of a schedule, whatever policy made them (JoyAvatar-Flash 3.3-3.5).

One window: assemble the noisy blocks, prepend the motion frame (MCI), denoise beside the cache, bring every block to
its next level, commit the block that came out clean. The loop knows no mode: levels, positions and cache rules come
from the policy.

Shape legend: B batch, C latent channels, F latent frames, n latents of a block, h w latent size, P tokens of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import flow, kernels
from .audio import AudioTokens
from .cache import EVERY, KV, Excerpt, KVCache
from .captured import Captured
from .conditioning import ImageChannels
from .eight_bits import EightBitCache
from .geometry import Geometry
from .manner import manner
from .model import AudioKV, ConditionKV, JoyAvatarDiT, Past, WithReference
from .noise import Ahead, Draw, Purpose, integer
from .policy import RolloutPolicy, Seen
from .schedule import DenoiseStep, warp
from .types import StreamTensors, batched, nbytes, sent


@dataclass(frozen=True)
class Reference:
    """The picture, as latents that a reference sink is made of.

    latent [B, C, 1, h, w]; motion [B, C, n, h, w]: of the picture standing still before the stream begins, for models
    that are given a past (Wan2.2-S2V).
    """

    latent: Tensor
    motion: Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """What is constant in a stream: attention keys and values, the image-to-video channels, and the reference.

    reference: None where the image-to-video channels hold the picture, or there is none.
    """

    kv: ConditionKV
    image: ImageChannels | None = None
    reference: Reference | None = None

    @property
    def picture(self) -> Reference | None:
        """The reference, from whichever part has it."""
        if self.reference is None and self.image is not None:
            return Reference(self.image.picture.unsqueeze(2))
        return self.reference

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """Of several avatars side by side. They must be of one model and size."""
        return batched(lambda *same: torch.cat(same), *parts)

    def part(self, items: slice) -> Condition:
        """Of some items of the batch."""
        return batched(lambda tensor: tensor[items], self)


@dataclass(frozen=True)
class FinishedBlock:
    """A clean block: latents [B, C, n, h, w], and before those of block 0 the one that is given, if it is."""

    index: int
    latents: Tensor


@dataclass
class RolloutState:
    """All memory of a rollout between two windows.

    window: next window to run.
    caches: one cache, or one per step for kv_level "per_step".
    noisy: blocks in the window, each at its next level, [B, C, n, h, w].
    motion: last latent of the newest finished block, [B, C, 1, h, w].
    reference: keys before RoPE and values of the reference sink, each [layers, B, R, heads, D].
    first: first latent of the stream, until the reference is made again from it, [B, C, 1, h, w].
    pending: keys and values of the block at hand, by the cache they will go to; empty between windows.
    audio: front-end tokens of the blocks in the window and of the newest finished one, of all latents they show.
    audio_kv: keys and values made of them; derived, never saved.
    ahead: noise of the next window, on the host; derived, never saved.
    captured: forwards that are played again; None: every forward is launched anew.
    """

    caches: tuple[KVCache, ...]
    window: int = 0
    noisy: dict[int, Tensor] = field(default_factory=dict)
    motion: Tensor | None = None
    reference: KV | None = None
    first: Tensor | None = None
    pending: dict[int, list[KV]] = field(default_factory=dict)
    audio: dict[int, AudioTokens] = field(default_factory=dict)
    audio_kv: dict[int, AudioKV] = field(default_factory=dict)
    ahead: Ahead = field(default_factory=Ahead)
    captured: Captured | None = None

    def tensors(self) -> StreamTensors:
        """Everything to be saved, by name."""
        out = {f"cache.{i}.{k}": t for i, cache in enumerate(self.caches) for k, t in cache.tensors().items()}
        out |= {f"noisy.{block}": t for block, t in self.noisy.items()}
        out |= {f"audio.{block}.tokens": a.tokens for block, a in self.audio.items()}
        out |= {f"audio.{block}.valid": a.valid for block, a in self.audio.items()}
        if self.reference is not None:
            out |= {"reference.keys": self.reference[0], "reference.values": self.reference[1]}
        out |= {} if self.first is None else {"first": self.first}
        return out if self.motion is None else out | {"motion": self.motion}

    def part(self, items: slice) -> RolloutState:
        """Of some items of the batch, between two windows; the caches stay where they are."""
        assert not self.pending, "a window is at work"
        derived = {"ahead": Ahead(), "captured": None}  # of the whole batch: made anew
        whole = replace(self, caches=(), reference=None, **derived)
        part: RolloutState = batched(lambda tensor: tensor[items], whole)
        part.captured = None if self.captured is None else Captured()
        part.caches = tuple(cache.part(items) for cache in self.caches)
        if self.reference is not None:
            keys, values = self.reference
            part.reference = keys[:, items], values[:, items]
        return part

    def nbytes(self) -> int:
        """Bytes of all tensors, derived ones included, but for the noise that waits on the host."""
        kv = [t for a in self.audio_kv.values() for pair in a.layers for t in pair]
        return nbytes(self.tensors()) + sum(t.numel() * t.element_size() for t in kv)


@dataclass(frozen=True)
class Reseed:
    """Another seed for some blocks of a stream: those in `blocks` draw their noise from it."""

    blocks: range
    seed: int


@dataclass(frozen=True)
class Fast:
    """How forwards are run; what comes out is the same within rounding.

    kernels: see kernels.using. capture: forwards of a shape that keeps coming are played from a recording (`captured`).
    small_cache: keys and values in eight bits, which is more than rounding (`eight_bits`).
    """

    kernels: kernels.Use = "auto"
    capture: bool = False
    small_cache: bool = False


@dataclass(frozen=True)
class Rollout:
    """A model run under a policy; holds nothing that changes.

    before_forward: called before every forward of the model; may raise to stop between two of them.
    reseed: blocks with another seed (a retake); no part of what a saved state belongs to.
    seeds: one for each of several avatars side by side (`together`), in place of seed.
    fast: how forwards are run.
    """

    model: JoyAvatarDiT
    policy: RolloutPolicy
    geometry: Geometry
    condition: Condition
    seed: int
    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    before_forward: Callable[[], None] = lambda: None
    reseed: Reseed | None = None
    seeds: tuple[int, ...] = ()
    fast: Fast = Fast()

    def __post_init__(self) -> None:
        for size, wanted in self.policy.block_sizes.items():
            if (found := getattr(self.geometry, size)) != wanted:
                raise ValueError(f"{size} is {found} in the geometry and {wanted} in the policy: give it block_sizes")
        if (self.policy.reference_sink or self.policy.given_first) and self.condition.picture is None:
            raise ValueError("the policy needs the picture, and this model is given none: choose another policy")
        ahead = self.policy.reference_ahead if self.policy.reference_sink else None
        if self.seeds and ahead and ahead[0] != ahead[1]:
            raise ValueError(
                f"reference_ahead {ahead[0]}-{ahead[1]} is drawn for each avatar, but those side by side share their "
                "places: give one number, or run them one by one"
            )

    @staticmethod
    def together(rollouts: Sequence[Rollout]) -> Rollout:
        """Several avatars side by side, each with its condition and seed: what a rollout of its own would give it.

        ValueError where they are not of one model, policy and size, or one has a condition that another lacks.
        """
        first = rollouts[0]
        for other in rollouts[1:]:
            if other.model is not first.model or (other.policy, other.geometry) != (first.policy, first.geometry):
                raise ValueError(
                    "avatars side by side must be of one model, policy and size: run the others by themselves"
                )
            mine, theirs = first.condition, other.condition
            if any((getattr(mine.kv, part) is None) != (getattr(theirs.kv, part) is None) for part in vars(mine.kv)):
                raise ValueError("avatars side by side: give all of them a text, a picture and a face, or none")
        condition = Condition.join([r.condition for r in rollouts])
        return replace(first, condition=condition, batch=len(rollouts), seeds=tuple(r.seed for r in rollouts))

    def part(self, items: slice) -> Rollout:
        """Some of the avatars side by side."""
        seeds = self.seeds[items]
        return replace(self, condition=self.condition.part(items), batch=len(seeds), seeds=seeds)

    def start(self) -> RolloutState:
        """A fresh state: empty caches at their final size."""
        count = len(self.policy.timesteps) if self.policy.kv_level == "per_step" else 1
        captured = Captured() if self.fast.capture else None
        return RolloutState(tuple(self._cache() for _ in range(count)), captured=captured)

    @property
    def heads(self) -> int:
        """Heads whose keys and values are kept here."""
        return self.model.config.heads

    def ring(self, step: DenoiseStep) -> int:
        """Which of a state's caches a step reads, and fills when its block leaves."""
        return step.passes[0] if self.policy.kv_level == "per_step" else 0

    def _cache(self) -> KVCache:
        config, policy = self.model.config, self.policy
        return (EightBitCache if self.fast.small_cache else KVCache)(
            layers=config.layers,
            batch=self.batch,
            block_tokens=self.geometry.tokens_per_latent * policy.block_latents,
            heads=self.heads,
            head_dim=config.head_dim,
            sink_blocks=policy.sink_blocks,
            local_blocks=policy.kept_blocks,
            dtype=self.dtype,
            device=self.device,
        )

    def restore(self, tensors: StreamTensors, window: int) -> RolloutState:
        """State from `RolloutState.tensors` and its window."""
        state = self.start()
        state.window = window
        committed = self.policy.first_block(window)
        for i, cache in enumerate(state.caches):
            cache.restore({k: tensors[f"cache.{i}.{k}"] for k in cache.tensors()}, committed)
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "noisy":
                state.noisy[int(rest)] = tensor.to(self.device)
            elif kind == "audio" and rest.endswith(".tokens"):
                block = int(rest.removesuffix(".tokens"))
                state.audio[block] = AudioTokens(tensor, tensors[f"audio.{block}.valid"])
        if "motion" in tensors:
            state.motion = tensors["motion"].to(self.device)
        if self.policy.reference_sink and window:
            state.reference = (tensors["reference.keys"].to(self.device), tensors["reference.values"].to(self.device))
            if 0 < committed <= (self.policy.reference_refresh or 0):
                state.first = tensors["first"].to(self.device)
        return state

    def run(self, state: RolloutState, num_blocks: int) -> Iterator[FinishedBlock]:
        """All windows of a finite clip whose audio, if any, is in the state already."""
        while state.window < self.policy.num_windows(num_blocks):
            yield from self.run_window(state, num_blocks)

    def run_window(self, state: RolloutState, num_blocks: int | None = None) -> list[FinishedBlock]:
        """Run the next window; returns the block that came out clean, if one did.

        When a forward raises, the state is as it was before the window, which may be run again.
        """
        before, finished = (dict(state.noisy), state.reference, state.first), []
        try:
            if self.policy.reference_sink:
                self._make_reference(state)
            for step in self.policy.window_steps(state.window, num_blocks):
                clean = self.step(state, step)
                if clean is not None:
                    finished.append(clean)
        except BaseException:
            state.noisy, state.reference, state.first = before
            state.pending.clear()
            for cache in state.caches:
                cache.committed = self.policy.first_block(state.window)
            raise
        state.window += 1
        self._draw_ahead(state, num_blocks)
        return finished

    def step(self, state: RolloutState, step: DenoiseStep) -> FinishedBlock | None:
        """One forward of the window; state moves to the step's next levels."""
        x = self._given(step, torch.cat([self._noisy(state, b) for b in step.blocks], dim=2))
        here = self._levels(step.timesteps, x)
        v, kv = self._denoise(state, step, x, here)
        x0 = flow.to_x0(x, v, here)
        if self.policy.update == "euler":
            after = flow.euler_step(x, v, here, self._levels(step.next_timesteps, x))
        else:
            after = self._renoise(state, x0, step)
        after = self._given(step, after)
        for block, latents in zip(step.blocks, after.split(self.policy.block_latents, dim=2), strict=True):
            state.noisy[block] = latents.clone()
        if self.policy.kv_level == "per_step":  # stored when the window is over: a later forward may raise
            played = state.captured is not None  # then another step's forward may write to the same places
            state.pending[self.ring(step)] = [
                (k.clone(), value.clone()) if played else (k.detach(), value.detach()) for k, value in kv
            ]
        return self._finish(state, step.blocks[0], kv) if step.finishes else None

    def _given(self, step: DenoiseStep, x: Tensor) -> Tensor:
        """Latents of a window with the picture's own in the first place of the stream, where the policy says so."""
        if not self.policy.given_first or step.blocks[0]:
            return x
        picture = self.condition.picture
        assert picture is not None
        return torch.cat([picture.latent.to(x), x[:, :, 1:]], dim=2)

    def _finish(self, state: RolloutState, block: int, kv: list[KV]) -> FinishedBlock:
        """The oldest block is clean: commit it, make it the motion frame, forget what only it needed."""
        if self.policy.kv_level != "per_step":
            state.caches[0].commit(block, self._kept(state, block, state.noisy[block], kv))
        latents = self.leave(state, block)
        state.motion = latents[:, :, -1:].detach().clone()
        if block == 0 and self.policy.reference_sink and self.policy.reference_refresh is not None:
            state.first = latents[:, :, :1].detach().clone()
        return FinishedBlock(block, self.shown(block, latents))

    def shown(self, block: int, latents: Tensor) -> Tensor:
        """Clean latents of a block, with the picture's own before the first where it stands alone."""
        if block or not self.policy.picture_alone:
            return latents
        picture = self.condition.picture
        assert picture is not None
        return torch.cat([picture.latent.to(latents), latents], dim=2)

    def leave(self, state: RolloutState, block: int) -> Tensor:
        """A block leaves, clean or for the rank of the next step: what its steps here have made of keys and values is
        committed, what only it needed is forgotten. Returns its latents [B, C, n, h, w].
        """
        latents = state.noisy.pop(block)
        for ring, made in state.pending.items():
            state.caches[ring].commit(block, made)
        state.pending.clear()
        for old in [b for b in state.audio if b < block]:
            del state.audio[old]
            state.audio_kv.pop(old, None)
        return latents

    def _kept(self, state: RolloutState, block: int, latents: Tensor, kv: list[KV]) -> list[KV]:
        """Keys and values that a clean block leaves behind, `kv` being those of its last forward."""
        if self.policy.kv_level != "clean":
            return kv
        zero, after = latents.new_zeros(latents.shape[2]), 2 * len(self.policy.timesteps)
        past = self._past(state, self.policy.sight(block, 1, clean=True))
        past = self._beside(state, past, block, after, clean=True)
        return self._forward(state, latents, zero, [block], past, self._start(block), None)[1]

    def _denoise(self, state: RolloutState, step: DenoiseStep, x: Tensor, here: Tensor) -> tuple[Tensor, list[KV]]:
        """Velocity of the window's blocks, and the keys and values of its oldest one."""
        first = step.blocks[0]
        motion = self._motion(state, step, here) if self.policy.motion_frame else None
        past = self._past(state, self.policy.sight(first, len(step.blocks)), self.ring(step))
        past = self._beside(state, past, first, step.passes[0])
        lead = 0 if motion is None else 1
        oldest = slice(lead, lead + self.policy.block_latents)
        v, kv = self._forward(state, x, here, list(step.blocks), past, self._start(first), motion, oldest)
        return v[:, :, lead:], kv

    def _forward(
        self,
        state: RolloutState,
        x: Tensor,
        timesteps: Tensor,
        blocks: list[int],
        past: Past | None,
        start: int,
        motion: tuple[Tensor, Tensor] | None,
        kept: slice = EVERY,
    ) -> tuple[Tensor, list[KV]]:
        """The model on [motion frame | blocks] with all that belongs to those latent frames; keys and values of `kept`
        of them.
        """
        latents = range(self.policy.start_of(blocks[0]), self.policy.start_of(blocks[-1] + 1))
        lead = 0 if motion is None else 1
        indices = range(latents.start - lead, latents.stop)
        if motion is not None:
            x, timesteps = torch.cat([motion[0], x], dim=2), torch.cat([motion[1], timesteps])
        if self.condition.image is not None:
            x = torch.cat([x, self.condition.image.at(indices).to(x)], dim=1)
        positions = range(start - lead, start + len(latents))
        self.before_forward()
        audio = self._audio(state, blocks, lead)
        with kernels.using(self.fast.kernels):
            if state.captured is None or torch.is_grad_enabled():
                return self.model(x, timesteps, positions, self.condition.kv, audio, past, kept=kept)
            return state.captured(self.model, x, timesteps, positions, self.condition.kv, audio, past, kept)

    def _motion(self, state: RolloutState, step: DenoiseStep, here: Tensor) -> tuple[Tensor, Tensor] | None:
        """MCI: the newest clean latent [B, C, 1, h, w] at the noise level of the window's first block, and that level
        [1]; none before the first block.
        """
        if state.motion is None:
            return None
        if not self.policy.motion_noise:
            return state.motion, torch.zeros_like(here[:1])
        noise = self._gaussian(state, self._motion_draw(step))
        return flow.add_noise(state.motion, noise, here[:1]), here[:1]

    def _past(self, state: RolloutState, sight: tuple[Seen, ...], ring: int = 0) -> Past | None:
        """Finished blocks in sight of a forward and their RoPE indices, in the order of the cache they are in."""
        if not sight:
            return None
        held, n = state.caches[ring], self.policy.block_latents
        by_block = {seen.block: seen for seen in sight}
        ordered = [by_block[block] for block in held.blocks if block in by_block]
        assert len(ordered) == len(sight), (held.blocks, sight)
        positions = tuple(seen.index + i for seen in ordered for i in range(n - seen.skipped))
        if len(positions) == len(held.blocks) * n:
            return Past(held, positions)
        tokens = self.geometry.tokens_per_latent
        return Past(Excerpt.of(held, {seen.block: seen.skipped * tokens for seen in ordered}), positions)

    def _make_reference(self, state: RolloutState) -> None:
        """Run the reference through the model where it is due: the picture at first, later a generated latent (AAS)."""
        picture, refresh = self.condition.picture, self.policy.reference_refresh
        due = state.first is not None and self.policy.first_block(state.window) == refresh
        if state.reference is not None and not due:
            return
        assert picture is not None
        latent = state.first if due and state.first is not None else picture.latent
        x = latent.to(self.device)
        if self.condition.image is not None:
            x = torch.cat([x, self.condition.image.at([0]).to(x)], dim=1)
        motion = None if picture.motion is None else picture.motion.to(self.device)
        self.before_forward()
        with torch.no_grad(), kernels.using(self.fast.kernels):
            heard = self._given_sound(state) if self.policy.picture_alone else None
            made = self.model.prefill(x, self.condition.kv, self.policy.reference_floor, motion, heard)
        keys, values = zip(*made, strict=True)
        state.reference = (torch.stack(keys), torch.stack(values))
        state.first = None if due else state.first

    def _beside(
        self, state: RolloutState, past: Past | None, first: int, forward: int, clean: bool = False
    ) -> Past | None:
        """The past with the reference behind it, at its place in a forward of a window that begins at `first`."""
        if state.reference is None:
            return past
        start, positions = self._start(first), past.positions if past else ()
        if self.policy.reference_ahead is None:
            place = self.policy.reference_before(start, len(positions), clean)
        else:
            ahead = integer(self._seed(first), first, forward, self.policy.reference_ahead)
            place = self.policy.reference_position(start, ahead)
        context = WithReference(past.context if past else None, state.reference)
        return Past(context, positions, place, self.policy.reference_shift(start))

    def _start(self, first: int) -> int:
        return self.policy.window_start(first)

    def _audio(self, state: RolloutState, blocks: list[int], lead: int) -> AudioKV | None:
        if not self._hears(state):
            return None
        parts = [self._audio_kv(state, b) for b in blocks]
        if not blocks[0] and self.policy.first_latent:
            parts[0] = parts[0].select(slice(self.policy.first_latent, None))
        if lead:
            parts.insert(0, self._audio_kv(state, blocks[0] - 1).select(slice(-1, None)))
        return AudioKV.join(parts)

    def _given_sound(self, state: RolloutState) -> AudioKV | None:
        """What the latent before block 0 hears."""
        return self._audio_kv(state, 0).select(slice(0, self.policy.first_latent)) if self._hears(state) else None

    def _hears(self, state: RolloutState) -> bool:
        return bool(state.audio) and self.model.config.audio is not None

    def _audio_kv(self, state: RolloutState, block: int) -> AudioKV:
        """Made once per block, for all its steps."""
        if block not in state.audio_kv:
            tokens = state.audio[block]
            valid = None if bool(tokens.valid.all()) else sent(tokens.valid, self.device)
            features = sent(tokens.tokens, self.device, self.dtype)
            heard, manner = features.expand(self.batch, *features.shape[-3:]), self._manner(block)
            state.audio_kv[block] = self.model.audio(heard, valid, manner)
        return state.audio_kv[block]

    def _manner(self, block: int) -> Tensor | None:
        """What no sound tells of a block, [B, F, T, K], for a model that is told; a retake keeps that of the stream."""
        audio = self.model.config.audio
        if audio is None or not audio.takes_manner:
            return None
        frames = [self.geometry.frames_told(latent) for latent in self.geometry.latents_of_block(block)]
        drawn = [manner(seed, sum(frames, ()), self.geometry.fps) for seed in self.seeds or (self.seed,)]
        told = torch.stack(drawn).unflatten(1, (len(frames), -1))
        return sent(told.expand(self.batch, -1, -1, -1), self.device, self.dtype)

    def _noisy(self, state: RolloutState, block: int) -> Tensor:
        """Latents of a block in the window; pure noise when it enters."""
        if block not in state.noisy:
            state.noisy[block] = self._gaussian(state, self._draw(block, 0))
        return state.noisy[block]

    def _renoise(self, state: RolloutState, x0: Tensor, step: DenoiseStep) -> Tensor:
        """Every block to its next level with fresh noise; level 0 stays clean."""
        noise = [self._gaussian(state, draw) for draw in self._renoise_draws(step)]
        return flow.add_noise(x0, torch.cat(noise, dim=2), self._levels(step.next_timesteps, x0))

    def _levels(self, timesteps: tuple[float, ...], like: Tensor) -> Tensor:
        """Schedule indices of blocks -> warped timesteps of their latent frames [F]."""
        warped = [warp(t, self.policy.shift) for t in timesteps]
        return flow.per_latent(warped, self.policy.block_latents, like)

    def _gaussian(self, state: RolloutState, draw: Draw) -> Tensor:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return sent(state.ahead.take(draw), self.device, wide)

    def _draw(self, block: int, forward: int, purpose: Purpose = "latents") -> Draw:
        """Noise of a block, or of the motion frame before it."""
        latents = 1 if purpose == "motion" else self.policy.block_latents
        shape = (self.batch, self.model.config.out_channels, latents, *self.geometry.latent_size)
        return Draw(self.seeds or (self._seed(block),), block, forward, shape, purpose)

    def _motion_draw(self, step: DenoiseStep) -> Draw:
        return self._draw(step.blocks[0], step.passes[0], "motion")

    def _renoise_draws(self, step: DenoiseStep) -> list[Draw]:
        return [self._draw(b, p + 1) for b, p in zip(step.blocks, step.passes, strict=True)]

    def _draw_ahead(self, state: RolloutState, num_blocks: int | None) -> None:
        """Noise of the next window's first step, while the device is at work on this one. A CPU has no other hands."""
        if self.device.type == "cpu":
            return
        draws: list[Draw] = []
        for step in self.policy.window_steps(state.window, num_blocks)[:1]:
            draws += [self._draw(b, 0) for b in step.blocks if b not in state.noisy]
            draws += [self._motion_draw(step)] if self.policy.motion_frame and self.policy.motion_noise else []
            draws += self._renoise_draws(step) if self.policy.update == "renoise" else []
        state.ahead.foresee(draws)

    def _seed(self, block: int) -> int:
        return self.reseed.seed if self.reseed and block in self.reseed.blocks else self.seed
