"""The command line, end to end: real files in, a real file out; bad input ends in one clear line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from joyavatar_core.cli import generate as generate_command
from joyavatar_core.cli.main import main
from joyavatar_core.generate import Progress, _Saver
from joyavatar_core.policy import POLICIES
from joyavatar_core.stream import StreamState


def write_sound(path: Path, seconds: float, rate: int = 16000, channels: int = 1) -> Path:
    """A wav file of a warbling tone, 16 bit."""
    import wave

    t = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 220 * t) * (np.sin(2 * np.pi * 3 * t) > 0)
    data = np.repeat((tone * 32767).astype("<i2")[:, None], channels, axis=1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data.tobytes())
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[0:90, 0:70]
    rgb = np.stack([rows * 2, columns * 3, (rows + columns) % 255], axis=-1).astype(np.uint8)
    path = tmp_path / "a picture.png"
    Image.fromarray(rgb).save(path)
    return path


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def words(picture: Path, sound: Path | str, output: Path, *more: str) -> list[str]:
    return [
        "generate",
        "--image",
        str(picture),
        "--audio",
        str(sound),
        "--output",
        str(output),
        "--size",
        "64x64",
        *more,
    ]


@pytest.mark.parametrize("policy", ["rolling-forcing", "avatarforcing", "live-avatar"])
def test_demo_rolls_out_as_it_is_told(picture: Path, tmp_path: Path, policy: str) -> None:
    sound = write_sound(tmp_path / "s.wav", 2.3)
    given = ["--image", str(picture), "--audio", str(sound), "--size", "64x64", "--policy", policy]
    assert main(["demo", "--out", str(tmp_path), *given]) == 0
    out = tmp_path / "avatar.mp4"
    with av.open(str(out)) as file:
        rolled = json.loads(json.loads(file.metadata["settings"])["policy"])
    assert rolled == json.loads(json.dumps(asdict(POLICIES[policy])))
    assert frames_of(out).shape == (37, 64, 64, 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_schedule_says_what_every_policy_costs(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--blocks", "20", "--policy", policy]) == 0
    said = capsys.readouterr().out
    *_, last, memory = said.splitlines()
    assert "cost at " in said and memory.startswith("  K/V: ")
    assert last.split(":")[0].endswith(str(POLICIES[policy].num_windows(20)))


def test_picture_and_voice_to_file(picture: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "s.wav", 2.3, rate=44100, channels=2)
    out = tmp_path / "new folder" / "ünïcode видео.mp4"
    report = tmp_path / "report.json"
    assert main(words(picture, sound, out, "--json", str(report), "--seed", "5")) == 0
    with av.open(str(out)) as file:
        assert {s.type for s in file.streams} == {"video", "audio"}
        meta = file.metadata
        assert abs(file.duration / 1e6 - 2.3) < 0.1
    assert meta["complete"] == "true" and meta["seed"] == "5" and "AI-generated" in meta["comment"]
    assert json.loads(meta["settings"])["size"] == "64x64"
    assert frames_of(out).shape == (37, 64, 64, 3)
    figures = json.loads(report.read_text())
    assert figures["frames"] == 37 and figures["blocks"] == 4 and figures["end_to_end_fps"] > 0
    assert not list(out.parent.glob("*.part.mp4")) and not list(out.parent.glob("*.state*"))


def test_one_seed_two_runs_are_bit_identical(picture: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "s.wav", 2.0)
    outs = [tmp_path / f"{i}.mp4" for i in range(3)]
    for out, seed in zip(outs, ("3", "3", "4"), strict=True):
        assert main(words(picture, sound, out, "--seed", seed)) == 0
    first, second, other = (frames_of(o) for o in outs)
    assert np.array_equal(first, second) and not np.array_equal(first, other)


@pytest.mark.parametrize(("fps", "frames"), [("24", 48), ("25", 50), ("30", 60)])
def test_output_frame_rates(picture: Path, tmp_path: Path, fps: str, frames: int) -> None:
    sound = write_sound(tmp_path / "s.wav", 2.0)
    assert main(words(picture, sound, tmp_path / "o.mp4", "--fps", fps)) == 0
    assert len(frames_of(tmp_path / "o.mp4")) == frames


@pytest.mark.parametrize(
    "more",
    [
        ["--no-psb"],
        ["--no-mci"],
        ["--policy", "self-forcing"],
        ["--rope-limit", "60"],
        ["--local-blocks", "6", "--sink-blocks", "2"],
        ["--kv-level", "clean"],
    ],
)
def test_rollout_options_run(picture: Path, tmp_path: Path, more: list[str]) -> None:
    sound = write_sound(tmp_path / "s.wav", 1.0)
    assert main(words(picture, sound, tmp_path / "o.mp4", *more)) == 0
    assert len(frames_of(tmp_path / "o.mp4")) == 16


def test_pcm_on_standard_input_reports_live_latency(picture: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "o.mp4", tmp_path / "r.json"
    pcm = (np.sin(np.arange(16000 * 5) / 20) * 9000).astype("<i2").tobytes()
    command = [sys.executable, "-m", "joyavatar_core.cli.main", *words(picture, "-", out, "--json", str(report))]
    done = subprocess.run(command, input=pcm, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(frames_of(out)) == 80
    figures = json.loads(report.read_text())
    assert 0 < figures["live_latency_median_s"] <= figures["live_latency_max_s"]


def _start(picture: Path, sound: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "joyavatar_core.cli.main", *words(picture, sound, out, *more)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _wait_for(path: Path, size: int, process: subprocess.Popen) -> None:
    for _ in range(2400):
        if (path.exists() and path.stat().st_size > size) or process.poll() is not None:
            return
        time.sleep(0.025)
    raise AssertionError(f"{path} did not grow")


def kill_and_resume(picture: Path, sound: Path, out: Path, whole: np.ndarray, delay: float) -> int:
    """SIGKILL a run some time after its first saved state, resume it, compare frames; returns blocks at the kill."""
    process = _start(picture, sound, out, "--checkpoint-blocks", "1")
    _wait_for(out.with_suffix(".state.safetensors"), 0, process)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = out.with_suffix(".part.mp4")
    if out.exists():  # it was through already
        assert np.array_equal(frames_of(out), whole)
        out.unlink()
        return -1
    survivors = frames_of(part)  # what the kill left plays
    assert np.array_equal(survivors, whole[: len(survivors)])
    other = write_sound(out.with_name("other.wav"), 41.0, rate=8000)
    for wrong in ([sound, "--seed", "99"], [other]):  # another run is refused, and nothing is lost by asking
        assert main(words(picture, wrong[0], out, "--resume", *wrong[1:])) == 2
    assert main(words(picture, sound, out, "--checkpoint-blocks", "1", "--resume")) == 0
    assert np.array_equal(frames_of(out), whole)
    out.unlink()
    return len(survivors)


def test_killed_and_resumed_gives_the_same_frames(picture: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "s.wav", 20.0)
    assert main(words(picture, sound, tmp_path / "whole.mp4")) == 0
    whole = frames_of(tmp_path / "whole.mp4")
    assert kill_and_resume(picture, sound, tmp_path / "killed.mp4", whole, 0.05) > 0


@pytest.mark.slow
def test_killed_twenty_times_at_random_blocks(picture: Path, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "s.wav", 40.0)
    assert main(words(picture, sound, tmp_path / "whole.mp4")) == 0
    whole = frames_of(tmp_path / "whole.mp4")
    rng = np.random.default_rng(0)
    counts = [kill_and_resume(picture, sound, tmp_path / "k.mp4", whole, rng.uniform(0, 2.0)) for _ in range(20)]
    assert len(set(counts)) > 5 and sum(c > 0 for c in counts) >= 15, counts


def test_interrupt_finishes_the_file(picture: Path, tmp_path: Path) -> None:
    sound, out = write_sound(tmp_path / "s.wav", 300.0), tmp_path / "o.mp4"
    process = _start(picture, sound, out)
    _wait_for(tmp_path / "o.part.mp4", 5000, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "cancelled" in said and "Traceback" not in said
    cancelled = tmp_path / "o.cancelled.mp4"
    with av.open(str(cancelled)) as file:
        assert file.metadata["complete"] == "false"
    assert len(frames_of(cancelled)) > 8 and not out.exists()


def test_resume_of_nothing_is_refused(picture: Path, tmp_path: Path, capsys) -> None:
    sound, out = write_sound(tmp_path / "s.wav", 1.0), tmp_path / "o.mp4"
    assert main(words(picture, sound, out, "--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(words(picture, "-", out, "--resume")) == 2
    assert "needs an audio file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--size", "100x64"], "100x64"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--rope-limit", "5"], "rope_limit 5"),
        (["--seed", "-1"], "seed -1"),
        (["--model", "missing.safetensors"], "missing.safetensors"),
        (["--image", "missing.png"], "missing.png"),
        (["--audio", "missing.wav"], "missing.wav"),
        (["--pcm", "x", "--audio", "-"], "RATE:CHANNELS:FORMAT"),
        (["--threads", "-1"], "--threads -1"),
        (["--checkpoint-blocks", "-3"], "--checkpoint-blocks -3"),
        (["--fps", "12"], "output_fps 12"),
    ],
)
def test_bad_options_end_in_one_line(picture: Path, tmp_path: Path, capsys, more: list[str], word: str) -> None:
    sound = write_sound(tmp_path / "s.wav", 0.5)
    assert main(words(picture, sound, tmp_path / "o.mp4", *more)) == 2
    said = capsys.readouterr().err.strip()
    assert word in said and "\n" not in said.split("joyavatar: ")[-1]
    assert not list(tmp_path.glob("o.*"))


def test_empty_and_broken_files(picture: Path, tmp_path: Path, capsys) -> None:
    empty_sound = write_sound(tmp_path / "empty.wav", 0)
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:100])
    sound = write_sound(tmp_path / "s.wav", 0.5)
    for image, audio in ((picture, empty_sound), (broken, sound), (sound, sound), (picture, picture)):
        assert main(words(image, audio, tmp_path / "o.mp4")) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not list(tmp_path.glob("o.*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(picture: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    sound = write_sound(tmp_path / "s.wav", 0.5)
    assert main(words(picture, sound, folder / "o.mp4")) == 2
    assert "locked" in capsys.readouterr().err


def test_schedule_command(capsys) -> None:
    assert main(["schedule", "--blocks", "6"]) == 0
    said = capsys.readouterr().out
    assert "steps per block: 8, 7, 6, 5, 4, 4" in said and "-> B1 clean" in said
    assert main(["schedule", "--policy", "self-forcing", "--blocks", "2"]) == 0


def test_doctor_says_ready(capsys) -> None:
    assert main(["doctor"]) == 0
    assert "ready" in capsys.readouterr().out


def test_bench_ends_in_json(capsys) -> None:
    assert main(["bench", "--blocks", "8", "--size", "64x64", "--random", "--baseline", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    keys = {"dit_fps", "decode_fps", "end_to_end_fps", "first_frame_s", "peak_rss_mb", "baseline_end_to_end_fps"}
    assert keys <= figures.keys() and all(figures[k] > 0 for k in keys)


class StopError(Exception):
    """A run that dies at a chosen block."""


@pytest.mark.parametrize("block", [1, 3, 8])
def test_an_error_at_any_block_leaves_a_run_that_resumes(
    picture: Path, tmp_path: Path, monkeypatch, block: int
) -> None:
    """Also at the last block, which is not in the file before the end and so must not be in the state."""
    sound, out = write_sound(tmp_path / "s.wav", 5.5), tmp_path / "o.mp4"
    more = ("--checkpoint-blocks", "1")
    assert main(words(picture, sound, tmp_path / "whole.mp4")) == 0
    show = generate_command._show

    def die(bar: object, progress: Progress, expected: int | None) -> None:
        show(bar, progress, expected)
        if progress.blocks == block:
            raise StopError

    monkeypatch.setattr(_Saver, "SHARE", 0.0)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(generate_command, "_show", die)
        main(words(picture, sound, out, *more))
    assert {p.name for p in tmp_path.glob("o.*")} == {"o.part.mp4", "o.state.safetensors"}
    assert main(words(picture, sound, out, "--resume", *more)) == 0
    assert np.array_equal(frames_of(out), frames_of(tmp_path / "whole.mp4"))
    assert {p.name for p in tmp_path.glob("o.*")} == {"o.mp4"}


def test_a_state_that_cannot_be_saved_does_not_end_the_run(picture: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    def refuse(self: StreamState, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(StreamState, "save", refuse)
    sound = write_sound(tmp_path / "s.wav", 4.0)
    assert main(words(picture, sound, tmp_path / "o.mp4", "--checkpoint-blocks", "1")) == 0
    assert "cannot be resumed" in caplog.text and len(frames_of(tmp_path / "o.mp4")) == 64
