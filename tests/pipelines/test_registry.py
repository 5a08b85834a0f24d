"""The registry and its ledger: any sequence of promotions, rollbacks and crashes against a plain model."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from promotions import NAME, champion, listing, tracker
from setwise.pipelines import promotion_ledger, registry
from setwise.pipelines.promotion_ledger import Entry, Ledger, OvertakenError
from setwise.platform import checkpoint
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.tracking import Tracker


@pytest.fixture
def one(tmp_path: Path) -> Tracker:
    files = tmp_path / "files"
    files.mkdir()
    for name in (*checkpoint.INFERENCE_FILES, checkpoint.MANIFEST):
        (files / name).write_text("{}")
    return tracker(tmp_path, tmp_path / "mlflow.db")


def promoted(one: Tracker, tmp_path: Path, settle: bool = True) -> int:
    """A new version, written into the ledger as a promotion writes it."""
    seen = promotion_ledger.read(one, NAME)
    promotion_ledger.begin(one, NAME)
    made = one.client.create_model_version(NAME, (tmp_path / "files").as_uri(), tags={registry.RUN_TAG: "run"})
    version = int(made.version)
    replaced = seen.head.version if seen.head else None
    promotion_ledger.append(one, seen, Entry("promotion", version, replaced, "run", "it is better"))
    if settle:
        promotion_ledger.settle(one, NAME)
    return version


class Model:
    """What should be: the champion that each version followed, and so the way back."""

    def __init__(self) -> None:
        self.now: int | None = None
        self.before: dict[int, int | None] = {}
        self.line: list[int] = []

    def way_back(self) -> list[int]:
        found, at = [], self.now
        while at is not None:
            found.append(at)
            at = self.before[at]
        return found

    def to(self, version: int) -> None:
        if version not in self.way_back():
            self.before[version] = self.now
        self.now = version
        self.line.append(version)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_ends_where_a_plain_model_of_it_does(one: Tracker, tmp_path: Path, seed: int) -> None:
    model, choose = Model(), random.Random(seed)
    for _ in range(25):
        deed = choose.choice(["promote", "promote", "crash", "back", "back", "to", "hand", "repair"])
        settled = True
        if deed == "promote" or model.now is None:
            model.to(promoted(one, tmp_path))
        elif deed == "crash":  # after the entry, before the alias
            model.to(promoted(one, tmp_path, settle=False))
            settled = False
        elif deed == "back" and len(model.way_back()) > 1:
            expected = model.way_back()[1]
            assert promotion_ledger.rollback(one, NAME).version == expected
            model.to(expected)
        elif deed == "to" and (others := sorted({*model.before} - {model.now})):
            version = choose.choice(others)
            promotion_ledger.rollback(one, NAME, to=version)
            model.to(version)
        elif deed == "hand":  # somebody moves the alias in MLflow's pages
            one.client.set_registered_model_alias(NAME, registry.CHAMPION, str(choose.choice([*model.before])))
            settled = False
        else:
            promotion_ledger.repair(one, NAME)
        ledger = promotion_ledger.read(one, NAME)
        assert [entry.version for entry in ledger.entries] == model.line
        assert [entry.replaces for entry in ledger.entries] == [None, *model.line[:-1]]
        assert ledger.champions() == model.way_back()[::-1] and ledger.former() == {*model.before}
        assert champion(one) is not None
        if settled:
            assert champion(one) == model.now
        problem = promotion_ledger.problem(ledger, registry.champion(one, NAME))
        assert (problem is None) == (champion(one) == model.now)
    promotion_ledger.repair(one, NAME)
    assert champion(one) == model.now


def test_one_command_goes_back_and_again_further_back(one: Tracker, tmp_path: Path) -> None:
    for _ in range(3):
        promoted(one, tmp_path)
    first = promotion_ledger.rollback(one, NAME, reason="wrong vocabulary")
    assert (first.kind, first.version, first.replaces, first.reason) == ("rollback", 2, 3, "wrong vocabulary")
    assert promotion_ledger.read(one, NAME).head == first and first.time > 0 and champion(one) == 2
    assert promotion_ledger.rollback(one, NAME).version == champion(one) == 1
    before = listing(one)
    with pytest.raises(ConfigError, match="no champion before"):
        promotion_ledger.rollback(one, NAME)
    with pytest.raises(ConfigError, match="never was the champion; those that were: 1, 2, 3"):
        promotion_ledger.rollback(one, NAME, to=7)
    with pytest.raises(ConfigError, match="version 1 is the champion already"):
        promotion_ledger.rollback(one, NAME, to=1)
    assert listing(one) == before


def test_nothing_goes_back_to_a_version_whose_files_are_gone(one: Tracker, tmp_path: Path) -> None:
    for _ in range(2):
        promoted(one, tmp_path)
    before = listing(one)
    (tmp_path / "files" / checkpoint.WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"version 1: model.safetensors of its files in .* are gone"):
        promotion_ledger.rollback(one, NAME)
    shutil.rmtree(tmp_path / "files")
    with pytest.raises(DataError, match="version 1"):
        promotion_ledger.rollback(one, NAME)
    assert listing(one) == before and champion(one) == 2
    one.client.delete_model_version(NAME, "1")
    with pytest.raises(DataError, match="version 1: it is gone from the registry"):
        promotion_ledger.rollback(one, NAME)


def test_two_who_go_back_at_once_go_back_once(one: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw the same bad champion: the second is told, and does not take away the good one too."""
    for _ in range(3):
        promoted(one, tmp_path)
    append = promotion_ledger.append

    def overtaken(client: Tracker, seen: Ledger, entry: Entry) -> Entry:
        monkeypatch.setattr(promotion_ledger, "append", append)
        promotion_ledger.rollback(client, NAME)
        return append(client, seen, entry)

    monkeypatch.setattr(promotion_ledger, "append", overtaken)
    with pytest.raises(OvertakenError, match=r"changed meanwhile, by .*@.*: rollback to version 2\. Look"):
        promotion_ledger.rollback(one, NAME)
    assert champion(one) == 2 and len(promotion_ledger.read(one, NAME).entries) == 4


