"""What a study of many trials asks of its driver, and whether any of it grows with the trials that have ended.

    PYTHONPATH=tests python -m benchmarks.large_study [TRIALS]

One study of TRIALS (1,000) trials, each one step of a very small model on 20 images, through the whole path: Ray Tune,
TPE on a study.db, run folders with checkpoints, MLflow on sqlite. The cluster has two CPUs, one a trial.

A row is a hundred trials: wall time of one, and CPU time of the driver for one; MiB that the driver holds, with what it
shares (RSS) and by itself (own), its open files and threads, and MiB of Ray's processes (of trials the largest). Then
what calls took, as median/99th percentile: Optuna's ask (a new row, and TPE's draw of its settings), its report of an
epoch, its tell; one log_batch of MLflow, one delivery of a run to it; how long after it was written an event was sent
(lag), and a round of the courier over the runs that it keeps. Under it: what is on disk, and how long verbs take on it.

The exit status says whether the last hundred cost the driver at most 1.5 times the CPU time of the second, and a trial
left no more than 64 KiB of its own memory in it.
"""

from __future__ import annotations

import itertools
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import psutil

from commands import SETWISE
from setwise.pipelines import prepare
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation
from setwise.platform import cluster, tracking
from setwise.platform.tracking import Tracker
from setwise.sweeps import run as sweeps
from setwise.sweeps import space
from setwise.sweeps.study import StudySearch

SLOTS = 2
STATES = ("RSS", "own", "files", "threads", "gcs_server", "raylet", "trial")
CALLS = (
    *(("ask", "ms", ".0f"), ("report", "ms", ".0f"), ("tell", "ms", ".0f"), ("log_batch", "ms", ".0f")),
    *(("delivery", "ms", ".0f"), ("lag", "s", ".1f"), ("round", "s", ".2f")),
)
HUNDRED = 100
NAME = "large"
SETTINGS = [
    *("pruning=null", "train.epochs=1", "train.batch_size=20", "model.embed_size=16", "model.text_encoder.word_dim=8"),
    *("model.image_encoder.channels=[8,8]", "model.set_prediction.heads=2", "model.set_prediction.head_dim=4"),
]
VERBS = (("sweep", "status", NAME), ("sweep", "analyze", NAME), ("runs", "ls"), ("compare", NAME))
CPU_GROWTH = 1.5
MEMORY_GROWTH_KIB = 64


