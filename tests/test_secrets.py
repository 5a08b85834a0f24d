"""A secret of the environment, or in an address, is in nothing that others may read: records, MLflow, screen, jobs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from promotions import tracker
from setwise.pipelines import cli, records
from setwise.platform import run
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.sweeps import trial

SECRET = "canary-0123456789abcdef"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def test_a_configuration_with_a_secret_starts_nothing(environment: None, tmp_path: Path) -> None:
    for text in (f"a: {SECRET}\n", "a: https://me:hunter2@host/weights.pth\n"):
        with pytest.raises(ConfigError, match="holds a password"):
            run.create(tmp_path, "x", text, "e")
    assert list(tmp_path.iterdir()) == []


def test_a_run_and_its_record_in_mlflow_hold_no_secret(
    environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["setwise", "train", f"x={SECRET}", "--env", "http://me:hunter2@host"])
    training = run.create(tmp_path / "runs", "x", "a: 1\n", "e")
    try:
        raise RuntimeError(f"cannot reach http://me:hunter2@host with {SECRET}")  # noqa: TRY301
    except RuntimeError as error:
        told = trial._reason(error, training)
    records.end(training, "FAILED", f"{told}; {SECRET}")
    Outbox(training.events).append({"kind": "tags", "values": {"note": "of http://me:hunter2@host"}})
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    one.deliver(training)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"error.txt", "environment.json", "events.jsonl", "mlflow.db"} <= {path.name for path in files}
    assert "cannot reach http://me:***@host with ***" in (training.folder / "error.txt").read_text()
    assert one.client.get_run(one.run_id(training)).data.tags["note"] == "of http://me:***@host"
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    own_words = {"events.jsonl"}  # the note above, written past everything of ours
    assert {path.name for path in files if b"hunter2" in path.read_bytes()} == own_words


def test_what_differs_from_the_commit_is_kept_without_secrets(environment: None, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "platform").mkdir(parents=True)
    (checkout / "platform" / "code.py").write_text("one = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(checkout), *who, *command], check=True)
    remote = ["remote", "add", "origin", f"https://me:{SECRET}@host/x.git"]
    subprocess.run(["git", "-C", str(checkout), *remote], check=True)
    (checkout / ".env").write_text("PASSWORD=unknown-to-this-process\n")
    (checkout / "platform" / "code.py").write_text(f"one = '{SECRET}'\ntwo = 'http://me:hunter2@host'\n")
    sent = run.describe_code(checkout / "platform")
    state, difference = run.code_state(checkout / "platform")
    assert [Path(name).name for name in state["untracked"]] == [".env"]
    assert b"one = '***'" in difference and b"two = 'http://me:***@host'" in difference
    for text in (sent, difference, json.dumps(state).encode()):
        assert not re.search(rb"canary|hunter2|unknown-to", text)


@pytest.mark.parametrize("error", [RuntimeError, ConfigError])
def test_the_command_line_shows_no_secret_even_where_it_fails(
    error: type[Exception], environment: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(standalone_mode: bool) -> None:
        raise error(f"postgresql://me:hunter2@host/db refused {SECRET}")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.progress, "file", sys.stderr)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == getattr(error, "exit_code", 1)
    shown = capfd.readouterr().err
    assert "postgresql://me:***@host/db refused ***" in shown and "hunter2" not in shown and SECRET not in shown
    assert ("Traceback" in shown) is (error is RuntimeError)
