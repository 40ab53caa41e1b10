"""The drawn domain: identities, pictures against their boxes, motion against speech, stored clips, the trainer."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import astuple, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from joyavatar_core import checkpoint
from joyavatar_core.autoencoder import AutoencoderConfig, LightAutoencoder
from joyavatar_core.avatar import load_light_autoencoder
from joyavatar_core.training import autoencoder as trainer
from joyavatar_core.training import autoencoder_data as data
from joyavatar_core.training import clips
from joyavatar_core.training.drawn import (
    HELD_OUT_SEED,
    Avatar,
    Clip,
    Pose,
    Scene,
    boxes,
    draw,
    is_held_out,
    motion,
    photo_like,
    render,
    texture,
)
from joyavatar_core.training.encoded import as_video
from joyavatar_core.training.mouth import Speech, TimedPhone

from .small_training import small_autoencoder

SMALL = AutoencoderConfig(
    patch=2, encoder_widths=(4, 4, 4), decoder_widths=(8, 8, 4, 4), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)
)
SIZES = ((256, 256), (320, 192), (192, 320))


def made_speech(seconds: float, fps: int = 16, seed: int = 0) -> Speech:
    """Phrases of 2.1 s with a stressed sound in each, and pauses of 0.4 s between them."""
    phones = []
    for start in np.arange(0, seconds, 2.5):
        phones += [TimedPhone("a", start, start + 2.1, "open"), TimedPhone("", start + 2.1, start + 2.5, "silence")]
    time = (np.arange(round(seconds * fps)) + 0.5) / fps
    talking = (time % 2.5) < 2.1
    stress = np.exp(-(((time % 2.5) - 1.0) ** 2) / 0.06) * np.random.default_rng(seed).uniform(0.5, 1, len(time))
    open_ = talking * (0.5 + 0.4 * np.sin(20 * time))
    zero = np.zeros_like(time)
    curves = [c.astype(np.float32) for c in (open_, zero, zero, stress)]
    return Speech(np.zeros(round(seconds * 16_000), np.float32), 16_000, Fraction(fps), *curves, tuple(phones), "made")


@pytest.mark.parametrize("first", [0, HELD_OUT_SEED])
def test_held_out_seeds_draw_combinations_that_training_never_sees(first: int) -> None:
    avatars = [Avatar.random(first + i) for i in range(300)]
    assert all(is_held_out(avatar) == (first == HELD_OUT_SEED) for avatar in avatars)
    assert Avatar.random(first + 5) == avatars[5] != avatars[6]


def test_avatars_are_varied_and_mostly_close() -> None:
    avatars = [Avatar.random(seed) for seed in range(600)]
    for name, least in (("kind", 7), ("style", 4), ("hair", 16), ("hat", 8), ("clothes", 11), ("background", 10)):
        assert len({getattr(avatar, name) for avatar in avatars}) >= least, name
    assert 0.09 < np.mean([avatar.kind != "human" for avatar in avatars]) < 0.21
    assert 0.69 < np.mean([avatar.framing.size >= 0.3 for avatar in avatars]) < 0.81


@pytest.mark.parametrize("size", SIZES)
def test_faces_are_large_and_stay_in_the_picture(size: tuple[int, int]) -> None:
    height, width = size
    poses = motion(0, made_speech(60), 960)[::16]
    for seed in range(30):
        avatar = Avatar.random(seed)
        found = np.stack([boxes(avatar, pose, size)[2] for pose in poses])
        outside = np.stack([-found[:, 0], -found[:, 1], found[:, 2] - width, found[:, 3] - height])
        assert outside.max() < 0.03 * height, seed
        assert (outside > 0).any(0).mean() < 0.1, seed
        assert (found[:, 3] - found[:, 1]).mean() > 0.35 * min(height, width)


@pytest.mark.parametrize("seed", range(24))
def test_speech_moves_the_mouth_and_nothing_above_it(seed: int) -> None:
    avatar, size = replace(Avatar.random(seed), beard="none"), (128, 128)
    scene = Scene(avatar, size)
    shut, opened = scene.draw(Pose()), scene.draw(Pose(open=0.6))
    assert shut.shape == (128, 128, 3) and shut.dtype == np.uint8
    changed = np.abs(shut.astype(int) - opened).max(2) > 30
    x0, y0, x1, y1 = boxes(avatar, Pose(), size)[0].round().astype(int)
    assert changed[y0:y1, x0:x1].sum() > 0.03 * (y1 - y0) * (x1 - x0)
    assert not changed[: y0 - 2].any()


def test_mouth_shapes_differ_from_one_another() -> None:
    shapes = {
        "m": Pose(),
        "a": Pose(open=1, wide=0.1, teeth=0.1),
        "i": Pose(open=0.28, wide=0.95, teeth=0.55),
        "u": Pose(open=0.28, wide=-1),
        "o": Pose(open=0.55, wide=-0.75),
        "f": Pose(open=0.07, wide=0.1, teeth=0.7),
        "s": Pose(open=0.14, wide=0.45, teeth=1),
    }
    for seed in range(16):
        scene = Scene(Avatar.random(seed), (256, 256))
        x0, y0, x1, y1 = boxes(scene.avatar, Pose(), scene.size)[0].round().astype(int)
        mouths = {name: scene.draw(pose)[y0:y1, x0:x1].astype(int) for name, pose in shapes.items()}
        for first, name in enumerate(shapes):
            for other in list(shapes)[first + 1 :]:
                assert np.abs(mouths[name] - mouths[other]).mean() > 1.5, (seed, name, other)


@pytest.mark.parametrize("seed", range(8))
def test_blink_hides_the_eyes_and_stays_in_their_box(seed: int) -> None:
    avatar, size = replace(Avatar.random(seed), glasses="none", hat="none"), (256, 256)
    scene = Scene(avatar, size)
    changed = np.abs(scene.draw(Pose()).astype(int) - scene.draw(Pose(blink=1))).max(2) > 30
    x0, y0, x1, y1 = boxes(avatar, Pose(), size)[1].round().astype(int)
    assert changed[y0:y1, x0:x1].sum() == changed.sum() > 50


def test_picture_of_any_shape_and_none_too_small() -> None:
    assert draw(Avatar.random(0), Pose(), (96, 160)).shape == (96, 160, 3)
    with pytest.raises(ValueError, match="16x16"):
        draw(Avatar.random(0), Pose(), (8, 8))


def test_a_prepared_scene_draws_what_a_fresh_one_draws() -> None:
    avatar, poses = Avatar.random(3), motion(3, made_speech(1), 16)
    video, found = render(avatar, poses, (64, 96))
    assert video.shape == (16, 64, 96, 3) and found.shape == (16, 3, 4)
    assert np.array_equal(video[9], draw(avatar, poses[9], (64, 96)))
    assert np.array_equal(photo_like(3, video), photo_like(3, video))


def column(poses: tuple[Pose, ...], name: str) -> np.ndarray:
    return np.array([getattr(pose, name) for pose in poses])


def test_motion_is_smooth_and_visible_and_keeps_the_lips() -> None:
    speech = made_speech(60)
    poses = motion(5, speech, 970)
    for name, low, high in (("head_x", 0.01, 0.08), ("head_y", 0.008, 0.05), ("roll", 0.01, 0.06)):
        track = column(poses, name)
        assert low < track.std() < high and np.abs(np.diff(track)).max() < 0.05, name
    assert np.allclose(column(poses, "open")[:960], speech.open)
    assert (column(poses, "open")[960:] == speech.open[-1]).all()
    assert poses == motion(5, speech, 970) != motion(6, speech, 970)


@pytest.mark.parametrize("fps", [16, 25])
def test_blinks_are_as_many_and_as_long_as_they_should_be(fps: int) -> None:
    counts, at_pauses = [], []
    for seed in range(10):
        shut = column(motion(seed, made_speech(60, fps), 60 * fps), "blink") > 0.97
        begin = np.flatnonzero(shut[1:] & ~shut[:-1]) + 1
        end = np.flatnonzero(~shut[1:] & shut[:-1]) + 1
        counts.append(len(begin))
        at_pauses += [2.0 < (b / fps) % 2.5 < 2.5 for b in begin]
        assert all(b - a >= 2 for a, b in zip(begin, end, strict=False))
        assert all(b - a >= fps for a, b in pairwise(begin))
    assert min(counts) >= 8 and max(counts) <= 28 and 12 < np.mean(counts) < 26
    assert np.mean(at_pauses) > 0.4  # by chance: 0.2


def test_head_and_brows_follow_stress() -> None:
    speech = made_speech(60)
    for name, least in (("brow", 0.5), ("head_y", 0.25)):
        tracks = [column(motion(seed, speech, 960), name) for seed in range(8)]
        assert np.corrcoef(np.mean(tracks, 0), speech.stress)[0, 1] > least


@pytest.mark.parametrize("seed", range(10))
def test_texture(seed: int) -> None:
    picture = texture(seed, (48, 64))
    assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8 and picture.std() > 1


# Stored clips


def made_clip(seed: int, frames: int, size: tuple[int, int], photo: bool = False) -> Clip:
    """As sample_clip makes it, but of made speech: nothing here depends on the machine's voices."""
    speech = made_speech(frames / 16)
    poses = motion(seed, speech, frames)
    video, found = render(Avatar.random(seed), poses, size)
    return Clip(video, speech, found, poses)


