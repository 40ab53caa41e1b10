"""Memory of the host after a cancel, and a disk that gets full under it; see test_comfyui.py for how to run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .comfyui_host import Host, HostError
from .test_comfyui_runs import frames_of, session, stream, video, wait_until, write_sound

pytestmark = pytest.mark.comfyui

LONG_SECONDS, CANCEL_AT = 24.0, 0.4
MARGIN_MB = 96
"""What a cancelled run may leave behind, beside one that ended: allocator and caches, no streams."""


@pytest.fixture
def host() -> Iterator[Host]:
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: give the folder of a ComfyUI to test against")
    with Host(options=["--use-pytorch-cross-attention"]) as running:
        write_sound(running.base / "input" / "short.wav", 3.2)
        write_sound(running.base / "input" / "long.wav", LONG_SECONDS)
        running.restart()  # so that the lists of files are new
        yield running


def test_memory_is_back_after_a_cancel(host: Host) -> None:
    """And again after a second one: what stays is not of the run."""
    size = {"width": 512, "height": 512}
    found = {"fresh": host.rss_bytes()}
    host.run({**stream(**size), **video("once")}, timeout=600)
    found["idle"] = memory_once_freed(host)
    most = found["idle"] + MARGIN_MB * 1e6
    for turn in (1, 2):
        prompt = {**stream("long.wav", sampler={"seed": turn}, **size), **video("cancel")}
        found[f"height_{turn}"] = height_until_cancelled(host, prompt)
        found[f"after_{turn}"] = memory_once_freed(host, enough=most)
    print({name: round(value / 1e6) for name, value in found.items()}, "MB")  # noqa: T201
    assert max(found["after_1"], found["after_2"]) <= most


def height_until_cancelled(host: Host, prompt: dict[str, Any]) -> int:
    """Run a prompt of long.wav, cancel it at CANCEL_AT of the way; the most resident bytes until then."""
    number, most = host.submit(prompt), 0
    while not (now := session(host, "running")) or now["frames"] < CANCEL_AT * LONG_SECONDS * 16:
        most = max(most, host.rss_bytes())
        assert number not in host.get("/history"), "it ended too early"
        time.sleep(0.2)
    host.interrupt()
    with pytest.raises(HostError) as caught:
        host.wait(number, timeout=600)
    assert caught.value.interrupted
    return most


def memory_once_freed(host: Host, enough: float = 0.0) -> int:
    """Resident bytes once the host was asked to unload its models: the least in 30 s; at once, if it is `enough`."""
    host.post("/free", {"unload_models": True, "free_memory": True})
    until, least = time.monotonic() + 30, host.rss_bytes()
    while time.monotonic() < until and least > enough:
        time.sleep(0.5)
        least = min(least, host.rss_bytes())
    return least


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a disk of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def host_on_disk(disk: Path) -> Iterator[Host]:
    """A host whose output folder is that disk."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: give the folder of a ComfyUI to test against")
    with Host(options=["--use-pytorch-cross-attention", "--output-directory", str(disk)]) as running:
        write_sound(running.base / "input" / "short.wav", 3.2)
        write_sound(running.base / "input" / "long.wav", 60.0)
        running.restart()
        yield running


def test_a_disk_that_gets_full_in_the_middle(host_on_disk: Host, disk: Path) -> None:
    """One sentence on the node; what is there plays; with room, the same run goes on, bit for bit."""
    host, prompt = host_on_disk, {**stream("long.wav"), **video("full", retake_every=0.0)}
    whole = frames_of(made(disk, host.run({**prompt, **video("whole", retake_every=0.0)}, timeout=600)))
    number = host.submit(prompt)
    wait_until(lambda: list(disk.glob("t/full*.state.safetensors")))
    fill(disk)
    with pytest.raises(HostError) as caught:
        host.wait(number, timeout=600)
    message = str(caught.value)
    assert caught.value.node_id == "7" and "\n" not in message
    assert "No space left on device" in message and message.endswith("make room and resume, or choose another folder")
    assert session(host, "failed")["message"] == message  # pyright: ignore
    (part,) = disk.glob("t/full*.part.mp4")
    there = len(frames_of(part))
    assert f"it plays up to source frame {there}:" in message and 0 < there < len(whole)
    assert (frames_of(part) == whole[:there]).all()
    (disk / "ballast").unlink()
    entry = host.run(prompt, timeout=600)
    (detail,) = entry["outputs"]["7"]["joyavatar"]
    assert detail["made"] < len(whole), "only the rest was made"
    assert (frames_of(made(disk, entry)) == whole).all()
    assert not list(disk.glob("t/full*.part.mp4")) and not list(disk.glob("t/full*.state.*"))


def test_a_disk_without_room_for_the_finished_copy(host_on_disk: Host, disk: Path) -> None:
    host = host_on_disk
    size = made(disk, host.run({**stream(), **video("first", retake_every=0.0)})).stat().st_size
    fill(disk, but=round(1.6 * size))
    with pytest.raises(HostError) as caught:
        host.run({**stream(), **video("second", retake_every=0.0)})
    assert caught.value.node_id == "7" and "\n" not in str(caught.value)
    assert "holds the whole video and plays: make room for a second copy" in str(caught.value)
    (part,) = disk.glob("t/second*.part.mp4")
    assert len(frames_of(part)) == 51
    (disk / "ballast").unlink()
    assert len(frames_of(made(disk, host.run({**stream(), **video("third", retake_every=0.0)})))) == 51


def fill(disk: Path, but: int = 0) -> None:
    """Take all room on the disk, `but` so many bytes; it gets free when the file `ballast` goes."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):  # full, whatever else is written meanwhile
            while file.write(bytes(4096)):
                pass
        file.truncate(file.tell() - but)


def made(disk: Path, entry: dict[str, Any]) -> Path:
    """The video of a prompt."""
    (found,) = entry["outputs"]["7"]["images"]
    return disk / found["subfolder"] / found["filename"]
