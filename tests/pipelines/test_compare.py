"""Runs beside each other: what differs, what was measured, and what cannot be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import recordings
from setwise.pipelines import compare, evaluate, statistics, tables
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.compare import Cell, SideBySide, System
from setwise.pipelines.statistics import Difference
from setwise.platform import storage
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run


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


# --- systems side by side -------------------------------------------------------------------------------------------


def systems(store: Path, *names: str) -> list[System]:
    return [System.of(name, store) for name in names]


def printed(compared: SideBySide, width: int = 100) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(tables.side_by_side(compared))
    return captured.get()


def test_each_system_is_its_seeds_and_is_tested_against_the_first(tmp_path: Path) -> None:
    recordings.three_and_two(tmp_path)
    found = compare.side_by_side(systems(tmp_path, "k1", "k4"))
    assert [(one.name, len(one.runs), one.validation) for one in found.systems] == [
        ("k1", 3, [300, 301, 302]),
        ("k4", 2, [300, 301]),
    ]
    metrics = ["i2t_R1", "i2t_map_at_r", "t2i_R1", "t2i_map_at_r"]
    assert [(line.benchmark, line.metric) for line in found.lines] == [
        *(("digits_5k", metric) for metric in ("rsum", "i2t_R1", "t2i_R1")),
        *(("digits_extended", metric) for metric in metrics),
    ]
    outcomes = [
        [evaluate.with_queries(run, evaluate.recorded(run)[0]) for run in system.runs] for system in found.systems
    ]
    expected = statistics.differences(outcomes[1], outcomes[0], resamples=compare.RESAMPLES)
    for line in found.lines[:3]:
        baseline, other = line.cells
        values = [outcome.values[line.metric] for outcome in outcomes[0]]
        assert (baseline.mean, baseline.deviation) == (
            pytest.approx(np.mean(values)),
            pytest.approx(np.std(values, ddof=1)),
        )
        assert (baseline.difference, baseline.corrected, baseline.verdict) == (None, None, None)
        assert other.difference == expected[line.metric]
    tested = [line.cells[1] for line in found.lines]
    assert found.tests == 7
    adjusted = statistics.holm([cell.difference.p for cell in tested if cell.difference])
    assert [cell.corrected for cell in tested] == adjusted
    assert {cell.verdict for cell in tested} == {"better"}
    turned = compare.side_by_side(systems(tmp_path, "k4", "k1"))
    assert {line.cells[1].verdict for line in turned.lines} == {"worse"}


def test_a_difference_that_chance_makes_is_undecided(tmp_path: Path) -> None:
    for name in ("c", "d"):
        recordings.measured(recordings.trained(tmp_path, name))
    found = compare.side_by_side(systems(tmp_path, "c", "d"))
    for line in found.lines:
        assert line.cells[1].verdict == "undecided" and line.cells[1].deviation is None
    assert "Of one seed the interval says nothing about what another seed would give." in printed(found, 200)


def test_metrics_are_chosen_by_their_end_or_their_name(tmp_path: Path) -> None:
    recordings.three_and_two(tmp_path)
    both = systems(tmp_path, "k1", "k4")

    def shown(metrics: list[str] | None) -> list[str]:
        return [line.metric for line in compare.side_by_side(both, metrics).lines if line.benchmark == "digits_5k"]

    assert shown(["R5"]) == ["i2t_R5", "t2i_R5"]
    assert shown(["t2i_R10", "rsum"]) == ["rsum", "t2i_R10"]
    assert shown(None) == ["rsum", *(f"{d}_R{k}" for d in ("i2t", "t2i") for k in (1, 5, 10))]
    with pytest.raises(ConfigError, match=r"no metric is called 'i2tR1'\. Did you mean 'i2t_R1'"):
        shown(["i2tR1"])
    only_one = compare.side_by_side(both, ["rsum"])
    assert list(only_one.protocols) == ["digits_5k"]


def test_what_is_not_measured_is_said_with_the_command(tmp_path: Path) -> None:
    recordings.three_and_two(tmp_path)
    recordings.trained(tmp_path, "k4-seed2", "model: {set_prediction: {num_slots: 4}}\n")
    part = recordings.trained(tmp_path, "part")
    recordings.measured(part)
    old = recordings.trained(tmp_path, "old")
    recordings.measured(old)
    (old.evaluation / "digits_5k.safetensors").unlink()
    other = recordings.trained(tmp_path, "birds")
    storage.write_bytes(other.config, b"data: {name: birds}\n")
    found = compare.side_by_side(systems(tmp_path, "k1", "k4", "part", "old", "birds"))
    both = ["digits_5k", "digits_extended"]
    assert found.unmeasured == {"k4-seed2": both, "part": ["digits_extended"], "old": both, "birds": []}
    assert [cell.system for cell in found.lines[0].cells] == ["k1", "k4", "part"]
    shown = printed(found, 200)
    assert "not measured of k4-seed2: digits_5k, digits_extended. Do so: setwise eval k4-seed2" in shown
    assert "not measured of birds: all. Do so: setwise eval birds" in shown
    assert " 2/3 " in shown, "how many of the seeds were measured"


def test_without_a_measured_baseline_there_are_values_and_no_differences(tmp_path: Path) -> None:
    recordings.trained(tmp_path, "a")
    recordings.measured(recordings.trained(tmp_path, "b"))
    found = compare.side_by_side(systems(tmp_path, "a", "b"))
    assert found.tests == 0 and [cell.system for cell in found.lines[0].cells] == ["b"]
    assert "p:" not in printed(found)
    none = compare.side_by_side(systems(tmp_path, "a"))
    assert none.lines == [] and "setwise eval a" in printed(none)


def test_only_equal_protocols_stand_side_by_side_and_the_reason_is_named(tmp_path: Path) -> None:
    one, two = recordings.trained(tmp_path, "a"), recordings.trained(tmp_path, "b")
    for run, alpha in ((one, 4), (two, 8)):
        recordings.measured(run, "digits_1k", similarity={"kind": "smooth_chamfer", "alpha": alpha})
    recordings.measured(one, "digits_5k")
    recordings.measured(two, "digits_5k", ids="others")
    found = compare.side_by_side(systems(tmp_path, "a", "b"))
    assert {line.benchmark for line in found.lines} == {"digits_1k"}
    assert found.mixed == {"digits_5k": ["ids: - | others"]}
    assert len(found.protocols["digits_1k"][1]) == 2
    shown = printed(found, 200)
    assert "left out, since measured under protocols that differ:\n  digits_5k: ids: - | others" in shown
    assert "each model is measured with its own similarity: similarity.alpha: 4 | 8" in shown


def test_settings_that_differ_are_shown_and_seeds_that_differ_in_more_than_the_seed_are_named(tmp_path: Path) -> None:
    recordings.three_and_two(tmp_path)
    recordings.trained(tmp_path, "k4-seed2", "model: {set_prediction: {num_slots: 2}}\n", status=None)
    found = compare.side_by_side(systems(tmp_path, "k1", "k4"))
    assert found.settings == {"model.set_prediction.num_slots": [1, 4]}
    assert found.uneven == {"k4": ["model.set_prediction.num_slots"]}
    assert found.unfinished == ["k4-seed2"]
    shown = printed(found, 200)
    assert "model.set_prediction.num_slots: 1 | 4" in shown
    assert "the runs of k4 differ in model.set_prediction.num_slots" in shown
    assert "not finished: k4-seed2" in shown


def test_a_study_among_systems_is_its_best_trial_with_all_seeds(tmp_path: Path) -> None:
    for name, best in (("s-000", 310.0), ("s-001", 305.0), ("s-001-seed1", 309.0), ("k1", 300.0)):
        recordings.measured(recordings.trained(tmp_path, name, best=best))
    for reference in ("s", "best:s"):
        assert [run.name for run in System.of(reference, tmp_path).runs] == ["s-001", "s-001-seed1"]
    found = compare.side_by_side(systems(tmp_path, "k1", "s"))
    assert [cell.system for cell in found.lines[0].cells] == ["k1", "s-001"]
    with pytest.raises(ConfigError, match="two references mean 's-001'"):
        compare.side_by_side(systems(tmp_path, "s", "s-001"))


def test_the_table_fits_a_terminal_of_100_columns_and_says_nothing_by_colour_alone(tmp_path: Path) -> None:
    recordings.three_and_two(tmp_path)
    shown = printed(compare.side_by_side(systems(tmp_path, "k1", "k4")))
    rows = [line for line in shown.splitlines() if " RSUM " in line or "▲" in line]
    assert max(map(len, shown.splitlines())) <= 100 and "…" not in shown
    assert len(rows) == 1 + 7 + 1, "the baseline's first, one for each difference, and the note"
    numbers = r"k4 +2/2 +\d+\.\d ± \d+\.\d +\+\d+\.\d +\[\+\d+\.\d, \+\d+\.\d\] +(<\.001|\.\d{3}) +▲"
    assert re.search(numbers, rows[1])


def test_narrow_intervals_get_another_decimal() -> None:
    def shown(low: float, value: float, high: float, corrected: float) -> list[str]:
        return tables.numbers(Cell("a", 2, 0.8, 0.04, Difference(value, low, high, 0.001), corrected))

    assert shown(-0.1, -0.06, -0.02, 0.0004) == ["0.80 ± 0.04", "-0.06", "[-0.10, -0.02]", "<.001", "▼"]
    assert shown(-0.1, 0.94, 1.98, 0.0504) == ["0.80 ± 0.04", "+0.9", "[-0.1, +2.0]", ".050", "≈"]
    assert shown(1, 2, 3, 1.0)[3] == "1.000"
    assert tables.numbers(Cell("a", 2, 224.03, 1.94, None, None))[0] == "224.0 ± 1.9"


def test_systems_side_by_side_are_one_json_object(tmp_path: Path) -> None:
    recordings.three_and_two(tmp_path)
    value = json.loads(json.dumps(compare.side_by_side(systems(tmp_path, "k1", "k4")).to_json()))
    assert value["baseline"] == "k1"
    assert value["systems"][1] == {"name": "k4", "runs": ["k4-seed0", "k4-seed1"], "val/rsum": [300, 301]}
    assert value["test"] == {"resamples": 10_000, "confidence": 95, "alpha": 0.05, "tests": 7}
    first = value["lines"][0]
    assert (first["benchmark"], first["metric"]) == ("digits_5k", "rsum")
    assert first["systems"][1].keys() == {
        *("system", "seeds", "mean", "deviation", "difference", "corrected", "verdict"),
    }
    assert first["systems"][1]["difference"].keys() == {"value", "low", "high", "p"}
