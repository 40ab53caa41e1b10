"""What is drawn beside what is heard, and the training that tells a transformer the truth."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from joyavatar_core import manner
from joyavatar_core.avatar import load_model
from joyavatar_core.config import MODELS
from joyavatar_core.geometry import Geometry
from joyavatar_core.policy import policy
from joyavatar_core.projectors import AudioWindowProjector
from joyavatar_core.training import acting, batches, encoded, flow_matching, lips, rehearsal, seen, trainer
from joyavatar_core.training.clips import POSE_COLUMNS

from .small_training import (
    HEARING,
    PRESET,
    add_small_preset,
    drawn_clips,
    random_clips,
    small_autoencoder,
    small_recipe,
    small_training,
)

FPS = Fraction(16)
HEARD, DRAWN = len(manner.HEARD), len(manner.DRAWN)
TOLD = HEARD + DRAWN


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    add_small_preset(monkeypatch)


# What is drawn


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_manner_is_a_function_of_seed_and_frame(seed: int, start: int, count: int, cut: int):
    whole = manner.manner(seed, range(start, start + count), FPS)
    at = min(cut, count - 1)
    assert torch.equal(whole[at:], manner.manner(seed, range(start + at, start + count), FPS))
    least, most = torch.tensor(manner.LIMITS).unbind(1)
    assert whole.shape == (count, TOLD) and (whole >= least).all() and (whole <= most).all()


def test_manner_moves_as_the_drawn_people_do():
    told = torch.stack([manner.manner(seed, range(16 * 120), FPS) for seed in range(12)])
    column = {name: told[..., i] for i, name in enumerate((*manner.HEARD, *manner.DRAWN))}
    for name in manner.DRAWN:
        assert 0.6 < float(column[name].std()) < 1.4 and abs(float(column[name].mean())) < 0.35
    shut = column["blink"] > 0.5
    assert 2 < float((shut[:, 1:] & ~shut[:, :-1]).sum()) / 24 < 8  # a minute
    assert all(not column[name].any() for name in ("open", "wide", "teeth", "brow"))
    assert float(column["gaze_x"][:, :25].abs().max()) < 1.2 < float(column["gaze_x"].abs().max())  # first at one
    assert float(column["head_x"].diff(dim=1).abs().max()) < 0.6  # a head does not jump


def test_a_second_seed_is_another_manner():
    one, other = (manner.manner(seed, range(64), FPS) for seed in (1, 2))
    assert not torch.equal(one, other)


def test_truth_is_told_in_the_units_of_what_is_drawn():
    pose = torch.zeros(5, len(POSE_COLUMNS))
    pose[:, POSE_COLUMNS.index("scale")] = 1.007
    pose[3, POSE_COLUMNS.index("open")] = 0.5
    told = encoded.true_readings(pose)
    assert told.shape == (2, 4, TOLD) and told[1, 2, 0] == 0.5 and told[1].sum(0)[0] == 0.5
    assert torch.allclose(told[..., -1], torch.ones(2, 4), atol=1e-3) and not told[..., 1:-1].any()


# What a projector does with it


def projector(**changes: object) -> AudioWindowProjector:
    torch.manual_seed(0)
    return AudioWindowProjector(replace(HEARING, limits=manner.LIMITS, **changes), nn)  # pyright: ignore


def test_what_is_drawn_is_added_to_what_is_heard_and_kept_within_limits():
    ears, tokens = projector(), torch.randn(2, 3, 16, 256)
    heard = ears.read(tokens.flatten(0, 1)).unflatten(0, (2, 3))
    assert heard.shape == (2, 3, 4, HEARD)
    drawn = torch.randn(2, 3, 4, TOLD)
    wanted = ears.lay_out(torch.cat([heard + drawn[..., :HEARD], drawn[..., HEARD:]], -1))
    assert torch.allclose(ears(tokens, drawn), wanted, atol=1e-6)
    assert torch.equal(ears(tokens), ears(tokens, torch.zeros(2, 3, 4, TOLD)))
    least, most = torch.tensor(manner.LIMITS).unbind(1)
    assert torch.equal(ears.lay_out(most.expand(1, 1, 4, -1)), ears.lay_out((most + 1).expand(1, 1, 4, -1)))
    assert torch.equal(ears.lay_out(least.expand(1, 1, 4, -1)), ears.lay_out((least - 1).expand(1, 1, 4, -1)))


def test_limits_are_those_of_every_reading():
    with pytest.raises(ValueError, match="2 limits of 6 readings"):
        replace(HEARING, limits=((0.0, 1.0), (0.0, 1.0)))


# The training


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A generator from before, that was never told what no sound tells, and has learnt for a few steps."""
    monkeypatch.setitem(MODELS, "small", replace(PRESET, audio=replace(HEARING, limits=())))
    state = small_training(tmp_path / "generator")
    state.out.mkdir()
    for _ in range(3):
        trainer.train_step(state)
    trainer.save(state)
    return state.out / "transformer.safetensors"


