"""A new user's way, with the mouse only, in a ComfyUI that nobody has used: Templates, talking_avatar, Run.

Set up as test_front_end.py. JOYAVATAR_SHOTS: a folder for screenshots of the steps.
"""

from __future__ import annotations

import os

import pytest

from .browser import chromium
from .test_front_end import WORKFLOWS

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


@pytest.mark.parametrize("renderer", chromium.RENDERERS)
def test_from_an_empty_comfyui_to_a_playing_avatar(renderer: str) -> None:
    shots = os.environ.get("JOYAVATAR_SHOTS")
    with chromium.host() as host:
        told = chromium.run("first_steps.mjs", host, renderer, *([f"{shots}/first_steps-{renderer}"] if shots else []))
        assert list((host.base / "output" / "video").glob("*.mp4")), "a file is left"
    assert told["errors"] == []
    assert sorted(set(told["templates"])) == WORKFLOWS  # older front ends say each name twice
    assert told["live"]["sid"] and told["live"]["badge"] == "Live"
    assert told["done"]["file"] and told["done"]["length"] > told["live"]["time"]
