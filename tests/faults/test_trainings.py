"""Faults of one machine in a training, injected for real: processes killed, disks filled, bytes flipped, servers gone.

The commands are those that a user types. Each training is held against one that nobody disturbed: the same metrics of
every epoch and the same weights, to the last bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from commands import SETWISE, alive, descendants, environment, epochs_logged, setwise, wait_for
from fault import Fault
from servers import mlflow_server
from setwise.pipelines import recipe, resume
from setwise.platform import checkpoint, run
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from tiny import TINY_MODEL
from trainings import digest, start, train_run, without_time

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]
EPOCHS = 8
EVERY = 5
"""Steps between two checkpoints, of 40 in an epoch."""
SETTINGS = (*TINY_MODEL, "train.batch_size=2", f"train.epochs={EPOCHS}", f"train.checkpoint_steps={EVERY}")
LAST = f"epoch_{EPOCHS:04d}"
STARTED: set[int] = set()
"""The processes below all commands of these tests, which the last one looks for."""


@dataclass(frozen=True)
class Calm:
    """What a training that nobody disturbs ends on."""

    numbers: list[dict[str, float]]
    weights: str


@pytest.fixture(scope="module")
def calm(store: Path) -> Calm:
    settings = recipe.load("digits_cnn_bigru", list(SETTINGS))
    training = start(store, "calm", settings)
    return Calm(without_time(train_run(store, training, settings)), digest(training.checkpoints / LAST))


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A store of the test's own, with the data of the common one."""
    own = tmp_path / "store"
    own.mkdir()
    (own / "data").symlink_to(store / "data")
    return own


def train(name: str, *more: str) -> tuple[str, ...]:
    return ("train", "digits_cnn_bigru", *SETTINGS, *more, "--name", name)


@dataclass
class Command:
    """`setwise train` in a process of its own."""

    store: Path
    name: str
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.run = Run(self.store / "runs" / self.name)
        self.log = self.store.with_name(f"{self.name}.log")
        self.begun = time.monotonic()
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                [SETWISE, *train(self.name, *self.more)], env=environment(self.store), stdout=stream, stderr=stream
            )

    def newest(self) -> str:
        return max(
            (one.name for folder in (self.run.checkpoints, self.run.steps) for one in folder.glob("epoch_*")),
            default="",
        )

    def passes(self, name: str) -> str:
        """Wait for a checkpoint of that name or a later one; its name."""

        def there() -> bool:
            assert self.process.poll() is None, f"it ended before {name}:\n{self.log.read_text()[-3000:]}"
            return self.newest() >= name

        wait_for(there, name, 200)
        STARTED.update(descendants(self.process.pid))
        return self.newest()

    def workers(self) -> list[int]:
        found = []
        for process in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if b"RayTrainWorker" in Path(f"/proc/{process}/cmdline").read_bytes():
                    found.append(process)
        return sorted(found)

    def ends(self, code: int = 0) -> str:
        """Wait for it; what it said."""
        found = self.process.wait(300)
        said = self.log.read_text()
        assert found == code, f"ended with {found}\n{said[-4000:]}"
        return said


def numbers(training: Run) -> list[dict[str, float]]:
    epochs = [event for event in run.read_events(training.events) if event.get("series") == "train"]
    return without_time([{"epoch": float(event["step"]), **event["values"]} for event in epochs])


def ends_as(training: Run, calm: Calm) -> None:
    """Every epoch once, here and in MLflow, with the numbers of the calm training, and its weights."""
    assert numbers(training) == calm.numbers
    assert digest(training.checkpoints / LAST) == calm.weights
    client = Tracker(training.folder.parents[1]).client
    experiment = client.get_experiment_by_name(training.experiment)
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{training.name}'")
    assert found.info.status == "FINISHED"
    for metric in ("val/rsum", "train/total"):
        points = client.get_metric_history(found.info.run_id, metric)
        assert sorted(point.step for point in points) == list(range(1, EPOCHS + 1))


