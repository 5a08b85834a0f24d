"""A small population, for tests of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import TINY_MODEL

LAST_EPOCH = 6
SPACE = {
    "optimizer.lr": {"loguniform": [0.0004, 0.01]},
    "optimizer.weight_decay": {"uniform": [0.0, 0.01]},
    "optimizer.warmup_steps": {"int": [0, 9]},
    "similarity.alpha": {"choice": [4.0, 8.0, 16.0, 32.0]},
}


def study_file(folder: Path, **changes: Any) -> Path:
    content = {
        "recipe": "digits_cnn_bigru",
        "overrides": {
            **{name: json.loads(value) for name, _, value in (text.partition("=") for text in TINY_MODEL)},
            "train.epochs": LAST_EPOCH,
            "optimizer.warmup_steps": 1,
        },
        "trials": 4,
        "seed": 5,
        "population": {"perturb_epochs": 2, "share": 0.25, "resample": 0.25},
        "space": SPACE,
    }
    path = folder / "population.yaml"
    path.write_text(json.dumps(content | changes))
    return path


def values_of(number: int) -> dict[str, Any]:
    return {
        "optimizer.lr": 0.001 * (number + 1),
        "optimizer.weight_decay": 0.001 * (number + 1),
        "optimizer.warmup_steps": number,
        "similarity.alpha": [4.0, 8.0, 16.0, 32.0][number],
    }
