"""`joyavatar doctor`: what is installed, what is missing, how fast this machine is, which weights lie in folders."""

from __future__ import annotations

import argparse
import importlib
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..known_weights import KNOWN, found, licence_warning, recognised

NEEDED = {
    "torch": "the engine",
    "safetensors": "weights",
    "einops": "the engine",
    "numpy": "sound and pictures",
    "librosa": "the mel filterbank",
    "scipy": "resampling",
    "cv2": "pictures (opencv-python, -headless or -contrib)",
    "PIL": "reading pictures (pillow)",
    "av": "video and sound files (PyAV)",
    "transformers": "wav2vec2 and the text encoder of full-size models",
}
_WEIGHTS = {".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".onnx"}


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit status 1 if something needed is missing.

    args.models: folders laid out as ComfyUI's models, to look for weights in. ValueError for one that is none.
    """
    folders = [Path(folder) for folder in getattr(args, "models", None) or ()]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"--models {folder}: no such folder; give ComfyUI's models folder, or one laid out like it"
            )
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    missing = []
    for line, ok in _packages():
        print(line)
        missing += [] if ok else [line]
    if not missing:
        print("\n".join(_machine()))
    print("\n".join(_weights(folders)))
    print("ready" if not missing else f"{len(missing)} missing: pip install -e . brings them")
    return 1 if missing else 0


def _packages() -> Iterator[tuple[str, bool]]:
    for name, purpose in NEEDED.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield f"missing  {name:13s} {purpose} ({error})", False
        else:
            yield f"ok       {name:13s} {vars(module).get('__version__', '')}", True


def _machine() -> Iterator[str]:
    import torch

    from ..avatar import EMBEDDED_FILES, default_dtype, load_embedded

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    yield f"device   {device} ({name}), precision {default_dtype(torch.device(device))}"
    for dtype in (torch.float32, torch.bfloat16):
        yield f"speed    {str(dtype).removeprefix('torch.'):9s} {_gflops(device, dtype):8.0f} GFLOP/s"
    avatar = load_embedded(device)
    millions = sum(p.numel() for p in avatar.model.parameters()) / 1e6
    yield f"model    {', '.join(EMBEDDED_FILES.values())}: {millions:.1f} M parameters in the transformer"


def _weights(folders: Sequence[Path]) -> Iterator[str]:
    """Systems and parts, and which of their files are there; then files that look like one of them by their names."""
    if not folders:
        yield "weights  not looked for: give --models FOLDER (ComfyUI's models); joyavatar download lists what there is"
        return
    seen: set[Path] = set()
    for name, entry in KNOWN.items():
        places = found(name, folders)
        here = [place for _, place in places if place]
        seen.update(here)
        state = "found" if len(here) == len(places) else "partly" if here else "none"
        yield f"weights  {state:6s} {name:24s} {'; '.join(map(str, here)) or entry.what}"
        if here:
            yield from (f"                missing {file.place}" for file, place in places if not place)
            yield from [f"                {warning}"] if (warning := licence_warning(name)) else []
    yield from _alike(folders, seen)


def _alike(folders: Sequence[Path], seen: set[Path]) -> Iterator[str]:
    """Files of other names that begin like one of the table, e.g. made smaller by somebody."""
    for folder in folders:
        for place in sorted(p for p in folder.rglob("*") if p.suffix in _WEIGHTS and p not in seen and p.is_file()):
            if name := recognised(place):
                yield f"weights  alike  {name:24s} {place} {licence_warning(name)}".rstrip()


def _gflops(device: str, dtype: object, n: int = 1024, seconds: float = 0.3) -> float:
    import torch

    a = torch.randn(n, n, device=device).to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    count, start = 0, time.perf_counter()
    (a @ a).sum().item()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        (a @ a).sum().item()
        count += 1
    return count * 2 * n**3 / (time.perf_counter() - start) / 1e9
