"""Runs in the mirror of a store: their records and checkpoints, so that a machine that has neither goes on with them.

A training sends what it publishes from a thread of its own, and nothing that goes wrong there stops it: each time the
thread compares what is here with what is there, so what was missed goes up with the next checkpoint.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from setwise.platform import checkpoint, run, storage
from setwise.platform.checkpoint import MANIFEST
from setwise.platform.errors import ConfigError, DataError, SetwiseError, UnreachableError
from setwise.platform.mirror import DAMAGED, Mirror, open_mirror
from setwise.platform.run import Run

log = logging.getLogger(__name__)

CLOSE_S = 60  # for what is still to be sent when a training ends
CONFIG = "config.yaml"
BEST = "best.json"
RECORD = (
    *("run.json", "environment.json", "code.diff", "lineage.json", "mlflow_key", BEST, "events.jsonl"),
    CONFIG,  # last, as in the run's folder: its presence means that the record is there
)
"""The files of a record, beside `evaluation/`. By its `mlflow_key` MLflow knows the run again."""


class RunMirror:
    """One run, in a store and in its mirror."""

    def __init__(self, mirror: Mirror, training: Run) -> None:
        self.mirror, self.run = mirror, training
        self.name = training.folder.relative_to(mirror.store).as_posix()
        self._sent: dict[str, bytes] = {}

    def push(self, superseded: Callable[[], bool] = lambda: False) -> None:
        """Bring the mirror to what is here: the newest checkpoint first, the best one, the record, and the others
        unless `superseded` says that there is a newer one. A checkpoint that was removed here is removed there.

        Raises:
            ConfigError: the mirror has a run of this name with another configuration, which stays.
            DataError: a checkpoint changed while it was copied.
            UnreachableError: the mirror does not answer or refuses.
        """
        kept = self.mirror.read(f"{self.name}/{CONFIG}")
        if kept is not None and kept != self.run.config.read_bytes():
            raise ConfigError(
                f"mirror {self.mirror.address} has a '{self.name}' with another configuration, so this one is not "
                f"copied. Give this run another name, or remove that one: setwise store remove {self.name}"
            )
        here = self._here()
        pointer = self.run.folder / BEST
        best = f"checkpoints/{_named(pointer.read_bytes() if pointer.is_file() else None)}"
        first = [*here[:1], *(name for name in here[1:] if name == best)]
        for name in first:
            self._push_checkpoint(name)
        self._push_record()
        self._prune(here)
        for name in here:
            if name not in first and not superseded():
                self._push_checkpoint(name)

    def restore_record(self, config_yaml: str | None) -> bool:
        """Bring the record here, if there is none here and the mirror has one; whether it did. With that of a run that
        has ended come its checkpoints.

        Raises:
            ConfigError: the mirror's run has another configuration than `config_yaml`, if that is given.
        """
        if self.run.config.is_file():
            return False
        there = self.mirror.read(f"{self.name}/{CONFIG}")
        if there is None:
            return False
        if config_yaml is not None and there != config_yaml.encode():
            raise ConfigError(
                f"mirror {self.mirror.address} has a run '{self.run.name}' with another configuration. Choose another "
                f"name, or look at it: setwise store pull {self.name}"
            )
        self.pull_record()
        if self.run.status is not None:  # nobody will train it, and so ask for them
            self.restore()
        return True

    def pull_record(self) -> None:
        """Bring the record here. Raises DataError if the mirror has none."""
        files = self.mirror.files(self.name)
        if CONFIG not in files:
            raise DataError(f"{self.mirror.address} has no run '{self.name}'. What it has: setwise store ls")
        evaluations = [file for file in files if file.startswith("evaluation/") and ".." not in file]
        for file in [*sorted(evaluations), *RECORD]:
            content = self.mirror.read(f"{self.name}/{file}") if file in files else None
            if content is not None:
                storage.write_bytes(self.run.folder / file, content)

    def restore(self) -> str | None:
        """Bring the newest checkpoint that verifies here, and the best, unless there is one here; its name.

        A damaged one is set aside in the mirror, with a warning, and the one before it is taken.

        Raises:
            DataError: there were checkpoints, and all of them are damaged.
        """
        if self._here() or self.mirror.read(f"{self.name}/{CONFIG}") != self.run.config.read_bytes():
            return None
        there = self._there()
        whole = [name for name in there if there[name] == MANIFEST]
        newest = next((name for name in whole if self._pull_checkpoint(name)), None)
        if newest is None:
            if MANIFEST + DAMAGED in there.values() or whole:
                raise DataError(
                    f"every checkpoint of '{self.name}' in {self.mirror.address} is damaged. To begin from nothing: "
                    f"setwise store remove {self.name}"
                )
            return None
        best = f"checkpoints/{_named(self.mirror.read(f'{self.name}/{BEST}'))}"
        if best in whole and best != newest:
            self._pull_checkpoint(best)
        return newest

    def _here(self) -> list[str]:
        """The checkpoints of the run's folder, the newest first: `checkpoints/NAME` and `steps/NAME`."""
        found = [folder for parent in (self.run.checkpoints, self.run.steps) for folder in parent.glob("*")]
        whole = [f"{folder.parent.name}/{folder.name}" for folder in found if (folder / MANIFEST).is_file()]
        return sorted((name for name in whole if _is_checkpoint(name)), key=_age, reverse=True)

    def _there(self) -> dict[str, str]:
        """The checkpoints of the mirror, the newest first, each with its manifest, that of a damaged one, or ''."""
        manifests: dict[str, str] = {}
        for file in self.mirror.files(self.name):
            parent, _, rest = file.partition("/")
            name, _, inner = rest.partition("/")
            if parent in (self.run.checkpoints.name, self.run.steps.name) and _is_checkpoint(f"{parent}/{name}"):
                held = manifests.get(f"{parent}/{name}", "")
                manifests[f"{parent}/{name}"] = inner if inner in (MANIFEST, MANIFEST + DAMAGED) else held
        return {name: manifests[name] for name in sorted(manifests, key=_age, reverse=True)}

    def _push_checkpoint(self, name: str) -> None:
        try:
            self.mirror.push(f"{self.name}/{name}", MANIFEST)
        except FileNotFoundError:
            if (self.run.folder / name / MANIFEST).is_file():
                raise
            # else the training has pruned it, and another is newer

    def _pull_checkpoint(self, name: str) -> bool:
        try:
            self.mirror.pull(f"{self.name}/{name}", MANIFEST, checkpoint.verify)
        except DataError as error:
            log.warning("%s. It is not used, and set aside in the mirror.", error)
            try:
                self.mirror.set_aside(f"{self.name}/{name}", MANIFEST)
            except (UnreachableError, FileNotFoundError) as refused:
                log.warning("%s", refused)
            return False
        return True

    def _push_record(self) -> None:
        evaluations = [path.relative_to(self.run.folder).as_posix() for path in self.run.evaluation.glob("*.json")]
        for file in [*sorted(evaluations), *RECORD]:
            path = self.run.folder / file
            content = path.read_bytes() if path.is_file() else None
            if content is not None and self._sent.get(file) != content:
                self.mirror.write(f"{self.name}/{file}", content)
                self._sent[file] = content

    def _prune(self, here: list[str]) -> None:
        """Remove what was removed here. What is newer than all that is here stays until the run has ended here: a
        machine that could not reach the mirror when it began is behind another one's work."""
        ended = self.run.status is not None
        for name in self._there() if here else ():
            if name not in here and (ended or _age(name) < _age(here[0])):
                self.mirror.remove(f"{self.name}/{name}", MANIFEST)