def test_workers_killed_in_mid_epoch(own_store: Path, calm: Calm, fault: Fault) -> None:
    """First the one that writes the checkpoints, then the other, of two that train together."""
    undisturbed = Command(own_store, "undisturbed", ("train.workers=2",))
    undisturbed.ends()
    command = Command(own_store, "killed", ("train.workers=2",))
    killed: list[str] = []
    for rank, mark in ((0, "epoch_0001_step_000010"), (1, "epoch_0002_step_000015")):
        passed = command.passes(mark)
        os.kill(command.workers()[rank], signal.SIGKILL)
        began = time.monotonic()
        wait_for(lambda: command.newest() > passed, f"a checkpoint after {passed}")  # noqa: B023
        killed.append(f"{time.monotonic() - began:.0f} s")
    fault.injected("SIGKILL of one of two workers, in epochs 2 and 3")
    command.ends()
    fault.recovered(f"by itself, a newer checkpoint after {' and '.join(killed)}")
    assert numbers(command.run) == numbers(undisturbed.run)
    assert digest(command.run.checkpoints / LAST) == digest(undisturbed.run.checkpoints / LAST)
    assert len(list((command.run.folder / "ray").iterdir())) == 3
    fault.lost(f"at most {EVERY} steps a death; metrics and weights are those of two undisturbed workers")


@pytest.mark.long
def test_driver_killed_in_mid_epoch(own_store: Path, calm: Calm, fault: Fault) -> None:
    command = Command(own_store, "driver")
    passed = command.passes("epoch_0000_step_000010")
    command.process.kill()
    command.process.wait()
    fault.injected(f"SIGKILL of the driver after {passed}")
    again = Command(own_store, "driver")
    again.ends()
    fault.recovered(f"by the same command, which ended {time.monotonic() - again.begun:.0f} s after it was given")
    ends_as(again.run, calm)
    fault.lost(f"at most {EVERY} steps; metrics and weights are those of the undisturbed training")


@pytest.mark.long
def test_preempted_with_sigterm(own_store: Path, calm: Calm, fault: Fault) -> None:
    command = Command(own_store, "preempted")
    command.passes("epoch_0001_step_000005")
    sent = time.monotonic()
    command.process.terminate()
    said = command.ends(code=130)
    took = time.monotonic() - sent
    fault.injected("SIGTERM to the driver in epoch 2")
    assert "stopping: a checkpoint is written" in said and "To go on: setwise train" in said
    assert took < 30
    stopped = resume.newest(command.run)
    assert stopped is not None
    within = checkpoint.training_state(stopped)["within"]
    again = Command(own_store, "preempted")
    again.ends()
    ends_as(again.run, calm)
    fault.recovered(f"checkpoint after step {within['step']}, exit 130 after {took:.0f} s; by the same command")
    fault.lost("nothing: no step was done twice; metrics and weights are those of the undisturbed training")


TORN = """
import os, signal, sys
from pathlib import Path
from setwise.pipelines import train
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.workers import Worker
from setwise.platform import checkpoint, config, storage
from setwise.platform.run import Run

moment, at = sys.argv[2], int(sys.argv[3])
calls = []

def dies(function, name, before):
    def wrapped(*arguments, **named):
        if name == moment and not before:
            result = function(*arguments, **named)
        if name == moment:
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named) if name != moment or before else result
    return wrapped

import safetensors.torch, torch
safetensors.torch.save_file = dies(safetensors.torch.save_file, "weights", before=False)
torch.save = dies(torch.save, "state", before=False)
checkpoint.write_manifest = dies(checkpoint.write_manifest, "manifest", before=False)
Path.rename = dies(Path.rename, "rename", before=True)
storage.sync_folder = dies(storage.sync_folder, "sync", before=True)
training = Run(Path(sys.argv[1]))
recipe = Recipe.model_validate(config.read_yaml(training.config).values)
train.train(recipe, training, training.folder.parents[1], Worker(), lambda values: None)
"""


