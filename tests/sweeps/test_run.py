"""Whole studies on a real Ray cluster: trials that share a GPU, trials of several workers, data that is not there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from setwise.pipelines import references
from setwise.platform import cluster, run
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.tracking import Tracker
from setwise.sweeps import run as sweeps
from setwise.sweeps import space
from tiny import TINY_MODEL

STUDY = [*TINY_MODEL, "train.epochs=2", "pruning=null", "trials=2"]


@pytest.fixture
def own(store: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").symlink_to(store / "data")
    return tmp_path


@pytest.fixture
def a_gpu_that_is_none() -> Iterator[None]:
    """A cluster that believes in a GPU: its processes are told to use it, find none, and train on the CPU."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.mark.ray
@pytest.mark.driver
def test_two_trials_share_a_gpu(own: Path, a_gpu_that_is_none: None) -> None:
    spec, base = space.load("digits", [*STUDY, "trials_per_gpu=2"])
    share = sweeps.share_of(base.train, spec.trials_per_gpu)
    assert share.at_once == 2 and share.resources["GPU"] == 0.5
    outcome = sweeps.run_study(spec, base, "shared", own, Tracker(own), lambda message: None)
    assert outcome.complete == 2 and outcome.best is not None
    first, second = (times(references.trial_run("shared", number, own)) for number in (0, 1))
    assert first[0] < second[1] and second[0] < first[1], "they trained at the same time"


def times(training: run.Run) -> tuple[int, int]:
    """When a run's record began and ended, in milliseconds."""
    events = run.read_events(training.events)
    return events[0]["time"], events[-1]["time"]


@pytest.mark.ray
@pytest.mark.driver
def test_a_trial_may_have_several_workers(own: Path) -> None:
    spec, base = space.load("digits", [*STUDY, "train.workers=2"])
    with cluster.connect(cpus=2):
        outcome = sweeps.run_study(spec, base, "parallel", own, Tracker(own), lambda message: None)
    assert outcome.complete == 2 and not outcome.failed
    for number in (0, 1):
        events = run.read_events(references.trial_run("parallel", number, own).events)
        assert [event["step"] for event in events if event.get("series") == "train"] == [1, 2]


def test_what_is_missing_is_said_before_a_cluster_starts(tmp_path: Path, own: Path) -> None:
    spec, base = space.load("digits", STUDY)
    with pytest.raises(DataError, match="setwise data prepare digits"):
        sweeps.run_study(spec, base, "tests", tmp_path / "nothing", Tracker(tmp_path), lambda message: None)
    with pytest.raises(ConfigError, match="cannot name a run"):
        sweeps.run_study(spec, base, "Tests!", own, Tracker(own), lambda message: None)
    with pytest.raises(ConfigError, match="-000-seed1' cannot name a run"):
        sweeps.run_study(spec, base, "x" * 75, own, Tracker(own), lambda message: None)
    assert not ray.is_initialized()
