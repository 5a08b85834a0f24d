"""What comes before a training: done once, in a run of its own, found again, gone on with, and started from."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from setwise.pipelines import (
    batches,
    evaluate,
    launch,
    lineage,
    plan,
    prepare,
    pretrained,
    pretraining,
    promote,
    recipe,
    records,
    tables,
    train,
    trained_model,
    worker_group,
)
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, cluster, config, run, storage
from setwise.platform.errors import ConfigError, DataError, StoppedError
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from setwise.sweeps import trial
from tiny import TINY_MODEL
from trainings import KilledError, start, train_run

CAPTIONER = """
extends: digits_cnn_captioner
model: {image_encoder: {channels: [8, 8]}, width: 16, ff_width: 32}
train: {batch_size: 20, epochs: 5}
"""


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    """A store of its own, with the data of the others."""
    (tmp_path / "data").symlink_to(store / "data")
    (tmp_path / "small_captioner.yaml").write_text(CAPTIONER)
    return tmp_path


def retriever(own: Path, *more: str) -> Recipe:
    before = (f"pretraining.recipe={own / 'small_captioner.yaml'}", "pretraining.epochs=2", "train.epochs=1")
    return recipe.load("digits_cnn_bigru", [*TINY_MODEL, *before, *more])


class Delivered:
    """A tracker that notes what it is given."""

    deadline = 0.0

    def __init__(self) -> None:
        self.runs: set[str] = set()

    def deliver(self, one: Run) -> None:
        self.runs.add(one.name)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are trained, by launch in this process instead of Ray's workers, in their order."""
    names: list[str] = []

    def here(settings: Recipe, training: Run, store: Path, on_epoch: Callable[..., None]) -> None:
        names.append(training.name)
        train.train(settings, training, store, Worker(), on_epoch)

    monkeypatch.setattr(worker_group, "train_with_ray", here)
    monkeypatch.setattr(worker_group, "room", lambda settings: (1, False))
    monkeypatch.setattr(worker_group, "interruptible", contextlib.nullcontext)  # signals come to the main thread alone
    monkeypatch.setattr(cluster, "connect", contextlib.nullcontext)
    return names


def go(own: Path, settings: Recipe, name: str | None = None) -> tuple[list[Run], list[str], set[str]]:
    said: list[str] = []
    tracker = Delivered()
    runs = launch.execute([launch.plan("tiny", settings, name, own)], cast(Tracker, tracker), said.append)
    return runs, said, tracker.runs


def test_one_command_trains_both_and_the_second_starts_from_the_first(own: Path, trained: list[str]) -> None:
    settings = retriever(own)
    (made,), said, delivered = go(own, settings, "main")
    before = pretraining.run_before(settings, prepare.open_prepared("digits", own), own)
    assert before is not None and before.name.startswith("small_captioner-")
    assert trained == [before.name, "main"] and delivered == set(trained)
    assert records.ended(before) and len(list(before.checkpoints.glob("epoch_*"))) == 2
    assert any("val/log_likelihood" in line for line in said) and any("val RSUM" in line for line in said)

    best = before.best_checkpoint()
    (parent,) = lineage.parents(made)
    digest = storage.read_json(best / checkpoint.MANIFEST)["files"][checkpoint.WEIGHTS]["sha256"]
    assert parent == {
        "run": before.name, "checkpoint": best.name, "weights_sha256": digest, "into": "image_encoder"
    }  # fmt: skip
    known = lineage.describe(made.best_checkpoint(), made)
    assert f"{before.name}/{best.name}" in dict(lineage.lines(known))["started from"]
    tags = {
        k: v for event in run.read_events(made.events) if event["kind"] == "tags" for k, v in event["values"].items()
    }
    assert tags["setwise.pretraining"].startswith(f"{before.name}/{best.name}, log-likelihood -")


