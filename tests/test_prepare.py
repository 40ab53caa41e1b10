"""From a folder of videos to shards and back: what lands in a sample, what is left out, kills, full disks, readers."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from joyavatar_core.audio import SAMPLE_RATE, LogMel
from joyavatar_core.avatar import load_light_autoencoder
from joyavatar_core.cli import prepare as command
from joyavatar_core.training import clips
from joyavatar_core.training.encoded import encode_clip, encode_video
from joyavatar_core.training.prepare import jobs, video
from joyavatar_core.training.prepare.encode import Encoders
from joyavatar_core.training.prepare.report import Report, table
from joyavatar_core.training.prepare.run import Task, prepare
from joyavatar_core.training.prepare.settings import Content, VideoOptions, fingerprint
from joyavatar_core.training.prepare.sources import list_sources
from joyavatar_core.training.prepare.writer import ShardWriter
from joyavatar_core.training.shards import BatchStream, ShardIndex, members
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig

from .drawn_videos import FPS, KnownFaces, drawn_video, write_video
from .small_training import small_autoencoder

LATENTS = 3
FRAMES = 9
CONTENT = Content(width=64, height=64, latents=LATENTS)
OPTIONS = VideoOptions(min_face=20)


@dataclass
class Counted:
    """Progress for tests: keys as they are made; `stop` is called after so many."""

    keys: list[str] = field(default_factory=list)
    total: int = 0
    after: int = -1

    def planned(self, clips: int) -> None:
        self.total += clips

    def made(self, key: str) -> None:
        self.keys.append(key)
        if len(self.keys) == self.after:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Folder:
    """Videos, what the detector knows of them, and encoders for their clips."""

    path: Path
    known: KnownFaces
    encoders: Encoders
    autoencoder: Path

    def task(self, out: Path, **changes: Any) -> Task:
        video = replace(OPTIONS, **changes.pop("video", {}))
        sources = list_sources(self.path, "a calm speaker")
        task = Task(out, CONTENT, sources, video, self.known, shard_bytes=90_000, faces=command._read_face)
        return replace(task, **changes)


def encoders_of(weights: Path) -> Encoders:
    geometry = CONTENT.geometry(spatial=16)
    autoencoder = load_light_autoencoder(weights).requires_grad_(False)
    return Encoders(autoencoder, LogMel(geometry), geometry, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Six videos: two to use, and one each that is silent, has no sound, is no video, and breaks off."""
    path, known = tmp_path_factory.mktemp("videos"), KnownFaces()
    (path / "more").mkdir()
    drawn_video(path / "a talk.mp4", [21, 22], 24, known)
    drawn_video(path / "more" / "b.mp4", [23], 40, known)
    known.videos["more/b.mp4"] = known.videos.pop("b.mp4")
    for i in (20, 21):
        known.videos["more/b.mp4"][i] = known.videos["more/b.mp4"][i] * 2  # two people
    quiet = drawn_video(path / "quiet.mp4", [24], 20, known)[0]
    write_video(path / "quiet.mp4", quiet.video, np.zeros(20 * 1000, np.float32), SAMPLE_RATE)
    write_mute(path / "mute.mp4", quiet.video)
    (path / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (path / "a talk.txt").write_text("notes beside a video")
    np.save(path / "a talk.face.npy", np.arange(512, dtype=np.float32))
    weights = small_autoencoder(tmp_path_factory.mktemp("weights") / "autoencoder.safetensors")
    return Folder(path, known, encoders_of(weights), weights)


def write_mute(path: Path, frames: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def made(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, Counted]:
    out, progress = tmp_path_factory.mktemp("made"), Counted()
    report = prepare(folder.task(out), folder.encoders, progress, preview=out / "sheet.png")
    return out, report, progress


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}


# What is kept


def test_the_report_accounts_for_every_second(made: tuple[Path, Report, Counted]) -> None:
    out, report, progress = made
    videos = {v.name: v for v in report.videos}
    assert [v.name for v in report.videos] == ["a talk.mp4", "more/b.mp4", "mute.mp4", "noise.mp4", "quiet.mp4"]
    length = FRAMES / FPS
    for name, kept, refused, lost in (
        ("a talk.mp4", 4, {}, {"shorter than a clip": 12 / FPS}),  # 24 + 24 pictures, a cut between
        ("more/b.mp4", 3, {"silent": 1}, {"several faces": 3 / FPS, "shorter than a clip": 1 / FPS}),  # 19 + 18
    ):
        v = videos[name]
        assert v.kept == kept and v.refused == refused and v.lost == pytest.approx(lost, abs=1e-3)
        assert v.seconds == pytest.approx((kept + len(refused)) * length + sum(lost.values()), abs=2e-3)
    assert videos["mute.mp4"].error == "no sound track" and videos["noise.mp4"].error.startswith("not a video that can")
    assert videos["quiet.mp4"].refused == {"silent": 2}
    assert report.clips == 7 and progress.total == len(progress.keys) == 10
    assert json.loads((out / "report.json").read_text())["clips"] == 7
    said = table(report)
    assert "silent: 2 clip(s)" in said and "no sound track" in said and "7 clips, 0.1 minutes" in said
    assert (out / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sample_holds_what_its_facts_say(folder: Folder, made: tuple[Path, Report, Counted]) -> None:
    """The second clip of the first shot, made again here by hand: pictures, latents, sound and mask belong together."""
    index = ShardIndex([made[0]])
    sample = next(s for s in index.groups[0] if s.key.endswith("-0000009"))
    facts, tensors = sample.read_facts(), sample.read()
    assert facts["source"] == "a talk.mp4" and facts["start"] == 9 / FPS and facts["seconds"] == FRAMES / FPS
    assert facts["prompt"] == "notes beside a video" and facts["face"] == "file" and facts["content"] == CONTENT.hash
    x0, y0, x1, y1 = facts["crop"]
    path = folder.path / "a talk.mp4"
    pictures = list(video.pictures(path, video.probe(path), FPS))[9:18]
    frames = np.stack([jobs.resize(p[y0:y1, x0:x1], 64, 64) for p in pictures if p is not None])
    latents = encode_video(folder.encoders.autoencoder, clips_as_video(frames))  # pyright: ignore
    assert torch.equal(tensors["latents"], latents[0].transpose(0, 1).half())
    assert tensors["latents"].shape == (LATENTS, 16, 4, 4) and tensors["image"].shape[1:] == (16, 4, 4)
    assert tensors["audio"].shape == (LATENTS, 16, 256) and tensors["audio_valid"].all()
    whole = video.sound(path, video.probe(path).start, video.probe(path).start + 3)
    part = tensors["sound"].float() / 32767
    assert len(part) == round((FRAMES / FPS + 0.5) * SAMPLE_RATE)
    lag, start = 400, round(9 / FPS * SAMPLE_RATE)
    matches = [float(part[lag:-lag] @ torch.from_numpy(whole[start + k + lag : start + k + len(part) - lag]))
               for k in range(-lag, lag, 20)]  # fmt: skip
    assert abs(int(np.argmax(matches)) * 20 - lag) <= 20, "the sound lies at its pictures"
    assert torch.allclose(tensors["face"], torch.arange(512.0) / torch.arange(512.0).norm())
    mouth = tensors["mouth"].float()
    assert 0 < mouth.mean() < 0.4 and mouth[:, 2:].sum() > mouth[:, :2].sum(), "lips lie in the lower half"


def clips_as_video(frames: np.ndarray) -> torch.Tensor:
    from joyavatar_core.training.encoded import as_video

    return as_video(torch.from_numpy(frames))


def test_drawn_clips_are_those_of_the_trainers(folder: Folder, tmp_path: Path) -> None:
    task = Task(tmp_path / "out", CONTENT, drawn=range(5, 7))
    report = prepare(task, folder.encoders, Counted())
    assert report.clips == report.drawn == 2
    (encoded,) = ShardIndex([tmp_path / "out"]).load()
    clip = clips.read_clip(clips.write_clip(tmp_path, 6, FRAMES, (64, 64)))
    geometry = folder.encoders.geometry
    true = encode_clip(clip, folder.encoders.autoencoder, LogMel(geometry), geometry)  # pyright: ignore
    assert encoded.seed.tolist() == [5, 6]
    assert all(torch.equal(getattr(encoded, name)[1], tensor) for name, tensor in true.items())


def test_pictures_from_any_moment_are_the_same(folder: Folder) -> None:
    path = folder.path / "a talk.mp4"
    track = video.probe(path)
    every = [p for p in video.pictures(path, track, 25) if p is not None]
    assert len(every) == 75  # 48 pictures at 16 are 3 seconds
    for first in (1, 30, 60, 74):
        some = [p for p in video.pictures(path, track, 25, first) if p is not None]
        assert len(some) == len(every) - first and all(map(np.array_equal, some, every[first:]))
    small = next(video.pictures(path, track, 25, longest=64))
    assert small is not None and small.shape == (48, 64, 3)


def test_a_video_that_breaks_off_gives_what_it_has(folder: Folder, tmp_path: Path) -> None:
    whole = (folder.path / "more" / "b.mp4").read_bytes()
    import av

    with av.open(str(folder.path / "more" / "b.mp4")) as file, av.open(str(tmp_path / "cut.ts"), "w") as out:
        pairs = {s.index: out.add_stream_from_template(s) for s in file.streams}
        for packet in file.demux():
            if packet.dts is not None:
                packet.stream = pairs[packet.stream.index]
                out.mux(packet)
    data = (tmp_path / "cut.ts").read_bytes()
    assert len(data) > 5000 and len(whole) > 5000
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "cut.ts").write_bytes(data[: len(data) * 2 // 3])
    known = KnownFaces({"cut.ts": folder.known.videos["more/b.mp4"]})
    task = folder.task(tmp_path / "out", sources=list_sources(videos, ""), detector=known)
    report = prepare(task, folder.encoders, Counted())
    assert report.videos[0].kept >= 1 and 0.8 < report.videos[0].seconds < 2.4


# Interruptions


def test_workers_do_not_change_a_byte(folder: Folder, made: tuple[Path, Report, Counted], tmp_path: Path) -> None:
    prepare(folder.task(tmp_path, workers=1), folder.encoders, Counted())
    assert shards(tmp_path) == shards(made[0]) and len(shards(tmp_path)) >= 2


KILLED = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests import test_prepare as t
from joyavatar_core.training.prepare import run
from joyavatar_core.training.prepare.sources import list_sources
class Killed(t.Counted):
    def made(self, key):
        super().made(key)
        if len(self.keys) == 4:
            os._exit(9)
folder = t.Folder(Path(sys.argv[2]), None, t.encoders_of(Path(sys.argv[3])), None)
run.prepare(folder.task(Path(sys.argv[4])), folder.encoders, Killed())
"""


def test_a_kill_loses_the_shard_in_the_making_only(
    folder: Folder, made: tuple[Path, Report, Counted], tmp_path: Path
) -> None:
    """The plans are there (no detector is asked), the shards are made by a process that dies without a word."""
    out = tmp_path / "out"
    (out / "sources").mkdir(parents=True)
    for plan in (made[0] / "sources").glob("*.json"):
        facts = json.loads(plan.read_text())
        (out / "sources" / plan.name).write_text(json.dumps({**facts, "refused": {}}))
    root = str(Path(__file__).parent.parent)
    words = [sys.executable, "-c", KILLED, root, str(folder.path), str(folder.autoencoder), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # float32 rounds by the threads
    assert subprocess.run(words, cwd=root, env=environment).returncode == 9
    left = shards(out)
    finished = {name for name in left if name.endswith(".tar")}
    assert finished and any(name.endswith(".part") for name in left)
    progress = Counted()
    report = prepare(folder.task(out), folder.encoders, progress)
    done = sum(len(members(out / name)) for name in finished)
    assert shards(out) == shards(made[0]), "the same shards as without the kill"
    assert len(progress.keys) == 10 - done and report.clips == 7
    again = Counted()
    assert prepare(folder.task(out), folder.encoders, again).as_json() == report.as_json()
    assert again.keys == [] and again.total == 0
    prepare(folder.task(out), folder.encoders, again, preview=tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists(), "nothing was made, so there is nothing to show"


def test_stopping_by_hand_keeps_what_is_made(folder: Folder, tmp_path: Path) -> None:
    one = [source for source in list_sources(folder.path, "") if source.name == "more/b.mp4"]
    with pytest.raises(KeyboardInterrupt):
        prepare(folder.task(tmp_path, sources=one), folder.encoders, Counted(after=2))
    left = len(ShardIndex([tmp_path]))
    assert 1 <= left <= 2 and not list(tmp_path.glob("*.part"))
    progress = Counted()
    assert prepare(folder.task(tmp_path, sources=one), folder.encoders, progress).clips == 3
    assert len(progress.keys) == 2, "of the four, two were made or turned down before"


@pytest.mark.skipif(os.name != "posix", reason="file size limits stand for the full disk")
def test_a_full_disk_keeps_the_samples_before_it(tmp_path: Path) -> None:
    import resource

    tensors = {"x": torch.randn(2000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with ShardWriter(tmp_path, 1_000_000) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))
            with pytest.raises(OSError, match=r"shard-000000\.tar\.part cannot grow .* goes on from here"):
                for i in range(9):
                    writer.add(f"s{i}", tensors, {"i": i})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(members(tmp_path / "shard-000000.tar")) == ["s0", "s1"]
    assert ShardWriter(tmp_path, 1_000_000).keys == {"s0", "s1"}


def test_no_shard_is_begun_without_room_for_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="MB free, the next shard may take"), ShardWriter(tmp_path, 1 << 60) as writer:
        writer.add("a", {"x": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_other_settings_are_refused_by_name(folder: Folder, made: tuple[Path, Report, Counted], tmp_path: Path) -> None:
    out = made[0]
    wider = replace(CONTENT, width=96)
    with pytest.raises(ValueError, match="prepared with width 64, this run has 96"):
        prepare(folder.task(out, content=wider), folder.encoders, Counted())
    with pytest.raises(ValueError, match="prepared with min face 20, this run has 40"):
        prepare(folder.task(out, video={"min_face": 40}), folder.encoders, Counted())
    assert prepare(Task(out, CONTENT), folder.encoders, Counted()).clips == 7, "other sources may join"
    assert wider.hash != CONTENT.hash
    weights = tmp_path / "w"
    weights.write_bytes(b"a")
    first = fingerprint(weights)
    weights.write_bytes(b"b")
    assert fingerprint(weights) != first


def test_a_video_that_changed_is_refused(folder: Folder, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    data = (folder.path / "noise.mp4").read_bytes()
    (videos / "noise.mp4").write_bytes(data)
    task = folder.task(tmp_path / "out", sources=list_sources(videos, ""))
    assert prepare(task, folder.encoders, Counted()).clips == 0
    (videos / "noise.mp4").write_bytes(data + b"x")
    with pytest.raises(ValueError, match=r"noise\.mp4 had 10240 bytes when it was looked through, now 10241"):
        prepare(task, folder.encoders, Counted())


# Shards


def test_shards_are_plain_webdataset(made: tuple[Path, Report, Counted]) -> None:
    """Names as its readers split them: a key up to the first dot, the two parts of a sample side by side."""
    for path in made[0].glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        keys = [name.split(".", 1) for name in names]
        assert [suffix for _, suffix in keys] == ["safetensors", "json"] * (len(names) // 2)
        assert all(keys[i][0] == keys[i + 1][0] for i in range(0, len(keys), 2))
        assert path.stat().st_size <= 90_000 + 1024


def small_shards(out: Path, count: int, size: int = 4, text: bool = False) -> Path:
    """Samples of random numbers; the place of a sample is its seed."""
    shape = (2, 16, size, size)
    out.mkdir()
    with ShardWriter(out, 20_000) as writer:
        for i in range(count):
            tensors = {
                "seed": torch.tensor(i), "latents": torch.full(shape, float(i)).half(), "image": torch.zeros(shape),
                "audio": torch.zeros(2, 3, 4), "audio_valid": torch.ones(2, 3, dtype=torch.bool),
                "mouth": torch.zeros(2, size, size), "eyes": torch.zeros(2, size, size), "face": torch.zeros(512),
            }  # fmt: skip
            writer.add(f"s{i:03d}", tensors | ({"text": torch.ones(1 + i % 3, 5)} if text else {}), {})
    return out


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Two folders of two sizes: 11 and 5 samples."""
    home = tmp_path_factory.mktemp("shards")
    return ShardIndex([small_shards(home / "a", 11), small_shards(home / "b", 5, size=6)])


def steps(stream: BatchStream, first: int, count: int) -> list[tuple[str, ...]]:
    return [tuple(f"{s.group}{s.key}" for s in stream.samples_at(step)) for step in range(first, first + count)]


def test_an_epoch_sees_everything_and_ranks_share_it(index: ShardIndex) -> None:
    ranks = [BatchStream(index, batch=2, seed=3, rank=r, world=2) for r in range(2)]
    length = ranks[0].steps_per_epoch
    assert length == 3 + 2
    for epoch in range(2):
        seen = [steps(rank, epoch * length, length) for rank in ranks]
        for mine, yours in zip(*seen, strict=True):
            assert not set(mine) & set(yours) and len({key[0] for key in mine + yours}) == 1
        assert len({key for rank in seen for batch in rank for key in batch}) == 16
    assert steps(ranks[0], 0, length) != steps(ranks[0], length, length)
    assert steps(BatchStream(index, 2, seed=4, world=2), 0, length) != steps(ranks[0], 0, length)


def test_a_position_is_a_function_of_seed_and_step(index: ShardIndex) -> None:
    stream = BatchStream(index, batch=2, seed=5)
    wanted = steps(stream, 0, 20)
    assert steps(BatchStream(index, batch=2, seed=5), 13, 7) == wanted[13:]
    batches = BatchStream(index, batch=2, seed=5).from_step(13)
    assert [next(batches).keys for _ in range(3)] == [tuple(k[1:] for k in step) for step in wanted[13:16]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_do_not_change_the_order(index: ShardIndex, workers: int) -> None:
    stream = BatchStream(index, batch=2, seed=5, start=4)
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=None))
    got = [next(loader) for _ in range(5)]
    assert [b.keys for b in got] == [tuple(k[1:] for k in step) for step in steps(stream, 4, 5)]
    assert all(torch.equal(b.clips.latents[:, 0, 0, 0, 0].long(), b.clips.seed) for b in got)


def test_texts_of_a_batch_are_filled_with_zeros(tmp_path: Path) -> None:
    index = ShardIndex([small_shards(tmp_path / "a", 3, text=True)])
    batch = index.batch(index.groups[0])
    assert batch.text is not None and batch.text.sum(2).tolist() == [[5, 0, 0], [5, 5, 0], [5, 5, 5]]
    assert batch.negative is None and batch.clip_vision is None and batch.face.shape == (3, 512)


def test_damaged_shards_are_named(tmp_path: Path, index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="holds no samples: make some with joyavatar prepare"):
        ShardIndex([tmp_path])
    path = tmp_path / "shard-000000.tar"
    whole = (index.folders[0] / "shard-000000.tar").read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(OSError, match=r"shard-000000\.tar"):
        ShardIndex([tmp_path])
    path.write_bytes(whole[:512] + bytes(400) + whole[912:])
    with pytest.raises(OSError, match="the sample s000 is damaged"):
        ShardIndex([tmp_path]).groups[0][0].read()


# The command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return parser.parse_args(["prepare", *words])


def run(*words: str) -> int:
    args = parse(*words)
    return args.run(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to prepare"),
        (["V"], "--face-detector FILE or --points FILE"),
        (["V", "--face-detector", "a.onnx", "--points", "b.json"], "one of them"),
        (["--drawn", "1", "--fps", "25"], "16 frames a second"),
        (["--drawn", "1", "--fps", "24"], "16 or 25|16 frames"),
        (["--drawn", "1", "--latents", "0"], "at least 1 latent"),
        (["--drawn", "1", "--size", "100x100"], "multiple of 32"),
        (["--drawn", "1", "--workers", "-1"], "--workers -1 must be at least 0"),
        (["none", "--points", "b.json"], "no such folder"),
    ],
)
def test_wrong_options_say_so(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*words, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def points_file(folder: Folder, path: Path) -> Path:
    """What the detector knows, as a file by hand."""
    entries = {
        name: [
            {"seconds": (i + 0.5) / FPS, "box": f[0].box.tolist(), "points": f[0].points.tolist()}
            for i, f in enumerate(faces)
        ]
        for name, faces in folder.known.videos.items()
    }
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def full_size(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder prepared for a full-size model, with encoders of tiny widths in the published names."""
    from contextlib import redirect_stdout

    from .test_full_size import save_clip, save_umt5, save_wav2vec2

    home = tmp_path_factory.mktemp("full")
    save_wav2vec2(home / "wav2vec2")
    save_umt5(home / "umt5")
    save_clip(home / "clip")
    points = points_file(folder, home / "points.json")
    words = [str(folder.path), "--out", str(home / "out"), "--points", str(points), "--min-face", "20"]
    words += ["--size", "32x32", "--latents", "9", "--vae", str(folder.autoencoder), "--fps", "25"]
    words += ["--audio-encoder", str(home / "wav2vec2"), "--text-encoder", str(home / "umt5"), "--workers", "0"]
    words += ["--clip-vision", str(home / "clip"), "--prompt", "a calm speaker", "--negative-prompt", "calm", "--json"]
    said = io.StringIO()
    with redirect_stdout(said):
        assert run(*words, "--dtype", "float32", "--device", "cpu") == 0
    yield home / "out", json.loads(said.getvalue())


def test_the_command_makes_samples_for_full_size_models(full_size: tuple[Path, dict[str, Any]]) -> None:
    out, report = full_size
    index = ShardIndex([out])
    assert report["clips"] == len(index) == 3  # of 33 pictures at 25 a second
    batch = index.batch(index.groups[0][:3])
    assert batch.clips.latents.shape == (3, 9, 16, 2, 2) and batch.clips.audio.shape[::3] == (3, 64)
    assert batch.clip_vision is not None and batch.clip_vision.shape == (3, 5, 20)
    assert batch.text is not None and batch.text.shape == (3, 5, 12) and batch.text.isfinite().all()
    assert batch.negative is not None and batch.negative.shape == (2, 12)
    assert not batch.audio_valid.all() and (batch.audio_valid == batch.audio_valid[:1]).all()
    by_source = {s.read_facts()["source"]: s.read()["text"] for s in index.groups[0]}
    assert by_source.keys() == {"a talk.mp4", "more/b.mp4"}
    assert not torch.equal(by_source["a talk.mp4"], by_source["more/b.mp4"]), "NAME.txt goes before --prompt"


def test_the_vae_of_wan_in_pieces_gives_what_it_gives_at_once() -> None:
    config = WanVAEConfig(dim=4, multipliers=(1, 1, 1), blocks=1, halve_time=(True, True))
    torch.manual_seed(0)
    vae = WanVAE(config).eval().requires_grad_(False)
    geometry = replace(CONTENT, width=16, height=16).geometry(spatial=4)
    encoders = Encoders(vae, LogMel(geometry), geometry, torch.device("cpu"), torch.float32)
    frames = np.random.default_rng(0).integers(0, 255, (21, 16, 16, 3), np.uint8)
    boxes = np.tile(np.array([4, 4, 8, 8], np.float32), (21, 1))
    sound = np.zeros(30_000, np.float32)
    tensors = encoders.encode(jobs.Clip("a", 1, frames, sound, SAMPLE_RATE, boxes, boxes, None, {"prompt": ""}))
    whole = vae.encode(clips_as_video(frames))[0].transpose(0, 1)
    assert torch.allclose(tensors["latents"].float(), whole, atol=2e-3, rtol=2e-3)
    assert tensors["image"].shape == (vae.settled_latents, 16, 4, 4)
    assert tensors["mouth"][0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_facts_name_the_folder_they_belong_to(full_size: tuple[Path, dict[str, Any]]) -> None:
    facts = json.loads((full_size[0] / "dataset.json").read_text())
    assert facts["hash"] == Content(**facts["content"]).hash == full_size[1]["hash"]
    assert facts["content"]["audio"].endswith(" last") and facts["video"]["min_face"] == 20
