"""A process that does what a trial and its driver do: append a run's events, and deliver them."""

from __future__ import annotations

import time
from pathlib import Path

from setwise.platform import storage
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.platform.tracking import Courier, Tracker

STEPS = 25
KEYS = 10


def value(number: int, step: int, key: int) -> float:
    """What run `number` says at a step, known beforehand so that it can be looked for."""
    return number * 10_000 + step * 100 + key / KEYS


def write_run(store: Path, uri: str, number: int) -> None:
    """Write and deliver run `number`; the process fails if anything was left undelivered."""
    run = Run(store / "runs" / f"run-{number:02d}")
    storage.write_json(run.folder / "run.json", {"experiment": "many", "parent": "../../studies/many"})
    outbox = Outbox(run.events)
    outbox.append({"kind": "params", "values": {"number": str(number)}})
    with Courier(Tracker(store, uri), interval=0.1) as courier:
        courier.add(run)
        for step in range(1, STEPS + 1):
            outbox.metrics(step, {f"m/{key}": value(number, step, key) for key in range(KEYS)})
            time.sleep(0.1)
        outbox.append({"kind": "status", "value": "FINISHED"})
        if not courier.close():
            raise SystemExit(3)
