"""Runs with small made checkpoints, MLflow stores and clients of them, for the tests of promotion.

Each client is a process: forked before its MLflow store was opened here, so that no connection is shared.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from setwise.pipelines import promote, recipe, registry
from setwise.pipelines.benchmarks import Outcome
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.vocabulary import SPECIAL
from setwise.platform import checkpoint, seeding, storage
from setwise.platform.run import Run
from setwise.platform.tracking import Tracker
from tiny import TINY_MODEL

NAME = "setwise-digits"
BENCHMARK = "digits_1k"


def made(store: Path, name: str, rsum: float, seed: int = 0) -> Reference:
    """A run whose best checkpoint has random weights, and is said to have this RSUM; see `say_what_was_written`."""
    settings = recipe.load("digits_cnn_bigru", TINY_MODEL)
    words = (*SPECIAL, "a", "three")
    seeding.seed_everything(seed)
    run = Run(store / "runs" / name)
    storage.write_json(run.folder / "run.json", {"experiment": "made", "parent": None})
    storage.write_bytes(run.config, b"a: 1\n")
    storage.write_bytes(run.events, b"")
    metadata = {
        "epoch": 1,
        "recipe": settings.model_dump(mode="json"),
        "vocabulary": words,
        "data": {"fingerprint": "d"},
    }
    weights = Retrieval(settings, len(words)).state_dict()
    checkpoint.save(run.checkpoints / "epoch_0001", weights, metadata, None)
    storage.write_json(run.folder / "best.json", {"checkpoint": "epoch_0001", "value": rsum})
    return Reference(name, run.checkpoints / "epoch_0001", run)


def say_what_was_written(patch: pytest.MonkeyPatch) -> None:
    """Evaluation reports the RSUM that `made` was given."""

    def evaluate(references: Sequence[Reference], store: Path) -> list[Outcome]:
        (one,) = references
        assert one.run is not None
        value = storage.read_json(one.run.folder / "best.json")["value"]
        return [Outcome(BENCHMARK, {"rsum": value}, {"images": 50})]

    patch.setattr(promote, "evaluate", evaluate)


@cache
def empty_database() -> bytes:
    """An MLflow database with its tables, which take seconds to make."""
    with tempfile.TemporaryDirectory() as folder:
        _ = Tracker(Path(folder)).client
        return (Path(folder) / "mlflow.db").read_bytes()


def tracker(store: Path, database: Path) -> Tracker:
    """The client of a store; several stores may share one database."""
    if not database.is_file():
        database.parent.mkdir(parents=True, exist_ok=True)
        database.write_bytes(empty_database())
    return Tracker(store, f"sqlite:///{database}")


def listing(one: Tracker) -> str:
    """All that the registry and the ledgers hold."""
    client = one.client
    models = [[model.name, model.tags, model.aliases] for model in client.search_registered_models()]
    versions = [[v.name, v.version, v.source, v.run_id, v.tags] for v in client.search_model_versions()]
    promotions = client.get_experiment_by_name("setwise-promotions")
    found = client.search_runs([promotions.experiment_id]) if promotions else []
    ledgers = [[run.info.run_id, run.data.params] for run in found]
    return json.dumps([models, versions, ledgers], default=str, sort_keys=True)


def champion(one: Tracker) -> int | None:
    found = registry.champion(one, NAME)
    return None if found is None else found.version


class Client:
    """A process that does one thing; `result` waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=self._run, args=(work, sender), daemon=True)
        self._process.start()
        sender.close()

    @staticmethod
    def _run(work: Callable[[], Any], sender: Any) -> None:
        sender.send_bytes(json.dumps(work()).encode())

    def alive(self) -> bool:
        return self._process.is_alive()

    def result(self, seconds: float = 120) -> Any:
        """What the work returned, or the exit code of a process that was killed, as a negative number."""
        try:
            answer = json.loads(self._receiver.recv_bytes()) if self._receiver.poll(seconds) else None
        except EOFError:
            answer = None
        self._process.join(seconds)
        if answer is None:
            assert self._process.exitcode, "the client did not end"
            return self._process.exitcode
        return answer


def in_a_process(work: Callable[[], Any]) -> Any:
    return Client(work).result()


def dies(method: str, after: bool) -> None:
    """From now on this process is killed where it calls a method of MLflow's client: before that does anything, or
    after all of it is done."""
    original = getattr(MlflowClient, method)

    def deadly(self: MlflowClient, *arguments: Any, **named: Any) -> None:
        if after:
            original(self, *arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(MlflowClient, method, deadly)