def test_stored_clip_comes_back_with_all_its_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips.drawn, "sample_clip", made_clip)
    monkeypatch.setattr(clips, "augment", lambda seed, audio, rate: audio + np.float32(0.25))
    path = clips.write_clip(tmp_path, 3, frames=5, size=(64, 48))
    clip, truth = clips.read_clip(path), made_clip(3, 5, (64, 48))
    either = [truth, clips.mirrored(truth)]
    assert any(np.abs(clip.video.numpy().astype(int) - t.video).mean() < 4 for t in either)
    assert any(np.allclose(clip.boxes, t.boxes) for t in either)
    assert any(np.allclose(clip.pose, [astuple(p) for p in t.poses]) for t in either)
    assert torch.equal(clip.open, clip.pose[:, 0]) and torch.equal(clip.truth("scale"), clip.pose[:, -1])
    assert clip.phones == truth.speech.phones and clip.fps == 16 and clip.source == "made" and clip.seed == 3
    assert clip.audio.mean() == pytest.approx(0.25, abs=1e-3)
    assert clips.list_clips(tmp_path) == [path] and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_mirror_twice_is_nothing_and_once_moves_picture_boxes_and_pose_together() -> None:
    clip = made_clip(1, 2, (64, 96))
    once = clips.mirrored(clip)
    twice = clips.mirrored(once)
    assert (
        np.array_equal(twice.video, clip.video) and twice.poses == clip.poses and np.allclose(twice.boxes, clip.boxes)
    )
    assert (once.boxes[..., 2] > once.boxes[..., 0]).all()
    assert np.allclose(once.boxes[..., [0, 2]].mean(-1) + clip.boxes[..., [0, 2]].mean(-1), 96)
    assert once.poses[0].gaze_x == -clip.poses[0].gaze_x and once.poses[0].open == clip.poses[0].open


