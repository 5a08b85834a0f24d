"""`setwise store VERB`: what is in the store and in its mirror, and sending and fetching by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from setwise.pipelines.terminal import JsonOption, StoreOption, emit, open_store, results, say
from setwise.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from setwise.platform.mirror import Mirror
    from setwise.platform.run_mirror import RunMirror

app = typer.Typer(help="The store, and its mirror at $SETWISE_MIRROR.", no_args_is_help=True)

FORMS = "data/NAME or runs/NAME"
Name = Annotated[str, typer.Argument(metavar="NAME", help=f"{FORMS}, as 'setwise store ls' shows them")]


@app.command("ls")
def store_list(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Prepared data sets and runs, and whether each is here and in the mirror."""
    from rich.table import Table

    folder = open_store(store)
    mirror = _mirror(folder)
    here, there = set(_here(folder)), set(_there(mirror))
    sizes = {name: sum(mirror.files(name).values()) for name in sorted(here | there)}
    if as_json:
        names = [{"name": n, "store": n in here, "mirror": n in there, "bytes": size} for n, size in sizes.items()]
        emit({"store": str(folder), "mirror": mirror.address, "names": names})
        return
    table = Table("name", "store", "mirror", "MB in the mirror")
    for name, size in sizes.items():
        table.add_row(name, *("yes" if name in place else "-" for place in (here, there)), f"{size / 1e6:.1f}")
    results.print(table)


@app.command("push")
def store_push(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=f"{FORMS}; else all")] = None,
    store: StoreOption = None,
) -> None:
    """Send what the mirror has not: prepared data sets, checkpoints and records of runs."""
    from setwise.pipelines import mirrored
    from setwise.platform import storage

    folder = open_store(store)
    mirror = _mirror(folder)
    here = _here(folder)
    for name in names or ():
        if name not in here:
            raise DataError(f"'{name}' is not in {folder}. What is: setwise store ls")
    mirror.check()  # before the first of many says the same
    refused = []
    for name in names or here:
        kind, plain = _parts(name)
        if kind == "data":
            with storage.lease(folder / name / "lease", f"data set '{plain}'"):
                sent = mirror.push(mirrored.name_of(plain), mirrored.MANIFEST)
            say(f"{name}: {'sent' if sent else 'is there already'}")
            continue
        try:
            _run(mirror, plain).push()
        except ConfigError as error:  # another run of this name keeps no other from being sent
            refused.append(str(error))
        else:
            say(f"{name}: is there")
    if refused:
        raise ConfigError("\n".join(refused))


@app.command("pull")
def store_pull(name: Name, store: StoreOption = None) -> None:
    """Fetch a data set, or a run: its record, its newest checkpoint and its best, as far as they are not here."""
    from setwise.pipelines import mirrored
    from setwise.platform import storage

    folder = open_store(store)
    mirror = _mirror(folder)
    kind, plain = _parts(name)
    if name not in _there(mirror):
        raise DataError(f"{mirror.address} has no '{name}'. What it has: setwise store ls")
    if kind == "data":
        if (folder / mirrored.name_of(plain) / mirrored.MANIFEST).is_file():
            raise ConfigError(f"'{name}' is in {folder} already. To have that of the mirror, remove it there first")
        if not mirrored.fetch(plain, folder):
            raise DataError(f"'{name}' was not sent to {mirror.address} to its end")
    else:
        copy = _run(mirror, plain)
        with storage.lease(copy.run.folder / "lease", f"run '{plain}'"):
            if not copy.run.config.is_file():
                copy.pull_record()
            newest = copy.restore()
        say(f"newest checkpoint: {newest or 'none fetched'}")
    results.print(str(folder / name), soft_wrap=True)


@app.command("remove")
def store_remove(name: Name, store: StoreOption = None) -> None:
    """Remove a data set or a run from the mirror; what is in the store stays."""
    from setwise.pipelines import mirrored

    mirror = _mirror(open_store(store))
    kind, plain = _parts(name)
    if name not in _there(mirror):
        raise DataError(f"{mirror.address} has no '{name}'. What it has: setwise store ls")
    if kind == "data":
        mirror.remove(mirrored.name_of(plain), mirrored.MANIFEST)
    mirror.remove(name)
    say(f"{name} is not in {mirror.address} any more")


def _mirror(folder: Path) -> Mirror:
    from setwise.platform.mirror import FORMS as ADDRESSES
    from setwise.platform.mirror import VARIABLE, open_mirror

    mirror = open_mirror(folder)
    if mirror is None:
        raise ConfigError(f"the store has no mirror: set {VARIABLE} to {ADDRESSES}")
    return mirror


def _run(mirror: Mirror, name: str) -> RunMirror:
    from setwise.platform.run import Run
    from setwise.platform.run_mirror import RunMirror

    return RunMirror(mirror, Run(mirror.store / "runs" / name))


def _parts(name: str) -> tuple[str, str]:
    from setwise.platform.run import NAME

    kind, _, plain = name.partition("/")
    if kind not in ("data", "runs") or not NAME.fullmatch(plain):
        raise ConfigError(f"'{name}' names nothing of a store; it can be {FORMS}")
    return kind, plain


def _here(folder: Path) -> list[str]:
    data = [path.parent.parent.name for path in folder.glob("data/*/prepared/manifest.json")]
    runs = [path.parent.name for path in folder.glob("runs/*/config.yaml")]
    return [f"data/{name}" for name in sorted(data)] + [f"runs/{name}" for name in sorted(runs)]


def _there(mirror: Mirror) -> list[str]:
    return [f"{kind}/{name}" for kind in ("data", "runs") for name in mirror.names(kind)]
