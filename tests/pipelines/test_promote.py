"""Promotion: what is refused, what is written down, many clients at once, and death between any two steps."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from promotions import (
    BENCHMARK,
    NAME,
    Client,
    champion,
    dies,
    in_a_process,
    listing,
    made,
    say_what_was_written,
    tracker,
)
from setwise.pipelines import promote, promotion_ledger, registry
from setwise.pipelines.promotion_ledger import Ledger
from setwise.pipelines.references import Reference
from setwise.platform import checkpoint
from setwise.platform.errors import ConfigError, DataError, GateError
from setwise.platform.gate import Gate
from setwise.platform.tracking import Tracker


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A store with a champion of RSUM 100."""
    say_what_was_written(monkeypatch)
    client = tracker(tmp_path, tmp_path / "mlflow.db")
    promote.promote(made(tmp_path, "first", 100.0), tmp_path, client)
    return client


def head(client: Tracker) -> promotion_ledger.Entry:
    found = promotion_ledger.read(client, NAME).head
    assert found is not None
    return found


def test_a_promotion_is_written_down_with_its_numbers_and_its_reason(one: Tracker, tmp_path: Path) -> None:
    done = promote.promote(made(tmp_path, "better", 120.5, seed=1), tmp_path, one)
    assert done.changed and done.version is not None and champion(one) == done.version.version == 2
    entry = head(one)
    assert (entry.kind, entry.version, entry.replaces, entry.run) == ("promotion", 2, 1, "better")
    assert entry.numbers == {"digits_1k/rsum": (120.5, 100.0)} and "@" in entry.who and entry.time > 1.7e9
    assert entry.reason == done.decision.reason == "every limit is kept; better: digits_1k/rsum 100.00 -> 120.50"
    assert json.loads(done.version.tags["setwise.decision"]) == done.decision.to_json()
    assert registry.download(one, done.version, tmp_path).is_dir()
    again = promote.promote(made(tmp_path, "better", 120.5, seed=1), tmp_path, one)
    assert not again.changed and "champion already" in again.decision.reason and head(one) == entry


def test_a_refusal_and_a_dry_run_change_nothing(one: Tracker, tmp_path: Path) -> None:
    before = listing(one)
    worse, better = made(tmp_path, "worse", 99.0, seed=1), made(tmp_path, "better", 101.0, seed=2)
    with pytest.raises(
        GateError, match=r"digits_1k/rsum is 99.00, below the champion's 100.00\. Champion stays .* 1\."
    ):
        promote.promote(worse, tmp_path, one)
    assert not promote.promote(worse, tmp_path, one, dry_run=True).decision.promote
    assert promote.promote(better, tmp_path, one, dry_run=True).decision.promote
    asked = Gate.model_validate({"metrics": {"digits_extended/t2i_map_at_r": {"at_least": 1}}})
    with pytest.raises(GateError, match="digits_extended/t2i_map_at_r was not measured of the candidate"):
        promote.promote(better, tmp_path, one, asked=asked)
    assert listing(one) == before


def test_a_first_promotion_that_is_refused_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say_what_was_written(monkeypatch)
    client = tracker(tmp_path, tmp_path / "mlflow.db")
    asked = Gate.model_validate({"metrics": {"digits_1k/rsum": {"at_least": 150}}})
    with pytest.raises(GateError, match=r"100\.00, below the 150\.00 that the gate asks for\. .* has no champion yet"):
        promote.promote(made(tmp_path, "first", 100.0), tmp_path, client, asked=asked)
    assert listing(client) == "[[], [], []]"


def test_an_override_needs_a_reason_and_is_written_down(one: Tracker, tmp_path: Path) -> None:
    worse, before = made(tmp_path, "worse", 50.0, seed=1), listing(one)
    for empty in ("", "  \n"):
        with pytest.raises(ConfigError, match="--override needs the reason"):
            promote.promote(worse, tmp_path, one, override=empty)
    with pytest.raises(ConfigError, match="501 characters"):
        promote.promote(worse, tmp_path, one, override="x" * 501)
    assert listing(one) == before
    done = promote.promote(worse, tmp_path, one, override="the other one learnt from the test split")
    entry = head(one)
    assert entry.kind == "override" and entry.override == "the other one learnt from the test split"
    assert "50.00, below the champion's 100.00" in entry.reason
    assert done.version is not None and done.version.tags["setwise.override"] == entry.override
    assert "against the gate, because: the other one" in done.describe("worse") and champion(one) == 2


