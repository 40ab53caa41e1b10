"""Several processes make one video: bit for bit in a pipeline, within rounding with shared tokens; one lost ends it."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from joyavatar_core import samples
from joyavatar_core.cli import several
from joyavatar_core.cli.main import build_parser, main
from joyavatar_core.geometry import Geometry
from joyavatar_core.multi_gpu.child import Asked, follow
from joyavatar_core.multi_gpu.launcher import launch
from joyavatar_core.multi_gpu.links import Inlet
from joyavatar_core.multi_gpu.members import Member
from joyavatar_core.multi_gpu.pipeline import Ranked, check_pipeline, pipeline_rank
from joyavatar_core.multi_gpu.run import Plan
from joyavatar_core.multi_gpu.sequence import check_sequence, sequence_rank
from joyavatar_core.multi_gpu.timeline import Timeline, figures, table
from joyavatar_core.policy import POLICIES, RolloutPolicy, changed
from joyavatar_core.rollout import Rollout
from joyavatar_core.stream import AvatarStream, LatentStream

from .helpers import SMALL, small_rollout
from .test_cli import frames_of as video_of
from .test_cli import write_sound
from .test_live_avatar import advance, s2v_rollout
from .test_stream import RATE, make_stream, sound

LIVE = POLICIES["live-avatar"]
MOVING = replace(LIVE, reference_refresh=2, reference_ahead=(4, 30))
WIDE = replace(SMALL, dim=72, heads=12)
BLOCKS = 12
SECONDS = 8.5  # 12 blocks at 16 frames a second


def live_stream() -> AvatarStream:
    """A small stream under Live Avatar's policy."""
    made = make_stream()
    rollout = replace(made.latents.rollout, policy=LIVE)
    return AvatarStream(LatentStream(rollout, made.latents.front_end), made.frames.autoencoder)


def wide_rollout(policy: str, dtype: torch.dtype) -> Rollout:
    """Of 12 heads and latents of 24 tokens."""
    made = small_rollout(POLICIES[policy], dtype=dtype, config=WIDE)
    channels = torch.randn(1, 8, 30, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(4))
    assert made.condition.image
    condition = replace(made.condition, image=replace(made.condition.image, channels=channels))
    geometry = Geometry(48, 32, spatial=8, patch=(1, 1), **POLICIES[policy].block_sizes)
    return replace(made, geometry=geometry, condition=condition)


def frames_of(stream: AvatarStream) -> list[Tensor]:
    return [*stream.feed(sound(SECONDS), RATE), *stream.finish()]


def latents_of(rollout: Rollout, windows: int) -> Tensor | None:
    """What the windows finish; None where a rank finishes nothing."""
    with torch.inference_mode():
        state = rollout.start()
        done = advance(rollout, state, windows)
        if isinstance(rollout, Ranked):
            rollout.close(state)
    return torch.cat(done, dim=2) if done else None


# In five processes


def five_ranks(out: Path, member: Member) -> None:
    torch.set_num_threads(1)
    made: dict[str, Any] = {"stream": piped_stream(member), "moving": piped(replace(member, world=5), MOVING)}
    if member.rank < 4:  # the last step's rank keeps its blocks
        made["four"] = piped(replace(member, world=4), LIVE)
    made |= shared(member)
    torch.save(made, out / f"{member.rank}.pt")


def piped_stream(member: Member) -> list[Tensor]:
    whole = live_stream()
    rollout = pipeline_rank(whole.latents.rollout, member, Timeline(member.rank, ""))
    stream = AvatarStream(LatentStream(rollout, whole.latents.front_end), whole.frames.autoencoder)
    frames = frames_of(stream)
    rollout.close(stream.state.rollout)
    assert len(stream.state.rollout.caches) == (member.rank < 4)
    return frames


def piped(member: Member, policy: Any) -> Tensor | None:
    rollout = pipeline_rank(s2v_rollout(policy), member, Timeline(member.rank, ""))
    return latents_of(rollout, BLOCKS)


CASES = [("joyavatar-flash", torch.float64), ("joyavatar-flash", torch.float32), ("rolling-forcing", torch.float64)]


