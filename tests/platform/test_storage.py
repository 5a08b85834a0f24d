"""Files are whole or not there, and a name has one owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from setwise.platform import storage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- one file ---------------------------------------------------------------------------------------------------


def test_bytes_are_written_replaced_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    storage.write_bytes(path, b"one")
    storage.write_bytes(path, b"two" * 10_000)
    assert path.read_bytes() == b"two" * 10_000
    assert names(path.parent) == ["file"]


def test_a_reader_sees_the_old_content_or_the_new_and_never_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {bytes([letter]) * 200_000 for letter in b"abc"}
    storage.write_bytes(path, min(contents))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write_bytes(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [path.read_bytes() for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert set(seen) <= contents


def test_a_write_that_fails_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    storage.write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "é\n"], "a": {"nested": True}}
    storage.write_json(tmp_path / "file.json", value)
    assert storage.read_json(tmp_path / "file.json") == value


# --- a folder ---------------------------------------------------------------------------------------------------


def publish(target: Path, **files: str) -> None:
    with storage.publish_folder(target) as building:
        for name, text in files.items():
            (building / name).write_text(text)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with storage.publish_folder(target) as building:
        (building / "inner").mkdir()
        (building / "inner" / "file").write_text("x")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "x"
    assert names(target.parent) == ["target"]


def test_a_folder_replaces_all_of_the_one_before_it(tmp_path: Path) -> None:
    publish(tmp_path / "target", old="1", both="1")
    publish(tmp_path / "target", new="2", both="2")
    assert names(tmp_path / "target") == ["both", "new"]
    assert (tmp_path / "target" / "both").read_text() == "2"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    publish(tmp_path / "target", old="1")
    with pytest.raises(error), storage.publish_folder(tmp_path / "target") as building:
        (building / "new").write_text("2")
        raise error
    assert names(tmp_path / "target") == ["old"]
    assert names(tmp_path) == ["target"]


def test_what_a_killed_attempt_left_does_not_get_into_the_next(tmp_path: Path) -> None:
    with storage.publish_folder(tmp_path / "target") as building:
        left = building.name.replace(f".{os.getpid()}.", ".4999999.")  # above every process id there can be
    (tmp_path / left).mkdir()
    (tmp_path / left / "stale").write_text("half")
    publish(tmp_path / "target", new="2")
    assert names(tmp_path / "target") == ["new"]
    assert names(tmp_path) == ["target"]


def test_two_who_publish_one_folder_at_once_both_succeed(tmp_path: Path) -> None:
    """As two searches do that fill the same index."""
    both_inside = threading.Barrier(2)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with storage.publish_folder(tmp_path / "target") as building:
                (building / "one").write_text("1")
                both_inside.wait(10)
                (building / "two").write_text("2")
        except (OSError, threading.BrokenBarrierError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path / "target") == ["one", "two"]


# --- leases -----------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from setwise.platform import storage
with storage.lease(Path(sys.argv[1]), "the study"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns `tmp_path / lease` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lease")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lease_has_one_owner_among_processes_and_names_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(storage.LeaseHeldError, match=rf"the study is in use by process {holder.pid} on "),
        storage.lease(tmp_path / "lease", "the study"),
    ):
        pass
    holder.communicate("")
    with storage.lease(tmp_path / "lease", "the study"):
        pass


def test_a_killed_owner_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with (
        storage.lease(tmp_path / "lease", "the study"),
        pytest.raises(storage.LeaseHeldError, match=rf"process {os.getpid()} "),
        storage.lease(tmp_path / "lease", "the study"),
    ):
        pass


def test_a_lease_ends_with_its_block_even_by_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="inside"), storage.lease(tmp_path / "a" / "lease", "x"):
            raise ValueError("inside")


def test_who_looks_at_the_owner_of_a_lease_is_none(tmp_path: Path) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            storage.lease_owner(tmp_path / "lease")
            time.sleep(0.0002)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(3000):
            with storage.lease(tmp_path / "lease", "x"):
                pass
    finally:
        done.set()
        watcher.join()


def test_leases_of_two_names_do_not_meet(tmp_path: Path) -> None:
    with storage.lease(tmp_path / "one", "one"), storage.lease(tmp_path / "two", "two"):
        pass


# --- identities -------------------------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_the_value_and_on_nothing_else() -> None:
    value = {"b": [1, 2.5, "é"], "a": None}
    assert storage.fingerprint(value) == storage.fingerprint(json.loads(json.dumps({"a": None, "b": [1, 2.5, "é"]})))
    others = [{"b": [1, 2.5, "e"], "a": None}, {"b": [2.5, 1, "é"], "a": None}, {"b": [1, 2.5, "é"]}, [], {}, "", None]
    assert len({storage.fingerprint(other) for other in (value, *others)}) == 1 + len(others)


def test_fingerprints_are_those_of_earlier_versions() -> None:
    """They name runs, indices and protocols on disk: another algorithm would orphan all of them."""
    assert storage.fingerprint({"b": [1, 2.5, "é"], "a": None}) == "d4e7b7ea1f785bca"
    assert storage.fingerprint([]) == "4f53cda18c2baa0c"


def test_the_store_is_where_it_was_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SETWISE_STORE", raising=False)
    assert storage.root() == tmp_path / ".setwise"
    monkeypatch.setenv("SETWISE_STORE", str(tmp_path / "from the environment"))
    assert storage.root() == tmp_path / "from the environment"
    assert storage.root("given") == tmp_path / "given"
    assert storage.root().is_dir()
