"""Measures of finished videos that need no weights: known answers, files of ours and of others, the command."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from joyavatar_core.cli.evaluate_videos import pairs_in, table_1
from joyavatar_core.cli.main import main
from joyavatar_core.measures import curves, drift, plots, report, seams, spans, sync
from joyavatar_core.measures.face import STEADY, assumed_face, given_face, reader_error
from joyavatar_core.measures.measure import MEANINGS, Options, measure, spread
from joyavatar_core.measures.mouth_reader import MouthReader, load_mouth_reader
from joyavatar_core.measures.statistics import Interval
from joyavatar_core.measures.truth import measure_truth
from joyavatar_core.measures.video import Blocks, files_in, open_video, read_sound
from joyavatar_core.measures.weights import Weights
from joyavatar_core.media import MediaError
from joyavatar_core.media.writer import VideoWriter
from joyavatar_core.training.drawn import Avatar, Pose, render

from .test_cli import write_sound


@pytest.fixture(scope="module")
def reader() -> MouthReader:
    return load_mouth_reader()


def talking(frames: int, seed: int = 1, side: int = 64) -> np.ndarray:
    """A drawn face whose mouth opens and closes twice a second: [T, side, side, 3]."""
    poses = [Pose(open=0.4 + 0.4 * np.sin(t * np.pi / 4), head_x=0.02 * np.sin(t / 9)) for t in range(frames)]
    return render(Avatar.random(seed), poses, (side, side))[0]


def write_video(path: Path, frames: np.ndarray, sound: bool = True, output_fps: int | None = None) -> Path:
    """As `joyavatar generate` writes it: blocks of 9, then 12 frames, 16 a second."""
    height, width = frames.shape[1:3]
    options = {"segment_frames": 12, "first_segment_frames": 9, "settings": {"seed": "1"}}
    rates = {"source_fps": 16, "audio_rate": 16000, "audio_channels": 1}
    rate = Fraction(output_fps) if output_fps else None
    with VideoWriter(path, width, height, output_fps=rate, **rates, **options) as video:
        video.write(frames)
        if sound:
            t = np.arange(len(frames) * 1000) / 16000
            loud = 0.3 + 0.3 * np.sin(t * 16 * np.pi / 4)
            video.write_audio((loud * np.sin(2 * np.pi * 300 * t)).astype(np.float32)[None])
    return path


def write_plain(path: Path, frames: np.ndarray, fps: int = 10) -> Path:
    """A silent video of another program."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("ours") / "one.mp4", talking(48))


# Curves with known answers


def test_a_seam_is_measured_against_the_other_frames() -> None:
    change = np.ones(45)
    change[[9, 21, 33]] = 3.0
    places = Blocks(9, 12).seams(45)
    assert places.tolist() == [9, 21, 33]
    assert seams.jump(change, places) == Interval(3.0, 3.0, 3.0, 3)
    assert seams.jump(change, places + 1).mean == pytest.approx(1 / (1 + 2 * 3 / 41))
    with pytest.raises(ValueError, match="no seam"):
        seams.jump(np.ones(9), Blocks(9, 12).seams(9))
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1:] = 8
    assert seams.change(frames).tolist() == [0, 8, 0]


def test_blocks_are_written_as_n_or_first_and_n() -> None:
    assert Blocks.parse("12") == Blocks(9, 12) and Blocks.parse("16,12") == Blocks(16, 12)
    for wrong in ("x", "1,2,3", "4", "-12", ""):
        with pytest.raises(ValueError):
            Blocks.parse(wrong)


def test_slopes_windows_and_changes() -> None:
    minutes = np.arange(0, 2, 1 / 960)  # two minutes at 16 a second
    found = drift.slope(3 * minutes + 1, minutes)
    assert found.mean == pytest.approx(3) and found.n == 24
    assert found.low == pytest.approx(3) and found.high == pytest.approx(3)
    assert drift.windows(minutes, 120) == pytest.approx((0.25, 1.75), abs=1e-3)
    assert drift.windows(np.array([0.0, 1.0]), 1.0) == (0.0, 1.0)
    steps = np.array([0.1, -0.1, 0.12, -0.08])
    still, moved = drift.change(np.zeros(4), steps), drift.change(np.zeros(4), steps + 1)
    assert still.standard_errors == pytest.approx(0.01 / (steps.std(ddof=1) / 2)) and still.standard_errors < 2
    assert moved.standard_errors > 10 and moved.change.mean == pytest.approx(1.01)
    assert np.isnan(drift.change([0.0], [1.0]).standard_errors)


