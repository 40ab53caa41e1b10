"""Runs the scripts of this folder in a real Chromium, on the front end that a real host serves.

JOYAVATAR_PLAYWRIGHT: a folder with node_modules/playwright-core. JOYAVATAR_CHROMIUM: the browser, where it is not on
the PATH. COMFYUI_FRONT_END: the `static` folder of an unpacked comfyui-frontend-package, for a host that wants another
one than is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ..comfyui_host import Host

NAMES = ("chromium", "chromium-browser", "google-chrome")
RENDERERS = ("canvas", "nodes2")


def host() -> Host:
    """A host to test the front end of; skips, saying what is lacking."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: give the folder of a ComfyUI to test against")
    _tools()
    root = os.environ.get("COMFYUI_FRONT_END")
    return Host(options=["--front-end-root", root] if root else [])


def run(script: str, host: Host, renderer: str, *words: str, seconds: float = 600) -> dict[str, Any]:
    """What a script of this folder prints."""
    node, chromium = _tools()
    command = [node, str(Path(__file__).parent / script), host.url, renderer, chromium, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _tools() -> tuple[str, str]:
    folder = os.environ.get("JOYAVATAR_PLAYWRIGHT")
    if not folder or not (Path(folder) / "node_modules" / "playwright-core").is_dir():
        pytest.skip("JOYAVATAR_PLAYWRIGHT is not a folder with node_modules/playwright-core")
    chromium = os.environ.get("JOYAVATAR_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not chromium:
        pytest.skip("no Chromium on the PATH: install one, or name it in JOYAVATAR_CHROMIUM")
    node = shutil.which("node")
    if not node:
        pytest.skip("no Node.js on the PATH")
    return node, chromium
