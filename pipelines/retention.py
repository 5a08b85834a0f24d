"""Which checkpoints are kept, and the removal of the others.

Three integers, and whatever one of them keeps is kept: the best of each study, the best of each run, the latest of
each run (the rule of Determined's `save_experiment_best`, `save_trial_best`, `save_trial_latest`). Beyond them stays
what is registered, in use, unfinished, or what best.json names; and everything about which something is not known.
The copies in a run's `best/`, which delivery and promotion send, are never touched.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from setwise.pipelines import lineage, records, references
from setwise.pipelines.lineage import Stored
from setwise.platform import storage
from setwise.platform.errors import ConfigError, UnreachableError
from setwise.platform.run import Run
from setwise.platform.storage import LeaseHeldError
from setwise.platform.tracking import RUN_TAG, Tracker

Say = Callable[[str], None]
TRASH = ".trash."
"""How the names begin of what is being removed. A crash leaves such a folder, and the next removal takes it too."""
EPOCH = re.compile(r"epoch_\d+")


@dataclass(frozen=True)
class Keep:
    """How many checkpoints to keep: the best of each study, and the best and the latest of each run."""

    best_of_study: int = 1
    best: int = 1
    latest: int = 1


@dataclass(frozen=True)
class Candidate:
    """A run with its checkpoints, and what speaks against removing any of them."""

    run: Run
    study: str | None
    checkpoints: tuple[Stored, ...]
    best: str | None
    """The checkpoint that best.json names."""
    reasons: tuple[str, ...] = ()
    """Why the whole run stays."""
    own_reasons: Mapping[str, str] = field(default_factory=dict)
    """Why single checkpoints stay, by name."""


@dataclass(frozen=True)
class Decision:
    """A checkpoint, and why it stays; it goes if nothing says so."""

    checkpoint: Stored
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.checkpoint.to_json(), "goes": not self.reasons, "reasons": list(self.reasons)}


def decide(candidates: Iterable[Candidate], keep: Keep) -> list[Decision]:
    """The union rule over all runs, in their order. Of equal values the earlier epoch is the better, then the name."""
    candidates = list(candidates)
    kept: dict[Path, list[str]] = {one.folder: [] for run in candidates for one in run.checkpoints}

    def keep_first(number: int, ranked: list[Stored], reason: str) -> None:
        for one in ranked[:number]:
            kept[one.folder].append(reason)

    for study in dict.fromkeys(run.study for run in candidates if run.study is not None):
        of_study = [one for run in candidates if run.study == study for one in run.checkpoints]
        keep_first(keep.best_of_study, _best_first(of_study), f"best of study {study}")
    for run in candidates:
        keep_first(keep.best, _best_first(run.checkpoints), "best of the run")
        readable = [one for one in run.checkpoints if one.value is not None]
        keep_first(keep.latest, sorted(readable, key=lambda one: -one.epoch), "latest of the run")
        for one in run.checkpoints:
            said = kept[one.folder]
            if one.name == run.best:
                said.append("named by best.json")
            if one.value is None:
                said.append("damaged or unreadable: it is yours to restore or remove")
            if one.name in run.own_reasons:
                said.append(run.own_reasons[one.name])
            said += run.reasons
    return [Decision(one, tuple(kept[one.folder])) for run in candidates for one in run.checkpoints]


def _best_first(checkpoints: Iterable[Stored]) -> list[Stored]:
    valued = [(one.value, one) for one in checkpoints if one.value is not None]
    return [one for _, one in sorted(valued, key=lambda pair: (-pair[0], pair[1].epoch, pair[1].run))]


def plan(store: Path, tracker: Tracker, keep: Keep, chosen: Collection[Run]) -> list[Decision]:
    """What becomes of the checkpoints of the `chosen` runs. Ranks of a study count all of its runs.

    Raises:
        ConfigError: a chosen run is not in this store, so nothing is known of it; another of its name may be here.
        UnreachableError: the tracking store does not answer, so what is registered is not known.
        DataError: a run's lineage.json cannot be read, so what it still needs is not known.
    """
    runs = references.all_runs(store)
    if foreign := [run for run in chosen if run not in runs]:
        raise ConfigError(
            f"{foreign[0].folder} is no run of the store {store}. Name the store it is in: --store FOLDER"
        )
    registered = Registered.read(tracker, runs)
    unfinished = [run for run in runs if not records.ended(run)]
    needed = {
        (parent["run"], parent["checkpoint"]): f"run {run.name} started from it and is unfinished"
        for run in unfinished
        for parent in lineage.parents(run)
    }
    # A study that had ended and then got more trials says so only when it ends again; its trials may copy each other.
    resumable = {lineage.place(run)[0] for run in unfinished}
    candidates = []
    for run in runs:
        found = tuple(lineage.stored(run))
        reasons = [*_in_use(run, store, resumable), *registered.whole(run)]
        if run in unfinished:
            reasons.append("unfinished: it may be resumed")
        own = {name: reason for (owner, name), reason in needed.items() if owner == run.name}
        own |= registered.single(run)
        candidates.append(Candidate(run, lineage.place(run)[0], found, lineage.best_name(run), tuple(reasons), own))
    names = {run.name for run in chosen}
    return [decision for decision in decide(candidates, keep) if decision.checkpoint.run in names]


def apply(store: Path, decisions: Iterable[Decision], chosen: Collection[Run], say: Say) -> int:
    """Remove what is to go, and what an interrupted removal left; the bytes that were freed.

    A checkpoint is renamed before it is removed, so that a crash leaves none that looks whole and is not. A run that
    has come into use since `plan` keeps all of its checkpoints.
    """
    going: dict[str, list[Path]] = {}
    for decision in decisions:
        if not decision.reasons:
            going.setdefault(decision.checkpoint.run, []).append(decision.checkpoint.folder)
    freed = 0
    for run in chosen:
        left = list(run.checkpoints.glob(f"{TRASH}*"))
        if not left and run.name not in going:
            continue
        try:
            with contextlib.ExitStack() as leases:
                for path in _leases(run, store):
                    leases.enter_context(storage.lease(path, f"run '{run.name}'"))
                for folder in going.get(run.name, []):
                    trash = folder.with_name(f"{TRASH}{folder.name}.{secrets.token_hex(4)}")
                    folder.rename(trash)
                    left.append(trash)
                storage.sync_folder(run.checkpoints)
                for trash in left:
                    freed += lineage.size(trash)
                    shutil.rmtree(trash)
        except LeaseHeldError as error:
            say(f"kept after all: {error}")
    return freed


@dataclass(frozen=True)
class Registered:
    """What the model versions of a tracking store were made from."""

    address: str
    versions: tuple[tuple[str, str, str, str], ...]
    """(name and number, run's name or "", MLflow's id of the run or "", address of the files) of each."""

    @classmethod
    def read(cls, tracker: Tracker, runs: Iterable[Run]) -> Registered:
        """Ask the tracking store.

        Raises:
            UnreachableError: it does not answer, or its file is gone.
        """
        if tracker.uri.startswith("sqlite:///") and not Path(tracker.uri.removeprefix("sqlite:///")).is_file():
            if any(_delivered(run).get("uri") == tracker.address for run in runs):
                raise UnreachableError(
                    f"tracking store {tracker.address}: its file is gone, and runs are recorded there"
                )
            return cls(tracker.address, ())
        versions, token = [], None
        try:
            while True:
                page = tracker.client.search_model_versions(max_results=1000, page_token=token)
                for one in page:
                    made_by = one.tags.get(RUN_TAG, ""), one.run_id or ""
                    versions.append((f"{one.name} version {one.version}", *made_by, one.source or ""))
                if not (token := page.token):
                    return cls(tracker.address, tuple(versions))
        except UnreachableError:
            raise
        except Exception as error:
            raise UnreachableError(f"tracking store {tracker.address}: {error}") from error

    def whole(self, run: Run) -> list[str]:
        """Why all checkpoints of a run stay: it is not known which of them is registered, or whether one is."""
        delivered = _delivered(run).get("uri", self.address)
        elsewhere = [f"what is registered of it in {delivered} is not known"] if delivered != self.address else []
        return elsewhere + [f"registered as {title}" for title, last in self._of(run) if not EPOCH.fullmatch(last)]

    def single(self, run: Run) -> dict[str, str]:
        """The registered checkpoints of a run, by name."""
        return {last: f"registered as {title}" for title, last in self._of(run) if EPOCH.fullmatch(last)}

    def _of(self, run: Run) -> list[tuple[str, str]]:
        """The versions made from a run, each with the last part of the address of its files."""
        run_id, place = _delivered(run).get("run_id"), f"/{run.name}/{run.checkpoints.name}/"
        return [
            (title, PurePosixPath(source).name)
            for title, name, made_by, source in self.versions
            if name == run.name or (made_by and made_by == run_id) or place in source
        ]


def _delivered(run: Run) -> dict[str, Any]:
    path = run.folder / "delivered.json"
    return dict(storage.read_json(path)) if path.is_file() else {}


def _leases(run: Run, store: Path) -> list[Path]:
    """Locks of whoever may write into a run: the sweep it belongs to, its command, its workers."""
    study = lineage.place(run)[0]
    of_study = [store / "studies" / study / "lease"] if study else []
    return [*of_study, run.folder / "lease", run.folder / "writer.lease"]


def _in_use(run: Run, store: Path, studies: Collection[str | None]) -> list[str]:
    """Why a run, or the study it belongs to, is not at rest; `studies` have trainings that are unfinished."""
    owners = {owner for path in _leases(run, store) if (owner := storage.lease_owner(path))}
    study = lineage.place(run)[0]
    resumable = study is not None and (study in studies or not records.ended(Run(store / "studies" / study)))
    return [
        *(f"in use by {owner}" for owner in sorted(owners)),
        *([f"its study {study} is unfinished and may be resumed"] if resumable else []),
    ]