def test_clips_are_drawn_once_in_the_sizes_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips.drawn, "sample_clip", made_clip)
    arguments = [
        "--out",
        str(tmp_path),
        "--count",
        "6",
        "--first-seed",
        "40",
        "--frames",
        "1",
        "--sizes",
        "32x32",
        "48x32",
    ]
    clips.main(arguments)
    sizes = [clips.read_clip(path).video.shape[1:3] for path in clips.list_clips(tmp_path)]
    assert sizes == [clips.clip_size(seed, ((32, 32), (48, 32))) for seed in range(40, 46)]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    clips.main(arguments)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    counts = [sum(clips.clip_size(seed) == size for seed in range(1000)) for size in clips.SIZES]
    assert counts == pytest.approx([600, 200, 200], abs=50)


def test_bad_sizes_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="320x192"):
        clips._size("256")
    (tmp_path / "clip_1.safetensors").write_bytes(b"no")
    with pytest.raises(OSError, match="draw the clips again"):
        clips.read_clip(tmp_path / "clip_1.safetensors")
    with pytest.raises(ValueError, match=r"training\.clips"):
        clips.list_clips(tmp_path / "none")


# The trainer of the autoencoder


def test_cut_moves_the_boxes_with_the_picture() -> None:
    video = np.zeros((9, 64, 64, 3), np.uint8)
    video[:, 30:40, 20:36] = 255
    boxes_ = np.tile(np.array([20, 30, 36, 40], np.float32), (9, 3, 1))
    rng = np.random.default_rng(0)
    for _ in range(20):
        piece = data.cut(rng, data.Sample(video, boxes_), 5, 48)
        weights = trainer.region_weights(torch.from_numpy(piece.boxes[None]), 48, 48, (3.0, 2.0, 1.5))
        lit = torch.from_numpy((piece.video[None, ..., 0] > 0).copy())
        assert piece.video.shape == (5, 48, 48, 3)
        assert torch.equal(weights[:, 0] == weights.max(), lit)
        assert weights.mean() == pytest.approx(1, abs=1e-4)


