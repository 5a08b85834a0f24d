"""Population based training (PBT, Jaderberg et al. 2017): the worst trials take over weights and settings of the best.

Every `perturb_epochs` all trials wait for each other. Ray Tune's scheduler says who copies whom; that is written into
STORE/studies/NAME/population.json before any trial goes on, and is the truth from then on: whatever is killed, no
decision is taken twice or forgotten. A trial that copies does so as it starts again, by itself, and says so in its run:

  checkpoints/epoch_0002   now has the donor's weights and optimizer state; the epochs before it stay its own
  lineage.json             the donor's checkpoint among `parents`, with the `epoch` and `values` {name: [before, after]}
  events.jsonl             a tag `population.epoch_0002`; its configuration and parameters stay those it began with

All is drawn from streams of the study's seed, so a decision that a kill undid is taken again as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from setwise.pipelines import lineage
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.tables import plain
from setwise.platform import checkpoint, run, seeding, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.outbox import Outbox
from setwise.platform.run import Run
from setwise.sweeps.domain import Domain
from setwise.sweeps.space import Population, Study, with_values
from setwise.sweeps.study import METRIC, NUMBER, RETURNED_VALUES, TIME, left_running

FILE = "population.json"
FACTORS = (0.8, 1.2)
WEIGHT_DECAY = "optimizer.weight_decay"


@dataclass(frozen=True)
class Copy:
    """After `epoch`, `trial` goes on from the weights of `donor`, with the values `after` instead of `before`."""

    epoch: int
    trial: int
    donor: int
    before: dict[str, Any]
    after: dict[str, Any]

    def changes(self) -> dict[str, list[Any]]:
        """{name: [before, after]} of the settings that change."""
        return {name: [self.before[name], new] for name, new in self.after.items() if new != self.before[name]}


@dataclass(frozen=True)
class Course:
    """What has been decided of one trial: up to which epoch, and the last that it copies, if it ever did."""

    decided: int
    copy: Copy | None


def fitted(spec: Study, base: Recipe) -> Recipe:
    """The recipe of a population's trials: it keeps the checkpoints that others may still have to copy.

    Raises:
        ConfigError: it is none that a population can train.
    """
    if spec.population is None:
        return base
    every = spec.population.perturb_epochs
    if every >= base.train.epochs:
        raise ConfigError(
            f"population.perturb_epochs={every}: trainings have {base.train.epochs} epochs, so no trial would ever "
            f"copy another. Allowed: 1 to {base.train.epochs - 1}"
        )
    if base.train.workers > 1:
        raise ConfigError(f"population: its trials train with train.workers=1, not {base.train.workers}")
    if fixed := [name for name in spec.space if name.startswith("optimizer.") and name.endswith("_scale")]:
        raise ConfigError(
            f"space.{fixed[0]}: a population cannot vary it, since the state of the optimizer, which is copied, is "
            "divided by it. Vary optimizer.lr"
        )
    # While a trial waits to copy epoch E, its donor may have trained to the next meeting, E + perturb_epochs.
    return with_values(base, {"train.keep_checkpoints": max(base.train.keep_checkpoints, every + 1)})


def vary(
    space: Mapping[str, Domain], values: Mapping[str, Any], resample: float, stream: random.Random
) -> dict[str, Any]:
    """New values near `values`: each is drawn anew with probability `resample`, else it is moved a little.

    None leaves its domain.
    """
    return {
        name: _draw(domain, stream) if stream.random() < resample else _near(domain, values[name], stream)
        for name, domain in space.items()
    }


def _draw(domain: Domain, stream: random.Random) -> Any:
    if domain.choice is not None:
        return stream.choice(domain.choice)
    if domain.int is not None:
        return stream.randint(*domain.int)
    if domain.loguniform is not None:
        low, high = domain.loguniform
        return min(max(math.exp(stream.uniform(math.log(low), math.log(high))), low), high)
    return stream.uniform(*(domain.uniform or (0.0, 1.0)))


def _near(domain: Domain, value: Any, stream: random.Random) -> Any:
    """A number times a factor, a whole number by 1 at least; a neighbour of a choice, in the order they are listed."""
    if domain.choice is not None:
        place = domain.choice.index(value)
        return domain.choice[stream.choice([near for near in (place - 1, place + 1) if 0 <= near < len(domain.choice)])]
    low, high = domain.int or domain.uniform or domain.loguniform or (0.0, 1.0)
    factor = stream.choice(FACTORS)
    if domain.int is not None:
        return min(max(value + round(math.copysign(max(1, abs(value * factor - value)), factor - 1)), low), high)
    return min(max(value * factor, low), high)


def read(folder: Path) -> list[dict[str, Any]]:
    """The decisions of a study in their order: `epoch`, `members` (the trials that met), `copies`."""
    path = folder / FILE
    return list(storage.read_json(path)["meetings"]) if path.is_file() else []


def record(folder: Path, epoch: int, members: list[int], copies: list[Copy]) -> None:
    """Add a decision; from here on it holds."""
    meeting = {"epoch": epoch, "members": members, "copies": [asdict(copy) for copy in copies]}
    storage.write_json(folder / FILE, {"meetings": [*read(folder), meeting]})


def course_of(folder: Path, trial: int) -> Course:
    """What a study in `folder` has decided of a trial."""
    own = [meeting for meeting in read(folder) if trial in meeting["members"]]
    copies = [Copy(**copy) for meeting in own for copy in meeting["copies"] if copy["trial"] == trial]
    return Course(max((meeting["epoch"] for meeting in own), default=0), copies[-1] if copies else None)


def take_over(training: Run, donor: Run, copy: Copy) -> None:
    """Put the donor's checkpoint into a trial's run; done once, and killed at any moment it can be done again.

    The caller holds the run's writer lease.

    Raises:
        DataError: the donor's checkpoint is damaged or gone, or the trial's own are.
    """
    name = f"epoch_{copy.epoch:04d}"
    parents = lineage.parents(training)
    if any(parent.get("epoch") == copy.epoch for parent in parents):
        return
    source = donor.checkpoints / name
    checkpoint.verify(source)
    metadata = checkpoint.metadata(source)
    newest = checkpoint.newest(training.checkpoints)
    own = checkpoint.metadata(newest)["history"] if newest is not None else []
    # Its own epochs stay its own, so best.json names either one of its own checkpoints or this one.
    history = [*own[: copy.epoch - 1], metadata["history"][-1]]
    if len(history) != copy.epoch:
        raise DataError(f"{training.checkpoints}: the checkpoint of epoch {copy.epoch - 1} or later is gone")
    state = checkpoint.training_state(source)
    for group in state["optimizer"]["param_groups"]:  # else the donor's would come back with its state
        group["weight_decay"] = copy.after.get(WEIGHT_DECAY, group["weight_decay"])
    weights = checkpoint.weights(source)
    checkpoint.save(training.checkpoints / name, weights, metadata | {"history": history}, state)

    changes = copy.changes()
    tag = f"population.{name}"
    told = any(tag in event["values"] for event in run.read_events(training.events) if event["kind"] == "tags")
    if not told:
        said = ", ".join(f"{setting} {plain(old)} -> {plain(new)}" for setting, (old, new) in changes.items())
        Outbox(training.events).append({"kind": "tags", "values": {tag: f"from {donor.name}: {said or 'no change'}"}})
    digest = storage.read_json(source / checkpoint.MANIFEST)["files"][checkpoint.WEIGHTS]["sha256"]
    parent = {"run": donor.name, "checkpoint": name, "weights_sha256": digest, "epoch": copy.epoch, "values": changes}
    storage.write_json(
        training.folder / lineage.FILE, {"parents": [*parents, parent]}
    )  # last: it says that all is done


@contextlib.contextmanager
def pointer(training: Run, epoch: int) -> Iterator[tune.Checkpoint]:
    """What Tune keeps of a trial as its checkpoint: where it is. Without one, Tune would let nobody copy it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pointer.json").write_text(json.dumps({"run": training.name, "epoch": epoch}))
        yield tune.Checkpoint.from_directory(folder)


