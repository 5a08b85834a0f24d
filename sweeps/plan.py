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
    lines = [f"study '{name}' of {spec.recipe}: {trials} of at most {base.train.epochs} epochs"]
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
    try:
        of = estimate.sizes(base, store)
    except DataError as error:
        return f"how long it takes cannot be said: {error}"
    preset = hardware.load(on)[0]
    seconds = (estimate.estimate(base, of, preset).seconds or 0.0) * spec.trials
    at_once = max(1, preset.count // base.train.workers)
    trials = "1 trial" if at_once == 1 else f"{at_once} trials"
    return (
        f"at most {duration(seconds / at_once)} on {on}, {trials} at a time, none stopped early "
        "(predicted, see setwise train --dry-run)"
    )