def test_the_image_encoder_begins_as_the_captioner_s_ended_and_all_else_at_random(
    own: Path, trained: list[str]
) -> None:
    settings = retriever(own)
    plan = launch.plan("tiny", settings, "main", own)
    assert plan.before is not None
    launch.execute([plan.before], cast(Tracker, Delivered()), lambda text: None)
    prepared = prepare.open_prepared("digits", own)
    words = batches.open_words(settings, prepared)
    torch.manual_seed(0)
    system = trained_model.untrained(settings, len(words))
    before = {name: weight.clone() for name, weight in system.state_dict().items()}
    pretrained.start(system, settings, words, prepared, own)
    learned = checkpoint.weights(Run(own / "runs" / plan.before.name).best_checkpoint())
    for name, weight in system.state_dict().items():
        if name.startswith("retriever.image_encoder."):
            assert torch.equal(weight, learned[name.replace("retriever.", "captioner.")]), name
            assert weight.ndim < 2 or not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name


def test_it_is_done_once_and_found_by_other_trainings(own: Path, trained: list[str]) -> None:
    go(own, retriever(own), "first")
    _, said, _ = go(own, retriever(own, "similarity.alpha=8", "data.word_drop=0.2"), "second")
    before = trained[0]
    assert trained == [before, "first", "second"] and f"run '{before}' is complete already" in said
    assert "word_drop: 0.0\n" in Run(own / "runs" / before).config.read_text(), "captions are learned as they are"
    go(own, retriever(own, "train.seed=1"), "third")
    assert len(trained) == 5 and trained[3] != before, "another seed is another pre-training"


def test_it_has_the_data_and_the_place_of_the_training_that_it_comes_before(own: Path) -> None:
    settings = retriever(
        own, "data.flip=true", "data.word_drop=0.1", "train.seed=7", "train.precision=bf16", "train.threads=2"
    )
    first = pretraining.recipe_before(settings)
    assert first is not None
    assert first.data == settings.data.model_copy(update={"word_drop": 0.0})
    assert (first.train.seed, first.train.precision, first.train.threads) == (7, "bf16", 2)
    assert (first.train.epochs, first.train.batch_size) == (2, 20)
    plain = settings.model_copy(update={"pretraining": settings.pretraining.model_copy(update={"epochs": None})})  # type: ignore[union-attr]
    again = pretraining.recipe_before(plain)
    assert again is not None and again.train.epochs == 5


def test_seeds_have_a_pretraining_each(own: Path) -> None:
    planned = launch.plans("tiny", retriever(own), "mine", 2, own)
    names = [one.before.name for one in planned if one.before is not None]
    assert len(set(names)) == 2 and [one.name for one in planned] == ["mine-seed0", "mine-seed1"]
    assert "First, run 'small_captioner-" in planned[0].describe()


