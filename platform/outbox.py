"""The outbox of a run: what it did, event by event, on disk before anybody is told.

A training appends to `events.jsonl` in its run folder and knows nothing of MLflow; tracking.py delivers from there.
A line is a JSON list of events that were written at once. Several threads and processes may write to one outbox.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from io import BufferedRandom
from pathlib import Path
from typing import Any

from setwise.platform import run as runs

Event = dict[str, Any]


class Reader:
    """Reads the events of an outbox as they come, each once; what was read before is not read again.

    Args:
        offset: where to begin, in bytes; 0, or an end that `new` gave.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def new(self) -> list[tuple[list[Event], int]]:
        """The lines since the last call: the events of each, and where it ends, in bytes.

        A line that was cut short is left out. The last one may still be in the writing, and is looked at again.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        found, start = [], 0
        while start < len(data):
            end = data.find(b"\n", start)
            events = runs.parse_events(data[start : end if end >= 0 else len(data)])
            if end < 0 and events is None:
                break
            start = end + 1 if end >= 0 else len(data)
            if events:
                found.append((events, self.offset + start))
        self.offset += start
        return found


class Outbox:
    """The events of one run, appended line by line.

    A step of a series of metrics is written once, whoever writes: what a restart computes again is there already, and
    stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reader = Reader(path)
        self._steps: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._catch_up()

    def append(self, *events: Mapping[str, Any]) -> None:
        """Write events, each with its `kind` and content, in one piece: all of them or none survive a crash."""
        with self._lock, self.path.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            self._write(stream, events)

    def metrics(self, step: int, values: Mapping[str, float], series: str = "train") -> None:
        """The metrics of one step; a value that is not finite is named in a tag, since MLflow would store a number."""
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        events: list[Mapping[str, Any]] = [{"kind": "metrics", "series": series, "step": step, "values": finite}]
        if broken := sorted(set(values) - set(finite)):
            events.append({"kind": "tags", "values": {f"not_finite.step_{step}": ", ".join(broken)}})
        with self._lock, self.path.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            self._catch_up()  # another writer may have been quicker
            if (series, step) not in self._steps:
                self._write(stream, events)

    def last_step(self, series: str) -> int:
        """The highest step that a series has, 0 if it has none."""
        with self._lock:
            self._catch_up()
            return max((step for name, step in self._steps if name == series), default=0)

    def _catch_up(self) -> None:
        """Note the steps that were written since the last look."""
        for events, _ in self._reader.new():
            self._steps |= {(event["series"], event["step"]) for event in events if event["kind"] == "metrics"}

    def _write(self, stream: BufferedRandom, events: Sequence[Mapping[str, Any]]) -> None:
        """Append a line to `stream`, which is locked, so that a cut line before it is a crash's and nobody's work."""
        now = {"time": int(time.time() * 1000)}
        line = json.dumps([{**event, **now} for event in events]).encode() + b"\n"
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a crash or a full disk cut the line before this one short: end it
                line = b"\n" + line
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
