"""Close-ups: which faces are taken closer, what the model gets, and how its frames become the video."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import wavfile

from joyavatar_core import samples
from joyavatar_core.avatar import random_embedded
from joyavatar_core.cli import together
from joyavatar_core.cli.main import main
from joyavatar_core.config import MODELS
from joyavatar_core.geometry import Geometry
from joyavatar_core.measures.face import Face
from joyavatar_core.media.paste import Paste, PastingSink, Region
from joyavatar_core.media.picture import fit_picture, read_picture
from joyavatar_core.policy import policy
from joyavatar_core.view import CLOSER, FACE_SHARE, find_face, needs_close_ups, region_about, view_for, view_of

SQUARE, WIDE = Geometry(256, 256, spatial=16, patch=(2, 2)), Geometry(320, 192, spatial=16, patch=(2, 2))


def sample(size: int) -> np.ndarray:
    """A picture of the package, [size, size, 3]."""
    return fit_picture(read_picture(samples.picture(samples.DEFAULT)), size, size)


def small_face(side: int = 120, x: int = 150, y: int = 60) -> np.ndarray:
    """The same person small in a grey landscape [192, 320, 3], the picture's corner at (x, y)."""
    scene = np.full((192, 320, 3), 140, np.uint8)
    scene[y : y + side, x : x + side] = sample(side)
    return scene


@settings(deadline=None, max_examples=200)
@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(1, 400), st.integers(32, 900), st.integers(32, 900), st.integers(0, 2)
)
def test_regions_lie_inside_hold_their_shape_and_bring_the_face_nearer(
    x: float, y: float, size: float, width: int, height: int, shape: int
):
    model = ((256, 256), (320, 192), (192, 320))[shape]
    face = Face((x * width, y * height), size, "read", 0.0)
    region = region_about(face, (width, height), model)
    if region is None:
        return
    assert region.x >= 0 and region.y >= 0
    assert region.x + region.width <= width and region.y + region.height <= height
    assert abs(region.width - region.height * model[0] / model[1]) <= 1 + model[0] / model[1] / 2
    assert region.width * region.height * CLOSER**2 <= width * height
    assert 2 * size / FACE_SHARE * CLOSER <= model[1] + 1


def test_a_small_face_is_found_and_fills_the_model_s_picture():
    scene = small_face()
    view = view_of(scene, WIDE, SQUARE)
    assert view.paste is not None and view.geometry is SQUARE and view.size == (320, 192)
    assert view.picture.shape == (256, 256, 3)
    before, after = find_face(scene), find_face(view.picture)
    assert before is not None and after is not None
    assert 150 < before.centre[0] < 270 and 60 < before.centre[1] < 180
    assert after.size > CLOSER * before.size
    assert abs(after.centre[0] - 128) < 20 and abs(after.centre[1] - 128) < 40


def test_large_faces_and_pictures_without_one_are_made_whole():
    for picture in (sample(192), np.full((192, 320, 3), 90, np.uint8), np.zeros((8, 8, 3), np.uint8)):
        view = view_of(picture, WIDE, SQUARE)
        assert view.paste is None and view.geometry is WIDE and view.picture.shape == (192, 320, 3)
    noise = np.random.default_rng(0).integers(0, 256, (192, 320, 3), np.uint8)
    assert find_face(noise) is None


def test_no_close_up_where_none_is_wanted_or_needed():
    avatar, steps = random_embedded(), policy("joyavatar-flash")
    assert view_for(avatar, steps, small_face(), (320, 192)).paste is not None
    assert view_for(avatar, steps, small_face(), (320, 192), close_up=False).paste is None
    assert needs_close_ups(MODELS["tiny"]) and not needs_close_ups(replace(MODELS["tiny"], image_dim=1280))


def test_a_picture_with_more_pixels_gives_a_finer_close_up():
    """Taken from the picture itself, not from the video's frame."""
    scene = np.repeat(np.repeat(small_face(), 4, axis=0), 4, axis=1)
    scene[240:720, 600:1080] = sample(480)
    fine, coarse = (view_of(picture, WIDE, SQUARE).picture for picture in (scene, small_face()))

    def edges(picture: np.ndarray) -> float:
        return float(np.abs(np.diff(picture[64:192, 64:192].astype(int), n=2, axis=1)).mean())

    assert edges(fine) > 1.1 * edges(coarse)