class Probe:
    """Times of calls, by the hundred in which they were made, and the state of this process as each hundred ends."""

    def __init__(self) -> None:
        self.ended = 0
        self.times: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.states: list[dict[str, float]] = []
        self._process = psutil.Process()
        self._lock = threading.Lock()

    def note(self, name: str, taken: float) -> None:
        with self._lock:
            self.times[name, self.ended // HUNDRED].append(taken)

    def time(self, owner: type, method: str, name: str, unit: int) -> None:
        """Let every call of `owner.method` be noted, in this part of a second."""
        real = getattr(owner, method)

        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*args, **named)
            finally:
                self.note(name, (time.perf_counter() - began) * unit)

        setattr(owner, method, timed)

    def after(self, owner: type, method: str, then: Callable[..., None]) -> None:
        """Call `then` with the arguments of every call of `owner.method` that returns."""
        real = getattr(owner, method)

        def followed(*args: Any, **named: Any) -> Any:
            result = real(*args, **named)
            then(*args)
            return result

        setattr(owner, method, followed)

    def count(self, *_: object) -> None:
        self.ended += 1
        if self.ended % HUNDRED == 0:
            self.look()

    def look(self) -> None:
        with self._process.oneshot():
            cpu = self._process.cpu_times()
            others: dict[str, float] = defaultdict(float)
            for child in self._process.children(recursive=True):
                name = "trial" if child.name().startswith("ray::") else child.name()
                others[name] = max(others[name], child.memory_info().rss / 2**20)
            memory = self._process.memory_full_info()
            self.states.append(
                {
                    "wall": time.monotonic(),
                    "cpu": cpu.user + cpu.system,
                    "RSS": memory.rss / 2**20,
                    "own": memory.uss / 2**20,
                    "files": self._process.num_fds(),
                    "threads": self._process.num_threads(),
                    **{name: others[name] for name in ("gcs_server", "raylet", "trial")},
                }
            )

    def watch(self) -> None:
        self.time(StudySearch, "suggest", "ask", 1000)
        self.time(optuna.Trial, "report", "report", 1000)
        self.time(optuna.Study, "tell", "tell", 1000)
        self.time(mlflow.MlflowClient, "log_batch", "log_batch", 1000)
        self.time(Tracker, "_deliver", "delivery", 1000)
        self.time(tracking.Courier, "_round", "round", 1)
        self.time(tracking.Courier, "close", "close", 1)
        self.after(StudySearch, "on_trial_complete", self.count)
        self.after(Tracker, "_send", self._sent)

    def _sent(self, tracker: Tracker, run: object, run_id: str, events: list[dict[str, Any]]) -> None:
        self.note("lag", time.time() - min(event["time"] for event in events) / 1000)

    def show(self) -> None:
        rows = [["", "s/trial", "CPU s", *STATES, *(f"{name} {unit}" for name, unit, _ in CALLS)]]
        for part, (before, now) in enumerate(itertools.pairwise(self.states)):
            wall, cpu = ((now[key] - before[key]) / HUNDRED for key in ("wall", "cpu"))
            row = [f"{(part + 1) * HUNDRED}", f"{wall:.2f}", f"{cpu:.3f}", *(f"{now[name]:.0f}" for name in STATES)]
            for name, _, form in CALLS:
                half, most = np.percentile(self.times[name, part] or [0.0], [50, 99])
                row.append(f"{half:{form}}/{most:{form}}")
            rows.append(row)
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
        for row in rows:
            print("".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))

    def grows(self) -> bool:
        """Whether the last hundred cost more than the second; the first one bears the start."""
        if len(self.states) < 4:
            return False
        hundreds = list(itertools.pairwise(self.states))
        second, last = (now["cpu"] - before["cpu"] for before, now in (hundreds[1], hundreds[-1]))
        kib = (self.states[-1]["own"] - self.states[2]["own"]) * 1024 / (HUNDRED * (len(self.states) - 3))
        print(f"driver: {last / second:.2f} times the CPU time of the second hundred, {kib:.0f} KiB more a trial")
        return last > CPU_GROWTH * second or kib > MEMORY_GROWTH_KIB


def on_disk(store: Path) -> None:
    """What is left on disk, and the verbs on it."""
    for path in (store / "studies" / NAME / "study.db", store / "mlflow.db"):
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
    runs = sum(path.stat().st_size for path in (store / "runs").rglob("*") if path.is_file())
    print(f"run folders: {runs / 2**20:.0f} MiB")
    environment = {**os.environ, "SETWISE_STORE": str(store)}
    for verb in VERBS:
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([SETWISE, *verb], env=environment, capture_output=True, check=True)
        wall, cpu = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
        lines = done.stdout.count(b"\n")
        print(f"setwise {' '.join(verb):<22} {wall:6.1f} s, {cpu:5.1f} s of CPU time, {lines} lines")


def main() -> int:
    logging.disable(logging.WARNING)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    probe = Probe()
    probe.watch()
    with tempfile.TemporaryDirectory() as folder, cluster.connect(cpus=SLOTS):
        store = Path(folder)
        size = DigitsConfig(train=20, val=10, test=10)
        prepare.prepare_digits(store, DigitsPreparation(generate=size), lambda message: None)
        spec, base = space.load("digits", [f"trials={trials}", *SETTINGS])
        probe.look()
        began = time.monotonic()
        outcome = sweeps.run_study(spec, base, NAME, store, Tracker(store), lambda message: None)
        print(f"{trials} trials on {SLOTS} CPUs: {time.monotonic() - began:.0f} s")
        assert outcome.complete == trials, outcome
        probe.show()
        (close,) = (taken for (name, _), taken in probe.times.items() if name == "close")
        print(f"MLflow had everything {close[0]:.1f} s after the last trial")
        on_disk(store)
    return int(probe.grows())


if __name__ == "__main__":
    sys.exit(main())
