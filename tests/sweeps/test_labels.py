"""Trials and workers in a mixed cluster: two nodes of Ray's on one machine, which say that they have other GPUs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster

from setwise.pipelines import hardware
from setwise.pipelines.recipe import TrainConfig
from setwise.platform import cluster
from setwise.platform.cluster import Capacity
from setwise.platform.errors import UnreachableError
from setwise.sweeps import run as sweeps

pytestmark = [pytest.mark.ray, pytest.mark.driver]
GPUS = {"RTX3090": 1, "A100": 2}
LABEL = "ray.io/accelerator-type"


@pytest.fixture(scope="module")
def mixed() -> Iterator[None]:
    """A head without GPUs, and a node of each kind; no GPU is there, and nothing here looks for one."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "temp_dir": folder}
        several = Cluster(initialize_head=True, head_node_args=head)
        try:
            for kind, gpus in GPUS.items():
                several.add_node(num_cpus=2, num_gpus=gpus, labels={LABEL: kind})
            ray.init(several.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            several.shutdown()


def whereabouts() -> str | None:
    label: str | None = ray.get_runtime_context().get_node_labels().get(LABEL)
    return label


def tell(config: dict[str, Any]) -> None:
    tune.report({"kind": whereabouts()})


class Kinds(tune.Callback):  # type: ignore[misc]  # Ray leaves its classes untyped
    """Where trials said that they were, and how many ran at once at most."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        self.at_once = 0

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self.at_once = max(self.at_once, sum(trial.status == "RUNNING" for trial in trials))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.seen.append(result["kind"])


def trials(train: TrainConfig, folder: Path) -> Kinds:
    """Two trials, as a study runs them."""
    share = sweeps.share_of(train, trials_per_gpu=1)
    told = Kinds()
    tuner = sweeps.make_tuner(tell, share, train, folder, told, num_samples=2, max_concurrent_trials=share.at_once)
    assert not tuner.fit().errors
    return told


def test_what_a_mixed_cluster_has_of_each_kind(mixed: None) -> None:
    assert cluster.capacity() == Capacity(3, 5, False)
    for kind, gpus in GPUS.items():
        assert cluster.capacity((kind,)) == Capacity(gpus, 2, False)
        assert sweeps.share_of(TrainConfig(accelerators=(kind,)), trials_per_gpu=2).at_once == 2 * gpus
    assert sweeps.share_of(TrainConfig(), trials_per_gpu=1).at_once == 3
    assert sweeps.share_of(TrainConfig(workers=2, accelerators=("A100",)), trials_per_gpu=1).at_once == 1
    assert cluster.most_workers(("A100", "A100-80G"), 4) == 2 and cluster.most_workers(tuple(GPUS), 4) == 4


@pytest.mark.parametrize("kind", GPUS)
def test_trials_run_on_the_kind_of_gpu_that_is_asked_for(mixed: None, tmp_path: Path, kind: str) -> None:
    told = trials(TrainConfig(accelerators=(kind, f"GeForce-{kind}")), tmp_path)
    assert told.seen == [kind, kind]
    assert told.at_once <= GPUS[kind]


def test_a_kind_that_is_not_there_is_told_instead_of_waited_for(mixed: None) -> None:
    preset, _ = hardware.load("h200x1")
    with pytest.raises(UnreachableError, match=r"label H200. It has GPUs of another label: 2 x A100, 1 x RTX3090"):
        sweeps.share_of(TrainConfig(accelerators=preset.accelerators), trials_per_gpu=1)


def test_workers_of_a_training_are_on_the_kind_that_is_asked_for(mixed: None, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig, get_context
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # what TorchTrainer adds torch to

    def work() -> None:
        Path(tmp_path, f"rank{get_context().get_world_rank()}").write_text(str(whereabouts()))

    spread = {"num_workers": 2, "use_gpu": True, "placement_strategy": "SPREAD"}
    DataParallelTrainer(
        work,
        scaling_config=ScalingConfig(**spread, label_selector=cluster.selector(("A100",))),
        run_config=RunConfig(name="both", storage_path=str(tmp_path)),
    ).fit()
    where = [Path(tmp_path, f"rank{rank}").read_text() for rank in (0, 1)]
    assert where == ["A100", "A100"], "Ray would spread them over both nodes"
