"""The MLflow pages as `setwise ui` serves them, opened in a real headless Chromium: what a user sees of a study."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

import browser
import commands
import servers
from setwise.pipelines import gallery, prepare, records, references, train
from setwise.pipelines.workers import Worker
from setwise.platform import config, run
from setwise.platform.tracking import Tracker
from setwise.sweeps import report, runs_view, space, study_run
from tiny import TINY_MODEL

NAME = "seen"
SLOTS, ALPHA, MMD = "model.set_prediction.num_slots", "similarity.alpha", "loss.mmd_weight"
TRIALS = ((4, 16, 0.01), (1, 8, 0.02), (2, 32, 0.05), (4, 60, 0.001))
PATIENCE_MS = 30_000

expect.set_options(timeout=PATIENCE_MS)


@dataclass
class Seen:
    """A study in MLflow: the address of its pages, ids, and what its trials came to."""

    server: str
    experiment: str
    runs: dict[str, str]
    rsum: dict[str, float]

    @property
    def best_first(self) -> list[str]:
        return sorted(self.rsum, key=lambda name: -self.rsum[name])

    def page_of(self, name: str, tab: str = "") -> str:
        return f"{self.server}/#/experiments/{self.experiment}/runs/{self.runs[name]}{tab}"


@pytest.fixture(scope="module")
def seen(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Four real trainings under one parent, delivered to a store of their own, and `setwise ui` on it."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "data").symlink_to(store / "data")
    tracker = Tracker(folder)
    spec, base = space.load("digits", [*TINY_MODEL, "train.epochs=2", "trials=4"])
    assert {SLOTS, ALPHA, MMD} <= set(spec.space)
    parent = study_run.begin(spec, base, NAME, folder, prepare.open_prepared("digits", folder))
    rsum = {}
    for number, values in enumerate(TRIALS):
        recipe = space.with_values(base, dict(zip((SLOTS, ALPHA, MMD), values, strict=True)))
        trial = run.create(folder / "runs", f"{NAME}-{number:03d}", config.to_yaml(recipe), NAME, parent)
        seen_by_trial: list[dict[str, float]] = []
        train.train(recipe, trial, folder, Worker(), seen_by_trial.append)
        rsum[trial.name] = max(values["val/rsum"] for values in seen_by_trial)
        records.end(trial, "FINISHED")
    best = references.best_of(NAME, folder)
    gallery.publish(gallery.make(references.resolve(best.name, folder, tracker), folder, queries=4), best)
    mattered = report.Importance({SLOTS: 0.6, ALPHA: 0.3, MMD: 0.1}, 4, 2)
    study_run.end(parent, spec, report.Outcome(NAME, 4, 0, {}, best, mattered))
    runs = [parent, *(run.Run(folder / "runs" / name) for name in rsum)]
    for one in runs:
        tracker.deliver(one)
    experiment = tracker.experiment_id(NAME)
    with ui(folder) as server:
        yield Seen(server, experiment, {one.name: tracker.run_id(one) for one in runs}, rsum)


@contextmanager
def ui(folder: Path) -> Iterator[str]:
    port = servers.free_port()
    with (folder / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            [commands.SETWISE, "ui", "--port", str(port)],
            env=commands.environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def answers() -> bool:
        assert process.poll() is None, (folder / "ui.log").read_text()
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
        return False

    try:
        commands.wait_for(answers, "an answer of `setwise ui`")
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def page() -> Iterator[browser.Visit]:
    """A page on which nothing may go wrong, and which may ask nobody but the server."""
    refused: list[str] = []
    with browser.page(1600, 1000) as visit:
        visit.page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
        # The panel of MLflow's assistant opens by itself at the first visit, and takes a third of the window.
        # A frame with an artifact may not even ask for what is stored.
        remember = "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"
        visit.page.add_init_script(remember)
        yield visit
        assert not visit.outside
        # MLflow asks who has logged in, and a server without accounts does not know.
        assert [url for url in refused if not url.endswith("/mlflow/users/current")] == []
        # Of what was refused the browser tells again, and of a size that changed while it was being drawn.
        assert [
            error for error in visit.errors if not re.search("^Failed to load resource|ResizeObserver", error)
        ] == []


def test_the_list_of_runs_shows_the_best_trial_first_with_what_was_swept(seen: Seen) -> None:
    with page() as visit:
        visit.open(runs_view.address(seen.server, seen.experiment))
        links = visit.page.get_by_role("link", name=re.compile(rf"^{NAME}-\d+$"))
        expect(links).to_have_text(seen.best_first)
        heads = visit.page.locator(".ag-header-cell")
        places = []
        for name in (*study_run.COLUMNS, SLOTS, ALPHA, MMD):
            head = heads.filter(has_text=name)
            expect(head).to_be_in_viewport()
            places.append(int(head.get_attribute("aria-colindex") or 0))
        assert places == sorted(places)
        shown = f"{seen.rsum[seen.best_first[0]]:.3f}".rstrip("0").rstrip(".")[:6]
        best = visit.page.get_by_role("gridcell", name=re.compile(rf"^{re.escape(shown)}"))
        expect(best.first).to_be_visible()


def test_the_list_as_mlflow_has_it_holds_the_trials_under_their_study(seen: Seen) -> None:
    with page() as visit:
        visit.open(f"{seen.server}/#/experiments/{seen.experiment}/runs?workflowType=machine_learning")
        parent = visit.page.get_by_role("link", name=NAME, exact=True)
        trials = visit.page.get_by_role("link", name=re.compile(rf"^{NAME}-\d+$"))
        expect(parent.first).to_be_visible()
        expect(trials).to_have_count(0)
        visit.page.locator("[data-testid='expander-icon'], .ag-cell button:has(svg)").first.click()
        expect(trials).to_have_count(len(TRIALS))


def test_the_charts_of_the_study_have_parallel_coordinates_and_the_curve_of_rsum(seen: Seen) -> None:
    with page() as visit:
        visit.open(runs_view.address(seen.server, seen.experiment, charts=True))
        axes = visit.page.locator("svg .axis text.label")
        expect(axes).to_have_text([SLOTS, ALPHA, MMD, "loss.diversity_weight", "best/val/rsum"])
        expect(visit.page.get_by_role("heading", name="val/rsum")).to_be_visible()


def test_the_comparison_of_chosen_runs_draws_parallel_coordinates_of_what_differs(seen: Seen) -> None:
    ids = [seen.runs[name] for name in seen.best_first]
    query = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([seen.experiment]))}"
    with page() as visit:
        visit.open(f"{seen.server}/#/compare-runs?{query}")
        expect(visit.page.get_by_text(f"Comparing {len(ids)} Runs from 1 Experiment")).to_be_visible()
        axes = visit.page.locator(".parcoords .axis-title")
        expect(axes).to_contain_text([MMD, SLOTS, ALPHA])
        for name in seen.best_first:
            expect(visit.page.get_by_text(name, exact=True).first).to_be_attached()


def test_the_page_of_a_trial_has_a_chart_of_each_curve(seen: Seen) -> None:
    best = seen.best_first[0]
    with page() as visit:
        visit.open(seen.page_of(best, "/model-metrics"))
        expect(visit.page.get_by_role("heading", name=best)).to_be_visible()
        for section, curve in (("sets", "text_slot_usage"), ("train", "images_per_second"), ("val", "i2t_R5")):
            visit.page.get_by_placeholder("Search metric charts").fill(f"{section}/{curve}")
            expect(visit.page.get_by_text(re.compile(rf"^{section} ?\(1\)")).first).to_be_visible()
            expect(visit.page.get_by_role("heading", name=curve, exact=True)).to_be_visible()


def test_the_artifacts_of_the_best_trial_show_its_gallery(seen: Seen) -> None:
    best = seen.best_first[0]
    with page() as visit:
        visit.open(seen.page_of(best, "/artifacts/gallery/gallery.html"))
        shown = visit.page.frame_locator("iframe")
        expect(shown.get_by_role("heading").first).to_be_visible()
        expect(shown.locator("img").first).to_be_visible()
        expect(shown.get_by_text(best).first).to_be_visible()


def test_the_page_of_the_study_says_what_was_swept_and_leads_to_its_trials(seen: Seen) -> None:
    with page() as visit:
        visit.open(seen.page_of(NAME))
        expect(visit.page.locator("strong", has_text=seen.best_first[0]).first).to_be_visible()
        for name in seen.rsum:
            expect(visit.page.get_by_role("link", name=name)).to_be_visible()
