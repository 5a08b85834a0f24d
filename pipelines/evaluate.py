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
    """Measure all benchmarks; where the checkpoint belongs to a run, they are recorded with it."""
    model = trained_model.load(reference.checkpoint)
    prepared = prepare.open_prepared(model.recipe.data.name, store)
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
            record(reference.run, outcome, model.digest, int(model.metadata["epoch"]))
    return outcomes


def record(run: Run, outcome: Outcome, digest: str, epoch: int) -> None:
    """Keep an outcome with the run, once for each state of the weights."""
    path = run.evaluation / f"{outcome.benchmark}.json"
    content = {**outcome.to_json(), "weights": digest, "epoch": epoch}
    if path.is_file() and storage.read_json(path) == content:
        return
    storage.write_json(path, content)
    outbox = Outbox(run.events)
    values = {f"{outcome.benchmark}/{name}": value for name, value in outcome.values.items()}
    outbox.metrics(epoch, values, series=f"{outcome.benchmark} {digest} {outcome.fingerprint}")
    outbox.append({"kind": "tags", "values": {f"protocol.{outcome.benchmark}": outcome.fingerprint}})


def recorded(run: Run) -> dict[str, dict[str, float]]:
    """What was measured of a run before: {benchmark: {metric: value}}."""
    found = {}
    for path in sorted(run.evaluation.glob("*.json")):
        content = storage.read_json(path)
        found[content["benchmark"]] = content["values"]
    return found
