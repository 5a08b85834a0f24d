"""When a sweep stops before its end: somebody asked for it, its time is used up, or it can only fail."""

from __future__ import annotations

import time
from pathlib import Path

from setwise.platform import storage
from setwise.sweeps.space import Study

WRITE_EVERY_S = 5
USED_UP = "is used up"
"""How a reason ends that is a limit of the study."""
HOPELESS = 5
"""Trials that fail in a row for one reason, while none succeeded, after which no more are tried."""


class Stopped(Exception):  # noqa: N818  # no error: the sweep ends in good order
    """The sweep is to stop now; its running trials go on at the next start."""


class Limits:
    """The clock of a study, over all its starts, and what stops it.

    Args:
        folder: of the study; `clock.json` there keeps the time that was used, `stop` is somebody's wish.
        gpus: that one trial holds.
    """

    def __init__(self, folder: Path, spec: Study, gpus: float) -> None:
        self._folder = folder
        self._spec = spec
        self._gpus = gpus
        used = used_hours(folder)
        self._hours, self._gpu_hours = used["hours"], used["gpu_hours"]
        self._last = self._written = time.monotonic()
        self._reasons: list[str] = []
        self._succeeded = False

    def check(self, running: int) -> None:
        """Count the time since the last call, in which so many trials were running.

        Raises:
            Stopped: the sweep has to end.
        """
        now = time.monotonic()
        self._hours += (now - self._last) / 3600
        self._gpu_hours += (now - self._last) / 3600 * running * self._gpus
        self._last = now
        if now - self._written > WRITE_EVERY_S:
            self._write()
        for used, limit, what in (
            (self._hours, self._spec.max_hours, "max_hours"),
            (self._gpu_hours, self._spec.max_gpu_hours, "max_gpu_hours"),
        ):
            if limit is not None and used >= limit:
                self._write()
                raise Stopped(f"{what}={limit:g} {USED_UP}")
        if (self._folder / "stop").exists():
            self._write()
            raise Stopped("setwise sweep stop was asked for")
        if not self._succeeded and len(self._reasons) >= HOPELESS and len(set(self._reasons)) == 1:
            self._write()
            raise Stopped(f"all {len(self._reasons)} trials failed, for one reason: {self._reasons[0]}")

    def ended(self, failure: str | None) -> None:
        """A trial has ended, with a failure or without."""
        if failure is None:
            self._succeeded = True
        else:
            self._reasons.append(failure)

    def _write(self) -> None:
        self._written = time.monotonic()
        storage.write_json(self._folder / "clock.json", {"hours": self._hours, "gpu_hours": self._gpu_hours})


def used_hours(folder: Path) -> dict[str, float]:
    """`hours` and `gpu_hours` that a study has used."""
    path = folder / "clock.json"
    return dict(storage.read_json(path)) if path.is_file() else {"hours": 0.0, "gpu_hours": 0.0}


def ask_to_stop(folder: Path) -> None:
    (folder / "stop").touch()


def forget_stop(folder: Path) -> None:
    """For who has just come to own a study: what is asked for from here on, while a cluster starts, is meant for it."""
    (folder / "stop").unlink(missing_ok=True)


def parse_hours(text: str) -> float:
    """`8h`, `45m`, `1.5d` in hours. Raises ValueError for anything else."""
    units = {"m": 1 / 60, "h": 1.0, "d": 24.0}
    if text[-1:] not in units:
        raise ValueError(f"'{text}': write a number and m, h or d, such as 8h")
    hours = float(text[:-1]) * units[text[-1]]
    if not 0 < hours < float("inf"):
        raise ValueError(f"'{text}': it must be more than nothing")
    return hours
