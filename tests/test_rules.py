"""Design rules held by tests: who imports whom, how long a function may be, no print in core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "joyavatar_core"
FILES = sorted(CORE.rglob("*.py"))
LONGEST_FUNCTION = 80

# Layers of the engine from the bottom up: a file may import only from earlier rows (training and cli: from all).
LAYERS = [
    {"geometry", "samples", "schedule", "config", "attention", "types", "noise", "rope", "checkpoint", "known_weights"}
    | {"lora", "families", "kernels", "manner"},
    {"policy", "flow", "cache", "conditioning", "audio", "autoencoder", "wan_vae", "projectors", "overlap", "sinks"},
    {"model", "s2v", "captured", "fast", "eight_bits"}
    | {"wav2vec", "wav2vec_frames", "s2v_audio", "front_ends", "estimate"},
    {"rollout", "plain"},
    {"stream"},
    {"avatar", "generate", "measures", "media"},
    {"retake", "together", "view"},
    {"bench", "multi_gpu"},
    {"cli", "training"},
]
IO_LIBRARIES = {"av", "cv2", "PIL", "tqdm"}
LAZY = {"librosa", "cv2", "transformers", "scipy", "PIL", "matplotlib", "peft"}


def layer_of(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert len(found) == 1, f"{name} is in {len(found)} layers: give every file of core its place"
    return found[0]


def part_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path, top_level: bool = False) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    return [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]


def names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def core_parts_imported(path: Path) -> set[str]:
    """Parts of core that a file imports (relative imports resolved)."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(package[: len(package) - node.level + 1]) + (node.module.split(".") if node.module else [])
            targets = [base] if len(base) > 1 else [[*base, a.name] for a in node.names]
            found |= {t[1] for t in targets}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CORE)))
def test_imports_go_down_only_and_are_relative(path: Path) -> None:
    for node in imports(path):
        for name in names_of(node):
            top = name.split(".")[0]
            assert top not in {"comfy", "comfy_api", "nodes", "folder_paths", "server"}, f"{path}: imports the host"
            relative = isinstance(node, ast.ImportFrom) and node.level
            assert relative or top != "joyavatar_core", f"{path}: import core relatively"
    if path.name == "__init__.py" and path.parent == CORE:
        return
    mine = part_of(path)
    for other in core_parts_imported(path) - {mine, "__init__"}:
        assert layer_of(other) <= layer_of(mine), f"{mine} imports {other} from a layer above"
        assert other not in {"training", "cli"} or mine == "cli", f"{mine} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CORE)))
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    top = {n.split(".")[0] for node in imports(path, top_level=True) for n in names_of(node)}
    assert not top & LAZY, f"{path}: {top & LAZY} at module level"
    if part_of(path) not in {"media", "cli"}:
        assert not top & IO_LIBRARIES, f"{path}: {top & IO_LIBRARIES} outside the I/O layer"


def test_the_stream_never_touches_files_formats() -> None:
    for name in ("stream", "rollout", "model", "autoencoder", "wan_vae"):
        every = {n.split(".")[0] for node in imports(CORE / f"{name}.py") for n in names_of(node)}
        assert not every & IO_LIBRARIES


def functions() -> list[tuple[str, int]]:
    return [
        (f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1)
        for path in [*FILES, *sorted((ROOT / "nodes").rglob("*.py"))]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    ]


def test_functions_are_short() -> None:
    lengths = functions()
    assert not [f for f in lengths if f[1] > LONGEST_FUNCTION]
    assert median(n for _, n in lengths) <= 10


def test_no_print_in_core() -> None:
    for path in FILES:
        if part_of(path) == "cli":
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def test_every_module_says_what_it_is() -> None:
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert doc or path.read_text() == "", f"{path} has no docstring"
        uses_tensors = "from torch import Tensor" in path.read_text()
        assert not uses_tensors or "legend" in doc or part_of(path) in {"cli", "checkpoint"}, f"{path}: no shape legend"


def test_core_imports_without_the_optional_libraries() -> None:
    """The GPU machine that trains has no PyAV, librosa or OpenCV."""
    code = (
        "import sys\n"
        "for name in ('av', 'librosa', 'cv2', 'scipy', 'PIL', 'transformers', 'comfy'): sys.modules[name] = None\n"
        "import joyavatar_core.avatar, joyavatar_core.generate, joyavatar_core.wav2vec, joyavatar_core.plain\n"
        "import joyavatar_core.training.flow_matching, joyavatar_core.training.autoencoder, joyavatar_core.cli.bench\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_root_init_does_nothing_without_the_host() -> None:
    done = subprocess.run([sys.executable, "-c", "import runpy; runpy.run_path('__init__.py')"], cwd=ROOT)
    assert done.returncode == 0