def test_an_entry_whose_answer_got_lost_is_written_once(
    one: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    promoted(one, tmp_path)
    promoted(one, tmp_path)
    original = MlflowClient.log_param

    def lost(self: MlflowClient, run_id: str, key: str, value: str) -> None:
        original(self, run_id, key, value)
        raise MlflowException("timed out")

    monkeypatch.setattr(MlflowClient, "log_param", lost)
    assert promotion_ledger.rollback(one, NAME).version == 1 == champion(one)
    assert len(promotion_ledger.read(one, NAME).entries) == 3


def test_who_is_slow_to_move_the_alias_looks_again(
    one: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    promoted(one, tmp_path)
    promoted(one, tmp_path, settle=False)
    original = MlflowClient.set_registered_model_alias

    def late(self: MlflowClient, name: str, alias: str, version: str) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", original)
        promoted(one, tmp_path)  # somebody else's, from its entry to its alias
        original(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", late)
    assert promotion_ledger.settle(one, NAME)
    assert champion(one) == 3


def test_a_ledger_that_was_deleted_is_brought_back(one: Tracker, tmp_path: Path) -> None:
    for _ in range(2):
        promoted(one, tmp_path)
    ledger = promotion_ledger.read(one, NAME)
    one.client.delete_run(ledger.run_id)
    with pytest.raises(DataError, match="was deleted in MLflow; bring it back: setwise models repair setwise-digits"):
        promotion_ledger.rollback(one, NAME)
    assert promotion_ledger.repair(one, NAME) and not promotion_ledger.repair(one, NAME)
    assert promotion_ledger.rollback(one, NAME).version == 1


@pytest.mark.parametrize(("key", "text"), [("000004", "{}"), ("000003", "{}"), ("000003", "no JSON")])
def test_an_entry_that_is_not_ours_is_a_matter_of_data(one: Tracker, tmp_path: Path, key: str, text: str) -> None:
    for _ in range(2):
        promoted(one, tmp_path)
    one.client.log_param(promotion_ledger.read(one, NAME).run_id, key, text)
    with pytest.raises(DataError, match="entry 3 is missing or damaged"):
        promotion_ledger.read(one, NAME)


def test_a_registered_model_by_its_whole_name_or_its_data_set(one: Tracker, tmp_path: Path) -> None:
    one.client.create_registered_model("somebody-elses")
    assert registry.names(one) == []
    with pytest.raises(ConfigError, match=r"no registered model is called 'setwise-digits'.*Promote a run first"):
        registry.full_name("digits", one)
    promoted(one, tmp_path)
    assert registry.full_name("digits", one) == registry.full_name(NAME, one) == NAME
    with pytest.raises(ConfigError, match=r"Did you mean 'setwise-digits'\?"):
        registry.full_name("setwise-digts", one)
    assert (registry.names(one), registry.versions(one, NAME)) == ([NAME], [1])