def begin(generator: Path, out: Path, **changes: object) -> acting.Training:
    plain = vars(small_recipe()) | {"learning_rate": 6e-3, "optimiser": "adamw", "drop_audio": 0.0, "told": True}
    return acting.begin(acting.Recipe(**(plain | changes)), out, (told_clips(),), generator)  # pyright: ignore


def told_clips() -> encoded.EncodedClips:
    """Clips whose latents do as the first reading says, which their sound does not tell."""
    data = random_clips(6)
    assert data.told is not None
    return replace(data, latents=data.latents + 2 * data.told[..., 0].mean(2)[..., None, None, None])


def test_places_for_what_is_drawn_change_nothing_at_first(generator: Path):
    model = load_model(generator).float()
    wider, told = rehearsal.to_be_told(model), 0.1 * torch.rand(1, 3, 4, HEARD)
    drawn = torch.cat([told, torch.randn(1, 3, 4, DRAWN)], -1)
    narrow = model.proj_model.norm(model.proj_model.proj(told.flatten(-2)).unflatten(-1, (2, -1)))  # pyright: ignore
    assert torch.allclose(wider.proj_model.lay_out(drawn), narrow, atol=1e-6)  # pyright: ignore
    assert rehearsal.to_be_told(wider) is wider


def test_it_learns_what_it_is_told(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path, doubt=0.0, rare=1.0)
    batch = state.batch()
    others = replace(batch, told=batch.told.roll(1, 0))  # pyright: ignore
    for _ in range(60):
        trainer.train_step(state)
    with torch.no_grad():
        right, wrong = (float(state.loss(b)) for b in (batch, others))
    assert right < 0.8 * wrong


def test_the_ears_stay_and_their_readings_may_be_laid_out_anew(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path)
    was = {name: p.detach().clone() for name, p in state.model.proj_model.named_parameters()}
    for _ in range(3):
        trainer.train_step(state)
    now = dict(state.model.proj_model.named_parameters())
    assert {name for name, p in was.items() if not torch.equal(p, now[name])} == {"proj.weight", "proj.bias"}


def test_doubt_is_in_usual_deviations(generator: Path, tmp_path: Path):
    sure, unsure = (begin(generator, tmp_path, doubt=doubt).batch().told for doubt in (0.0, 0.5))
    assert sure is not None and unsure is not None
    wrong = (unsure - sure).flatten(0, -2).std(0) / torch.tensor(manner.usual_deviations())
    assert (wrong > 0.35).all() and (wrong < 0.65).all()


