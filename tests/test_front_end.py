"""The example workflows: their files belong together, and ComfyUI's own front end loads and exports them as stored.

The tests in the browser: `COMFYUI_PATH=... JOYAVATAR_PLAYWRIGHT=FOLDER pytest -m comfyui tests/test_front_end.py`, with
Node.js; browser/chromium.py says what these and two more variables name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .browser import chromium
from .comfyui_host import GOLDEN, ROOT, Host

FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = ("MarkdownNote", "Note")
MUTED, BYPASSED = 2, 4
MOST_THUMBNAIL_BYTES = 60_000


def ui(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


# Without a host


def test_there_are_workflows() -> None:
    """Without this, an empty folder would pass."""
    assert len(WORKFLOWS) == 9
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == WORKFLOWS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_and_its_export_hold_the_same_nodes(name: str) -> None:
    shown = {str(n["id"]): n["type"] for n in ui(name)["nodes"] if n["type"] not in NOTES}
    off = {str(n["id"]) for n in ui(name)["nodes"] if n["mode"] in (MUTED, BYPASSED)}
    assert {i: node["class_type"] for i, node in api(name).items()} == {i: t for i, t in shown.items() if i not in off}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_an_export_gives_every_input_that_a_node_of_ours_asks_for(name: str) -> None:
    nodes = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for number, node in api(name).items():
        if node["class_type"].startswith("JoyAvatar"):
            asked = {i["name"]: not i.get("optional") for i in nodes[node["class_type"]]["inputs"]}
            assert set(node["inputs"]) <= set(asked), f"{number}: unknown inputs"
            assert {i for i, needed in asked.items() if needed} <= set(node["inputs"]), f"{number}: inputs not given"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_two_nodes_of_a_workflow_overlap(name: str) -> None:
    title = 30
    boxes = [(n["pos"][0], n["pos"][1] - title, n["size"][0], n["size"][1] + title) for n in ui(name)["nodes"]]
    for i, (x, y, width, height) in enumerate(boxes):
        for u, v, w, h in boxes[i + 1 :]:
            assert x + width <= u or u + w <= x or y + height <= v or v + h <= y


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_has_a_note_and_a_small_thumbnail(name: str) -> None:
    from PIL import Image

    assert any(node["type"] in NOTES for node in ui(name)["nodes"])
    picture = FOLDER / f"{name}.jpg"
    assert picture.stat().st_size < MOST_THUMBNAIL_BYTES
    with Image.open(picture) as opened:
        assert opened.format == "JPEG"
        assert opened.width > opened.height


# In the browser


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with chromium.host() as running:
        yield running


@pytest.fixture(scope="module", params=chromium.RENDERERS)
def report(request: pytest.FixtureRequest, host: Host) -> dict[str, Any]:
    """What the front end made of every workflow, in one of its two renderers; an empty input folder."""
    return chromium.run("front_end.mjs", host, request.param, *(str(FOLDER / f"{name}.json") for name in WORKFLOWS))


@pytest.mark.comfyui
def test_the_front_end_starts_without_an_error(report: dict[str, Any]) -> None:
    assert report["started"] == []


@pytest.mark.comfyui
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_loads_without_missing_nodes_and_errors(report: dict[str, Any], name: str) -> None:
    assert report["workflows"][name]["missing"] == []
    assert report["workflows"][name]["errors"] == []


@pytest.mark.comfyui
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_exports_what_is_stored(report: dict[str, Any], name: str) -> None:
    stored, exported = api(name), report["workflows"][name]["output"]
    assert {i: n["class_type"] for i, n in exported.items()} == {i: n["class_type"] for i, n in stored.items()}
    for number, node in stored.items():
        inputs = node["inputs"]
        if not node["class_type"].startswith("JoyAvatar"):  # older hosts lack the newest widgets of stock nodes
            inputs = {k: v for k, v in inputs.items() if k in exported[number]["inputs"] or isinstance(v, list)}
        assert exported[number]["inputs"] == inputs, number
