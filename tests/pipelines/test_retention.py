"""What is kept: the union of three numbers, against a naive oracle; and what no number may touch."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from setwise.pipelines import lineage, references, retention
from setwise.pipelines.lineage import Stored
from setwise.pipelines.retention import Candidate, Keep
from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker

NOTHING = Keep(0, 0, 0)
ENDED = {"kind": "status", "value": "FINISHED"}


def make(store: Path, name: str, values: list[float], ended: bool = True) -> Run:
    """A run as far as retention looks at it; `values` are those of its checkpoints, from epoch 1 on."""
    run = Run(store / "runs" / name)
    storage.write_bytes(run.config, b"a: 1\n")
    for epoch, value in enumerate(values, start=1):
        folder = run.checkpoints / f"epoch_{epoch:04d}"
        storage.write_json(folder / checkpoint.METADATA, {"epoch": epoch, "history": [{lineage.METRIC: value}]})
        storage.write_bytes(folder / checkpoint.WEIGHTS, bytes(1000))
    best = values.index(max(values)) + 1
    storage.write_json(run.folder / "best.json", {"checkpoint": f"epoch_{best:04d}", "value": max(values)})
    if ended:
        Outbox(run.events).append(ENDED)
    return run


def make_study(store: Path, name: str, ended: bool = True) -> None:
    study = Run(store / "studies" / name)
    study.folder.mkdir(parents=True)
    if ended:
        Outbox(study.events).append(ENDED)


def verdicts(store: Path, keep: Keep = NOTHING, tracker: Tracker | None = None) -> dict[str, str]:
    """RUN/EPOCH to why it stays; empty if it goes."""
    decisions = retention.plan(store, tracker or Tracker(store), keep, references.all_runs(store))
    return {f"{d.checkpoint.run}/{d.checkpoint.epoch}": "; ".join(d.reasons) for d in decisions}


def going(store: Path, keep: Keep = NOTHING, tracker: Tracker | None = None) -> set[str]:
    return {name for name, reasons in verdicts(store, keep, tracker).items() if not reasons}


def remove(store: Path, keep: Keep = NOTHING) -> tuple[int, list[str]]:
    runs, said = references.all_runs(store), list[str]()
    return retention.apply(store, retention.plan(store, Tracker(store), keep, runs), runs, said.append), said


def random_candidates(chance: random.Random) -> list[Candidate]:
    candidates = []
    for number in range(chance.randint(1, 6)):
        run, study = Run(Path(f"/r{number}")), chance.choice([None, "a", "b"])
        found = [
            Stored(run.name, f"epoch_{epoch:04d}", run.folder / f"{epoch}", epoch, float(chance.randint(0, 4)), 1)
            for epoch in range(1, chance.randint(0, 6) + 1)
            if chance.random() < 0.8
        ]
        best = chance.choice(found).name if found and chance.random() < 0.7 else None
        whole = ("unfinished",) if chance.random() < 0.2 else ()
        own = {one.name: "registered" for one in found if chance.random() < 0.1}
        candidates.append(Candidate(run, study, tuple(found), best, whole, own))
    return candidates


def oracle(candidates: list[Candidate], keep: Keep) -> set[Path]:
    """What goes, checkpoint by checkpoint: it has enough better ones, and later ones, and nothing else holds it."""

    def better(one: Stored, other: Stored) -> bool:
        assert one.value is not None
        assert other.value is not None
        if one.value != other.value:
            return one.value > other.value
        return (one.epoch, one.run) < (other.epoch, other.run)

    gone = set()
    for candidate in candidates:
        for one in candidate.checkpoints:
            mates = [c for other in candidates if other.study == candidate.study for c in other.checkpoints]
            in_study = candidate.study is not None and sum(better(c, one) for c in mates) < keep.best_of_study
            in_run = sum(better(c, one) for c in candidate.checkpoints) < keep.best
            is_late = sum(c.epoch > one.epoch for c in candidate.checkpoints) < keep.latest
            held = candidate.best == one.name or candidate.reasons or one.name in candidate.own_reasons
            if not (in_study or in_run or is_late or held):
                gone.add(one.folder)
    return gone


def test_three_numbers_keep_what_any_of_them_keeps_on_random_trees() -> None:
    chance, removed = random.Random(0), 0
    for _ in range(500):
        candidates = random_candidates(chance)
        keep = Keep(*(chance.randint(0, 3) for _ in range(3)))
        decisions = retention.decide(candidates, keep)
        gone = {decision.checkpoint.folder for decision in decisions if not decision.reasons}
        assert gone == oracle(candidates, keep), (keep, candidates)
        assert len(decisions) == sum(len(one.checkpoints) for one in candidates)
        removed += len(gone)
    assert removed > 500


def test_the_best_of_a_study_counts_its_seeds_and_a_run_without_study_has_its_own_rule(tmp_path: Path) -> None:
    make_study(tmp_path, "slots")
    make(tmp_path, "slots-000", [5, 9, 1])
    make(tmp_path, "slots-000-seed1", [8, 7, 10])
    make(tmp_path, "plain", [1, 3, 2])
    assert going(tmp_path, Keep(best_of_study=3, best=0, latest=0)) == {
        *("slots-000/1", "slots-000/3", "slots-000-seed1/2"),  # 10, 9 and 8 stay
        *("plain/1", "plain/3"),  # its best is named by best.json
    }
    assert going(tmp_path, Keep(best_of_study=0, best=0, latest=1)) >= {"slots-000/1", "plain/1"}
    assert "slots-000/3" not in going(tmp_path, Keep(best_of_study=0, best=0, latest=1))


def test_a_chosen_run_is_ranked_among_all_of_its_study(tmp_path: Path) -> None:
    make_study(tmp_path, "slots")
    worse, _ = make(tmp_path, "slots-000", [5, 6]), make(tmp_path, "slots-001", [8, 9])
    decisions = retention.plan(tmp_path, Tracker(tmp_path), Keep(2, 0, 0), [worse])
    assert [(d.checkpoint.epoch, d.reasons) for d in decisions] == [(1, ()), (2, ("named by best.json",))]


def test_what_runs_what_is_unfinished_and_what_another_needs_stays(tmp_path: Path) -> None:
    make(tmp_path, "unfinished", [2, 1], ended=False)
    make(tmp_path, "done", [3, 2, 1])
    child = make(tmp_path, "child", [1], ended=False)
    assert going(tmp_path) == {"done/2", "done/3"}
    storage.write_json(child.folder / lineage.FILE, {"parents": [{"run": "done", "checkpoint": "epoch_0003"}]})
    assert verdicts(tmp_path)["done/3"] == "run child started from it and is unfinished"
    assert "may be resumed" in verdicts(tmp_path)["unfinished/2"]
    for lock in ("lease", "writer.lease"):
        with storage.lease(tmp_path / "runs" / "done" / lock, "run 'done'"):
            assert going(tmp_path) == set()
            assert "in use by process" in verdicts(tmp_path)["done/2"]
    assert going(tmp_path) == {"done/2"}
    storage.write_bytes(child.folder / lineage.FILE, b"[]")
    with pytest.raises(DataError, match=r"lineage\.json"):
        going(tmp_path)


def test_trials_of_a_study_that_runs_or_may_be_resumed_stay(tmp_path: Path) -> None:
    make_study(tmp_path, "slots", ended=False)
    make(tmp_path, "slots-000", [3, 2])
    assert "study slots is unfinished" in verdicts(tmp_path)["slots-000/2"]
    Outbox(tmp_path / "studies" / "slots" / "events.jsonl").append(ENDED)
    assert going(tmp_path) == {"slots-000/2"}
    added = make(tmp_path, "slots-001", [1], ended=False)  # the study goes on with more trials, and was killed
    assert "study slots is unfinished" in verdicts(tmp_path)["slots-000/2"]
    Outbox(added.events).append(ENDED)
    assert going(tmp_path) == {"slots-000/2"}
    with storage.lease(tmp_path / "studies" / "slots" / "lease", "study 'slots'"):
        assert going(tmp_path) == set()


def test_what_is_registered_stays_and_what_is_not_known_too(tmp_path: Path) -> None:
    for name in ("by-tag", "by-id", "by-hand", "by-place", "free"):
        make(tmp_path, name, [3, 2, 1])
    tracker = Tracker(tmp_path)
    experiment = tracker.experiment_id("tests")
    ids = {name: tracker.client.create_run(experiment).info.run_id for name in ("by-id", "by-hand")}
    for name, run_id in ids.items():
        delivered = {"uri": tracker.address, "run_id": run_id, "bytes": 0}
        storage.write_json(tmp_path / "runs" / name / "delivered.json", delivered)
    tracker.client.create_registered_model("m")
    tag = {"setwise.run": "by-tag"}
    tracker.client.create_model_version("m", "file:///a/checkpoints/epoch_0002", tags=tag)
    tracker.client.create_model_version("m", "file:///a/checkpoints/epoch_0003", run_id=ids["by-id"])
    tracker.client.create_model_version("m", "file:///elsewhere/model", run_id=ids["by-hand"])
    tracker.client.create_model_version("m", str(tmp_path / "runs" / "by-place" / "checkpoints" / "epoch_0002"))
    assert going(tmp_path, tracker=tracker) == {"by-tag/3", "by-id/2", "by-place/3", "free/2", "free/3"}
    assert verdicts(tmp_path, tracker=tracker)["by-tag/2"] == "registered as m version 1"
    storage.write_json(tmp_path / "runs" / "free" / "delivered.json", {"uri": "http://other", "run_id": "x"})
    assert "http://other is not known" in verdicts(tmp_path, tracker=tracker)["free/2"]
    assert going(tmp_path, tracker=tracker) == {"by-tag/3", "by-id/2", "by-place/3"}


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", None])
def test_nothing_goes_while_the_tracking_store_cannot_be_asked(tmp_path: Path, uri: str | None) -> None:
    """A server that is away, or the store's own file that somebody has moved."""
    run, tracker = make(tmp_path, "done", [2, 1]), Tracker(tmp_path, uri)
    storage.write_json(run.folder / "delivered.json", {"uri": tracker.address, "run_id": "x", "bytes": 0})
    with pytest.raises(UnreachableError):
        going(tmp_path, tracker=tracker)


