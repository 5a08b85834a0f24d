"""A training that comes first (`pretraining` in a recipe): an image encoder learns by writing captions, and another
training starts from it (VirTex; Desai and Johnson, CVPR 2021).

It has a run of its own, named after its recipe and a hash of its settings and the data, so that it is done once, and
every training that wants the same finds it. Whoever comes while it is trained waits; whoever comes after a kill goes on
with it. The run that starts from it names its best checkpoint among its `parents` (lineage.json).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from setwise.models.pretext_config import CaptionerConfig
from setwise.pipelines import lineage, records, references
from setwise.pipelines import recipe as recipes
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import Recipe
from setwise.platform import checkpoint, config, run_mirror, storage
from setwise.platform.errors import ConfigError, DataError, StoppedError
from setwise.platform.run import Run
from setwise.platform.storage import LeaseHeldError

OPERATIONAL = ("workers", "min_workers", "accelerators", "threads", "loader_threads")
"""Settings of `train` that say where it is computed, and not what."""
SHARED = ("seed", "precision", *OPERATIONAL)
"""Settings of `train` that it has from the training that it comes before."""
MAY_DIFFER = {"frozen_batch_norm"}
"""Of an image encoder: it decides no weight, and statistics that are to be frozen have to be learned first."""
ENCODER = "captioner.image_encoder."
LOOK_S = 1.0

Say = Callable[[str], None]


def recipe_before(recipe: Recipe) -> Recipe | None:
    """The recipe that is trained before `recipe`, on its data and from its seed; None where nothing is.

    Raises:
        ConfigError: there is no such recipe, it is no captioner, or its image encoder is another one.
    """
    if recipe.pretraining is None:
        return None
    named = recipe.pretraining.recipe
    data = {f"data.{name}": value for name, value in config.flatten(recipe.data).items()} | {"data.word_drop": 0}
    train = {f"train.{name}": recipe.train.model_dump(mode="json")[name] for name in SHARED}
    epochs = {} if recipe.pretraining.epochs is None else {"train.epochs": recipe.pretraining.epochs}
    first = recipes.load(named, [f"{name}={json.dumps(value)}" for name, value in (data | train | epochs).items()])
    if not isinstance(first.model, CaptionerConfig):
        raise ConfigError(
            f"pretraining.recipe: '{named}' is of kind '{first.model.kind}'. It has to be one of kind 'captioner'"
        )
    theirs, own = config.flatten(first.model.image_encoder), config.flatten(recipe.retriever.image_encoder)
    theirs |= {"width (the retriever's embed_size)": first.model.width}
    own |= {"width (the retriever's embed_size)": recipe.retriever.embed_size}
    differences = [
        f"{name} is {theirs.get(name)!r} there and {own.get(name)!r} here"
        for name in dict.fromkeys([*theirs, *own])
        if theirs.get(name) != own.get(name) and name not in MAY_DIFFER
    ]
    if differences:
        raise ConfigError(f"pretraining.recipe: '{named}' has another image encoder: {'; '.join(differences)}")
    return first


def run_name(title: str, recipe: Recipe, prepared: Prepared) -> str:
    """What a training is called that was given no name: the same settings and data give the same name. For a captioner
    only those count that decide what it learns, so that it is found again from another machine."""
    settings = recipe.model_dump(mode="json")
    if isinstance(recipe.model, CaptionerConfig):
        settings["train"] = {name: value for name, value in settings["train"].items() if name not in OPERATIONAL}
    return f"{title}-{storage.fingerprint([settings, prepared.fingerprint])[:6]}"


def brought(before: Run, store: Path) -> bool:
    """Bring what the store's mirror has of a pre-training that this store has not; whether it did. Its name says what
    is learned, and whoever began it may have computed it elsewhere."""
    return run_mirror.restore_record(before, store, config_yaml=None)


def written(before: Run, first: Recipe) -> str:
    """The configuration of a pre-training's run: that which it was begun with, perhaps to be computed elsewhere. Which
    machines it goes on with is for `first` to say."""
    return before.config.read_text() if before.config.is_file() else config.to_yaml(first)


@contextlib.contextmanager
def stopping_with(training: Run, before: Run) -> Iterator[None]:
    """While the block trains `before`, who asks `training` to stop asks it too."""
    before.stop.unlink(missing_ok=True)
    ended = threading.Event()

    def pass_on() -> None:
        while not ended.wait(LOOK_S):
            if training.stop.exists():
                before.stop.touch()
                return

    thread = threading.Thread(target=pass_on, name="stopping", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def is_behind(training: Run) -> bool:
    """Whether a training has begun from its pre-training, or has ended, and needs it no more."""
    return records.ended(training) or (bool(lineage.parents(training)) and any(training.checkpoints.glob("epoch_*")))


def run_before(recipe: Recipe, prepared: Prepared, store: Path) -> Run | None:
    """The run of the training that comes before `recipe`, whether it exists yet or not; None where there is none."""
    first = recipe_before(recipe)
    if first is None or recipe.pretraining is None:
        return None
    return Run(store / "runs" / run_name(Path(recipe.pretraining.recipe).stem, first, prepared))


@contextlib.contextmanager
def turn(run: Run, say: Say, is_given_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Be the one who trains `run`, or find it trained, once whoever else is at work on it has ended.

    Raises:
        StoppedError: the caller was asked to stop while it waited.
    """
    told = False
    with contextlib.ExitStack() as owned:
        while True:
            try:
                owned.enter_context(storage.lease(run.folder / "lease", f"run '{run.name}'", wait_s=LOOK_S))
                break
            except LeaseHeldError as error:
                if is_given_up():
                    raise StoppedError(f"stopped while it waited for the pre-training '{run.name}'") from error
                if not told:
                    say(f"waits for the pre-training, which another training needs too: {error}")
                told = True
        yield


def adopt(training: Run, before: Run) -> None:
    """Write down that `training` starts from the best checkpoint of `before`, which has ended; once."""
    known = lineage.parents(training)
    best = before.best_checkpoint()
    if not any(parent["run"] == before.name for parent in known):
        digest = storage.read_json(best / checkpoint.MANIFEST)["files"][checkpoint.WEIGHTS]["sha256"]
        parent = {"run": before.name, "checkpoint": best.name, "weights_sha256": digest, "into": "image_encoder"}
        storage.write_json(training.folder / lineage.FILE, {"parents": [parent, *known]})


def start(image_encoder: nn.Module, before: Run) -> str:
    """Put what `before` learned into an image encoder, and say what it was.

    Raises:
        DataError: it has not come to its end, or its best checkpoint is damaged or holds another encoder.
    """
    if not (before.folder / "config.yaml").is_file() or not records.ended(before):
        raise DataError(
            f"the pre-training, run '{before.name}', has not come to its end. `setwise train` does it first, and goes "
            "on with one that was interrupted"
        )
    best = before.best_checkpoint()
    learned = {
        name.removeprefix(ENCODER): weight
        for name, weight in checkpoint.weights(best).items()
        if name.startswith(ENCODER)
    }
    try:
        image_encoder.load_state_dict(learned)
    except RuntimeError as error:
        raise DataError(f"{best}: holds another image encoder. {error}") from error
    value = references.best_value(before)
    return f"{before.name}/{best.name}" + ("" if value is None else f", log-likelihood {value:.3f} nats a token")
