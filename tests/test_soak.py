"""Long runs, by hand: pytest -m slow tests/test_soak.py. Memory must stay where it is after the first minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from joyavatar_core.audio import AudioFrontEnd
from joyavatar_core.avatar import Avatar, random_embedded
from joyavatar_core.conditioning import ImageChannels, reference_tokens
from joyavatar_core.config import MODELS, AudioConfig
from joyavatar_core.generate import Progress, generate
from joyavatar_core.geometry import Geometry
from joyavatar_core.media.writer import VideoWriter
from joyavatar_core.policy import RolloutPolicy
from joyavatar_core.rollout import Condition, Rollout
from joyavatar_core.wav2vec import Wav2Vec2Windows

from .helpers import SMALL, audio_tokens, small_model

RATE = 44100
CPU = torch.device("cpu")
MINUTES = int(os.environ.get("SOAK_MINUTES", "10"))


def chatter(minutes: int) -> Iterator[tuple[np.ndarray, int]]:
    """Stereo noise with pauses, a second at a time."""
    rng = np.random.default_rng(0)
    for second in range(60 * minutes):
        loud = 0.2 if second % 4 else 0.0
        yield (rng.standard_normal((2, RATE)) * loud).astype(np.float32), RATE


def log_mel() -> Avatar:
    return random_embedded()


def wav2vec2() -> Avatar:
    """The embedded shapes with wav2vec2-base (random weights) in place of log-mel."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    encoder = Wav2Vec2Model(Wav2Vec2Config()).eval()  # pyright: ignore
    tokens = AudioConfig(kind="tokens", features=768, width=256)
    avatar = random_embedded(config=replace(MODELS["tiny"], audio=tokens))

    def front_end(geometry: Geometry) -> AudioFrontEnd:
        return Wav2Vec2Windows(encoder, geometry)

    return replace(avatar, front_end=front_end)


@pytest.mark.slow
@pytest.mark.parametrize("make", [log_mel, wav2vec2])
def test_resident_memory_stays(make, tmp_path: Path) -> None:
    """Memory after minute 1 and at the end within 3 %, peak under 2 GB, state of one size, length exact."""
    avatar = make()
    stream = avatar.stream(torch.rand(1, 3, 256, 256) * 2 - 1, RolloutPolicy(), seed=0)
    process, samples, sizes = psutil.Process(), [], []

    def watch(progress: Progress) -> None:
        samples.append((progress.frames / 16, process.memory_info().rss / 1e6))
        sizes.append(stream.state.nbytes())

    out = tmp_path / "long.mp4"
    with VideoWriter(out, 256, 256, source_fps=Fraction(16), audio_rate=RATE, audio_channels=2, settings={}) as writer:
        progress = generate(stream, chatter(MINUTES), lambda _: writer, None, watch)
    after_a_minute = np.median([mb for second, mb in samples if 60 <= second < 75])
    at_the_end = np.median([mb for _, mb in samples[-20:]])
    peak = max(mb for _, mb in samples)
    print(  # noqa: T201 - the figures are what a soak is for
        f"{make.__name__}: {progress.frames} frames at {progress.fps:.1f} fps, resident {after_a_minute:.0f} MB after "
        f"a minute, {at_the_end:.0f} MB at the end, peak {peak:.0f} MB, state {sizes[-1] / 1e6:.2f} MB"
    )
    assert progress.frames == MINUTES * 60 * 16
    assert abs(at_the_end / after_a_minute - 1) < 0.03
    assert peak < 2000
    assert max(sizes[100:]) == max(sizes[40:100])  # the state has its largest size in the first minute


@pytest.mark.slow
def test_hundred_thousand_blocks_of_one_stream() -> None:
    """RoPE indices stay below N and the state keeps its size, block by block, in a rollout that really runs."""
    config = replace(SMALL, dim=8, ffn_dim=8, layers=1, heads=1, freq_dim=8)
    policy = RolloutPolicy()
    model = small_model(dtype=torch.float32, config=config)
    channels = ImageChannels(torch.randn(1, 8, 3, 1, 1))
    with torch.inference_mode():
        kv = model.condition(image=reference_tokens(channels.picture, (1, 1)))
        rollout = Rollout(model, policy, Geometry(8, 8, patch=(1, 1)), Condition(kv, channels), 0, CPU, torch.float32)
        state = rollout.start()
        for block in range(100_000):
            state.audio[block] = audio_tokens(block % 50)
            rollout.run_window(state)
            assert policy.window_start(policy.first_block(block)) + 12 <= 27
            if block == 12:
                size = state.nbytes()
            assert block < 12 or state.nbytes() == size
    assert state.caches[0].committed == 100_000 - 3 and state.motion is not None and state.motion.isfinite().all()
