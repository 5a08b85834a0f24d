"""What a trial costs beyond its own training: time of the cluster's slots, less the seconds that trainings count.

    PYTHONPATH=tests python -m benchmarks.sweep_overhead [TRIALS]

Studies of 1 and of TRIALS (100) trials of one epoch of small digits, on a cluster that is up: process, data, model,
Tune, Optuna and MLflow on sqlite, checkpoint and the end of the record. Each trial holds one of two CPUs. A study's
own start (imports, a new MLflow database, the first processes) and end are in it too, so one trial bears them alone.
Also the driver's memory after each, to see whether it grows with the trials.

The exit status says whether a trial of the large study costs at most 3 s.
"""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

from setwise.pipelines import prepare, references
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation
from setwise.platform import cluster, run
from setwise.platform.tracking import Tracker
from setwise.sweeps import run as sweeps
from setwise.sweeps import space

LIMIT_S = 3.0
SLOTS = 2


def trained(name: str, store: Path) -> float:
    """Seconds that the trainings of a study took by their own count."""
    seconds = 0.0
    for trial in references.trials_of(name, store):
        events = [event for event in run.read_events(trial.events) if event.get("series") == "train"]
        seconds += events[-1]["values"]["train/seconds"]
    return seconds


def measure(trials: int, store: Path) -> float:
    """The overhead of one trial of so many, in seconds."""
    name = f"overhead-{trials}"
    settings = [f"trials={trials}", "train.epochs=1", "train.batch_size=20", "pruning=null"]
    spec, base = space.load("digits", settings)
    began = time.monotonic()
    outcome = sweeps.run_study(spec, base, name, store, Tracker(store), lambda message: None)
    wall = time.monotonic() - began
    assert outcome.complete == trials, outcome
    slots = min(SLOTS, trials)
    overhead = (wall * slots - trained(name, store)) / trials
    memory = psutil.Process().memory_info().rss / 2**20
    print(f"{trials:>5} trials: {wall:7.1f} s, {overhead:5.2f} s a trial beyond training; driver {memory:.0f} MiB")
    return overhead


def main() -> int:
    logging.disable(logging.WARNING)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder, cluster.connect(cpus=SLOTS):
        store = Path(folder)
        size = DigitsConfig(train=200, val=50, test=100)
        prepare.prepare_digits(store, DigitsPreparation(generate=size), lambda message: None)
        measure(1, store)
        overhead = measure(many, store)
    return int(overhead > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
