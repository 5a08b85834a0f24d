"""Ray Train for real: two workers give the training that one gives, and survive the death of one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from setwise.pipelines import launch, recipe, train, worker_group
from setwise.pipelines.workers import Worker
from setwise.platform import cluster, run
from setwise.platform.config import to_yaml
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from tiny import TINY_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.driver]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster.connect(cpus=3):
        yield


def start(store: Path, name: str, workers: int, *more: str) -> tuple[recipe.Recipe, Run]:
    settings = recipe.load("digits_cnn_bigru", [*TINY_MODEL, f"train.workers={workers}", *more])
    return settings, run.create(store / "runs", name, to_yaml(settings), experiment="tests")


def curve(training: Run) -> list[dict[str, float]]:
    """What was recorded of each epoch, and its number."""
    epochs = [event for event in run.read_events(training.events) if event.get("series") == "train"]
    return [{"epoch": float(event["step"]), **event["values"]} for event in epochs]


def test_two_workers_train_as_one_does(store: Path) -> None:
    """The global batches and the loss over them are the same; only the order of float sums differs."""
    curves = {}
    for workers in (1, 2):
        settings, training = start(store, f"workers-{workers}", workers)
        told: list[dict[str, float]] = []
        worker_group.train_with_ray(settings, training, store, on_epoch=told.append)
        curves[workers] = curve(training)
        assert told == curves[workers]
    assert [values["epoch"] for values in curves[2]] == [1, 2, 3]
    for name in ("train/i2t", "train/t2i", "train/mmd", "train/diversity", "train/total", "train/gradient_norm"):
        one, two = ([values[name] for values in curves[workers]] for workers in (1, 2))
        assert two == pytest.approx(one, rel=2e-4), name
    for one_epoch, two_epoch in zip(curves[1], curves[2], strict=True):
        assert two_epoch["val/rsum"] == pytest.approx(one_epoch["val/rsum"], abs=3)


def test_more_workers_take_over_where_one_stopped(store: Path) -> None:
    """Nothing random is kept in a process, so a run goes on with another number of workers as if nothing had changed;
    with dropout, and a batch that two cannot share evenly."""
    dropout = ("model.set_prediction.dropout=0.3", "model.text_encoder.dropout=0.2", "train.batch_size=15")
    settings, alone = start(store, "one-to-the-end", 1, *dropout)
    worker_group.train_with_ray(settings, alone, store)
    settings, training = start(store, "one-then-two", 1, *dropout)

    def stop(values: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(settings, training, store, Worker(), stop)
    assert len(curve(training)) == 1
    worker_group.train_with_ray(start(store, "two", 2, *dropout)[0], training, store)
    assert [values["epoch"] for values in curve(training)] == [1, 2, 3]
    for expected, found in zip(curve(alone), curve(training), strict=True):
        for name in ("train/total", "train/gradient_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-4), name


def test_a_worker_finds_the_standard_librarys_platform_and_the_package() -> None:
    """The root of the repository, with its folder `platform`, is on the path of every worker."""
    import ray

    @ray.remote
    def look() -> tuple[str, str, str]:
        import platform

        from setwise.platform import errors

        return platform.system(), str(platform.__file__), errors.__name__

    system, file, package = ray.get(look.remote())
    assert system == "Linux" and "python" in file and package == "setwise.platform.errors"


def _workers_of_train(marker: str) -> list[int]:
    """Processes of Ray Train's workers in the cluster of this test."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if marker in line and str(os.getpid()) not in line]