def shared(member: Member) -> dict[str, Tensor | None]:
    """Sequence parallel: degrees 2 and 3 side by side, then 4."""
    made: dict[str, Tensor | None] = {}
    for ranks in ([0, 1], [2, 3, 4], [0, 1, 2, 3]):
        group = dist.new_group(ranks)
        if member.rank not in ranks:
            continue
        mine, timeline = Member(ranks.index(member.rank), len(ranks)), Timeline(member.rank, "")
        for name, dtype in CASES:
            rollout = sequence_rank(wide_rollout(name, dtype), mine, timeline, group)
            assert rollout.start().caches[0].keys.shape[3] == 12 // len(ranks)
            made[f"{len(ranks)} {name} {dtype}"] = latents_of(rollout, 8)
        if len(ranks) == 2:
            made["2 s2v"] = latents_of(sequence_rank(s2v_rollout(MOVING), mine, timeline, group), 4)
    return made


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    launch(partial(five_ranks, out), 5, patience=60)
    return [torch.load(out / f"{rank}.pt") for rank in range(5)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_rank_per_timestep_gives_the_same_frames(by_rank: list[dict[str, Any]]) -> None:
    one = frames_of(live_stream())
    assert len(one) == BLOCKS
    five = by_rank[4]["stream"]
    assert len(five) == BLOCKS and all(torch.equal(a, b) for a, b in zip(one, five, strict=True))
    assert not any(by_rank[rank]["stream"] for rank in range(3)), "the first steps finish nothing"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("case", "policy", "rank"), [("moving", MOVING, 4), ("four", LIVE, 3)])
def test_a_pipeline_gives_the_same_latents(by_rank: list[dict[str, Any]], case: str, policy: Any, rank: int) -> None:
    """Wan2.2-S2V, its reference refreshed and at a drawn place; with and without a rank for the decoder."""
    one = latents_of(s2v_rollout(policy), BLOCKS)
    assert one is not None and torch.equal(by_rank[rank][case], one)
    still = latents_of(s2v_rollout(changed(policy, {"reference_refresh": None})), BLOCKS)
    assert still is not None and not torch.equal(still, one)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("policy", "dtype"), CASES)
def test_shared_tokens_give_the_same_latents(
    by_rank: list[dict[str, Any]], ranks: int, policy: str, dtype: torch.dtype
) -> None:
    one = latents_of(wide_rollout(policy, dtype), 8)
    members = {2: [0, 1], 3: [2, 3, 4], 4: [0, 1, 2, 3]}[ranks]
    first, *others = (by_rank[rank][f"{ranks} {policy} {dtype}"] for rank in members)
    assert one is not None and all(torch.equal(first, other) for other in others), "all ranks agree to the bit"
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert (first - one).abs().max() <= tolerance * one.abs().max()


def test_shared_tokens_beside_a_reference(by_rank: list[dict[str, Any]]) -> None:
    """Wan2.2-S2V: its reference is run whole on every rank, which keeps the keys of its heads."""
    one = latents_of(s2v_rollout(MOVING), 4)
    assert one is not None and torch.equal(by_rank[0]["2 s2v"], by_rank[1]["2 s2v"])
    assert (by_rank[0]["2 s2v"] - one).abs().max() <= 1e-5 * one.abs().max()


# The command line


def words(tmp_path: Path, out: str, *more: str) -> list[str]:
    sound = tmp_path / "sound.wav"
    if not sound.exists():
        write_sound(sound, 20.0 if "long" in out else 3.0)
    picture = str(samples.picture("cat"))
    fixed = ["--size", "64x64", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    return ["generate", "--image", picture, "--audio", str(sound), "--output", str(tmp_path / out), *fixed, *more]


@pytest.mark.usefixtures("one_thread")
def test_a_decoder_of_its_own_writes_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path, "one.mp4")) == 0
    report, drawn = tmp_path / "report.json", tmp_path / "drawn.json"
    more = ["--gpus", "2", "--json", str(report), "--timeline", str(drawn)]
    assert main(words(tmp_path, "two.mp4", *more)) == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    figures = json.loads(report.read_text())
    assert figures["parallel"] == "vae" and figures["frames"] == 48 and figures["blocks"] == 5
    assert [r["role"] for r in figures["ranks"]] == ["rollout", "decoder"]
    assert figures["ranks"][0]["compute_ms"] > 0 and figures["ranks"][1]["write_ms"] > 0
    spans = json.loads(drawn.read_text())["ranks"]
    assert {s["block"] for s in spans[1]["spans"]} == set(range(5)) and drawn.with_suffix(".png").exists()
    assert not list(tmp_path.glob("*.part.mp4"))