def test_a_rehearsal_follows_from_picture_truth_and_seed(generator: Path):
    model, clips_, steps = rehearsal.to_be_told(load_model(generator)).float(), told_clips(), policy("joyavatar-flash")
    geometry = Geometry(64, 64, block_latents=3, spatial=16, patch=PRESET.patch)
    made = rehearsal.rehearse(model, steps, clips_, 1, geometry)
    assert made.shape == (30, 16, 4, 4) and torch.isfinite(made).all()
    assert torch.equal(made, rehearsal.rehearse(model, steps, clips_, 1, geometry))
    assert clips_.told is not None
    others = replace(clips_, told=clips_.told.roll(1, 0), audio=clips_.audio.roll(1, 0))
    assert not torch.equal(made, rehearsal.rehearse(model, steps, others, 1, geometry))
    unheard = replace(clips_, audio=torch.zeros_like(clips_.audio))
    assert torch.equal(made, rehearsal.rehearse(model, steps, unheard, 1, geometry))


def test_rehearsals_are_made_once_and_belong_to_their_clips(generator: Path, tmp_path: Path):
    store = rehearsal.RehearsalStore(tmp_path, generator, policy("joyavatar-flash"))
    with pytest.raises(ValueError, match="no rehearsals"):
        store.load((told_clips(),))
    model, geometry = rehearsal.to_be_told(load_model(generator)), Geometry(64, 64, spatial=16, patch=PRESET.patch)
    store.make(model, told_clips().select(slice(1, 3)), geometry)
    ages = {path: path.stat().st_mtime_ns for path in store.home.iterdir()}
    store.make(model, told_clips().select(slice(1, 4)), geometry)
    assert len(ages) == 2 and all(path.stat().st_mtime_ns == age for path, age in ages.items())
    (kept,) = store.load((told_clips(),))
    assert kept.seed.tolist() == [1, 2, 3] and kept.own is not None and kept.own.shape == kept.latents.shape
    close = kept.close_ups(torch.tensor([2]), 2, (1, 1), random.Random(0))
    assert close.own is not None and close.own.shape == close.latents.shape == (1, 30, 16, 2, 2)
    corners = [(y, x) for y in range(3) for x in range(3)]
    assert any(torch.equal(close.own[0], kept.own[2, ..., y : y + 2, x : x + 2]) for y, x in corners)


@pytest.mark.parametrize("odds", [0.0, 1.0])
def test_it_stands_on_rehearsals_and_learns_the_truth(generator: Path, tmp_path: Path, odds: float):
    data = told_clips()
    state = begin(generator, tmp_path, own=odds)
    state.data = (replace(data, own=data.latents + 1),)
    batch = state.batch()
    assert torch.allclose(batch.x0 - batch.true, torch.full_like(batch.true, odds), atol=2e-2)
    v = batches.predict(state.model, batch)
    wrong = (batches.clean(batch, v) - batch.true).square().mean(dim=1)
    recipe = state.recipe
    weights = batches.loss_weights(batch, recipe.mouth, recipe.eyes, recipe.past) * acting.rare_weights(
        batch, recipe.rare
    )
    assert torch.isclose(state.loss(batch), batches.weighted_mean(wrong, weights))


def test_closing_lips_and_falling_lids_count_more(generator: Path, tmp_path: Path):
    batch = begin(generator, tmp_path).batch()
    told = torch.full_like(batch.told, 0.3)  # pyright: ignore
    told[0, 0, 1, 0], told[0, 1, :, 0] = 0.0, 0.0  # lips that close for a frame; lips that rest
    told[0, 2, 3, manner.HEARD.index("blink")] = 0.9
    share = torch.zeros_like(batch.mouth)
    share[..., 2, 1] = 1.0
    batch = replace(batch, told=told, mouth=share, eyes=share.flip(-1))
    weights = acting.rare_weights(batch, 3.0)
    assert weights[0, 0, 2, 1] == 3 and weights[0, 2, 2, 2] == 3 and weights.sum() == weights.numel() + 4


