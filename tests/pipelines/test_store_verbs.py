"""`setwise store`: what is where, sending what is missing, fetching by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from servers import S3Server, s3_server
from setwise.pipelines import store_verbs
from setwise.platform import checkpoint, run, storage
from setwise.platform.errors import ConfigError, DataError, SetwiseError, UnreachableError
from setwise.platform.run import Run

BUCKET = "setwise-tests"


def typed(*words: str) -> Any:
    return CliRunner().invoke(store_verbs.app, list(words))


def refusal(*words: str) -> SetwiseError:
    error = typed(*words).exception
    assert isinstance(error, SetwiseError), error
    return error


def listed(store: Path) -> dict[str, tuple[bool, bool]]:
    """What there is, by name: whether it is in the store, and in the mirror."""
    done = typed("ls", "--json", "--store", str(store))
    assert done.exit_code == 0, done.output
    return {one["name"]: (one["store"], one["mirror"]) for one in json.loads(done.stdout)["names"]}


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A store with the digits and two runs of two checkpoints, the first of which is the best."""
    shutil.copytree(store / "data" / "digits" / "prepared", tmp_path / "own" / "data" / "digits" / "prepared")
    for name in ("a", "b"):
        made = run.create(tmp_path / "own" / "runs", name, f"name: {name}\n", "experiment")
        for number in (1, 2):
            checkpoint.save(made.checkpoints / f"epoch_000{number}", {"w": torch.ones(3)}, {}, {"step": number})
        storage.write_json(made.folder / "best.json", {"checkpoint": "epoch_0001"})
    return tmp_path / "own"


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SETWISE_MIRROR", (tmp_path / "far").as_uri())
    return tmp_path / "far"


@pytest.mark.usefixtures("far")
def test_all_is_sent_and_fetched_by_name(own: Path, tmp_path: Path) -> None:
    assert listed(own) == dict.fromkeys(("data/digits", "runs/a", "runs/b"), (True, False))
    assert typed("push", "--store", str(own)).exit_code == 0
    assert listed(own) == dict.fromkeys(("data/digits", "runs/a", "runs/b"), (True, True))
    fresh = tmp_path / "fresh"
    for name in ("data/digits", "runs/a"):
        done = typed("pull", name, "--store", str(fresh))
        assert done.exit_code == 0, done.output
    assert listed(fresh) == {"data/digits": (True, True), "runs/a": (True, True), "runs/b": (False, True)}
    pulled = Run(fresh / "runs" / "a")
    assert pulled.best_checkpoint().name == "epoch_0001"
    assert checkpoint.newest(pulled.checkpoints) == pulled.checkpoints / "epoch_0002"
    assert pulled.config.read_text() == "name: a\n"


@pytest.mark.usefixtures("far")
def test_one_is_sent_by_name_and_removed_from_the_mirror_alone(own: Path) -> None:
    assert typed("push", "runs/b", "--store", str(own)).exit_code == 0
    assert listed(own)["runs/a"] == (True, False) and listed(own)["runs/b"] == (True, True)
    assert typed("remove", "runs/b", "--store", str(own)).exit_code == 0
    assert listed(own)["runs/b"] == (True, False)
    assert typed("push", "data/digits", "--store", str(own)).exit_code == 0
    assert typed("remove", "data/digits", "--store", str(own)).exit_code == 0
    assert listed(own)["data/digits"] == (True, False)


def test_a_run_whose_name_another_has_in_the_mirror_keeps_no_other_from_being_sent(own: Path, far: Path) -> None:
    storage.write_bytes(far / "runs" / "a" / "config.yaml", b"name: somebody's\n")
    error = refusal("push", "--store", str(own))
    assert isinstance(error, ConfigError) and "setwise store remove runs/a" in str(error)
    assert (far / "runs" / "b" / "best.json").is_file()
    assert (far / "runs" / "a" / "config.yaml").read_bytes() == b"name: somebody's\n"


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (("pull", "runs/nobody"), DataError, "has no 'runs/nobody'"),
        (("push", "runs/nobody"), DataError, "'runs/nobody' is not in"),
        (("remove", "data/nobody"), DataError, "has no 'data/nobody'"),
        (("pull", "../outside"), ConfigError, "it can be data/NAME or runs/NAME"),
        (("remove", "runs/.."), ConfigError, "it can be data/NAME or runs/NAME"),
    ],
)
def test_a_name_of_nothing_is_refused(
    words: tuple[str, ...], kind: type[SetwiseError], said: str, tmp_path: Path
) -> None:
    error = refusal(*words, "--store", str(tmp_path / "empty"))
    assert isinstance(error, kind) and said in str(error)
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.usefixtures("far")
def test_a_data_set_that_is_here_is_not_replaced(own: Path) -> None:
    typed("push", "data/digits", "--store", str(own))
    error = refusal("pull", "data/digits", "--store", str(own))
    assert isinstance(error, ConfigError) and "already" in str(error)


def test_without_a_mirror_it_is_said_how_to_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SETWISE_MIRROR", raising=False)
    error = refusal("ls", "--store", str(tmp_path))
    assert isinstance(error, ConfigError) and "set SETWISE_MIRROR to s3://BUCKET/PREFIX" in str(error)


def test_a_server_that_refuses_is_said_to(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "else")
    with s3_server(tmp_path / "s3", BUCKET, knows_keys=True) as server:
        monkeypatch.setenv("SETWISE_MIRROR", server.address(BUCKET))
        refused = refusal("push", "--store", str(own))
        for name, value in server.keys.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SETWISE_MIRROR", server.address("no-such-bucket"))
        missing = refusal("push", "--store", str(own))
    monkeypatch.setenv("SETWISE_MIRROR", S3Server(tmp_path).address(BUCKET))
    away = refusal("push", "--store", str(own))
    for error, said in ((refused, "refuses these credentials"), (missing, "no such bucket"), (away, "not answer")):
        assert isinstance(error, UnreachableError) and said in str(error)