def test_a_late_mouth_is_found_and_other_times_are_chance() -> None:
    sound = np.abs(np.random.default_rng(0).standard_normal(400))
    found = sync.relation(np.roll(sound, 3) + 0.01, sound, 16)
    assert found.correlation == pytest.approx(1, abs=0.02) and found.lag == pytest.approx(3 / 16)
    assert abs(found.chance) < 0.25
    assert np.isnan(sync.relation(sound[:40], sound[:40], 16).chance)
    with pytest.raises(ValueError, match="too short"):
        sync.relation(sound[:9], sound[:9], 16)
    loud = sync.envelope(np.r_[np.ones(1000), np.zeros(1000)], 1000, 10, 20)
    assert loud[:10] == pytest.approx(1) and loud[10:] == pytest.approx(1e-3)


def test_sounds_are_looked_at_where_they_are() -> None:
    assert spans.near([(0.5, 0.7)], 10, 10, 0.0).nonzero()[0].tolist() == [5, 6]
    assert spans.near([(0.5, 0.7)], 10, 10, 0.1).nonzero()[0].tolist() == [4, 5, 6, 7]
    curve = np.zeros(10)
    curve[7] = 0.9
    assert spans.largest(curve, [(0.5, 0.7), (0.1, 0.2)], 10).tolist() == [0.9, 0.0]
    assert spans.outside([(0.0, 0.1), (0.4, 0.6), (0.9, 1.0)], [(0.5, 0.9)]) == [(0.0, 0.1), (0.9, 1.0)]
    truth, rows = np.arange(20.0), np.ones(20, bool)
    assert spans.correlation_near(np.roll(truth, 2), truth, rows, 2) == pytest.approx(1)
    assert np.isnan(spans.correlation_near(truth, truth, rows[:5], 0))
    yes, no = [np.array([True, True, False])], [np.array([True, False])]
    assert spans.f1(yes, no).mean == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_colour_and_sharpness_follow_the_picture() -> None:
    grey = np.full((8, 32, 32, 3), 100, np.uint8)
    grey[4:] = 160
    noisy = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    face = assumed_face(32, 32)
    flat, sharp = (curves.trace([v[:3], v[3:]], 4.0, face, None) for v in (grey, noisy))
    assert flat.frames == 8 and flat.seconds == 2 and flat.change.tolist() == [0, 0, 0, 0, 60, 0, 0, 0]
    assert flat.mouth_change[4] == 60
    assert flat.lab[0, 0] == pytest.approx(42.4, abs=0.2) and flat.lab[-1, 0] == pytest.approx(65.8, abs=0.2)
    assert flat.sharpness.max() == 0 and sharp.sharpness.min() > 50
    same = curves.trace([grey], 4.0, face, grey[0])
    assert same.colours[0] == pytest.approx(0) and same.colours[-1] == pytest.approx(1)


# The face


def test_the_reader_is_believed_on_drawn_faces_only(reader: MouthReader) -> None:
    drawn = talking(3, side=128)
    assert reader_error(reader, drawn) < STEADY
    noise = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    assert reader_error(reader, noise) > STEADY
    assert reader_error(reader, drawn[:, :16, :16]) == float("inf")


def test_a_face_may_be_given() -> None:
    face = given_face("10,20,50,100")
    assert face.centre == (30, 60) and face.size == 40 and face.mouth[1] > 60 and face.mouth[3] < 100
    for wrong in ("1,2,3", "a,b,c,d", "5,5,5,9"):
        with pytest.raises(ValueError, match="--face"):
            given_face(wrong)


# Files


