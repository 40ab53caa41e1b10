"""The drawn domain: truth curves against the sound, boxes against the picture, seeds, and the trainer's parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joyavatar_core.autoencoder import AutoencoderConfig, LightAutoencoder
from joyavatar_core.avatar import load_light_autoencoder
from joyavatar_core.training import autoencoder as trainer
from joyavatar_core.training.drawn import Avatar, Pose, boxes, draw, motion, sample_clip, texture
from joyavatar_core.training.speech import synthesize

SMALL = AutoencoderConfig(
    patch=2, encoder_widths=(4, 4, 4), decoder_widths=(8, 8, 4, 4), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
)


def loudness(audio: np.ndarray, frames: int) -> np.ndarray:
    return np.sqrt(np.square(audio[: len(audio) // frames * frames].reshape(frames, -1)).mean(1))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.3, 2.0]), st.sampled_from([12.5, 16, 25]))
def test_speech_has_the_lengths_and_ranges_it_promises(seed: int, seconds: float, fps: float) -> None:
    speech = synthesize(seed, seconds, fps)
    assert speech.audio.shape == (round(seconds * 16_000),) and speech.audio.dtype == np.float32
    assert np.abs(speech.audio).max() <= 1
    for curve, low in ((speech.open, 0), (speech.wide, -1), (speech.teeth, 0), (speech.stress, 0)):
        assert curve.shape == (round(seconds * fps),)
        assert curve.min() >= low - 1e-6 and curve.max() <= 1 + 1e-6


def test_speech_is_a_function_of_its_seed() -> None:
    assert np.array_equal(synthesize(3, 1).audio, synthesize(3, 1).audio)
    assert not np.array_equal(synthesize(3, 1).audio, synthesize(4, 1).audio)


def test_mouth_is_shut_when_it_is_silent_and_opens_with_the_sound() -> None:
    for seed in range(4):
        speech = synthesize(seed, 10)
        loud = loudness(speech.audio, 160)
        quiet = loud <= np.quantile(loud, 0.1)
        assert speech.open[quiet].mean() < 0.35 * speech.open[~quiet].mean()
        assert np.corrcoef(np.log(loud + 1e-3), speech.open)[0, 1] > 0.3
        assert speech.open.max() > 0.75 and speech.wide.min() < -0.5 and speech.teeth.max() > 0.6


def test_teeth_sound_high() -> None:
    speech = synthesize(0, 20)
    frames = speech.audio[: 320 * 1000].reshape(320, 1000)
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(1000), axis=1)) ** 2
    high = spectrum[:, 190:].sum(1) / (spectrum.sum(1) + 1e-9)  # above 3 kHz
    assert high[speech.teeth > 0.7].mean() > 2 * high[speech.open > 0.8].mean()


def test_speech_refuses_no_time() -> None:
    with pytest.raises(ValueError, match="positive"):
        synthesize(0, 0)


@pytest.mark.parametrize("seed", range(24))
def test_any_avatar_can_be_drawn_and_speech_moves_only_the_lower_face(seed: int) -> None:
    avatar, size = replace(Avatar.random(seed), beard="none"), (128, 128)
    shut, opened = draw(avatar, Pose(), size), draw(avatar, Pose(open=0.6), size)
    assert shut.shape == (128, 128, 3) and shut.dtype == np.uint8
    changed = np.abs(shut.astype(int) - opened).max(2) > 40
    x0, y0, x1, y1 = boxes(avatar, Pose(), size)[0].round().astype(int)
    assert changed[y0:y1, x0:x1].sum() > 10
    assert not changed[:y0].any()


def test_blink_hides_the_eyes_and_stays_in_their_box() -> None:
    avatar, size = replace(Avatar.random(1), glasses="none"), (256, 256)
    changed = np.abs(draw(avatar, Pose(), size).astype(int) - draw(avatar, Pose(blink=1), size)).max(2) > 30
    x0, y0, x1, y1 = boxes(avatar, Pose(), size)[1].round().astype(int)
    assert changed[y0:y1, x0:x1].sum() == changed.sum() > 50


def test_picture_of_any_shape_and_none_too_small() -> None:
    assert draw(Avatar.random(0), Pose(), (96, 160)).shape == (96, 160, 3)
    with pytest.raises(ValueError, match="16x16"):
        draw(Avatar.random(0), Pose(), (8, 8))


def test_motion_is_smooth_visible_and_blinks() -> None:
    speech = synthesize(5, 60)
    poses = motion(5, speech, 960)
    x = np.array([pose.head_x for pose in poses])
    assert 0.01 < x.std() < 0.12 and np.abs(np.diff(x)).max() < 0.05
    shut = np.array([pose.blink for pose in poses]) > 0.5
    assert 5 <= np.count_nonzero(shut[1:] & ~shut[:-1]) <= 30
    assert np.allclose([pose.open for pose in poses], speech.open)


@pytest.mark.parametrize("photo", [False, True])
def test_clip_is_whole_and_repeatable(photo: bool) -> None:
    clip, again = (sample_clip(7, 6, (64, 64), photo=photo) for _ in range(2))
    assert clip.video.shape == (6, 64, 64, 3) and clip.mouth.shape == clip.eyes.shape == (6, 4)
    assert len(clip.poses) == len(clip.speech.open) == 6
    assert np.array_equal(clip.video, again.video)


@pytest.mark.parametrize("seed", range(10))
def test_texture(seed: int) -> None:
    picture = texture(seed, (48, 64))
    assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8 and picture.std() > 1


def test_cut_moves_the_boxes_with_the_picture() -> None:
    video = np.zeros((9, 64, 64, 3), np.uint8)
    video[:, 30:40, 20:36] = 255
    boxes_ = np.tile(np.array([20, 30, 36, 40], np.float32), (9, 2, 1))
    rng = np.random.default_rng(0)
    for _ in range(20):
        piece = trainer.cut(rng, trainer.Sample(video, boxes_), 5, 48)
        weights = trainer.region_weights(torch.from_numpy(piece.boxes[None]), 48, 48, mouth=3.0, eyes=2.0)
        lit = torch.from_numpy((piece.video[None, ..., 0] > 0).copy())
        assert piece.video.shape == (5, 48, 48, 3)
        assert torch.equal(weights[:, 0] == weights.max(), lit)
        assert weights.mean() == pytest.approx(1, abs=1e-4)


def test_reconstruct_is_decode_without_the_clamp() -> None:
    torch.manual_seed(0)
    model, video = LightAutoencoder(SMALL).eval(), torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        made, latents = trainer.reconstruct(model, video)
        assert torch.allclose(made.clamp(-1, 1), model.decode(model.encode(video)), atol=1e-5)
    assert latents.shape == (2, 16, 2, 2, 2)


def test_latent_loss_is_zero_for_normal_latents_only() -> None:
    torch.manual_seed(0)
    normal = torch.randn(8, 4, 3, 32, 32)
    assert trainer.latent_loss(normal) < 1e-3 < 0.1 < trainer.latent_loss(2 * normal)
    assert trainer.latent_loss(normal + 1) > 0.5


def test_saved_model_comes_back_and_its_latents_are_normal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, video = LightAutoencoder(SMALL).eval(), torch.rand(4, 3, 9, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, std = trainer.latent_statistics([model.encode(video)])
        path = tmp_path / "autoencoder.safetensors"
        trainer.save_model(path, model, replace(SMALL, latent_mean=mean, latent_std=std), {"steps": 1})
        latents = load_light_autoencoder(path).encode(video)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert latents.std((0, 2, 3, 4)) == pytest.approx(1, abs=1e-2)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_initial_latents_are_normal_and_differ_from_each_other() -> None:
    torch.manual_seed(0)
    model = LightAutoencoder(replace(SMALL, latent_channels=3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    videos = [torch.rand(4, 3, 5, 64, 64) * 2 - 1 for _ in range(2)]
    trainer.initialise(model, videos, 0)
    with torch.no_grad():
        latents = torch.cat([model.encode(v) for v in videos]).transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-2
    assert torch.allclose(torch.cov(latents), torch.eye(3), atol=0.02)


def test_a_step_of_training_moves_every_weight(tmp_path: Path) -> None:
    recipe = trainer.Recipe(batches=((5, 1),), crop=32, size=32, pool=2)
    frames, found = next(trainer.batches(recipe, 0))
    video, weights = trainer.as_video(frames), trainer.region_weights(torch.from_numpy(found), 32, 32, 3.0, 2.0)
    state = trainer._begin(recipe, tmp_path, [video])
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    losses = [trainer._step(state, video, weights, 0.0)["loss"] for _ in range(12)]
    still = [n for n, p in state.model.named_parameters() if p.grad is not None and torch.equal(p, before[n])]
    assert not still and losses[-1] < losses[0]


def test_recipe_refuses_a_crop_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples"):
        trainer.Recipe(crop=100)
