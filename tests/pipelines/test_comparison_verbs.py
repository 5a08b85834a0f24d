"""`setwise compare` as it is typed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import recordings
from setwise.pipelines import comparison_verbs
from setwise.platform.errors import ConfigError

app = typer.Typer()
app.command()(comparison_verbs.compare)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    recordings.three_and_two(folder)
    for name in ("study-000", "study-001"):
        recordings.measured(recordings.trained(folder, name, f"similarity: {{alpha: {name[-1]}}}\n", best=310.0))
    return folder


def typed(store: Path, *words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--store", str(store)])


def test_a_study_alone_is_an_overview_of_its_trials(store: Path) -> None:
    overview = json.loads(typed(store, "study", "--json").stdout)
    assert [row["name"] for row in overview["runs"]] == ["study-000", "study-001"]
    assert overview["runs"][1]["settings"] == {"similarity.alpha": 1, "train.seed": 1}
    for more in (["--md"], ["--latex"], ["--html", "x.html"], ["--metrics", "all"]):
        refused = typed(store, "study", *more)
        assert isinstance(refused.exception, ConfigError) and "setwise compare REF best:study" in str(refused.exception)


def test_several_and_the_seeds_of_one_are_side_by_side(store: Path) -> None:
    both = json.loads(typed(store, "k1", "study", "--json", "--metrics", "rsum,R5").stdout)
    assert [one["name"] for one in both["systems"]] == ["k1", "study-000"]
    assert [line["metric"] for line in both["lines"]] == ["rsum", "i2t_R5", "t2i_R5"]
    alone = json.loads(typed(store, "k1", "--json", "--metrics", "all").stdout)
    assert [one["name"] for one in alone["systems"]] == ["k1"] and alone["test"]["tests"] == 0
    assert alone["lines"][0]["systems"][0]["seeds"] == 3


def test_the_forms_of_output(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(comparison_verbs, "say", said.append)

    def shown(*words: str) -> str:
        written = io.StringIO()
        monkeypatch.setattr(comparison_verbs, "results", Console(file=written, width=100))
        assert typed(store, "k1", "k4", *words).exit_code == 0
        return written.getvalue()

    assert "▲" in shown()
    assert shown("--md").startswith("| benchmark | metric |")
    page = tmp_path / "new" / "page.html"
    assert shown("--latex", "--html", str(page)).endswith("\\end{tabular}\n")
    assert page.read_text().startswith("<!doctype html>") and said == [f"wrote {page}"]
    refused = typed(store, "k1", "k4", "--json", "--md")
    assert isinstance(refused.exception, ConfigError) and "give one" in str(refused.exception)