def test_our_files_tell_their_blocks_and_repeated_frames_count_once(tmp_path: Path) -> None:
    frames = talking(24)
    plain = open_video(write_video(tmp_path / "a.mp4", frames))
    faster = open_video(write_video(tmp_path / "b.mp4", frames, output_fps=25))
    assert plain.blocks == faster.blocks == Blocks(9, 12) and plain.fps == faster.fps == 16
    read, again = (np.concatenate(list(video.pieces())) for video in (plain, faster))
    assert read.shape == again.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4 and np.abs(again.astype(int) - frames).mean() < 4
    assert np.array_equal(plain.at([0, 5, 23]), read[[0, 5, 23]])
    assert [len(piece) for piece in plain.pieces(5)] == [5]


def test_other_files_are_read_too(tmp_path: Path) -> None:
    video = open_video(write_plain(tmp_path / "p.mp4", talking(40)))
    assert video.fps == 10 and video.blocks is None and video.layout is None
    assert [len(piece) for piece in video.pieces()] == [32, 8]
    with pytest.raises(MediaError, match="no audio track"):
        read_sound(video.path)


def test_a_folder_gives_its_finished_videos(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MP4", "c.part.mp4", "d.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in files_in(tmp_path, frozenset({".mp4"}), "video")] == ["a.MP4", "b.mp4"]


