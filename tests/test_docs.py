"""The documents are true: commands stand as promised, examples parse and run, names exist, key lists match."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import math
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from joyavatar_core.autoencoder import AUTOENCODERS, LightAutoencoder
from joyavatar_core.avatar import build_model
from joyavatar_core.checkpoint import TRANSLATIONS
from joyavatar_core.cli.main import build_parser
from joyavatar_core.cli.train import STAGES, stage_parser
from joyavatar_core.config import MODELS, ModelConfig
from joyavatar_core.wan_vae import WanVAE, WanVAEConfig

from .test_cli import write_sound

ROOT = Path(__file__).parent.parent
CORE = ROOT / "joyavatar_core"
NAMES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
KEYS = "docs/key_names.md"
COMMANDS = ("pip install -e . && joyavatar demo", 'pip install -e ".[test]" && pytest')


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str) -> list[tuple[str, str]]:
    """(info string, content) of the fenced blocks."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def rows(name: str) -> list[list[str]]:
    """Cells of all table rows."""
    lines = [line for line in text_of(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_stand_alone(command: str) -> None:
    assert command in text_of("README.md").splitlines()
    assert f"{command}\n" in [content for _, content in fences("README.md")]


def shell_lines(name: str) -> list[str]:
    text = "".join(content for info, content in fences(name) if info == "bash")
    return text.replace("\\\n", " ").splitlines()


def test_examples_of_the_command_line_parse() -> None:
    commands = set()
    for line in shell_lines("README.md"):
        for part in re.split(r"\||&&", line):
            program, *words = shlex.split(part)
            if program == "joyavatar":
                build_parser().parse_args(words)
                commands.add(words[0])
    assert commands == {"demo", "generate", "schedule", "doctor", "bench", "evaluate"}


def options() -> set[str]:
    """Every option of every command and of every training program."""
    parsers, found = [build_parser(), *(stage_parser(stage) for stage in STAGES)], set()
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    for source in (ROOT / "joyavatar_core" / "training").glob("*.py"):  # programs of their own
        found |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source.read_text()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name: str) -> None:
    outside = {
        line
        for line in text_of(name).splitlines()
        if any(other in line for other in ("joyavatar_core.training", "ruff format", "torchrun"))
    }
    text = "\n".join(line for line in text_of(name).splitlines() if line not in outside)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert not mentioned - options(), mentioned - options()


def test_training_commands_exist() -> None:
    found = 0
    for line in shell_lines("CONTRIBUTING.md"):
        words = line.split()
        if words[:2] != ["python", "-m"]:
            continue
        source = (ROOT / (words[2].replace(".", "/") + ".py")).read_text()
        if "trainer.add_options(" in source:
            source += (ROOT / "joyavatar_core/training/trainer.py").read_text()
        for word in words[3:]:
            known = re.search(rf'add_argument\(\s*"{re.escape(word)}"', source)
            assert not word.startswith("--") or known, (words[2], word)
        found += 1
    assert found == 17


# Python


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((90, 70, 3), 128, np.uint8)).save("portrait.png")
    write_sound(Path("speech.wav"), 0.6)
    space: dict[str, object] = {}
    said = io.StringIO()
    for info, content in fences("README.md"):
        if info == "python":
            assert sum(bool(line.strip()) for line in content.splitlines()) <= 12
            with contextlib.redirect_stdout(said):
                exec(content.replace("256, 256", "64, 64"), space)
    assert Path("avatar.mp4").stat().st_size > 1000 and not Path("avatar.part.mp4").exists()
    assert "torch.Size([1, 3, 9, 64, 64])" in said.getvalue()


# Names and links


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Functions, classes and assigned names, members of classes as Class.member."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from defined(node.body, f"{prefix}{node.name}.")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (prefix + t.id for t in targets if isinstance(t, ast.Name))


