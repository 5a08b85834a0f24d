"""Evaluation of a checkpoint on the test split: every benchmark of its data set, each with its protocol."""

from __future__ import annotations

from pathlib import Path

from setwise.pipelines import benchmarks, index, prepare, trained_model
from setwise.pipelines.benchmarks import Outcome, Ranking
from setwise.pipelines.references import Reference
from setwise.platform import storage
from setwise.platform.run import Run
from setwise.platform.tracking import Outbox


def evaluate(reference: Reference, store: Path) -> list[Outcome]:
    """Measure all benchmarks. With a checkpoint of a run they are recorded, and not measured again."""
    model = trained_model.load(reference.checkpoint)
    prepared = prepare.open_prepared(model.recipe.data.name, store)
    measured_on = {"weights": model.digest, "data": prepared.fingerprint}
    if reference.run is not None and (before := recorded(reference.run, measured_on)):
        return before
    split = index.open_split(model, prepared, "test")
    sets = index.embeddings(model, prepared, split, store)
    ranking = Ranking(
        scores=model.scores(sets.image_sets, sets.text_sets).numpy(),
        owners=sets.owners.numpy(),
        image_ids=sets.image_ids.numpy(),
        caption_ids=sets.caption_ids.numpy(),
        similarity={"kind": model.recipe.similarity.kind},
    )
    outcomes = benchmarks.measure(model.recipe.data.name, ranking, prepared.folder / "extended_positives")
    if reference.run is not None:
        for outcome in outcomes:
            record(reference.run, outcome, measured_on, int(model.metadata["epoch"]))
    return outcomes


def record(run: Run, outcome: Outcome, measured_on: dict[str, str], epoch: int) -> None:
    """Keep an outcome with the run, and append it to the run's events."""
    storage.write_json(run.evaluation / f"{outcome.benchmark}.json", {**outcome.to_json(), **measured_on})
    outbox = Outbox(run.events)
    values = {f"{outcome.benchmark}/{name}": value for name, value in outcome.values.items()}
    outbox.metrics(epoch, values, series=f"{outcome.benchmark} {measured_on['weights']} {outcome.fingerprint}")
    outbox.append({"kind": "tags", "values": {f"protocol.{outcome.benchmark}": outcome.fingerprint}})


def recorded(run: Run, measured_on: dict[str, str] | None = None) -> list[Outcome]:
    """What was measured of a run before; with `measured_on`, only if it was of those weights on that data."""
    contents = [storage.read_json(path) for path in sorted(run.evaluation.glob("*.json"))]
    if measured_on is not None and any(content[key] != measured_on[key] for content in contents for key in measured_on):
        return []
    return [Outcome(content["benchmark"], content["values"], content["protocol"]) for content in contents]
