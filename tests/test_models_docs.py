"""docs/models.md says what the table says, and the table is sound.

After a change of the table: python -m tests.test_models_docs
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from joyavatar_core import known_weights
from joyavatar_core.known_weights import (
    KNOWN,
    UNVERIFIED,
    found,
    licence_tooltip,
    licence_warning,
    recognised,
    tables,
    where_to_get,
    with_needs,
)

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->\n", "\n<!-- table: end -->"
FOLDERS = {"diffusion_models", "loras", "vae", "vae_approx", "audio_encoders", "text_encoders", "clip_vision", "face"}


def between(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0]


def test_the_page_is_the_table() -> None:
    assert between(PAGE.read_text(encoding="utf-8")) == tables(), "run python -m tests.test_models_docs"


def test_every_system_of_the_issue_is_there() -> None:
    systems = ("joyavatar-flash", "self-forcing", "longlive", "rolling-forcing", "live-avatar", "livetalk")
    parts = (
        "avatarforcing",
        "wan-vae",
        "taehv",
        "lighttae",
        "wav2vec2-base",
        "umt5",
        "clip-vision",
        "yunet",
        "arcface",
    )
    assert KNOWN.keys() >= {*systems, *parts}


def test_every_name_says_where_it_was_read() -> None:
    """A commit of a public repository, a page of the hub, a template of ComfyUI, or that it was read nowhere."""
    kind = re.compile(r"[\w.-]+/[\w.-]+ (v[\d.]+ )?[0-9a-f]{7,8}, .+|(page|model card|file list) of .+|ComfyUI's .+")
    for name, entry in KNOWN.items():
        for file in entry.files:
            assert file.folder in FOLDERS and not file.name.startswith("/"), name
            if file.repo:
                assert file.read_in == UNVERIFIED or kind.fullmatch(file.read_in), file.read_in
            assert file.licence.read_in and file.licence.name
    assert {file.repo for e in KNOWN.values() for file in e.files if file.repo and file.read_in == UNVERIFIED} == {
        "lycui/AvatarForcing",
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    }


def test_needs_exist_and_files_do_not_collide() -> None:
    for name in KNOWN:
        for comfyui in (False, True):
            places = [file.place for _, file in with_needs(name, comfyui)]
            assert len(places) == len(set(places)), name
    owners = [file.place for entry in KNOWN.values() for file in entry.files]
    assert len(owners) == len(set(owners))
    assert [n for n, _ in with_needs("self-forcing", comfyui=True)] == ["self-forcing", "wan-vae", "umt5-comfyui"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("livetalk", "contradicts itself.*Apache-2.0.*CC BY-NC-SA 4.0.*ask the authors"),
        ("avatarforcing", "contradicts itself.*academic only"),
        ("rolling-forcing", "not for commercial use.*academic purposes only"),
        ("arcface", "not for commercial use: non-commercial research only"),
        ("models/diffusion_models/LiveTalk-1.3B-fp8.safetensors", "contradicts itself"),
        ("Rolling_Forcing_DMD_bf16.safetensors", "not for commercial use"),
        ("w600k_r50.onnx", "not for commercial use"),
    ],
)
def test_licences_that_forbid_or_contradict_are_said(name: str, said: str) -> None:
    assert re.search(said, licence_warning(name)) and "\n" not in licence_warning(name)


@pytest.mark.parametrize(
    "name", ["self-forcing", "live-avatar", "wan_2.1_vae.safetensors", "unknown.safetensors", "tiny"]
)
def test_free_licences_need_no_warning(name: str) -> None:
    assert licence_warning(name) == ""


def test_the_tooltip_names_them_all() -> None:
    lines = licence_tooltip().splitlines()
    assert len(lines) == 4 and all(any(n in line for line in lines) for n in ("livetalk", "avatarforcing", "arcface"))


def test_every_file_is_recognised_by_its_own_name() -> None:
    for name, entry in KNOWN.items():
        for file in entry.files:
            shared = file.name.count("/") > 0 or file.name.startswith("wan2.2_s2v")  # a folder's, another system's too
            assert shared or recognised(file.name) == name, file.name
    assert recognised("tiny.safetensors") is None


def test_errors_can_say_where_to_get_it() -> None:
    said = where_to_get("livetalk")
    assert "diffusion_models/livetalk-1.3b-v0.1.safetensors" in said and "joyavatar download livetalk" in said
    assert "download" not in where_to_get("arcface")


def test_files_are_found_in_the_hosts_layout_and_in_a_plain_folder(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "wan_2.1_vae.safetensors").touch()
    (tmp_path / "liveavatar.safetensors").touch()
    assert [place for _, place in found("wan-vae", [tmp_path])] == [tmp_path / "vae" / "wan_2.1_vae.safetensors"]
    assert [place for _, place in found("live-avatar", [tmp_path])] == [None, tmp_path / "liveavatar.safetensors"]


def test_no_torch_is_needed() -> None:
    source = Path(known_weights.__file__).read_text(encoding="utf-8")
    assert not re.search(r"import (torch|huggingface_hub|requests|urllib)", source)


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(before.replace(between(before), tables()), encoding="utf-8")
