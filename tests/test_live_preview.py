"""The live preview in ComfyUI's own front end: it plays while the file grows, and does not stall.

Needs a machine that makes more than 16 frames a second; set up as test_front_end.py.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .comfyui_host import Host
from .test_comfyui_runs import write_sound

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "browser" / "live.mjs"
SECONDS = float(os.environ.get("JOYAVATAR_LIVE_SECONDS", "30"))
LONGEST_STALL = 0.5


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    for name in ("COMFYUI_PATH", "JOYAVATAR_PLAYWRIGHT"):
        if not os.environ.get(name):
            pytest.skip(f"{name} is not set: the preview is tested in a real host and a real browser")
    with Host() as running:
        for renderer in ("canvas", "nodes2"):
            write_sound(running.base / "input" / f"{renderer}.wav", SECONDS)
        running.restart()
        yield running


@pytest.mark.parametrize("renderer", ["canvas", "nodes2"])
def test_the_preview_plays_while_blocks_are_made(host: Host, renderer: str) -> None:
    chromium = shutil.which("chromium")
    assert chromium, "Chromium is not installed"
    shots = os.environ.get("JOYAVATAR_SHOTS")
    words = ["node", str(SCRIPT), host.url, renderer, chromium, f"{renderer}.wav", str(SECONDS + 60)]
    done = subprocess.run(
        [*words, *([f"{shots}/live-{renderer}"] if shots else [])], capture_output=True, check=True, text=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["errors"] == []
    samples = told["samples"]
    live = [s for s in samples if s["state"] == "running" and s["time"] > 0]
    assert live and live[-1]["time"] > live[0]["time"], "nothing played before the end of the run"
    assert max(s["time"] for s in samples) > SECONDS - 1, "it did not play to the end"
    stalls = _stalls([s for s in samples if s["time"] > 0])
    print(json.dumps({"renderer": renderer, "first_play_s": live[0]["at"], "stalls": stalls}))  # noqa: T201
    assert all(length <= LONGEST_STALL for length, _, _ in stalls), stalls


def _stalls(samples: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Times in which the picture stood though the video had not ended: seconds, at which second, state of the run."""
    found, since = [], None
    for before, after in itertools.pairwise(samples):
        stands = after["time"] <= before["time"] and not after["ended"]
        if stands and since is None:
            since = before["at"]
        elif not stands and since is not None:
            found.append((round(before["at"] - since, 2), round(before["time"], 2), before["state"]))
            since = None
    return found
