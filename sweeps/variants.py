"""Variants: whole systems, each a recipe with settings of its own, that one study trains with several seeds each.

What they are to show stands beside them as claims, which are judged on the test split when the study has ended
(deck.py). Claims decide no training, so they may be rewritten at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from setwise.pipelines import recipe as recipes
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import VARIANT
from setwise.platform import config
from setwise.platform.config import Keys, Layer, Settings
from setwise.platform.errors import ConfigError

if TYPE_CHECKING:
    from setwise.sweeps.space import Study

SEED = "train.seed"
"""Beside the variant, the parameter of a trial of such a study."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
SYSTEMS = "systems"
"""The group of variants that are systems of their own; the others are ablations."""
SHARED = ("data.name", "train.epochs", "train.workers", "train.threads", "train.accelerators")
"""What all variants have alike: they are trained on the same data, equally long, on machines of one kind."""


class Variant(Settings):
    """One system: a recipe, and what it has of its own."""

    recipe: str | None = Field(None, description="by name or file; none: the study's")
    overrides: dict[str, Any] = Field(default_factory=dict, description="settings, over those of the study")
    group: str = Field(SYSTEMS, pattern=NAME, description="what it is shown with: systems, or an ablation's name")
    settings: dict[str, Any] | None = Field(
        None, description="all that it is trained with: written by setwise, so that a changed file changes no study"
    )

    @property
    def trained(self) -> Recipe:
        """The recipe as it is trained, but for the seed."""
        return Recipe.model_validate(self.settings)


class Claim(Settings):
    """What is said of two variants before anything is measured: that one is better than the other."""

    says: str = Field(min_length=1, description="in words")
    of: Literal["rsum", "spread", "search"] = Field(
        "rsum",
        description="rsum: the test RSUM of `better` is higher; spread: so is the log circular variance of its sets; "
        "search: a query of `better` is answered in less time",
    )
    better: str = Field(description="a variant")
    than: str = Field(description="another")


class Deck(Settings):
    """What the page of such a study shows beside its table."""

    baseline: str | None = Field(None, description="the variant that all are compared with; none: the first")
    reference: str | None = Field(None, description="the variant that ablations vary, whose attention is drawn")
    images: int | None = Field(
        None, ge=2, description="of the test split, the first so many, on which all are measured; none: all of it"
    )
    timed: tuple[str, ...] = Field((), description="variants whose queries are timed against the size of the gallery")
    claims: tuple[Claim, ...] = Field((), description="each is judged: it held, it did not hold, or it is not decided")

    def named(self) -> dict[Keys, str]:
        """{where a variant is named: the variant}."""
        given = {"baseline": self.baseline, "reference": self.reference}
        found: dict[Keys, str] = {(where,): name for where, name in given.items() if name is not None}
        found |= {("timed", place): name for place, name in enumerate(self.timed)}
        for place, claim in enumerate(self.claims):
            found |= {("claims", place, "better"): claim.better, ("claims", place, "than"): claim.than}
        return found


def space_of(names: list[str], seeds: int) -> dict[str, dict[str, Any]]:
    """The space of so many variants and seeds, as a study writes it."""
    of_seeds = {SEED: {"choice": list(range(seeds))}} if seeds > 1 else {}
    return {**of_seeds, VARIANT: {"choice": names}}


def in_turn(points: list[dict[str, Any]], variants: Mapping[str, Variant], deck: Deck) -> list[dict[str, Any]]:
    """The trials in the order in which they are worth their time: every variant once, then the other seeds of systems
    and of what a claim names, then those of other ablations. A study of few trials so leaves out what matters least."""
    claimed = {name for claim in deck.claims for name in (claim.better, claim.than)}

    def turn(point: dict[str, Any]) -> int:
        name = point[VARIANT]
        is_judged = variants[name].group == SYSTEMS or name in claimed
        return 0 if point.get(SEED, 0) == 0 else 1 if is_judged else 2

    return sorted(points, key=turn)  # which leaves those of one turn seed by seed, in the order of the variants


