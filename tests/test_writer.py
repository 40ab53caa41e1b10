"""The output video: growth, end, cancelling, resuming, full disks. Frames are 64x64 and segments a few frames long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from joyavatar_core.media import MediaError
from joyavatar_core.media.writer import COMMENT, Layout, VideoWriter, part_path, resumable_frames

RATE = 16000
PER_FRAME = 1000
FLASHES = (8, 24)


def make_frames(start: int, stop: int) -> np.ndarray:
    """Stripes that move, and white frames at FLASHES."""
    ramp = (np.arange(64 * 64 * 3).reshape(64, 64, 3) // 60 % 180).astype(np.uint8)
    return np.stack([np.full_like(ramp, 255) if i in FLASHES else np.roll(ramp, 3 * i, 1) for i in range(start, stop)])


def make_sound(frames: int) -> np.ndarray:
    """A soft tone, and loud noise for as long as each of FLASHES is shown."""
    at = np.arange(frames * PER_FRAME)
    loud = np.isin(at // PER_FRAME, FLASHES)
    return np.where(loud, 0.5 * np.sin(at * 0.9), 0.05 * np.sin(at * 0.07)).astype(np.float32)[None]


OPTIONS = {
    "source_fps": Fraction(16),
    "audio_rate": RATE,
    "audio_channels": 1,
    "settings": {"seed": "7", "text": "größe 音"},
    "segment_frames": 12,
    "first_segment_frames": 9,
}


def feed(writer: VideoWriter, start: int, stop: int, sound: np.ndarray, ahead: int = 4000, step: int = 5) -> None:
    """Frames start to stop with the sound from its beginning, a little ahead of them."""
    heard = 0
    for at in range(start, stop, step):
        end = min(stop, at + step)
        upto = end * PER_FRAME + ahead
        writer.write_audio(sound[:, heard:upto])
        heard = upto
        writer.write(make_frames(at, end))
    writer.write_audio(sound[:, heard:])


def video_of(path: Path) -> tuple[list[Fraction], np.ndarray]:
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    times = [Fraction(frame.pts) * frame.time_base for frame in decoded]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])


def sound_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        decoded = list(container.decode(audio=0))
    assert decoded[0].pts == 0
    return np.concatenate([frame.to_ndarray() for frame in decoded], axis=1)


def metadata_of(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return dict(container.metadata)


def unbroken(path: Path, frames: int = 45, **options) -> Path:
    with VideoWriter(path, 64, 64, **{**OPTIONS, **options}) as writer:
        feed(writer, 0, frames, make_sound(frames))
    return path


def test_file_has_every_frame_all_the_sound_and_the_metadata(tmp_path):
    path = unbroken(tmp_path / "new folder" / "имя и 音 ü.mp4")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    times, frames = video_of(path)
    assert times == [Fraction(i, 16) for i in range(45)]
    error = np.abs(frames.astype(int) - make_frames(0, 45)).mean()
    assert error < 6, "colours must survive (bt709 both ways)"
    sound = sound_of(path)
    assert 0 <= sound.shape[1] - 45 * PER_FRAME < 1024
    assert np.abs(sound[:, : 45 * PER_FRAME] - make_sound(45)).mean() < 0.01
    tags = metadata_of(path)
    assert (tags["complete"], tags["ai_generated"], tags["comment"]) == ("true", "true", COMMENT)
    assert (tags["frames"], tags["source_frames"], tags["seed"]) == ("45", "45", "7")
    assert json.loads(tags["settings"]) == OPTIONS["settings"]
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.frames, video.average_rate, video.start_time, audio.start_time) == (45, 16, 0, 0)
        assert abs(float(audio.duration * audio.time_base) - 45 / 16) < 0.02
        assert video.codec_context.color_primaries == video.codec_context.color_trc == 1
        assert video.codec_context.colorspace == 1


def test_colours_are_true(tmp_path):
    """Y Cb Cr by Rec. ITU-R BT.709 (limited range), read from the planes: PyAV before 17 turns all back as BT.601."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 90)])
    with VideoWriter(tmp_path / "a.mp4", 64, 64, **OPTIONS) as writer:
        writer.write(np.broadcast_to(colours[:, None, None], (4, 64, 64, 3)).astype(np.uint8))
    red, green, blue = colours.T / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = np.stack(
        [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748], axis=1
    )
    with av.open(str(tmp_path / "a.mp4")) as container:
        got = [[bytes(plane)[0] for plane in frame.planes] for frame in container.decode(video=0)]
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize("fps", [24, 25, 30, Fraction(30000, 1001)])
def test_output_rates_repeat_frames_and_leave_time_and_sound_alone(tmp_path, fps):
    native = unbroken(tmp_path / "native.mp4")
    path = unbroken(tmp_path / "other.mp4", output_fps=Fraction(fps))
    times, frames = video_of(path)
    assert len(frames) == int(Fraction(45, 16) * fps + Fraction(1, 2))
    # the muxer's clock may be coarser than 1001/30000 s by less than a tick
    assert all(abs(time - j / Fraction(fps)) < Fraction(1, 10000) for j, time in enumerate(times))
    flashes = [time for time, frame in zip(times, frames, strict=True) if frame.mean() > 240]
    for flash in FLASHES:
        assert any(abs(time - Fraction(flash, 16)) <= Fraction(1, 2) / fps + Fraction(1, 10000) for time in flashes)
    assert np.array_equal(sound_of(path), sound_of(native))


