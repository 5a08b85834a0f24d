"""Nodes that die, are taken away with a notice, or come: `setwise train` on a cluster of several nodes, for real.

Each training is held against one that nobody disturbed. One cluster serves all tests; the last one loses its head.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clusters import Cluster, Node, cluster
from commands import SETWISE, epochs_logged, wait_for
from fault import Fault
from setwise.pipelines.recipe import Recipe
from setwise.platform import config, run
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from tiny import TINY_MODEL
from trainings import digest, start, train_run, without_time

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end, pytest.mark.timeout(1500)]
EPOCHS = 10
EVERY = 10
"""Steps between two checkpoints, of 40 in an epoch."""
RECIPE = ("digits_cnn_bigru", *TINY_MODEL, "train.batch_size=2")
GRACE_S = 30
"""Between SIGTERM to `ray start --block` and the end of what runs on its node: Ray calls that a preemption."""
CHANGED = """
import sys
from setwise.pipelines import cli, worker_group
worker_group.{constant} = {value}
sys.argv[0] = "setwise"
cli.main()
"""
"""The command with a constant changed that no user needs to change."""


@dataclass
class Training:
    """`setwise train` in a process of its own, on the cluster."""

    on: Cluster
    store: Path
    name: str
    settings: tuple[str, ...]
    program: tuple[str | Path, ...] = (SETWISE,)
    epochs: int = EPOCHS

    @property
    def run(self) -> Run:
        return Run(self.store / "runs" / self.name)

    @property
    def log(self) -> Path:
        return self.on.folder / f"{self.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**self.on.environment, "RAY_ADDRESS": self.on.gcs, "SETWISE_STORE": str(self.store)}
        command = [*self.program, "train", *RECIPE, f"train.epochs={self.epochs}", *self.settings, "--name", self.name]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.on.folder)
        return self.process

    def reaches(self, epoch: int, step: int = 0) -> None:
        """Wait for the checkpoint of that step after that epoch, or a later one."""
        name = f"epoch_{epoch:04d}" + (f"_step_{step:06d}" if step else "")

        def there() -> bool:
            assert self.process.poll() is None, f"it ended before {name}:\n{self.log.read_text()[-3000:]}"
            return self.newest() >= name

        wait_for(there, name, 120)

    def newest(self) -> str:
        """The name of the newest checkpoint; such names sort by age."""
        folders = (self.run.checkpoints, self.run.steps)
        return max((one.name for folder in folders for one in folder.glob("epoch_*")), default="")

    def ends(self, code: int = 0, seconds: float = 600) -> None:
        found = self.process.wait(seconds)
        assert found == code, f"'{self.name}' ended with {found}\n{self.log.read_text()[-4000:]}"

    def numbers(self) -> list[dict[str, float]]:
        return numbers(self.run)

    def weights(self) -> str:
        return digest(self.run.checkpoints / f"epoch_{self.epochs:04d}")

    def is_whole(self) -> None:
        """Every epoch was recorded once, here and in MLflow, and no process is left of the training."""
        assert epochs_logged(self.run) == list(range(1, self.epochs + 1))
        client = Tracker(self.store).client
        experiment = client.get_experiment_by_name(self.run.experiment)
        (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{self.name}'")
        assert found.info.status == "FINISHED"
        history = client.get_metric_history(found.info.run_id, "val/rsum")
        assert sorted(point.step for point in history) == list(range(1, self.epochs + 1))
        wait_for(lambda: not any(node.trains() for node in self.on.nodes), "the end of all workers", 30)


def numbers(training: Run) -> list[dict[str, float]]:
    """What was recorded of each epoch, but for what depends on the clock."""
    epochs = [event for event in run.read_events(training.events) if event.get("series") == "train"]
    return without_time([one["values"] for one in epochs])


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that trains nothing; tests ask for the other nodes by `with_nodes`."""
    with cluster(tmp_path_factory.mktemp("nodes"), cpus=0) as made:
        yield made


def with_nodes(on: Cluster, count: int) -> list[Node]:
    """Exactly so many nodes of one CPU beside the head."""
    for node in on.nodes[1 + count :]:
        on.kill(node)
    for _ in range(count - len(on.nodes) + 1):
        on.add(f"node-{time.monotonic_ns()}")
    names = {node.name for node in on.nodes}
    wait_for(lambda: set(on.listed()) == names, "that Ray knows who is there", 60)
    return on.nodes[1:]


@pytest.fixture(scope="module")
def undisturbed(nodes: Cluster, store: Path) -> Training:
    """What every training here has to end on."""
    with_nodes(nodes, 3)
    calm = Training(nodes, store, "undisturbed", ("train.workers=2", f"train.checkpoint_steps={EVERY}"))
    calm.start()
    calm.ends()
    calm.is_whole()
    return calm


def changed(constant: str, value: float) -> tuple[str | Path, ...]:
    return (sys.executable, "-c", CHANGED.format(constant=constant, value=value))


def goes_on(training: Training, mark: str) -> float:
    """Seconds until there is a newer checkpoint than `mark`, which is not written a second time on the way."""
    began = time.monotonic()
    folder = (training.run.steps if "step" in mark else training.run.checkpoints) / mark
    first = folder.stat().st_ino
    wait_for(lambda: training.newest() > mark, f"a checkpoint after {mark}", 150)
    assert not folder.exists() or folder.stat().st_ino == first, f"{mark} was trained again"
    return time.monotonic() - began


