"""Pictures and voices of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from joyavatar_core import samples
from joyavatar_core.cli.main import main
from joyavatar_core.media.sound import SoundFile
from joyavatar_core.training import samples as maker
from joyavatar_core.training.espeak import installed


def test_names_lead_to_files_and_the_recipe_has_them_all():
    assert set(samples.pictures()) == set(maker.PICTURES) and samples.pictures()[0] == samples.DEFAULT
    assert set(samples.voices()) == set(maker.VOICES) and samples.voices()[0] == samples.DEFAULT
    assert samples.picture("mine/portrait.png") == Path("mine/portrait.png")
    assert all(samples.picture(name).is_file() for name in samples.pictures())
    assert (samples.FOLDER / "LICENSE.md").is_file()


@pytest.mark.parametrize("name", sorted(maker.PICTURES))
def test_pictures_are_what_the_recipe_draws(name: str):
    stored = np.asarray(Image.open(samples.picture(name)).convert("RGB")).astype(int)
    drawn = maker.picture(maker.PICTURES[name]).astype(int)
    assert stored.shape == drawn.shape and np.abs(stored - drawn).mean() < 1


@pytest.mark.parametrize("name", sorted(maker.VOICES))
def test_voices_speak_for_some_seconds(name: str):
    sound = SoundFile(samples.voice(name))
    audio = np.concatenate([piece.reshape(-1) for piece in sound])
    assert 3 < len(audio) / sound.sample_rate < 20 and 0.3 < np.abs(audio).max() <= 1


@pytest.mark.skipif(not installed(), reason="espeak-ng is not on this machine")
def test_a_voice_is_spoken_anew(tmp_path: Path):
    audio, rate = maker.speech(maker.VOICES["german"])
    maker.write_voice(tmp_path / "german.ogg", audio, rate)
    again = np.concatenate([piece.reshape(-1) for piece in SoundFile(tmp_path / "german.ogg")])
    assert abs(len(again) - len(audio)) < rate / 10 and np.abs(audio).max() == pytest.approx(0.7, abs=0.01)


def test_the_list_names_them(capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--list"]) == 0
    said = capsys.readouterr().out
    assert "pictures: demo" in said and "german" in said
