"""Runs with recorded evaluations, made up: what compares runs reads these and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from setwise.pipelines import evaluate
from setwise.pipelines.benchmarks import Outcome, QueryRanks
from setwise.platform import storage
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run

IMAGES = 60
PROTOCOL = {
    "images": IMAGES,
    "captions": 2 * IMAGES,
    "ties": "pessimistic",
    "members": 1,
    "grouping": "own captions",
    "similarity": {"kind": "mil"},
}


def trained(store: Path, name: str, settings: str = "", status: str | None = "FINISHED", best: float = 300.0) -> Run:
    """A run of `digits`, its seed the number at the end of its name."""
    run = Run(store / "runs" / name)
    seed = name[-1] if name[-1].isdigit() else "0"
    storage.write_bytes(run.config, f"data: {{name: digits}}\ntrain: {{seed: {seed}}}\n{settings}".encode())
    outbox = Outbox(run.events)
    outbox.metrics(1, {"val/rsum": best})
    if status is not None:
        end = {"kind": "status", "value": "FAILED" if status == "FAILED" else "FINISHED"}
        outbox.append({"kind": "tags", "values": {"setwise.status": status}}, end)
    storage.write_json(run.folder / "best.json", {"checkpoint": "epoch_0001", "value": best})
    return run


def measured(run: Run, benchmark: str = "digits_5k", gain: float = 0.0, **protocol: Any) -> Outcome:
    """Record ranks that are the better the higher `gain` is; of digits_extended also precisions."""
    random = np.random.default_rng(sum(map(ord, run.name)))
    owners = np.repeat(np.arange(IMAGES), 2)
    difficulty = np.random.default_rng(0).normal(size=IMAGES)
    extended = benchmark.startswith("digits_extended")
    ranks, values = {}, {}
    for direction, image in (("i2t", np.arange(IMAGES)), ("t2i", owners)):
        found = np.exp(1.5 + difficulty[image] + 0.3 * random.normal(size=len(image)) - gain).astype(np.int32) + 1
        more = {end: (1 / found).astype(np.float32) for end in ("average_precision", "r_precision")} if extended else {}
        ranks[direction] = QueryRanks(np.arange(len(image)), image, found, **more)
        values |= {f"{direction}_R{k}": 100 * float((found <= k).mean()) for k in ((1,) if extended else (1, 5, 10))}
        if extended:
            values |= {f"{direction}_{end}": 100 * float((1 / found).mean()) for end in ("map_at_r", "r_precision")}
        values[f"{direction}_mean_rank"] = float(found.mean())
    if not extended:
        values["rsum"] = sum(value for name, value in values.items() if "_R" in name)
    outcome = Outcome(benchmark, values, PROTOCOL | protocol, ranks)
    evaluate.record(run, outcome, {"weights": "w", "data": "d"}, epoch=1)
    return outcome


def three_and_two(store: Path) -> None:
    """Systems k1 with three seeds and k4, better, with two, both on two benchmarks."""
    for name, gain, seeds in (("k1", 0.0, 3), ("k4", 0.8, 2)):
        for seed in range(seeds):
            slots = f"model: {{set_prediction: {{num_slots: {name[1]}}}}}\n"
            run = trained(store, f"{name}-seed{seed}", slots, best=300.0 + seed)
            for benchmark in ("digits_5k", "digits_extended"):
                measured(run, benchmark, gain)
