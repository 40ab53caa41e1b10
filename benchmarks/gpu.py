"""All figures of docs/performance.md that need a GPU, in one command; each part is a process of its own.

    python benchmarks/gpu.py --out results --minutes 9

Needs torch with CUDA, numpy, einops and safetensors; PyAV, librosa and transformers where present. No network, no
weights. `gpu.json` is written after every part, so that a run that is stopped leaves what it has. Parts that no time
is left for are named in it; --only takes them up again and adds to the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 5.0  # no part is begun with less left
_BENCH = ("-m", "joyavatar_core.cli.main", "bench", "--json", "--config")

JOBS: dict[str, tuple[str, ...]] = {  # what must be right before all else, then the most wanted first
    "fast path against eager": ("benchmarks/kernels.py", "--config", "flash-1.3b"),
    "1.3B 512x512": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "32", "--wan-vae", "--baseline"),
    "1.3B 480x832": (*_BENCH, "flash-1.3b", "--size", "480x832", "--blocks", "24", "--wan-vae", "--baseline"),
    "1.3B 512x512 fast": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "32", "--fast"),
    "1.3B 480x832 fast": (*_BENCH, "flash-1.3b", "--size", "480x832", "--blocks", "24", "--fast"),
    "1.3B 512x512 fast fp8": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "16", "--fast", "--fp8", "both"),
    "1.3B 512x512 no kernels": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "16", "--kernels", "never"),
    "14B 384x704": (*_BENCH, "teacher-14b", "--size", "384x704", "--blocks", "16", "--wan-vae"),
    "optimisations 1.3B 512x512": ("benchmarks/optimisations.py", "--config", "flash-1.3b", "--size", "512x512"),
    "embedded 256x256": (*_BENCH, "tiny", "--blocks", "60", "--baseline"),
    "1.3B 512x512, one stage after another": (
        *_BENCH,
        "flash-1.3b",
        "--size",
        "512x512",
        "--blocks",
        "32",
        "--overlap",
        "off",
    ),
    "1.3B 512x512, 2 avatars": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "16", "--batch", "2"),
    "1.3B 512x512, 4 avatars": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "16", "--batch", "4"),
    "plan, tried under caps": ("-m", "joyavatar_core.cli.main", "bench", "--plan", "--json"),
    "1.3B 512x512, 600 blocks": (*_BENCH, "flash-1.3b", "--size", "512x512", "--blocks", "8", "--soak", "600"),
}
"""Name of a part -> words for Python."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if all that were begun ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks", metavar="DIR", help="folder of gpu.json (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part runs beyond this (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(JOBS), metavar="PART", help=f"of: {', '.join(JOBS)}")
    args = parser.parse_args(words)
    path = Path(args.out) / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(path.read_text()) if args.only and path.exists() else {"machine": machine()}
    end = time.monotonic() + 60 * args.minutes
    good = True
    for name in args.only or JOBS:
        found[name] = part(JOBS[name], end - time.monotonic())
        path.write_text(json.dumps(found, indent=1) + "\n")
        good &= "failed" not in found[name]
        print(f"{name}: {summary(found[name])}", flush=True)
    return 0 if good else 1


def part(words: Sequence[str], seconds: float) -> dict[str, Any]:
    """The JSON of a part's last line; or why there is none."""
    if seconds < LEAST_SECONDS:
        return {"left out": "no time was left"}
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-8:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(figures: dict[str, Any]) -> str:
    """The figures that are asked for first."""
    wanted = ("dit_fps", "end_to_end_fps", "first_frame_s", "share_of_products", "share_of_all", "dit_speedup")
    names = [n for n in (*wanted, "failed", "left out") if n in figures]
    said = [f"{n} {figures[n]}" for n in names]
    said += [f"together {n} {figures['together'][n]}" for n in wanted[:3] if "together" in figures]
    return ", ".join(said) or "done"


def machine() -> dict[str, str]:
    """What this is, in words."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        gpu = ""
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=False
    )
    return {"gpu": gpu or "none", "torch": torch.stdout.strip(), "python": sys.version.split()[0]}


if __name__ == "__main__":
    sys.exit(main())