def test_a_killed_worker_is_replaced_and_the_run_ends_on_the_same_numbers(store: Path) -> None:
    import threading

    settings, undisturbed = start(store, "two-undisturbed", 2, "train.epochs=6")
    worker_group.train_with_ray(settings, undisturbed, store)
    settings, training = start(store, "two-disturbed", 2, "train.epochs=6")
    killed: list[int] = []

    def kill_one() -> None:
        while not curve(training):
            time.sleep(0.02)
        killed.extend(_workers_of_train("ray::RayTrainWorker")[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    worker_group.train_with_ray(settings, training, store)
    killer.join()
    assert killed
    steps = [event["step"] for event in run.read_events(training.events) if event.get("series") == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    times = ("train/seconds", "train/images_per_second")
    without_time = [
        [{name: value for name, value in values.items() if name not in times} for values in curve(one)]
        for one in (undisturbed, training)
    ]
    assert without_time[0] == without_time[1]


def test_an_error_in_a_worker_keeps_its_message_and_its_exit_code() -> None:
    carried = "ray.exceptions.RayTaskError\n  File x\nsetwise.platform.errors.{}: the hub said: Error: 5\n\nmore"
    for kind, code in ((DataError, 5), (UnreachableError, 6)):
        told = worker_group._explained(RuntimeError(carried.format(kind.__name__)), Run(Path("a/run")))
        assert type(told) is kind and told.exit_code == code
        assert str(told) == "the hub said: Error: 5 (run a/run)"
    other = ValueError("KeyError: 'x'")
    assert worker_group._explained(other, Run(Path("a/run"))) is other


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"text_encoder": {"kind": "bigru", "word_vectors": "no/such/file.txt"}}, "there is no file no/such/file.txt"),
        ({"text_encoder": {"kind": "bert", "weights": "no such/model"}}, "neither a folder nor the name of a model"),
        (
            {"image_encoder": {"kind": "grid", "weights": "IMAGENET"}},
            "neither a file nor a name of torchvision's weights",
        ),
    ],
)
def test_weights_that_are_not_there_are_missed_before_anything_starts(
    store: Path, encoder: dict[str, Any], message: str
) -> None:
    values = recipe.load("digits_cnn_bigru").model_dump()
    values["model"] |= encoder
    with pytest.raises(DataError, match=message):
        launch.plan("mine", recipe.Recipe.model_validate(values), "mine", store)
    assert not (store / "runs" / "mine").exists()


def test_more_workers_than_there_are_processors_are_refused_at_once(store: Path) -> None:
    settings, training = start(store, "too-many", 4)
    with pytest.raises(ConfigError, match=r"train\.workers=4, but the cluster has 0 GPUs and 3 CPUs"):
        worker_group.train_with_ray(settings, training, store)


def test_a_path_in_a_recipe_is_relative_to_where_the_user_is(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would move its workers into folders of its own."""
    import ray

    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors.txt").write_text("red 1 2 3 4 5 6 7 8\n")
    ray.shutdown()  # so that the next one is started from this folder
    changed = ("train.epochs=1", "model.text_encoder.word_vectors=vectors.txt")
    with cluster.connect(cpus=2):
        settings, training = start(store, "relative", 1, *changed)
        worker_group.train_with_ray(settings, training, store)
    assert len(curve(training)) == 1


def test_region_features_cannot_be_read_off_images(store: Path) -> None:
    settings = recipe.load("digits_cnn_bigru", ["model.image_encoder.kind=butd"])
    with pytest.raises(DataError, match="holds images, and an image encoder of kind 'butd' reads region features"):
        launch.plan("mine", settings, "mine", store)


def test_seeds_are_runs_of_one_name_counted_from_the_recipes_own(store: Path) -> None:
    settings = recipe.load("digits_cnn_bigru", [*TINY_MODEL, "train.seed=3"])
    planned = launch.plans("digits_cnn_bigru", settings, "mine", 2, store)
    assert [(plan.name, plan.recipe.train.seed) for plan in planned] == [("mine-seed3", 3), ("mine-seed4", 4)]
    assert launch.title_of(planned) == "mine"
    (alone,) = launch.plans("digits_cnn_bigru", settings, None, None, store)
    assert launch.title_of([alone]) == alone.name and alone.recipe == settings


def test_deaths_without_progress_are_counted_whatever_the_machine_records_meanwhile(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayActorError

    settings, training = start(store, "hopeless", 1)
    attempts: list[int] = []

    def dies(*arguments: object) -> BaseException:
        attempts.append(1)
        Outbox(training.events).metrics(len(attempts), {"system/cpu": 1.0}, series="system")
        if len(attempts) == 2:
            (training.steps / "epoch_0000_step_000500").mkdir(parents=True)
        return RayActorError()

    monkeypatch.setattr(worker_group, "room", lambda recipe: (1, False))
    monkeypatch.setattr(worker_group, "_attempt", dies)
    with pytest.raises(RayActorError):
        worker_group.train_with_ray(settings, training, store)
    assert len(attempts) == 1 + worker_group.MAX_FAILURES
