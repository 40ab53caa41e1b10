"""`joyavatar download`: weights of others, when asked for by name and with their licences accepted.

Nothing else in this project opens a connection. Address, size and hash come from the hub's own metadata; what arrives
is kept beside its place as `NAME.HASH.part`, so a broken transfer goes on where it stopped, and gets its name only when
size and hash are right. (huggingface_hub's own download begins anew after an interruption since its version 1.)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..known_weights import KNOWN, UNVERIFIED, WeightFile, licence_warning, with_needs

DEFAULT_FOLDER = "models"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it. hash: SHA-256, or SHA-1 as git has it for small files. size in bytes."""

    file: WeightFile
    url: str
    size: int
    hash: str

    def part(self, target: Path) -> Path:
        return target.with_name(f"{target.name}.{self.hash[:12]}.part")


def run(args: argparse.Namespace) -> int:
    """List what there is, or show the licences of a system, or fetch it. Exit status 2 without --accept-licence."""
    if args.profile is None:
        print("\n".join(f"{name:24s} {entry.what}" for name, entry in KNOWN.items()))
        return 0
    parts = with_needs(args.profile, args.comfyui)
    print("\n".join(_terms(parts)))
    if not args.accept_licence:
        print("nothing was fetched: read the licences, then add --accept-licence", file=sys.stderr)
        return 2
    for name, file in parts:
        if not file.repo:
            raise ValueError(f"{file.place} of {name} is not fetched by this program: {KNOWN[name].note}")
    fetch([file for _, file in parts], Path(args.to))
    return 0


def fetch(files: list[WeightFile], folder: Path) -> list[Path]:
    """Fetch files into folder/vae and the like; those that are there already are only checked.

    Raises ValueError where the hub has no such file or something else came, OSError for the network and the disk.
    """
    hub = _hub()
    remotes = [_remote(hub, file) for file in files]
    targets = [folder / remote.file.place for remote in remotes]
    missing = [pair for pair in zip(remotes, targets, strict=True) if not _is_there(*pair)]
    _check_room(missing, folder)
    for remote, target in missing:
        _fetch(hub, remote, target)
        print(f"{target}: {remote.size / 1e6:.1f} MB, hash as the hub says")
    return targets


def _terms(parts: list[tuple[str, WeightFile]]) -> Iterator[str]:
    """What would be fetched and under which licences."""
    for name in dict.fromkeys(name for name, _ in parts):
        yield f"{name}: {KNOWN[name].what}"
        for licence in KNOWN[name].licences:
            yield f"  licence {licence.name}; read in {licence.read_in}" + (f"; {licence.note}" if licence.note else "")
        warning = licence_warning(name)
        yield from [f"  WARNING {warning}"] if warning else []
        for file in (file for part, file in parts if part == name):
            unsure = ", a name that could not be verified" if file.read_in == UNVERIFIED else ""
            yield f"  {file.place} from {file.repo or 'nowhere'}{unsure}"


# the hub


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("downloading needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _plain_errors(hub: ModuleType, file: WeightFile) -> Iterator[None]:
    """The hub's and the network's errors as one sentence."""
    errors = hub.errors
    where = f"{file.path} of {file.repo}"
    try:
        yield
    except errors.EntryNotFoundError:
        unsure = " (the name could not be verified when this was written)" if file.read_in == UNVERIFIED else ""
        raise ValueError(f"the hub has no {where}{unsure}: look at its page and put the file at {file.place}") from None
    except errors.GatedRepoError:
        raise ValueError(f"{where} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {file.repo}, or it is private: `hf auth login` if it is") from None
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise  # of the disk
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise OSError(
            f"cannot fetch {where} ({reason}): check the network and run the same command again; what has come is kept"
        ) from None


def _remote(hub: ModuleType, file: WeightFile) -> Remote:
    """Address, size and hash from the hub. ValueError where it tells none."""
    url = hub.hf_hub_url(file.repo, file.path, endpoint=_endpoint())
    with _plain_errors(hub, file):
        metadata = hub.get_hf_file_metadata(url)
    digest = metadata.etag or ""
    if metadata.size is None or len(digest) not in (40, 64) or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"the hub gives no size and hash of {file.path} of {file.repo}: fetch it by hand")
    return Remote(file, url, metadata.size, digest)


# the disk


def _is_there(remote: Remote, target: Path) -> bool:
    """Whether the very file is in its place. ValueError for another one."""
    if not target.exists():
        return False
    if target.stat().st_size != remote.size or _digest(target, remote) != remote.hash:
        raise ValueError(f"{target} is another file than the hub's: move it away, or use --to with another folder")
    print(f"{target}: there already")
    return True


def _check_room(missing: list[tuple[Remote, Path]], folder: Path) -> None:
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    kept = sum(part.stat().st_size for r, target in missing if (part := r.part(target)).exists())
    needed, free = sum(r.size for r, _ in missing) - kept, shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(f"{needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free at {place}: make room or use --to")


def _fetch(hub: ModuleType, remote: Remote, target: Path) -> None:
    """Fetch what is missing of a file, check it and give it its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = remote.part(target)
    if part.exists() and part.stat().st_size > remote.size:
        part.unlink()
    with part.open("ab") as out, _plain_errors(hub, remote.file):
        have = out.tell()
        if have:
            print(f"{target}: going on after {have / 1e6:.1f} MB")
        if have < remote.size:
            _transfer(hub, remote, out, have)
    if part.stat().st_size != remote.size or _digest(part, remote) != remote.hash:
        part.unlink()
        raise ValueError(
            f"{target.name} came, but is not what the hub describes: it was removed; run the command again"
        )
    os.replace(part, target)
    for old in target.parent.glob(f"{target.name}.*.part"):  # of an older version on the hub
        old.unlink()


def _transfer(hub: ModuleType, remote: Remote, out: Any, have: int) -> None:
    """Bytes from `have` on, appended. A server that does not go on but begins anew is followed."""
    headers = hub.utils.build_hf_headers()
    hub.file_download.http_get(
        remote.url,
        out,
        resume_size=have,
        headers=headers,
        expected_size=remote.size,
        displayed_filename=remote.file.name,
    )


def _digest(path: Path, remote: Remote) -> str:
    """The file's hash of the hub's kind: SHA-256 of the content, or git's SHA-1 of a blob."""
    git = len(remote.hash) == 40
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