def test_small_mouths_count_more_where_they_are_to() -> None:
    boxes = torch.zeros(3, 1, 3, 4)
    boxes[0, 0, 0] = torch.tensor([0, 0, 32, 32])
    boxes[1, 0, 0] = torch.tensor([8, 8, 24, 24])
    boxes[2, 0, 0] = torch.tensor([8, 8, 9, 9])
    alike, even, more = (trainer.region_weights(boxes, 40, 40, (8.0, 3.0, 2.0), power) for power in (0.0, 0.5, 1.0))
    at = [w[:, 0, 0, 8, 8] / w[:, 0, 0, 39, 39] for w in (alike, even, more)]
    assert torch.allclose(at[0], torch.tensor([8.0, 8.0, 8.0]))
    assert torch.allclose(at[1], torch.tensor([8.0, 8.0 * 2**0.5, 24.0]))
    assert torch.allclose(at[2], torch.tensor([8.0, 16.0, 24.0]))


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
    batch = next(data.batches(recipe, 0))
    state = trainer._begin(recipe, tmp_path, [as_video(torch.from_numpy(batch.video))])
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    losses = [trainer._step(state, batch, 0.0)["loss"] for _ in range(12)]
    still = [n for n, p in state.model.named_parameters() if p.grad is not None and torch.equal(p, before[n])]
    assert not still and losses[-1] < losses[0]


def test_uneven_motion_costs_more_than_the_same_error_spread_out() -> None:
    """A jump where latents meet and a stand between them, against the same way in even steps."""
    steps = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).view(1, 1, 5, 1, 1)
    video = steps.expand(1, 3, 5, 4, 4)
    even, uneven = video * 1.0, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.4]).view(1, 1, 5, 1, 1).expand_as(video)
    assert trainer.unevenness(even, video) == 0
    assert trainer.unevenness(video + 0.3, video) < 1e-5  # where it is shown does not matter
    assert trainer.unevenness(uneven, video) > 1
    recipe = trainer.Recipe()
    weights = torch.ones(1, 1, 5, 4, 4)
    plain, strict = (
        trainer.picture_loss(replace(recipe, evenness_weight=w), uneven, video, weights) for w in (0.0, 2.0)
    )
    assert torch.isclose(strict - plain, 2 * trainer.unevenness(uneven, video))


def test_recipe_refuses_a_crop_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples"):
        trainer.Recipe(crop=100)
    with pytest.raises(ValueError, match="one of both, encoder, decoder"):
        trainer.Recipe(learns="head")  # type: ignore[arg-type]


def random_frames(*clips_and_frames: int) -> np.ndarray:
    """[B, T, 32, 32, 3] uint8."""
    return np.random.default_rng(0).integers(0, 256, (*clips_and_frames, 32, 32, 3), np.uint8)


def go_on(recipe: trainer.Recipe, folder: Path, steps: int) -> tuple[LightAutoencoder, LightAutoencoder]:
    """A small finished autoencoder, and the same after some steps of a training that goes on with it."""
    source = small_autoencoder(folder / "finished.safetensors")
    batch = data.Batch(random_frames(2, 5), np.zeros((2, 5, 3, 4), np.float32))
    state = trainer._begin(recipe, folder, [as_video(torch.from_numpy(batch.video))], source)
    for _ in range(steps):
        trainer._step(state, batch, 0.0)
    trainer._checkpoint(state, ((9.0,) * 16, (9.0,) * 16))
    return load_light_autoencoder(source), load_light_autoencoder(folder / "autoencoder.safetensors")


