"""Evaluation of a checkpoint, or an ensemble, on the test split: the benchmarks of its data set with their protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as arrays

from setwise.pipelines import benchmarks, crisscrossed, index, prepare, query_ranks, ranking, shards, trained_model
from setwise.pipelines.batches import Split
from setwise.pipelines.benchmarks import Encoded, Kind, Outcome, QueryRanks
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.ranking import Ties
from setwise.pipelines.references import Reference
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import checkpoint, config, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run

Say = Callable[[str], None]
NEEDED = {"ids", "images", "ranks"}
"""What is kept of each query at least."""
KNOWN = {one.name for one in fields(QueryRanks)}
TEST = "test"
"""What the values of a model that is no retriever are called by; it has no benchmark but its own."""
TEST_FILE = "test.json"
OFFICIAL = ".official_ties"
"""Ends the name under which a benchmark with the authors' order of ties is kept: beside the other, never over it."""


def evaluate(
    references: Sequence[Reference],
    store: Path,
    *,
    names: Sequence[str] | None = None,
    ties: Ties = "pessimistic",
    cxc: Path | None = None,
    say: Say = lambda message: None,
) -> list[Outcome]:
    """Measure benchmarks on the test split; of a single model that is no retriever, what its validation measures.

    Of one reference they are recorded with its run, and not measured again while weights, data, ties and ratings stay
    the same. Several are an ensemble: their scores are averaged, and the values belong to no run.

    Args:
        names: the benchmarks to measure; None for all that the data has the truth for.
        ties: see benchmarks.measure; outcomes with "official" end in `OFFICIAL`.
        cxc: folder of CxC's ratings; None for STORE/data/cxc if there is such a folder. Without one, what was recorded
            with ratings stays.

    Raises:
        ConfigError: no benchmark is called so, or the members of an ensemble have different data or are not different.
        DataError: a benchmark that was asked for by name cannot be measured, or a file is damaged.
        DivergedError: an embedding is not finite.
    """
    if len(references) == 1 and _kind(references[0].checkpoint) != "retriever":
        return [_of_pretext(references[0], store, names)]
    models = [trained_model.load(reference.checkpoint) for reference in references]
    dataset = models[0].recipe.data.name
    for model, reference in zip(models, references, strict=True):
        if model.recipe.data.name != dataset:
            raise ConfigError(
                f"{references[0].label} reads data set '{dataset}' and {reference.label} '{model.recipe.data.name}'; "
                "scores can be averaged only over the same images and captions"
            )
    members = [(model.digest, model.recipe.similarity) for model in models]
    for place, (member, reference) in enumerate(zip(members, references, strict=True)):
        if (first := members.index(member)) < place:
            raise ConfigError(
                f"{references[first].label} and {reference.label} are one model: give one of them, or different ones"
            )
    kinds = benchmarks.kinds(dataset)
    for name in names or ():
        if name not in kinds:
            raise config.no_such("benchmark", name, tuple(kinds))
    wanted = {name: kind for name, kind in kinds.items() if names is None or name in names}
    prepared = prepare.open_prepared(dataset, store)
    cxc = cxc or (default if (default := store / "data" / "cxc").is_dir() else None)

    run = references[0].run if len(references) == 1 else None
    inputs: dict[str, dict[str, Any]] = {}
    texts = _wording(prepared, dataset)
    for name, kind in wanted.items():
        inputs[name] = {"weights": models[0].digest, "data": prepared.fingerprint, "ties": ties, **texts}
        if kind == "cxc" and cxc is not None:
            inputs[name]["ratings"] = crisscrossed.fingerprints(cxc)
    done: dict[str, Outcome] = {}
    for name in wanted:
        before = still_true(run, _kept_as(name, ties), inputs[name]) if run is not None else None
        if before is not None:
            done[name] = before
    missing = {name: kind for name, kind in wanted.items() if name not in done}
    if missing:
        for name, outcome in _measure(missing, models, prepared, store, ties, cxc, names is not None, say).items():
            done[name] = replace(outcome, benchmark=_kept_as(name, ties))
            if run is not None:
                record(run, done[name], inputs[name], int(models[0].metadata["epoch"]))
    return [done[name] for name in wanted if name in done]