def test_removal_frees_what_it_says_and_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    run = make(tmp_path, "done", [2, 3, 1, 0])
    shutil.copytree(run.checkpoints / "epoch_0001", run.folder / "best" / "epoch_0001")
    shutil.copytree(run.checkpoints / "epoch_0001", run.checkpoints / "epoch_0009.damaged")
    storage.write_bytes(run.checkpoints / "epoch_0010" / checkpoint.METADATA, b"{")
    size = sum(path.stat().st_size for number in (1, 3) for path in (run.checkpoints / f"epoch_000{number}").iterdir())
    decisions = retention.plan(tmp_path, Tracker(tmp_path), Keep(), [run])
    assert sum(d.checkpoint.bytes for d in decisions if not d.reasons) == size
    assert remove(tmp_path, Keep()) == (size, [])
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert kept == {"epoch_0002", "epoch_0004", "epoch_0009.damaged", "epoch_0010"}
    assert (run.folder / "best" / "epoch_0001" / checkpoint.WEIGHTS).is_file()
    assert remove(tmp_path, Keep()) == (0, [])


def test_a_crash_in_the_middle_leaves_no_half_checkpoint_and_the_next_removal_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, "done", [3, 2, 1])

    def dies(folder: Path, *_: Any) -> None:
        (Path(folder) / checkpoint.METADATA).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            remove(tmp_path)
    whole = [path for path in run.checkpoints.glob("epoch_*") if (path / checkpoint.METADATA).is_file()]
    assert whole == list(run.checkpoints.glob("epoch_*"))
    assert len(list(run.checkpoints.glob(".trash.*"))) == 2
    freed, _ = remove(tmp_path)
    assert freed > 2000
    assert [path.name for path in run.checkpoints.iterdir()] == ["epoch_0001"]


