"""Streams: chunking changes nothing, state is all there is, memory is constant."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joyavatar_core.audio import AudioTrack, LogMel
from joyavatar_core.autoencoder import AutoencoderConfig, LightAutoencoder
from joyavatar_core.checkpoint import CheckpointError
from joyavatar_core.conditioning import image_channels, reference_tokens
from joyavatar_core.config import AudioConfig
from joyavatar_core.geometry import Geometry
from joyavatar_core.policy import POLICIES, RolloutPolicy
from joyavatar_core.rollout import Condition, Rollout
from joyavatar_core.stream import AvatarStream, FrameStream, LatentStream
from joyavatar_core.wav2vec import Wav2Vec2Windows

from .helpers import SMALL, small_model

HEARING = AudioConfig(
    "window", features=16, columns=2, width=8, window=16, tokens=2, channels=4, dilations=(1, 4, 4), readings=2
)
MODEL = replace(SMALL, image_dim=4, audio=HEARING)
WAV2VEC_MODEL = replace(MODEL, audio=AudioConfig("tokens", features=16, width=8))
RATE = 22050


def make_stream(seed: int = 0, hears: str = "log-mel", policy: RolloutPolicy | None = None) -> AvatarStream:
    """A stream of the small model at 32x32 with a random picture; policy: None for the paper's."""
    policy = policy or RolloutPolicy()
    torch.manual_seed(10)
    autoencoder = LightAutoencoder(
        AutoencoderConfig(
            latent_channels=4,
            patch=1,
            encoder_widths=(4, 4, 4),
            decoder_widths=(4, 4, 4, 4),
            encoder_blocks=(1, 1, 1),
            decoder_blocks=(1, 1, 1),
        )
    ).eval()
    model = small_model(dtype=torch.float32, config=MODEL if hears == "log-mel" else WAV2VEC_MODEL)
    geometry = Geometry(32, 32, spatial=8, patch=MODEL.patch, **policy.block_sizes)
    with torch.no_grad():
        channels = image_channels(autoencoder, torch.rand(1, 3, 32, 32) * 2 - 1)
        condition = Condition(model.condition(image=reference_tokens(channels.picture, MODEL.patch)), channels)
    rollout = Rollout(model, policy, geometry, condition, seed, torch.device("cpu"), torch.float32)
    if hears == "log-mel":
        return AvatarStream(LatentStream(rollout, LogMel(geometry, mels=8, hops_per_frame=2)), autoencoder)
    return AvatarStream(LatentStream(rollout, Wav2Vec2Windows(tiny_wav2vec2(), geometry)), autoencoder)


def tiny_wav2vec2() -> torch.nn.Module:
    """A random wav2vec2 with the real strides."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(4,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    return transformers.Wav2Vec2Model(config).eval()


def sound(seconds: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, round(seconds * RATE), generator=generator) * 0.1


def play(stream: AvatarStream, samples: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Frames of a sound fed in the pieces between the cuts."""
    frames = []
    for start, stop in pairwise([0, *sorted(cuts), samples.shape[1]]):
        frames += list(stream.feed(samples[:, start:stop], RATE))
    frames += list(stream.finish())
    return torch.cat(frames, dim=2)


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return play(make_stream(), sound(5.3), [])


def test_length_follows_the_sound(whole: torch.Tensor) -> None:
    assert whole.shape == (1, 3, round(5.3 * 16), 32, 32) and whole.std() > 0.01
    assert play(make_stream(), sound(0.01), []).shape[2] == 1


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.0])
def test_any_chunking_gives_the_same_frames(seconds: float, whole: torch.Tensor) -> None:
    step = max(1, round(seconds * RATE))
    assert torch.equal(play(make_stream(), sound(5.3), list(range(step, round(5.3 * RATE), step))), whole)


def test_any_chunking_with_wav2vec2_gives_the_same_frames() -> None:
    samples = sound(4.0)
    at_once = play(make_stream(hears="wav2vec2"), samples, [])
    for seconds in (0.001, 0.1, 1.0):
        step = max(1, round(seconds * RATE))
        cuts = list(range(step, samples.shape[1], step))
        assert torch.equal(play(make_stream(hears="wav2vec2"), samples, cuts), at_once)
    deaf = play(make_stream(hears="wav2vec2"), samples * 0, [])
    assert not torch.allclose(at_once, deaf, atol=1e-3)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, round(5.3 * RATE)), max_size=6))
def test_any_cuts_give_the_same_frames(cuts: list[int]) -> None:
    assert torch.equal(play(make_stream(), sound(5.3), cuts), play(make_stream(), sound(5.3), []))


def test_stream_is_the_rollout_of_the_whole_clip(whole: torch.Tensor) -> None:
    """Stream = rollout over known audio, then one-shot decode."""
    stream = make_stream()
    rollout, geometry = stream.latents.rollout, stream.latents.rollout.geometry
    track = AudioTrack()
    track.push(sound(5.3), RATE)
    track.finish()
    blocks = geometry.blocks_of_frames(geometry.frames_of_duration(track.duration))
    state = rollout.start()
    for block in range(blocks):
        state.audio[block] = stream.latents.front_end.features(track, geometry.latents_of_block(block))
    with torch.inference_mode():
        latents = torch.cat([done.latents for done in rollout.run(state, blocks)], dim=2)
        video = stream.frames.autoencoder.decode(latents)
    assert (video[:, :, : whole.shape[2]] - whole).abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "joyavatar-flash"])