def _kind(folder: Path) -> str:
    """Of the model in a checkpoint; what can be said against a damaged one is said where it is loaded."""
    recipe = checkpoint.metadata(folder).get("recipe", {})
    return str(recipe.get("model", {}).get("kind", "retriever"))


def _of_pretext(reference: Reference, store: Path, names: Sequence[str] | None) -> Outcome:
    """What a captioner or a slot autoencoder is worth on the test split, kept with its run."""
    device = trained_model.default_device()
    system, words, metadata = trained_model.load_system(reference.checkpoint, device)
    recipe = system.recipe
    if names is not None:
        raise ConfigError(
            f"a model of kind '{recipe.model.kind}' has no benchmarks to name: leave out --bench, and what its "
            "validation measures is measured on the test split"
        )
    prepared = prepare.open_prepared(recipe.data.name, store)
    split = Split(prepared, "test", recipe.data, words)
    weights = storage.fingerprint(
        [metadata["weights_sha256"], recipe.model_dump(mode="json", include={"data", "model"}), metadata["vocabulary"]]
    )
    protocol = {"images": len(split), "captions": len(split.caption_ids), "data": prepared.fingerprint}
    run = reference.run
    file = run.folder / TEST_FILE if run is not None else None
    before = (_kept(file) if file is not None else None) or {}
    if (before.get("weights"), before.get("protocol")) == (weights, protocol):
        return Outcome(TEST, before["values"], protocol)
    measured = system.validate(split, recipe.train.eval_batch_size, device)
    outcome = Outcome(TEST, {name.partition("/")[2]: value for name, value in measured.items()}, protocol)
    if run is not None and file is not None:
        values = {f"{TEST}/{name}": value for name, value in outcome.values.items()}
        Outbox(run.events).metrics(int(metadata["epoch"]), values, series=f"{TEST} {weights} {outcome.fingerprint}")
        storage.write_json(file, {**outcome.to_json(), "weights": weights})
    return outcome


def _measure(
    wanted: dict[str, Kind],
    models: Sequence[TrainedModel],
    prepared: Prepared,
    store: Path,
    ties: Ties,
    cxc: Path | None,
    insist: bool,
    say: Say,
) -> dict[str, Outcome]:
    """Those of the wanted benchmarks that the split has the truth for; with `insist`, all of them or an error."""
    splits = [index.stored_or_made(model, prepared, "test", store) for model in models]
    first = splits[0]
    owners, image_ids, caption_ids = first.owners.numpy(), first.image_ids.numpy(), first.caption_ids.numpy()
    extended = prepared.folder / "extended_positives"
    for name, reason in benchmarks.unavailable(wanted, image_ids, caption_ids, owners, extended).items():
        if insist:
            raise DataError(f"{name} cannot be measured on the test split in {prepared.folder}: {reason}")
        say(f"{name}: left out, since {reason}")
        wanted = {other: kind for other, kind in wanted.items() if other != name}
    if not wanted:
        return {}
    if "cxc" in wanted.values() and cxc is None:
        files = ", ".join(f"{task}_test.csv" for task in crisscrossed.TASKS)
        say(
            "cxc: only between images and captions. Text-text and image-image retrieval and the correlations take "
            f"{files} of Crisscrossed Captions in {store / 'data' / 'cxc'}, or in a folder that you name"
        )
    members = tuple(
        ranking.member(split.image_sets, split.text_sets, model.retrieval.similarity, model.device)
        for split, model in zip(splits, models, strict=True)
    )
    query_ranks.check_finite(members, f"the test split in {prepared.folder}")
    dataset = models[0].recipe.data.name
    encoded = Encoded(members, owners, image_ids, caption_ids, **_wording(prepared, dataset))
    measured = benchmarks.measure(wanted, encoded, extended=extended, cxc=cxc, ties=ties, device=models[0].device)
    return dict(zip(wanted, measured, strict=True))


