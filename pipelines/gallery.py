"""The gallery: what a model answers to queries of the test split, and what each of its slots sees.

One page that opens offline. Failures come first, then successes; or, beside another model, what was broken and what was
fixed. Queries are chosen by rule and never by eye, so that the same models always give the same page.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from setwise.pipelines import attention, benchmarks, evaluate, index, page, prepare, protocol, tables, trained_model
from setwise.pipelines.cards import TOP, Card, Dealer, Direction, Measured
from setwise.pipelines.embeddings import Embeddings
from setwise.pipelines.positives import Integers
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.set_health import set_health
from setwise.platform import storage
from setwise.platform.errors import ConfigError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run

DIRECTIONS: tuple[Direction, Direction] = ("i2t", "t2i")
SPLIT = "test"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Section:
    """Cards under a title. note: how they were chosen, and from how many."""

    title: str
    note: str
    cards: list[Card]


def make(
    reference: Reference,
    store: Path,
    *,
    versus: Reference | None = None,
    queries: int = 24,
    worst: bool = False,
    asked: Sequence[str] = (),
    say: Say = lambda message: None,
) -> str:
    """The page of a model, complete.

    What it ranks by is measured first, and recorded as `setwise eval` does, if it was not before.

    Args:
        versus: another model, to show what `reference` breaks and fixes where that was right and wrong.
        queries: of the split, half of them images and half captions, half wrong and half right.
        worst: all of them wrong.
        asked: captions and paths of images, to be shown before the others.

    Raises:
        ConfigError: the two models read different data sets; or an image was asked of a model of region features.
        DataError: a file is missing or damaged.
    """
    references = [reference] if versus is None else [reference, versus]
    models = [trained_model.load(one.checkpoint) for one in references]
    model, dataset = models[0], models[0].recipe.data.name
    if models[-1].recipe.data.name != dataset:
        raise ConfigError(
            f"{reference.label} reads data set '{dataset}' and {references[-1].label} '{models[-1].recipe.data.name}'; "
            "what was fixed and broken can be told on the same queries alone"
        )
    prepared = prepare.open_prepared(dataset, store)
    split = index.open_split(model, prepared, SPLIT)
    sets = [index.stored_or_made(one, prepared, SPLIT, store) for one in models]
    names = _benchmarks(prepared, sets[0], dataset)
    measured = []
    for one, made, its in zip(references, models, sets, strict=True):
        say(f"ranking the {SPLIT} split by {one.label}")
        outcomes = {outcome.benchmark: outcome for outcome in evaluate.evaluate([one], store, names=names)}
        measured.append(Measured(one.label, made, its, outcomes))
    kinds = benchmarks.kinds(dataset)
    ids = (sets[0].image_ids.numpy(), sets[0].caption_ids.numpy(), sets[0].owners.numpy())
    truths = {name: benchmarks.truth(kinds[name], *ids, prepared.folder / "extended_positives") for name in names}
    dealer = Dealer(split, prepared.kind == "images", truths, measured)
    sections = [Section("Asked for", "", [dealer.card_from_outside(query) for query in asked])] if asked else []
    if queries:
        sections += _sections(dealer, queries, worst)
    return page.render(
        "gallery.html",
        label=reference.label,
        versus=versus.label if versus else None,
        facts=_facts(dealer, prepared),
        scores=_scores(measured, names),
        slots=sets[0].image_sets.shape[1] if attention.has_slots(model) else 1,
        usage=_usage(sets[0]) if attention.has_slots(model) else [],
        own=names[0],
        every=names[-1] if len(names) > 1 else None,
        has_pixels=dealer.has_pixels,
        top=TOP,
        sections=sections,
    )


def write(html: str, file: Path) -> None:
    """Write a page to a file of one's own. Raises ConfigError where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(file, html.encode())
    except OSError as error:
        raise ConfigError(f"{file}: the page cannot be written there ({error.strerror}). Name another file") from error


def publish(html: str, run: Run, versus: Reference | None = None) -> Path:
    """Keep a page with its run, and say so in the run's events, from where it reaches MLflow, of an ended run too."""
    beside = "" if versus is None else "-vs-" + re.sub(r"[^A-Za-z0-9._-]+", "-", versus.label).strip("-.")
    file = run.folder / "gallery" / f"gallery{beside}.html"
    storage.write_bytes(file, html.encode())
    Outbox(run.events).append({"kind": "artifact", "path": f"gallery/{file.name}", "into": "gallery"})
    return file


def choose(
    after: Integers, before: Integers | None, images: Integers, failures: int, successes: int
) -> tuple[list[int], list[int]]:
    """Queries that went wrong, and that went right.

    Args:
        after: (Q,) rank of the best that is true of each query, by the model that is shown; 0 where none was asked.
        before: the same by the other model.
        images: (Q,) the image that each query is or belongs to; of each, one query at most is among what went wrong.

    Returns:
        Wrong: rank above 1, the worst first. Right: rank 1, evenly spread. Beside another model, wrong are only those
        that it has right, and right only those that it has wrong, its worst first.
    """
    if before is not None:
        broken = _worst(np.where(before == 1, after, 0), images, failures)
        return broken, _worst(np.where(after == 1, before, 0), images, successes)
    right = np.flatnonzero(after == 1)
    spread = (2 * np.arange(successes) + 1) * len(right) // max(2 * successes, 1)
    return _worst(after, images, failures), right[np.unique(spread)].tolist() if len(right) else []