def test_a_run_that_came_into_use_after_the_plan_keeps_all(tmp_path: Path) -> None:
    run, other = make(tmp_path, "done", [2, 1]), make(tmp_path, "other", [2, 1])
    decisions = retention.plan(tmp_path, Tracker(tmp_path), Keep(0, 0, 0), [run, other])
    said = list[str]()
    with storage.lease(run.folder / "writer.lease", "run 'done'"):
        retention.apply(tmp_path, decisions, [run, other], said.append)
    assert len(said) == 1
    assert "kept after all: run 'done' is in use" in said[0]
    assert len(list(run.checkpoints.iterdir())) == 2
    assert len(list(other.checkpoints.iterdir())) == 1


def test_a_run_of_another_store_is_refused_and_its_namesake_here_keeps_all(tmp_path: Path) -> None:
    here, there = make(tmp_path / "here", "same", [3, 1, 2]), make(tmp_path / "there", "same", [1, 2, 3])
    chosen = references.find_seeds(str(there.folder), tmp_path / "here")
    with pytest.raises(ConfigError, match="no run of the store"):
        retention.plan(tmp_path / "here", Tracker(tmp_path / "here"), NOTHING, chosen)
    inside = references.find_seeds(str(here.folder), tmp_path / "here")
    decisions = retention.plan(tmp_path / "here", Tracker(tmp_path / "here"), NOTHING, inside)
    assert [bool(one.reasons) for one in decisions] == [True, False, False]


def test_links_are_neither_followed_nor_counted_as_checkpoints(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    storage.write_json(outside / checkpoint.METADATA, {"epoch": 9, "history": [{lineage.METRIC: 0.0}]})
    run = make(tmp_path, "done", [2, 1])
    (run.checkpoints / "epoch_0009").symlink_to(outside)
    remove(tmp_path)
    assert json.loads((outside / checkpoint.METADATA).read_text())["epoch"] == 9
    assert {path.name for path in run.checkpoints.iterdir()} == {"epoch_0001", "epoch_0009"}
