"""The deck of a study of variants: what its numbers are, how claims are judged, and that the page is always written."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch

import browser
from setwise.pipelines import compare, evaluate, index, lineage, prepare, records, references, statistics, trained_model
from setwise.pipelines.benchmarks import Outcome, QueryRanks
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.platform import cluster, config, run, storage
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from setwise.sweeps import (
    analysis,
    deck,
    deck_claims,
    deck_measure,
    deck_page,
    deck_speed,
    earlier,
    plan,
    report,
    space,
    study_run,
)
from setwise.sweeps import confirm as confirmation
from setwise.sweeps import run as sweeps
from setwise.sweeps import study as studies
from setwise.sweeps.deck import Found
from setwise.sweeps.deck_measure import Measured
from setwise.sweeps.deck_speed import Speed
from setwise.sweeps.space import Study
from setwise.sweeps.variants import Claim
from trainings import train_run

TEXT = """
recipe: digits_cnn_bigru
overrides:
  train.epochs: 2
  train.batch_size: 20
  model.embed_size: 16
  model.image_encoder.channels: [8, 8]
  model.text_encoder.word_dim: 8
  model.set_prediction.head_dim: 4
seeds: 2
variants:
  vector: {overrides: {model.set_prediction.num_slots: 1}}
  dive: {}
  mil: {overrides: {similarity.kind: mil}}
  failing: {}
  k2: {group: K, overrides: {model.set_prediction.num_slots: 2}}
deck:
  baseline: vector
  reference: dive
  images: 40
  timed: [vector, dive]
  claims:
    - {says: "a set beats a vector", better: dive, than: vector}
    - {says: "sets collapse by MIL", of: spread, better: dive, than: mil}
    - {says: "a vector has no spread", of: spread, better: dive, than: vector}
    - {says: "sets take longer", of: search, better: vector, than: dive}
    - {says: "it beats what failed", better: dive, than: failing}