def test_checkpoint_torn_while_written(own_store: Path, calm: Calm, fault: Fault) -> None:
    """Killed at five places in the writing of a checkpoint, within an epoch and at its end."""
    settings = recipe.load("digits_cnn_bigru", list(SETTINGS))
    training = start(own_store, "torn", settings)
    per_epoch = 40 // EVERY
    places = [("weights", 3), ("state", per_epoch - 2), ("manifest", 2), ("rename", 4), ("sync", 6), ("weights", 8)]
    for moment, at in places:
        before = resume.newest(training)
        command = [sys.executable, "-c", TORN, str(training.folder), moment, str(at)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        newest = resume.newest(training)
        assert newest is not None
        assert before is None or newest.name >= before.name
        for folder in (*training.checkpoints.glob("epoch*"), *training.steps.glob("epoch*")):
            checkpoint.verify(folder)
    fault.injected(f"SIGKILL at {len(places)} places while a checkpoint was written")
    values = train_run(own_store, training, settings)
    assert without_time(values) == calm.numbers
    assert digest(training.checkpoints / LAST) == calm.weights
    assert not [path for parent in (training.checkpoints, training.steps) for path in parent.glob(".*")]
    fault.recovered("each time from the checkpoint before, and the torn ones were swept away")
    fault.lost(f"at most {EVERY} steps each; every checkpoint under its name was whole; weights as undisturbed")


def test_checkpoint_bytes_corrupt(own_store: Path, calm: Calm, fault: Fault) -> None:
    command = Command(own_store, "corrupt")
    command.passes("epoch_0001_step_000010")
    command.process.terminate()
    command.ends(code=130)
    newest = resume.newest(command.run)
    assert newest is not None
    weights = newest / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    fault.injected(f"one bit of {newest.name} flipped")
    again = Command(own_store, "corrupt")
    said = again.ends()
    ends_as(again.run, calm)
    assert f"{newest.name}.damaged" in {path.name for path in newest.parent.iterdir()}
    assert "damaged (its content is not what MANIFEST.json recorded)" in said
    fault.recovered("it was set aside, which was said, and the one before it taken")
    fault.lost(f"at most {EVERY} steps; metrics and weights are those of the undisturbed training")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own, in memory, mounted on `folder`."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Lay the same file system over itself, read-only: whoever opens a file from now on cannot write."""
    view = disk.with_name("read-only view")
    view.mkdir()
    mount("--bind", str(disk), str(view))
    mount("-o", "remount,bind,ro", str(view))
    mount("--bind", str(view), str(disk))
    try:
        yield
    finally:
        for place in (disk, view):
            subprocess.run(["umount", "--lazy", place], check=True)


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this test mounts a small disk, which takes root and the right to mount: {done.stderr.strip()}")


def test_storage_full(store: Path, tmp_path: Path, calm: Calm, fault: Fault) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "5m"):
        (disk / "data").symlink_to(store / "data")
        command = Command(disk, "full")
        passed = command.passes("epoch_0001_step_000010")
        with (disk / "other people's files").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(bytes(4096)):
                pass
        fault.injected(f"the disk filled after {passed}")
        said = command.ends(code=1)
        assert f"{disk}" in said and "cannot be written" in said and "MiB free" in said
        assert "Traceback" not in said
        for folder in (*command.run.checkpoints.glob("epoch*"), *command.run.steps.glob("epoch*")):
            checkpoint.verify(folder)
        mount("-o", "remount,size=50m", str(disk))
        (disk / "other people's files").unlink()
        again = Command(disk, "full")
        again.ends()
        ends_as(again.run, calm)
    fault.recovered("it ended with exit code 1 and what to do; with room, by the same command")
    fault.lost(
        f"at most {EVERY} steps; every checkpoint under its name stayed whole; metrics and weights as undisturbed"
    )