@pytest.mark.parametrize("kind", ["missing", "sound", "text", "empty", "one frame", "empty folder", "cut"])
def test_bad_input_is_one_plain_sentence(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v.mp4"
    if kind == "sound":
        path = write_sound(tmp_path / "v.wav", 0.5)
    elif kind == "text":
        path.write_text("not a video at all")
    elif kind == "empty":
        path.touch()
    elif kind == "one frame":
        write_plain(path, talking(1))
    elif kind == "cut":
        path.write_bytes(write_plain(tmp_path / "w.mp4", talking(20)).read_bytes()[:900])
    elif kind == "empty folder":
        path.mkdir()
    assert main(["evaluate", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"joyavatar: {path}: "), said


# A whole report


def test_one_video_is_measured_without_any_weights(ours: Path, reader: MouthReader) -> None:
    found = measure(open_video(ours), Options(reader))
    values = {name: value.mean for name, value in found.values.items()}
    assert values["length.frames"] == 0 and found.values["seam.jump"].n == 4
    assert values["identity.layout"] < 0.2 and values["mouth.reader_error"] > 0
    assert set(found.missing) >= {"IDC", "Sync-C", "Sync-D", "Q_score", "Q_face"}
    assert set(values) | set(found.missing) <= set(MEANINGS)
    assert len(found.shown) == 32 and spread(3, 32) == [0, 1, 2]


def test_a_reference_of_another_size_is_fitted_and_another_person_is_farther(ours: Path, reader: MouthReader) -> None:
    own, other = talking(1, side=96)[0], talking(1, seed=5, side=96)[0]
    near, far = (measure(open_video(ours), Options(reader), picture) for picture in (own, other))
    for name in ("identity.layout", "identity.colours"):
        assert near.values[name].mean < 0.6 * far.values[name].mean, name


def test_without_sound_the_mouth_is_not_measured_and_a_sound_may_be_given(tmp_path: Path, reader: MouthReader) -> None:
    video = open_video(write_plain(tmp_path / "p.mp4", talking(20)))
    silent = measure(video, Options(reader, blocks=Blocks(9, 12)))
    assert "length.frames" not in silent.values and "give --audio" in silent.missing["mouth.motion"]
    assert silent.values["seam.jump"].n == 1
    heard = measure(video, Options(reader), audio=write_sound(tmp_path / "s.wav", 1.5))
    assert heard.values["length.frames"].mean == 5 and "mouth.motion" in heard.values
    assert "--block-frames" in heard.missing["seam.jump"]


def test_truth_is_coded_as_the_video_was(ours: Path, tmp_path: Path) -> None:
    """Else the coder's own jump at its groups of pictures would be counted against the model."""
    made = open_video(ours)
    own = measure(made, Options(load_mouth_reader())).values["seam.jump"].mean
    raw = seams.jump(seams.change(talking(48)), Blocks(9, 12).seams(48)).mean
    lossless = open_video(write_raw(tmp_path / "raw.mkv", talking(48)))
    coded, uncoded = (measure_truth([lossless], Blocks(9, 12), layout, Weights()) for layout in (made.layout, None))
    assert uncoded.seam[0] == pytest.approx(raw, rel=0.02)
    assert coded.seam[0] == pytest.approx(own, rel=0.02) and own > 1.1 * raw
    assert measure_truth([made], Blocks(9, 12), made.layout, Weights()).seam == [pytest.approx(own)]
    figures = report.collect([measure(made, Options(load_mouth_reader()))], coded).figures
    assert figures["seam.ratio"].mean == pytest.approx(1, rel=0.02)


def write_raw(path: Path, frames: np.ndarray) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode(None))
    return path


def test_the_command_measures_a_folder_and_draws(
    tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(ours.read_bytes())
    write_video(folder / "b.mp4", talking(36, seed=2))
    (folder / "c.mp4").write_text("broken")
    assert main(["evaluate", str(folder), "--out", str(out), "--json", "--truth", str(ours.parent)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["seam.jump"]["n"] == 2 and printed["seam.jump"]["low"] < printed["seam.jump"]["high"]
    assert printed["seam.ratio"]["n"] == 2 and [Path(v["path"]).name for v in printed["videos"]] == ["a.mp4", "b.mp4"]
    assert "not a video" in printed["left_out"]["c.mp4"]
    assert "inception" in printed["not_computed"]["FID"] and "dinov2" in printed["not_computed"]["IDC"]
    assert set(printed["about"]["meanings"]) <= set(MEANINGS)
    sheet = np.asarray(Image.open(out / "sheet.png"))
    assert sheet.shape == (256, 1280, 3)
    assert {p.name for p in out.glob("curves_*.png")} == {"curves_a.png", "curves_b.png"}
    assert np.asarray(Image.open(out / "curves_a.png")).std() > 5


def test_videos_of_one_stem_keep_their_own_plots(reader: MouthReader, ours: Path, tmp_path: Path) -> None:
    one = measure(open_video(ours), Options(reader))
    other = measure(open_video(write_plain(tmp_path / "one.mkv", talking(20))), Options(reader))
    assert plots._names([one, other]) == ["one_mp4", "one_mkv"]


def test_a_folder_beside_must_have_the_same_names(ours: Path, tmp_path: Path, capsys) -> None:
    write_sound(tmp_path / "other.wav", 1.0)
    assert main(["evaluate", str(ours), "--audio", str(tmp_path)]) == 2
    assert "has no file named one" in capsys.readouterr().err
    assert main(["evaluate", str(ours), "--pairs", str(tmp_path)]) == 2
    assert "not both" in capsys.readouterr().err


# Pairs


def test_pairs_are_made_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    pairs.mkdir()
    for name in ("ann", "bob"):
        Image.fromarray(talking(1)[0]).save(pairs / f"{name}.png")
        write_sound(pairs / f"{name}.wav", 1.5)
    words = ["evaluate", "--pairs", str(pairs), "--size", "64x64", "--out", str(out)]
    assert main([*words, "--generate=--fps 25"]) == 0
    said = capsys.readouterr().out
    assert "| Sync-C | Sync-D | IDC | Q_score | Q_face | FPS |" in said
    printed = json.loads((out / "report.json").read_text())
    assert printed["FPS"]["n"] == 2 and printed["FPS"]["mean"] > 0 and printed["length.frames"]["mean"] == 0
    assert sorted(p.name for p in (out / "videos").iterdir()) == ["ann.mp4", "bob.mp4"]
    with av.open(str(out / "videos" / "ann.mp4")) as file:
        assert file.streams.video[0].average_rate == 25


def test_a_picture_without_a_voice_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "a.wav", "b.png"):
        (tmp_path / name).touch()
    with pytest.raises(MediaError, match="b has no voice"):
        pairs_in(tmp_path)
    (tmp_path / "b.png").unlink()
    assert [(p.name, v.name) for p, v in pairs_in(tmp_path)] == [("a.png", "a.wav")]


def test_table_1_has_the_papers_columns() -> None:
    value = Interval(5.254, 5, 6, 9)
    head, _, row = table_1({"Sync-C": value, "FPS": value})
    assert head.count("|") == row.count("|") == 7 and row.startswith("| 5.25 | not computed |")