@given(
    source=st.integers(1, 60),
    extra=st.fractions(0, 60, max_denominator=1001),
    frames=st.integers(0, 3000),
)
def test_source_frames_fill_rounded_time_and_each_output_shows_its_middle(source, extra, frames):
    rate = source + extra
    layout = Layout(2, 2, Fraction(source), rate, RATE, 1, 18, "veryfast", 12, 9)
    first, stop = layout.outputs(frames), layout.outputs(frames + 1)
    assert abs(first - frames * rate / source) <= Fraction(1, 2)
    for j in range(first, stop):
        assert frames < (j + Fraction(1, 2)) * source / rate <= frames + 1
    assert layout.end_of(layout.segments_in(frames)) <= frames < layout.end_of(layout.segments_in(frames) + 1)


def test_flash_and_click_stay_together(tmp_path):
    path = unbroken(tmp_path / "a.mp4")
    times, frames = video_of(path)
    flashes = [float(time) for time, frame in zip(times, frames, strict=True) if frame.mean() > 240]
    loud = np.abs(sound_of(path)[0]) > 0.2
    starts = [i / RATE for i in np.flatnonzero(loud) if not loud[max(0, i - 800) : i].any()]
    assert np.allclose(flashes, starts, atol=0.01)


def test_part_plays_at_every_length(tmp_path):
    """A kill can come at any byte: what lies before the last whole fragment must decode."""
    writer = VideoWriter(tmp_path / "a.mp4", 64, 64, **OPTIONS)
    lengths = []
    for at in range(0, 45, 3):
        writer.write_audio(make_sound(45)[:, at * PER_FRAME : (at + 3) * PER_FRAME])
        writer.write(make_frames(at, at + 3))
        lengths.append((writer.part.stat().st_size if writer.part.exists() else 0, writer.frames_safe))
    data = writer.part.read_bytes()
    writer.cancel()
    assert [safe for _, safe in lengths][-1] == 45 and lengths[0] == (0, 0)
    torn = tmp_path / "torn.part.mp4"
    for length in np.linspace(lengths[2][0], len(data), 25).astype(int):
        torn.write_bytes(data[:length])
        safe = max(frames for size, frames in lengths if size <= length)
        assert resumable_frames(tmp_path / "torn.mp4") == safe
        with av.open(str(torn)) as container:
            assert container.metadata["complete"] == "false"
            count = 0
            try:
                for _ in container.decode(video=0):
                    count += 1
            except av.error.InvalidDataError:
                pass  # the torn sample itself
        assert count >= safe


@pytest.mark.parametrize("fps", [16, 25])
@pytest.mark.parametrize("done, written", [(0, 30), (9, 20), (9, 9), (21, 45), (33, 44)])
def test_resumed_equals_unbroken(tmp_path, fps, done, written):
    options = {**OPTIONS, "output_fps": Fraction(fps)}
    whole = unbroken(tmp_path / "whole.mp4", **options)
    path = tmp_path / "a.mp4"
    broken = VideoWriter(path, 64, 64, **options)
    feed(broken, 0, written, make_sound(45)[:, : written * PER_FRAME])
    with part_path(path).open("ab") as file:  # the start of a fragment that was being written
        file.write(b"\0\0\4\0moof" + bytes(50))
    with VideoWriter.resume(path, 64, 64, frames_done=done, **options) as writer:
        assert writer.frames_written == writer.frames_safe == done
        feed(writer, done, 45, make_sound(45), ahead=700, step=7)
    assert np.array_equal(video_of(path)[1], video_of(whole)[1])
    assert video_of(path)[0] == video_of(whole)[0]
    assert np.array_equal(sound_of(path), sound_of(whole)), "no gap, no click: the very same sound"
    assert metadata_of(path) == metadata_of(whole)


KILLED = """
import sys
sys.path[:0] = {paths}
import test_writer as t
writer = t.VideoWriter(sys.argv[1], 64, 64, **t.OPTIONS)
t.feed(writer, 0, 33, t.make_sound(45), step=4)
print("ready", flush=True)
for at in range(33, 10**6):
    writer.write(t.make_frames(at, at + 1))
"""


