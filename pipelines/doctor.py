"""`setwise doctor`: is everything here that a training needs, and what to do where it is not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from setwise.pipelines import datasets, prepare, promotion_ledger, registry
from setwise.platform import mirror
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.tracking import Tracker

MIN_FREE_GB = 5
REQUIRED = ("ray", "torch", "torchvision", "mlflow", "optuna", "pyarrow", "safetensors", "pycocotools")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `ok` False means that something will not work; `advice` says what to do."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def examine(store: Path, tracker: Tracker) -> list[Check]:
    """Look at Python, packages, processors, the store, the data and the registered models.

    Changes nothing but a probe file in the store and in its mirror, and fetches nothing.
    """
    return [
        *(_python(), *_packages(), _torch(), _store(store), *_mirror(store), _ray()),
        *(*_data(store), *_models(tracker)),
    ]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), version, "Python 3.11 or newer: make PYTHON=python3.12 install")


def _packages() -> list[Check]:
    checks = []
    for name in REQUIRED:
        try:
            checks.append(Check(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, False, "not installed", "make install"))
    return checks


def _torch() -> Check:
    try:
        import torch
        import torchvision
    except Exception as error:
        return Check(
            "torch with torchvision", False, str(error).splitlines()[0], "install the pair together: make install"
        )
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = ", ".join(devices) or f"no GPU; {len(os.sched_getaffinity(0))} CPUs"
    return Check("torch with torchvision", True, f"{torch.__version__} with {torchvision.__version__}: {found}")


def _store(store: Path) -> Check:
    free = shutil.disk_usage(store).free / 1e9
    if store.stat().st_mode & stat.S_IWOTH:
        return Check(
            "store",
            False,
            f"{store}: every user of the machine may change it",
            f"chmod o-w {store}; a group may share it",
        )
    try:
        with tempfile.TemporaryFile(dir=store) as probe:
            probe.write(b"setwise")
    except OSError as error:
        return Check("store", False, f"{store}: {error.strerror}", "choose another folder: --store or SETWISE_STORE")
    return Check(
        "store", free > MIN_FREE_GB, f"{store}, {free:.0f} GB free", f"free {MIN_FREE_GB} GB, or move the store"
    )


def _mirror(store: Path) -> list[Check]:
    """Whether the store's mirror takes and gives back; nothing where it has none."""
    try:
        found = mirror.open_mirror(store)
        if found is None:
            return []
        found.check()
    except (ConfigError, UnreachableError) as error:
        return [Check("mirror", False, str(error), f"correct {mirror.VARIABLE}, or train without it")]
    return [Check("mirror", True, found.address)]


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    return Check("ray cluster", True, address or "none named: each command starts its own on this machine")


def _data(store: Path) -> list[Check]:
    checks = []
    for name in datasets.known():
        found = f"not prepared yet: setwise data prepare {name}"
        with contextlib.suppress(DataError):
            if prepare.is_there(name, store):
                found = prepare.open_prepared(name, store).describe()
        checks.append(Check(f"data: {name}", True, found))
    return checks


def _models(tracker: Tracker) -> list[Check]:
    """Whether each registered model has its champion where its ledger ends, and its champions their files."""
    if tracker.uri.startswith("sqlite:///") and not Path(tracker.uri.removeprefix("sqlite:///")).is_file():
        return [Check("tracking", True, f"{tracker.address}: nothing yet")]
    checks = []
    try:
        names = registry.names(tracker)
        checks.append(Check("tracking", True, tracker.address))
        for name in names:
            checks += _model(tracker, name)
    except UnreachableError as error:
        checks.append(Check("tracking", False, str(error).splitlines()[0], "start the server, or correct its address"))
    return checks


def _model(tracker: Tracker, name: str) -> list[Check]:
    label = f"model: {name}"
    try:
        ledger = promotion_ledger.read(tracker, name)
    except DataError as error:
        return [Check(label, False, str(error), "restore MLflow's database from a copy")]
    champion = registry.champion(tracker, name)
    found = f"champion is version {champion.version}" if champion else "no champion"
    problem = promotion_ledger.problem(ledger, champion)
    said = problem or f"{found}; {len(ledger.entries)} entries in its ledger"
    checks = [Check(label, problem is None, said, f"setwise models repair {name}" if problem else "")]
    for number in sorted(ledger.former()):
        advice = f"it cannot be served or gone back to; if it is the champion: setwise rollback {name}"
        version = registry.version(tracker, name, number)
        lack = "gone from the registry" if version is None else registry.missing_files(tracker, version)
        if lack:
            checks.append(Check(f"{label} version {number}", False, lack, advice))
    return checks


def table(checks: list[Check]) -> Table:
    shown = Table(box=None, show_header=False)
    for check in checks:
        shown.add_row("ok" if check.ok else "FAIL", check.name, check.found, "" if check.ok else check.advice)
    return shown