def _wording(prepared: Prepared, dataset: str) -> dict[str, str]:
    """What stands for the test captions of a data set whose ids are no publisher's, as a protocol names it."""
    split = prepared.manifest["splits"].get("test")
    if split is None or benchmarks.has_published_ids(dataset):
        return {}
    return {"texts": storage.fingerprint(list(shards.captions(prepared.folder, split)))}


def _kept_as(name: str, ties: Ties) -> str:
    return name + OFFICIAL if ties == "official" else name


def record(run: Run, outcome: Outcome, measured_on: dict[str, Any], epoch: int) -> None:
    """Keep an outcome with the run, its ranks beside its values, and append it to the run's events.

    What was kept of other weights or other data goes: values of one run that stand beside each other are of one model.
    The values come last: if they are there, the events are too, and whoever was stopped before measures again.
    """
    for file in run.evaluation.glob("*.json"):
        content = _kept(file) or {}
        if (content.get("weights"), content.get("data")) != (measured_on["weights"], measured_on["data"]):
            file.unlink(missing_ok=True)
            file.with_suffix(".safetensors").unlink(missing_ok=True)
    tensors: dict[str, NDArray[Any]] = {}
    for direction, one in outcome.ranks.items():
        tensors |= {f"{direction}.{name}": values for name, values in vars(one).items() if values is not None}
    storage.write_bytes(run.evaluation / f"{outcome.benchmark}.safetensors", arrays.save(tensors))
    outbox = Outbox(run.events)
    values = {f"{outcome.benchmark}/{name}": value for name, value in outcome.values.items()}
    outbox.metrics(epoch, values, series=f"{outcome.benchmark} {measured_on['weights']} {outcome.fingerprint}")
    outbox.append({"kind": "tags", "values": {f"protocol.{outcome.benchmark}": outcome.fingerprint}})
    storage.write_json(run.evaluation / f"{outcome.benchmark}.json", {**outcome.to_json(), **measured_on})


def recorded(run: Run) -> list[Outcome]:
    """What was measured of a run before, without what was found of each query; `with_queries` adds it.

    Raises:
        DataError: a file is damaged.
    """
    found = []
    for file in sorted(run.evaluation.glob("*.json")):
        content = _kept(file)
        if content is None:
            raise DataError(f"{file}: damaged. Delete it, and measure again: setwise eval {run.name}")
        found.append(Outcome(content["benchmark"], content["values"], content["protocol"]))
    return found


def _kept(file: Path) -> dict[str, Any] | None:
    """What `record` wrote; None if it is not there or not whole."""
    try:
        content = storage.read_json(file)
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and isinstance(content.get("benchmark"), str)
    return content if whole and all(isinstance(content.get(key), dict) for key in ("values", "protocol")) else None


def with_queries(run: Run, outcome: Outcome) -> Outcome:
    """An outcome as `recorded` gives it, with what was found of each query.

    Raises:
        DataError: see `ranks`.
    """
    return replace(outcome, ranks=ranks(run, outcome.benchmark))


def ranks(run: Run, benchmark: str) -> dict[str, QueryRanks]:
    """What was recorded of each query of a benchmark, by direction.

    Raises:
        DataError: there is nothing, the file is damaged, or an earlier version wrote it and kept less.
    """
    file = run.evaluation / f"{benchmark}.safetensors"
    try:
        tensors = arrays.load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: no ranks can be read ({error}); measure again: setwise eval {run.name}") from error
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, values in tensors.items():
        direction, _, name = key.partition(".")
        found.setdefault(direction, {})[name] = values
    if not found or any(not NEEDED <= set(kept) <= KNOWN for kept in found.values()):
        raise DataError(f"{file}: another version kept other things of a query; measure again: setwise eval {run.name}")
    return {direction: QueryRanks(**kept) for direction, kept in found.items()}


def still_true(run: Run, benchmark: str, measured_on: dict[str, Any]) -> Outcome | None:
    """A recorded outcome, if it was measured on just this and its ranks are there."""
    content = _kept(run.evaluation / f"{benchmark}.json")
    if content is None or any(key not in content or content[key] != value for key, value in measured_on.items()):
        return None
    try:
        return Outcome(benchmark, content["values"], content["protocol"], ranks(run, benchmark))
    except DataError:
        return None