def when_it_grows(part: Path, do: Callable[[], None]) -> threading.Thread:
    """A thread that does something when a file has its first blocks."""

    def wait() -> None:
        while not (part.exists() and part.stat().st_size > 3000):
            time.sleep(0.02)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_killed_rank_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, a finished file with the frames so far, and nobody left."""

    def kill() -> None:
        next(p for p in multiprocessing.active_children() if p.name == "joyavatar rank 0 of 2").kill()

    when_it_grows(tmp_path / "long.part.mp4", kill)
    assert main(words(tmp_path, "long.mp4", "--gpus", "2")) == 2
    error = capsys.readouterr().err.strip().splitlines()
    line = "joyavatar: rank 0 of 2 was killed (SIGKILL); long.cancelled.mp4 plays, with the frames so far"
    assert error[-1] == line and sum("joyavatar" in part for part in error) == 1
    assert 9 <= len(video_of(tmp_path / "long.cancelled.mp4")) < 320
    assert not multiprocessing.active_children() and not list(tmp_path.glob("*.part.mp4"))


class StopError(Exception):
    """What a host raises to stop a run."""


def test_a_host_can_stop_a_run(tmp_path: Path) -> None:
    """As Ctrl-C does: `poll` raises, the ranks finish what there is. Tokens shared by two."""
    part = tmp_path / "long.part.mp4"
    args = build_parser().parse_args(words(tmp_path, "long.mp4", "--gpus", "2", "--parallel", "sequence"))

    def poll() -> None:
        if part.exists() and part.stat().st_size > 3000:
            raise StopError

    with pytest.raises(StopError):
        launch(partial(several.rank, args), 2, poll=poll)
    assert not multiprocessing.active_children()
    assert 9 <= len(video_of(tmp_path / "long.cancelled.mp4")) < 320


def asked(tmp_path: Path) -> Path:
    """A policy that options cannot say, and what a host puts into the file."""
    policy = changed(POLICIES["self-forcing"], {"sink_blocks": 1})
    path = tmp_path / "asked.json"
    Asked(policy, {"seed": "0", "made": "by a host"}, {"prompt": "{}"}, {"crf": 30, "preset": "ultrafast"}).write(path)
    assert Asked.read(path).policy == policy
    return path


def test_another_program_has_it_made(tmp_path: Path) -> None:
    """As ComfyUI does: it is told of every block, the file has its tags; what is refused is the error."""
    told: list[dict[str, Any]] = []
    more = ["--gpus", "2", "--child", str(asked(tmp_path))]
    follow(words(tmp_path, "a.mp4", *more), lambda: None, lambda block: told.append(dict(block)))
    assert [t["blocks"] for t in told] == [1, 2, 3, 4, 5] and told[-1]["frames"] == 48 and told[-1]["blocks_total"] == 5
    with av.open(str(tmp_path / "a.mp4")) as file:
        settings = json.loads(file.metadata["settings"])
        assert settings == {"seed": "0", "made": "by a host"} and file.metadata["prompt"] == "{}"
    with pytest.raises(ChildProcessError, match=r"^size 65x64"):
        follow([*words(tmp_path, "b.mp4", *more), "--size", "65x64"], lambda: None, lambda block: None)


def test_another_program_can_stop_it(tmp_path: Path) -> None:
    def stop(block: Any) -> None:
        if block["blocks"] >= 2:
            raise StopError

    with pytest.raises(StopError):
        follow(words(tmp_path, "long.mp4", "--gpus", "2", "--child", str(asked(tmp_path))), lambda: None, stop)
    assert 9 <= len(video_of(tmp_path / "long.cancelled.mp4")) < 320
    assert not list(tmp_path.glob("*.part.mp4")) and not (tmp_path / "long.mp4").exists()


def aborts_when_done(member: Member) -> int:
    """A library of rank 0 aborts the process as it closes its connections."""
    if member.rank == 0:
        dist.destroy_process_group = os.abort
    return member.rank


def test_who_is_done_may_end_as_it_likes(caplog: pytest.LogCaptureFixture) -> None:
    assert launch(aborts_when_done, 2) == [0, 1]
    assert "rank 0 had done its part, then ended with status -6" in caplog.text


def refuses(member: Member) -> None:
    """Rank 1 fails while rank 0 waits for it."""
    if member.rank == 1:
        raise ValueError("size 65x64 does not fit")
    Inlet(member, 1, (1,), torch.float32).receive()


def test_what_a_rank_refuses_is_the_error() -> None:
    with pytest.raises(ValueError, match=r"^size 65x64 does not fit$"):
        launch(refuses, 2)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--parallel", "vae"], "give their number with --gpus"),
        (["--gpus", "2", "--resume"], "save no states"),
        (["--gpus", "2", "--audio", "-"], "live sound reaches one process only"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], word: str
) -> None:
    assert main(words(tmp_path, "a.mp4", *more)) == 2
    assert word in capsys.readouterr().err


# Without processes


def test_who_does_what() -> None:
    flash = POLICIES["joyavatar-flash"]
    assert [Plan.suited(LIVE, n).parallel for n in (2, 3, 4, 5, 6)] == ["vae", "sequence", "tpp", "tpp", "sequence"]
    assert [Plan.suited(flash, n).parallel for n in (2, 3, 4, 5)] == ["vae", "sequence", "sequence", "sequence"]
    plan = Plan("tpp", 5)
    assert plan.writer == 4 and [plan.role(r, LIVE) for r in (0, 4)] == ["step 1 of 4", "decoder"]
    assert Plan("tpp", 4).role(3, LIVE) == "step 4 of 4, decoder" and Plan("sequence", 3).writer == 0


@pytest.mark.parametrize(
    ("policy", "ranks", "word"),
    [
        (POLICIES["joyavatar-flash"], 5, "window_blocks 4 and kv_level last_step"),
        (replace(LIVE, motion_frame=True), 5, "use --no-mci"),
        (LIVE, 3, "4 timesteps take 4 processes, or 5 with one that decodes, not 3"),
    ],
)
def test_what_a_pipeline_refuses(policy: RolloutPolicy, ranks: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check_pipeline(policy, ranks)


def test_what_cannot_be_shared() -> None:
    for ranks in (2, 3, 4, 6, 12):
        check_sequence(12, (30, 52), ranks)
    with pytest.raises(ValueError, match=r"12 heads .* by 8 processes: use one of \[1, 2, 3, 4, 6, 12\]"):
        check_sequence(12, (32, 32), 8)
    with pytest.raises(ValueError, match=r"1024 tokens \(32x32\) .* by 3 processes: choose a --size"):
        check_sequence(12, (32, 32), 3)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Member(1, 2, 1).device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="2 processes and no CUDA GPU here: --device cpu"):
        Member(1, 2, 1).device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="finds 1 GPUs on this machine: give --gpus of at most 1"):
        Member(1, 2, 1).device()
    with pytest.raises(ValueError, match="--device cuda:3: several processes take their GPUs in order"):
        Member(1, 2, 1).device("cuda:3")


def test_a_timeline_in_figures() -> None:
    """Medians without the first block, which warms up; busy is what is not waiting, of all the time."""
    line = Timeline(0, "step 1 of 4", origin=10.0)
    line.add("compute", 0, 10.0, 15.0)
    for block, seconds in ((1, 1.0), (2, 2.0), (3, 3.0)):
        line.add("wait", block, 10.0 + 5 * block, 11.0 + 5 * block)
        line.add("compute", block, 11.0 + 5 * block, 11.0 + 5 * block + seconds)
    found = figures(line)
    assert (found.blocks, found.compute_ms, found.wait_ms, found.write_ms) == (4, 2000, 1000, 0)
    assert found.busy == pytest.approx(11 / 19)
    assert "step 1 of 4       4      2000.0   1000.0       0.0   58%" in table([line])


@pytest.mark.slow
def test_six_share_the_tokens(tmp_path: Path) -> None:
    launch(partial(six_ranks, tmp_path), 6, patience=60)
    one = latents_of(wide_rollout("joyavatar-flash", torch.float64), 8)
    six = torch.load(tmp_path / "six.pt")
    assert one is not None and (six - one).abs().max() <= 1e-10 * one.abs().max()


def six_ranks(out: Path, member: Member) -> None:
    torch.set_num_threads(1)
    made = latents_of(sequence_rank(wide_rollout("joyavatar-flash", torch.float64), member, Timeline(0, "")), 8)
    if member.rank == 0:
        torch.save(made, out / "six.pt")
