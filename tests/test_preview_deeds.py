"""What users do to the live preview while it plays, with the real nodes in ComfyUI's own front end and both renderers.

Set up as test_front_end.py. Small pictures: a busy machine is enough.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from .browser import chromium
from .comfyui_host import Host, HostError
from .test_comfyui_runs import frames_of, write_sound

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SOUNDS = {"a.wav": 8.0, "b.wav": 12.0, "long.wav": 600.0}
FPS = 16
GOES, STANDS, HOLDS = 0.15, 1.5, 8  # a host that is held up: seconds, and how often


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with chromium.host() as running:
        for name, seconds in SOUNDS.items():
            write_sound(running.base / "input" / name, seconds)
        running.restart()
        yield running


@pytest.fixture(params=chromium.RENDERERS)
def renderer(request: pytest.FixtureRequest) -> str:
    return request.param


def seen(host: Host, renderer: str, deed: str) -> dict[str, Any]:
    """What happened, of a deed in browser/preview.mjs, without an error of the page."""
    told = chromium.run("preview.mjs", host, renderer, deed)
    assert told["errors"] == []
    return told


def run_of(told: dict[str, Any], look: dict[str, Any]) -> dict[str, Any]:
    """The run whose finished video a panel shows."""
    (found,) = (s for s in told["sessions"] if s["file"] and s["file"]["filename"] == look["file"])
    return found


def test_two_outputs_show_a_video_each(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "two_outputs")
    last = told["seen"][-1]
    assert [round(one["length"], 1) for one in last] == [SOUNDS["a.wav"], SOUNDS["b.wav"]]
    assert [one["wide"] > 0 for one in last] == [True, True]
    for index, end in enumerate(last):
        run = run_of(told, end)
        assert run["node"] == end["node"] and run["frames"] == round(end["length"] * FPS)
        assert {looks[index]["sid"] for looks in told["seen"]} == {None, run["sid"]}, "its own stream and no other"
    both = [[one["time"] > 0 and not one["ended"] for one in looks] for looks in told["seen"]]
    assert [True, True] in both, "the first video played on beside the second one"


def test_a_workflow_does_not_show_what_another_one_makes(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "two_workflows")
    assert told["first"]["sid"] and told["first"]["node"] == told["second"]["node"], "the same id in both"
    for name in ("waiting", "queued"):
        assert told[name]["sid"] is None and told[name]["file"] is None and told[name]["badge"] == ""
    assert round(told["second"]["length"]) == SOUNDS["b.wav"]
    assert run_of(told, told["second"])["sid"] != told["first"]["sid"]


def test_a_collapsed_node_plays_on_when_it_is_opened(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "collapse")
    assert told["collapsed"] is True and not told["closed"]["wide"], "it was closed"
    assert told["opened"]["sid"] == told["later"]["sid"] == told["before"]["sid"]
    assert told["later"]["time"] > told["opened"]["time"] >= told["before"]["time"] and not told["later"]["paused"]
    assert told["later"]["videos"] == 1 and told["state"] == "running"


def test_a_removed_node_leaves_its_run_alone(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "removal")
    assert told["left"] == [] and told["videos"] == 0
    assert told["before"]["sid"] == told["after"]["sid"] and told["after"]["state"] == "running"


def test_inside_a_subgraph(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "subgraph")
    assert told["session"]["node"] == f"{told['outer']}:{told['playing']['node']}"
    assert told["playing"]["sid"] == told["session"]["sid"] and told["playing"]["wide"] > 0
    assert told["later"]["time"] > told["playing"]["time"]


def test_a_click_on_the_strip_makes_its_seconds_again(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "retake")
    start, end = told["values"]["start"], told["values"]["end"]
    assert told["asked"].split()[1:4:2] == [f"{start:g}", f"{end:g}"], "what the button says is asked for"
    assert f"added for {told['asked'].removeprefix('Retake ')}." in told["note"]
    assert start < SOUNDS["b.wav"] / 2 < end and round(end - start, 2) == 0.75, "the block under the click"
    whole, part = (run_of(told, told[name]) for name in ("first", "taken"))
    assert part["made"] < whole["made"]
    files = [host.base / "output" / run["file"]["subfolder"] / run["file"]["filename"] for run in (whole, part)]
    before, after = map(frames_of, files)
    changed = np.flatnonzero((before != after).any((1, 2, 3)))
    assert len(changed) and changed.min() >= round(start * FPS) and changed.max() < round(end * FPS)


def test_a_reloaded_page_goes_on_with_the_run(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "reload")
    assert told["session"]["state"] == "running"
    assert told["before"]["sid"] == told["after"]["sid"] == told["later"]["sid"] == told["session"]["sid"]
    assert told["later"]["time"] > told["after"]["time"]
    assert told["kept"]["file"].endswith(".cancelled.mp4") and told["kept"]["file"] in told["kept"]["note"]


@contextlib.contextmanager
def held_up(host: Host) -> Iterator[None]:
    """Once frames are there, the host stands now and then: what a machine slower than playback is to a viewer."""
    assert host.process
    process, over = psutil.Process(host.process.pid), threading.Event()

    def makes() -> bool:
        with contextlib.suppress(HostError, OSError):
            return any(s["state"] == "running" and s["frames"] for s in host.get("/joyavatar/sessions"))
        return False

    def hold() -> None:
        holds = 0
        while holds < HOLDS and not over.wait(GOES):
            if makes():
                process.suspend()
                over.wait(STANDS)
                process.resume()
                holds += 1

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_viewer_who_catches_up_waits_and_goes_on(host: Host, renderer: str) -> None:
    with held_up(host):
        told = seen(host, renderer, "slow")
    live = [s for s in told["samples"] if s["source"] == "stream" and s["state"] == "running"]
    waits = [e["time"] for e in told["events"] if e["name"] == "waiting" and e["time"] > 0.5]
    assert waits, "the viewer never caught up: nothing was tested"
    assert all(after["time"] >= before["time"] for before, after in itertools.pairwise(live)), "it began again"
    assert not any(s["ended"] for s in live), "it was taken for the end"


def test_the_finished_file_takes_over_where_the_growing_one_is(host: Host, renderer: str) -> None:
    shown = [s for s in seen(host, renderer, "late_seek")["samples"] if s["time"] > 0]
    pairs = list(itertools.pairwise(shown))
    (swap,) = ((a, b) for a, b in pairs if a["source"] == "stream" and b["source"] == "file")
    assert not swap[0]["paused"] and not swap[0]["ended"], "the growing one played until then"
    assert -0.1 <= swap[1]["time"] - swap[0]["time"] <= 0.5, swap


def test_a_run_with_nothing_changed_shows_the_finished_video(host: Host, renderer: str) -> None:
    told = seen(host, renderer, "cached")
    assert told["runs"][0] == told["runs"][1], "nothing was made again"
    assert told["again"]["file"] == told["first"]["file"] and told["again"]["badge"] == "Done"
    assert told["empty"]["file"] is None, "the fresh page knew nothing of it"
    assert told["playing"]["file"] == told["first"]["file"] and told["playing"]["length"]
