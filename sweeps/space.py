"""A study: which recipe, which settings vary and over what, how many trials and when to stop one.

Studies are YAML, one a file, and speak of settings by the same dotted names as recipes and overrides do. They are
checked against the recipe before anything starts: names, kinds and bounds. Instead of a space a study may have
variants, whole systems that are trained with several seeds each: the grid of both is its space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from setwise.pipelines import hardware
from setwise.pipelines import recipe as recipes
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import VARIANT
from setwise.platform import config
from setwise.platform.config import Layer, Settings
from setwise.platform.errors import ConfigError
from setwise.sweeps.domain import Domain
from setwise.sweeps.variants import NAME, Deck, Variant, as_layer, in_turn, resolved, space_of

FOLDER = Path(__file__).parent
Objective = Literal["val/rsum", "embedding_size", "query_ms"]
MAXIMISED: tuple[Objective, ...] = ("val/rsum",)
"""Objectives of which more is better; of the others less is."""
PERTURBED = ("loss.", "optimizer.", "similarity.")
"""Sections whose settings may change in the middle of a training: they decide no shape and no data."""


class Pruning(Settings):
    """Asynchronous successive halving (ASHA, Li et al. 2020): at rungs, only the best share goes on."""

    grace_epochs: int = Field(2, ge=1, description="no trial is stopped before this epoch, the first rung")
    reduction: float = Field(3, gt=1, description="a rung lets 1 of this many go on; rungs lie this factor apart")


class Population(Settings):
    """Population based training (PBT, Jaderberg et al. 2017): in the middle of their trainings the worst take over
    weights and settings of the best, and vary them. All trials train at once, or in turns."""

    perturb_epochs: int = Field(2, ge=1, description="epochs between two looks at who is worst and best")
    share: float = Field(0.25, gt=0, le=0.5, description="share of the trials that copies, and that is copied")
    resample: float = Field(0.25, ge=0, le=1, description="probability of a new draw instead of a factor 0.8 or 1.2")


class Study(Settings):
    """What `setwise sweep` runs."""

    recipe: str
    overrides: dict[str, Any] = Field(default_factory=dict, description="settings of the recipe, for all trials")
    trials: int = Field(20, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**31, description="of the sampler; each trial trains with the recipe's own seed")
    sampler: Literal["tpe", "grid", "random"] = Field(
        "tpe", description="tpe learns from the trials before; grid tries every combination of choices once"
    )
    startup_trials: int = Field(5, ge=1, description="trials drawn at random before TPE begins to learn")
    trials_per_gpu: int = Field(2, ge=1, description="trials that share a GPU where there is one")
    objectives: tuple[Objective, ...] = Field(
        ("val/rsum",), min_length=1, description="what to make best; of several the Pareto front is sought"
    )
    pruning: Pruning | None = Field(None, description="stop bad trials early; only with one objective")
    population: Population | None = Field(None, description="PBT instead of a sampler that learns")
    max_hours: float | None = Field(None, gt=0, description="of the sweep, all of its starts together")
    max_gpu_hours: float | None = Field(None, gt=0, description="of all trials together")
    variants: dict[Annotated[str, Field(pattern=NAME)], Variant] = Field(
        default_factory=dict, description="systems to be trained, each with several seeds, instead of a space"
    )
    seeds: int = Field(3, ge=1, le=1000, description="of each variant, from 0 on")
    deck: Deck = Field(Deck(), description="what the page of the variants shows, and what they are to show")
    space: dict[str, Domain] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _variants_are_a_grid(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(given := values.get("variants"), dict) or not given:
            return values
        seeds = values.get("seeds", cls.model_fields["seeds"].default)
        seeds = seeds if type(seeds) is int and seeds > 0 else 1  # else told by itself
        if len(given) < 2:
            raise ValueError("variants: give two or more, to be compared")
        space = space_of(list(map(str, given)), seeds)
        return {"sampler": "grid", "trials": len(given) * seeds, "space": space, **values}

    @model_validator(mode="after")
    def _are_variants(self) -> Study:
        if not self.variants:
            if self.deck != Deck():
                raise ValueError("deck: it is the page of a study with variants")
            return self
        expected = space_of(list(self.variants), self.seeds)
        if self.space != {name: Domain.model_validate(domain) for name, domain in expected.items()}:
            raise ValueError("space: variants and their seeds are the space of this study; leave one of the two out")
        if self.sampler != "grid" or self.pruning is not None or self.population is not None:
            raise ValueError("variants are a grid: sampler, pruning and population do not go with them")
        if self.objectives != ("val/rsum",):
            raise ValueError("objectives: variants are trained for val/rsum alone; their page shows what they cost")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Study:
        if len(set(self.objectives)) != len(self.objectives):
            raise ValueError("objectives: one is named twice")
        if self.objectives[0] != "val/rsum":
            raise ValueError("objectives: val/rsum comes first; without it the smallest model would win")
        if self.pruning is not None and self.population is not None:
            raise ValueError("pruning and population: a population stops none of its trials; choose one of the two")
        if self.objectives != ("val/rsum",):
            for name in ("pruning", "population"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: it goes by val/rsum alone; write {name}: null, or objectives: [val/rsum]"
                    )
        if self.sampler == "grid":
            if any(domain.choice is None or domain.when is not None for domain in self.space.values()):
                raise ValueError("sampler: a grid is made of choices without conditions")
            if self.trials > (points := math.prod(len(domain.choice or ()) for domain in self.space.values())):
                raise ValueError(f"trials: the grid has {points} points, and as many trials at most")
        if self.population is not None and self.sampler == "grid":
            raise ValueError("population: it begins with settings drawn at random; sampler: grid does not go with it")
        if self.population is not None and self.trials < 4:
            raise ValueError("population: it takes 4 trials or more")
        return self

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of choices, the last setting changing first; variants in the order of variants.py."""
        combinations = itertools.product(*(domain.choice or () for domain in self.space.values()))
        points = [dict(zip(self.space, values, strict=True)) for values in combinations]
        return in_turn(points, self.variants, self.deck) if self.variants else points

    @property
    def identity(self) -> Study:
        """What makes it this study: how much of it is worked off may change."""
        return self.model_copy(update={"trials": 1, "max_hours": None, "max_gpu_hours": None, "deck": Deck()})

    def recipe_of(self, base: Recipe, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial with these values; of a study without variants, `base` with them."""
        settings = {name: value for name, value in values.items() if name != VARIANT}
        return with_values(self.variants[values[VARIANT]].trained if VARIANT in values else base, settings)

    def each_recipe(self, base: Recipe) -> list[Recipe]:
        """Those of all variants, or the only one."""
        return [variant.trained for variant in self.variants.values()] or [base]

    def changed(self, change: Callable[[Recipe], Recipe]) -> Study:
        """The study with each variant changed so."""
        new = {
            name: one.model_copy(update={"settings": change(one.trained).model_dump(mode="json")})
            for name, one in self.variants.items()
        }
        return self.model_copy(update={"variants": new})

    def varies(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether a setting of the space is drawn where the settings are `values`; else the recipe's own stays."""
        condition = self.space[name].condition
        return condition is None or condition.holds(values)


def names() -> list[str]:
    """Studies that come with the package."""
    return config.names_in(FOLDER)


def find(name: str) -> Path:
    """The file of a study, by path or by name; ConfigError if there is none."""
    return config.find_file("study", name, FOLDER)


def is_study(path: Path) -> bool:
    """Whether a YAML file is meant as a study and not as a recipe."""
    return not {"space", "variants"}.isdisjoint(config.read_yaml(path).values)


def load(name: str, overrides: list[str] | None = None, on: str | None = None) -> tuple[Study, Recipe]:
    """A study and the recipe of its trial 0, both checked; every mistake in either is reported.

    Overrides speak of the study (`trials=5`) or of the recipe (`train.epochs=3`), whichever has that name; between them
    and the recipe lie the settings of preset `on`.

    Raises:
        ConfigError: with all mistakes.
    """
    layer = config.load_layers(find(name), find)
    study_fields = set(Study.model_fields)
    of_study = [text for text in overrides or [] if text.partition("=")[0].partition(".")[0] in study_fields]
    of_recipe = [text for text in overrides or [] if text not in of_study]
    study = config.build(Study, layer, of_study)
    preset = hardware.load(on)[1] if on is not None else Layer()
    fixed = as_layer(study.overrides, layer, ("overrides",))
    if study.variants:
        for text in of_recipe:
            fixed = fixed.merge(config.parse_override(text))
        study = study.model_copy(update=resolved(study, layer, preset, fixed))
        first = next(iter(study.variants.values())).trained
        return study, study.recipe_of(first, study.grid()[0])
    recipe_layer = config.load_layers(recipes.find(study.recipe), recipes.find).merge(preset)
    base = config.build(Recipe, recipe_layer.merge(fixed), of_recipe)
    if base.metric != "val/rsum":
        place = config.place_of(layer, ("recipe",))
        raise ConfigError(
            f"{place}: recipe: '{study.recipe}' is of kind '{base.model.kind}', and a study goes by val/rsum, which "
            "only recipes of kind 'retriever' have. 1 mistake; nothing was started."
        )
    _check_space(study, base, layer)
    changed = _changed(base, recipe_layer.merge(fixed), of_recipe)
    return study.model_copy(update={"overrides": study.overrides | changed}), base


def _changed(base: Recipe, below: Layer, overrides: list[str]) -> dict[str, Any]:
    """The settings of `base` that `overrides` name and that differ from those of `below`: a part of the study too."""
    if not overrides:
        return {}
    try:
        before = config.flatten(config.build(Recipe, below))
    except ConfigError:  # it lacks what the overrides bring
        before = {}
    names = {name for text in overrides for name in config.flatten(config.parse_override(text).values)}
    after = config.flatten(base)
    return {name: after[name] for name in sorted(names & set(after)) if before.get(name, ()) != after[name]}


def _check_space(study: Study, base: Recipe, layer: Layer) -> None:
    """Every end of every domain must make a valid recipe, and trial 0, the recipe itself, must lie inside."""
    problems = []
    defaults = config.flatten(base)
    for name, domain in study.space.items():
        place = config.place_of(layer, ("space", name))
        if name not in defaults:
            nearest = config.nearest_name(name, list(defaults))
            hint = f" Did you mean '{nearest}'?" if nearest else ""
            problems.append(f"{place}: space.{name}: '{name}' is not a setting of a recipe.{hint}")
            continue
        at_ends = _refused(base, name, domain.bounds())
        problems += [f"{place}: space.{name}: {told}" for told in at_ends or _refused(base, name, domain.between())]
        if not domain.contains(defaults[name]):
            problems.append(
                f"{place}: space.{name}: the recipe's own value {defaults[name]!r}, which trial 0 uses, lies outside. "
                f"Widen the domain, or set overrides: {{{name}: ...}}"
            )
        if study.population is not None and (not name.startswith(PERTURBED) or name.endswith(".kind")):
            problems.append(
                f"{place}: space.{name}: a population changes settings in the middle of a training, which only numbers "
                f"of {', '.join(PERTURBED)[:-1]} allow"
            )
        problems += [f"{place}: space.{name}.when: {problem}" for problem in _check_condition(study, base, name)]
    if problems:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError("\n".join([*problems, f"{count}; nothing was started."]))


def _refused(base: Recipe, name: str, values: Sequence[Any]) -> list[str]:
    """What the recipe says to those values of a setting that it does not allow."""
    told = []
    for value in values:
        try:
            with_values(base, {name: value})
        except ConfigError as error:
            told.append(str(error).splitlines()[0])
    return told


def _check_condition(study: Study, base: Recipe, name: str) -> list[str]:
    """What is wrong with the condition of a setting."""
    condition, defaults = study.space[name].condition, config.flatten(base)
    if condition is None:
        return []
    before = list(study.space)[: list(study.space).index(name)]
    if condition.setting not in defaults:
        nearest = config.nearest_name(condition.setting, list(defaults))
        return [
            f"'{condition.setting}' is not a setting of a recipe.{f' Did you mean {nearest!r}?' if nearest else ''}"
        ]
    if condition.setting in study.space and condition.setting not in before:
        return [f"'{condition.setting}' must stand before '{name}', since it is drawn first"]
    if study.population is not None:
        return ["a population varies every setting at all times"]
    domain = study.space.get(condition.setting)
    seen = [defaults[condition.setting], *(domain.bounds() if domain is not None else ())]
    try:
        held = {condition.holds({condition.setting: value}) for value in seen}
    except TypeError:
        return [f"{seen[0]!r} cannot be compared by '{condition.comparison}' with {condition.value!r}"]
    return ["it holds of no value"] if held == {False} and (domain is None or domain.choice is not None) else []


def with_values(base: Recipe, values: dict[str, Any]) -> Recipe:
    """`base` with some settings, by dotted name, set to other values."""
    whole = Layer(base.model_dump(mode="json"))
    return config.build(Recipe, whole.merge(as_layer(values, Layer(), ())))


def default_values(study: Study, base: Recipe) -> dict[str, Any]:
    """The recipe's own values of the settings that vary: trial 0."""
    if study.variants:
        return study.grid()[0]
    flat = config.flatten(base)
    return {name: flat[name] for name in study.space if study.varies(name, flat)}