"""
REASON = "DivergedError: <script>alert(1)</script> is no number"
SIZES = (20, 60)


def quiet(_: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Made:
    """A study whose trials were trained in this process, one of which failed and one of which did not begin."""

    store: Path
    spec: Study
    base: Recipe
    study: optuna.Study

    def found(self) -> Found:
        return deck.collect(self.study, self.spec, "decked", self.store, quiet)

    def training(self, number: int) -> Run:
        return references.trial_run("decked", number, self.store)


@pytest.fixture(scope="module")
def made(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two seeds of three variants; `failing` failed with its first seed, and the last trial, k2 again, is missing."""
    own = tmp_path_factory.mktemp("deck")
    (own / "data").symlink_to(store / "data")
    file = own / "decked.yaml"
    file.write_text(TEXT)
    spec, base = space.load(str(file))
    study_run.begin(spec, base, "decked", own, prepare.open_prepared("digits", own))
    deck.keep(spec, "decked", own)
    study = studies.open_study(own / "studies" / "decked", "decked", spec, "me", [(one, "grid") for one in spec.grid()])
    for number in range(len(spec.grid()) - 1):
        trial = study.ask()
        values = studies.draw(trial, spec, config.flatten(base))
        assert (trial.number, values) == (number, spec.grid()[number])
        if values["variant"] == "failing":
            trial.set_user_attr(studies.REASON, REASON)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        recipe = spec.recipe_of(base, values)
        name = references.trial_run("decked", number, own).name
        training = run.create(own / "runs", name, config.to_yaml(recipe), "decked")
        Outbox(training.events).append({"kind": "params", "values": {"variant": values["variant"]}})  # as a trial does
        for epoch in train_run(own, training, recipe):
            trial.report(epoch["val/rsum"], int(epoch["epoch"]))
        study.tell(trial, references.best_value(training))
        records.end(training, "FINISHED")
    return Made(own, spec, base, study)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small galleries."""
    monkeypatch.setattr(deck_speed, "measured", _small(deck_speed.measured))


def _small(measured: Callable[..., Speed]) -> Callable[..., Speed]:
    return lambda models, store, folder: measured(models, store, folder, SIZES)


def recall(scores_QG: np.ndarray, right: list[set[int]], k: int) -> float:
    """R@K in percent by sorting each query's gallery, what is wrong first among equals."""
    hits = 0
    for scores, own in zip(scores_QG, right, strict=True):
        order = sorted(range(len(scores)), key=lambda item: (-scores[item], item in own))
        hits += any(item in own for item in order[:k])
    return 100 * hits / len(scores_QG)


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_values_are_recalls_on_the_first_images_and_means_over_seeds(made: Made) -> None:
    found = made.found()
    standing = found.standing("dive")
    assert standing is not None and [one.seed for one in standing.runs] == [0, 1]
    assert "40 images, 200 captions" in found.test
    rsums = []
    for number in (1, 6):
        model = trained_model.load(made.training(number).best_checkpoint())
        split = index.open_split(model, prepare.open_prepared("digits", made.store), "test")
        images = model.encode_images(torch.stack([split.batch([place]).images[0] for place in range(40)]))
        owners = [int(owner) for owner in split.owners if owner < 40]
        texts = torch.cat([model.encode_captions([split.caption(place)]) for place in range(len(owners))])
        scores = model.scores(images, texts).double().numpy()
        of_images = [{place for place, owner in enumerate(owners) if owner == image} for image in range(40)]
        i2t = [recall(scores, of_images, k) for k in (1, 5, 10)]
        t2i = [recall(scores.T, [{owner} for owner in owners], k) for k in (1, 5, 10)]
        rsums.append(sum(i2t + t2i))
        outcome = standing.runs[len(rsums) - 1].outcome
        assert [outcome.values[f"i2t_R{k}"] for k in (1, 5, 10)] == pytest.approx(i2t)
        assert [outcome.values[f"t2i_R{k}"] for k in (1, 5, 10)] == pytest.approx(t2i)
    rsum = standing.values["rsum"]
    assert rsum.value == pytest.approx(sum(rsums) / 2) and rsum.low < rsum.value < rsum.high
    assert standing.stored == (64, 64)
    vector = found.standing("vector")
    assert vector is not None and vector.stored == (16, 16) and vector.difference is None
    assert standing.difference is not None and standing.corrected is not None
    assert standing.difference.value == pytest.approx(rsum.value - vector.values["rsum"].value)
    assert standing.corrected >= standing.difference.p
    # Of one seed there is an interval over images, but no p-value, nor is one counted in the others' correction.
    single, mil = found.standing("k2"), found.standing("mil")
    assert single is not None and mil is not None and mil.difference is not None
    assert single.difference is not None and single.corrected is None and single.to_json()["p corrected"] is None
    pair = [standing.difference.p, mil.difference.p]
    assert [standing.corrected, mil.corrected] == pytest.approx(statistics.holm(pair))


@pytest.mark.usefixtures("quick")
def test_what_a_training_was_given_is_told(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store, symlinks=True)
    before = run.create(store / "runs", "before", "train: {epochs: 7}\n", "tests")
    Outbox(before.events).metrics(6, {"train/seconds": 60.0})
    Outbox(before.events).metrics(7, {"train/seconds": 70.5})
    trainings = [references.trial_run("decked", number, store) for number in (1, 6)]
    parents = {"parents": [{"run": "before", "checkpoint": "epoch_0007"}]}
    storage.write_json(trainings[0].folder / lineage.FILE, parents)
    found = deck.collect(made.study, made.spec, "decked", store, quiet)
    dive, vector = found.standing("dive"), found.standing("vector")
    assert dive is not None and vector is not None
    spent = []
    for training in trainings:
        told = [event["values"] for event in run.read_events(training.events) if event["kind"] == "metrics"]
        spent.append([values["train/seconds"] for values in told if "train/seconds" in values][-1])
    expected = [3.5, 20, 16, made.base.optimizer.lr, sum(spent) / 2, 35.25]
    assert [dive.budget(name) for name in deck_measure.BUDGET] == pytest.approx(expected)
    assert vector.budget("pre-training epochs") == 0 and vector.budget("pre-training seconds") == 0
    text = deck_page.render(found, store)
    assert "Not equal are pre-training epochs, training seconds and pre-training seconds" in text
    shutil.rmtree(before.folder)
    gone = deck.collect(made.study, made.spec, "decked", store, quiet).standing("dive")
    assert gone is not None and len(gone.runs) == 2 and gone.budget("pre-training seconds") is None


