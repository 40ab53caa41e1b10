"""`joyavatar download` against a hub on this machine: licences first, broken transfers go on, all or nothing."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from joyavatar_core.cli import download
from joyavatar_core.known_weights import KNOWN

hub = pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).parent.parent
TAEHV = KNOWN["taehv"].files[0]
LARGE = 25_000_000  # huggingface_hub hands on 10 MB at a time


@cache
def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


class Hub(http.server.ThreadingHTTPServer):
    """What of the hub's protocol a download needs. files: by their path `REPO/PATH`.

    cut: GETs end after so many bytes. down: GETs are answered with 503. wrong: bytes that are sent instead.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.small: set[str] = set()
        self.cut: int | None = None
        self.down = self.wrong = self.stall = False
        self.released = threading.Event()
        self.asked: list[tuple[str, str, str | None]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, name = self.server, self.path.lstrip("/").replace("resolve/main/", "")
        hub.asked.append((self.command, name, self.headers.get("Range")))
        data = hub.files.get(name)
        if data is None:
            return self.short(404, {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET" and hub.down:
            return self.short(503, {})
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]) or 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Size", str(len(data)))
        if name in hub.small:
            self.send_header("ETag", f'"{hashlib.sha1(b"blob %d" % len(data) + bytes(1) + data).hexdigest()}"')
        else:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.send(bytes(len(data)) if hub.wrong else data, start)
        return None

    def send(self, data: bytes, start: int) -> None:
        hub = self.server
        self.wfile.write(data[start : hub.cut])
        self.wfile.flush()
        if hub.stall:
            hub.released.wait(60)
        if hub.cut is not None:
            hub.down = True
            self.close_connection = True

    def short(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        made.files = {f"{TAEHV.repo}/{TAEHV.path}": content(LARGE)}
        yield made
        made.released.set()
        made.shutdown()


def run(profile: str | None, to: Path, accept: bool = True, comfyui: bool = False) -> int:
    return download.run(argparse.Namespace(profile=profile, to=str(to), accept_licence=accept, comfyui=comfyui))


def gets(server: Hub) -> list[str | None]:
    """Ranges of the GETs."""
    return [given for kind, _, given in server.asked if kind == "GET"]


# what is shown


def test_without_a_name_the_systems_are_listed(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(None, tmp_path) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in KNOWN) and not server.asked


def test_licences_come_first(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("livetalk", tmp_path, accept=False) == 2
    said = capsys.readouterr()
    assert "CC BY-NC-SA 4.0" in said.out and "WARNING The licence of livetalk contradicts itself" in said.out
    assert "wan-vae" in said.out and "--accept-licence" in said.err
    assert not server.asked and not list(tmp_path.iterdir())


def test_unverified_names_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("avatarforcing", tmp_path, accept=False)
    assert "lycui/AvatarForcing, a name that could not be verified" in capsys.readouterr().out


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'nonsense' is not known; known are joyavatar-flash, self-forcing"):
        run("nonsense", Path("."))


@pytest.mark.parametrize("name", ["joyavatar-flash", "arcface"])
def test_what_cannot_be_fetched(server: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"of {name} is not fetched by this program: "):
        run(name, tmp_path)
    assert not server.asked


# fetching


def test_fetched_checked_and_named(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("taehv", tmp_path) == 0
    target = tmp_path / "vae_approx" / "taew2_1.safetensors"
    assert target.read_bytes() == content(LARGE) and [p.name for p in target.parent.iterdir()] == [target.name]
    assert "25.0 MB, hash as the hub says" in capsys.readouterr().out
    server.asked.clear()
    assert run("taehv", tmp_path) == 0 and not gets(server)
    assert "there already" in capsys.readouterr().out


def test_small_files_have_gits_hash(server: Hub, tmp_path: Path) -> None:
    files = KNOWN["wav2vec2-base"].files
    server.files = {f"{f.repo}/{f.path}": content(1000 + i, i) for i, f in enumerate(files)}
    server.small = {f"{f.repo}/{f.path}" for f in files[:2]}
    assert run("wav2vec2-base", tmp_path) == 0
    folder = tmp_path / "audio_encoders" / "wav2vec2-base-960h"
    assert {p.name: p.stat().st_size for p in folder.iterdir()} == {
        "config.json": 1000, "preprocessor_config.json": 1001, "model.safetensors": 1002
    }  # fmt: skip


def test_a_system_brings_what_it_needs(server: Hub, tmp_path: Path) -> None:
    needed = ("self-forcing", "wan-vae", "umt5-comfyui")
    server.files = {f"{f.repo}/{f.path}": content(100, i) for i, n in enumerate(needed) for f in KNOWN[n].files}
    assert run("self-forcing", tmp_path, comfyui=True) == 0
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "diffusion_models/self_forcing_dmd.pt",
        "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        "vae/wan_2.1_vae.safetensors",
    ]


def test_a_broken_transfer_goes_on(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    server.cut = 15_000_000
    with pytest.raises(OSError, match=r"cannot fetch taew2_1.safetensors of .*; what has come is kept") as caught:
        run("taehv", tmp_path)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "vae_approx"
    (part,) = folder.iterdir()
    have = part.stat().st_size
    assert part.name.endswith(".part") and 0 < have <= 15_000_000
    assert part.read_bytes() == content(LARGE)[:have]
    server.cut, server.down = None, False
    server.asked.clear()
    assert run("taehv", tmp_path) == 0
    assert gets(server)[0] == f"bytes={have}-"
    assert [p.read_bytes() for p in folder.iterdir()] == [content(LARGE)]
    assert "going on after" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_download_goes_on(server: Hub, tmp_path: Path) -> None:
    server.cut, server.stall = 15_000_000, True
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from argparse import Namespace as N\n"
    code += "from joyavatar_core.cli.download import run\n"
    code += f"run(N(profile='taehv', to={str(tmp_path)!r}, accept_licence=True, comfyui=False))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        folder, until = tmp_path / "vae_approx", time.monotonic() + 90
        while not (parts := [p for p in folder.glob("*.part") if p.stat().st_size]):
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.1)
        child.kill()
    have = parts[0].stat().st_size
    assert not (folder / TAEHV.name).exists()
    server.cut, server.stall, server.down = None, False, False
    server.asked.clear()
    assert run("taehv", tmp_path) == 0 and gets(server)[0] == f"bytes={have}-"
    assert (folder / TAEHV.name).read_bytes() == content(LARGE)


def test_a_newer_version_on_the_hub_is_not_mixed_with_the_old(server: Hub, tmp_path: Path) -> None:
    server.cut = 15_000_000
    with pytest.raises(OSError, match="cannot fetch"):
        run("taehv", tmp_path)
    server.files = {name: content(LARGE, 1) for name in server.files}
    server.cut, server.down = None, False
    assert run("taehv", tmp_path) == 0
    assert [p.read_bytes() for p in (tmp_path / "vae_approx").iterdir()] == [content(LARGE, 1)]


def test_other_bytes_than_promised_are_not_kept(server: Hub, tmp_path: Path) -> None:
    server.wrong = True
    with pytest.raises(ValueError, match="is not what the hub describes: it was removed"):
        run("taehv", tmp_path)
    assert not list((tmp_path / "vae_approx").iterdir())


def test_another_file_in_the_place_is_left_alone(server: Hub, tmp_path: Path) -> None:
    place = tmp_path / TAEHV.place
    place.parent.mkdir()
    place.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is another file than the hub's: move it away"):
        run("taehv", tmp_path)
    assert place.read_bytes() == b"mine" and not gets(server)


def test_a_name_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    server.files = {}
    with pytest.raises(ValueError, match=r"the hub has no taew2_1.safetensors of .*put the file at vae_approx/taew2_1"):
        run("taehv", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_room(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: argparse.Namespace(free=10**7))
    with pytest.raises(ValueError, match=r"0.0 GB to fetch, 0.0 GB free at .*make room or use --to"):
        run("taehv", tmp_path)
    assert not gets(server)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"cannot fetch taew2_1.safetensors .*check the network") as caught:
        run("taehv", tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        run("taehv", tmp_path)
