"""`setwise doctor` finds a champion that is not where its ledger ends, and versions without their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from promotions import NAME, made, say_what_was_written, tracker
from setwise.pipelines import doctor, promote, promotion_ledger, registry
from setwise.pipelines.doctor import Check
from setwise.platform import checkpoint
from setwise.platform.tracking import Tracker


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A store whose champion is version 2."""
    say_what_was_written(monkeypatch)
    client = tracker(tmp_path, tmp_path / "mlflow.db")
    for seed in range(2):
        promote.promote(made(tmp_path, f"r{seed}", 100.0 + seed, seed), tmp_path, client)
    return client


def about_models(store: Path, client: Tracker) -> list[Check]:
    return [check for check in doctor.examine(store, client) if check.name.startswith("model: ")]


def test_nothing_is_wrong_with_what_was_promoted(one: Tracker, tmp_path: Path) -> None:
    found = about_models(tmp_path, one)
    assert found == [Check(f"model: {NAME}", True, "champion is version 2; 2 entries in its ledger")]


def test_an_alias_that_is_missing_or_elsewhere_is_found_and_mended(one: Tracker, tmp_path: Path) -> None:
    one.client.delete_registered_model_alias(NAME, registry.CHAMPION)
    for where in ("gone", "at version 1"):
        (check,) = about_models(tmp_path, one)
        assert not check.ok and check.found == f"the alias 'champion' is {where}, its ledger ends at version 2"
        assert check.advice == f"setwise models repair {NAME}"
        assert promotion_ledger.repair(one, NAME)
        assert all(check.ok for check in about_models(tmp_path, one))
        one.client.set_registered_model_alias(NAME, registry.CHAMPION, "1")


def test_a_champion_that_was_deleted_in_mlflow_is_found(one: Tracker, tmp_path: Path) -> None:
    one.client.delete_model_version(NAME, "2")
    alias, version = about_models(tmp_path, one)
    assert not alias.ok and "the alias 'champion' is gone" in alias.found
    assert not version.ok and version.name == f"model: {NAME} version 2" and "gone from the registry" in version.found
    assert f"setwise rollback {NAME}" in version.advice
    promotion_ledger.rollback(one, NAME)
    assert [check.ok for check in about_models(tmp_path, one)] == [True, False], "version 2 stays gone"


@pytest.mark.parametrize("whole", [True, False])
def test_a_version_whose_files_are_gone_is_found(one: Tracker, tmp_path: Path, whole: bool) -> None:
    version = registry.version(one, NAME, 1)
    assert version is not None
    files = Path(version.source.removeprefix("file://"))
    if whole:
        shutil.rmtree(files)
    else:
        (files / checkpoint.METADATA).unlink()
    alias, found = about_models(tmp_path, one)
    assert alias.ok and not found.ok and found.name.endswith("version 1") and checkpoint.METADATA in found.found


def test_a_damaged_ledger_and_a_store_that_cannot_be_asked_are_findings(one: Tracker, tmp_path: Path) -> None:
    one.client.log_param(promotion_ledger.read(one, NAME).run_id, "000003", "no JSON")
    (check,) = about_models(tmp_path, one)
    assert not check.ok and "entry 3 is missing or damaged" in check.found
    (tmp_path / "broken.db").write_bytes(b"not a database" * 100)
    broken = Tracker(tmp_path, f"sqlite:///{tmp_path / 'broken.db'}")
    (found,) = [check for check in doctor.examine(tmp_path, broken) if check.name == "tracking"]
    assert not found.ok and "not a database" in found.found


def test_a_store_without_tracking_is_left_without(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path, Tracker(tmp_path, f"sqlite:///{tmp_path / 'none.db'}"))
    assert [check.ok for check in found if check.name == "tracking"] == [True]
    assert not (tmp_path / "none.db").exists()
