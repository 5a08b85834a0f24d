"""`setwise sweep` as it is typed: what is wrong is said before anything starts, and what to type next can be pasted."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from setwise.pipelines import cli
from setwise.pipelines.terminal import repeated
from setwise.platform.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("staus",), "Did you mean: setwise sweep status"),
        (("analyse", "digits"), "Did you mean: setwise sweep analyze"),
        (("digitz",), "no study is called 'digitz'. Did you mean 'digits'?"),
        (("nothing_like_it.yaml",), "nothing_like_it.yaml: no such file"),
        (("digits", "--name", "a b/c", "--dry-run"), "'a b/c' cannot name a run"),
        (("digits", "--warm-start", "nope", "--dry-run"), "there is no run in"),
        (("digits", "--max-gpu-hours", "0", "--dry-run"), "max_gpu_hours: input should be greater than 0"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(cli.app, ["sweep", *words], env={"SETWISE_STORE": str(tmp_path)})
    assert isinstance(done.exception, ConfigError) and told in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("digits_cnn_bigru", "train.epochs=0"), "train.epochs: input should be greater than or equal to 1"),
        (("digits", "trials=0"), "trials: input should be greater than or equal to 1"),
        (("train.epochs=3",), "name a recipe or a study whose overrides these are"),
        (("digits_cnn_bigru", "train.epochs=3"), None),
    ],
)
def test_overrides_are_checked_like_files(words: tuple[str, ...], told: str | None) -> None:
    done = CliRunner().invoke(cli.app, ["config", "check", *words])
    assert done.exception is None if told is None else isinstance(done.exception, ConfigError)
    assert told is None or told in str(done.exception)


def test_a_port_that_is_taken_is_told_before_a_server_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli.app, ["ui", "--port", port, "--store", str(tmp_path)])
    assert isinstance(done.exception, ConfigError) and f"--port {port} cannot be used: " in str(done.exception)
    done = CliRunner().invoke(cli.app, ["ui", "--port", "99999", "--store", str(tmp_path)])
    assert isinstance(done.exception, ConfigError) and "from 1 to 65535" in str(done.exception)


def test_of_a_server_the_address_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@mlflow.example")
    monkeypatch.setattr(cli.results, "file", printed := io.StringIO())
    assert CliRunner().invoke(cli.app, ["ui", "--store", str(tmp_path)]).exit_code == 0
    assert printed.getvalue() == "http://name:***@mlflow.example\n"


def test_a_command_to_go_on_with_can_be_pasted_into_a_shell() -> None:
    options = {"--budget": "8h", "--on": None, "--warm-start": ["old", "older one"], "--store": Path("/my data")}
    assert repeated(["sweep", "digits", "space={a: 1}"], options) == (
        "setwise sweep digits 'space={a: 1}' --budget 8h --warm-start old --warm-start 'older one' --store '/my data'"
    )
