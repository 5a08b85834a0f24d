"""`setwise promote`, `rollback` and `models` as they are typed: answers, exit codes and JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from promotions import NAME, champion, listing, made, say_what_was_written, tracker
from setwise.pipelines import cli, model_verbs, registry
from setwise.platform.errors import SetwiseError
from setwise.platform.tracking import Tracker


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    say_what_was_written(monkeypatch)
    for seed, (name, rsum) in enumerate({"first": 100.0, "better": 120.0, "worse": 90.0}.items()):
        made(tmp_path, name, rsum, seed)
    monkeypatch.setenv("SETWISE_STORE", str(tmp_path))
    return tracker(tmp_path, tmp_path / "mlflow.db")


def typed(*words: str, code: int = 0) -> Any:
    """What a command answered: JSON where it is asked for, or its message if its exit code is another than 0."""
    printed, before = io.StringIO(), model_verbs.results.file
    model_verbs.results.file = printed
    try:
        done = CliRunner().invoke(cli.app, list(words))
    finally:
        model_verbs.results.file = before
    error = done.exception
    assert (error.exit_code if isinstance(error, SetwiseError) else done.exit_code) == code, (done.output, error)
    if error is not None:
        return str(error)
    return json.loads(done.stdout) if "--json" in words else printed.getvalue()


def test_promote_refuse_override_roll_back_and_look(one: Tracker, tmp_path: Path) -> None:
    assert "first is the champion now: setwise-digits version 1" in typed("promote", "first")
    answer = typed("promote", "better", "--json")
    assert answer["changed"] and answer["champion"] == {"name": NAME, "version": 2}
    assert answer["decision"]["candidate"] == {"digits_1k/rsum": 120.0} and answer["decision"]["met"]

    before = listing(one)
    assert "below the champion's 120.00. Champion stays setwise-digits version 2" in typed("promote", "worse", code=3)
    dry = typed("promote", "worse", "--dry-run", "--json")
    assert not dry["decision"]["promote"] and not dry["changed"]
    refused = CliRunner().invoke(cli.app, ["promote", "worse", "--json"])
    assert isinstance(refused.exception, SetwiseError) and refused.exception.exit_code == 3
    assert json.loads(refused.stdout) == dry
    assert "--override needs the reason" in typed("promote", "worse", "--override", "", code=2)
    assert listing(one) == before

    assert "against the gate, because: a test" in typed("promote", "worse", "--override", "a test")
    assert "version 2 (better) is the champion again, in place of version 3" in typed("rollback", "digits")
    back = typed("rollback", NAME, "--to", "3", "--reason", "forth again", "--json")
    assert (back["version"], back["replaces"], back["reason"], champion(one)) == (3, 2, "forth again", 3)
    assert "never was the champion" in typed("rollback", "digits", "--to", "9", code=2)
    assert "no registered model is called 'setwise-digts'. Did you mean 'setwise-digits'?" in typed(
        "rollback", "digts", code=2
    )

    told = typed("models", "history", "digits", "--json")["entries"]
    assert [entry["kind"] for entry in told] == ["promotion", "promotion", "override", "rollback", "rollback"]
    assert [entry["version"] for entry in told] == [1, 2, 3, 2, 3]
    assert told[2]["numbers"] == {"digits_1k/rsum": [90.0, 120.0]} and told[2]["override"] == "a test"
    shown = typed("models", "history", NAME)
    assert "  3  " in shown and "override: version 3 (worse) in place of version 2, by " in shown
    assert "reason: a test\n     gate: digits_1k/rsum is 90.00, below the champion's 120.00\n" in shown
    assert "     digits_1k/rsum 90.00, before 120.00\n" in shown and "reason: forth again" in shown


def test_models_are_listed_and_repaired(one: Tracker) -> None:
    assert typed("models", "ls", "--json") == {"models": []}
    typed("promote", "first")
    typed("promote", "better")
    (row,) = typed("models", "ls", "--json")["models"]
    assert row == {"name": NAME, "champion": 2, "run": "better", "versions": [1, 2], "entries": 2, "problem": None}
    assert "version 2" in typed("models", "ls")
    assert "nothing to repair" in typed("models", "repair", "digits")

    one.client.set_registered_model_alias(NAME, registry.CHAMPION, "1")
    (row,) = typed("models", "ls", "--json")["models"]
    assert row["champion"] == 1 and "its ledger ends at version 2" in row["problem"]
    assert typed("models", "repair", "digits", "--json") == {"name": NAME, "repaired": True, "champion": 2}


def test_a_gate_of_ones_own(one: Tracker, tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("metrics:\n  digits_1k/rsum: {at_least: 110, max_drop: 40}\n")
    assert "is 100.00, below the 110.00 that the gate asks for" in typed(
        "promote", "first", "--gate", str(gate), code=3
    )
    typed("promote", "better", "--gate", str(gate))
    gate.write_text("metrics:\n  digits_1k/rsum: {max_drop: 40}\n")
    typed("promote", "worse", "--gate", str(gate))
    version = registry.champion(one, NAME)
    assert version is not None and version.run == "worse"
    assert json.loads(version.tags["setwise.gate"]) == {"metrics": {"digits_1k/rsum": {"max_drop": 40.0}}}
    gate.write_text("metrics:\n  digits_1k/rsum: {at_leats: 110}\n")
    mistake = typed("promote", "better", "--gate", str(gate), code=2)
    assert f"{gate}:2:20: 'metrics.digits_1k/rsum.at_leats' is not a setting." in mistake
