"""Training of the embedded transformer: sequences, data, weights and one small training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from joyavatar_core import checkpoint, flow
from joyavatar_core.audio import LogMel
from joyavatar_core.avatar import load_light_autoencoder, load_model
from joyavatar_core.cache import KVCache
from joyavatar_core.config import MODELS
from joyavatar_core.geometry import Geometry
from joyavatar_core.manner import HEARD
from joyavatar_core.model import JoyAvatarDiT, Past
from joyavatar_core.policy import POLICIES, policy
from joyavatar_core.projectors import AudioWindowProjector
from joyavatar_core.schedule import warp
from joyavatar_core.training import (
    batches,
    clips,
    common,
    encoded,
    flow_matching,
    listening,
    preview,
    sequences,
    trainer,
)
from joyavatar_core.training.encoded import LatentStore
from joyavatar_core.training.sequences import Layout, Mixture

from .small_training import (
    PRESET,
    SMALL,
    add_small_preset,
    drawn_clips,
    random_clips,
    small_autoencoder,
    small_recipe,
    small_training,
)

FLASH = policy("joyavatar-flash")
STEADY = Layout(FLASH, 5, (250.0, 500.0, 750.0, 1000.0))


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    add_small_preset(monkeypatch)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_autoencoder(tmp_path_factory.mktemp("autoencoder") / "autoencoder.safetensors")


def small_model() -> JoyAvatarDiT:
    torch.manual_seed(0)
    model = JoyAvatarDiT(SMALL).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def test_sequence_of_steady_state_is_the_forward_of_inference():
    context = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert STEADY.positions() == (*context, 14, *range(15, 27))
    levels = sequences.sample_levels(torch.Generator(), STEADY, 2, Mixture(exact=1, clean_motion=0, sink_late=1))
    warped = [warp(t, 5.0) for t in (125, 250, 250, 250, 250, 250, 500, 750, 1000)]
    expected = [warped[0]] * 3 + [warped[1]] * 13 + [w for w in warped[5:] for _ in range(3)]
    assert torch.allclose(levels, torch.tensor(expected).expand(2, -1), atol=1e-3)


def test_teacher_forcing_equals_the_cache():
    """One forward with the past behind the mask = past first, its keys and values cached, then the window."""
    model, layout = small_model(), Layout(FLASH, 1, (250.0, 500.0))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 36, layout.latents, 4, 4, dtype=torch.double, generator=generator)
    levels = 1000 * torch.rand(1, layout.latents, dtype=torch.double, generator=generator)
    with torch.no_grad():
        condition = model.condition(image=torch.randn(1, 4, 64, dtype=torch.double, generator=generator))
        audio = model.audio(torch.randn(1, layout.latents, 16, 8, dtype=torch.double, generator=generator))
        joint, _ = model(x, levels, layout.positions(), condition, audio, None, layout.mask(4))
        _, kv = model(x[:, :, :3], levels[:, :3], (0, 1, 2), condition, audio.select(slice(0, 3)))
        cache = KVCache(
            layers=2, batch=1, block_tokens=12, heads=2, head_dim=12, sink_blocks=1, local_blocks=4,
            dtype=torch.double, device=torch.device("cpu"),
        )  # fmt: skip
        cache.commit(0, kv)
        past, rest = Past(cache, layout.positions()[:3]), slice(3, None)
        apart, _ = model(x[:, :, 3:], levels[:, 3:], layout.positions()[3:], condition, audio.select(rest), past)
    assert torch.allclose(joint[:, :, 3:], apart, atol=1e-12)
    assert apart.std() > 0.1


def test_mask_hides_the_future_from_finished_blocks_only():
    mask = Layout(FLASH, 2, (250.0,)).mask(1)
    assert mask is not None and mask.shape == (10, 10)
    assert mask[6:].all() and mask[:3, :3].all() and mask[3:6, :6].all()
    assert not mask[:3, 3:].any() and not mask[3:6, 6:].any()
    assert Layout(FLASH, 0, (1000.0,)).mask(1) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(POLICIES)))
def test_every_sequence_is_a_forward_of_its_policy(seed: int, name: str):
    random_, chosen = random.Random(seed), policy(name)
    n = chosen.block_latents
    layout = sequences.sample_layout(random_, chosen, Mixture())
    assert layout.context <= chosen.context_blocks
    frames = sequences.sample_latents(random_, layout, 12, 0.5)
    positions = layout.positions()
    assert len(frames) == len(positions) == layout.latents and max(frames) < 12 * n
    window = frames[layout.lead :]
    assert window == list(range(window[0], window[0] + len(window))) and window[0] % n == 0
    assert positions[layout.lead] == chosen.window_start(layout.context)
    if layout.context:
        assert frames[:n] == list(range(n)) and window[0] >= n
    if layout.motion:
        assert frames[layout.lead - 1] == window[0] - 1
    levels = sequences.sample_levels(torch.Generator().manual_seed(seed), layout, 3, Mixture())
    assert levels.shape == (3, layout.latents) and (levels >= 0).all() and (levels <= 1000).all()
    assert (levels[:, layout.lead :] > 0).all()


def test_clips_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="9 are needed"):
        sequences.sample_latents(random.Random(0), STEADY, 8, 0.5)


# Data


def test_a_clip_survives_the_disk(tmp_path: Path):
    path = clips.write_clip(tmp_path, 3, frames=5, size=(64, 64))
    clip = clips.read_clip(path)
    assert clip.video.shape == (5, 64, 64, 3) and clip.audio.shape == (5000,)
    assert clip.boxes.shape == (5, 3, 4) and clip.pose.shape == (5, len(clips.POSE_COLUMNS))
    drawn = [clips.drawn.sample_clip(3, 5, (64, 64), photo=photo) for photo in (False, True)]
    candidates = [torch.from_numpy(v.copy()).float() for d in drawn for v in (d.video, d.video[:, :, ::-1])]
    assert min(float((clip.video.float() - v).abs().mean()) for v in candidates) < 6
    assert torch.allclose(clip.open, torch.tensor([p.open for p in drawn[0].poses]))
    assert clips.list_clips(tmp_path) == [path]
    assert torch.equal(clips.read_frames(path, slice(1, 4)), clip.video[1:4])
    path.write_bytes(b"no clip")
    for read in (clips.read_clip, clips.read_pose, lambda path: clips.read_frames(path, slice(0, 1))):
        with pytest.raises(OSError, match="not a stored clip"):
            read(path)


def test_mirroring_takes_the_boxes_along():
    clip = clips.drawn.sample_clip(1, 2, (64, 64))
    once, twice = clips.mirrored(clip), clips.mirrored(clips.mirrored(clip))
    assert (twice.video == clip.video).all() and abs(twice.boxes - clip.boxes).max() < 1e-4
    assert twice.poses == clip.poses and (once.boxes[..., 2] > once.boxes[..., 0]).all()


def test_cell_shares_add_up_to_the_box():
    geometry = Geometry(64, 64, spatial=16, patch=(1, 1))
    boxes = torch.tensor([[8.0, 10.0, 40.0, 50.0]]).expand(5, 4)
    shares = encoded.cell_shares(boxes, geometry)
    assert shares.shape == (2, 4, 4)
    assert torch.allclose(shares.sum((1, 2)), torch.full((2,), 32 * 40 / 256))
    assert shares[0, 0, 3] == 0 and shares[0, 1, 1] == 1


def test_an_encoded_clip_is_the_clip(drawn: Path, weights: Path):
    clip, decoder = clips.read_clip(clips.clip_path(drawn, 2)), load_light_autoencoder(weights)
    geometry = Geometry(128, 64, clip.fps, spatial=16, patch=(4, 4))
    tensors = encoded.encode_clip(clip, decoder, LogMel(geometry), geometry)
    rows = encoded.EncodedClips(**{name: tensor[None] for name, tensor in tensors.items()})
    assert rows.seed == 2 and rows.latents.shape == (1, 27, 16, 4, 8) and rows.audio.shape == (1, 27, 16, 256)
    columns = torch.arange(8) + 0.5
    middle = (rows.mouth[0, 0].float().sum(0) * columns).sum() / rows.mouth[0, 0].float().sum()
    assert float(middle) * 16 == pytest.approx(float(clip.boxes[0, 0, [0, 2]].mean()), abs=3)
    with pytest.raises(ValueError, match="clip 2 has 104 frames"):
        short = replace(clip, video=clip.video[:104])
        encoded.encode_clip(short, decoder, LogMel(geometry), geometry)


def test_latents_of_one_size_lie_together(drawn: Path, weights: Path, tmp_path: Path):
    store = LatentStore(clips.list_clips(drawn), drawn, weights, PRESET.patch)
    store.encode(2)
    first = store.ready()
    assert [p.name for p in first] == ["clip_000000000.safetensors", "clip_000000001.safetensors"]
    age = first[0].stat().st_mtime_ns
    store.encode()
    assert first[0].stat().st_mtime_ns == age
    square, wide = store.load()
    assert square.seed.tolist() == [0, 1, 3] and wide.seed.tolist() == [2]
    assert square.latents.shape == (3, 27, 16, 4, 4) and wide.latents.shape == (1, 27, 16, 4, 8)
    part = square.select(slice(1, 3))
    assert len(part) == 2 and torch.equal(part.latents[0], square.latents[1])
    other = small_autoencoder(tmp_path / "other.safetensors", seed=1)
    assert not replace(store, weights=other).ready()


def test_image_channels_mark_the_picture_and_repeat_the_grey():
    data = random_clips(2)
    channels = data.image_channels(torch.tensor([1, 0]), torch.tensor([[0, 3, 20], [7, 8, 0]]), 4)
    assert channels.shape == (2, 20, 3, 4, 4)
    assert channels[:, :4, :, 0, 0].sum(1).tolist() == [[4, 0, 0], [0, 0, 4]]
    assert torch.equal(channels[0, 4:, 2], data.image[1, 7].float()) and torch.equal(
        channels[1, 4:, 2], data.image[0, 0].float()
    )


# Weights


def test_masters_keep_steps_that_bfloat16_would_lose():
    model = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    weights = common.Weights(model, 0.9)
    optimiser = torch.optim.SGD(weights.master.values(), lr=1e-3)
    for step in range(10):
        model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        assert weights.collect() == pytest.approx(2**0.5)
        optimiser.step()
        weights.publish(step)
    assert torch.allclose(weights.master["weight"], torch.full((1, 2), 0.99))
    assert (model.weight == torch.tensor(0.99).bfloat16()).all()
    assert (weights.average["weight"] > 0.99).all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_orthogonal_levels_singular_values(shape: tuple[int, ...]):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(common.orthogonal(m))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_descends():
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(8, 8))
    optimiser = common.Muon([p], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        p.grad = p.detach() - target
        optimiser.step()
    assert (p - target).norm() < 0.2 * target.norm()


def test_muon_takes_a_convolution_for_a_matrix():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 6, 4, 3, generator=generator)
    kernel, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
    common.Muon([kernel], lr=0.05).step()
    common.Muon([matrix], lr=0.05).step()
    assert torch.equal(kernel.flatten(1), matrix) and not torch.equal(kernel, weight)


# Hearing

GEOMETRY = Geometry(64, 64, spatial=16)
assert PRESET.audio is not None
EARS = PRESET.audio


def test_an_ear_gets_sound_and_truth_of_the_same_frames():
    columns = torch.arange(9.0)[:, None]
    assert encoded.by_latent(columns, GEOMETRY).squeeze(-1).tolist() == [[0] * 4, [1, 2, 3, 4], [5, 6, 7, 8]]
    heard = listening.listen(3, LogMel(GEOMETRY), GEOMETRY, frames=41)
    assert heard.tokens.shape == (11, 16, 256) and heard.truth.shape == (11, 4, len(HEARD))
    again = listening.listen(3, LogMel(GEOMETRY), GEOMETRY, frames=41)
    assert torch.equal(heard.tokens, again.tokens) and torch.equal(heard.truth, again.truth)
    opening, loudness = heard.truth[1:, :, 0].mean(1), heard.tokens[1:].mean((1, 2))
    assert preview.correlation(opening, loudness) > 0.1


def test_a_window_is_heard_as_the_whole_clip():
    """What a projector reads in the window of a latent is what it reads there in the whole clip between silences."""
    torch.manual_seed(0)
    projector = AudioWindowProjector(EARS, nn)
    bare, windows = LogMel(GEOMETRY, before=0, after=0), LogMel(GEOMETRY)
    clip, window = (listening.listen(5, front, GEOMETRY, frames=41).tokens for front in (bare, windows))
    whole = listening.read(projector, EARS, clip[None])[0]
    assert whole.shape == (44, EARS.readings)
    assert torch.allclose(projector.read(window[:-2]).flatten(0, 1), whole[:-8], atol=1e-5)  # then the sound goes on


def telling(count: int) -> listening.Heard:
    """Clips whose first numbers of the first column tell the truth in a little noise."""
    generator = torch.Generator().manual_seed(count)
    columns = len(HEARD)
    truth = torch.randn(count, 30, 1, columns, generator=generator).expand(-1, -1, 4, -1)
    tokens = 0.1 * torch.randn(count, 30, 4, 256, generator=generator)
    tokens[..., :columns] += truth
    return listening.Heard(tokens, truth)


def small_listening() -> listening.Listening:
    torch.manual_seed(0)
    recipe = listening.Recipe(warmup_steps=1, learning_rate=1e-2)
    return listening.Listening(recipe, AudioWindowProjector(EARS, nn), EARS)


def test_listening_teaches_the_projector_to_hear():
    state, pool, others = small_listening(), telling(20), telling(5)
    deaf = listening.explained(state.average, EARS, others)
    for _ in range(100):
        state.step(pool, 0.0)
    heard = listening.explained(state.average, EARS, others)
    assert set(heard) == {f"heard_{name}" for name in HEARD}
    assert max(deaf.values()) < 0.1 and min(heard.values()) > 0.25
    mixed = listening.Heard(others.tokens.roll(1, 0), others.truth)
    assert max(listening.explained(state.average, EARS, mixed).values()) < 0


def test_hearing_is_measured_as_r_squared():
    projector, clips_ = AudioWindowProjector(EARS, nn), telling(3)
    nn.init.zeros_(projector.conv_out.weight)
    with torch.no_grad():
        projector.conv_out.bias.copy_(clips_.truth.flatten(0, 2).mean(0))
    figures = listening.explained(projector, EARS, clips_)
    assert list(figures.values()) == pytest.approx([0] * len(HEARD), abs=1e-3)


def test_readings_are_laid_out_over_the_tokens():
    """Each along a direction of its own, in its usual deviations, beside a constant of about the same size."""
    torch.manual_seed(0)
    ears = replace(EARS, width=32)
    projector, clips_ = AudioWindowProjector(ears, nn), telling(8)
    listening.spread(projector, ears, clips_, seed=0)
    with torch.no_grad():
        heard = listening.read(projector, ears, clips_.tokens)
        drawn = torch.randn(*heard.shape[:-1], ears.told - ears.readings, generator=torch.Generator().manual_seed(0))
        told = torch.cat([heard, drawn], -1).unflatten(1, (-1, ears.frames_read)).flatten(2)
        tokens = projector.proj(told.flatten(0, 1))
        back = (tokens - tokens.mean(0)) @ torch.linalg.pinv(projector.proj.weight).T
    assert torch.allclose(back, told.flatten(0, 1) - told.flatten(0, 1).mean(0), atol=1e-4)
    assert 0.5 < float(tokens.std(0).square().mean().sqrt()) < 2 and 0.5 < float(tokens.mean(0).std()) < 2


def test_a_transformer_takes_the_projector_and_leaves_it_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = listening.Recipe(model="small", minutes=0.5 / 60, clips=3, processes=1, held_out=2, batch=2)
    monkeypatch.setattr(listening, "_FRAMES", 41)
    names = {f"heard_{name}" for name in HEARD}
    assert set(listening.train(recipe, tmp_path)) == names
    last = json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[-1])
    assert last["step"] >= 2 and last["clips"] == 3
    projector = tmp_path / "projector.safetensors"
    assert set(listening.train(recipe, tmp_path / "on", projector)) == names
    state = flow_matching.begin(small_recipe(), tmp_path, (random_clips(4),), projector)
    taught = checkpoint.read(projector)[0]
    for _ in range(3):
        trainer.train_step(state)
    for name, tensor in taught.items():
        mine = tensor.to(common.training_dtype())
        assert torch.equal(state.model.state_dict()[f"proj_model.{name}"], mine), name
        assert torch.allclose(state.averaged().state_dict()[f"proj_model.{name}"], mine), name
    with pytest.raises(checkpoint.CheckpointError):
        listening.load_projector(projector, JoyAvatarDiT(SMALL).proj_model)


# Training


def test_x0_prediction_derives_the_velocity():
    torch.manual_seed(0)
    model = JoyAvatarDiT(PRESET)
    trainer.initialise(model, 0)
    nn.init.normal_(model.head.head.weight, std=0.3)
    batch = batches.make_batch(random_clips(2), STEADY, torch.arange(2), (4, 4), Mixture(clean_motion=1), 0)
    velocity = batches.predict(model, batch)
    model.config = replace(PRESET, prediction="velocity")
    x0 = batches.predict(model, batch)
    x_t = flow.add_noise(batch.x0, batch.noise, batch.timesteps)
    noisy = batch.timesteps > 50
    assert torch.allclose(flow.to_x0(x_t, velocity, batch.timesteps)[:, :, noisy[0]], x0[:, :, noisy[0]], atol=1e-5)
    assert noisy.sum() == 2 * (STEADY.latents - 1) and velocity.isfinite().all()
    flow_matching.flow_loss(batch, velocity, small_recipe()).backward()
    assert model.head.head.weight.grad is not None and model.head.head.weight.grad.norm() > 0


def test_training_learns_and_resumes_where_it_stopped(tmp_path: Path):
    wide = random_clips(3, (4, 8))
    state = small_training(tmp_path, wide)
    state.held_out = state.data[0]  # four clips teach nothing about a fifth
    before = state.measure()
    for _ in range(40):
        trainer.train_step(state)
    trainer.save(state)
    for _ in range(4):
        trainer.train_step(state)
    after = state.measure()
    assert after["all_250"] < before["all_250"] and after["start"] < before["start"]
    again = small_training(tmp_path, wide)
    trainer.resume(again)
    for _ in range(4):
        trainer.train_step(again)
    assert again.steps == 44
    for name, p in state.learner.weights.master.items():
        assert torch.equal(p, again.learner.weights.master[name]), name


def test_batches_take_every_size_as_often_as_it_is_there(tmp_path: Path):
    state = small_training(tmp_path, random_clips(12, (4, 8)))
    widths = []
    for state.steps in range(200):
        batch = state.batch()
        widths.append(batch.x0.shape[-1])
        tokens = batch.x0.shape[0] * batch.image.shape[1] * batch.layout.latents
        assert tokens <= 1.5 * state.recipe.tokens
    assert 0.6 < widths.count(8) / 200 < 0.9


def test_saved_transformer_loads(tmp_path: Path):
    state = small_training(tmp_path)
    trainer.save(state)
    model = load_model(tmp_path / "transformer.safetensors")
    assert model.config == state.model.config
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name


def test_motion_frame_has_no_loss_and_the_mouth_counts_more():
    layout = Layout(FLASH, 1, (250.0, 500.0, 750.0, 1000.0))
    data = random_clips(2)
    batch = batches.make_batch(data, layout, torch.arange(2), (4, 4), Mixture(), 0)
    recipe = flow_matching.Recipe()
    perfect = flow.velocity(batch.x0, batch.noise)

    def loss_with_error_at(latent: int, row: int) -> float:
        v = perfect.clone()
        v[:, :, latent, row, 1] += 1
        return float(flow_matching.flow_loss(batch, v, recipe))

    assert loss_with_error_at(3, 0) == 0
    assert loss_with_error_at(4, 0) > loss_with_error_at(0, 0) > 0
    assert loss_with_error_at(4, 2) > 3 * loss_with_error_at(4, 0)


def test_the_most_frequent_size_is_held_out_and_too_few_clips_are_refused():
    data = (random_clips(6), random_clips(3, (4, 8)))
    train, held_out = flow_matching.hold_out(data, 2)
    assert held_out.seed.tolist() == [0, 1] and train[0].seed.tolist() == [2, 3, 4, 5] and train[1] is data[1]
    with pytest.raises(ValueError, match="6 clips of one size: more than the 6 held out"):
        flow_matching.hold_out(data, 6)
    with pytest.raises(ValueError, match="0 clips"):
        flow_matching.hold_out((), 1)


def test_recipe_refuses_nonsense(tmp_path: Path):
    with pytest.raises(ValueError, match="optimiser"):
        flow_matching.Recipe(optimiser="sgd")
    with pytest.raises(ValueError, match="minutes -1"):
        flow_matching.Recipe(minutes=-1)
    with pytest.raises(ValueError, match="nothing to resume"):
        trainer.resume(small_training(tmp_path))


def test_the_whole_training_runs_and_goes_on(drawn: Path, weights: Path, tmp_path: Path):
    """Draws, encodes, trains for a second on two sizes, saves, shows, and goes on for half a second more."""
    recipe = replace(small_recipe(), minutes=1 / 60, held_out=1)
    start = partial(flow_matching.begin, recipe, tmp_path)
    flow_matching.train(recipe, tmp_path, drawn, weights, start)
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    measured, shown = lines[-2:]
    assert {"all_1000", "mouth_250", "deaf_1000", "start"} <= set(measured)
    assert set(shown) == {"step", "minutes", "sync", "ruler", "drift"} and (tmp_path / "preview.png").exists()
    assert load_model(tmp_path / "transformer.safetensors").config == MODELS["small"]
    longer = replace(recipe, minutes=4 / 60)
    start = partial(flow_matching.begin, longer, tmp_path)
    flow_matching.train(longer, tmp_path, drawn, weights, start, again=True)
    again = json.loads((tmp_path / "curve.jsonl").read_text().splitlines()[-1])
    assert again["step"] > shown["step"]


def test_ruler_reads_the_mouth():
    clip = clips.drawn.sample_clip(5, 60, (128, 128))
    video = encoded.as_video(torch.from_numpy(clip.video))[0]
    opening = torch.tensor([p.open for p in clip.poses])
    patches = preview.mouth_patches(video, torch.from_numpy(clip.boxes[0, 0]))
    ruler = preview.fit_ruler(patches[::2], opening[::2])
    assert preview.correlation(preview.read_ruler(ruler, patches[1::2]), opening[1::2]) > 0.8
    assert preview.correlation(opening, torch.ones(60)) == 0


def test_close_ups_are_cuts_of_their_clips_with_the_mouth_inside():
    whole = random_clips(3, (16, 12))
    whole.mouth.zero_()
    whole.mouth[:, :, 9:11, 5:8] = 1
    clips = torch.tensor([2, 0])
    close = whole.close_ups(clips, 8, (2, 2), random.Random(0))
    assert close.latents.shape == (2, 30, 16, 8, 8) and torch.equal(close.audio, whole.audio[clips])
    for row, clip in enumerate(clips):
        spots = [
            (y, x)
            for y in range(0, 9, 2)
            for x in range(0, 5, 2)
            if torch.equal(whole.latents[clip, 0, :, y : y + 8, x : x + 8], close.latents[row, 0])
        ]
        assert len(spots) == 1
        y, x = spots[0]
        assert torch.equal(whole.image[clip, :, :, y : y + 8, x : x + 8], close.image[row])
    assert close.mouth.sum() > 0.5 * whole.mouth[clips].sum()


def test_batches_of_close_ups_have_their_size(tmp_path: Path):
    state = small_training(tmp_path)
    state.recipe = replace(state.recipe, framing=batches.Framing(1.0, (4,)))
    state.data = (random_clips(4, (8, 12)),)
    assert {tuple(state.batch().x0.shape[-2:]) for _ in range(3)} == {(4, 4)}
    state.recipe = replace(state.recipe, framing=batches.Framing(0.0))
    assert tuple(state.batch().x0.shape[-2:]) == (8, 12)


def test_small_mouths_are_drawn_as_often_as_their_cells_ask(tmp_path: Path):
    """Two clips of large mouths, one of another size whose mouth is a quarter of theirs: power 1 makes it 4 to 2."""
    large, small = random_clips(2, (8, 8)), random_clips(1, (8, 12))
    for part, cells in ((large, 4), (small, 1)):
        part.mouth.zero_()
        part.mouth[:, :, 4, :cells] = 1
    layout = sequences.sample_layout(random.Random(0), policy("joyavatar-flash"), Mixture())

    def share(framing: batches.Framing) -> float:
        draws = (random.Random(1), random.Random(2))
        drawn_from = [framing.draw((large, small), layout, 1, (2, 2), draws)[0] for _ in range(600)]
        return sum(part is small for part in drawn_from) / len(drawn_from)

    assert share(batches.Framing(0.0)) == pytest.approx(1 / 3, abs=0.06)
    assert share(batches.Framing(0.0, small_mouths=1.0)) == pytest.approx(4 / 6, abs=0.06)
