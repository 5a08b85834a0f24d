"""`setwise demo`: the platform's main job from end to end, on data that comes with it.

Every step is the verb a user would type. What an earlier demo left is reused: the data, the finished trials, the
champion; so a demo that was killed goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from setwise.pipelines import benchmarks, compare, evaluate, metrics, prepare, promote, references, search, tables
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation
from setwise.platform import cluster
from setwise.platform.errors import ConfigError, GateError, TrialsFailedError
from setwise.platform.tracking import Tracker
from setwise.sweeps import report, run, space

Say = Callable[[str], None]
QUERY = "a red three above a green seven"


@dataclass(frozen=True)
class Size:
    """How much of everything a demo does."""

    study: str
    digits: DigitsConfig
    overrides: tuple[str, ...]


SIZES = {
    "full": Size("digits", DigitsConfig(), ()),
    "tiny": Size(
        "digits-tiny",
        DigitsConfig(train=200, val=50, test=100),
        ("trials=3", "startup_trials=2", "train.epochs=2", "train.batch_size=20", "pruning.grace_epochs=1"),
    ),
}


def run_demo(store: Path, tracker: Tracker, size: str, say: Say, results: Console) -> None:
    """Prepare, sweep, evaluate, compare, promote, search; ends with what was found and what to try next.

    Raises:
        ConfigError: there is no such size.
        TrialsFailedError: some trials of the sweep failed; everything else was done all the same.
    """
    if size not in SIZES:
        raise ConfigError(f"no demo has the size '{size}'. There are: {', '.join(SIZES)}")
    chosen = SIZES[size]
    started = time.monotonic()
    step = _Steps(say)
    spec, base = space.load("digits", list(chosen.overrides))
    try:
        step("starting Ray on this machine")
        with cluster.connect():
            step("data: scenes of handwritten digits in the files of COCO, prepared by Ray Data")
            prepare.prepare_digits(store, DigitsPreparation(generate=chosen.digits), say)
            step(f"sweep: {spec.trials} trials of {spec.recipe} with Ray Tune and Optuna, tracked in MLflow")
            outcome = run.run_study(spec, base, chosen.study, store, tracker, say)
    except KeyboardInterrupt:
        say("\ninterrupted; nothing is lost. To go on where it stopped: make demo   (or: setwise demo)")
        raise
    report.show_outcome(outcome, results)
    if outcome.best is None:
        raise TrialsFailedError(f"all trials failed: {outcome.failed}")

    step("evaluate: the best trial on the test split, every benchmark")
    best = references.resolve(outcome.best.name, store, tracker)
    measured = evaluate.evaluate([best], store, say=say)
    for one in measured:
        results.print(tables.outcome(one))

    step("compare: all trials beside each other")
    results.print(tables.comparison(compare.compare(references.find_runs(chosen.study, store))))

    step("promote: the best becomes the champion")
    try:
        results.print(promote.promote(best, store, tracker).describe(best.label), soft_wrap=True)
    except GateError as refusal:
        results.print(str(refusal), soft_wrap=True)

    step(f"search: {QUERY!r}, answered by the champion")
    champion = references.resolve("models:/setwise-digits@champion", store, tracker)
    answer = search.search(QUERY, champion, store, top=3)
    results.print(tables.answer(QUERY, answer))
    example = search.export_images(answer, store, store / "demo")[0]

    _conclude(outcome, measured, chosen.study, example, time.monotonic() - started, say, results)
    if outcome.failed:
        raise TrialsFailedError(f"{len(outcome.failed)} trials failed: {outcome.failed}")


def _conclude(
    outcome: report.Outcome,
    measured: list[benchmarks.Outcome],
    study: str,
    example: Path,
    seconds: float,
    say: Say,
    results: Console,
) -> None:
    whole = measured[1]
    images, captions = whole.protocol["images"], whole.protocol["captions"]
    chance = metrics.chance_rsum(images, captions, captions // images)
    results.print(
        f"\nFound in {seconds / 60:.1f} minutes: the best of {outcome.complete + outcome.pruned} trials is "
        f"{outcome.best.name if outcome.best else 'none'}, with RSUM {whole.values['rsum']:.1f} on {images:,} test "
        f"images and {captions:,} captions (chance: {chance:.1f}).\n{outcome.importance.sentence()}",
        soft_wrap=True,
    )
    say(
        "\nTry next:\n"
        "  setwise ui                                        the MLflow pages: every trial, curve and checkpoint\n"
        f"  setwise search {example}\n"
        f"  setwise sweep {study.partition('-')[0]} --trials 16                    more trials of the same study"
    )


class _Steps:
    """Numbered headings with the time that has passed."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._started = time.monotonic()
        self._number = 0

    def __call__(self, what: str) -> None:
        self._number += 1
        self._say(f"\n[{self._number}/7  {time.monotonic() - self._started:4.0f} s] {what}")
