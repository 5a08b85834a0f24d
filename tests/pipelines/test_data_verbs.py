"""`setwise data VERB` as it is typed: what reaches the pipelines, and what is said when they are interrupted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from setwise.pipelines import data_verbs, prepare
from setwise.pipelines.prepare import PrepareSettings
from setwise.platform import cluster
from setwise.platform.errors import ConfigError, DataError
from trees import any_folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray is started."""
    monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)


def typed(*words: str) -> Any:
    return CliRunner().invoke(data_verbs.app, list(words))


@pytest.mark.usefixtures("alone")
def test_paths_are_absolute_whichever_way_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrepareSettings] = []

    def stop(name: str, store: Path, settings: PrepareSettings, say: object) -> None:
        seen.append(settings)
        raise DataError("seen")

    monkeypatch.setattr(prepare, "prepare_source", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    typed("prepare", "mine", "--from", "a b", "source.images=c", "--store", "store")
    typed("prepare", "mine", "source.folder=a b", "source.annotations=d.csv", "--store", "store")
    assert [settings.source.folder for settings in seen] == [str(tmp_path / "a b")] * 2
    assert (seen[0].source.images, seen[1].source.annotations) == (str(tmp_path / "c"), str(tmp_path / "d.csv"))
    assert (seen[0].source.annotations, seen[1].source.images) == (None, None)


@pytest.mark.usefixtures("alone")
def test_an_interrupted_preparation_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_verbs, "say", said.append)
    monkeypatch.setattr(prepare, "prepare_source", interrupt)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    store = str(tmp_path / "store")
    assert typed("prepare", "mine", "prepare.jpeg_quality=80", "--from", "a b", "--store", store).exit_code == 130
    assert said == [
        "interrupted; nothing is lost. To go on: "
        f"setwise data prepare mine prepare.jpeg_quality=80 --from 'a b' --store {store}"
    ]


def test_regions_of_a_name_that_cannot_be_one_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = typed("regions", "Bad/Name", "--from", str(tmp_path), "--to", str(tmp_path / "to"))
    assert isinstance(result.exception, ConfigError) and "cannot name a data set" in str(result.exception)


def test_a_file_instead_of_a_folder_is_called_one(tmp_path: Path) -> None:
    any_folder(tmp_path)
    result = typed("prepare", "mine", "--from", str(tmp_path / "captions.csv"), "--store", str(tmp_path / "store"))
    assert isinstance(result.exception, DataError) and "is a file. Name the folder" in str(result.exception)


@pytest.mark.ray
@pytest.mark.driver
def test_a_table_in_utf_16_is_said_to_be_no_utf_8(tmp_path: Path) -> None:
    any_folder(tmp_path)
    table = tmp_path / "captions.csv"
    table.write_text(table.read_text(), encoding="utf-16")
    result = typed("prepare", "mine", "--from", str(tmp_path), "--store", str(tmp_path / "store"))
    assert isinstance(result.exception, DataError) and "is not UTF-8" in str(result.exception)


def test_a_folder_that_is_not_there_is_missed_before_a_cluster_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started() -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(cluster, "connect", started)
    result = typed("prepare", "mine", "--from", str(tmp_path / "nowhere"), "--store", str(tmp_path / "store"))
    assert isinstance(result.exception, DataError) and "no such folder" in str(result.exception)
