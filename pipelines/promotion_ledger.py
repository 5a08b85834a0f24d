"""The ledger of promotions of a registered model: who was made champion when, by whom and why. It only grows.

MLflow has no compare-and-swap and keeps no history of an alias. A lock made of what is unique in it would have to be
broken when its owner died, and could then have two owners. But MLflow never changes a parameter of a run: of two that
write it differently, one is told so. So the ledger is a run whose parameters 000001, 000002, ... are its entries, and
to write the entry after the last that one has seen is a compare-and-swap. The ledger is the truth; the alias
`champion` follows it (`settle`), and whoever comes next moves it where a crash came between.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import secrets
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from setwise.pipelines import registry
from setwise.platform.errors import ConfigError, DataError, GateError, UnreachableError
from setwise.platform.tracking import Tracker

EXPERIMENT = "setwise-promotions"
POINTER_TAG = "setwise.ledger"
"""On the registered model: MLflow's id of the run that is its ledger."""
MAX_REASON = 500  # characters; MLflow cuts a parameter at 6,000 without a word
SETTLE_S = 60  # of trying to move the alias, while others move it too

Kind = Literal["promotion", "override", "rollback"]


@dataclass(frozen=True)
class Entry:
    """One change of the champion.

    `numbers` are (candidate's, champion's) value by metric; `reason` is the gate's, or a rollback's; `override` is the
    reason of somebody who promoted against the gate; `replaces` is the version that was the champion before.
    """

    kind: Kind
    version: int
    replaces: int | None
    run: str
    reason: str
    override: str | None = None
    numbers: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    who: str = ""
    time: int = 0  # seconds since 1970, UTC

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ledger:
    """All entries of a registered model, the oldest first."""

    name: str
    entries: tuple[Entry, ...]
    run_id: str | None

    @property
    def head(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    def champions(self) -> list[int]:
        """The versions that a rollback goes back through, the champion last.

        A promotion goes on top. A rollback takes away all above its version, or puts on top what was taken away once.
        """
        stack: list[int] = []
        for entry in self.entries:
            if not stack and entry.replaces is not None:
                stack.append(entry.replaces)
            if entry.kind == "rollback" and entry.version in stack:
                stack = stack[: stack.index(entry.version) + 1]
            else:
                stack.append(entry.version)
        return stack

    def former(self) -> set[int]:
        """Every version that ever was the champion."""
        replaced = {entry.replaces for entry in self.entries if entry.replaces is not None}
        return replaced | {entry.version for entry in self.entries}


class OvertakenError(GateError):
    """Another process changed the champion meanwhile; nothing was written."""


def read(tracker: Tracker, name: str) -> Ledger:
    """The ledger of a registered model; an empty one if nothing was promoted yet.

    Raises:
        DataError: an entry is missing or cannot be read.
        UnreachableError: the tracking store did not answer.
    """
    run_id = _pointer(tracker, name)
    if run_id is None:
        return Ledger(name, (), None)
    with registry.reaching(tracker):
        params = tracker.client.get_run(run_id).data.params
    texts = {int(key): text for key, text in params.items() if key.isdigit()}
    entries = []
    for number in range(1, len(texts) + 1):
        try:
            content = json.loads(texts[number])
            content["numbers"] = {metric: tuple(pair) for metric, pair in content["numbers"].items()}
            content.pop("id")
            entries.append(Entry(**content))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"ledger of {name} (MLflow run {run_id}): entry {number} is missing or damaged ({error!r})"
            ) from error
    return Ledger(name, tuple(entries), run_id)


def append(tracker: Tracker, seen: Ledger, entry: Entry) -> Entry:
    """Write `entry` after those that were seen, with who and when.

    Raises:
        OvertakenError: another entry stands there already.
        DataError: the ledger was deleted in MLflow.
    """
    from mlflow.exceptions import MlflowException

    run_id = seen.run_id or begin(tracker, seen.name)
    key = f"{len(seen.entries) + 1:06d}"
    stamped = replace(entry, who=_who(), time=int(time.time()))
    text = json.dumps({**stamped.to_json(), "id": secrets.token_hex(8)})  # no two writers write the same
    with registry.reaching(tracker):
        try:
            tracker.client.log_param(run_id, key, text)
        except MlflowException as error:  # refused, or written but the answer got lost
            run = tracker.client.get_run(run_id)
            there = run.data.params.get(key)
            if there is None and run.info.lifecycle_stage == "deleted":
                raise DataError(
                    f"the ledger of {seen.name} (run {run_id}) was deleted in MLflow; bring it back: "
                    f"setwise models repair {seen.name}"
                ) from error
            if there is None:
                raise
            if there != text:
                raise OvertakenError(_by_whom(seen.name, json.loads(there))) from error
    return stamped


def _by_whom(name: str, other: dict[str, Any]) -> str:
    return (
        f"the champion of {name} was changed meanwhile, by {other['who']}: {other['kind']} to version "
        f"{other['version']}. Look, and decide again: setwise models history {name}"
    )


def settle(tracker: Tracker, name: str) -> bool:
    """Let the alias follow the ledger; True if it had to be moved.

    Whoever moved the alias looks at the ledger again: if it has grown, the alias may have been moved back, and is moved
    once more. So when all are done the alias is at the ledger's end, whatever order they came in.

    Raises:
        DataError: the version at the ledger's end is gone.
    """
    from mlflow.exceptions import MlflowException

    moved, deadline = False, time.monotonic() + SETTLE_S
    while (head := read(tracker, name).head) is not None:
        current = registry.champion(tracker, name)
        if current is not None and current.version == head.version:
            break
        if registry.version(tracker, name, head.version) is None:
            raise DataError(
                f"{name} version {head.version} is the champion, but gone from the registry. Go back to the one before "
                f"it: setwise rollback {name}"
            )
        try:
            tracker.client.set_registered_model_alias(name, registry.CHAMPION, str(head.version))
            moved = True
        except MlflowException as error:  # two that set an alias for the first time at once are in each other's way
            if time.monotonic() > deadline:
                raise UnreachableError(f"tracking store {tracker.address}: {error}") from error
            time.sleep(0.1)
    return moved