@pytest.mark.parametrize(("value", "promoted"), [(130.0, True), (110.0, False)])
def test_who_is_overtaken_decides_again_against_the_new_champion(
    one: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, promoted: bool
) -> None:
    other, candidate = made(tmp_path, "other", 120.0, seed=1), made(tmp_path, "candidate", value, seed=2)
    append, said = promotion_ledger.append, []

    def overtaken(client: Tracker, seen: Ledger, entry: promotion_ledger.Entry) -> promotion_ledger.Entry:
        monkeypatch.setattr(promotion_ledger, "append", append)
        elsewhere = Tracker(tmp_path / "elsewhere", client.uri)
        promote.promote(other, tmp_path / "elsewhere", elsewhere)
        return append(client, seen, entry)

    monkeypatch.setattr(promotion_ledger, "append", overtaken)
    if promoted:
        promote.promote(candidate, tmp_path, one, say=said.append)
    else:
        with pytest.raises(GateError, match=r"is 110\.00, below the champion's 120\.00"):
            promote.promote(candidate, tmp_path, one, say=said.append)
    assert said[0] == f"evaluating {candidate.label} on the test split" and "was changed meanwhile" in said[1]
    runs = [entry.run for entry in promotion_ledger.read(one, NAME).entries]
    assert runs == ["first", "other", "candidate"][: 2 + promoted]
    assert head(one).version == champion(one)
    assert len(registry.versions(one, NAME)) == len(runs), "the version of a refused one stayed"
    if promoted:
        version = registry.champion(one, NAME)
        assert version is not None and head(one).numbers == {"digits_1k/rsum": (130.0, 120.0)}
        assert json.loads(version.tags["setwise.decision"])["champion"] == {"digits_1k/rsum": 120.0}


# --- many at once ----------------------------------------------------------------------------------------------------


def client(reference: Reference, store: Path, database: Path, start: Any) -> Any:
    """Promote a run as soon as all are ready: the version, or why not."""
    one = tracker(store, database)
    _ = one.client
    start.wait(60)
    try:
        done = promote.promote(reference, store, one)
    except GateError as error:
        return str(error)
    return done.version.version if done.version else None


