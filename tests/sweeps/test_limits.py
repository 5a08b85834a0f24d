"""What stops a sweep, and the clock that goes on over its starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from setwise.pipelines.recipe import TrainConfig
from setwise.platform import cluster
from setwise.platform.cluster import Capacity
from setwise.platform.errors import ConfigError
from setwise.sweeps import limits, space
from setwise.sweeps import run as sweeps
from setwise.sweeps.limits import Limits, Stopped


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    return time


def spec(*overrides: str) -> space.Study:
    return space.load("digits", list(overrides))[0]


def test_hours_are_counted_over_all_starts(tmp_path: Path, now: list[float]) -> None:
    first = Limits(tmp_path, spec("max_hours=1"), gpus=0)
    now[0] += 3000
    first.check(running=2)
    second = Limits(tmp_path, spec("max_hours=1"), gpus=0)
    now[0] += 500
    second.check(running=2)
    now[0] += 200
    with pytest.raises(Stopped, match="max_hours=1 is used up"):
        second.check(running=2)
    assert limits.used_hours(tmp_path) == pytest.approx({"hours": 3700 / 3600, "gpu_hours": 0})


def test_gpu_hours_are_those_of_trials_that_run(tmp_path: Path, now: list[float]) -> None:
    one = Limits(tmp_path, spec("max_gpu_hours=1"), gpus=0.5)
    for _ in range(2):
        now[0] += 3600
        one.check(running=0)
    now[0] += 3600
    with pytest.raises(Stopped, match="max_gpu_hours"):
        one.check(running=2)


def test_a_wish_to_stop_is_heard_even_before_the_clock_runs_and_forgotten_at_the_next_start(tmp_path: Path) -> None:
    one = Limits(tmp_path, spec(), gpus=0)
    one.check(running=1)
    limits.ask_to_stop(tmp_path)
    with pytest.raises(Stopped, match="setwise sweep stop"):
        one.check(running=1)
    with pytest.raises(Stopped, match="setwise sweep stop"):  # asked for while the cluster starts
        Limits(tmp_path, spec(), gpus=0).check(running=0)
    limits.forget_stop(tmp_path)
    Limits(tmp_path, spec(), gpus=0).check(running=1)


def test_a_study_that_can_only_fail_is_given_up(tmp_path: Path) -> None:
    hopeless, mixed, lucky = (Limits(tmp_path / name, spec(), gpus=0) for name in ("a", "b", "c"))
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    lucky.ended(None)
    for number in range(limits.HOPELESS):
        hopeless.check(running=1)
        hopeless.ended("no such file")
        mixed.ended(f"reason {number}")
        lucky.ended("no such file")
    mixed.check(running=1)
    lucky.check(running=1)
    with pytest.raises(Stopped, match="all 5 trials failed, for one reason: no such file"):
        hopeless.check(running=1)


@pytest.mark.parametrize(("text", "hours"), [("8h", 8), ("45m", 0.75), ("1.5d", 36)])
def test_a_budget_is_a_number_and_a_unit(text: str, hours: float) -> None:
    assert limits.parse_hours(text) == pytest.approx(hours)


@pytest.mark.parametrize("text", ["8", "h", "", "-1h", "0h", "nanh", "8 hours", "infd"])
def test_any_other_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        limits.parse_hours(text)


@pytest.mark.parametrize(
    ("gpus", "cpus", "workers", "threads", "at_once", "used"),
    [
        (0, 2, 1, 1, 2, 0),
        (0, 8, 1, 4, 2, 0),
        (0, 1, 1, 4, 1, 0),
        (0, 8, 4, 1, 2, 0),
        (4, 16, 1, 1, 8, 0.5),
        (4, 16, 2, 1, 2, 2),
        (9, 16, 2, 1, 4, 2),
    ],
)
def test_as_many_trials_run_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, gpus: int, cpus: int, workers: int, threads: int, at_once: int, used: float
) -> None:
    monkeypatch.setattr(cluster, "capacity", lambda kinds: Capacity(gpus, cpus, grows=False))
    share = sweeps.share_of(TrainConfig(workers=workers, threads=threads), trials_per_gpu=2)
    assert (share.at_once, share.gpus) == (at_once, used)
    assert all(held > 0 for held in share.resources.values())


def test_of_a_cluster_that_grows_trials_wait_for_more_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "capacity", lambda kinds: Capacity(0, 0, grows=True))
    monkeypatch.setattr(cluster, "can_start", lambda kinds: True)
    share = sweeps.share_of(TrainConfig(accelerators=("A100",)), trials_per_gpu=1)
    assert share.at_once is None and share.gpus == 1
    assert share.labels == {"ray.io/accelerator-type": "in(A100)"}
    several = sweeps.share_of(TrainConfig(workers=4, accelerators=("A100",)), trials_per_gpu=1)
    assert several.at_once == 1, "a trial that waits for workers holds nothing that others could lack"
    with pytest.raises(ConfigError, match="--on PRESET"):
        sweeps.share_of(TrainConfig(), trials_per_gpu=1)
