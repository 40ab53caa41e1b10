"""The held-out suite and its command, on random weights: what is reported, not how good it is."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from joyavatar_core import checkpoint
from joyavatar_core.avatar import random_embedded
from joyavatar_core.cli.evaluate import table
from joyavatar_core.cli.main import build_parser, main
from joyavatar_core.measures import measure, spans
from joyavatar_core.measures.mouth_reader import MouthReader
from joyavatar_core.policy import policy
from joyavatar_core.training import drawn_sounds, drawn_suite
from joyavatar_core.training.drawn import sample_clip
from joyavatar_core.training.drawn_suite import DRIFTS, FIRST_SEED, TARGETS, Figure, Report, Subject, Suite, Target
from joyavatar_core.training.speech import synthesize

from .test_cli import write_sound
from .test_measures_videos import talking, write_plain, write_raw

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


# What can be known to be wrong before any work


def write_growing(path: Path) -> Path:
    """A video whose picture grows from 64 to 96 pixels on the way: its first frames can be read."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        larger = av.CodecContext.create("mpeg4", "w")
        larger.width, larger.height, larger.pix_fmt, larger.time_base = 96, 96, "yuv420p", Fraction(1, 10)
        packets = []
        for coder in (stream.codec_context, larger):
            frames = [
                av.VideoFrame.from_ndarray(np.ascontiguousarray(f), "rgb24") for f in talking(6, side=coder.width)
            ]
            packets += [packet for frame in (*frames, None) for packet in coder.encode(frame)]
        for moment, packet in enumerate(packets):
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, moment, moment, Fraction(1, 10)
            file.mux(packet)
    return path


def write_truth(folder: Path, kind: str) -> Path:
    """A folder of recorded clips with this wrong about it."""
    if kind != "missing":
        folder.mkdir()
    if kind not in ("missing", "empty"):
        write_plain(folder / "a.mp4", talking(12))
    if kind == "damaged":
        (folder / "b.mp4").write_text("not a video at all")
    elif kind == "one frame":
        write_plain(folder / "b.mp4", talking(1))
    elif kind == "grows":
        write_growing(folder / "b.avi")
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["truth: no such folder", "check the path"]),
        ("empty", ["truth: has no video (.avi, ", "put one there"]),
        ("damaged", ["truth: 1 of 2 files cannot be read (b.mp4)", "take them out", "not a video file"]),
        ("one frame", ["1 of 2 files cannot be read (b.mp4)", "1 frame could be read, at least 2 are needed"]),
        ("grows", ["1 of 2 files cannot be read (b.avi)", "changes its picture size on the way"]),
    ],
)
def test_truth_that_cannot_be_read_is_refused_before_a_video_is_measured(
    kind: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video, truth, measured, real = write_plain(tmp_path / "v.mp4", talking(12)), tmp_path / "truth", [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda *given: measured.append(given) or real(*given))
    assert main(["evaluate", str(video), "--truth", str(write_truth(truth, kind))]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("joyavatar: ") and not measured, said
    assert all(word in said[0] for word in words), said


def test_truth_that_can_be_read_is_measured_and_one_that_breaks_off_still_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, truth = write_plain(tmp_path / "v.mp4", talking(24)), write_truth(tmp_path / "truth", "good")
    whole = write_raw(tmp_path / "whole.mkv", talking(24)).read_bytes()
    (truth / "b.mkv").write_bytes(whole[: len(whole) * 3 // 4])
    assert main(["evaluate", str(video), "--truth", str(truth), "--block-frames", "9,12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seam.on_truth"]["n"] == 2


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A picture and a voice."""
    Image.fromarray(talking(1)[0]).save(folder / f"{name}.png")
    return folder / f"{name}.png", write_sound(folder / f"{name}.wav", 1.0)


def test_pairs_that_cannot_be_read_are_named_before_a_video_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    pairs.mkdir()
    (_, _), (picture, _), (_, voice) = (write_pair(pairs, name) for name in ("ann", "bob", "cid"))
    picture.write_bytes(picture.read_bytes()[:400])  # opens, and breaks off
    voice.write_text("not a sound at all")
    assert main(["evaluate", "--pairs", str(pairs), "--size", "64x64", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and not (out / "videos").exists(), said
    assert f"{pairs}: 2 of 6 files cannot be read (bob.png, cid.wav)" in said[0]
    assert "truncated or damaged" in said[0]
