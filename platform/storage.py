"""Files that are either whole or not there, and leases that keep two owners of one name apart."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setwise.platform.errors import SetwiseError, StorageError

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""What the operating system says of a disk that is full, read-only, broken or gone."""


def root(explicit: str | Path | None = None) -> Path:
    """The folder that holds data, runs and studies: as given, or $SETWISE_STORE, or `.setwise` here."""
    folder = Path(explicit or os.environ.get("SETWISE_STORE") or ".setwise").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises StorageError where `folder` turns out not to be writable while the block runs."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise not_writable(folder, error.strerror) from error


def not_writable(folder: Path, said: str | None) -> StorageError:
    """What to tell where writing below `folder` failed."""
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB free"
    except OSError:
        free = "it does not answer"
    return StorageError(
        f"{folder}: cannot be written ({said}; {free}). What was whole before still is. Make room, or mount it again, "
        "and give the same command: it goes on"
    )


def check_writable(folder: Path) -> None:
    """Raises StorageError unless a file can be written in `folder` now."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".writable.", dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:  # also where it is somebody else's
        raise not_writable(folder, error.strerror) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content at once: a reader, or a crash, sees the old content or the new.

    Who may read it is for the user's umask to say, as of any file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@contextlib.contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    What a killed process of this machine left of an earlier attempt is removed. Of two that publish one name at once,
    both succeed, and one of the results stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.{os.uname().nodename}."
    for left in target.parent.glob(f"{prefix}*"):
        if not _is_alive(left.name.removeprefix(prefix).partition(".")[0]):
            shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}.", dir=target.parent))
    building.chmod(0o755)
    try:
        yield building
        for path in sorted(building.rglob("*")):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        for path in [*(p for p in building.rglob("*") if p.is_dir()), building]:
            sync_folder(path)
        while True:
            try:
                building.rename(target)
                break
            except OSError:
                if not target.is_dir():
                    raise
            old = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}.", dir=target.parent))
            with contextlib.suppress(FileNotFoundError):  # another may have moved it away
                target.rename(old / target.name)
            shutil.rmtree(old)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _is_alive(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


LOOK_S = 0.2  # longer than `lease_owner` keeps a lease from its next owner as it looks


class LeaseHeldError(SetwiseError):
    """Somebody else is at work under this name."""


@contextlib.contextmanager
def lease(path: Path, what: str, wait_s: float = 0) -> Iterator[None]:
    """Own `what` while the block runs.

    A lock of the operating system on an open file: it ends with its process, however that dies, so none is ever stale.

    Args:
        wait_s: how long to wait for an owner to end, in seconds.

    Raises:
        LeaseHeldError: another live process owns it; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        deadline = time.monotonic() + max(wait_s, LOOK_S)
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    stream.seek(0)
                    owner = stream.read().strip() or "an unknown process"
                    raise LeaseHeldError(f"{what} is in use by {owner}. Wait for it, or stop it.") from None
            time.sleep(0.05)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {os.uname().nodename}")
        stream.flush()
        yield


def lease_owner(path: Path) -> str | None:
    """Who owns a lease now, in words; None if nobody does."""
    if not path.is_file():
        return None
    with path.open("r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "an unknown process"
    return None