@cache
def names_in(file: str) -> frozenset[str]:
    path = next((p for p in (CORE / file, ROOT / "tests" / file, ROOT / file) if p.exists()), None)
    assert path, f"{file} does not exist"
    return frozenset(defined(ast.parse(path.read_text(encoding="utf-8")).body))


@pytest.mark.parametrize("name", NAMES)
def test_references_to_code_resolve(name: str) -> None:
    for file, member in re.findall(r"`([\w/]+\.py):([\w.]+)`", text_of(name)):
        assert member in names_in(file), f"{name}: {file} has no {member}"
    for file in re.findall(r"`([\w/]+\.py)`", text_of(name)):
        names_in(file)


def test_paper_sections_have_code_and_tests() -> None:
    table = [r for r in rows("docs/paper_to_code.md") if len(r) == 4 and re.match(r"\d|Table", r[0])]
    assert {r[0][:3] for r in table} >= {"3.1", "3.2", "3.3", "3.4", "3.5", "4.1"}
    for section, _, code, tests in table:
        assert code.startswith("later") or ("`test_" in tests and "`" in code), section


def test_open_questions_are_all_answered() -> None:
    answered = {r[0]: r[2] for r in rows("docs/paper_to_code.md") if len(r) == 4 and re.fullmatch("[a-m]", r[0])}
    assert "".join(answered) == "abcdefghijklm"
    assert all(re.fullmatch(r"`[\w/]+\.py:[\w.]+`", place) for place in answered.values()), "one place each"


def test_architecture_names_every_file() -> None:
    files = {p.name for p in CORE.glob("*.py")} - {"__init__.py"}
    packages = {f"{p.parent.name}/" for p in CORE.glob("*/__init__.py")}
    text = text_of("docs/architecture.md")
    assert not {part for part in files | packages if f"`{part}`" not in text}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        assert target.startswith("https://") or ((ROOT / name).parent / target).exists(), target


# Keys, shapes, counts


def on_meta(make, *args: object) -> nn.Module:
    with torch.device("meta"):
        return make(*args)


def expand(pattern: str, counts: dict[str, int]) -> Iterator[str]:
    """`{a,b}` and the counters of a pattern, multiplied out."""
    parts = re.split(r"(\{[^}]*\}|(?<=\.)[NMJIL](?=\.))", pattern)
    choices = [
        p[1:-1].split(",") if p.startswith("{") else map(str, range(counts[p])) if p in counts else [p] for p in parts
    ]
    return map("".join, product(*choices))


def listed(section: str, counts: dict[str, int], symbols: dict[str, int]) -> dict[str, tuple[int, ...] | None]:
    """Names of a list of the document and their shapes, None where it gives none."""
    content = dict(fences(KEYS))[f"keys {section}"]
    found: dict[str, tuple[int, ...] | None] = {}
    for line in content.splitlines():
        pattern, _, shape = line.partition(" ")
        for name in expand(pattern, counts):
            assert name not in found, f"{name} is listed twice"
            found[name] = tuple(eval(shape, {}, symbols)) if shape else None
    return found