def test_a_judge_has_its_say_of_the_window(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path)
    batch = state.batch()
    torch.manual_seed(0)
    judge = lips.LipLoss(lips.LipReader(16).eval().requires_grad_(False), 0.5, 3.0)
    plain = state.loss(batch)
    state.judge = judge
    said = state.loss(batch) - plain
    made = batches.clean(batch, batches.predict(state.model, batch))
    seen = judge.seen(batch.true, lips.Lips(batch.frames, batch.mouth))
    window = torch.ones(batch.frames.shape)
    window[:, : batch.layout.lead] = 0
    assert said > 0 and torch.isclose(said, judge(made, seen, window), atol=1e-5)
    assert judge(batch.true, seen, window) == 0


def test_new_clips_do_not_replace_rehearsals(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path)
    state.data = (replace(told_clips(), own=told_clips().latents),)
    before = state.data
    flow_matching.grow(state, None)  # pyright: ignore
    assert state.data is before


def test_clips_without_a_truth_are_refused(generator: Path, tmp_path: Path):
    recipe = acting.Recipe(**(vars(small_recipe()) | {"told": True}))
    state = acting.begin(recipe, tmp_path, (replace(random_clips(6), told=None),), generator)
    with pytest.raises(ValueError, match="no truth to tell"):
        state.batch()


def test_a_model_without_readings_is_refused(generator: Path):
    deaf = load_model(generator)
    deaf.config = replace(deaf.config, audio=None)
    with pytest.raises(ValueError, match="log-mel windows"):
        rehearsal.to_be_told(deaf)


def test_the_command(generator: Path, tmp_path: Path):
    folder = tmp_path / "clips"
    folder.mkdir()
    out, files = tmp_path / "out", ["--autoencoder", str(small_autoencoder(tmp_path / "autoencoder.safetensors"))]
    recipe = '{"model": "small", "held_out": 1, "tokens": 60}'
    options = ["--clips", str(drawn_clips(folder)), "--out", str(out), "--steps", "2", "--recipe", recipe]
    acting.main(["--initial", str(generator), "--rehearse", *files, *options])
    assert len(list(folder.glob("own-*/*"))) == 4
    assert {path.name for path in out.iterdir()} >= {"transformer.safetensors", "train.pt", "curve.jsonl"}
    assert load_model(out / "transformer.safetensors").config.audio.told == TOLD  # pyright: ignore


def test_rehearsals_of_the_first_clips_alone(generator: Path, tmp_path: Path):
    folder = tmp_path / "clips"
    folder.mkdir()
    files = ["--autoencoder", str(small_autoencoder(tmp_path / "autoencoder.safetensors"))]
    rehearsal.main(["--initial", str(generator), *files, "--clips", str(drawn_clips(folder)), "--count", "2"])
    made = sorted(folder.glob("own-*/*"))
    assert [path.name for path in made] == [path.name for path in sorted(folder.glob("clip_*"))[:2]]


def test_geometry_tells_the_frames_of_a_latent():
    geometry = Geometry(64, 64)
    assert [geometry.frames_told(i) for i in range(3)] == [(0,) * 4, (1, 2, 3, 4), (5, 6, 7, 8)]


def noise_for_truth(batch: batches.Batch, run: slice, crops: seen.Crops) -> torch.Tensor:
    latents = len(range(*run.indices(batch.layout.latents)))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(crops), 3, 4 * latents - 3, 32, 32, generator=generator)


def test_what_is_seen_of_the_window_counts(generator: Path, tmp_path: Path):
    state = begin(generator, tmp_path)
    batch, plain = state.batch(), []
    for weight in (0.0, 0.5):
        path = small_autoencoder(tmp_path / "autoencoder.safetensors")
        state.seen = replace(seen.load_seen_loss(path, weight, tmp_path), cells=2, truth=noise_for_truth)
        plain.append(float(state.loss(batch).detach()))
    made = batches.clean(batch, batches.predict(state.model, batch))
    wanted = float(state.seen.of_window(batch, made, state.draws()[1]).detach())  # pyright: ignore
    assert wanted > 0 and plain[1] - plain[0] == pytest.approx(wanted, rel=1e-3)