def test_killed_in_the_first_it_goes_on_there(own: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = retriever(own)
    here = worker_group.train_with_ray

    def killed(settings: Recipe, training: Run, store: Path, on_epoch: Callable[..., None]) -> None:
        def after_one(values: dict[str, Any]) -> None:
            raise KilledError

        here(settings, training, store, on_epoch=after_one)

    monkeypatch.setattr(worker_group, "train_with_ray", killed)
    with pytest.raises(KilledError):
        go(own, settings, "main")
    with pytest.raises(DataError, match="has not come to its end"):
        train_run(own, start(own, "alone", settings), settings)
    monkeypatch.setattr(worker_group, "train_with_ray", here)
    _, said, _ = go(own, settings, "main")
    assert any("from epoch_0001 on" in line for line in said)
    before = Run(own / "runs" / trained[0])
    steps = [event["step"] for event in run.read_events(before.events) if event.get("series") == "train"]
    assert steps == [1, 2] and trained == [before.name, before.name, "main"]


def test_it_goes_on_with_the_workers_that_are_there_now(
    own: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many began it is in its record, and no part of what it learns."""
    here = worker_group.train_with_ray
    workers: list[int] = []

    def killed_once(settings: Recipe, training: Run, store: Path, on_epoch: Callable[..., None]) -> None:
        workers.append(settings.train.workers)
        if len(workers) == 1:
            raise KilledError
        here(settings, training, store, on_epoch=on_epoch)

    monkeypatch.setattr(worker_group, "train_with_ray", killed_once)
    with pytest.raises(KilledError):
        go(own, retriever(own, "train.workers=2"), "first")
    (before,) = (own / "runs").glob("small_captioner-*")
    written = (before / "config.yaml").read_text()
    go(own, retriever(own), "second")
    assert workers == [2, 1, 1] and trained == [before.name, "second"]
    assert (before / "config.yaml").read_text() == written and "workers: 2" in written


def test_a_name_that_is_taken_is_told_before_it_is_trained(own: Path, trained: list[str]) -> None:
    run.create(own / "runs", "main", "data: {}\n", "tests")
    with pytest.raises(ConfigError, match="exists with another configuration"):
        go(own, retriever(own), "main")
    busy = start(own, "busy", retriever(own))
    with (
        storage.lease(busy.folder / "lease", "run 'busy'"),
        pytest.raises(storage.LeaseHeldError, match="run 'busy'"),
    ):
        go(own, retriever(own), "busy")
    assert trained == []


def test_who_stops_a_training_stops_what_comes_before_it(own: Path) -> None:
    main, before = (start(own, name, retriever(own)) for name in ("main", "before"))
    before.stop.touch()  # of another time
    with pretraining.stopping_with(main, before):
        assert not before.stop.exists()
        main.stop.touch()
        deadline = time.monotonic() + 30
        while not before.stop.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert before.stop.exists()


def test_whoever_comes_while_it_is_trained_waits_and_then_finds_it(own: Path, trained: list[str]) -> None:
    settings = retriever(own)
    planned = launch.plan("tiny", settings, "main", own)
    assert planned.before is not None
    before = Run(own / "runs" / planned.before.name)
    said: list[str] = []
    with pretraining.turn(before, said.append):
        waiting = threading.Thread(target=lambda: go(own, settings, "main"))
        waiting.start()
        run.create(own / "runs", before.name, config.to_yaml(planned.before.recipe), "tests")
        train_run(own, before, planned.before.recipe)
        records.end(before, "FINISHED")
        assert trained == []
    waiting.join(60)
    assert trained == ["main"] and said == []


def test_a_trial_that_waits_can_be_stopped(own: Path) -> None:
    waited: list[str] = []
    one = Run(own / "runs" / "busy")
    begun = time.monotonic()
    with (
        pretraining.turn(one, waited.append),
        pytest.raises(StoppedError, match="waited for the pre-training 'busy'"),
        pretraining.turn(one, waited.append, lambda: time.monotonic() > begun + 1.5),
    ):
        raise AssertionError("two have the same run")
    assert len(waited) == 1 and "which another training needs too" in waited[0]


def test_a_trial_of_a_sweep_does_it_in_its_process_and_the_next_one_finds_it(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    reported: list[dict[str, Any]] = []
    writers: list[str] = []
    pretrain = trial._pretrain

    def watched(recipe: Recipe, training: Run, store: Path) -> None:
        if storage.lease_owner(training.folder / "writer.lease") is not None:
            writers.append(training.name)
        pretrain(recipe, training, store)

    monkeypatch.setattr(trial, "_pretrain", watched)
    monkeypatch.setattr(tune, "report", reported.append)
    run.create(own / "studies", "mine", "a study\n", "mine")
    settings = trial.settings_of("mine", retriever(own), own, ("val/rsum",), population=False)
    for number, alpha in ((0, 8.0), (1, 4.0)):
        trial.train_trial({"trial": number, "values": {"similarity.alpha": alpha}}, settings)
    assert [one["epoch"] for one in reported] == [1, 1] and all(one["rsum"] > 0 for one in reported)
    assert writers == ["mine-000", "mine-001"], "for which a sweep waits that is stopped"
    (before,) = (own / "runs").glob("small_captioner-*")
    assert records.ended(Run(before))
    for number in (0, 1):
        (parent,) = lineage.parents(Run(own / "runs" / f"mine-{number:03d}"))
        assert parent["run"] == before.name


@pytest.mark.parametrize("by", ["trial", "train"])
def test_one_that_the_mirror_alone_has_is_brought_and_not_trained_again(
    own: Path, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Also where it was computed otherwise: that is no part of what it learned."""
    from ray import tune

    monkeypatch.setattr(tune, "report", lambda values: None)
    monkeypatch.setenv("SETWISE_MIRROR", (tmp_path / "far").as_uri())
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "data").symlink_to(own / "data")
    for store in (own, fresh):
        run.create(store / "studies", "mine", "a study\n", "mine")
    one = {"trial": 0, "values": {}}
    trial.train_trial(one, trial.settings_of("mine", retriever(own, "train.threads=2"), own, ("val/rsum",), False))
    (before,) = (own / "runs").glob("small_captioner-*")
    if by == "trial":
        trial.train_trial(one, trial.settings_of("mine", retriever(own), fresh, ("val/rsum",), False))
    else:
        _, said, _ = go(fresh, retriever(own), "main")
        assert any("was begun elsewhere" in line for line in said) and trained == ["main"]
    brought = Run(fresh / "runs" / before.name)
    for name in ("events.jsonl", "config.yaml"):
        assert (brought.folder / name).read_bytes() == (before / name).read_bytes()
    (parent,) = lineage.parents(Run(fresh / "runs" / ("mine-000" if by == "trial" else "main")))
    assert parent["run"] == before.name


def test_what_does_not_fit_is_named(own: Path) -> None:
    for change, message in (
        ("model.image_encoder.channels=[8, 16]", r"channels is \[8, 8\] there and \[8, 16\] here"),
        ("model.embed_size=32", "width .* is 16 there and 32 here"),
        ("pretraining.recipe=digits_slot_autoencoder", "is of kind 'slot_autoencoder'"),
        ("pretraining.recipe=digits_cnn_bigru", "is of kind 'retriever'"),
        ("pretraining.recipe=digits_cnn_captoner", "digits_cnn_captioner"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch.plan("tiny", retriever(own, change), "main", own)
        with pytest.raises(ConfigError, match=message):
            launch.check_trainable(retriever(own, change))
    with pytest.raises(ConfigError, match="pretraining comes before a retriever"):
        recipe.load("digits_cnn_captioner", ["pretraining.recipe=digits_cnn_captioner"])
    with pytest.raises(ConfigError, match="both say what the image encoder starts from"):
        recipe.load("coco_resnet50_bigru_virtex", ["model.image_encoder.weights=IMAGENET1K_V2"])


def test_batch_normalisation_may_stand_still_in_the_second_alone() -> None:
    settings = recipe.load("coco_resnet50_bigru_virtex")
    first = pretraining.recipe_before(settings)
    assert first is not None
    frozen = [cast(Any, one.model).image_encoder.frozen_batch_norm for one in (first, settings)]
    assert frozen == [False, True]
    with pytest.raises(ConfigError, match="keeps the statistics that came with the weights"):
        recipe.load("coco_resnet50_captioner", ["model.image_encoder.frozen_batch_norm=true"])


def test_it_is_one_pre_training_wherever_it_is_computed(own: Path) -> None:
    prepared = prepare.open_prepared("digits", own)
    names = {
        setting: pretraining.run_before(retriever(own, setting), prepared, own)
        for setting in (
            "train.threads=2",
            "train.workers=2",
            "train.loader_threads=1",
            "train.seed=1",
            "data.flip=true",
        )
    }
    usual = pretraining.run_before(retriever(own), prepared, own)
    assert [setting for setting, found in names.items() if found != usual] == ["train.seed=1", "data.flip=true"]


def test_a_run_that_is_behind_its_pre_training_needs_it_no_more(own: Path, trained: list[str]) -> None:
    """Whoever deletes a pre-training's run does not pay for it again with every command."""
    settings = retriever(own, "train.epochs=2")
    (training,), _, _ = go(own, settings, "main")
    (before,) = [name for name in trained if name != "main"]
    (own / "runs" / before).rename(own / "gone")
    trial._pretrain(settings, training, own)
    assert not (own / "runs" / before).exists()
    _, said, _ = go(own, settings, "main")
    assert trained == [before, "main"] and said[-1] == "run 'main' is complete already"


def test_another_encoder_than_the_recipe_says_is_no_beginning(own: Path, trained: list[str]) -> None:
    go(own, retriever(own), "main")
    before = Run(own / "runs" / trained[0])
    with pytest.raises(DataError, match="holds another image encoder"):
        pretraining.start(torch.nn.Linear(2, 2), before)


def test_the_shipped_recipes_fit_each_other() -> None:
    for name, epochs in (
        ("digits_cnn_bigru_virtex", 8),
        ("coco_resnet50_bigru_virtex", 1131),
        ("f30k_resnet50_bigru_virtex", 4425),
    ):
        first = pretraining.recipe_before(recipe.load(name))
        assert first is not None and first.train.epochs == epochs
        assert first.data.name == name.partition("_")[0]


def test_a_captioner_is_measured_on_the_test_split_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe.load(str(own / "small_captioner.yaml"), ["train.epochs=1"])
    training = start(own, "captioner", settings)
    train_run(own, training, settings)
    reference = Reference("captioner", training.best_checkpoint(), training)
    (measured,) = evaluate.evaluate([reference], own)
    assert set(measured.values) == {"log_likelihood", "token_accuracy", "perplexity"}
    assert (measured.protocol["images"], measured.protocol["captions"]) == (50, 250)
    (told,) = [event for event in run.read_events(training.events) if str(event.get("series")).startswith("test ")]
    assert told["values"] == {f"test/{name}": value for name, value in measured.values.items()} and told["step"] == 1

    system, words, _ = trained_model.load_system(training.best_checkpoint())
    split = batches.Split(prepare.open_prepared("digits", own), "test", settings.data, words)
    assert system.validate(split, 10, torch.device("cpu"))["val/log_likelihood"] == pytest.approx(
        measured.values["log_likelihood"], rel=1e-5
    )
    monkeypatch.setattr(type(system), "validate", lambda *arguments: pytest.fail("measured again"))
    assert evaluate.evaluate([reference], own) == [measured]
    from rich.console import Console

    console = Console(width=100, record=True)
    console.print(tables.outcome(measured))
    assert f"test/perplexity: {measured.values['perplexity']:.4g}" in console.export_text()
    with pytest.raises(ConfigError, match="has no benchmarks to name"):
        evaluate.evaluate([reference], own, names=["digits_1k"])
    with pytest.raises(ConfigError, match="has no embeddings"):
        evaluate.evaluate([reference, reference], own)
    said: list[str] = []
    with pytest.raises(ConfigError, match="has no embeddings"):
        promote.promote(reference, own, cast(Tracker, Delivered()), say=said.append)
    assert said == []


def test_a_plan_says_how_long_it_is_and_what_it_does_not_know(own: Path) -> None:
    for name in ("digits_cnn_captioner", "digits_slot_autoencoder", "coco_resnet50_captioner"):
        outline = plan.make(name, None, "a100x8", own)
        settings = recipe.load(name)
        told = json.loads(json.dumps(outline.to_json()))
        assert told["recipe"] == name and told["on"] == "a100x8"
        assert told["steps"] == told["steps_per_epoch"] * settings.train.epochs > 0
        (note,) = [line for line in outline.notes() if "not estimated" in line]
        assert settings.model.kind in note
    with_one = plan.make("digits_cnn_bigru_virtex", None, None, own)
    assert any("trained before that by the recipe digits_cnn_captioner" in note for note in with_one.notes())
