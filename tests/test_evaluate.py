"""The held-out suite and its command, on random weights: what is reported, not how good it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from joyavatar_core import checkpoint
from joyavatar_core.avatar import random_embedded
from joyavatar_core.cli.evaluate import table
from joyavatar_core.cli.main import build_parser, main
from joyavatar_core.measures import spans
from joyavatar_core.measures.mouth_reader import MouthReader
from joyavatar_core.policy import policy
from joyavatar_core.training import drawn_sounds, drawn_suite
from joyavatar_core.training.drawn import sample_clip
from joyavatar_core.training.drawn_suite import DRIFTS, FIRST_SEED, TARGETS, Figure, Report, Subject, Suite, Target
from joyavatar_core.training.speech import synthesize

SMALL = Suite(clips=2, seconds=2.0, long_seconds=4.0, compared=0.6, fit_clips=2, sizes=((64, 64), (64, 96)))


def subject() -> Subject:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    reader = MouthReader().requires_grad_(False).eval()
    return Subject(random_embedded(dtype=torch.float32), policy("joyavatar-flash"), reader)


@pytest.fixture(scope="module")
def report() -> Report:
    told: list[int] = []
    made = drawn_suite.run_suite(SMALL, subject(), False, lambda: told.append(1))
    assert len(told) == 3
    return made


def test_every_figure_is_there_with_interval_and_target(report: Report) -> None:
    conditional = {"silence.opening", "width.correlation", "speech.ratio"} | {f"drift.{n}_errors" for n in DRIFTS}
    assert set(TARGETS) <= set(report.figures) | conditional
    for name, figure in report.figures.items():
        assert np.isnan(figure.mean) or figure.low - 1e-9 <= figure.mean <= figure.high + 1e-9, name
        assert (figure.target is None) == (name not in TARGETS) == (figure.met is None)
    assert report.figures["sync.correlation"].n == 2 and report.figures["noise.level"].n == 1
    assert report.figures["sync.correlation"].met is False  # random weights do not speak
    margin = report.figures["sync.correlation"].mean - report.figures["sync.loudness_baseline"].mean
    assert report.figures["sync.margin"].mean == pytest.approx(margin)


def heard(still: bool) -> drawn_sounds.Heard:
    """Eight seconds of spoken or babbled sound, read perfectly; a still mouth is shut, round and without teeth."""
    speech = synthesize(FIRST_SEED, 8.0)
    truth = {n: np.asarray(getattr(speech, n), np.float64) for n in ("open", "wide", "teeth")}
    truth["blink"] = np.zeros(len(speech.open))
    made = {n: np.zeros(len(speech.open)) for n in truth} if still else truth
    return drawn_sounds.Heard(speech, truth, made, truth)


def test_sounds_of_a_perfect_mouth_and_of_a_still_one() -> None:
    perfect, still = ([heard(s)] * 2 for s in (False, True))
    best, worst = (drawn_sounds.mouth_of_sounds(clips, 0) for clips in (perfect, still))
    assert best["closures.rate"].mean == best["closures.on_truth"].mean > 0.9
    assert best["width.correlation"].mean == pytest.approx(1) and best["teeth.f1"].mean > 0.9
    assert best["teeth.f1"] == best["teeth.on_truth"] and best["teeth.always"].mean < 0.8
    assert worst["teeth.f1"].mean == 0 and worst["width.correlation"].mean == 0
    assert worst["closures.rate"].mean == worst["closures.chance"].mean == 1


def test_chance_of_a_closure_is_looked_for_in_speech_only() -> None:
    """In a pause lips are shut whatever the model does: a mouth that is shut there only has no closure by chance."""
    clip = heard(False)
    fps, frames = float(clip.speech.fps), len(clip.speech.open)
    pauses = spans.near(drawn_sounds.spans_of(clip.speech, "silence"), fps, frames, 1.5 / fps)
    made = {**clip.truth, "open": np.where(pauses, 0.0, 0.8)}
    assert pauses.any()
    found = drawn_sounds._closures([drawn_sounds.Heard(clip.speech, clip.true, made, clip.truth)] * 2)
    assert found["closures.chance"].mean < 0.2


def test_drift_is_judged_by_its_error(report: Report) -> None:
    long = [replace(report.clips[2], ends=dict.fromkeys(DRIFTS, (0.1, end))) for end in (0.11, 0.12, 0.13)]
    found = drawn_suite._drift(long)
    assert found["drift.colour_change"].mean == pytest.approx(0.02)
    assert found["drift.colour_errors"].mean == pytest.approx(0.02 / (0.01 / 3**0.5))
    assert "drift.colour_errors" not in drawn_suite._drift(long[:1])
    assert set(report.clips[2].ends) == set(DRIFTS) and len(report.clips[2].sheet[0]) == 10


def test_recorded_speech_is_spoken_too(report: Report) -> None:
    sound = 0.1 * np.random.default_rng(0).standard_normal(8000 * 5).astype(np.float32)
    short, clock = report.clips[:2], drawn_suite.Clock()
    found = drawn_suite._speech(
        drawn_suite._recorded([(sound, 8000)], SMALL, short, subject(), None, clock), SMALL, short
    )
    assert found["speech.on_recorded"].n == 2 and found["speech.on_truth"].n == 2
    assert found["speech.ratio"].mean == pytest.approx(found["speech.on_recorded"].mean / found["speech.on_truth"].mean)
    with pytest.raises(ValueError, match="as long as a clip"):
        drawn_suite._recorded([(sound[:9000], 8000)], SMALL, short, subject(), None, clock)


@pytest.mark.slow
def test_workers_share_the_clips_and_find_the_same(report: Report) -> None:
    sound = 0.1 * np.random.default_rng(0).standard_normal(8000 * 5).astype(np.float32)
    alone, shared = (
        drawn_suite.run_suite(SMALL, subject(), False, recorded=[(sound, 8000)], workers=workers) for workers in (0, 2)
    )
    for name, figure in alone.figures.items():
        if name.startswith(("autoencoder.", "seam.", "person.", "drift.", "noise.")):  # a random reader reads nothing
            assert shared.figures[name].mean == pytest.approx(figure.mean, rel=0.02, abs=1e-3, nan_ok=True), name
    assert [c["seed"] for c in shared.about["clips"]] == [c["seed"] for c in report.about["clips"]]


def test_seams_of_the_suite_are_those_of_its_blocks(report: Report) -> None:
    clip = report.clips[0]
    still = np.zeros((32, 64, 64, 3), np.uint8)
    made = still.copy()
    made[9:], made[21:] = 50, 100
    made[1::2] += 5
    result = replace(clip, values={})
    drawn_suite._measure_motion(result, made[::-1], made, subject())
    assert result.values["seam_made"] > 5 > 3 > result.values["seam_true"]


def test_a_face_that_smears_where_it_moves_is_told(report: Report) -> None:
    clip = report.clips[0]
    true = np.zeros((32, 64, 64, 3), np.uint8)
    for t in range(32):
        place = 16 + 4 * (t // 2 % 6)  # moves in every other frame
        true[t, 8:56, place : place + 4] = 200
    made = true.copy()
    made[2::2] = true[2::2] // 2 + true[1:-1:2] // 2  # a ghost where it has just been
    result = replace(clip, values={}, box=np.array([0, 0, 64, 64], np.float32))
    drawn_suite._measure_motion(result, true, made, subject())
    sharp = {name: result.values[f"{name}_made"] / result.values[f"{name}_true"] for name in ("sharp", "sharp_moving")}
    assert 0.6 < sharp["sharp_moving"] < sharp["sharp"] < 1
    figures = drawn_suite._sharpness([result, result])
    assert figures["face.sharpness"].mean == pytest.approx(sharp["sharp"])
    assert figures["face.sharpness_moving"].mean == pytest.approx(sharp["sharp_moving"])


def test_report_is_json_and_says_what_it_rests_on(report: Report) -> None:
    back = json.loads(json.dumps(report.as_json()))
    assert set(back["closures.rate"]) == {"mean", "low", "high", "n", "target", "met"}
    each = back["about"]["clips"]
    assert [clip["seed"] for clip in each] == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 100_000]
    assert back["sync.correlation"]["mean"] == pytest.approx((each[0]["sync"] + each[1]["sync"]) / 2, abs=1e-4)
    assert all(clip["face"] > 0 for clip in each) and "sync" not in each[2]
    assert set(back["about"]["time_share"]) >= {"draw", "autoencoder", "generate", "read", "baseline"}
    assert sum(back["about"]["time_share"].values()) <= 1.001
    lines = table(report).splitlines()
    assert any(line.startswith("sync.correlation") and line.endswith("MISSED") for line in lines)


def test_pictures_show_truth_above_what_was_made(report: Report, tmp_path: Path) -> None:
    sheet = drawn_suite.contact_sheet(report.clips, height=64)
    assert sheet.shape[0] == 64 * 6 and sheet.shape[1] == 10 * 96
    first = sample_clip(FIRST_SEED, SMALL.frames(SMALL.seconds), (64, 64), SMALL.fps).video[0]
    assert np.array_equal(sheet[:64, :64], first)
    files = drawn_suite.write_pictures(report, tmp_path / "new")
    assert [f.name for f in files] == ["sheet.png", "curves.png"] and all(f.stat().st_size > 1000 for f in files)


def test_the_autoencoders_own_frames_have_no_error() -> None:
    clip = sample_clip(FIRST_SEED, 9, (64, 64), 16)
    result = drawn_suite.ClipResult(0, 0, (64, 64), clip.speech, clip.video[0], clip.boxes[0, 2])
    result.truth = {name: np.array([getattr(p, name) for p in clip.poses]) for name in drawn_suite.QUANTITIES}
    drawn_suite._compare(result, clip, clip.video, clip.video ^ 1)
    closer = result.values.pop("psnr_mouth_closer")
    assert result.values == {"psnr_whole": 99, "psnr_face": 99, "psnr_mouth": 99} and 40 < closer < 50


def test_reconstruction_keeps_the_number_of_frames() -> None:
    avatar = random_embedded(dtype=torch.float32)
    video = sample_clip(1, 21, (64, 64), 16).video
    assert drawn_suite.reconstructed(avatar, video).shape == video.shape


def test_targets_are_met_within_their_limits_only() -> None:
    assert Target(least=0.5, most=1.5).met(0.5) and not Target(least=0.5, most=1.5).met(1.6)
    assert not Target(most=0.1).met(float("nan"))
    assert [str(t) for t in (Target(least=30), Target(most=0.08), Target(0, 1))] == [">= 30", "<= 0.08", "0 .. 1"]


def test_numbers_that_are_none_become_null() -> None:
    figure = Figure(float("nan"), float("nan"), 1.0, 2)
    assert Report({"x": figure}, {}, []).as_json()["x"]["mean"] is None


def test_babble_is_refused_with_the_remedy() -> None:
    speech = sample_clip(3, 8, (64, 64), 16).speech
    with pytest.raises(OSError, match="install it"):
        drawn_suite.check_speech(replace(speech, source="babble"))
    drawn_suite.check_speech(replace(speech, source="espeak-ng en-us+f3"))


@pytest.mark.parametrize(("clips", "seconds"), [(1, 12.0), (4, 1.0)])
def test_too_little_is_refused(clips: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="at least 2 clips"):
        Suite(clips=clips, seconds=seconds)


def test_command_reports_on_files_of_ones_own(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reader.safetensors"
    checkpoint.write(path, MouthReader().state_dict(), {})
    asked = []

    def fake(suite: Suite, *_: object, **__: object) -> Report:
        asked.append(suite)
        return report

    monkeypatch.setattr(drawn_suite, "run_suite", fake)
    words = ["evaluate", "--clips", "3", "--long-seconds", "0", "--reader", str(path), "--json"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "--clips 3 --seconds 12 --long-seconds 0" in printed["about"]["command"]
    assert set(printed["about"]["weights"]) == {"tiny.safetensors", "tiny-autoencoder.safetensors"}
    assert asked == [Suite(clips=3, long_clips=0, long_seconds=0)]
    assert main([*words, "--reader", str(tmp_path / "none.safetensors")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert main(["evaluate", "--clips", "1", "--reader", str(path)]) == 2
    assert build_parser().parse_args(["evaluate", "--quick"]).quick
