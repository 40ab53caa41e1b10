"""Rehearsals: what a transformer makes of its clips when it is told their truth, kept beside them.

    python -m joyavatar_core.training.rehearsal --initial TRANSFORMER --autoencoder FILE --clips CLIPS [--count N]

In training the past is true; at inference it is the transformer's own, and so is what it denoises. A transformer that
has only ever seen the truth reads from it what it was to draw by itself. `acting` puts rehearsals in the place of the
true latents and asks for the true ones (as DAgger does: Ross, Gordon and Bagnell 2011); `autoencoder --rehearsals`
teaches the decoder to show them evenly. Under torchrun the processes share the clips.

Shape legend: N clips, B batch (1), C latent channels, F latent frames, T pixel frames of a latent, K readings, h w
latent size, D width.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checkpoint
from ..avatar import load_light_autoencoder, load_model
from ..config import AudioConfig
from ..geometry import Geometry
from ..manner import LIMITS
from ..model import AudioKV, JoyAvatarDiT
from ..policy import RolloutPolicy
from ..policy import policy as policy_named
from ..rollout import Rollout, RolloutState
from . import parallel
from .clips import clip_path, list_clips
from .common import training_dtype
from .encoded import EncodedClips, LatentStore
from .preview import condition
from .sequences import attend

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


def with_rehearsals(
    data: Sequence[EncodedClips], folder: Path, weights: Path, autoencoder: Path, policy: RolloutPolicy
) -> tuple[EncodedClips, ...]:
    """The clips of a folder with what a transformer makes of them; it is made where it is not there yet."""
    store = RehearsalStore(folder, weights, policy)
    model = to_be_told(load_model(weights)).to(training_dtype()).eval().requires_grad_(False)
    spatial = load_light_autoencoder(autoencoder).spatial
    for clips in data:
        store.make(model, clips, clips.geometry(spatial, model.config.patch, policy.block_latents))
    parallel.wait()
    return store.load(data)


def to_be_told(model: JoyAvatarDiT) -> JoyAvatarDiT:
    """The model with places for what is drawn beside what it hears; these are without effect at first.

    ValueError for a model that does not hear by readings.
    """
    audio = model.config.audio
    if audio is None or audio.kind != "window":
        raise ValueError("only a model with a projector of log-mel windows can be told readings: give one of those")
    if audio.limits:
        return model
    wider = JoyAvatarDiT(replace(model.config, audio=replace(audio, limits=LIMITS)), attention=attend)
    weights = model.state_dict()
    weights["proj_model.proj.weight"] = _with_drawn(weights["proj_model.proj.weight"], audio)
    wider.load_state_dict(weights)
    return wider


def _with_drawn(weight: Tensor, audio: AudioConfig) -> Tensor:
    """[D, T K heard] -> [D, T K], zero for what is drawn."""
    heard = weight.unflatten(1, (audio.frames_read, audio.readings))
    return F.pad(heard, (0, len(LIMITS) - audio.readings)).flatten(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Let a transformer make clips that it is told the truth of.")
    parser.add_argument("--initial", type=Path, required=True, help="the transformer")
    parser.add_argument("--autoencoder", type=Path, required=True, help="autoencoder.safetensors")
    parser.add_argument("--clips", type=Path, required=True, help="folder of training.clips")
    parser.add_argument("--count", type=int, help="of the clips, the first (all)")
    parser.add_argument("--policy", default="joyavatar-flash")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parallel.join()
    torch.set_num_threads(1)
    policy, patch = policy_named(options.policy), load_model(options.initial).config.patch
    store = LatentStore(list_clips(options.clips)[: options.count], options.clips, options.autoencoder, patch)
    mine = replace(store, paths=store.paths[parallel.rank() :: parallel.world()])
    mine.encode()
    parallel.wait()
    with_rehearsals(store.load(), options.clips, options.initial, options.autoencoder, policy)
    log.info("they are in %s", RehearsalStore(options.clips, options.initial, policy).home)


if __name__ == "__main__":
    main()
