"""What a sweep would do, before it starts."""

from __future__ import annotations

from pathlib import Path

from setwise.pipelines import estimate, hardware
from setwise.pipelines.plan import duration
from setwise.pipelines.recipe import Recipe
from setwise.platform.errors import DataError
from setwise.sweeps.space import Study


def describe(spec: Study, base: Recipe, name: str, store: Path, on: str | None) -> str:
    """The study in some lines: what varies, how trials are stopped, and on a preset how long it would take at most."""
    trials = "1 trial" if spec.trials == 1 else f"{spec.trials} trials"
    of = f"of {spec.recipe}" if not spec.variants else f"of {len(spec.variants)} variants"
    lines = [f"study '{name}' {of}: {trials} of at most {base.train.epochs} epochs"]
    for variant, its in spec.variants.items():
        own = "".join(f", {setting}={value}" for setting, value in its.overrides.items())
        lines.append(f"  {variant} ({its.group}): {its.recipe or spec.recipe}{own}")
    for setting, domain in spec.space.items():
        form = ", ".join(f"{key} {value}" for key, value in domain.model_dump(exclude_none=True, mode="json").items())
        lines.append(f"  {setting}: {form}")
    lines.append(f"objectives: {', '.join(spec.objectives)}; {_way(spec)}")
    limits = {"hours": spec.max_hours, "GPU-hours": spec.max_gpu_hours}
    if given := [f"{value:g} {unit}" for unit, value in limits.items() if value is not None]:
        lines.append(f"stops after {' or '.join(given)}")
    lines.append(_hours(spec, base, store, on))
    return "\n".join(lines)


def _way(spec: Study) -> str:
    if spec.population is not None:
        return f"PBT every {spec.population.perturb_epochs} epochs"
    stopped = f"ASHA from epoch {spec.pruning.grace_epochs} on" if spec.pruning is not None else "no trial stops early"
    drawn = {
        "tpe": f"TPE after {spec.startup_trials} trials at random",
        "grid": f"{len(spec.grid())} points of a grid",
        "random": "drawn at random",
    }
    return f"{drawn[spec.sampler]}; {stopped}"


def _hours(spec: Study, base: Recipe, store: Path, on: str | None) -> str:
    if on is None:
        return "how long it takes is said for hardware: --on PRESET"
    recipes = [spec.recipe_of(base, values) for values in spec.grid()[: spec.trials]] if spec.variants else [base]
    try:
        of = [estimate.sizes(recipe, store) for recipe in recipes]
    except DataError as error:
        return f"how long it takes cannot be said: {error}"
    preset = hardware.load(on)[0]
    each = (estimate.estimate(*one, preset).seconds or 0.0 for one in zip(recipes, of, strict=True))
    seconds = sum(each) * spec.trials / len(recipes)
    at_once = max(1, preset.count // base.train.workers)
    sharing = spec.trials_per_gpu if preset.accelerators and base.train.workers == 1 else 1
    running = at_once * sharing
    trials = "1 trial" if running == 1 else f"{running} trials"
    told = f", {sharing} on a GPU" if sharing > 1 else ""
    return (
        f"at most {duration(seconds / at_once)} on {on}, {trials} at a time{told}, none stopped early "
        "(predicted, see setwise train --dry-run)"
    )
