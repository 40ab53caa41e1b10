"""What ComfyUI-Manager and the registry read from the source, without running it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator

from .comfyui_host import GOLDEN, ROOT


def ids_in_schemas() -> Iterator[str]:
    """The node ids that stand as words in the `define_schema` of a class: how ComfyUI-Manager finds nodes."""
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for scheme in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(scheme, ast.FunctionDef) and scheme.name == "define_schema"):
                continue
            for word in ast.walk(scheme):
                if isinstance(word, ast.keyword) and word.arg == "node_id" and isinstance(word.value, ast.Constant):
                    yield word.value.value


def test_every_node_id_can_be_read_from_the_source() -> None:
    """A node that the scanner misses is never offered to somebody whose workflow lacks it."""
    assert sorted(ids_in_schemas()) == sorted(json.loads(GOLDEN.read_text(encoding="utf-8")))


def test_requirements_are_names_only() -> None:
    """They are installed line by line beside what the host has; a pin could take the host's own version away."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    assert names and all(re.fullmatch(r"[a-z][a-z0-9-]*", name) for name in names)
    assert not {"torch", "torchvision", "torchaudio"} & set(names)