@pytest.mark.long
def test_storage_read_only(store: Path, tmp_path: Path, calm: Calm, fault: Fault) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "50m"):
        (disk / "data").symlink_to(store / "data")
        command = Command(disk, "read-only")
        passed = command.passes("epoch_0001_step_000010")
        with read_only(disk):
            said = command.ends(code=1)
            assert "cannot be written" in said and "Traceback" not in said
            began = time.monotonic()
            before = setwise(disk, *train("read-only"), code=1)
            refused = time.monotonic() - began
            assert "cannot be written (Read-only file system" in before.stderr
        fault.injected(f"the store mounted read-only after {passed}")
        again = Command(disk, "read-only")
        again.ends()
        ends_as(again.run, calm)
    fault.recovered(
        f"it ended with what to do; while read-only, refused after {refused:.0f} s; then by the same command"
    )
    fault.lost(f"at most {EVERY} steps; metrics and weights as undisturbed")


@pytest.mark.long
def test_mlflow_down(
    own_store: Path, calm: Calm, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_server(tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        command = Command(own_store, "offline")
        command.passes("epoch_0001_step_000005")
        server.kill()
        fault.injected("SIGKILL of the MLflow server in epoch 2")
        command.ends()
        assert epochs_logged(command.run) == list(range(1, EPOCHS + 1))
        server.start()
        setwise(own_store, "runs", "sync")
        ends_as(command.run, calm)
    fault.recovered("the training went on; `setwise runs sync` delivered the rest once the server was back")
    fault.lost("nothing: every step is there once; metrics and weights as undisturbed")


def test_loss_not_a_number(own_store: Path, fault: Fault) -> None:
    command = Command(own_store, "diverges", ("loss.mmd_weight=3e38",))
    said = command.ends(code=1)
    fault.injected("a gradient too large for float32")
    assert "not finite any more at step 0" in said and "Try a lower optimizer.lr" in said
    assert len(list((command.run.folder / "ray").iterdir())) == 1
    fault.recovered("it ended with the step and what to do, and was not tried again")
    fault.lost("nothing but the training; no checkpoint was written after it (tests/pipelines/test_resume.py)")


OUT_OF_MEMORY = """
recipe: digits_cnn_bigru
trials: 3
sampler: grid
overrides: {model.embed_size: 16}
space:
  model.embed_size: {choice: [16, 65536, 8]}
"""


@pytest.mark.long
def test_one_trial_out_of_memory(own_store: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that would need 50 GB. Ray's memory monitor ends its process once 6 GB more are in use than now."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 6 * 2**30) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{limit:.3f}")
    study = own_store / "study.yaml"
    study.write_text(OUT_OF_MEMORY)
    settings = (*SETTINGS, "train.epochs=1", "model.set_prediction.ff_mult=64")
    done = setwise(own_store, "sweep", str(study), *settings, "--name", "memory", code=4)
    fault.injected("a trial that needs more memory than there is, so that Ray ends its process")
    assert "trial 1: out of memory: the machine ran low" in done.stderr and "1 trial failed" in done.stderr
    ends = sorted(str(Run(own_store / "runs" / f"memory-{number:03d}").status) for number in range(3))
    assert ends == ["FAILED", "FINISHED", "FINISHED"]
    fault.recovered("the other trials went on, that one was tried four times; exit code 4 names it")
    fault.lost("that trial alone")


def test_no_process_is_left_of_all_that_was_killed(fault: Fault) -> None:
    assert len(STARTED) > 20
    fault.injected(f"all of the above; {len(STARTED)} processes had been started")
    began = time.monotonic()
    # Two of Ray's agents look for their parent only once a minute.
    wait_for(lambda: not any(map(alive, STARTED)), "the end of what the commands had started", 120)
    fault.recovered(f"none is left, {time.monotonic() - began:.0f} s after the last test")
    fault.lost("nothing")