def test_the_first_so_many_images_are_the_whole_split_where_it_has_no_more(made: Made) -> None:
    training = made.training(2)
    part = deck_measure.measure(training, "mil", 0, made.store, 1000)
    whole = deck_measure.measure(training, "mil", 0, made.store, None)
    assert part.outcome.values == whole.outcome.values and whole.outcome.benchmark == "digits_5k"
    for direction, ranks in whole.outcome.ranks.items():
        assert np.array_equal(part.outcome.ranks[direction].ranks, ranks.ranks)
    names = {one.benchmark for one in evaluate.recorded(training)}
    assert {"digits_first_1000", "digits_5k"} <= names


def test_what_was_measured_once_is_read_and_other_weights_are_measured_anew(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = deck_measure.measure(made.training(0), "vector", 0, made.store, 30)
    counted: list[int] = []
    original = deck_measure.first
    monkeypatch.setattr(
        deck_measure, "first", lambda model, split, images: (counted.append(images), original(model, split, images))[1]
    )
    again = deck_measure.measure(made.training(0), "vector", 0, made.store, 30)
    assert not counted and again.outcome.values == first.outcome.values
    copied = Run(tmp_path / "copied")
    shutil.copytree(made.training(0).folder, copied.folder)
    for kept in copied.evaluation.glob("*.safetensors"):
        kept.write_bytes(b"torn")
    mended = deck_measure.measure(copied, "vector", 0, made.store, 30)
    assert counted == [30] and mended.outcome.values == first.outcome.values
    counted.clear()
    shutil.rmtree(copied.folder)
    shutil.copytree(made.training(0).folder, copied.folder)
    shutil.copytree(made.training(1).checkpoints, copied.checkpoints, dirs_exist_ok=True)
    other = deck_measure.measure(copied, "dive", 0, made.store, 30)
    assert counted == [30] and other.outcome.values != first.outcome.values


def test_the_health_of_sets_is_that_of_the_best_epoch(made: Made) -> None:
    training = made.training(1)
    measured = deck_measure.measure(training, "dive", 0, made.store, 40)
    best = int(storage.read_json(training.folder / "best.json")["checkpoint"].rpartition("_")[2])
    events = [e for e in run.read_events(training.events) if e["kind"] == "metrics" and "val/rsum" in e["values"]]
    values = next(event["values"] for event in events if event["step"] == best)
    assert measured.health == {name: value for name, value in values.items() if name.startswith("sets/")}
    assert measured.health[deck_measure.SPREAD] == measured.spread[best]
    assert list(measured.curve) == [1, 2] and measured.validation == max(measured.curve.values())
    vector = deck_measure.measure(made.training(0), "vector", 0, made.store, 40)
    assert not vector.spread and deck_measure.SPREAD not in vector.health


def test_what_a_run_once_said_of_draws_is_not_shown_as_the_health_of_sets(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "gaussian" not in deck_measure.OF_SETS
    monkeypatch.setattr(deck_measure, "OF_SETS", ("pie_net",))  # as if the slots of this run were draws
    measured = deck_measure.measure(made.training(1), "dive", 0, made.store, 40)
    assert not measured.health and not measured.spread and len(measured.curve) == 2


def test_an_interval_of_one_system_is_as_wide_as_images_and_seeds_make_it() -> None:
    random = np.random.default_rng(0)
    images = 400
    hits = [random.random(images) < 0.3 for _ in range(3)]
    outcomes = [outcome_of(np.where(hit, 1, 99)) for hit in hits]
    found = statistics.intervals(outcomes, resamples=4000)["i2t_R1"]
    assert found.value == pytest.approx(100 * np.mean(hits))
    # By the variance of the mean: over images of their means over seeds, and over seeds.
    of_images = np.mean(hits, axis=0).var(ddof=1) / images
    of_seeds = np.var([hit.mean() for hit in hits], ddof=1) / 3
    low, high = (100 * math.sqrt(of_images) * 1.96, 100 * math.sqrt(3 * of_images + of_seeds) * 1.96)
    assert low < found.high - found.value < high and low < found.value - found.low < high
    perfect = statistics.intervals([outcome_of(np.ones(50))])["i2t_R1"]
    assert (perfect.low, perfect.value, perfect.high) == (100, 100, 100)
    one = statistics.intervals(outcomes[:1], resamples=4000)["i2t_R1"]
    share = hits[0].mean()
    assert one.high - one.low == pytest.approx(2 * 196 * math.sqrt(share * (1 - share) / images), rel=0.1)
    with pytest.raises(ValueError, match="one seed at least"):
        statistics.intervals([])


# --- claims -----------------------------------------------------------------------------------------------------


def outcome_of(ranks: np.ndarray) -> Outcome:
    """Ranks of images among captions and of captions, one each, among images."""
    ids = np.arange(len(ranks))
    found = {direction: QueryRanks(ids, ids, ranks.astype(np.int32)) for direction in ("i2t", "t2i")}
    values = {f"{direction}_R{k}": 100 * float((ranks <= k).mean()) for direction in found for k in (1, 5, 10)}
    return Outcome("x", {"rsum": sum(values.values()), **values}, {"ties": "pessimistic"}, found)


def measured_of(ranks: np.ndarray, spread: float | None = None, curve: tuple[float, ...] = (1.0, 2.0)) -> Measured:
    health = {} if spread is None else {deck_measure.SPREAD: spread}
    epochs = dict(enumerate(curve, start=1))
    return Measured("v", 0, Run(Path("none")), max(curve), epochs, outcome_of(ranks), (1, 1), health, {})


def judged(better: list[Measured], than: list[Measured], of: Any = "rsum") -> deck_claims.Judged:
    claim = Claim(says="so it is", of=of, better="a", than="b")
    return deck_claims.judge(claim, {"a": better, "b": than}, None)


def test_a_claim_of_rsum_is_judged_by_the_interval_of_the_difference() -> None:
    good, bad = np.where(np.arange(100) < 90, 1, 50), np.where(np.arange(100) < 30, 1, 50)
    held = judged([measured_of(good)] * 2, [measured_of(bad)] * 2)
    assert held.verdict == "held" and held.value == pytest.approx(360) and "gained" not in held.numbers
    lost = judged([measured_of(bad, curve=(5, 6, 7, 10))] * 2, [measured_of(good, curve=(5, 6, 9, 9))] * 2)
    assert lost.verdict == "did not hold" and lost.value == pytest.approx(-360)
    assert "a still gained 3.0 in val RSUM, b 0.0" in lost.numbers
    same = judged([measured_of(good)] * 2, [measured_of(np.roll(good, 50))] * 2)
    assert same.verdict == "not decided" and same.interval is not None and same.interval[0] < 0 < same.interval[1]


@pytest.mark.parametrize(("better", "than"), [(1, 1), (1, 3), (3, 1)])
def test_a_claim_of_rsum_is_not_decided_by_one_seed(better: int, than: int) -> None:
    good, bad = np.where(np.arange(100) < 90, 1, 50), np.where(np.arange(100) < 30, 1, 50)
    found = judged([measured_of(good)] * better, [measured_of(bad)] * than)
    assert found.verdict == "not decided" and "one seed of a side" in found.numbers
    assert found.interval is not None and found.interval[0] > 0  # which over images alone would have decided it


def test_a_claim_of_spread_is_judged_over_seeds() -> None:
    ranks = np.ones(10)
    wide = [measured_of(ranks, value) for value in (-1.0, -1.1, -0.9)]
    narrow = [measured_of(ranks, value) for value in (-8.0, -8.2, -7.7)]
    assert judged(wide, narrow, "spread").verdict == "held"
    assert judged(narrow, wide, "spread").verdict == "did not hold"
    assert judged(wide, wide, "spread").verdict == "not decided"
    alone = judged(wide[:1], narrow, "spread")
    assert alone.verdict == "not decided" and "one seed" in alone.numbers and alone.interval is None
    assert judged(wide, [measured_of(ranks)], "spread").numbers == "b has no sets of several elements"


def test_a_claim_of_search_time_is_judged_over_repetitions() -> None:
    times = {"a": {100: [1.0] * 9, 5000: [2.0] * 9}, "b": {100: [1.0] * 9, 5000: [20.0] * 8 + [1.0]}}
    speed = Speed(1, "CPU", {"a": [1.0] * 9, "b": [1.0] * 9}, {"a": [1.0] * 9, "b": [1.0] * 9}, times)

    def of(better: str, than: str) -> deck_claims.Judged:
        return deck_claims.judge(Claim(says="x", of="search", better=better, than=than), {}, speed)

    held = of("a", "b")
    assert held.verdict == "held" and held.value == 10 and "10.0 times as long" in held.numbers
    assert of("b", "a").verdict == "did not hold" and of("a", "a").verdict == "not decided"
    assert of("a", "c").verdict == "not measured" and "c were not timed" in of("a", "c").numbers
    assert speed.per_thousand("b") == pytest.approx(1000 * 19 / 4900)
    assert "20.0 times as long for 50 times the images" in speed.growth("b")


def test_a_claim_about_what_is_not_there_is_not_measured() -> None:
    assert judged([measured_of(np.ones(9))], []).numbers == "no training of b was measured"


# --- times ------------------------------------------------------------------------------------------------------


def test_times_are_taken_once_for_the_same_models(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {number: trained_model.load(made.training(number).best_checkpoint()) for number in (0, 1)}
    first = deck_speed.measured({"a": models[0]}, made.store, tmp_path, SIZES)
    assert first.sizes == list(SIZES) and first.repetitions == deck_speed.REPETITIONS
    assert all(len(times) == deck_speed.REPETITIONS and min(times) > 0 for times in first.search["a"].values())
    assert deck_speed.measured({"a": models[0]}, made.store, tmp_path, SIZES) == first
    assert deck_speed.measured({"a": models[1]}, made.store, tmp_path, SIZES) != first
    monkeypatch.setattr(deck_speed, "WAY", deck_speed.WAY + 1)
    again = deck_speed.measured({"a": models[1]}, made.store, tmp_path, SIZES)
    monkeypatch.undo()
    file = tmp_path / deck_speed.FILE
    kept = storage.read_json(file)
    assert kept["speed"]["caption"] == again.caption
    del kept["of"]["way"]  # as times were kept before cross-attention was made faster
    storage.write_json(file, kept)
    assert deck_speed.measured({"a": models[1]}, made.store, tmp_path, SIZES) != again
    assert json.loads(json.dumps(first.to_json()))["medians"]["a"]["search"].keys() == {"20", "60"}


# --- the page ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_page_opens_offline_and_says_what_failed(made: Made, tmp_path: Path) -> None:
    page = deck.write(made.study, made.spec, "decked", made.store, quiet)
    with browser.page() as visit:
        visit.open(page)
        visit.page.wait_for_selector("#systems .main-svg")
        assert not visit.errors and not visit.outside and not visit.broken_images() and not visit.scrolls_sideways()
        body = visit.page.inner_text("body")
        for plot in ("speed", "spread", "ablation-K"):
            assert visit.page.locator(f"#{plot} .main-svg").count()
        assert visit.page.locator("article").count() == 6 and visit.page.locator("article img").count() == 6 * 5
        visit.screenshot(tmp_path / "deck.png", whole=True)
    assert f"failing, seed 0 (decked-003)\t{REASON}" in body
    assert "a set beats a vector" in body and "no training of failing was measured" in body
    assert "vector has no sets of several elements" in body
    assert body.count("over images alone\n") == 1 or body.count("over images alone\t") == 1  # k2, of one seed
    assert "What a training costs" in body and "All variants see the same images for 2 epochs." in body
    data = json.loads(page.with_name(deck.DATA).read_text())
    assert [one["variant"] for one in data["variants"]] == ["vector", "dive", "mil", "k2"]
    assert [len(one["runs"]) for one in data["variants"]] == [2, 2, 2, 1]
    assert len(data["missing"]) == 2 and len(data["claims"]) == 5
    events = [
        e["path"] for e in run.read_events(analysis.parent("decked", made.store).events) if e["kind"] == "artifact"
    ]
    assert {"deck.html", "deck.json"} <= set(events)
    before = page.read_bytes()
    assert deck.write(made.study, made.spec, "decked", made.store, quiet).read_bytes() == before
    with browser.page(script=False) as visit:
        visit.open(page)
        assert "The plots need JavaScript" in visit.page.inner_text("body")


@pytest.mark.usefixtures("quick")
def test_ablations_stand_beside_what_they_vary_in_the_order_of_their_values(made: Made) -> None:
    found = made.found()
    assert [one.name for one in found.ablations["K"]] == ["k2", "dive"]
    assert deck.varied(made.spec, ["dive", "k2"]) == ["model.set_prediction.num_slots"]
    assert deck.varied(made.spec, ["dive", "k2", "mil"]) == ["model.set_prediction.num_slots", "similarity.kind"]
    assert [one.name for one in found.group("systems")] == ["vector", "dive", "mil"]


@pytest.mark.usefixtures("quick")
def test_a_damaged_checkpoint_costs_its_own_row_alone(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store, symlinks=True)
    for number in (0, 2, 7):
        weights = references.trial_run("decked", number, store).best_checkpoint() / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    page = deck.write(made.study, made.spec, "decked", store, quiet)
    data = json.loads(page.with_name(deck.DATA).read_text())
    assert [(one["variant"], len(one["runs"])) for one in data["variants"]] == [("vector", 1), ("dive", 2), ("k2", 1)]
    damaged = [one for one in data["missing"] if "it cannot be measured" in one["reason"]]
    assert len(damaged) == 3 and all("damaged" in one["reason"] for one in damaged)
    assert "decked-007" in page.read_text()


@pytest.mark.usefixtures("quick")
def test_an_error_that_nobody_foresaw_takes_no_other_row_away(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store, symlinks=True)
    measure = deck_measure.measure

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    def measured(training: Run, *more: Any) -> Measured:
        return fail() if training.name == "decked-000" else measure(training, *more)  # type: ignore[return-value]

    monkeypatch.setattr(deck_measure, "measure", measured)
    monkeypatch.setattr(deck_page, "_attention", fail)
    monkeypatch.setattr(deck_speed, "measured", fail)
    page = deck.write(made.study, made.spec, "decked", store, quiet)
    missing = json.loads(page.with_name(deck.DATA).read_text())["missing"]
    assert {"what": "query times", "reason": "RuntimeError: CUDA out of memory"} in missing
    assert "it cannot be measured: RuntimeError: CUDA out of memory" in [one["reason"] for one in missing]
    assert "it cannot be drawn: RuntimeError: CUDA out of memory" in page.read_text()


def test_a_study_of_failures_alone_has_a_page_too(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "studies" / "decked").mkdir(parents=True)
    (store / "data").symlink_to(made.store / "data")
    study = optuna.create_study(direction="maximize")
    for values in made.spec.grid()[:2]:
        domains = {name: made.spec.space[name].distribution() for name in values}
        failed = optuna.trial.create_trial(
            params=values,
            distributions=domains,
            state=optuna.trial.TrialState.FAIL,
            user_attrs={studies.REASON: "fire"},
        )
        study.add_trial(failed)
    page = deck.write(study, made.spec, "decked", store, quiet)
    text = page.read_text()
    assert "No system was measured" in text and "fire" in text and "mil" in text and "not begun yet" in text
    assert len(text) < 100_000  # plotly is left out


@pytest.mark.usefixtures("quick")
def test_the_claims_of_the_last_start_count_and_autoencoders_of_the_store_are_told(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store, store, symlinks=True)
    other = made.spec.model_copy(
        update={"deck": made.spec.deck.model_copy(update={"claims": (), "timed": (), "baseline": "mil"})}
    )
    deck.keep(other, "decked", store)
    for name, dataset in (("discovered", "digits"), ("elsewhere", "clevr")):
        text = f"data: {{name: {dataset}}}\nmodel: {{kind: slot_autoencoder}}\n"
        slots = run.create(store / "runs", name, text, "tests")
        for epoch, (ari, psnr) in enumerate(((10.0, 9.0), (70.0, 20.0), (80.0, 15.0)), start=1):
            Outbox(slots.events).metrics(epoch, {"val/ari": ari, "val/psnr": psnr})
    found = deck.collect(made.study, analysis.recorded("decked", store).spec, "decked", store, quiet)
    assert not found.judged and found.speed is None and found.baseline == "mil"
    assert found.autoencoders == ({"run": "discovered", "epochs": 3, "val/ari": 70.0, "val/psnr": 20.0},)


# --- everything that reads trials -------------------------------------------------------------------------------


def test_a_study_of_variants_is_read_back_from_its_own_record(made: Made) -> None:
    recorded = analysis.recorded("decked", made.store)
    assert recorded.spec.identity == made.spec.identity and recorded.base == made.base
    assert recorded.spec.recipe_of(recorded.base, recorded.spec.grid()[2]).similarity.kind == "mil"


def test_tables_and_notes_name_variants(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    found = analysis.of(made.study, made.spec, "decked", made.store)
    assert [row.settings["variant"] for row in found.rows][:4] == ["vector", "dive", "mil", "failing"]
    assert not found.advice and "vector" in analysis.render(found)
    outcome = report.outcome_of(made.study, made.spec, "decked", made.store, {}, None)
    best = outcome.best
    assert best is not None and not outcome.repeatable
    note = study_run.description(made.spec, outcome)
    variant = made.spec.grid()[int(best.name[-3:])]["variant"]
    assert f"| {variant} |" in note and "5 variants, with 2 seeds each" in note
    monkeypatch.setattr(Study, "grid", lambda study: pytest.fail("claims may have changed the order of trials since"))
    assert study_run.description(made.spec, outcome) == note


def test_a_comparison_names_variants_and_not_all_that_differs_between_systems(made: Made) -> None:
    compared = compare.compare(references.find_runs("decked", made.store))
    assert len(compared.rows) == 7 and all(row.settings.keys() == {"variant", "train.seed"} for row in compared.rows)
    assert {row.settings["variant"] for row in compared.rows} == {"vector", "dive", "mil", "k2"}


def test_what_makes_no_sense_for_variants_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match=r"several seeds already.* seeds=4 --trials 20 --name NAME"):
        confirmation.confirm("decked", made.store, Tracker(made.store), quiet, 1, 3)
    with pytest.raises(ConfigError, match="trains all of them"):
        earlier.settings(["decked"], made.spec, made.base, made.store, quiet)
    spec, base = space.load("digits", ["model.embed_size=16"])
    said: list[str] = []
    assert earlier.settings(["decked"], spec, base, made.store, said.append)  # they may be where another begins


def test_a_plan_names_the_variants(made: Made) -> None:
    told = plan.describe(made.spec, made.base, "decked", made.store, None)
    assert "'decked' of 5 variants: 10 trials of at most 2 epochs" in told
    assert "  k2 (K): digits_cnn_bigru, model.set_prediction.num_slots=2\n" in told
    assert "at most" in plan.describe(made.spec, made.base, "decked", made.store, "cpu").splitlines()[-1]


@dataclass
class Stops:
    """In place of the trainings of a study."""

    how: str | KeyboardInterrupt

    def __call__(self, *_: Any) -> str:
        if isinstance(self.how, str):
            return self.how
        raise self.how


@pytest.mark.parametrize("how", ["max_hours=1 is used up", "setwise sweep stop was asked for", KeyboardInterrupt()])
def test_the_deck_of_a_study_that_never_ends_can_be_written(
    how: str | KeyboardInterrupt, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "_tune", Stops(how))
    monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)
    (tmp_path / "data").symlink_to(made.store / "data")
    (tmp_path / "endless.yaml").write_text(TEXT)
    spec, base = space.load(str(tmp_path / "endless.yaml"))
    said: list[str] = []
    ends = contextlib.nullcontext() if isinstance(how, str) else pytest.raises(KeyboardInterrupt)
    with ends:
        sweeps.run_study(spec, base, "endless", tmp_path, Tracker(tmp_path), said.append)
    # As `analyze` does, which knows of the study only what it recorded.
    recorded = analysis.recorded("endless", tmp_path).spec
    study = studies.load(tmp_path / "studies" / "endless", "endless")
    found = deck.collect(study, recorded, "endless", tmp_path, quiet)
    assert found.settings == spec.deck and len(found.judged) == 5
    advice = [one for one in said if "setwise sweep analyze endless" in one]
    assert len(advice) == (how == "setwise sweep stop was asked for")  # after Ctrl-C nothing takes its time any more
    assert (tmp_path / "studies" / "endless" / deck.PAGE).is_file() == (how == "max_hours=1 is used up")


@pytest.mark.ray
@pytest.mark.driver
def test_a_small_version_runs_through_ray_and_goes_on_where_it_was(store: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(store / "data")
    (tmp_path / "small.yaml").write_text(TEXT.replace("timed: [vector, dive]", "timed: []"))
    said: list[str] = []
    spec, base = space.load(str(tmp_path / "small.yaml"), ["trials=1", "train.epochs=1"])
    first = sweeps.run_study(spec, base, "small", tmp_path, Tracker(tmp_path), said.append)
    assert first.complete == 1 and any("deck.html" in one for one in said)
    spec, base = space.load(str(tmp_path / "small.yaml"), ["trials=2", "train.epochs=1"])
    second = sweeps.run_study(spec, base, "small", tmp_path, Tracker(tmp_path), said.append)
    assert second.complete == 2
    data = json.loads((tmp_path / "studies" / "small" / deck.DATA).read_text())
    assert [one["variant"] for one in data["variants"]] == ["vector", "dive"]
    assert [one["what"] for one in data["missing"]] == ["mil", "failing", "k2"]
    trial = references.trial_run("small", 1, tmp_path)
    params: dict[str, str] = {}
    for event in run.read_events(trial.events):
        params |= event["values"] if event["kind"] == "params" else {}
    assert params["variant"] == "dive" and params["train.epochs"] == "1"
    reference = Reference(trial.name, trial.best_checkpoint(), trial)
    assert evaluate.evaluate([reference], tmp_path, names=["digits_5k"])[0].values["rsum"] > 0