@pytest.mark.parametrize("learns", ["encoder", "decoder", "both"])
def test_what_is_to_learn_of_a_finished_autoencoder_does(learns: str, tmp_path: Path) -> None:
    recipe = trainer.Recipe(size=32, crop=32, learns=learns)
    before, after = go_on(recipe, tmp_path, steps=3)
    assert before.config == after.config  # and with it mean and deviation of the latents
    for part in ("encoder", "decoder"):
        same = [
            torch.equal(a, b) for a, b in zip(*(getattr(m, part).parameters() for m in (before, after)), strict=True)
        ]
        assert any(same) == all(same) == (learns not in (part, "both"))


def test_latents_that_are_pulled_stay_nearer(tmp_path: Path) -> None:
    video, moved = as_video(torch.from_numpy(random_frames(1, 5))), []
    for weight in (0.0, 100.0):
        recipe = trainer.Recipe(size=32, crop=32, near_weight=weight, latent_penalty=0, warmup_steps=1)
        before, after = go_on(recipe, tmp_path, steps=8)
        with torch.no_grad():
            moved.append(float((after.encode(video) - before.encode(video)).square().mean()))
    assert moved[1] < 0.5 * moved[0]


@torch.no_grad()
def test_an_autoencoder_with_fresh_last_blocks_makes_the_same_frames(tmp_path: Path) -> None:
    before = load_light_autoencoder(small_autoencoder(tmp_path / "finished.safetensors"))
    latents = torch.randn(1, 16, 3, 2, 2)
    wanted = before.decode(latents)
    after = trainer.with_last_blocks(before, 2)
    assert after.config.last_blocks == 2 and len(after.decoder) == len(before.decoder) + 1
    assert torch.equal(after.decode(latents), wanted)
    assert trainer.with_last_blocks(after, 1) is after
    more = trainer.with_last_blocks(after, 3)
    assert torch.equal(more.decode(latents), wanted)
    trainer.save_model(tmp_path / "more.safetensors", more, more.config, {})
    assert torch.equal(load_light_autoencoder(tmp_path / "more.safetensors").decode(latents), wanted)


def rehearsed_clip(latents: int) -> data.Rehearsed:
    """64x64, a cell for every 16 pixels. Frame t is of brightness t; latent i, cell (y, x), is i, y, x."""
    frames = 4 * (latents - 1) + 1
    video = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 64, 64, 3))
    boxes_ = np.tile(np.array([20, 30, 36, 40], np.float32), (frames, 3, 1))
    own = np.stack(np.meshgrid(range(latents), range(4), range(4), indexing="ij"), 1).astype(np.float16)
    return data.Rehearsed(video, boxes_, own)


def test_latents_of_a_rehearsal_and_frames_that_they_become_belong_together() -> None:
    clip = rehearsed_clip(latents=9)
    for seed in range(20):
        piece = data.cut_rehearsed(np.random.default_rng(seed), clip, 4, 32)
        first, y, x = piece.latents[:, 0, 0, 0].astype(int)
        assert piece.latents.shape == (3, 4, 2, 2) and 1 <= first <= 5
        assert piece.video.shape == (8, 32, 32, 3)
        assert piece.video[:, 0, 0, 0].tolist() == list(range(4 * first + 5, 4 * first + 13))  # of its last two latents
        shown = np.array([20, 30, 36, 40]) - 16 * np.array([x, y, x, y])
        assert np.array_equal(piece.boxes[0, 0], np.clip(shown, 0, 32))


def test_frames_of_a_rehearsal_may_be_a_little_aside_and_not_still_nor_elsewhere() -> None:
    video = torch.zeros(1, 3, 5, 64, 64)
    for t in range(5):
        video[:, :, t, 24:40, 8 + 4 * t : 24 + 4 * t] = 1
    weights = torch.ones(1, 1, 5, 64, 64)
    still = video[:, :, :1].expand_as(video)
    right, aside, stands, elsewhere = (
        float(trainer.rehearsed_loss(made, video, weights))
        for made in (video, video.roll(1, 4), still, video.roll(20, 3))
    )
    assert right == 0 and 3 * aside < stands and 3 * aside < elsewhere


def test_a_rehearsal_teaches_the_decoder_only(tmp_path: Path) -> None:
    recipe = trainer.Recipe(size=32, crop=32)
    source = small_autoencoder(tmp_path / "finished.safetensors")
    state = trainer._begin(recipe, tmp_path, [], source)
    own = np.random.default_rng(0).standard_normal((2, 16, 4, 2, 2)).astype(np.float16)
    batch = data.Batch(random_frames(2, 8), np.zeros((2, 8, 3, 4), np.float32), own)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    losses = [trainer._step(state, batch, 0.0)["loss"] for _ in range(6)]
    moved = {name.split(".")[0] for name, p in state.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"decoder"} and losses[-1] < losses[0]


