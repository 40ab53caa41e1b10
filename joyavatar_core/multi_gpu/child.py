"""A run of several processes as another program's child: how it is asked for, followed and stopped.

A host with a life of its own (ComfyUI) must not become a rank: its process keeps its threads, its models and its CUDA
context to itself. So it starts the command line, `joyavatar generate --gpus N --child FILE`, is told of every block on
that process's standard output, a JSON object a line, and stops it by closing its standard input; which is also what
happens when the host is killed.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import config_from_json, config_to_json
from ..generate import Progress
from ..policy import RolloutPolicy
from .launcher import GRACE

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
_POLL = 0.1
_SAYS = "joyavatar: "
"""How the command line begins the one line of an error."""


@dataclass(frozen=True)
class Asked:
    """What the options of the command line have no words for.

    settings, tags, writer (crf, preset): of the file, see VideoWriter.
    """

    policy: RolloutPolicy
    settings: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    writer: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """For `--child`."""
        value = {"settings": self.settings, "tags": self.tags, "writer": self.writer}
        path.write_text(json.dumps({**value, "policy": config_to_json(self.policy)}), encoding="utf-8")

    @staticmethod
    def read(path: str | Path) -> Asked:
        """Back from the file. ValueError, OSError if it is none."""
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        policy = config_from_json(RolloutPolicy, value["policy"])
        return Asked(policy, value["settings"], value["tags"], value["writer"])


# In the child


def tell(progress: Progress) -> None:
    """A line for the parent, after a block."""
    names = ("blocks", "frames", "blocks_total", "first_frame_s")
    sys.stdout.write(json.dumps({"told": {name: getattr(progress, name) for name in names}}) + "\n")
    sys.stdout.flush()


def stop_with_parent() -> None:
    """From now on the end of standard input is a Ctrl-C."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        _thread.interrupt_main()

    threading.Thread(target=wait, daemon=True).start()


# In the parent


def follow(words: Sequence[str], poll: Callable[[], None], on_block: Callable[[Mapping[str, Any]], None]) -> None:
    """Run `joyavatar WORDS` in a process of its own until it ends.

    Args:
        poll: called ten times a second; may raise to stop: the run then finishes its file with the frames so far.
        on_block: told of blocks, frames, blocks_total and first_frame_s after every block; may raise as well.
    Raises:
        ChildProcessError: the run failed; with the line it said.
    """
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from joyavatar_core.cli.main import main; sys.exit(main())"
    child = subprocess.Popen(  # not by -m: an embedded Python hears of no PYTHONPATH
        [sys.executable, "-c", code, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child, lines), name="joyavatar child", daemon=True)
    reader.start()
    try:
        said = _listen(lines, poll, on_block)
    finally:
        _end(child)
        reader.join(GRACE)
    if child.returncode:
        raise ChildProcessError(said or f"the processes of the run ended with status {child.returncode}: see the log")


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _listen(
    lines: queue.Queue[str | None], poll: Callable[[], None], on_block: Callable[[Mapping[str, Any]], None]
) -> str:
    """Until the child has said all; returns the line of its error, "" if there was none."""
    said = ""
    while True:
        poll()
        try:
            line = lines.get(timeout=_POLL)
        except queue.Empty:
            continue
        if line is None:
            return said
        if line.startswith('{"told": '):
            on_block(json.loads(line)["told"])
        elif line.startswith(_SAYS):
            said = line.removeprefix(_SAYS).strip()
        else:
            logger.info("%s", line.rstrip())


def _end(child: subprocess.Popen[str]) -> None:
    """Wait for its end, which the end of its input brings about; force it where that takes too long."""
    assert child.stdin
    with contextlib.suppress(OSError):
        child.stdin.close()
    try:
        child.wait(2 * GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
