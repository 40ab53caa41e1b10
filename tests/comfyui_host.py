"""A real ComfyUI as a subprocess, with a copy of this pack in it: for tests, and for writing tests/golden/nodes.json.

    COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python python -m tests.comfyui_host --write-nodes

Only the standard library and psutil. The host runs on the CPU, in a base directory of its own, without other packs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
PACK = "ComfyUI-JoyAvatar"
GOLDEN = Path(__file__).parent / "golden" / "nodes.json"
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user")
START_SECONDS, POLL_SECONDS, HTTP_SECONDS = 300, 0.2, 60
FILE_LISTS = ("folder", "lora")
"""Inputs whose choices are what the disk holds; `model` holds the embedded one beside."""


class HostError(RuntimeError):
    """The host refused a prompt, a node failed, or the host itself is gone.

    node_id, node_type: of the node that failed. kind: the exception's type as the host names it. status: of HTTP.
    interrupted: the prompt was cancelled.
    """

    def __init__(
        self,
        message: str,
        *,
        node_id: str | None = None,
        node_type: str | None = None,
        kind: str | None = None,
        status: int | None = None,
        interrupted: bool = False,
    ) -> None:
        super().__init__(message)
        self.node_id, self.node_type, self.kind = node_id, node_type, kind
        self.status, self.interrupted = status, interrupted


class Host:
    """A ComfyUI that runs while the `with` block lasts.

    path: of ComfyUI; default COMFYUI_PATH. python: its interpreter; default COMFYUI_PYTHON, else this one.
    base: its base directory, made if missing; default a fresh temporary one, removed at the end. options: more words
    for its command line. environment: more variables.

    share: of one processor that the host got while it started, 1 at most; less on a machine that is busy otherwise.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        python: str | None = None,
        base: str | Path | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path or os.environ["COMFYUI_PATH"]).resolve()
        self.python = python or os.environ.get("COMFYUI_PYTHON") or sys.executable
        self._own_base = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="joyavatar-host-")).resolve()
        self.options, self.environment = list(options), dict(environment or {})
        self.log_file = self.base / "host.log"
        self.port = 0
        self.share = 1.0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Host:
        try:
            for name in FOLDERS:
                (self.base / name).mkdir(parents=True, exist_ok=True)
            copy_pack(self.base / "custom_nodes" / PACK)
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Life

    def start(self) -> None:
        """Start the process and wait until it answers. HostError, with the end of the log, if it does not."""
        if self.process is not None:
            raise HostError("the host runs already: use restart")
        self.port = _free_port()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.path,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )
        began = time.monotonic()
        while time.monotonic() < began + START_SECONDS:
            with contextlib.suppress(OSError, HostError):
                self.get("/system_stats")
                self.share = min(1.0, self._processor_seconds() / (time.monotonic() - began))
                return
            if self.process.poll() is not None:
                break
            time.sleep(POLL_SECONDS)
        code = self.process.poll()
        self.kill()
        raise HostError(f"the host did not start (exit status {code}):\n{self.log()[-4000:]}")

    def command(self) -> list[str]:
        """The command line; options that only some versions know are left out where they are unknown."""
        known = (self.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        database = self.base / "user" / "host.db"  # the older versions trip over a database in memory
        words = [self.python, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(self.base)]
        packs = sorted(path.name for path in (self.base / "custom_nodes").iterdir())
        words += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *packs, "--disable-api-nodes"]
        words += ["--disable-auto-launch", "--database-url", f"sqlite:///{database}"]
        words += [word for word in ("--disable-assets-autoscan",) if f'"{word}"' in known]
        return words + self.options

    def kill(self) -> None:
        """End the host at once, as a crash would: SIGKILL, its children too."""
        import psutil

        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait(timeout=30)

    def restart(self) -> None:
        """Kill the host and start it again with the same base directory: output, models and pack stay."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill the host; remove the base directory if it is ours."""
        self.kill()
        if self._own_base:
            shutil.rmtree(self.base, ignore_errors=True)

    # Facts

    def log(self) -> str:
        """All that the host has printed, restarts included."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def import_seconds(self) -> float:
        """What the host says the pack took to import, the last time. HostError if the import failed."""
        found = re.findall(rf"([\d.]+) seconds(.*?): .*{re.escape(PACK)}\s*$", self.log(), re.MULTILINE)
        if not found or found[-1][1]:
            raise HostError(f"the host did not import the pack:\n{self.log()[-4000:]}")
        return float(found[-1][0])

    def rss_bytes(self) -> int:
        """Memory of the process that is resident now."""
        import psutil

        if self.process is None:
            raise HostError("the host does not run")
        return psutil.Process(self.process.pid).memory_info().rss

    def _processor_seconds(self) -> float:
        import psutil

        assert self.process
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # Requests

    def get(self, path: str) -> Any:
        """JSON where the answer is JSON, else bytes. HostError for a status that is not 200."""
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, data: Any = None) -> Any:
        """As `get`, with a JSON body."""
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(self.url + path, json.dumps(data or {}).encode(), headers))

    def _ask(self, request: urllib.request.Request) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=HTTP_SECONDS) as answer:
                body, kind = answer.read(), answer.headers.get("Content-Type", "")
        except urllib.error.HTTPError as error:
            raise HostError(_refusal(request.full_url, error), status=error.code) from None
        return json.loads(body) if "json" in kind and body else body

    # Prompts

    def submit(self, prompt: Mapping[str, Any]) -> str:
        """Queue a prompt in API format; its id. HostError, in the host's words, if it is not valid."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        if answer.get("node_errors"):
            raise HostError(f"the prompt is not valid: {json.dumps(answer['node_errors'])}")
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """The history entry of a prompt, once it has ended.

        HostError with the message of the node that failed; `interrupted` is set for a cancelled one. A prompt that
        takes longer than `timeout` seconds is cancelled: TimeoutError.
        """
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if self.process is None or self.process.poll() is not None:
                raise HostError(f"the host has ended:\n{self.log()[-4000:]}")
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry.get("status"):
                return _succeeded(entry)
            time.sleep(POLL_SECONDS)
        self.interrupt()
        raise TimeoutError(f"the prompt was not done after {timeout:g} s:\n{self.log()[-2000:]}")

    def run(self, prompt: Mapping[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue a prompt and wait for its history entry; `outputs` of it are by node id. Raises as submit and wait."""
        return self.wait(self.submit(prompt), timeout)

    def interrupt(self) -> None:
        """What the Cancel button does."""
        self.post("/interrupt")

    def object_info(self) -> dict[str, Any]:
        """The host's description of this pack's nodes, by id."""
        found = self.get("/object_info")
        return {i: info for i, info in found.items() if info.get("python_module") == f"custom_nodes.{PACK}"}


def copy_pack(target: Path) -> None:
    """A copy of the working tree as a user would get it: what git tracks, and new files that it does not ignore."""
    shutil.rmtree(target, ignore_errors=True)
    for name in _files_of_pack():
        source = ROOT / name
        if source.is_file():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)


def _files_of_pack() -> list[str]:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    """What the host says when it refuses, with the reasons of the nodes."""
    body = error.read().decode(errors="replace")
    try:
        told = json.loads(body)
    except ValueError:
        return f"{url}: {error.code} {body[:500]}"
    if not isinstance(told, dict) or not isinstance(told.get("error"), dict):
        return f"{url}: {error.code} {body[:500]}"
    reasons = [told["error"].get("message", "")]
    for number, node in told.get("node_errors", {}).items():
        reasons += [f"{number} {node.get('class_type')}: {e['message']}: {e['details']}" for e in node["errors"]]
    return "; ".join(reasons)


def _succeeded(entry: dict[str, Any]) -> dict[str, Any]:
    """The history entry, unless it tells of a failure."""
    status = entry["status"]
    if status.get("status_str") == "success":
        return entry
    for event, detail in status.get("messages", ()):
        where = {"node_id": detail.get("node_id"), "node_type": detail.get("node_type")}
        if event == "execution_error":
            message = str(detail.get("exception_message", "")).strip()
            raise HostError(message, kind=detail.get("exception_type"), **where)
        if event == "execution_interrupted":
            raise HostError("the prompt was interrupted", interrupted=True, **where)
    raise HostError(f"the prompt failed: {json.dumps(status)[:1000]}")


# The table of nodes


def table_of(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """What workflows rely on, of each node: inputs and outputs in order, types, defaults, choices. No wording."""
    return {name: _node(object_info[name]) for name in sorted(object_info)}


def _node(info: Mapping[str, Any]) -> dict[str, Any]:
    lists = info.get("output_is_list") or [False] * len(info["output"])
    outputs = zip(info["output_name"], info["output"], lists, strict=True)
    return {
        "inputs": [
            _input(name, info["input"][group][name], group == "optional")
            for group in ("required", "optional")
            for name in info["input_order"].get(group, ())
        ],
        "outputs": [{"name": n, "type": t, **({"list": True} if many else {})} for n, t, many in outputs],
        "output_node": bool(info["output_node"]),
        "category": info["category"],
    }


def _input(name: str, given: Sequence[Any], optional: bool) -> dict[str, Any]:
    kind, options = given[0], (given[1] if len(given) > 1 else {}) or {}
    choices = kind if isinstance(kind, list) else options.get("options")
    found = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind}
    for key in ("default", "min", "max", "advanced", "control_after_generate"):
        if options.get(key) is not None and (options[key] is not False or key == "default"):
            found[key] = options[key]
    fixed = choices is not None and name not in FILE_LISTS
    return found | ({"choices": choices} if fixed else {}) | ({"optional": True} if optional else {})


def write_nodes(host: Host) -> None:
    """Write the table to tests/golden/nodes.json. HostError if a node in it has gone: users' workflows name it."""
    new = table_of(host.object_info())
    old = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if gone := sorted(old.keys() - new.keys()):
        raise HostError(f"{', '.join(gone)}: in {GOLDEN.name}, but not in the host; node ids stay for ever")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    logger.info("%s: %d nodes", GOLDEN, len(new))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.comfyui_host", description="A ComfyUI with this pack in it.")
    parser.add_argument("--write-nodes", action="store_true", required=True, help="write tests/golden/nodes.json")
    parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Host() as host:
        write_nodes(host)


if __name__ == "__main__":
    main()
