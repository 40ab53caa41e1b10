"""The live preview in ComfyUI's own front end: it plays while the file grows, and does not stall while there is more.

Set up as test_front_end.py; best on a machine that makes more than 16 frames a second. JOYAVATAR_LIVE_SECONDS: of the
sound. JOYAVATAR_SHOTS: a folder for screenshots and for what was seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import chromium
from .comfyui_host import Host
from .test_comfyui_runs import write_sound

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SECONDS = float(os.environ.get("JOYAVATAR_LIVE_SECONDS", "30"))
LONGEST_STALL = 0.5
AHEAD_SECONDS = 1.5  # with less the viewer has caught up, and Chromium collects some seconds before it goes on


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with chromium.host() as running:
        write_sound(running.base / "input" / "voice.wav", SECONDS)
        running.restart()
        yield running


@pytest.mark.parametrize("renderer", chromium.RENDERERS)
def test_the_preview_plays_while_blocks_are_made(host: Host, renderer: str) -> None:
    shots = os.environ.get("JOYAVATAR_SHOTS")
    words = ["voice.wav", str(2 * SECONDS + 60), *([f"{shots}/live-{renderer}"] if shots else [])]
    told = chromium.run("live.mjs", host, renderer, *words, seconds=2 * SECONDS + 240)
    if shots:
        Path(shots, f"live-{renderer}.json").write_text(json.dumps(told))
    assert told["errors"] == [] and not [e for e in told["events"] if e["name"] == "error"]
    samples = told["samples"]
    live = [s for s in samples if s["state"] == "running" and s["time"] > 0]
    assert live and live[-1]["time"] > live[0]["time"], "nothing played before the end of the run"
    stalls = stalls_of(told)
    print(json.dumps({"renderer": renderer, "first_play_s": live[0]["at"], "stalls": stalls}))  # noqa: T201
    assert max(s["time"] for s in samples) > SECONDS - 1, "it did not play to the end"
    ahead = [s for s in stalls if s["source"] == "file" or s["made"] > AHEAD_SECONDS]
    assert all(stall["seconds"] <= LONGEST_STALL for stall in ahead), ahead


def stalls_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the video stood though it had not ended, over a tenth of a second, and what was the case then.

    at: since Run. time: of the video. source: the growing file or the finished one. read: seconds that the browser had
    beyond that time, made: that the host had. waiting: whether the browser said that it lacked data. blocked: the
    longest task of the page meanwhile.
    """
    playing = [s for s in told["samples"] if s["time"] > 0 and not s["ended"]]
    found, first = [], 0
    for index, sample in enumerate(playing):
        if sample["time"] > playing[first]["time"] or sample["source"] != playing[first]["source"]:
            if index - first > 1 and playing[index - 1]["at"] - playing[first]["at"] > 0.1:
                found.append(_stall(told, playing[first], playing[index - 1]))
            first = index
    return found


def _stall(told: dict[str, Any], first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    during = [e for e in told["events"] if first["at"] - 0.3 <= e["at"] <= last["at"]]
    tasks = [t["seconds"] for t in told["tasks"] if first["at"] - 0.3 <= t["at"] <= last["at"]]
    return {
        "at": first["at"],
        "seconds": round(last["at"] - first["at"], 2),
        "time": round(first["time"], 2),
        "source": first["source"],
        "state": first["state"],
        "read": round(first["length"] - first["time"], 2),
        "made": round(first["frames"] / 16 - first["time"], 2),
        "waiting": any(e["name"] == "waiting" for e in during),
        "blocked": round(max(tasks, default=0.0), 2),
    }