class PopulationScheduler(PopulationBasedTraining):  # type: ignore[misc]  # Ray leaves its classes untyped
    """Ray Tune's synchronous PBT, which decides once, writes down what it decides, and goes on from there.

    Args:
        study: the study to work off.
        folder: of the study; its decisions are there.
        last_epoch: after it nothing is copied any more.
    """

    def __init__(self, spec: Study, settings: Population, study: optuna.Study, folder: Path, last_epoch: int) -> None:
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode="max",
            perturbation_interval=settings.perturb_epochs,
            quantile_fraction=settings.share,
            resample_probability=settings.resample,
            custom_explore_fn=dict,  # one has to be given; _get_new_config below does its work
            log_config=False,
            synch=True,
        )
        self._spec = spec
        self._folder = folder
        self._last_epoch = last_epoch
        self._copies: list[Copy] = []
        decided = max((course_of(folder, trial.number).decided for trial in left_running(study)), default=0)
        self._next_perturbation_sync = decided + settings.perturb_epochs

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # Tune calls it anew for a trial whose process died. It refuses searchers that learn from what PBT changes,
        # which this study's does not do.
        super().on_trial_add(SimpleNamespace(search_alg=None), trial)
        self._trial_state[trial].last_perturbation_time = self._next_perturbation_sync - self._perturbation_interval
        if (copy := course_of(self._folder, trial.config[NUMBER]).copy) is not None:
            trial.set_config({**trial.config, RETURNED_VALUES: copy.after})

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        state, epoch = self._trial_state[trial], result[TIME]
        if epoch >= self._last_epoch or epoch - state.last_perturbation_time < self._perturbation_interval:
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(state, epoch, result, trial)
        return str(TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Tune asks before it starts any trial: the moment to decide, once all that are left have come and stand still.

        Tune itself would decide at the last one's result: never, if that one fails, and while others are being paused.
        """
        trials = tune_controller.get_trials()
        left = [trial for trial in trials if not trial.is_finished()]
        epoch = self._next_perturbation_sync
        if left and all(
            trial.status == Trial.PAUSED and self._trial_state[trial].last_train_time >= epoch for trial in left
        ):
            for trial in trials:
                if trial.is_finished():  # nobody waits for it
                    self._trial_state[trial].last_train_time = max(epoch, self._trial_state[trial].last_train_time)
            self._copies = []
            super().on_trial_result(tune_controller, left[0], self._trial_state[left[0]].last_result)
            record(self._folder, epoch, sorted(trial.config[NUMBER] for trial in left), self._copies)
        return super().choose_trial_to_run(tune_controller)

    def _checkpoint_or_exploit(self, trial: Trial, controller: Any, upper: list[Trial], lower: list[Trial]) -> None:
        if trial in lower:
            upper = [self._stream(trial, "donor").choice(upper)]
        super()._checkpoint_or_exploit(trial, controller, upper, lower)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        donor, before = trial_to_clone.config, trial.config[RETURNED_VALUES]
        stream = self._stream(trial, "values")
        after = vary(self._spec.space, donor[RETURNED_VALUES], self._resample_probability, stream)
        self._copies.append(
            Copy(self._next_perturbation_sync, trial.config[NUMBER], donor[NUMBER], dict(before), dict(after))
        )
        return {**trial.config, RETURNED_VALUES: after}, {}  # it stays the trial that it is

    def _stream(self, trial: Trial, what: str) -> random.Random:
        epoch = int(self._next_perturbation_sync)
        return random.Random(seeding.derive(self._spec.seed, "population", epoch, trial.config[NUMBER], what))


def make_scheduler(spec: Study, study: optuna.Study, folder: Path, last_epoch: int) -> PopulationScheduler | None:
    """None where the study has no population."""
    if spec.population is None:
        return None
    return PopulationScheduler(spec, spec.population, study, folder, last_epoch)
