"""The measures: statistics with known answers, pictures with known differences, the reader's laws and its file."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from joyavatar_core import checkpoint
from joyavatar_core.measures import mouth_reader as reader_file
from joyavatar_core.measures import pictures, statistics
from joyavatar_core.measures.mouth_reader import (
    WEIGHTS,
    Crop,
    MouthReader,
    Place,
    cut,
    frame_pieces,
    letterbox,
    load_mouth_reader,
    turned,
)
from joyavatar_core.training import mouth_reader as trainer
from joyavatar_core.training.drawn import Avatar, Pose, render


def noise_curve(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count)


# Curves


@pytest.mark.parametrize("lag", [-3, 0, 2])
def test_a_delay_is_found_as_the_best_lag(lag: int) -> None:
    truth = noise_curve(200)
    late = np.roll(truth, lag) * 0.5 + 3
    table = statistics.correlations(late, truth)
    assert statistics.best_lag(table[None]) == lag
    assert table.max() == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 5), st.floats(-3, 3))
def test_correlation_knows_neither_scale_nor_offset(seed: int, scale: float, offset: float) -> None:
    a, b = noise_curve(50, seed), noise_curve(50, seed + 1)
    assert statistics.correlation(scale * a + offset, b) == pytest.approx(statistics.correlation(a, b), abs=1e-9)
    assert statistics.correlation(a, -scale * a) == pytest.approx(-1)


def test_a_still_curve_correlates_with_nothing() -> None:
    assert statistics.correlation(np.full(9, 0.3), noise_curve(9)) == 0
    with pytest.raises(ValueError, match="too short"):
        statistics.correlations(noise_curve(4), noise_curve(4))


def test_r_squared_of_the_mean_is_nought_and_of_the_truth_one() -> None:
    truth = noise_curve(300)
    assert statistics.r_squared(truth, truth) == 1
    assert statistics.r_squared(np.full(300, truth.mean()), truth) == pytest.approx(0)
    assert statistics.r_squared(truth + np.resize((0.1, -0.1), 300), truth) == pytest.approx(1 - 0.01 / truth.var())


def test_pooled_r_squared_is_that_of_the_joined_curves() -> None:
    truth = [noise_curve(40, i) + i for i in range(6)]
    read = [t + 0.3 * noise_curve(40, 50 + i) for i, t in enumerate(truth)]
    pooled = statistics.pooled_r_squared(read, truth)
    assert pooled.mean == pytest.approx(statistics.r_squared(np.concatenate(read), np.concatenate(truth)))
    assert pooled.low <= pooled.mean <= pooled.high <= 1 and pooled.n == 6


def test_bootstrap_interval_has_the_width_theory_gives() -> None:
    values = noise_curve(400, 1)
    found = statistics.mean_interval(list(values))
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found == statistics.mean_interval(list(values))  # seeded
    assert statistics.mean_interval([2.0, float("nan")]) == statistics.Interval(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="at least one clip"):
        statistics.mean_interval([float("nan")])


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    assert statistics.ratio_interval([1.0, 9.0], [10.0, 10.0]).mean == pytest.approx(0.5)
    assert statistics.ratio_interval([3.0, 1.0], [1.0, 3.0]).mean == pytest.approx(1.0)


# Loudness


def test_loudness_is_in_decibels_below_the_loud_frames() -> None:
    audio = np.concatenate([np.ones(16000), np.full(16000, 0.1), np.zeros(16000)])
    level = statistics.loudness(audio, 16000, 16, 48)
    assert level[:16] == pytest.approx(0, abs=1e-6)
    assert level[16:32] == pytest.approx(-20)
    assert (level[32:] == -60).all()


def test_the_predictor_finds_a_causal_rule_and_cannot_see_ahead() -> None:
    levels = [np.clip(noise_curve(300, i) * 10 - 20, -60, 0) for i in range(6)]

    def rule(level: np.ndarray, ahead: int) -> np.ndarray:
        return np.roll(10 ** (level / 20), -ahead)

    for ahead, least, most in ((-2, 0.99, 1.0), (2, -0.2, 0.2)):
        fitted = statistics.LoudnessPredictor.fit(levels[:5], [rule(level, ahead) for level in levels[:5]])
        found = statistics.correlation(fitted.predict(levels[5])[4:-4], rule(levels[5], ahead)[4:-4])
        assert least <= found <= most


# Speech


def test_closures_count_one_frame_around_the_sound() -> None:
    opening = np.full(32, 0.5)
    opening[10] = 0.02  # its middle is at 0.656 s
    spans = [(0.60, 0.65), (0.70, 0.75), (0.80, 0.85), (5.0, 5.1)]
    assert statistics.closest(opening, spans, 16) == pytest.approx([0.02, 0.02, 0.5])


def test_threshold_follows_true_closures_within_limits() -> None:
    assert statistics.closure_threshold(np.linspace(0.0, 0.12, 101)) == pytest.approx(0.114)
    assert statistics.closure_threshold(np.zeros(10)) == 0.08
    assert statistics.closure_threshold(np.ones(10)) == 0.15


def test_moved_spans_keep_their_number_and_stay_in_the_clip() -> None:
    spans = [(0.5, 0.6), (9.0, 9.2)]
    found = statistics.moved(spans, 10.0, 1.0)
    assert found == [pytest.approx((1.5, 1.6)), pytest.approx((0.0, 0.2))]


def test_silence_is_measured_inside_only() -> None:
    curve = np.zeros(16)
    curve[[0, 7]] = 1.0
    assert statistics.mean_inside(curve, [(0.0, 0.5)], 16, 0.1) == 0
    assert statistics.mean_inside(curve, [(0.0, 0.5)], 16, 0.0) == pytest.approx(0.25)
    assert np.isnan(statistics.mean_inside(curve, [(0.0, 0.1)], 16, 0.1))


def test_blinks_have_hysteresis() -> None:
    assert statistics.count_blinks(np.array([0, 0.6, 0.4, 0.6, 0.1, 0.45, 0, 0.9])) == 2
    assert statistics.count_blinks(np.full(9, 0.45)) == 0


def test_head_deviation_knows_neither_size_nor_place_and_little_of_jitter() -> None:
    time = np.arange(160) / 16
    sway = np.stack([np.sin(time), 0 * time, 1 + 0 * time, 0 * time], 1)
    moved = statistics.head_deviation(sway)
    assert moved == pytest.approx(np.sin(time).std(), rel=0.05)
    assert statistics.head_deviation(sway * 80 + 12) == pytest.approx(moved * 80 / 92, rel=1e-6)
    jitter = np.stack([0.1 * noise_curve(160), 0 * time, 1 + 0 * time, 0 * time], 1)
    assert statistics.head_deviation(jitter) < 0.06
    assert statistics.slope(3 * time + noise_curve(160) * 1e-9, time) == pytest.approx(3)


# Pictures


def test_psnr_of_a_known_error_and_in_a_box() -> None:
    true = np.zeros((2, 32, 40, 3), np.uint8)
    made = true.copy()
    made[:, 8:16, 8:16] = 10
    box = np.tile(np.array([8.0, 8.0, 16.0, 16.0]), (2, 1))
    assert pictures.psnr(pictures.box_errors(made, true, box)[0]) == pytest.approx(20 * np.log10(25.5))
    assert pictures.box_errors(made, true)[0] == pytest.approx(100 * 64 / 1280)
    outside = np.tile(np.array([-9.0, -9.0, 900.0, -3.0]), (2, 1))
    assert pictures.box_errors(made, true, outside).tolist() == [0, 0]
    assert pictures.psnr(0.0) == 99


def test_one_person_is_nearer_to_itself_than_to_another() -> None:
    videos = [render(Avatar.random(s), (Pose(), Pose(open=0.7, head_x=0.05)), (128, 128)) for s in (1, 2, 3)]
    features = [[pictures.layout_feature(v[i : i + 1], b[0, 2]) for i in (0, 1)] for v, b in videos]
    colours = [[pictures.colour_histogram(v[i : i + 1]) for i in (0, 1)] for v, _ in videos]
    for a, b in ((0, 1), (1, 2), (2, 0)):
        own = pictures.feature_distance(*features[a])
        assert own < 0.6 * pictures.feature_distance(features[a][0], features[b][0])
        assert pictures.histogram_distance(*colours[a]) < pictures.histogram_distance(colours[a][0], colours[b][0])
    assert pictures.feature_distance(features[0][0], features[0][0]) == pytest.approx(0)
    black, white = (pictures.colour_histogram(np.full((1, 9, 9, 3), v, np.uint8)) for v in (0, 255))
    assert pictures.histogram_distance(black, black) == pytest.approx(0)
    assert pictures.histogram_distance(black, white) == pytest.approx(1)


def test_sharpness_is_lost_by_blur_and_by_ghosts_and_not_by_a_move() -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[10:30, 10:20] = 200
    moved = np.roll(picture, 4, axis=1)
    ghost = picture // 2 + moved // 2
    steps = [np.roll(picture, i, axis=1).astype(float) for i in range(4)]
    blurred = np.mean(steps, axis=0).astype(np.uint8)
    sharp = pictures.edges(np.stack([picture, moved, ghost, blurred]), np.array([2.0, 2.0, 38.0, 38.0]))
    assert sharp[1] == pytest.approx(sharp[0]) and sharp[0] > 1.1 * sharp[2] > 1.1 * sharp[3]
    assert pictures.edges(picture[None], np.array([30.0, 30.0, 38.0, 38.0]))[0] == 0


def test_noise_grows_with_noise_and_not_with_edges() -> None:
    rng = np.random.default_rng(0)
    picture = np.full((64, 64, 3), 120, np.uint8)
    picture[:, 40:] = 30
    flat = pictures.flat_pixels(picture)
    assert not flat[:, 39:41].any() and flat.mean() >= 0.3
    grain = [np.clip(picture + s * rng.standard_normal(picture.shape), 0, 255).astype(np.uint8) for s in (0, 3, 9)]
    levels = pictures.noise(np.stack(grain), flat)
    assert levels[0] == 0 and 0.5 < levels[1] < levels[2] / 2
    shifted = np.roll(picture, 1, axis=1)[None]
    assert pictures.noise(shifted, flat)[0] == 0


# The reader's parts


def test_a_cut_samples_what_its_place_says() -> None:
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(120.0), indexing="ij")
    frames = torch.stack([columns, rows, 0 * rows])[None]
    centre, size, roll = torch.tensor([[60.0, 50.0]]), torch.tensor([20.0]), torch.tensor([0.3])
    crop = Crop(4, 6, 10.0)
    got = cut(frames, centre, size, roll, crop)
    for row, column in ((0, 0), (3, 5), (2, 1)):
        aside = torch.tensor([[(column + 0.5 - 3) / 10, (row + 0.5 - 2) / 10]])
        expected = (centre + turned(aside, size, roll))[0]
        assert got[0, :2, row, column].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert turned(torch.tensor([1.0, 0.0]), torch.tensor(2.0), torch.tensor(0.1))[1] > 0  # clockwise, y is down


def test_fine_frames_are_halved_before_they_are_cut() -> None:
    frames = torch.zeros(1, 3, 256, 256)
    frames[..., ::2] = 1.0  # stripes that single samples would catch or miss
    got = cut(frames, torch.tensor([[128.0, 128.0]]), torch.tensor([40.0]), torch.zeros(1), Crop(8, 8, 10.0))
    assert got.std() < 1e-5 and got.mean() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (96, 320)])
def test_letterbox_says_where_pixels_went(size: tuple[int, int]) -> None:
    frames = torch.full((1, 3, *size), -1.0)
    y, x = size[0] // 3, size[1] // 2
    frames[..., y - 4 : y + 5, x - 4 : x + 5] = 1.0
    thumbs, scale, offset = letterbox(frames)
    assert thumbs.shape == (1, 3, 64, 64)
    light = (thumbs[0, 0] + 1) * (letterbox(torch.ones_like(frames))[0][0, 0] != 0)  # the bars are grey
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    middle = torch.stack([(light * columns).sum(), (light * rows).sum()]) / light.sum()
    assert (middle - (torch.tensor([x, y]) * scale + offset)).abs().max() < 0.05


def random_reader(seed: int = 0) -> MouthReader:
    torch.manual_seed(seed)
    return MouthReader().requires_grad_(False).eval()


@pytest.mark.parametrize("shape", [(5, 64, 96, 3), (1, 100, 60, 3)])
def test_reading_has_the_shapes_and_ranges_it_promises(shape: tuple[int, ...]) -> None:
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reader = random_reader()
    got = reader.read(video)
    for name, low in (("open", 0), ("wide", -1), ("teeth", 0), ("blink", 0)):
        curve = getattr(got, name)
        assert curve.shape == (shape[0],) and curve.min() >= low and curve.max() <= 1
    assert got.place.shape == (shape[0], 4) and (got.place[:, 2] > 0).all()
    same = reader.read(video.permute(3, 0, 1, 2).float() / 127.5 - 1)
    assert torch.allclose(got.open, same.open, atol=1e-5) and torch.allclose(got.place, same.place, atol=1e-3)


def test_no_frame_knows_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (7, 64, 64, 3), dtype=torch.uint8, generator=generator)
    order, reader = torch.randperm(7, generator=generator), random_reader()
    ordered = reader.read(video)
    monkeypatch.setattr(reader_file, "_CHUNK", 3)
    shuffled = reader.read(video[order])
    assert torch.allclose(shuffled.wide, ordered.wide[order], atol=1e-5)
    assert torch.allclose(shuffled.place, ordered.place[order], rtol=1e-4, atol=1e-3)
    alone = reader.read(video[:1])
    assert not torch.allclose(alone.wide[0], ordered.wide[0], atol=1e-6)  # but the person is heard in all frames


def test_a_mouth_reads_in_a_mirror_as_it_is() -> None:
    """The ten looks are five places, symmetric, and their mirrors: none of them is to be preferred."""
    reader, video = load_mouth_reader(), torch.rand(3, 2, 90, 120, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mouth, eyes = torch.tensor([[50.0, 60.0], [52.0, 61.0]]), torch.tensor([[48.0, 30.0], [49.0, 30.0]])
    place = Place(mouth, eyes)
    mirrored = Place(*(torch.stack([119 - p[:, 0], p[:, 1]], 1) for p in (mouth, eyes)))
    with torch.no_grad():
        here = reader._told(frame_pieces(video), place)
        there = reader._told(frame_pieces(video.flip(-1)), mirrored)
        once = reader._look(frame_pieces(video), place)[0][:, :3]
    assert here.shape == (2, 3) and torch.allclose(here, there, atol=1e-4)
    assert not torch.allclose(here, once, atol=1e-3)


@pytest.mark.parametrize(
    ("video", "match"),
    [
        (torch.zeros(2, 64, 64, 4, dtype=torch.uint8), "give uint8"),
        (torch.zeros(4, 3, 64, 64), "give uint8"),
        (torch.zeros(0, 64, 64, 3, dtype=torch.uint8), "give uint8"),
        (torch.zeros(2, 16, 64, 3, dtype=torch.uint8), "at least 32x32"),
    ],
)
def test_what_cannot_be_read_is_refused(video: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        random_reader().read(video)


def test_loading_is_strict(tmp_path: Path) -> None:
    reader = random_reader()
    tensors = {name: t.bfloat16() for name, t in reader.state_dict().items()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= 950_000
    path = tmp_path / "reader.safetensors"
    checkpoint.write(path, tensors, {})
    loaded = load_mouth_reader(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    tensors.pop("mouth.head.1.bias")
    checkpoint.write(path, tensors, {})
    with pytest.raises(checkpoint.CheckpointError, match=r"missing: mouth\.head\.1\.bias"):
        load_mouth_reader(path)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        load_mouth_reader(tmp_path / "nothing.safetensors")


# The trainer


def test_the_true_place_is_where_the_face_is_drawn() -> None:
    avatar = Avatar.random(4)
    size = (128, 128)
    straight, turned_head = (Pose(), Pose(roll=0.2, head_x=0.05, open=0.5))
    places = trainer.true_place(avatar, (straight, turned_head), size)
    assert places.size[0] == pytest.approx(float(places.size[1]), rel=0.02) and 25 < places.size[0] < 70
    axis = places.mouth - places.eyes
    assert axis[0, 0].abs() < 0.05 * axis[0, 1]
    assert torch.atan2(-axis[1, 0], axis[1, 1]) == pytest.approx(0.2, abs=0.02)
    shut, opened = render(avatar, (straight, Pose(open=1.0)), size)[0].astype(int)
    changed = np.argwhere(np.abs(shut - opened).max(2) > 60)  # lips and chin
    middle = (changed.min(0) + changed.max(0)) / 2
    assert abs(middle[1] - float(places.mouth[0, 0])) < 4 and changed[:, 0].min() > float(places.eyes[0, 1])


def test_training_learns_saves_and_goes_on(tmp_path: Path) -> None:
    recipe = trainer.Recipe(minutes=0.002, clips=2, pool=3, speeches=1, held_out=1)
    figures = trainer.train(recipe, tmp_path)
    assert set(figures) == {*trainer.QUANTITIES, "place_error"}
    tensors, notes = checkpoint.read(tmp_path / "train.safetensors")
    assert int(notes["steps"]) >= 1 and len(tensors) == 2 * len(MouthReader().state_dict())
    load_mouth_reader(tmp_path / "mouth-reader.safetensors")
    longer = replace(recipe, minutes=float(notes["spent"]) / 60 + 0.05)  # a first step may take seconds
    trainer.train(longer, tmp_path, go_on=True)
    assert int(checkpoint.read(tmp_path / "train.safetensors")[1]["steps"]) > int(notes["steps"])
    with pytest.raises(ValueError, match="held out"):
        trainer.Recipe(seed=900)


def test_a_step_lowers_the_loss_of_its_own_batch() -> None:
    recipe = trainer.Recipe(clips=3, pool=3, speeches=1)
    torch.manual_seed(0)
    reader, pool = MouthReader(), trainer.Pool(recipe)
    for person in islice(trainer.people(recipe, 0), 3):
        pool.add(person)
    batch = pool.batch(np.random.default_rng(0))
    optimiser = torch.optim.Adam(reader.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(1)
        loss = torch.stack(list(trainer.loss_of(reader, batch, np.random.default_rng(1)).values())).sum()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_oldest_of_a_pool_go() -> None:
    recipe = trainer.Recipe(clips=2, pool=3, speeches=1)
    pool, drawn = trainer.Pool(recipe), list(islice(trainer.people(recipe, 0), 5))
    for person in drawn:
        pool.add(person)
    kept = [drawn[i] for i in (3, 4, 2)]
    assert all(np.array_equal(clip.mouths, person[1]) for clip, person in zip(pool.clips, kept, strict=True))
    with pytest.raises(ValueError, match="a pool of 3 people: a step takes 4"):
        replace(recipe, clips=4)


def test_parts_of_a_reader_may_be_kept(tmp_path: Path) -> None:
    path, keep = tmp_path / "reader.safetensors", ("locator", "eyes")
    checkpoint.write(path, random_reader().state_dict(), {})
    recipe = trainer.Recipe(clips=2, pool=2, speeches=1, keep=keep)
    reader, old = trainer.begin(recipe, path), load_mouth_reader(path)
    learns = {name.split(".")[0] for name, p in reader.named_parameters() if p.requires_grad}
    assert learns == {"mouth"} and not torch.equal(reader.mouth.head[1].weight, old.mouth.head[1].weight)  # pyright: ignore
    for part in keep:
        ours, theirs = getattr(reader, part).state_dict(), getattr(old, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pool = trainer.Pool(recipe)
    for person in islice(trainer.people(recipe, 0), 2):
        pool.add(person)
    losses = trainer.loss_of(reader, pool.batch(np.random.default_rng(0)), np.random.default_rng(0), keep)
    assert set(losses) == {"mouth", "aside"}
    with pytest.raises(ValueError, match="give --initial"):
        trainer.begin(recipe, None)
    with pytest.raises(ValueError, match="no part of a reader: nose"):
        replace(recipe, keep=("nose",))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the package has no mouth reader yet")
def test_the_shipped_reader_reads_people_it_never_saw() -> None:
    figures = trainer.measure(load_mouth_reader(), trainer.held_out_clips(6, 16))
    assert figures["open"] > 0.9 and figures["teeth"] > 0.8 and figures["blink"] > 0.8 and figures["wide"] > 0.8
    assert figures["place_error"] < 0.03
