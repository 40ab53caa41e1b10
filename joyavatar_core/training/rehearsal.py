"""Rehearsals: what a transformer makes of its clips when it is told their truth, kept beside them.

In training the past is true; at inference it is the transformer's own, and so is what it denoises. A transformer that
has only ever seen the truth reads from it what it was to draw by itself. `acting` puts rehearsals in the place of the
true latents and asks for the true ones (as DAgger does: Ross, Gordon and Bagnell 2011).

Shape legend: N clips, B batch (1), C latent channels, F latent frames, T pixel frames of a latent, K readings, h w
latent size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..geometry import Geometry
from ..model import AudioKV, JoyAvatarDiT
from ..policy import RolloutPolicy
from ..rollout import Rollout, RolloutState
from . import parallel
from .clips import clip_path
from .encoded import EncodedClips
from .preview import condition

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ToldRollout(Rollout):
    """A rollout that is told the readings [F, T, K] of a clip and hears nothing."""

    told: Tensor

    def _hears(self, state: RolloutState) -> bool:
        return True

    def _audio_kv(self, state: RolloutState, block: int) -> AudioKV:
        if block not in state.audio_kv:
            latents = self.geometry.latents_of_block(block)
            readings = self.told[latents.start : latents.stop].to(self.device, self.dtype)
            state.audio_kv[block] = self.model.told(readings[None])
        return state.audio_kv[block]


@torch.no_grad()  # not inference_mode: RoPE tables are kept, and training uses them too
def rehearse(model: JoyAvatarDiT, policy: RolloutPolicy, clips: EncodedClips, clip: int, geometry: Geometry) -> Tensor:
    """Latents [F, C, h, w] of one of the clips, from its first picture and its truth; its seed decides the noise."""
    assert clips.told is not None
    rollout = ToldRollout(
        model=model,
        policy=policy,
        geometry=geometry,
        condition=condition(model, clips, clip, geometry),
        seed=int(clips.seed[clip]),
        device=torch.device("cpu"),
        dtype=next(model.parameters()).dtype,
        told=clips.told[clip].float(),
    )
    blocks = clips.latents.shape[1] // policy.block_latents
    return torch.cat([block.latents[0] for block in rollout.run(rollout.start(), blocks)], dim=1).transpose(0, 1)


@dataclass(frozen=True)
class RehearsalStore:
    """Rehearsals beside the clips of a folder: other weights or another policy have another place."""

    folder: Path
    weights: Path
    policy: RolloutPolicy

    @property
    def home(self) -> Path:
        """Where they lie."""
        return self.folder / f"own-{checkpoint.sha256_of(self.weights)[:12]}"

    def make(self, model: JoyAvatarDiT, clips: EncodedClips, geometry: Geometry) -> None:
        """A rehearsal of each clip that has none yet. Processes share them."""
        home = self.home
        home.mkdir(parents=True, exist_ok=True)
        for clip in range(parallel.rank(), len(clips), parallel.world()):
            path = clip_path(home, int(clips.seed[clip]))
            if not path.exists():
                made = rehearse(model, self.policy, clips, clip, geometry)
                checkpoint.write(path, {"own": made.half().contiguous()}, {})
            if clip % 50 == 49:
                log.info("%d of %d rehearsals", clip + 1, len(clips))

    def load(self, data: Sequence[EncodedClips]) -> tuple[EncodedClips, ...]:
        """The clips that have one, with them. ValueError where none has."""
        home, parts = self.home, []
        for clips in data:
            paths = [clip_path(home, int(seed)) for seed in clips.seed]
            rows = torch.tensor([i for i, path in enumerate(paths) if path.exists()], dtype=torch.long)
            if len(rows):
                own = torch.stack([checkpoint.read(paths[i])[0]["own"] for i in rows])
                parts.append(replace(clips.select(rows), own=own))
        if not parts:
            raise ValueError(f"no rehearsals in {home}: make them first")
        return tuple(parts)
