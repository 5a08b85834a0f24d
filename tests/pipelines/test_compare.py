"""Runs beside each other: what differs, what was measured, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from setwise.pipelines import compare, evaluate, tables
from setwise.pipelines.benchmarks import Outcome
from setwise.platform import storage
from setwise.platform.run import Run
from setwise.platform.outbox import Outbox


def make(
    folder: Path, name: str, settings: str, epochs: int = 0, best: float | None = None, status: str | None = None
) -> Run:
    run = Run(folder / name)
    storage.write_bytes(run.config, settings.encode())
    outbox = Outbox(run.events)
    for epoch in range(1, epochs + 1):
        outbox.metrics(epoch, {"val/rsum": float(epoch)})
    if best is not None:
        storage.write_json(run.folder / "best.json", {"checkpoint": "epoch_0001", "value": best})
    if status is not None:
        outbox.append({"kind": "tags", "values": {"setwise.status": status}})
    return run


def measure(run: Run, benchmark: str, protocol: dict[str, Any], **values: float) -> None:
    evaluate.record(run, Outcome(benchmark, values, protocol), {"weights": "w", "data": "d"}, epoch=99)


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    runs = [
        make(tmp_path, "a", "train: {lr: 0.1, epochs: 3}\nmodel: {channels: [8, 8], kind: cnn}\n"),
        make(tmp_path, "b", "train: {lr: 0.2, epochs: 3}\nmodel: {channels: [8, 16], kind: cnn}\nextra: {x: 1}\n"),
    ]
    rows = {row.name: row for row in compare.compare(runs).rows}
    assert rows["a"].settings == {"train.lr": 0.1, "model.channels": [8, 8], "extra.x": None}
    assert rows["b"].settings == {"train.lr": 0.2, "model.channels": [8, 16], "extra.x": 1}
    assert compare.compare(runs[:1]).rows[0].settings == {}


def test_the_best_comes_first_and_what_has_no_value_last(tmp_path: Path) -> None:
    runs = [
        make(tmp_path, "young", "a: 1\n"),
        make(tmp_path, "good", "a: 1\n", 2, 300.0),
        make(tmp_path, "better", "a: 1\n", 3, 301.0),
        make(tmp_path, "also-good", "a: 1\n", 3, 300.0),
    ]
    rows = compare.compare(runs).rows
    assert [row.name for row in rows] == ["better", "also-good", "good", "young"]
    assert [row.values for row in rows[-2:]] == [{"val/rsum": 300.0}, {}]


def test_how_far_a_run_came_and_how_it_ended(tmp_path: Path) -> None:
    finished = make(tmp_path, "a", "a: 1\n", 4, 9.0, "FINISHED")
    pruned = make(tmp_path, "b", "a: 1\n", 2, 8.0, "PRUNED")
    running = make(tmp_path, "c", "a: 1\n", 1, 7.0)
    measure(finished, "digits_1k", {}, rsum=5.0)  # an evaluation is no epoch, and no end
    rows = compare.compare([running, pruned, finished]).rows
    assert [(row.name, row.status, row.epochs) for row in rows] == [
        ("a", "finished", 4),
        ("b", "pruned", 2),
        ("c", "unfinished", 1),
    ]


def test_values_under_two_protocols_are_left_out_and_the_difference_is_named(tmp_path: Path) -> None:
    one, two, three = (make(tmp_path, name, "a: 1\n") for name in "abc")
    measure(one, "digits_1k", {"ties": "pessimistic", "similarity": {"kind": "mil"}}, rsum=300.0)
    measure(two, "digits_1k", {"ties": "official", "similarity": {"kind": "mil", "alpha": 4}, "folds": 5}, rsum=200.0)
    measure(one, "digits_5k", {"ties": "pessimistic"}, rsum=30.0, i2t_R1=3.0)
    measure(two, "digits_5k", {"ties": "pessimistic"}, rsum=20.0, i2t_R1=2.0)
    both = compare.compare([one, two, three])
    reasons = ["folds: - | 5", "similarity.alpha: - | 4", "ties: pessimistic | official"]
    assert both.mixed == both.to_json()["not_comparable"] == {"digits_1k": reasons}
    assert {row.name: row.values for row in both.rows} == {
        "a": {"digits_5k/rsum": 30.0, "digits_5k/i2t_R1": 3.0},
        "b": {"digits_5k/rsum": 20.0, "digits_5k/i2t_R1": 2.0},
        "c": {},
    }
    console = Console(width=120)
    with console.capture() as printed:
        console.print(tables.comparison(both))
    assert "digits_1k: folds: - | 5; similarity.alpha: - | 4; ties: pessimistic | official" in printed.get()
    alone = compare.compare([one, three])
    assert alone.mixed == {}
    assert {row.name: row.values for row in alone.rows}["a"]["digits_1k/rsum"] == 300.0


def test_models_with_similarities_of_their_own_are_compared_and_the_difference_is_said(tmp_path: Path) -> None:
    one, two = (make(tmp_path, name, "a: 1\n") for name in "ab")
    measure(one, "coco_5k", {"ties": "pessimistic", "similarity": {"kind": "smooth_chamfer", "alpha": 4}}, rsum=300.0)
    measure(two, "coco_5k", {"ties": "pessimistic", "similarity": {"kind": "smooth_chamfer", "alpha": 8}}, rsum=200.0)
    both = compare.compare([one, two])
    assert both.mixed == {}
    assert both.own_similarity == both.to_json()["own_similarity"] == {"coco_5k": ["similarity.alpha: 4 | 8"]}
    assert {row.name: row.values["coco_5k/rsum"] for row in both.rows} == {"a": 300.0, "b": 200.0}
    console = Console(width=120)
    with console.capture() as printed:
        console.print(tables.comparison(both))
    assert "each model is measured with its own similarity: similarity.alpha: 4 | 8" in printed.get()


def test_names_are_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    runs = [make(tmp_path, f"coco_resnet152-{name}", "x: 1\n", 1, 2.0) for name in "ab"]
    for one in runs:
        for benchmark in ("coco_1k", "coco_5k", "coco_5k.official_ties"):
            measure(one, benchmark, {"ties": "pessimistic"}, rsum=300.0)
    console = Console(width=50)
    with console.capture() as printed:
        console.print(tables.comparison(compare.compare(runs)))
    assert "…" not in printed.get()


def test_a_comparison_is_one_json_object(tmp_path: Path) -> None:
    runs = [make(tmp_path, "a", "x: 1\n", 1, 2.0, "FINISHED"), make(tmp_path, "b", "x: 2\n")]
    value = json.loads(json.dumps(compare.compare(runs).to_json()))
    assert value["runs"][0] == {
        "name": "a",
        "status": "finished",
        "epochs": 1,
        "settings": {"x": 1},
        "values": {"val/rsum": 2.0},
    }
    assert value["not_comparable"] == {}
