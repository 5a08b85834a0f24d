"""`setwise data VERB`: data sets from the files of their publishers to what a training reads."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from setwise.pipelines.terminal import JsonOption, Overrides, StoreOption, emit, open_store, results, say
from setwise.platform.errors import ConfigError, DataError

app = typer.Typer(help="Data sets: verify, prepare and describe them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="coco, coco_butd, f30k, f30k_butd, digits, or a name of your own")]
FromOption = Annotated[
    Path | None, typer.Option("--from", metavar="FOLDER", help="the data set's files, as its publishers ship them")
]


@app.command("ls")
def data_list(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Data sets that are known by name or prepared here."""
    from setwise.pipelines import datasets, prepare

    folder = open_store(store)
    own = [path.parent.parent.name for path in sorted((folder / "data").glob("*/prepared/manifest.json"))]
    found = {}
    for name in dict.fromkeys([*datasets.known(), *own]):
        if name not in own:  # to open it would fetch it from the mirror
            found[name] = "not prepared"
            continue
        try:
            found[name] = prepare.open_prepared(name, folder).describe()
        except DataError as error:
            found[name] = str(error)
    if as_json:
        emit(found)
    else:
        for name, state in found.items():
            results.print(f"{name:<12} {state}", soft_wrap=True)


@app.command("prepare")
def data_prepare(
    name: Name,
    overrides: Overrides = None,
    source: FromOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read, check, resize and store a data set as Parquet shards. What is there already is reused."""
    from setwise.pipelines import prepare
    from setwise.platform import cluster

    folder = open_store(store)
    if name == "digits":
        if source is not None:
            raise ConfigError("'digits' comes with setwise and takes no --from")
        settings = _settings(prepare.DigitsPreparation, overrides, None)
        with cluster.connect(), _going_on("prepare", name, overrides, source, store):
            prepared = prepare.prepare_digits(folder, settings, say)
    else:
        chosen = _settings(prepare.PrepareSettings, overrides, source)
        _check_source(name, chosen.source.folder, "prepare")
        with cluster.connect(), _going_on("prepare", name, overrides, source, store):
            prepared = prepare.prepare_source(name, folder, chosen, say)
    if as_json:
        emit({"folder": str(prepared.folder), **prepared.manifest})
    else:
        results.print(f"{name}: {prepared.describe()}\n{prepared.folder}", soft_wrap=True)


@app.command("verify")
def data_verify(
    name: Name,
    overrides: Overrides = None,
    source: FromOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="decode every image and read every feature")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a data set before any GPU time: its files (--from), or what was prepared of it. Exit code 5 if wrong."""
    from setwise.pipelines import datasets, prepare, verify

    config: datasets.SourceConfig | None = None
    if source is not None or overrides:
        config = _settings(prepare.PrepareSettings, overrides, source).source
        _check_source(name, config.folder, "verify")
    report = verify.verify(name, config, open_store(store), deep=deep, say=say)
    if as_json:
        emit(report.to_json())
    else:
        results.print(report.table())
    if not report.ok:
        raise DataError(f"'{name}' has mistakes that would change its numbers; see above")


@app.command("info")
def data_info(name: Name, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """What was prepared: from which files, how, how much, and what was left out for which reason."""
    from setwise.pipelines import prepare, tables

    prepared = prepare.open_prepared(name, open_store(store))
    if as_json:
        emit({"folder": str(prepared.folder), **prepared.manifest})
    else:
        results.print(tables.prepared(prepared))


@app.command("regions")
def data_regions(
    name: Name,
    target: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="where the features go, in SCAN's layout")],
    overrides: Overrides = None,
    source: FromOption = None,
    store: StoreOption = None,
) -> None:
    """Extract region features of a data set's images with Faster R-CNN, in the layout of the published ones."""
    from setwise.pipelines import datasets, prepare, regions
    from setwise.platform import cluster

    prepare.check_name(name)
    settings = _settings(regions.RegionExtraction, overrides, source)
    _check_source(name, settings.source.folder, "regions")
    folder = open_store(store)
    read = datasets.open_source(name, settings.source)
    with cluster.connect(), _going_on("regions", name, overrides, source, store, "--to", str(target)):
        made = regions.extract(read, target, settings, folder / "weights", say)
    results.print(f"{made}", soft_wrap=True)
    say(f"next: {prepare.command(f'{name}_fasterrcnn', str(made))}")


def _settings(kind: Any, overrides: list[str] | None, folder: Path | None) -> Any:
    """Settings of a verb from its overrides; `--from FOLDER` is `source.folder=FOLDER`, whatever characters it has.

    Paths are made absolute: what is prepared is used from other folders than this one.
    """
    from setwise.platform import config

    settings = config.build(kind, config.Layer(), overrides or [])
    if not hasattr(settings, "source"):
        return settings
    given = settings.source.model_dump(include={"folder", "annotations", "images"}, exclude_none=True)
    if folder is not None:
        given["folder"] = str(folder)
    places = {name: str(Path(place).expanduser().resolve()) for name, place in given.items()}
    return settings.model_copy(update={"source": settings.source.model_copy(update=places)})


@contextlib.contextmanager
def _going_on(
    verb: str, name: str, overrides: list[str] | None, source: Path | None, store: Path | None, *more: str
) -> Iterator[None]:
    """Say how to go on, if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        places = [("--from", source), ("--store", store)]
        options = [text for option, place in places if place is not None for text in (option, str(place))]
        again = shlex.join(["setwise", "data", verb, name, *(overrides or []), *options, *more])
        say(f"interrupted; nothing is lost. To go on: {again}")
        raise


def _check_source(name: str, folder: str | None, verb: str) -> None:
    from setwise.pipelines import datasets

    if folder is None:
        from setwise.platform import config

        nearest = None if name in datasets.known() else config.nearest_name(name, datasets.known())
        hint = f" Did you mean '{nearest}'?" if nearest else ""
        raise ConfigError(f"where are the files of '{name}'?{hint} Say so: setwise data {verb} {name} --from FOLDER")
    if verb != "verify":  # which reports it; the others would start a cluster first
        datasets.check_folder(name, folder)
