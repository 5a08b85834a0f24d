"""The deck of a study of variants: all systems on one test split, what they cost, and which claims held.

It is made of what the trials left in the store, at any time and again: what was measured once is kept, so the same
study gives the same page. A trial that failed or cannot be measured is named with its reason, and takes no other away.
Files, in the study's folder: deck.html, one page that opens offline; deck.json, all numbers on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.pipelines import metrics, protocol, references, statistics, trained_model
from setwise.pipelines.references import VARIANT
from setwise.pipelines.statistics import Difference, Interval
from setwise.platform import config, storage
from setwise.platform import run as runs
from setwise.platform.errors import SetwiseError
from setwise.platform.outbox import Outbox
from setwise.sweeps import analysis, deck_claims, deck_measure, deck_speed
from setwise.sweeps.analysis import Row
from setwise.sweeps.deck_claims import RESAMPLES, Judged
from setwise.sweeps.deck_measure import Measured
from setwise.sweeps.deck_speed import Speed
from setwise.sweeps.space import Study
from setwise.sweeps.variants import SEED, SYSTEMS, Deck

if TYPE_CHECKING:
    import optuna

PAGE, DATA, KEPT = "deck.html", "deck.json", "deck_settings.json"
RECALLS = tuple(f"{direction}_R{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Standing:
    """One variant on the test split: means over its measured seeds.

    values: R@K and rsum with their intervals. difference: of rsum to the baseline; `corrected` is its p after Holm, for
    all variants that have several seeds; None with one seed, of this or of the baseline, which does not tell how much
    trainings vary. settings: those of its own, beside its recipe's and the study's.
    """

    name: str
    group: str
    recipe: str
    runs: tuple[Measured, ...]
    values: dict[str, Interval]
    difference: Difference | None
    corrected: float | None
    settings: dict[str, Any]

    @property
    def stored(self) -> tuple[int, int]:
        return self.runs[0].stored

    def health(self, name: str) -> float | None:
        """The mean over seeds of one of `sets/...`, None of a system that has none."""
        found = [one.health[name] for one in self.runs if name in one.health]
        return sum(found) / len(found) if found else None

    def budget(self, name: str) -> float | None:
        """The mean over seeds of one of deck_measure.BUDGET; None where it is not known of one."""
        values = [one.budget[name] for one in self.runs]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "variant": self.name,
            "group": self.group,
            "recipe": self.recipe,
            "settings": self.settings,
            "values": {name: asdict(value) for name, value in self.values.items()},
            "rsum minus baseline": None if self.difference is None else asdict(self.difference),
            "p corrected": self.corrected,
            "runs": [one.to_json() for one in self.runs],
        }


@dataclass(frozen=True)
class Found:
    """A deck as it is now. missing: (trial or variant, why nothing of it is shown)."""

    name: str
    spec: Study
    settings: Deck
    baseline: str
    test: str
    chance: float
    standings: tuple[Standing, ...]
    missing: tuple[tuple[str, str], ...]
    speed: Speed | None
    judged: tuple[Judged, ...]
    autoencoders: tuple[dict[str, Any], ...]

    def group(self, name: str) -> list[Standing]:
        return [one for one in self.standings if one.group == name]

    def standing(self, name: str | None) -> Standing | None:
        return next((one for one in self.standings if one.name == name), None)

    @property
    def ablations(self) -> dict[str, list[Standing]]:
        """By group, the variants beside the one they vary, in the order of their values."""
        groups = dict.fromkeys(one.group for one in self.standings if one.group != SYSTEMS)
        reference = self.standing(self.settings.reference)
        return {name: _in_order([*([reference] if reference else []), *self.group(name)], self.spec) for name in groups}

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.name,
            "test": self.test,
            "chance rsum": self.chance,
            "baseline": self.baseline,
            "resamples": RESAMPLES,
            "variants": [one.to_json() for one in self.standings],
            "missing": [{"what": what, "reason": reason} for what, reason in self.missing],
            "speed": None if self.speed is None else self.speed.to_json(),
            "claims": [one.to_json() for one in self.judged],
            "slot autoencoders": list(self.autoencoders),
        }


def keep(spec: Study, name: str, store: Path) -> None:
    """Remember what the deck is to show. It is no part of what the study is, and may change at any start."""
    storage.write_json(store / "studies" / name / KEPT, spec.deck.model_dump(mode="json"))


def write(study: optuna.Study, spec: Study, name: str, store: Path, say: Say) -> Path:
    """Measure what was not measured yet, and write the page, which is returned, and the numbers; both go to MLflow."""
    from setwise.sweeps import deck_page

    found = collect(study, spec, name, store, say)
    parent = analysis.parent(name, store)
    content = {DATA: json.dumps(found.to_json(), indent=1, allow_nan=False), PAGE: deck_page.render(found, store)}
    for file, text in content.items():
        path = parent.folder / file
        if not path.is_file() or path.read_bytes() != text.encode():
            storage.write_bytes(path, text.encode())
            Outbox(parent.events).append({"kind": "artifact", "path": file, "into": ""})
    return parent.folder / PAGE


def collect(study: optuna.Study, spec: Study, name: str, store: Path, say: Say) -> Found:
    """All that the deck shows but the pictures."""
    file = store / "studies" / name / KEPT
    settings = Deck.model_validate(storage.read_json(file)) if file.is_file() else spec.deck
    rows = analysis.of(study, spec, name, store).rows
    measured: dict[str, list[Measured]] = {}
    missing: list[tuple[str, str]] = []
    for place, row in enumerate(rows, start=1):
        variant, seed = str(row.settings.get(VARIANT)), int(row.settings.get(SEED, 0))
        called = f"{variant}, seed {seed} ({row.name})"
        if row.state != "complete":
            missing.append((called, _why(row)))
            continue
        say(f"the deck: {called} on the test split ({place} of {len(rows)})")
        training = references.trial_run(name, row.number, store)
        try:
            one = deck_measure.measure(training, variant, seed, store, settings.images)
        except Exception as error:  # whatever is wrong with one, the others are shown
            missing.append((called, f"it cannot be measured: {in_words(error)}"))
        else:
            measured.setdefault(variant, []).append(one)
    begun = {str(row.settings.get(VARIANT)) for row in rows}
    missing += [(variant, "not begun yet") for variant in spec.variants if variant not in begun]
    baseline = settings.baseline or next(iter(spec.variants))
    standings = _standings(spec, measured, baseline)
    speed = _speed(settings, measured, store, name, missing, say)
    some = next(iter(measured.values()), [None])[0]
    of = some.outcome.protocol if some is not None else {}
    return Found(
        name=name,
        spec=spec,
        settings=settings,
        baseline=baseline,
        test=protocol.in_words({**of, "similarity": {"kind": "each its own similarity"}}) if of else "nothing measured",
        chance=metrics.chance_rsum(of["images"], of["captions"], of["captions"] // of["images"]) if of else 0.0,
        standings=tuple(standings),
        missing=tuple(missing),
        speed=speed,
        judged=tuple(deck_claims.judge(claim, measured, speed) for claim in settings.claims),
        autoencoders=tuple(_autoencoders(store, next(iter(spec.variants.values())).trained.data.name)),
    )


def in_words(error: Exception) -> str:
    """Of an error that nobody foresaw also its kind."""
    return str(error) if isinstance(error, SetwiseError | OSError) else f"{type(error).__name__}: {error}"


def _why(row: Row) -> str:
    return row.reason or {"unfinished": "its training has not ended"}.get(row.state, row.state)


def _standings(spec: Study, measured: Mapping[str, Sequence[Measured]], baseline: str) -> list[Standing]:
    """The variants that were measured, in the study's order."""
    base = [one.outcome for one in measured.get(baseline, ())]
    differences: dict[str, Difference] = {}
    for name, trainings in measured.items():
        if base and name != baseline:
            outcomes = [one.outcome for one in trainings]
            differences[name] = statistics.differences(outcomes, base, resamples=RESAMPLES)["rsum"]
    tested = [name for name in differences if min(len(measured[name]), len(base)) > 1]
    adjusted = dict(zip(tested, statistics.holm([differences[name].p for name in tested]), strict=True))
    found = []
    for name, variant in spec.variants.items():
        if not (its := measured.get(name)):
            continue
        found.append(
            Standing(
                name=name,
                group=variant.group,
                recipe=variant.recipe or spec.recipe,
                runs=tuple(its),
                values=statistics.intervals([one.outcome for one in its], resamples=RESAMPLES),
                difference=differences.get(name),
                corrected=adjusted.get(name),
                settings=dict(zip(variant.overrides, values_of(spec, name, list(variant.overrides)), strict=True)),
            )
        )
    return found