def test_a_node_lost_in_mid_epoch_is_replaced_by_a_spare_one(
    nodes: Cluster, undisturbed: Training, store: Path, fault: Fault
) -> None:
    three = with_nodes(nodes, 3)
    training = Training(nodes, store, "lost-node", undisturbed.settings)
    training.start()
    training.reaches(epoch=1, step=EVERY)
    victim = next(node for node in three if node.trains())
    spare = next(node for node in three if not node.trains())
    nodes.kill(victim)
    time.sleep(1)  # until whoever is left has written what it was about to
    mark = training.newest()
    fault.injected(f"SIGKILL of all processes of a node of two that trained, after {mark}")
    seconds = 1 + goes_on(training, mark)
    assert spare.trains()
    fault.recovered(f"on the spare node, its next checkpoint {seconds:.0f} s after the fault")
    training.ends()
    training.is_whole()
    assert training.numbers() == undisturbed.numbers()
    assert training.weights() == undisturbed.weights()
    fault.lost(f"{EVERY} steps at most, done again; the last weights and all metrics are the undisturbed run's")


@pytest.mark.long
def test_a_node_that_is_taken_away_with_notice_costs_no_failure(
    nodes: Cluster, undisturbed: Training, store: Path, fault: Fault
) -> None:
    three = with_nodes(nodes, 3)
    settings = ("train.workers=2", "train.checkpoint_steps=null")  # the only one in `steps` is that of the notice
    training = Training(nodes, store, "drained-node", settings, changed("MAX_FAILURES", 1))
    training.start()
    training.reaches(epoch=1)
    victim = next(node for node in three if node.trains())
    victim.process.terminate()
    noticed = time.monotonic()
    fault.injected(
        f"SIGTERM to a node of two that trained, as a cloud takes it away: its end is {GRACE_S} s later at most"
    )
    wait_for(lambda: list(training.run.steps.glob("epoch_*_step_*")), "the checkpoint of the notice", GRACE_S)
    kept_after, mark = time.monotonic() - noticed, training.newest()
    victim.process.wait(2 * GRACE_S)
    nodes.kill(victim)
    training.ends()
    training.is_whole()
    fault.recovered(f"on the spare node from {mark}, written {kept_after:.0f} s after the signal")
    assert training.numbers() == undisturbed.numbers()
    assert training.weights() == undisturbed.weights()
    fault.lost("nothing, and no failure of those allowed")


@pytest.mark.long
def test_a_training_with_fewer_workers_than_it_wants_grows_when_a_node_comes(
    nodes: Cluster, store: Path, fault: Fault
) -> None:
    with_nodes(nodes, 1)
    # Small steps, since what two workers round differently grows with every step.
    settings = ("train.batch_size=4", "optimizer.lr=1e-5", "train.workers=2", "train.min_workers=1")
    training = Training(nodes, store, "elastic", settings, changed("RESIZE_S", 2), epochs=120)
    training.start()
    training.reaches(epoch=1)
    came = nodes.add("came")
    fault.injected(f"room for one of train.workers=2, and for the other from {training.newest()} on")
    began = time.monotonic()
    wait_for(lambda: came.trains() or training.process.poll() is not None, "a worker on the node that came", 90)
    seconds, mark = time.monotonic() - began, training.newest()
    alone_until = int(mark.split("_")[1])
    assert training.process.poll() is None, f"the training was over before it could grow\n{training.log.read_text()}"
    settings_alone = Recipe.model_validate(config.read_yaml(training.run.config).values)
    alone = start(store, "alone", settings_alone)
    train_run(store, alone, settings_alone)
    training.ends()
    training.is_whole()
    fault.recovered(f"with two workers, {seconds:.0f} s after Ray knew of the node, from {mark}")
    expected, found = numbers(alone), training.numbers()
    assert len(found) == len(expected)
    assert found[:alone_until] == expected[:alone_until]
    assert found[alone_until + 1 :] != expected[alone_until + 1 :], "it went on with one worker"
    # Right after the change a wrong share, order or state would show at once; rounding needs tens of epochs.
    for epoch in range(alone_until, alone_until + 4):
        for name in ("train/total", "train/gradient_norm"):
            assert found[epoch][name] == pytest.approx(expected[epoch][name], rel=2e-4), f"{name} of {epoch + 1}"
    fault.lost(
        "steps since the last checkpoint, done again; until it grew the numbers are those of one worker, and after "
        "that within 0.0002 for four epochs, in which rounding has not grown yet"
    )


@pytest.mark.long
def test_a_lost_head_ends_the_command_and_the_same_command_goes_on(
    nodes: Cluster, undisturbed: Training, store: Path, fault: Fault
) -> None:
    with_nodes(nodes, 2)
    training = Training(nodes, store, "lost-head", undisturbed.settings)
    training.start()
    training.reaches(epoch=1, step=EVERY)
    nodes.kill(nodes.nodes[0])
    began = time.monotonic()
    fault.injected(f"SIGKILL of all processes of the head, after {training.newest()}")
    code = training.process.wait(150)
    seconds, mark = time.monotonic() - began, training.newest()
    assert code == 6, training.log.read_text()[-3000:]
    assert "the head of the Ray cluster" in training.log.read_text()
    for node in list(nodes.nodes):
        nodes.kill(node)
    nodes.start(cpus=0)
    with_nodes(nodes, 2)
    training.start()
    goes_on(training, mark)
    training.ends()
    training.is_whole()
    fault.recovered(
        f"from {mark} by the same command on a new cluster; the first had ended {seconds:.0f} s after the fault"
    )
    assert training.numbers() == undisturbed.numbers()
    assert training.weights() == undisturbed.weights()
    fault.lost(f"{EVERY} steps at most, done again; the last weights and all metrics are the undisturbed run's")