def _worst(ranks: Integers, images: Integers, number: int) -> list[int]:
    """Of the queries with a rank above 1 those with the highest, one an image; of equal ones the first."""
    order = np.argsort(-ranks, kind="stable")
    order = order[ranks[order] > 1]
    first_of_image = np.unique(images[order], return_index=True)[1]
    return order[np.sort(first_of_image)][:number].tolist()  # type: ignore[no-any-return]


def _sections(dealer: Dealer, queries: int, worst: bool) -> list[Section]:
    """Wrong before right, images before captions; what cannot be divided evenly goes to the first."""
    parts = len(DIRECTIONS) * (1 if worst else 2)
    shares = [(queries + parts - 1 - part) // parts for part in range(parts)] + [0] * len(DIRECTIONS)
    benchmark = list(dealer.truths)[-1]
    wrong: list[Section] = []
    right: list[Section] = []
    for place, direction in enumerate(DIRECTIONS):
        after, *rest = (measured.ranks(benchmark, direction) for measured in dealer.measured)
        before = rest[0] if rest else None
        images = np.arange(len(after)) if direction == "i2t" else dealer.split.owners
        chosen = choose(after, before, images, shares[place], shares[place + len(DIRECTIONS)])
        asked = after > 0
        if before is None:
            counts = int((after > 1).sum()), int((after == 1).sum())
            titles = ("Failures", "Successes")
            rules = ("the worst ranks, one query an image", "spread evenly over them")
        else:
            counts = int(((before == 1) & (after > 1)).sum()), int(((before > 1) & (after == 1)).sum())
            titles = ("Broken", "Fixed")
            rules = ("the worst ranks now, one query an image", "the worst ranks before, one query an image")
        for group, picked, title, rule, count in zip((wrong, right), chosen, titles, rules, counts, strict=True):
            what = tables.DIRECTIONS[direction]
            note = f"{len(picked)} of {count:,} ({count / max(1, asked.sum()):.1%} of {asked.sum():,} queries): {rule}"
            group.append(Section(f"{title}: {what}", note, [dealer.card(direction, query) for query in picked]))
    return wrong if worst else wrong + right


def _benchmarks(prepared: Prepared, sets: Embeddings, dataset: str) -> list[str]:
    """The benchmark of the whole split by captions written for an image alone, and that of all that is true, if any."""
    kinds = benchmarks.kinds(dataset)
    wider = {name: kind for name, kind in kinds.items() if kind in ("extended", "eccv")}
    ids = (sets.image_ids.numpy(), sets.caption_ids.numpy(), sets.owners.numpy())
    missing = benchmarks.unavailable(wider, *ids, prepared.folder / "extended_positives")
    own = next(name for name, kind in kinds.items() if kind == "whole")
    return [own, *[name for name in wider if name not in missing][:1]]


def _facts(dealer: Dealer, prepared: Prepared) -> list[tuple[str, str]]:
    """What has to be known of the page, as (name, value)."""
    facts = []
    for place, measured in enumerate(dealer.measured):
        model = measured.model
        facts.append(
            (
                "compared with" if place else "model",
                f"{measured.label}: {model.recipe.title}, {_sets(model.recipe)}, "
                f"epoch {model.metadata['epoch']}, weights {model.metadata['weights_sha256'][:16]}",
            )
        )
    facts.append(("data", f"{prepared.manifest['name']} ({prepared.fingerprint}), split {dealer.split.name}"))
    for name in dealer.truths:
        outcome = dealer.measured[0].outcomes[name]
        facts.append((name, f"{protocol.in_words(outcome.protocol)}; protocol {outcome.fingerprint}"))
    return facts


def _sets(recipe: Recipe) -> str:
    prediction = recipe.retriever.set_prediction
    return f"{prediction.num_slots} slots" if prediction.kind == "slots" else prediction.kind.replace("_", " ")


def _scores(measured: Sequence[Measured], names: Sequence[str]) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each benchmark its name, the columns of a table, and its rows."""
    found = []
    for name in names:
        values = [one.outcomes[name].values for one in measured]
        ends = [end for end in tables.COLUMNS if f"i2t_{end}" in values[0]]
        rows = [
            [one.label, tables.DIRECTIONS[direction], *(f"{its[f'{direction}_{end}']:.1f}" for end in ends)]
            for direction in DIRECTIONS
            for one, its in zip(measured, values, strict=True)
        ]
        found.append((name, [tables.COLUMNS[end] for end in ends], rows))
    return found


def _usage(sets: Embeddings) -> list[tuple[str, list[float], float, float]]:
    """Whether sets are used as sets: for each side its name, shares by slot, slot usage, log circular variance."""
    health = set_health(sets.image_sets, sets.text_sets, sets.owners)
    return [
        (
            side,
            shares,
            health[f"sets/{side}_slot_usage"],
            health.get(f"sets/{side}_log_circular_variance", float("-inf")),
        )
        for side, shares in zip(("image", "text"), attention.usage(sets), strict=True)
    ]