def _is_checkpoint(name: str) -> bool:
    inner = name.rpartition("/")[2]
    return run.NAME.fullmatch(inner) is not None and not inner.endswith(DAMAGED)


def _age(name: str) -> str:
    """By which checkpoints sort, whichever folder they are in."""
    return name.rpartition("/")[2]


def _named(pointer: bytes | None) -> str | None:
    """The checkpoint that a `best.json` names."""
    try:
        return str(json.loads(pointer or b"")["checkpoint"])
    except (ValueError, KeyError, TypeError):
        return None


def restore_record(training: Run, store: Path, config_yaml: str | None) -> bool:
    """Bring the record of a run that this store has not, and its mirror has; whether it did. To be called before
    `run.create`, which then finds the run and goes on with it.

    Raises:
        ConfigError: the mirror's run of this name has another configuration than `config_yaml`, if that is given.
        UnreachableError: it cannot be known whether the run was begun elsewhere.
    """
    mirror = open_mirror(store)
    try:
        return mirror is not None and RunMirror(mirror, training).restore_record(config_yaml)
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}. So it is not known whether run '{training.name}' was begun elsewhere. When it answers, the same "
            "command goes on; without SETWISE_MIRROR, it begins from nothing"
        ) from error


def restore(training: Run, store: Path) -> str | None:
    """Bring the newest checkpoint of a run from the mirror, and the best, if none is here; its name there.

    Raises:
        DataError: all that the mirror has of them are damaged.
        UnreachableError: the mirror is away, and the run's record says that it was trained before. Without such a
            record, a warning is all.
    """
    mirror = open_mirror(store)
    if mirror is None:
        return None
    try:
        return RunMirror(mirror, training).restore()
    except UnreachableError as error:
        if any(event.get("series") == "train" for event in run.read_events(training.events)):
            raise
        log.warning("%s. Run '%s' begins from nothing.", error, training.name)
        return None


def send(training: Run, store: Path) -> None:
    """Send all that is new of a run, if the store has a mirror; what cannot be sent is said."""
    uploader = Uploader(open_mirror(store), training)
    uploader.publish()
    uploader.close()


class Uploader:
    """Sends a run's checkpoints and record to a mirror, in a thread, while it is trained.

    Args:
        mirror: None for a training without one, for which all of this does nothing.
    """

    def __init__(self, mirror: Mirror | None, training: Run) -> None:
        self._copy = None if mirror is None else RunMirror(mirror, training)
        self._new, self._closing = threading.Event(), threading.Event()
        self._troubled = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        if self._copy is not None:
            self._thread.start()

    def publish(self) -> None:
        """Say that something is new in the run's folder, and return at once. Of several, the newest goes first."""
        self._new.set()

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Send what is new, for at most `limit_s` seconds; what is left then is said."""
        if self._copy is None:
            return
        self._closing.set()
        self._new.set()
        self._thread.join(limit_s)
        if self._thread.is_alive() or self._troubled:
            log.warning(
                "not all of run '%s' is in the mirror %s. To send it: setwise store push %s",
                *(self._copy.run.name, self._copy.mirror.address, self._copy.name),
            )

    def _work(self) -> None:
        assert self._copy is not None
        while True:
            self._new.wait()
            self._new.clear()
            last = self._closing.is_set()  # asked before looking: what came before it is sent in this turn
            try:
                self._copy.push(superseded=lambda: self._new.is_set() and not self._closing.is_set())
            except Exception as error:  # whatever it is, a training does not end by its copy
                if not self._troubled:
                    said = str(error) if isinstance(error, SetwiseError) else f"{type(error).__name__}: {error}"
                    log.warning("%s. The training goes on; what is missing is sent with its next checkpoints.", said)
                self._troubled = True
            else:
                if self._troubled:
                    log.warning("mirror %s has all of run '%s' again", self._copy.mirror.address, self._copy.run.name)
                self._troubled = False
            if last:
                return