def test_batches_are_functions_of_their_number(tmp_path: Path) -> None:
    """Wherever one begins; the pool grows to its size and is renewed."""
    clip = clips.write_clip(tmp_path, 7, 29, (64, 64))
    own = tmp_path / "own-x" / clip.name
    own.parent.mkdir()
    checkpoint.write(own, {"own": torch.randn(8, 16, 4, 4).half()}, {})
    recipe = trainer.Recipe(size=32, crop=32, pool=5, renewed=1, batches=((5, 2), (4, 3)), rehearsed=(4, 2))
    for rehearsals in ((), (own,)):
        straight = list(itertools.islice(data.batches(recipe, 3, rehearsals), 9))
        for first in (1, 5, 8):
            again = itertools.islice(data.batches(recipe, 3, rehearsals, first), 9 - first)
            for one, other in zip(straight[first:], again, strict=True):
                assert np.array_equal(one.video, other.video) and np.array_equal(one.boxes, other.boxes)
                assert (one.latents is None) == (other.latents is None)
        assert not np.array_equal(straight[0].video, next(data.batches(recipe, 4, rehearsals)).video)
    made: list[int] = []
    latest = data.Latest(lambda number: made.append(number) or number, 3)
    assert [latest.before(end) for end in (2, 3, 5)] == [[0, 1], [0, 1, 2], [2, 3, 4]] and made == [0, 1, 2, 3, 4]
    assert data.Latest(int, 3).before(5) == [2, 3, 4]


def test_killed_at_any_step_the_autoencoder_reaches_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = trainer.Recipe(size=32, crop=32, pool=2, batches=((5, 1), (9, 1)), steps=5, save_steps=1)
    monkeypatch.setattr(trainer, "held_out", lambda recipe: [])
    monkeypatch.setattr(trainer, "_measure", lambda state, samples: ((0.0,) * 16, (1.0,) * 16))
    monkeypatch.setattr(trainer, "_final_statistics", lambda state: ((0.0,) * 16, (1.0,) * 16))
    trainer.train(recipe, tmp_path / "straight")
    step = trainer._one_step

    def halt(state, queue):
        if state.steps == 3:
            raise InterruptedError
        return step(state, queue)

    with monkeypatch.context() as stopping:
        stopping.setattr(trainer, "_one_step", halt)
        with pytest.raises(InterruptedError):
            trainer.train(recipe, tmp_path / "stopped")
    trainer.train(recipe, tmp_path / "stopped", resume=True)
    one, other = (checkpoint.read(tmp_path / way / "train.safetensors") for way in ("straight", "stopped"))
    assert one[0].keys() == other[0].keys() and all(torch.equal(one[0][n], other[0][n]) for n in one[0])
    assert one[1]["steps"] == other[1]["steps"] == "5" and any(n.startswith("optimiser.1.") for n in one[0])


def test_steps_on_rehearsals_come_in_turn(tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path, 7, 29, (64, 64))
    with pytest.raises(ValueError, match="no clips"):
        trainer.train(trainer.Recipe(size=32, crop=32), tmp_path / "out", rehearsals=tmp_path / "none")
    with pytest.raises(ValueError, match="only the encoder is to learn"):
        trainer.train(trainer.Recipe(learns="encoder"), tmp_path / "encoder", rehearsals=tmp_path)
    assert not (tmp_path / "encoder").exists()
    own = tmp_path / "own-x" / clip.name
    own.parent.mkdir()
    checkpoint.write(own, {"own": torch.zeros(8, 16, 4, 4, dtype=torch.float16)}, {})
    recipe = trainer.Recipe(size=32, crop=32, pool=2, batches=((5, 1),), rehearsed=(4, 2))
    drawn, made, again = itertools.islice(data.batches(recipe, 0, [own]), 3)
    assert drawn.latents is None and again.latents is None and made.latents is not None
    assert made.latents.shape == (2, 16, 4, 2, 2) and made.video.shape == (2, 8, 32, 32, 3)
