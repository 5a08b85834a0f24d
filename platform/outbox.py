"""The outbox of a run: what it did, event by event, on disk before anybody is told.

A training appends to `events.jsonl` in its run folder and knows nothing of MLflow; tracking.py delivers from there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setwise.platform import run as runs


class Outbox:
    """The events of one run, appended line by line. One writer at a time.

    A step of a series of metrics is written once: what a restart computes again is there already, and stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._steps = {
            (event["series"], event["step"]) for event in runs.read_events(path) if event["kind"] == "metrics"
        }

    def _write(self, line: bytes) -> None:
        with self.path.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a crash or a full disk cut the line before this one short: end it
                    line = b"\n" + line
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def append(self, *events: Mapping[str, Any]) -> None:
        """Write events, each with its `kind` and content, in one piece: all of them or none survive a crash."""
        now = {"time": int(time.time() * 1000)}
        self._write(json.dumps([{**event, **now} for event in events]).encode() + b"\n")

    def metrics(self, step: int, values: Mapping[str, float], series: str = "train") -> None:
        """The metrics of one step; a value that is not finite is named in a tag, since MLflow would store a number."""
        if (series, step) in self._steps:
            return
        self._steps.add((series, step))
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        events: list[Mapping[str, Any]] = [{"kind": "metrics", "series": series, "step": step, "values": finite}]
        if broken := sorted(set(values) - set(finite)):
            events.append({"kind": "tags", "values": {f"not_finite.step_{step}": ", ".join(broken)}})
        self.append(*events)
