"""A study: which recipe, which settings vary and over what, how many trials and when to stop one.

Studies are YAML, one a file, and speak of settings by the same dotted names as recipes and overrides do. They are
checked against the recipe before anything starts: names, kinds and bounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from setwise.pipelines import recipe as recipes
from setwise.pipelines.recipe import Recipe
from setwise.platform import config
from setwise.platform.config import Layer, Settings
from setwise.platform.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FOLDER = Path(__file__).parent
Scalar = bool | int | float | str
Whole = int  # inside Domain, `int` is the name of a field


class Domain(Settings):
    """The values that one setting may take: exactly one of the four forms."""

    choice: tuple[Scalar, ...] | None = Field(None, min_length=2, description="one of these")
    uniform: tuple[float, float] | None = Field(None, description="a number between these two")
    loguniform: tuple[float, float] | None = Field(None, description="a number between these, uniform in its logarithm")
    int: tuple[Whole, Whole] | None = Field(None, description="a whole number between these, both included")

    @model_validator(mode="after")
    def _one_form(self) -> Domain:
        given = [name for name in Domain.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(Domain.model_fields)}")
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"{given[0]}: the lower bound comes first, and differs from the upper")
            if given[0] == "loguniform" and low <= 0:
                raise ValueError("loguniform: bounds must be above 0")
        return self

    def bounds(self) -> tuple[Scalar, ...]:
        """Values that must be allowed for all of the domain to be: its ends, or every choice."""
        return self.choice or self.uniform or self.loguniform or self.int or ()

    def contains(self, value: Any) -> bool:
        if self.choice is not None:
            return value in self.choice
        low, high = self.uniform or self.loguniform or self.int or (0, 0)
        return isinstance(value, Whole | float) and not isinstance(value, bool) and bool(low <= value <= high)

    def distribution(self) -> BaseDistribution:
        """The same as Optuna says it."""
        from optuna import distributions

        if self.choice is not None:
            return distributions.CategoricalDistribution(self.choice)
        if self.int is not None:
            return distributions.IntDistribution(*self.int)
        low, high = self.uniform or self.loguniform or (0.0, 1.0)
        return distributions.FloatDistribution(low, high, log=self.loguniform is not None)


class Pruning(Settings):
    """Asynchronous successive halving (ASHA, Li et al. 2020): at rungs, only the best share goes on."""

    grace_epochs: int = Field(2, ge=1, description="no trial is stopped before this epoch, the first rung")
    reduction: float = Field(3, gt=1, description="a rung lets 1 of this many go on; rungs lie this factor apart")


class Study(Settings):
    """What `setwise sweep` runs."""

    recipe: str
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="settings of the recipe that hold for all trials"
    )
    trials: int = Field(20, ge=1, le=100_000)
    seed: int = Field(0, ge=0, lt=2**31, description="of the sampler; each trial trains with the recipe's own seed")
    startup_trials: int = Field(5, ge=1, description="trials drawn at random before TPE begins to learn")
    trials_per_gpu: int = Field(2, ge=1, description="trials that share a GPU where there is one")
    pruning: Pruning | None = Pruning()
    space: dict[str, Domain] = Field(min_length=1)


def names() -> list[str]:
    """Studies that come with the package."""
    return config.names_in(FOLDER)


def find(name: str) -> Path:
    """The file of a study, by path or by name; ConfigError if there is none."""
    return config.find_file("study", name, FOLDER)


def is_study(path: Path) -> bool:
    """Whether a YAML file is meant as a study and not as a recipe."""
    return "space" in config.read_yaml(path).values


def load(name: str, overrides: list[str] | None = None) -> tuple[Study, Recipe]:
    """A study and the recipe of its trial 0, both checked; every mistake in either is reported.

    Overrides speak of the study (`trials=5`) or of the recipe (`train.epochs=3`), whichever has that name.

    Raises:
        ConfigError: with all mistakes.
    """
    layer = config.load_layers(find(name), find)
    study_fields = set(Study.model_fields)
    of_study = [text for text in overrides or [] if text.partition("=")[0].partition(".")[0] in study_fields]
    of_recipe = [text for text in overrides or [] if text not in of_study]
    study = config.build(Study, layer, of_study)
    recipe_layer = config.load_layers(recipes.find(study.recipe), recipes.find)
    fixed = _as_layer(study.overrides, layer, "overrides")
    base = config.build(Recipe, recipe_layer.merge(fixed), of_recipe)
    _check_space(study, base, layer)
    return study, base


def _as_layer(values: dict[str, Any], source: Layer, section: str) -> Layer:
    """{dotted name: value} of a section of a study as a layer of a recipe, at the places where it was written."""
    layer = Layer()
    for name, value in values.items():
        keys = tuple(name.split("."))
        inner = layer.values
        for key in keys[:-1]:
            if not isinstance(inner.setdefault(key, {}), dict):
                raise ConfigError(f"{config.place_of(source, (section, name))}: '{key}' in '{name}' is no section")
            inner = inner[key]
        inner[keys[-1]] = value
        for depth in range(1, len(keys) + 1):
            layer.places[keys[:depth]] = config.place_of(source, (section, name))
    return layer


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
        for value in domain.bounds():
            try:
                with_values(base, {name: value})
            except ConfigError as error:
                problems.append(f"{place}: space.{name}: {str(error).splitlines()[0]}")
        if not domain.contains(defaults[name]):
            problems.append(
                f"{place}: space.{name}: the recipe's own value {defaults[name]!r}, which trial 0 uses, lies outside. "
                f"Widen the domain, or set overrides: {{{name}: ...}}"
            )
    if problems:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError("\n".join([*problems, f"{count}; nothing was started."]))


def with_values(base: Recipe, values: dict[str, Any]) -> Recipe:
    """`base` with some settings, by dotted name, set to other values."""
    whole = Layer(base.model_dump(mode="json"))
    return config.build(Recipe, whole.merge(_as_layer(values, Layer(), "")))


def default_values(study: Study, base: Recipe) -> dict[str, Any]:
    """The recipe's own values of the settings that vary: trial 0."""
    flat = config.flatten(base)
    return {name: flat[name] for name in study.space}