def test_every_policy_streams_and_resumes(name: str, tmp_path: Path) -> None:
    """As long as the sound, the same however that is cut up or broken off; AvatarForcing begins with the picture."""
    samples, path, policy = sound(5.3), tmp_path / "state.safetensors", POLICIES[name]
    whole = play(make_stream(policy=policy), samples, [])
    assert whole.shape[2] == round(5.3 * 16)
    stream, frames = make_stream(policy=policy), []
    pieces = samples.split(40_000, dim=1)
    for piece in pieces[:2]:
        frames += list(stream.feed(piece, RATE))
    stream.state.save(path)
    again = make_stream(policy=policy)
    again.load_state(path)
    for piece in pieces[2:]:
        frames += list(again.feed(piece, RATE))
    frames += list(again.finish())
    assert torch.equal(torch.cat(frames, dim=2), whole)
    first = stream.latents.rollout.geometry.frames_of_block(0)
    assert frames[0].shape[2] == len(first) == (17 if name == "avatarforcing" else 9)


def test_seed_decides(whole: torch.Tensor) -> None:
    assert torch.equal(play(make_stream(), sound(5.3), []), whole)
    assert not torch.allclose(play(make_stream(seed=1), sound(5.3), []), whole, atol=1e-2)


@pytest.mark.parametrize("after", range(1, 8))
def test_saved_and_loaded_at_any_block_is_bit_identical(after: int, whole: torch.Tensor, tmp_path: Path) -> None:
    samples, path = sound(5.3), tmp_path / "state.safetensors"
    stream, frames = make_stream(), []
    for piece in samples.split(4000, dim=1):
        for made in stream.feed(piece, RATE):
            frames.append(made)
            if len(frames) == after:
                stream.state.save(path)
                break
        if len(frames) == after:
            break
    if not path.exists():  # the last blocks come after the end of the sound
        for made in stream.finish():
            frames.append(made)
            if len(frames) == after:
                stream.state.save(path)
                break
    again = make_stream()
    again.load_state(path)
    heard = again.state.track.source_samples
    frames += list(again.feed(samples[:, heard:], RATE)) if heard < samples.shape[1] else []
    frames += list(again.finish())
    assert torch.equal(torch.cat(frames, dim=2), whole)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    make_stream(seed=1).state.save(path)
    with pytest.raises(CheckpointError, match="another run"):
        make_stream(seed=2).load_state(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="not a readable"):
        make_stream(seed=1).load_state(path)


def test_state_has_constant_size_in_steady_state() -> None:
    stream, sizes = make_stream(), []
    piece = sound(0.75)
    for _ in range(40):
        for _ in stream.feed(piece, RATE):
            pass
        sizes.append(stream.state.nbytes())
    assert len(set(sizes[15:])) == 1, sizes


def test_no_sound_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        list(make_stream().finish())


def test_live_input_lags_by_the_window_and_no_more() -> None:
    """Block b is out as soon as the sound of block b + 3 and the front end's look-ahead have come."""
    stream = make_stream()
    done, second = {}, 0.0
    for piece in sound(6.0).split(round(0.05 * RATE), dim=1):
        second += 0.05
        for _ in stream.feed(piece, RATE):
            done[len(done)] = second
    geometry = stream.latents.rollout.geometry
    for block, moment in done.items():
        heard = (geometry.frames_of_block(block + 3).stop + 6) / 16  # the ears hear six frames ahead
        assert heard - 0.05 <= moment <= heard + 0.15


class StopError(Exception):
    """Somebody wants no more."""


def test_interrupted_at_any_forward_and_fed_on_gives_the_same_frames(whole: torch.Tensor) -> None:
    """A window that was broken off is run again from its beginning."""
    for stop_at in (2, 8, 9):
        stream, count = make_stream(), 0

        def stop(limit: int = stop_at) -> None:
            nonlocal count
            count += 1
            if count == limit:
                raise StopError

        object.__setattr__(stream.latents.rollout, "before_forward", stop)
        samples, frames = sound(5.3), []
        with pytest.raises(StopError):
            for made in stream.feed(samples, RATE):
                frames.append(made)
        frames += list(stream.feed(samples[:, :0], RATE))
        frames += list(stream.finish())
        assert torch.equal(torch.cat(frames, dim=2), whole)


def test_made_in_inference_mode_and_fed_outside() -> None:
    with torch.inference_mode():
        stream = make_stream()
        frames = list(stream.feed(sound(5.3)[:, :60000], RATE))
    frames += list(stream.feed(sound(5.3)[:, 60000:], RATE))
    frames += list(stream.finish())
    assert torch.equal(torch.cat(frames, dim=2), play(make_stream(), sound(5.3), [60000]))


def test_latents_and_frames_apart_are_the_stream_whole(whole: torch.Tensor) -> None:
    """A sampler and a decoder that know nothing of each other, as two nodes on a canvas."""
    stream = make_stream()
    blocks = [*stream.latents.feed(sound(5.3), RATE), *stream.latents.finish()]
    for _ in range(2):  # two consumers
        decoder = FrameStream(stream.frames.autoencoder)
        assert torch.equal(torch.cat([decoder.decode(b) for b in blocks], dim=2), whole)