def varied(spec: Study, variants: Sequence[str]) -> list[str]:
    """The settings of their own in which some variants differ, as they are trained."""
    names = dict.fromkeys(name for variant in variants for name in spec.variants[variant].overrides)
    values = {name: [repr(values_of(spec, variant, [name])) for variant in variants] for name in names}
    return [name for name in names if len(set(values[name])) > 1]


def values_of(spec: Study, variant: str, names: Sequence[str]) -> list[Any]:
    """What a variant is trained with."""
    flat = config.flatten(spec.variants[variant].trained)
    return [flat.get(name) for name in names]


def _in_order(standings: list[Standing], spec: Study) -> list[Standing]:
    """By the value of the one setting that varies, if it is a number."""
    names = varied(spec, [one.name for one in standings])
    values = {one.name: values_of(spec, one.name, names) for one in standings}
    if len(names) == 1 and all(isinstance(value[0], int | float) for value in values.values()):
        return sorted(standings, key=lambda one: float(values[one.name][0]))
    return standings


def _speed(
    settings: Deck,
    measured: Mapping[str, Sequence[Measured]],
    store: Path,
    name: str,
    missing: list[tuple[str, str]],
    say: Say,
) -> Speed | None:
    """Times of the variants that were asked for, each by its first training; None if there is none of them."""
    first = {variant: trainings[0] for variant in settings.timed if (trainings := measured.get(variant))}
    if not first:
        return None
    say(f"the deck: timing queries of {', '.join(first)}")
    try:
        models = {variant: trained_model.load(one.run.best_checkpoint()) for variant, one in first.items()}
        return deck_speed.measured(models, store, store / "studies" / name)
    except Exception as error:
        missing.append(("query times", in_words(error)))
        return None


def _autoencoders(store: Path, dataset: str) -> list[dict[str, Any]]:
    """Trainings of Slot Attention's autoencoder on the deck's data set: no retrieval, but slots that find objects."""
    found = []
    for training in references.all_runs(store):
        scores = [
            event["values"]
            for event in runs.read_events(training.events)
            if event["kind"] == "metrics" and "val/ari" in event["values"]
        ]
        if scores and config.flatten(config.read_yaml(training.config).values).get("data.name") == dataset:
            best = max(scores, key=lambda values: float(values.get("val/psnr", values["val/ari"])))
            shown = {key: float(best[key]) for key in ("val/ari", "val/psnr") if key in best}
            found.append({"run": training.name, "epochs": len(scores), **shown})
    return found
