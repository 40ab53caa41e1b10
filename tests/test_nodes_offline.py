"""What must hold between nodes, help pages, translations and workflows, checked without a ComfyUI."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LANGUAGES = ("en", "zh", "ja")
PARTS = ("main", "nodeDefs", "settings")
SETTINGS = {"JoyAvatar.Live.Autoplay", "JoyAvatar.Live.Sound", "JoyAvatar.Live.Strip"}
NODES: dict[str, Any] = json.loads((ROOT / "tests/golden/nodes.json").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json")) + sorted((ROOT / "workflows").glob("api/*.json"))

# Ids that have been published. Users' workflows name them: never take one away, add new ones.
PUBLISHED = {
    "JoyAvatarSample",
    "JoyAvatarLoadModel",
    "JoyAvatarLoRA",
    "JoyAvatarReference",
    "JoyAvatarAudioEncoder",
    "JoyAvatarStreamingSampler",
    "JoyAvatarStreamDecode",
    "JoyAvatarStreamToVideo",
    "JoyAvatarRetake",
    "JoyAvatarPasteBack",
    "JoyAvatarCollectLatents",
    "JoyAvatarCollectFrames",
    "JoyAvatarFolderOfAudio",
    "JoyAvatarFolderOfImages",
    "JoyAvatarRolloutInfo",
}
# ComfyUI's own nodes that the pack's workflows may use; those of the second row live in the browser only.
STOCK = {
    "StringConcatenate",
    "LoadImage",
    "LoadAudio",
    "LoadVideo",
    "SaveVideo",
    "CreateVideo",
    "GetVideoComponents",
    "PreviewImage",
    "SaveImage",
    "PreviewAny",
    "PreviewAudio",
    "SaveAudio",
    "TrimAudioDuration",
    "VAELoader",
    "VAEDecode",
    "CLIPLoader",
    "CLIPTextEncode",
    "CLIPVisionLoader",
    "CLIPVisionEncode",
    "AudioEncoderLoader",
    "ImageScale",
    "ImageScaleBy",
    "UpscaleModelLoader",
    "ImageUpscaleWithModel",
    *{"Note", "MarkdownNote", "Reroute", "PrimitiveNode"},
}


def translation(language: str, part: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{part}.json").read_text(encoding="utf-8"))


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a tree, with its keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def help_page(name: str) -> str:
    return (ROOT / "js" / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_no_node_has_disappeared() -> None:
    assert not PUBLISHED - NODES.keys()
    assert not NODES.keys() - PUBLISHED, "new nodes: add them to PUBLISHED"


def test_the_nodes_are_in_the_table_of_the_code() -> None:
    """Read from the source, since the nodes need a host to be imported."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nodes").glob("*.py")))
    assert set(re.findall(r'"(JoyAvatar[A-Z]\w*)"', source)) == NODES.keys()


@pytest.mark.parametrize("part", PARTS)
def test_translations_have_the_same_keys_and_no_empty_text(part: str) -> None:
    english = dict(leaves(translation("en", part)))
    for language in LANGUAGES:
        found = dict(leaves(translation(language, part)))
        assert found.keys() == english.keys(), language
        assert all(isinstance(text, str) and text.strip() for text in found.values()), language


def test_languages_are_those_of_the_folder() -> None:
    found = {path.relative_to(ROOT / "locales").as_posix() for path in (ROOT / "locales").rglob("*.*")}
    assert found == {f"{language}/{part}.json" for language in LANGUAGES for part in PARTS}


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_name_every_input_and_output(language: str) -> None:
    nodes = translation(language, "nodeDefs")
    assert nodes.keys() == NODES.keys()
    for name, expected in NODES.items():
        assert nodes[name]["inputs"].keys() == {i["name"] for i in expected["inputs"]}, name
        assert list(nodes[name]["outputs"]) == [str(n) for n in range(len(expected["outputs"]))], name
        assert all(set(i) == {"name", "tooltip"} for i in nodes[name]["inputs"].values()), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_settings_are_translated(language: str) -> None:
    assert translation(language, "settings").keys() == {name.replace(".", "_") for name in SETTINGS}


def test_settings_are_those_of_the_scripts() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "js").rglob("*.js")))
    if not source:
        pytest.skip("no scripts in js/ yet")
    assert set(re.findall(r"""["'`](JoyAvatar\.\w+\.\w+)["'`]""", source)) == SETTINGS


@pytest.mark.parametrize("name", sorted(NODES))
def test_the_help_page_tells_of_every_input_and_output(name: str) -> None:
    page = help_page(name)
    assert page.startswith("# JoyAvatar ") and "## Typical wiring" in page and "## Pitfalls" in page
    first_column = ", ".join(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE))
    for given in NODES[name]["inputs"]:
        assert re.search(rf"\b{given['name']}\b", first_column), given["name"]
    for output in NODES[name]["outputs"]:
        assert f"**{output['name']}** ({output['type']}" in page, output["name"]


@pytest.mark.parametrize("name", sorted(NODES))
def test_the_help_page_gives_the_defaults(name: str) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in help_page(name).splitlines()]
    told = {cells[0].split(" (")[0]: cells[1] for cells in rows if len(cells) == 3}
    advanced = {n for cells in rows if "(advanced)" in cells[0] for n in cells[0].split(" (")[0].split(", ")}
    for given in NODES[name]["inputs"]:
        text = next(text for names, text in told.items() if given["name"] in names.split(", "))
        default = str(given.get("default", (given.get("choices") or [""])[0])).removesuffix(".0").lower()
        assert re.search(rf"(^|\b|(?=-)){re.escape(default)}\b", text.lower()) if default else True, given["name"]
        assert (given["name"] in advanced) == bool(given.get("advanced")), given["name"]


def test_help_pages_belong_to_nodes() -> None:
    assert {path.name for path in (ROOT / "js" / "docs").iterdir()} == {f"{name}.md" for name in NODES}


def types_of(workflow: dict[str, Any]) -> set[str]:
    """Node types of a workflow in UI or in API format, subgraphs included."""
    if "nodes" not in workflow:
        return {node["class_type"] for node in workflow.values()}
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    inner = {kind for subgraph in subgraphs for kind in types_of(subgraph)}
    return ({node["type"] for node in workflow["nodes"]} | inner) - {subgraph["id"] for subgraph in subgraphs}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_known_nodes_only(path: Path) -> None:
    found = types_of(json.loads(path.read_text(encoding="utf-8")))
    assert found and not found - NODES.keys() - STOCK
    assert ("api" in path.parts) == ("nodes" not in json.loads(path.read_text(encoding="utf-8")))
