"""A run's folder: its name is safe, its configuration never changes, and it knows the code it came from."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from setwise.platform import checkpoint, run, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.run import Run


@pytest.mark.parametrize("name", ["a", "0", "digits_cnn_bigru-000", "a.b-c_d", "x" * 80])
def test_names_that_are_safe_as_folders(name: str) -> None:
    assert run.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-flag", "_x", "a/b", "../a", "/a", "A", "a b", "a\n", "a\x00", "ä", "x" * 81, "a'b"],
)
def test_names_that_are_not(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run"):
        run.create(tmp_path / "runs", name, "a: 1\n", "e")
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_records_where_it_comes_from(tmp_path: Path) -> None:
    parent = run.create(tmp_path, "sweep", "s: 1\n", "study")
    made = run.create(tmp_path / "trials", "sweep-000", "a: é\n", "study", parent)
    assert made.config.read_text("utf-8") == "a: é\n"
    assert (made.experiment, made.name) == ("study", "sweep-000")
    assert made.parent == parent
    assert parent.parent is None
    environment = json.loads((made.folder / "environment.json").read_bytes())
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["python"].startswith("3.")


def test_the_same_configuration_opens_the_run_again_and_keeps_its_record(tmp_path: Path) -> None:
    first = run.create(tmp_path, "a", "x: 1\n", "e")
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    assert run.create(tmp_path, "a", "x: 1\n", "e") == first
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before


def test_another_configuration_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    made = run.create(tmp_path, "a", "x: 1\n", "e")
    with pytest.raises(ConfigError, match="'a' exists with another configuration"):
        run.create(tmp_path, "a", "x: 2\n", "e")
    assert made.config.read_text() == "x: 1\n"


def test_a_creation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    made = run.create(tmp_path, "a", "x: 1\n", "e")
    made.config.unlink()  # the last file to be written
    (made.folder / "run.json").write_text("")
    again = run.create(tmp_path, "a", "x: 2\n", "other")
    assert (again.config.read_text(), again.experiment) == ("x: 2\n", "other")


# --- the code it was trained with ---------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "checkout"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "code.py").write_text("one = 1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    state, difference = run.code_state(checkout / "inner")
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], check=True, capture_output=True).stdout
    assert state["commit"] == head.decode().strip()
    assert (state["dirty"], difference) == (False, b"")


def test_changed_code_is_kept_as_a_diff_that_applies(checkout: Path) -> None:
    (checkout / "inner" / "code.py").write_text("two = 2\n")
    state, difference = run.code_state(checkout / "inner")
    assert state["dirty"] is True
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), "apply"], input=difference, check=True)
    assert (checkout / "inner" / "code.py").read_text() == "two = 2\n"


def test_a_new_file_that_git_does_not_know_makes_the_code_differ(checkout: Path) -> None:
    """A run trained with a new, uncommitted module cannot be repeated from its commit, so it must not look clean."""
    (checkout / "inner" / "new_loss.py").write_text("three = 3\n")
    state, _ = run.code_state(checkout / "inner")
    assert state["dirty"] is True


def test_a_huge_difference_is_capped_and_says_so(checkout: Path) -> None:
    (checkout / "inner" / "code.py").write_text("x = 1\n" * 400_000)
    state, difference = run.code_state(checkout / "inner")
    assert len(difference) == run.MAX_DIFF_BYTES
    assert state["diff_bytes"] > run.MAX_DIFF_BYTES


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run.code_state(tmp_path) == ({"commit": None, "dirty": None}, b"")
    monkeypatch.setenv("PATH", "")
    assert run.code_state(tmp_path) == ({"commit": None, "dirty": None}, b"")


# --- events and the best ------------------------------------------------------------------------------------------


def test_events_are_read_in_order_and_broken_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert run.read_events(path) == []
    path.write_bytes(b'[{"a": 1}, {"b": "\xe2\x80\xa8"}]\n\nnull\n[1]\n\xff\xfe\n[{"c": 3}]\n[{"d": 4}, {"e": ')
    assert run.read_events(path) == [{"a": 1}, {"b": "\u2028"}, {"c": 3}]


def test_the_best_checkpoint_is_verified_before_it_is_given_out(tmp_path: Path) -> None:
    made = Run(tmp_path / "a")
    with pytest.raises(DataError, match="no checkpoint yet"):
        made.best_checkpoint()
    storage.write_json(made.folder / "best.json", {"checkpoint": "epoch_0002", "value": 1.0})
    with pytest.raises(DataError):
        made.best_checkpoint()
    folder = made.checkpoints / "epoch_0002"
    checkpoint.save(folder, {"w": torch.ones(2)}, {}, None)
    assert made.best_checkpoint() == folder
    (folder / checkpoint.METADATA).write_text("changed")
    with pytest.raises(DataError, match="damaged"):
        made.best_checkpoint()