def aliases(database: Path) -> list[int]:
    """Which version the alias names, straight from the database."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        rows = connection.execute("SELECT version FROM registered_model_aliases WHERE name = ?", (NAME,)).fetchall()
    connection.close()
    return [int(version) for (version,) in rows]


@pytest.mark.parametrize(("clients", "rounds"), [(2, 3), (8, 2)])
def test_clients_of_two_stores_promote_at_once_and_the_ledger_stays_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int, rounds: int
) -> None:
    say_what_was_written(monkeypatch)
    database = tmp_path / "shared" / "mlflow.db"
    tracker(tmp_path, database)
    values: dict[str, float] = {}
    promoted, seen = 0, [0]
    for number in range(rounds):
        names = [f"round{number}-{place}" for place in range(clients)]
        order = random.Random(number).sample(range(clients), clients)
        start = multiprocessing.get_context("fork").Barrier(clients)
        working = []
        for place, name in enumerate(names):
            store = tmp_path / f"store{place % 2}"
            values[name] = 100.0 + 10 * number + order[place]
            reference = made(store, name, values[name], seed=len(values))
            working.append(Client(partial(client, reference, store, database, start)))
        while any(one.alive() for one in working):
            found = aliases(database)
            assert len(found) == 1 or (not promoted and not found), "no champion, or two"
            seen += found
            time.sleep(0.02)
        answers = [one.result() for one in working]

        def look() -> Any:
            one = tracker(tmp_path, database)
            ledger = promotion_ledger.read(one, NAME)
            return [[e.version, e.replaces, e.run] for e in ledger.entries], champion(one), registry.versions(one, NAME)

        entries, at, versions = in_a_process(look)
        assert [entry[1] for entry in entries] == [None, *(entry[0] for entry in entries[:-1])]
        assert at == entries[-1][0] and sorted(versions) == sorted(entry[0] for entry in entries)
        line = [values[run] for _, _, run in entries]
        assert line == sorted(line), "one was promoted that is worse than what it replaced"
        assert line[-1] == max(values.values()), "the best was refused"
        fresh = {run: version for version, _, run in entries[promoted:]}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, int):
                assert fresh.pop(name) == answer
            else:
                assert f"is {values[name]:.2f}, below the champion's" in answer
                below = float(answer.partition("below the champion's ")[2].partition(". ")[0])
                assert below in line and below > values[name]
        assert not fresh and len(entries) > promoted
        promoted = len(entries)
        assert set(seen) <= {0, *(entry[0] for entry in entries)}


# --- death between the steps -----------------------------------------------------------------------------------------

STEPS = [
    (method, after)
    for method in ("log_artifacts", "create_model_version", "log_param", "set_registered_model_alias")
    for after in (False, True)
]


@pytest.mark.parametrize(("method", "after"), STEPS)
def test_killed_anywhere_the_champion_is_the_old_or_the_new_one_and_the_next_verb_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    say_what_was_written(monkeypatch)
    database = tmp_path / "mlflow.db"
    tracker(tmp_path, database)
    old, new, last = (made(tmp_path, f"r{n}", 100.0 + n, seed=n) for n in range(3))
    in_a_process(lambda: promote.promote(old, tmp_path, tracker(tmp_path, database)).changed)

    def doomed() -> None:
        dies(method, after)
        promote.promote(new, tmp_path, tracker(tmp_path, database))

    assert in_a_process(doomed) == -9
    place = STEPS.index((method, after))
    written, moved = place >= STEPS.index(("log_param", True)), place == len(STEPS) - 1

    def look() -> Any:
        one = tracker(tmp_path, database)
        ledger = promotion_ledger.read(one, NAME)
        found = promotion_ledger.problem(ledger, registry.champion(one, NAME))
        before = [entry.run for entry in ledger.entries], found, champion(one)
        shutil.copy(database, tmp_path / "as_it_was.db")
        repaired = promotion_ledger.repair(one, NAME), champion(one)
        return [*before, *repaired, promotion_ledger.problem(ledger, registry.champion(one, NAME))]

    runs, problem, at, repaired, then, problem_after = in_a_process(look)
    assert runs == (["r0", "r1"] if written else ["r0"]) and (problem is not None) == (written and not moved)
    assert (at == 1) == (not moved) and repaired == (written and not moved) and (then == 1) == (not written)
    assert problem_after is None

    def go_on() -> Any:
        one = tracker(tmp_path, tmp_path / "as_it_was.db")  # without the repair
        promote.promote(last, tmp_path, one)
        entries = promotion_ledger.read(one, NAME).entries
        return [[e.run, e.replaces] for e in entries], champion(one) == entries[-1].version

    line, settled = in_a_process(go_on)
    assert settled and [run for run, _ in line] == [*runs, "r2"]


@pytest.mark.parametrize("after", [False, True])
def test_killed_as_the_model_is_made_the_first_promotion_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    say_what_was_written(monkeypatch)
    database = tmp_path / "mlflow.db"
    tracker(tmp_path, database)
    reference = made(tmp_path, "first", 100.0)

    def doomed() -> None:
        dies("create_registered_model", after)
        promote.promote(reference, tmp_path, tracker(tmp_path, database))

    assert in_a_process(doomed) == -9
    one = tracker(tmp_path, database)
    assert promotion_ledger.read(one, NAME).entries == () and champion(one) is None
    assert promote.promote(reference, tmp_path, one).changed and champion(one) == head(one).version == 1


# --- the gate's file, and what it is held against --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metrics:\n  digits_1k/rsm: {at_least: 1}", r"g.yaml:2:3: 'digits_1k/rsm' .* Did you mean 'digits_1k/rsum'\?"),
        ("metrics:\n  '*/map': {max_drop: 0}", r"g.yaml:2:3: '\*/map' cannot be asked for\."),
        ("metrics:\n  rsum: {max_drop: 0}", r"Write BENCHMARK/METRIC or '\*/METRIC'"),
        ("metrics:\n  digits_1k/i2t_median_rank: {max_drop: 0}", r"g.yaml:2:3: .*cannot be asked for"),
        ("metrics:\n  digits_1k/rsum: {at_lest: 1}", r"g.yaml:2:20: .*at_lest' is not a setting\. Did you mean"),
    ],
)
def test_mistakes_in_a_gate_file_have_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        promote.load_gate(tmp_path / "g.yaml")


def test_the_gate_that_ships_asks_for_what_there_is() -> None:
    asked = promote.load_gate()
    assert asked.improve_any and {limit.max_drop for limit in asked.metrics.values()} == {0.0}


def test_significance_is_judged_with_the_champions_ranks_wherever_they_are(store: Path, tmp_path: Path) -> None:
    """Real evaluation: two models with random weights differ by chance alone."""
    shutil.copytree(store / "data", tmp_path / "data")
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    references = [made(tmp_path, name, 1.0, seed) for seed, name in enumerate(("first", "second"))]
    values = [promote.evaluate([reference], tmp_path)[0].values["rsum"] for reference in references]
    worse, better = sorted(references, key=lambda reference: values[references.index(reference)])
    promote.promote(worse, tmp_path, one)
    name = f"{BENCHMARK}/rsum"
    asked = Gate.model_validate({"metrics": {name: {"improve": True, "significantly": True}}})
    assert promote.promote(better, tmp_path, one, dry_run=True).decision.met
    judged = promote.promote(better, tmp_path, one, dry_run=True, asked=asked).decision
    low, high = judged.intervals[name]
    assert low <= 0 < high and not judged.met and f"with 95 % in [{low:+.2f}, {high:+.2f}]" in judged.reason
    assert worse.run is not None
    shutil.rmtree(worse.run.folder)
    assert promote.promote(better, tmp_path, one, dry_run=True, asked=asked).decision == judged, "measured again"

    version = registry.champion(one, NAME)
    assert version is not None
    shutil.rmtree(tmp_path / "registry" / NAME / "v1")
    shutil.rmtree(version.source.removeprefix("file://"))
    said: list[str] = []
    unknown = promote.promote(better, tmp_path, one, dry_run=True, asked=asked, say=said.append).decision
    assert "no interval is known" in unknown.reason and "its files are gone" in said[1]


def test_a_champion_that_was_deleted_is_not_forgotten(one: Tracker, tmp_path: Path) -> None:
    one.client.delete_model_version(NAME, "1")
    worse = made(tmp_path, "worse", 1.0, seed=1)
    with pytest.raises(GateError, match="version 1 is the champion, but gone from the registry"):
        promote.promote(worse, tmp_path, one)
    promote.promote(worse, tmp_path, one, override="it was deleted")
    assert champion(one) == head(one).version == 2 and head(one).replaces == 1


def test_a_model_that_was_promoted_before_there_were_ledgers_keeps_its_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_what_was_written(monkeypatch)
    one = tracker(tmp_path, tmp_path / "mlflow.db")
    first = promote.promote(made(tmp_path, "first", 100.0), tmp_path, one).version
    assert first is not None
    one.client.delete_registered_model_tag(NAME, promotion_ledger.POINTER_TAG)
    with pytest.raises(GateError, match=r"below the champion's 100\.00"):
        promote.promote(made(tmp_path, "worse", 99.0, seed=1), tmp_path, one)
    promote.promote(made(tmp_path, "better", 101.0, seed=2), tmp_path, one)
    assert (head(one).replaces, champion(one), registry.names(one)) == (1, 2, [NAME])
    assert promotion_ledger.rollback(one, NAME).version == 1 == champion(one)


def test_files_that_are_not_those_that_were_promoted_are_not_served(one: Tracker, tmp_path: Path) -> None:
    version = registry.champion(one, NAME)
    assert version is not None
    source = Path(version.source.removeprefix("file://"))
    weights = source / checkpoint.WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (source / checkpoint.MANIFEST).unlink()
    checkpoint.write_manifest(source)  # whole in itself, and another model
    with pytest.raises(DataError, match="not those that were promoted"):
        registry.download(one, version, tmp_path / "elsewhere")