def compare(documented: dict[str, tuple[int, ...] | None], module: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert documented.keys() == shapes.keys(), documented.keys() ^ shapes.keys()
    wrong = {name: shapes[name] for name, shape in documented.items() if shape is not None and shape != shapes[name]}
    assert not wrong


def sections_of(c: ModelConfig) -> list[str]:
    audio = [f"audio-{c.audio.kind}"] if c.audio and not c.s2v else []
    if c.audio and c.audio.kind in ("tokens", "window"):
        audio.insert(0, "audio")
    audio += ["s2v"] if c.s2v else []
    return ["base", *["text"][: c.text_dim], *["image"][: c.image_dim], *audio, *(["face"] if c.face else [])]


def symbols_of(c: ModelConfig) -> dict[str, int]:
    s = {"D": c.dim, "F": c.ffn_dim, "C": c.in_channels, "Z": c.out_channels, "p": c.patch[0], "q": c.patch[1]}
    s |= {"T": c.freq_dim, "X": c.text_dim, "I": c.image_dim}
    if c.audio:
        s |= {"A": c.audio.features, "W": c.audio.width, "K": c.audio.window, "n": c.audio.tokens}
        s |= {"G": c.audio.features // c.audio.columns, "S": c.audio.channels, "k": c.audio.columns // 2 + 4}
        s |= {"V": c.audio.readings, "H": c.audio.frames_read * c.audio.told}
    if c.s2v and c.audio:
        s |= {"O": c.s2v.audio_layers, "U": c.audio.features // c.s2v.audio_layers}
    if c.face:
        s |= {"E": c.face.features, "R": c.face.dim, "Q": c.face.queries, "Y": c.face.width}
    return s


@pytest.mark.parametrize("name", MODELS)
def test_transformer_keys(name: str) -> None:
    config = MODELS[name]
    counts = {"N": config.layers, "M": config.face.depth if config.face else 0}
    counts["I"] = len(config.audio_layers)
    counts["L"] = len(config.audio.dilations) if config.audio else 0
    counts["J"] = len(config.s2v.inject_layers) if config.s2v else 0
    parts = [listed(section, counts, symbols_of(config)) for section in sections_of(config)]
    compare({k: shape for part in parts for k, shape in part.items()}, on_meta(build_model, config))


@pytest.mark.parametrize(
    ("section", "make"),
    [
        ("wan-vae", lambda: WanVAE(WanVAEConfig())),
        ("tiny", lambda: LightAutoencoder(AUTOENCODERS["tiny"])),
        ("taew2_1", lambda: LightAutoencoder(AUTOENCODERS["taew2_1"])),
        ("taew2_1", lambda: LightAutoencoder(AUTOENCODERS["taew2_2"])),
    ],
)
def test_autoencoder_keys(section: str, make) -> None:
    compare(listed(section, {}, {}), on_meta(make))


def test_counts() -> None:
    """Every row `name | tensors | parameters`, in the order of the document: transformers, then autoencoders."""
    table = [(r[0].strip("`"), r[1], r[2]) for r in rows(KEYS) if len(r) == 4 and r[1].isdigit()]
    modules = [
        *((n, lambda c=c: build_model(c)) for n, c in MODELS.items()),
        ("wan-vae", lambda: WanVAE(WanVAEConfig())),
    ]
    modules += [(n, lambda c=c: LightAutoencoder(c)) for n, c in AUTOENCODERS.items()]
    true = set()
    for name, make in modules:
        sizes = [math.prod(t.shape) for t in on_meta(make).state_dict().values()]
        true.add((name, str(len(sizes)), f"{sum(sizes):,}"))
    assert set(table) == true and len(table) == len(true)


def test_face_resampler_count() -> None:
    sizes = [
        p.numel()
        for n, p in on_meta(build_model, MODELS["flash-1.3b"]).named_parameters()
        if n.startswith("face_proj.")
    ]
    assert f"{len(sizes)} tensors and {sum(sizes):,} parameters" in text_of(KEYS)


def test_families_are_listed() -> None:
    families = {r[0].strip("`") for r in rows(KEYS) if len(r) == 3}
    assert TRANSLATIONS.keys() - families <= {"joyavatar"}


# Metadata


def test_metadata_of_a_video_is_documented(tmp_path: Path) -> None:
    import av

    from joyavatar_core.media.writer import VideoWriter

    out = tmp_path / "v.mp4"
    options = {"source_fps": 16, "audio_rate": 16000, "audio_channels": 1, "settings": {"seed": "1"}}
    with VideoWriter(out, 64, 64, **options) as writer:
        writer.write(np.zeros((2, 64, 64, 3), np.uint8))
    with av.open(str(out)) as file:
        ours = file.metadata.keys() - {"major_brand", "minor_version", "compatible_brands", "encoder"}
    documented = set(re.findall(r"`(\w+)`", " ".join(r[0] for r in rows(KEYS) if len(r) == 2)))
    assert ours == documented
