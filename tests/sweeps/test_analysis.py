"""What is told of a study, and its page, for studies of every shape, the odd ones too."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects
import pytest
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from rich.console import Console

from browser import Visit, page
from setwise.platform import config, run
from setwise.platform.errors import ConfigError
from setwise.platform.tracking import Tracker
from setwise.sweeps import analysis, plots, report, space, verbs
from setwise.sweeps import study as studies
from setwise.sweeps.space import Study

ODD = "</script><b>odd"


def spec_of(**changes: Any) -> Study:
    """A space with a choice of numbers, one of words, a switch, a number, its logarithm and whole numbers."""
    domains = {
        "model.set_prediction.num_slots": {"choice": [1, 2, 4]},
        "loss.negatives": {"choice": ["mean", ODD]},
        "train.drop_last": {"choice": [True, False]},
        "similarity.alpha": {"loguniform": [4, 64]},
        "optimizer.clip_norm": {"uniform": [0.5, 2.5]},
        "train.batch_size": {"int": [10, 40]},
        "loss.diversity_weight": {"loguniform": [0.001, 0.1], "when": "model.set_prediction.num_slots > 1"},
    }
    return Study.model_validate({"recipe": "digits_cnn_bigru", "space": domains, **changes})


def settings_of(spec: Study, number: int) -> dict[str, Any]:
    slots = (1, 2, 4)[number % 3]
    values = {
        "model.set_prediction.num_slots": slots,
        "loss.negatives": ("mean", ODD)[number % 2],
        "train.drop_last": number % 4 < 2,
        "similarity.alpha": 4 * 16 ** ((number * 7 % 11) / 11),
        "optimizer.clip_norm": 0.5 + 2 * (number * 5 % 13) / 13,
        "train.batch_size": 10 + number % 31,
    }
    if slots > 1:
        values["loss.diversity_weight"] = 0.001 * 100 ** ((number * 3 % 7) / 7)
    return values


def add(
    study: optuna.Study,
    spec: Study,
    state: TrialState,
    rsums: Sequence[float] = (),
    costs: Sequence[float] = (),
    **attributes: str,
) -> None:
    """A trial that reached `rsums`, epoch by epoch."""
    params = settings_of(spec, len(study.trials))
    distributions: dict[str, BaseDistribution] = {name: spec.space[name].distribution() for name in params}
    values = [max(rsums), *costs] if state == TrialState.COMPLETE else None
    told = {} if costs else dict(enumerate(rsums, start=1))
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            params=params,
            distributions=distributions,
            values=values,
            intermediate_values=told,
            user_attrs=attributes,
        )
    )


def begun(spec: Study, store: Path, name: str = "tests") -> optuna.Study:
    """An empty study whose own run has begun in `store`."""
    run.create(store / "studies", name, config.to_yaml(spec), name)
    directions = ["maximize" if one == "val/rsum" else "minimize" for one in spec.objectives]
    return optuna.create_study(directions=directions)


def ordinary(spec: Study, store: Path, trials: int) -> optuna.Study:
    """A study with every state a trial can be in."""
    study = begun(spec, store)
    for number in range(trials):
        if number % 5 == 3:
            add(study, spec, TrialState.PRUNED, [40, 50 + number % 5])
        elif number % 11 == 6:
            add(study, spec, TrialState.FAIL, [30], reason="the loss is <not> finite")
        else:
            source = {} if number else {"source": "recipe"}
            add(study, spec, TrialState.COMPLETE, [60, 70 + number % 3, 100 + 20 * (number % 3) + number % 7], **source)
    add(study, spec, TrialState.RUNNING, [45])
    return study


def several_objectives(spec: Study, store: Path) -> optuna.Study:
    study = begun(spec, store)
    for number in range(9):
        add(study, spec, TrialState.COMPLETE, [100 + number], [16.0 * (1 + number % 4), 2.0 + number % 3])
    add(study, spec, TrialState.FAIL, reason="out of memory")
    return study


def titles(visit: Visit, plot: str) -> list[str]:
    """The titles of the axes of a plot, as they are drawn."""
    texts: list[str] = visit.page.eval_on_selector_all(
        f"#{plot} .xtitle, #{plot} .ytitle, #{plot} .axis-title", "found => found.map(one => one.textContent)"
    )
    return texts


def drawn(visit: Visit) -> dict[str, int]:
    """How many drawings each plot of the page has."""
    found: dict[str, int] = visit.page.eval_on_selector_all(
        ".plot",
        "all => Object.fromEntries(all.map(one => [one.id, one.querySelectorAll('svg.main-svg, canvas').length]))",
    )
    return found


def test_the_page_opens_alone_and_draws_every_plot_with_titles_on_its_axes(tmp_path: Path) -> None:
    spec = spec_of()
    study = ordinary(spec, tmp_path, 30)
    study_page = analysis.write(study, spec, "tests", tmp_path)
    with page() as visit:
        visit.open(study_page)
        visit.page.wait_for_selector("#parallel svg .axis-title")
        assert visit.errors == [] and visit.outside == []
        assert visit.requests == [study_page.as_uri()]
        assert not visit.scrolls_sideways()
        plots_drawn = drawn(visit)
        assert {"importance", "history", "parallel", *(f"slice-{place}" for place in range(7))} == set(plots_drawn)
        assert all(plots_drawn.values())
        assert titles(visit, "history") == ["trial", "val RSUM"]
        assert titles(visit, "slice-3") == ["similarity.alpha", "val RSUM"]
        assert titles(visit, "importance") == ["share of importance for val RSUM, % (PED-ANOVA)", "setting"]
        assert titles(visit, "parallel")[-2:] == ["diversity_weight", "val RSUM"]
        ticks = "found => found.map(one => one.textContent)"
        assert visit.page.eval_on_selector_all("#slice-1 .xtick text", ticks) == ["mean", ODD]
        text = visit.page.inner_text("body")
        assert "the loss is <not> finite" in text and "PED-ANOVA at epoch 2 over 28 trials" in text
        assert "setwise sweep analyze tests --confirm 3 --seeds 3" in text


def test_the_page_holds_plotly_once_and_links_to_nothing(tmp_path: Path) -> None:
    spec = spec_of()
    content = analysis.write(ordinary(spec, tmp_path, 8), spec, "tests", tmp_path).read_text()
    assert content.count("* plotly.js v") == 1
    assert "<script src" not in content and "<link" not in content
    assert content.count("</script>") == 2, "a setting's value must not end the script"
    assert len(content) < 5_500_000


def test_a_page_is_written_and_delivered_once_for_each_state_of_the_study(tmp_path: Path) -> None:
    spec = spec_of()
    study = ordinary(spec, tmp_path, 8)
    first = analysis.write(study, spec, "tests", tmp_path)
    written = first.stat().st_mtime_ns
    analysis.write(study, spec, "tests", tmp_path)
    noted = {"kind": "artifact", "path": "analysis.html", "into": ""}
    events = run.read_events(tmp_path / "studies" / "tests" / "events.jsonl")
    assert [{key: one[key] for key in noted} for one in events] == [noted]
    assert first.stat().st_mtime_ns == written
    add(study, spec, TrialState.COMPLETE, [1, 2, 300])
    assert "300.0" in analysis.write(study, spec, "tests", tmp_path).read_text()
    assert len(run.read_events(tmp_path / "studies" / "tests" / "events.jsonl")) == 2


def test_the_page_of_a_hundred_trials_takes_less_than_two_seconds(tmp_path: Path) -> None:
    spec = spec_of()
    study = ordinary(spec, tmp_path, 100)
    before = time.process_time()
    analysis.write(study, spec, "tests", tmp_path)
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    "shape", ["no trial", "one trial", "one unfinished", "only failed", "only pruned", "equal values"]
)
def test_a_study_of_any_shape_gets_a_page(shape: str, tmp_path: Path) -> None:
    spec = spec_of()
    study = begun(spec, tmp_path)
    if shape == "one trial":
        add(study, spec, TrialState.COMPLETE, [70, 90])
    elif shape == "one unfinished":
        add(study, spec, TrialState.RUNNING)
    elif shape == "only failed":
        for _ in range(5):
            add(study, spec, TrialState.FAIL, reason="the loss is not finite")
    elif shape == "only pruned":
        for number in range(5):
            add(study, spec, TrialState.PRUNED, [40 + number])
    elif shape == "equal values":
        for _ in range(5):
            add(study, spec, TrialState.COMPLETE, [0, 0])
    found = analysis.of(study, spec, "tests", tmp_path)
    content = analysis.render(found)
    assert found.importance.shares == {} or shape == "only pruned"
    assert ("No trial has a value" in content) == (shape in ("no trial", "one unfinished", "only failed"))
    assert ("sweep analyze tests --confirm" in content) == (shape in ("one trial", "equal values"))
    assert content.count("the loss is not finite") == (5 if shape == "only failed" else 0)
    json.dumps(found.to_json(), allow_nan=False)


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    spec = spec_of(objectives=["val/rsum", "embedding_size", "query_ms"])
    study = several_objectives(spec, tmp_path)
    found = analysis.of(study, spec, "tests", tmp_path)
    # sizes 16, 32, 48, 64 and 2, 3, 4 ms in turn: 8 has the highest RSUM, the smallest size and 4 ms
    beaten = {
        row.number
        for row in found.rows[:9]
        for other in found.rows[:9]
        if (other.value or 0) > (row.value or 0) and all(other.costs[name] <= row.costs[name] for name in row.costs)
    }
    assert set(found.front) == set(range(9)) - beaten and 8 in found.front and 0 in found.front
    assert [row.name for row in found.best[:2]] == ["tests-008", "tests-007"]
    figures = plots.fronts(found.rows, found.front, ["embedding_size", "query_ms"])
    assert figures["query_ms"]["data"][1]["y"] == [
        row.value for row in sorted(found.rows[:9], key=lambda row: row.costs["query_ms"]) if row.number in found.front
    ]
    assert figures["query_ms"]["data"][1]["mode"] == "markers", "a line through three objectives would mislead"
    assert plots.fronts(found.rows, found.front, ["query_ms"])["query_ms"]["data"][1]["mode"] == "lines+markers"
    content = analysis.render(found)
    assert content.count('<div class="plot" id="front-') == 2


def test_every_figure_is_one_that_plotly_knows(tmp_path: Path) -> None:
    spec = spec_of(objectives=["val/rsum", "embedding_size", "query_ms"])
    rows = analysis.of(several_objectives(spec, tmp_path), spec, "tests", tmp_path).rows
    figures = [
        *plots.slices(rows, spec.space).values(),
        *plots.fronts(rows, [0, 8], ["embedding_size", "query_ms"]).values(),
        plots.history(rows),
        plots.parallel(rows, spec),
        plots.importance({"a.b": 0.75, "c.b": 0.25}),
    ]
    for figure in figures:
        plotly.graph_objects.Figure(figure)  # raises ValueError for a name or a value that plotly.js does not have
    assert figures[-1]["data"][0]["y"] == ["c.b", "a.b"], "two settings with one last name keep their whole names"


def test_a_setting_that_a_trial_did_not_vary_has_a_place_below_the_others(tmp_path: Path) -> None:
    spec = spec_of()
    rows = analysis.of(ordinary(spec, tmp_path, 8), spec, "tests", tmp_path).rows
    ended = [row for row in rows if row.ended_well]
    figure = plots.slices(rows, spec.space)["loss.diversity_weight"]
    points = sum(len(trace["x"]) for trace in figure["data"])
    assert points == sum("loss.diversity_weight" in row.settings for row in ended) < len(ended)
    axis = next(
        one for one in plots.parallel(rows, spec)["data"][0]["dimensions"] if one["label"] == "diversity_weight"
    )
    unset = axis["tickvals"][axis["ticktext"].index(plots.UNSET)]
    assert axis["values"].count(unset) == len(ended) - points
    assert unset < -3 == axis["tickvals"][1], "10^-3 is the lowest weight there can be"


def test_the_best_until_then_is_of_ended_trials_and_never_falls(tmp_path: Path) -> None:
    spec = spec_of()
    study = begun(spec, tmp_path)
    add(study, spec, TrialState.FAIL, [500], reason="the loss is not finite")
    for value in (10, 30, 20):
        add(study, spec, TrialState.COMPLETE, [value])
    add(study, spec, TrialState.RUNNING, [40])
    found = analysis.of(study, spec, "tests", tmp_path)
    line = plots.history(found.rows)["data"][0]
    assert line["x"] == [0, 1, 2, 3, 4] and line["y"] == [None, 10, 30, 30, 30]
    assert [row.number for row in found.best] == [2, 3, 1]


def test_importance_is_of_trials_that_ended_and_warns_below_twenty(tmp_path: Path) -> None:
    spec = spec_of()
    study = ordinary(spec, tmp_path, 12)
    found = analysis.of(study, spec, "tests", tmp_path)
    assert (found.importance.trials, found.importance.epoch) == (11, 2)  # the failed one had reached epoch 1 alone
    assert found.to_json()["importance"]["few"] and "11 trials, which is few" in found.importance.sentence()
    enough = report.importance(ordinary(spec, tmp_path / "more", 24))
    assert not enough.few and "few" not in enough.sentence()


def test_what_a_study_was_begun_with_is_read_from_its_own_record(tmp_path: Path) -> None:
    for name, changes in (
        ("digits", list[str]()),
        ("paper", ["recipe=coco_butd_bigru"]),
        ("digits_pbt", ["trials=6", "train.epochs=4"]),
    ):
        spec, base = space.load(name, changes)
        folder = tmp_path / f"{len(changes)}"
        text = f"# study\n{config.to_yaml(spec.identity)}# recipe of trial 0\n{config.to_yaml(base)}# data 0123abcd\n"
        run.create(folder / "studies", "tests", text, "tests")
        found = analysis.recorded("tests", folder)
        assert found.spec.identity == spec.identity and found.base == base and found.data == "0123abcd"
    with pytest.raises(ConfigError, match=r"'test'.*Did you mean 'tests'"):
        analysis.recorded("test", tmp_path / "0")


def test_a_terminal_gets_the_best_with_their_settings_and_the_reasons_of_the_failed(tmp_path: Path) -> None:
    spec = spec_of()
    found = analysis.of(ordinary(spec, tmp_path, 12), spec, "tests", tmp_path)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "9 complete, 2 pruned, 1 failed, 1 unfinished" in text
    assert text.index("tests-005") < text.index("tests-011") and "similarity" not in text and "alpha" in text
    assert "tests-006: the loss is <not> finite" in text


def test_the_verb_writes_the_page_logs_it_to_the_studys_run_and_prints_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, base = space.load("digits")
    text = f"# study\n{config.to_yaml(spec.identity)}# recipe of trial 0\n{config.to_yaml(base)}# data 0123abcd\n"
    parent = run.create(tmp_path / "studies", "tests", text, "tests")
    study = studies.open_study(parent.folder, "tests", spec, "identity", [])
    distributions = {"similarity.alpha": spec.space["similarity.alpha"].distribution()}
    for number in range(5):
        params, told = {"similarity.alpha": 4.0 + number}, {1: 50.0 + number}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, value=50.0 + number, intermediate_values=told
            )
        )
    copy = tmp_path / "copy.html"
    verbs.app(["analyze", "tests", "--json", "--to", str(copy), "--store", str(tmp_path)], standalone_mode=False)
    told_of = json.loads(capsys.readouterr().out)
    assert told_of["best"][0] == "tests-004" and told_of["page"] == str(parent.folder / "analysis.html")
    assert told_of["importance"]["shares"] == {"similarity.alpha": 1.0} and told_of["importance"]["few"]
    assert copy.read_bytes() == (parent.folder / "analysis.html").read_bytes()
    tracker = Tracker(tmp_path)
    assert "analysis.html" in [one.path for one in tracker.client.list_artifacts(tracker.run_id(parent))]
