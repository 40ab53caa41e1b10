"""What is kept of a video and what is cut out of it: shots, faces, spans, crops, and files of points and detectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joyavatar_core.training import drawn
from joyavatar_core.training.prepare import track
from joyavatar_core.training.prepare.faces import Face, Moment, YuNet, read_points
from joyavatar_core.training.prepare.shots import ShotFilter
from joyavatar_core.training.prepare.track import Look

from .drawn_videos import five_points

VIDEO = (320, 240)


def face(x: float = 160, y: float = 120, height: float = 80) -> Face:
    """An upright face, its middle at (x, y)."""
    half = height / 2
    points = np.array([[-0.4, -0.2], [0.4, -0.2], [0, 0.15], [-0.3, 0.5], [0.3, 0.5]], np.float32) * half + (x, y)
    return Face(np.array([x - 0.75 * half, y - half, x + 0.75 * half, y + half], np.float32), points.astype(np.float32))


def row(*place: float) -> np.ndarray:
    found = track.judge(0, [face(*place)], 10_000, 10_000, 16).row
    assert found is not None
    return found


# Shots


def test_a_cut_is_found_and_motion_is_none() -> None:
    person = drawn.sample_clip(7, 12, (96, 128)).video
    other = drawn.sample_clip(8, 12, (96, 128)).video
    shots = ShotFilter(12.0)
    begins = [shots.begins(picture) for picture in (*person, *other, *person)]
    assert [i for i, begin in enumerate(begins) if begin] == [0, 12, 24]


def test_a_steady_pan_is_no_cut() -> None:
    """Every picture differs by far more than a cut needs: it is the change from what is usual that counts."""
    stripes = np.repeat((np.arange(400) // 20 % 2 * 255).astype(np.uint8)[None, :, None], 60, 0).repeat(3, 2)
    shots = ShotFilter(12.0)
    assert [shots.begins(stripes[:, 5 * i : 5 * i + 120]) for i in range(20)] == [True, True, *[False] * 18]


# Faces


@pytest.mark.parametrize(
    ("faces", "reason"),
    [
        ([], track.NO_FACE),
        ([face(100), face(220)], track.SEVERAL),
        ([face(height=50)], track.SMALL),
        ([face(y=20)], track.LEAVES),
        ([face(x=300)], track.LEAVES),
        ([face(100), face(220, height=20)], ""),
    ],
)
def test_one_face_large_enough_and_inside(faces: list[Face], reason: str) -> None:
    look = track.judge(3, faces, *VIDEO, min_face=60)
    assert look.reason == reason and (look.row is None) == bool(reason)


def test_faces_move_in_straight_lines_between_looks() -> None:
    looks = [Look(10, row(100, 100)), Look(14, row(104, 100)), Look(18, row(104, 120))]
    (span,), lost = track.spans(range(10, 22), looks, fps=16)
    assert (span.start, span.stop, sum(lost.values())) == (10, 22, 0)
    middles = (span.rows[:, :2] + span.rows[:, 2:4]) / 2
    assert np.allclose(middles[[1, 4, 6, 8, 11]], [[101, 100], [104, 100], [104, 110], [104, 120], [104, 120]])


def test_a_bad_look_takes_the_pictures_on_both_sides() -> None:
    looks = [Look(0, row()), Look(4, None, track.SEVERAL), Look(8, row()), Look(12, row())]
    found, lost = track.spans(range(16), looks, fps=16)
    assert [(s.start, s.stop) for s in found] == [(0, 1), (8, 16)] and lost == {track.SEVERAL: 7}


def test_a_face_lost_for_a_moment_is_bridged_and_a_jump_is_not() -> None:
    looks = [
        Look(0, row()),
        Look(2, None, track.NO_FACE),
        Look(4, row()),
        Look(6, row(260, 120)),
        Look(8, row(260, 120)),
    ]
    found, lost = track.spans(range(10), looks, fps=16)
    assert [(s.start, s.stop) for s in found] == [(0, 6), (6, 10)] and not lost
    longer = [Look(0, row()), Look(2, None, track.NO_FACE), Look(8, row())]
    assert track.spans(range(10), longer, fps=16)[1] == {track.NO_FACE: 7}


@given(st.lists(st.sampled_from(["ok", track.NO_FACE, track.SEVERAL]), min_size=1, max_size=30), st.integers(1, 4))
def test_every_picture_is_kept_or_has_a_reason(states: list[str], step: int) -> None:
    looks = [Look(i * step, row(), "") if s == "ok" else Look(i * step, None, s) for i, s in enumerate(states)]
    shot = range(len(states) * step + 2)
    found, lost = track.spans(shot, looks, fps=16)
    kept = [i for span in found for i in range(span.start, span.stop)]
    assert len(kept) == len(set(kept)) and len(kept) + sum(lost.values()) == len(shot)


def test_smoothing_keeps_the_way_and_takes_the_tremble() -> None:
    steady = np.linspace(row(100, 100), row(130, 100), 40)
    noise = np.random.default_rng(0).normal(0, 2, steady.shape)
    left = track.smoothed((steady + noise).astype(np.float32), fps=16) - steady
    assert np.abs(left).mean() < 0.55 * np.abs(noise).mean()
    assert np.abs(track.smoothed(steady.astype(np.float32), fps=16) - steady)[4:-4].max() < 1e-3


# Crops


@given(
    st.floats(60, 260), st.floats(50, 190), st.floats(30, 100), st.floats(0, 40), st.floats(0, 30),
    st.sampled_from([(256, 256), (192, 320), (320, 192)]),
)  # fmt: skip
def test_a_crop_holds_the_face_in_every_picture(x, y, height, right, down, size) -> None:
    rows = np.linspace(row(x, y, height), row(x + right, y + down, height), 20).astype(np.float32)
    rows[:, :4] = rows[:, :4].clip(0, np.tile(VIDEO, 2))
    crop = track.crop_of(rows, VIDEO, size, face_share=0.45)
    if crop is None:
        return
    x0, y0, x1, y1 = crop
    assert 0 <= x0 < x1 <= VIDEO[0] and 0 <= y0 < y1 <= VIDEO[1]
    assert abs((x1 - x0) / (y1 - y0) - size[0] / size[1]) < 2.5 / (y1 - y0)
    assert rows[:, 0].min() >= x0 - 1 and rows[:, 1].min() >= y0 - 1
    assert rows[:, 2].max() <= x1 + 1 and rows[:, 3].max() <= y1 + 1


def test_a_crop_has_the_face_in_its_share() -> None:
    rows = np.repeat(row(400, 300, 90)[None], 9, axis=0)
    x0, y0, x1, y1 = track.crop_of(rows, (1280, 720), (256, 256), face_share=0.45) or (0, 0, 0, 0)
    assert y1 - y0 == x1 - x0 == 200 and (x0 + x1) / 2 == 400 and y0 < 300 - 45 and abs(y0 - (300 - 92)) <= 1


def test_a_face_that_crosses_the_picture_fits_no_crop() -> None:
    rows = np.linspace(row(60, 120), row(260, 120), 20).astype(np.float32)
    assert track.crop_of(rows, VIDEO, (192, 320), face_share=0.45) is None


def test_boxes_of_lips_and_eyes_agree_with_the_drawing() -> None:
    """The drawing knows its own boxes; those worked out from five points cover most of them, and little else."""
    size = (256, 256)
    for seed in range(40, 52):
        avatar = drawn.Avatar.random(seed)
        if avatar.kind != "human":
            continue
        pose = drawn.Pose(open=0.6, head_x=0.05, roll=0.05)
        true = drawn.boxes(avatar, pose, size)
        points = five_points(avatar, pose, size)
        rows = np.concatenate([true[2], points.reshape(-1)])[None].astype(np.float32)
        for got, wanted in ((track.mouth_boxes(rows)[0], true[0]), (track.eye_boxes(rows)[0], true[1])):
            low, high = np.maximum(got[:2], wanted[:2]), np.minimum(got[2:], wanted[2:])
            common = (high - low).clip(0).prod()
            assert common > 0.55 * (wanted[2:] - wanted[:2]).prod(), (seed, got, wanted)
            assert common > 0.35 * (got[2:] - got[:2]).prod(), (seed, got, wanted)


# Files


def test_points_by_hand_move_between_their_times(tmp_path: Path) -> None:
    entry = {"box": [0, 0, 10, 20], "points": [[1, 2]] * 5}
    later = {"seconds": 2, "box": [10, 0, 20, 20], "points": [[11, 2]] * 5}
    path = tmp_path / "points.json"
    path.write_text(json.dumps({"a.mp4": [later, entry]}))
    detector, picture = read_points(path), np.zeros((4, 4, 3), np.uint8)
    boxes = [detector.detect(picture, Moment("a.mp4", s, 4, 4))[0].box.tolist() for s in (0, 0.5, 9)]
    assert boxes == [[0, 0, 10, 20], [2.5, 0, 12.5, 20], [10, 0, 20, 20]]
    assert detector.detect(picture, Moment("b.mp4", 0, 4, 4)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be an object"),
        ("{", "cannot be read"),
        ('{"a.mp4": [{"box": [1, 2, 3], "points": []}]}', "a.mp4 needs entries"),
        ('{"a.mp4": [{"points": []}]}', "KeyError: 'box'"),
        ('{"a.mp4": {"box": 1}}', "a.mp4 needs entries"),
    ],
)
def test_a_wrong_file_of_points_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_points(path)


def test_a_wrong_detector_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.onnx.*give YuNet"):
        YuNet(tmp_path / "missing.onnx").check()
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"this is no network" * 50)
    with pytest.raises(ValueError, match=r"wrong\.onnx.*give YuNet"):
        YuNet(wrong).check()