def problem(ledger: Ledger, champion: registry.Version | None) -> str | None:
    """What is wrong between a model's ledger and its alias `champion`; None if nothing is. `repair` mends it."""
    if ledger.head is None or (champion is not None and champion.version == ledger.head.version):
        return None
    where = "gone" if champion is None else f"at version {champion.version}"
    return f"the alias '{registry.CHAMPION}' is {where}, its ledger ends at version {ledger.head.version}"


def rollback(tracker: Tracker, name: str, to: int | None = None, reason: str = "") -> Entry:
    """Make the previous champion, or `to`, the champion again; the entry that was written.

    Raises:
        ConfigError: there is none before, or `to` never was the champion, or is it now.
        DataError: the version or its files are gone.
        OvertakenError: the champion was changed meanwhile.
    """
    check_reason(reason)
    seen = read(tracker, name)
    champions = seen.champions()
    if seen.head is None or (to is None and len(champions) < 2):
        raise ConfigError(f"{name} has no champion before this one. Look: setwise models history {name}")
    if to is not None and to not in seen.former():
        known = ", ".join(map(str, sorted(seen.former())))
        raise ConfigError(f"{name} version {to} never was the champion; those that were: {known}")
    target = champions[-2] if to is None else to
    if target == seen.head.version:
        raise ConfigError(
            f"{name} version {target} is the champion already. If it is not served: setwise models repair"
        )
    version = registry.version(tracker, name, target)
    lack = "it is gone from the registry" if version is None else registry.missing_files(tracker, version)
    if version is None or lack:
        raise DataError(f"{name} version {target}: {lack}. Choose another: setwise rollback {name} --to VERSION")
    entry = Entry("rollback", target, seen.head.version, version.run, reason)
    with registry.reaching(tracker):
        written = append(tracker, seen, entry)
        settle(tracker, name)
    return written


def repair(tracker: Tracker, name: str) -> bool:
    """Finish what a crash, or a hand in MLflow's pages, left: the ledger is there, the alias at its end.

    Returns:
        Whether anything had to be done.
    """
    run_id = _pointer(tracker, name)
    restored = False
    if run_id is not None:
        with registry.reaching(tracker):
            if tracker.client.get_run(run_id).info.lifecycle_stage == "deleted":
                tracker.client.restore_run(run_id)
                restored = True
    return settle(tracker, name) or restored


def check_reason(reason: str) -> None:
    """Raises ConfigError if it is too long for an entry."""
    if len(reason) > MAX_REASON:
        raise ConfigError(f"the reason has {len(reason):,} characters; it can have {MAX_REASON}")


def numbers(candidate: dict[str, float], champion: dict[str, float]) -> dict[str, tuple[float | None, float | None]]:
    """(candidate's, champion's) value by metric; None where there is none, or no finite number."""
    pairs = {}
    for name in dict.fromkeys([*candidate, *champion]):
        values = candidate.get(name, math.nan), champion.get(name, math.nan)
        first, second = (round(value, 4) if math.isfinite(value) else None for value in values)
        pairs[name] = first, second
    return pairs


def shortened(reasons: str, limit: int = 3 * MAX_REASON) -> str:
    """A gate's reason, which names every metric, cut to what an entry has room for; the version has all of it."""
    return reasons if len(reasons) <= limit else reasons[: limit - 3] + "..."


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{os.uname().nodename}"


def _holders(name: str) -> tuple[str, str]:
    """Registered models that may point at the ledger: the model itself if promotion made it, else one beside it."""
    return name, f"{name}{registry.LEDGER_SUFFIX}"


def _pointer(tracker: Tracker, name: str) -> str | None:
    """MLflow's id of the ledger's run, None if it was not begun."""
    for holder in _holders(name):
        tags = registry.model_tags(tracker, holder)
        if tags is not None and POINTER_TAG in tags:
            return tags[POINTER_TAG]
    return None


def begin(tracker: Tracker, name: str) -> str:
    """The ledger's run, made if it is new, as the registered model is; of two that begin it at once, one does.

    A registered model is created with its tags or not at all, and once.
    """
    from mlflow.exceptions import MlflowException

    if (found := _pointer(tracker, name)) is not None:
        return found
    tags = {"mlflow.runName": name, "mlflow.note.content": f"The ledger of {name}: setwise models history {name}"}
    run_id = tracker.client.create_run(tracker.experiment_id(EXPERIMENT), tags=tags).info.run_id
    tracker.client.set_terminated(run_id)
    begun = None
    for holder in _holders(name):
        try:
            tracker.client.create_registered_model(holder, tags={POINTER_TAG: run_id})
        except MlflowException as error:
            if registry.model_tags(tracker, holder) is None:
                raise UnreachableError(f"tracking store {tracker.address}: {error}") from error
        if (begun := _pointer(tracker, name)) is not None:
            break
    assert begun is not None, "each holder was made with a pointer, or has one"
    if begun != run_id:  # another was quicker, and nobody knows of this one
        tracker.client.delete_run(run_id)
    return begun