def resolved(study: Study, source: Layer, preset: Layer, fixed: Layer) -> dict[str, Any]:
    """What changes in a study once its variants are known with all settings that they are trained with.

    Args:
        source: the study's file, for the places of mistakes.
        preset: settings of the hardware, over the recipes. fixed: settings of the study, over both; a variant's own
            come last.

    Raises:
        ConfigError: with all mistakes in all variants.
    """
    # By dotted names, however they were written.
    overrides = config.flatten(fixed.values)
    variants = {
        name: one.model_copy(update={"overrides": config.flatten(one.overrides)})
        for name, one in study.variants.items()
    }
    study = study.model_copy(update={"variants": variants})
    written: list[tuple[Keys, Mapping[str, Any]]] = [(("overrides",), overrides)]
    written += [(("variants", name, "overrides"), one.overrides) for name, one in study.variants.items()]
    for section, given in written:
        if SEED in given:
            place = config.place_of(source, (*section, SEED))
            raise ConfigError(f"{place}: {SEED}: variants are trained with the seeds that `seeds` says, from 0 on")
    for name, one in study.variants.items():
        if one.settings is not None:
            place = config.place_of(source, ("variants", name, "settings"))
            raise ConfigError(f"{place}: variants.{name}.settings: setwise writes them; give overrides")
    return {"overrides": overrides, "variants": _with_settings(study, source, preset, fixed)}


def _with_settings(study: Study, source: Layer, preset: Layer, fixed: Layer) -> dict[str, Variant]:
    problems = [
        f"{config.place_of(source, ('deck', *keys))}: deck.{'.'.join(map(str, keys))}: "
        f"{config.no_such('variant', name, list(study.variants))}"
        for keys, name in study.deck.named().items()
        if name not in study.variants
    ]
    found: dict[str, Variant] = {}
    first: Recipe | None = None
    for name, variant in study.variants.items():
        place = config.place_of(source, ("variants", name))
        try:
            layer = config.load_layers(recipes.find(variant.recipe or study.recipe), recipes.find)
            layer = layer.merge(preset).merge(fixed)
            layer = layer.merge(as_layer(variant.overrides, source, ("variants", name, "overrides")))
        except ConfigError as error:
            where = config.place_of(source, ("variants", name, "recipe")) if variant.recipe is not None else place
            problems.append(f"{where}: variants.{name}: {error}")
            continue
        try:
            recipe = config.build(Recipe, layer)
            _ = recipe.retriever  # only what embeds images and captions can be ranked beside the others
        except ConfigError as error:
            lines = str(error).splitlines()
            problems += [
                _placed(line, f"{place}: variants.{name}", name) for line in lines if "nothing was st" not in line
            ]
            continue
        first = first or recipe
        problems += [f"{place}: variants.{name}: {told}" for told in _unlike(recipe, first, next(iter(study.variants)))]
        found[name] = variant.model_copy(update={"settings": recipe.model_dump(mode="json")})
    if problems:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError("\n".join([*problems, f"{count}; nothing was started."]))
    return found


def _placed(line: str, place: str, name: str) -> str:
    """A mistake of a recipe with its place: a setting has one, while what is wrong with the whole has the variant's."""
    whole = line.removeprefix("configuration: ")
    has_place = whole == line and line.partition(": ")[0].count(":") == 2
    return f"{line} (variant '{name}')" if has_place else f"{place}: {whole}"


def _unlike(recipe: Recipe, first: Recipe, name: str) -> list[str]:
    """In what a variant differs from the first one though all must be alike."""
    own, other = config.flatten(recipe), config.flatten(first)
    return [
        f"{setting} is {own[setting]!r} and {other[setting]!r} in '{name}'; variants have it alike. Set it for all: "
        f"overrides: {{{setting}: ...}}"
        for setting in SHARED
        if own[setting] != other[setting]
    ]


def as_layer(values: Mapping[str, Any], source: Layer, section: Keys) -> Layer:
    """{dotted name: value} of a section of a study as a layer of a recipe, at the places where it was written.

    Raises:
        ConfigError: a name goes on below one that has a value.
    """
    layer = Layer()
    for name, value in values.items():
        keys = tuple(name.split("."))
        inner = layer.values
        for key in keys[:-1]:
            if not isinstance(inner.setdefault(key, {}), dict):
                raise ConfigError(f"{config.place_of(source, (*section, name))}: '{key}' in '{name}' is no section")
            inner = inner[key]
        inner[keys[-1]] = value
        for depth in range(1, len(keys) + 1):
            layer.places[keys[:depth]] = config.place_of(source, (*section, name))
    return layer
