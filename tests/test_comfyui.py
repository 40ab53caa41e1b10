"""The pack inside a real ComfyUI: `COMFYUI_PATH=... COMFYUI_PYTHON=... pytest -m comfyui`. One host for the module."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from .comfyui_host import GOLDEN, PACK, ROOT, Host, HostError, table_of

pytestmark = pytest.mark.comfyui

LANGUAGES = ("en", "zh", "ja")
NODES: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
MOST_IMPORT_SECONDS = 0.3
SIZES = {"width": 256, "height": 256, "region_x": 0, "region_y": 0, "region_width": 0, "region_height": 0}
SAMPLER = {
    "seed": 1,
    "policy": "joyavatar-flash",
    "steps": 0,
    "psb": "policy",
    "mci": "policy",
    "urcr": "policy",
    "rope_limit": 0,
    "sink_blocks": -1,
    "local_blocks": -1,
    "kv_level": "policy",
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: give the folder of a ComfyUI to test against")
    with Host() as running:
        yield running


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def embedded_stream(sampler: dict[str, Any] | None = None) -> dict[str, Any]:
    """A prompt up to the sampler (node 5), of the package's own picture, voice and model."""
    return {
        "1": node("JoyAvatarSample", picture="demo", voice="demo"),
        "2": node("JoyAvatarLoadModel", model="embedded", dtype="auto"),
        "3": node("JoyAvatarReference", image=["1", 0], fit="crop", size="auto", **SIZES),
        "4": node("JoyAvatarAudioEncoder", audio=["1", 1], history=8.0, layers="last"),
        "5": node(
            "JoyAvatarStreamingSampler", model=["2", 0], reference=["3", 0], voice=["4", 0], **SAMPLER | (sampler or {})
        ),
    }


def test_the_pack_is_imported_quickly_and_without_a_traceback(host: Host) -> None:
    """The host prints time of the clock; on a busy machine only a share of it was spent on the host."""
    assert host.import_seconds() * host.share <= MOST_IMPORT_SECONDS
    assert f"Cannot import {host.base}" not in host.log() and "IMPORT FAILED" not in host.log()


def test_nodes_are_those_of_the_table(host: Host) -> None:
    """A change that breaks users' workflows fails here. After one that does not: --write-nodes of comfyui_host."""
    found = table_of(host.object_info())
    assert found.keys() == NODES.keys()
    for name, expected in NODES.items():
        assert found[name] == expected, name


def test_every_node_has_a_help_page_that_is_served(host: Host) -> None:
    for name in NODES:
        page = host.get(f"/extensions/{PACK}/docs/{name}.md")
        assert page == (ROOT / "js" / "docs" / f"{name}.md").read_bytes()


def test_translations_are_served(host: Host) -> None:
    told = host.get("/i18n")
    for language in LANGUAGES:
        nodes = told[language]["nodeDefs"]
        assert nodes.keys() >= NODES.keys()
        assert all(nodes[name]["display_name"] and nodes[name]["description"] for name in NODES)
        assert "JoyAvatar_Live_Autoplay" in told[language]["settings"]


def test_a_prompt_runs(host: Host) -> None:
    """Nothing is sampled here: the information is worked out from the sizes."""
    entry = host.run({**embedded_stream(), "6": node("JoyAvatarRolloutInfo", latents=["5", 0])}, timeout=120)
    (text,) = entry["outputs"]["6"]["text"]
    assert "256x256" in text and "8, 7, 6, 5, 4, 4" in text


def test_a_failing_node_is_told_with_its_message(host: Host) -> None:
    prompt = {**embedded_stream({"rope_limit": 5}), "6": node("JoyAvatarRolloutInfo", latents=["5", 0])}
    with pytest.raises(HostError, match="rope_limit 5: must be at least 27") as caught:
        host.run(prompt, timeout=120)
    assert (caught.value.node_id, caught.value.node_type) == ("5", "JoyAvatarStreamingSampler")


def test_a_prompt_that_is_not_valid_is_refused(host: Host) -> None:
    prompt = {**embedded_stream({"policy": "unknown"}), "6": node("JoyAvatarRolloutInfo", latents=["5", 0])}
    with pytest.raises(HostError, match=r"JoyAvatarStreamingSampler: .*not in list") as caught:
        host.submit(prompt)
    assert caught.value.status == 400


def test_memory_of_the_host_can_be_read(host: Host) -> None:
    assert 50e6 < host.rss_bytes() < 50e9