def test_frames_are_laid_back_and_the_rest_stands_still():
    scene = small_face()
    view = view_of(scene, WIDE, SQUARE)
    assert view.paste is not None
    region = view.paste.region
    made = view.finished(np.stack([view.picture, np.full_like(view.picture, 255)]))
    assert made.shape == (2, 192, 320, 3)
    outside = np.ones((192, 320), bool)
    outside[region.y : region.y + region.height, region.x : region.x + region.width] = False
    assert (made[:, outside] == scene[outside]).all()
    assert np.abs(made[0].astype(int) - scene).mean() < 4  # the picture itself comes back as it was, but for resizing
    middle = (region.y + region.height // 2, region.x + region.width // 2)
    assert (made[1][middle] == 255).all()


def test_frames_are_taken_as_the_picture_was():
    scene = small_face()
    near, whole = view_of(scene, WIDE, SQUARE), view_of(scene, WIDE)
    taken = near.taken(np.stack([scene, np.zeros_like(scene)]))
    assert taken.shape == (2, 256, 256, 3) and not taken[1].any()
    assert np.abs(taken[0].astype(int) - near.picture).mean() < 4  # which was cut from a finer picture
    assert whole.taken(taken) is taken


def test_sinks_get_finished_frames_and_all_the_sound():
    class Kept:
        def __init__(self) -> None:
            self.frames: list[np.ndarray] = []
            self.samples: list[np.ndarray] = []

        def write(self, frames: np.ndarray) -> None:
            self.frames.append(frames)

        def write_audio(self, samples: np.ndarray) -> None:
            self.samples.append(samples)

    kept, view = Kept(), view_of(small_face(), WIDE, SQUARE)
    sink = view.into(kept)
    assert isinstance(sink, PastingSink)
    sink.write(view.picture[None])
    sink.write_audio(np.zeros((1, 7), np.float32))
    assert kept.frames[0].shape == (1, 192, 320, 3) and kept.samples[0].shape == (1, 7)
    assert view_of(sample(192), WIDE).into(kept) is kept


def test_a_region_of_the_video_is_the_same_region_of_a_picture_that_fills_it():
    assert Region(16, 32, 64, 64).inside(Region(10, 20, 640, 384), (320, 192)) == Region(42, 84, 128, 128)
    whole = Region(0, 0, 320, 192).inside(Region(3, 5, 333, 201), (320, 192))
    assert whole == Region(3, 5, 333, 201)
    Paste(np.zeros((210, 340, 3), np.uint8), whole, 0.1)


def test_videos_of_one_size_are_made_together():
    wide, square = (argparse.Namespace(geometry=g) for g in (WIDE, SQUARE))
    geometries = [v.geometry for v in (wide, square, wide, wide)]
    assert list(together._batches(geometries, 2)) == [[0, 2], [3], [1]]
    assert list(together._batches([SQUARE] * 3, 3)) == [[0, 1, 2]]


@pytest.mark.parametrize("text", ("auto", "never"))
def test_the_command_line_makes_what_it_says(text: str, tmp_path: Path):
    """A video of the size asked for either way; with a close-up what is far from the face never moves."""
    Image.fromarray(small_face()).save(tmp_path / "scene.png")
    wavfile.write(tmp_path / "voice.wav", 16000, np.random.default_rng(0).normal(0, 0.1, 14000).astype(np.float32))
    words = ["generate", "--image", str(tmp_path / "scene.png"), "--audio", str(tmp_path / "voice.wav")]
    words += ["--size", "320x192", "--close-up", text, "--output", str(tmp_path / "a.mp4")]
    assert main(words) == 0
    with av.open(str(tmp_path / "a.mp4")) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        tags = " ".join(file.metadata.values())
    assert frames.shape == (14, 192, 320, 3) and ("close_up" in tags) == (text == "auto")
    if text == "auto":
        assert np.abs(frames[:, :40, :40].astype(int) - frames[0, :40, :40]).max() <= 6