def test_killed_process_is_resumed(tmp_path):
    whole = unbroken(tmp_path / "whole.mp4")
    path = tmp_path / "a.mp4"
    here = Path(__file__).parent
    script = textwrap.dedent(KILLED).format(paths=[str(here), str(here.parent)])
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    assert not path.exists()
    done = resumable_frames(path)
    assert done >= 33
    _, frames = video_of(part_path(path))
    assert len(frames) >= done
    with VideoWriter.resume(path, 64, 64, frames_done=21, **OPTIONS) as writer:
        feed(writer, 21, 45, make_sound(45))
    assert np.array_equal(video_of(path)[1], video_of(whole)[1])
    assert np.array_equal(sound_of(path), sound_of(whole))
    assert not part_path(path).exists()


def test_resume_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(MediaError, match="nothing to resume"):
        VideoWriter.resume(path, 64, 64, frames_done=9, **OPTIONS)
    assert resumable_frames(path) == 0
    writer = VideoWriter(path, 64, 64, **OPTIONS)
    feed(writer, 0, 22, make_sound(22))
    assert resumable_frames(path) == 21
    for done, change, words in [
        (12, {}, "not the end of a segment"),
        (33, {}, "holds 21 whole frames, not 33"),
        (9, {"crf": 30}, "begun with crf 18, not 30"),
    ]:
        with pytest.raises(MediaError, match=words):
            VideoWriter.resume(path, 64, 64, frames_done=done, **{**OPTIONS, **change})
    writer.cancel()
    part_path(path).write_bytes(b"something else" * 100)
    with pytest.raises(MediaError, match="not an unfinished video"):
        VideoWriter.resume(path, 64, 64, frames_done=9, **OPTIONS)


def test_an_error_leaves_a_part_that_plays_and_resumes(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(RuntimeError), VideoWriter(path, 64, 64, **OPTIONS) as writer:
        writer.write_audio(make_sound(45))
        writer.write(make_frames(0, 14))
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a.part.mp4"]
    assert len(video_of(part_path(path))[1]) == 9
    VideoWriter.resume(path, 64, 64, frames_done=9, **OPTIONS)


def test_ctrl_c_and_a_named_exception_cancel(tmp_path):
    for error in (InterruptedError, KeyboardInterrupt):
        path = tmp_path / "a.mp4"
        with pytest.raises(error), VideoWriter(path, 64, 64, **OPTIONS, cancelled_by=(error,)) as writer:
            writer.write_audio(make_sound(45))
            writer.write(make_frames(0, 14))
            raise error
        assert [file.name for file in tmp_path.iterdir()] == ["a.cancelled.mp4"]
        cancelled = tmp_path / "a.cancelled.mp4"
        assert len(video_of(cancelled)[1]) == 14
        assert metadata_of(cancelled)["complete"] == "false"
        assert abs(sound_of(cancelled).shape[1] - 14 * PER_FRAME) <= 1024


def test_write_that_is_broken_off_half_way_ends_at_the_last_segment(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 64, 64, **OPTIONS) as writer:
        writer.write_audio(make_sound(45))
        writer.write(make_frames(0, 14))

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(writer._segment, "encode", interrupted)
        writer.write(make_frames(14, 15))
    assert np.array_equal(video_of(tmp_path / "a.cancelled.mp4")[1], video_of(unbroken(path))[1][:9])


def test_without_frames_there_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 64, 64, **OPTIONS) as writer:
        writer.write_audio(make_sound(4))
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 64, 64, **OPTIONS):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_files_stay_until_they_are_replaced(tmp_path, caplog):
    path = unbroken(tmp_path / "a.mp4", frames=10)
    before = path.read_bytes()
    part_path(path).write_bytes(b"left by an earlier run")
    with VideoWriter(path, 64, 64, **OPTIONS) as writer:
        feed(writer, 0, 8, make_sound(8))
        assert part_path(path).read_bytes() == b"left by an earlier run"
        writer.write(make_frames(8, 20))
        assert "replaced" in caplog.text
        assert path.read_bytes() == before
    assert len(video_of(path)[1]) == 20


