"""Lineage: where a checkpoint comes from. Run, study and trial, code, data, recipe, and the weights it started from.

A training writes it into every checkpoint's metadata. What only whoever started the run can know stands in
STORE/runs/NAME/lineage.json, before the training or while it runs, and is copied from there:

  {"parents": [{"run": "slots-003", "checkpoint": "epoch_0004", "weights_sha256": "..."}]}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from setwise.models.config import BertConfig, BiGRUConfig, GridConfig
from setwise.pipelines.recipe import Recipe
from setwise.platform import checkpoint, storage
from setwise.platform.errors import DataError
from setwise.platform.run import Run

FILE = "lineage.json"
METRIC = "val/rsum"
"""What checkpoints are ranked by; the higher, the better."""
_OF_STUDY = re.compile(r"(?P<study>.+)-(?P<trial>\d{3,})(?:-seed\d+)?")


def of(run: Run, recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint of `run` that is written now records, as JSON values.

    `parents` are checkpoints (`run`, `checkpoint`) and published weights (`weights`, `into`) that it started from.
    """
    study, trial = place(run)
    identity = storage.read_json(run.folder / "run.json")
    parent = run.parent
    return {
        "run": run.name,
        "experiment": identity["experiment"],
        "parent_run": parent.name if parent else None,
        "study": study,
        "trial": trial,
        "code": {"commit": identity["commit"], "changed": identity["dirty"]},
        "parents": [*parents(run), *_published(recipe)],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def place(run: Run) -> tuple[str | None, int | None]:
    """The study of a run and the number of its trial; None where it belongs to none.

    A trial re-run with another seed (`STUDY-007-seed1`) belongs to its study, and to that trial.
    """
    named = _OF_STUDY.fullmatch(run.name)
    if named is None or not (run.folder.parent.parent / "studies" / named["study"]).is_dir():
        return None, None
    return named["study"], int(named["trial"])


def parents(run: Run) -> list[dict[str, Any]]:
    """The checkpoints that a run started from, as its lineage.json says.

    Raises:
        DataError: that file is not of the form above.
    """
    path = run.folder / FILE
    if not path.is_file():
        return []
    try:
        return [{**one, "run": str(one["run"]), "checkpoint": str(one["checkpoint"])} for one in _parents(path)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: expected {{"parents": [{{"run": ..., "checkpoint": ...}}]}} ({error!r})') from error


def _parents(path: Path) -> list[dict[str, Any]]:
    return list(storage.read_json(path).get("parents", []))


def _published(recipe: Recipe) -> list[dict[str, str]]:
    """Published weights that a training begins with; read off the recipe, since one that goes on loads them no more."""
    image, text = (getattr(recipe.model, name, None) for name in ("image_encoder", "text_encoder"))
    given = {
        "image_encoder": image.weights if isinstance(image, GridConfig) else None,
        "text_encoder.word_vectors": text.word_vectors if isinstance(text, BiGRUConfig) else None,
        "text_encoder": text.weights if isinstance(text, BertConfig) else None,
    }
    return [{"weights": weights, "into": part} for part, weights in given.items() if weights is not None]


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it lies in a run, without its weights."""

    run: str
    name: str
    folder: Path
    epoch: int
    value: float | None
    """Of METRIC, or by what else its best is chosen; None where metadata cannot be read, or it is damaged."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        identity = {"run": self.run, "checkpoint": self.name, "epoch": self.epoch}
        return {**identity, METRIC: self.value, "bytes": self.bytes}


def stored(run: Run) -> list[Stored]:
    """The checkpoints of a run, by name; those set aside as damaged too."""
    return [
        read_stored(path, run.name)
        for path in sorted(run.checkpoints.glob("*"))
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    ]


def read_stored(folder: Path, run: str) -> Stored:
    """Epoch, validation value and size of one checkpoint, of any schema; nothing is verified."""
    epoch, value = 0, None
    if not folder.name.endswith(".damaged"):
        try:
            metadata = checkpoint.metadata(folder)
            metric = str(metadata.get("metric", METRIC))
            epoch, value = int(metadata["epoch"]), float(metadata["history"][-1][metric])
        except (OSError, ValueError, KeyError, IndexError, TypeError, DataError):
            pass
    return Stored(run, folder.name, folder, epoch, value, size(folder))


def size(folder: Path) -> int:
    """Bytes of the files in a folder; links are counted, not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def best_name(run: Run) -> str | None:
    """The checkpoint that best.json names, None before the first epoch ends.

    Raises:
        DataError: that file is damaged.
    """
    path = run.folder / "best.json"
    try:
        return str(storage.read_json(path)["checkpoint"]) if path.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: does not name a checkpoint ({error!r})") from error


def describe(folder: Path, run: Run | None) -> dict[str, Any]:
    """The lineage of a checkpoint with its data and recipe; what an old schema lacks is taken from the run, if it is
    here, and is None otherwise.

    Raises:
        DataError: it has no readable metadata.
    """
    try:
        metadata = checkpoint.metadata(folder)
        recipe = Recipe.model_validate(metadata["recipe"])
        known = metadata.get("lineage")
        if known is None:
            fields = ("run", "experiment", "parent_run", "study", "trial", "code", "parents")
            known = dict.fromkeys(fields) if run is None else of(run, recipe)
            known |= {"run": metadata.get("run"), "created": None}
        return {
            **known,
            "epoch": metadata["epoch"],
            "schema": metadata["schema"],
            "data": metadata["data"],
            "recipe": metadata["recipe"],
            "title": recipe.title,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a checkpoint of a retrieval model ({error})") from error


def lines(known: dict[str, Any]) -> list[tuple[str, str]]:
    """What `describe` knows, as titles and texts for a reader."""
    code, parents = known["code"] or {}, known["parents"]
    changed = {True: ", changed: see code.diff of the run", False: "", None: ", not known whether changed"}
    began = [
        f"{one['weights']} (into {one['into']})" if "weights" in one else f"{one['run']}/{one['checkpoint']}"
        for one in parents or []
    ]
    trial = f", trial {known['trial']}" if known["trial"] is not None else ""
    return [
        ("run", str(known["run"] or "not known")),
        ("study", f"{known['study']}{trial}" if known["study"] else "none"),
        *([("parent run", known["parent_run"])] if known["parent_run"] else []),
        ("epoch", str(known["epoch"])),
        ("created", known["created"] or "not recorded"),
        ("recipe", known["title"]),
        ("data", f"{known['data']['name']}, fingerprint {known['data']['fingerprint']}"),
        ("code", f"commit {code['commit']}{changed[code['changed']]}" if code.get("commit") else "not known"),
        ("started from", "not known" if parents is None else ", ".join(began) or "random weights"),
    ]