@pytest.mark.parametrize("sound", ["late", "none", "short", "long"])
def test_sound_need_not_be_in_step(tmp_path, sound):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 64, 64, **OPTIONS) as writer:
        writer.write(make_frames(0, 45))
        count = {"late": 45, "none": 0, "short": 5, "long": 60}[sound]
        writer.write_audio(make_sound(60)[:, : count * PER_FRAME])
    assert len(video_of(path)[1]) == 45
    if count:
        decoded = sound_of(path)
        assert 0 <= decoded.shape[1] - count * PER_FRAME < 1024
        assert np.abs(decoded[:, : count * PER_FRAME] - make_sound(60)[:, : count * PER_FRAME]).mean() < 0.01


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44100, 2), (96000, 6), (48000, 8), (192000, 2), (11000, 1)])
def test_rates_and_channels(tmp_path, rate, channels):
    time = np.arange(2 * rate) / rate
    sound = np.stack([0.3 * np.sin(2 * np.pi * 300 * time + k) for k in range(channels)]).astype(np.float32)
    sound[0, 5] = np.nan
    sound[0, 6] = np.inf
    options = {**OPTIONS, "audio_rate": rate, "audio_channels": channels}
    with VideoWriter(tmp_path / "a.mp4", 64, 64, **options) as writer:
        for part in np.array_split(sound, 7, axis=1):
            writer.write_audio(part)
        writer.write(make_frames(0, 32))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.layout.nb_channels == channels
        coded = stream.codec_context.sample_rate
        assert coded == (rate if rate in (8000, 44100, 48000, 96000) else 48000)
        samples = sum(frame.samples for frame in container.decode(stream))
    assert abs(samples - 2 * coded) < 1100


def test_bad_values_are_refused_before_any_work(tmp_path):
    cases = [
        (("a.mp4", 63, 64), {}, "even"),
        (("a.mp4", 0, 64), {}, "even"),
        (("a.mov", 64, 64), {}, "NAME.mp4"),
        (("a.mp4", 64, 64), {"output_fps": Fraction(8)}, "at least the source's 16"),
        (("a.mp4", 64, 64), {"audio_channels": 9}, "1 to 8"),
        (("a.mp4", 64, 64), {"audio_rate": 0}, "at least 1 Hz"),
        (("a.mp4", 64, 64), {"segment_frames": 1}, "at least 2"),
        (("a.mp4", 64, 64), {"preset": "speedy"}, "preset 'speedy' is unknown"),
        (("a.mp4", 64, 64), {"crf": 99}, "crf 99"),
        (("x" * 250 + ".mp4", 64, 64), {}, "cannot be written there"),
    ]
    for (name, width, height), change, words in cases:
        with pytest.raises(MediaError, match=words) as caught:
            VideoWriter(tmp_path / name, width, height, **{**OPTIONS, **change})
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match="cannot be written there"):
        VideoWriter(tmp_path / "file" / "a.mp4", 64, 64, **OPTIONS)
    with pytest.raises(MediaError, match="is a folder"):
        VideoWriter(tmp_path / "folder.mp4", 64, 64, **OPTIONS)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user that permissions bind")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MediaError, match="Permission denied"):
        VideoWriter(tmp_path / "a.mp4", 64, 64, **OPTIONS)
    tmp_path.chmod(0o700)


def test_wrong_arrays_are_refused_and_do_no_harm(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 64, 64, **OPTIONS) as writer:
        writer.write(make_frames(0, 10))
        for bad in (np.zeros((1, 64, 32, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32), make_frames(0, 1)[0]):
            with pytest.raises(ValueError, match="must be uint8"):
                writer.write(bad)
        with pytest.raises(ValueError, match=r"must be \[1, n\]"):
            writer.write_audio(np.zeros(100, np.float32))
    assert len(video_of(tmp_path / "a.mp4")[1]) == 10
    with pytest.raises(MediaError, match="finished already"):
        writer.write(make_frames(0, 1))


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = {paths}
import test_writer as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    with t.VideoWriter(sys.argv[1], 64, 64, **t.OPTIONS) as writer:
        t.feed(writer, 0, 45, t.make_sound(45))
except t.MediaError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits stand for the full disk")
@pytest.mark.parametrize("share, left", [(0.1, "nothing"), (0.6, "part"), ("part", "part")])
def test_full_disk_leaves_a_part_that_plays_and_can_be_resumed(tmp_path, share, left):
    whole = unbroken(tmp_path / "whole.mp4")
    path = tmp_path / "sub" / "a.mp4"
    here = Path(__file__).parent
    script = textwrap.dedent(FULL_DISK).format(paths=[str(here), str(here.parent)])
    # "part": the last write of all fails, that of the finished file, which also holds the frame counts
    limit = whole.stat().st_size - 200 if share == "part" else int(whole.stat().st_size * share)
    run = subprocess.run([sys.executable, "-c", script, str(path), str(limit)], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "make room" in run.stderr, run.stderr
    names = [file.name for file in path.parent.iterdir()]
    if left == "nothing":
        assert names == []
        return
    assert names == ["a.part.mp4"]
    done = resumable_frames(path)
    assert len(video_of(part_path(path))[1]) >= done > 0
    with VideoWriter.resume(path, 64, 64, frames_done=done, **OPTIONS) as writer:
        feed(writer, done, 45, make_sound(45))
    assert np.array_equal(video_of(path)[1], video_of(whole)[1])
