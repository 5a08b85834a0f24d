"""Checkpoints that are whole, verified, and hold no code.

A checkpoint is a folder: `model.safetensors` (weights), `metadata.json` (what they are), `training_state.pt` (optimizer
and random states, tensors and plain values only) and `MANIFEST.json` with the size and SHA-256 of each. It is written
beside its final name, synced and renamed, so that a name that exists is complete; and it is verified when read, since
neither torch nor safetensors notices a flipped bit.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.platform import storage
from setwise.platform.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
WEIGHTS = "model.safetensors"
METADATA = "metadata.json"
TRAINING_STATE = "training_state.pt"
INFERENCE_FILES = (WEIGHTS, METADATA)
"""What is needed to use a model; `training_state.pt` is only needed to go on training it."""


def save(
    folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], training_state: Mapping[str, Any] | None
) -> None:
    """Publish a checkpoint as `folder`.

    Args:
        weights: the model's state dict; moved to the CPU.
        metadata: JSON values: step, configuration, lineage.
        training_state: nested plain values and tensors that `torch.load(weights_only=True)` accepts, or None for a
            checkpoint that is for use only.

    Raises:
        StorageError: the disk is full or cannot be written; under the name is what was there before.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with storage.writing_to(folder.parent), storage.publish_folder(folder) as building:
        (building / METADATA).write_text(json.dumps(metadata, indent=1, sort_keys=True) + "\n")
        try:
            save_file(tensors, building / WEIGHTS)
            if training_state is not None:
                torch.save(dict(training_state), building / TRAINING_STATE)
        except (SafetensorError, RuntimeError) as error:  # what they make of an error of the operating system
            raise storage.not_writable(folder.parent, "a write failed") from error
        write_manifest(building)


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file in `folder`."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": storage.sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "files": files}, indent=1) + "\n")


def copy_for_inference(source: Path, target: Path) -> None:
    """A verified copy of a checkpoint without its training state; one that lies there already stays."""
    verify(source)
    if target.exists() and target.samefile(source):
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in INFERENCE_FILES:
        shutil.copyfile(source / name, target / name)
    write_manifest(target)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DataError: naming the first file that is missing or differs.
    """
    try:
        manifest = storage.read_json(folder / MANIFEST)
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: no readable {MANIFEST}, so this is not a complete checkpoint") from error
    for name in INFERENCE_FILES:
        if name not in files:
            raise DataError(f"{folder}: {MANIFEST} lists no {name}")
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DataError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != size or storage.sha256(path) != digest:
            raise DataError(f"{path}: damaged (its content is not what {MANIFEST} recorded)")


def newest(*parents: Path, say: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint under any of `parents` that verifies; names sort by age.

    A damaged one is set aside as `NAME.damaged`, which is said, and the one before it is taken.

    Raises:
        DataError: there were checkpoints, and all of them are damaged: going on would silently start from nothing.
    """
    found = (path for parent in parents for path in parent.glob("*") if path.is_dir() and not _set_aside(path))
    folders = sorted(found, key=lambda path: path.name, reverse=True)
    for folder in folders:
        try:
            verify(folder)
        except DataError as error:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(f"{error}. Set aside as {aside.name}; falling back to the checkpoint before it.")
            continue
        return folder
    if damaged := sorted(path.name for parent in parents for path in parent.glob("*.damaged")):
        raise DataError(
            f"{parents[0]}: every checkpoint is damaged ({', '.join(damaged)}). Restore one, or remove the run."
        )
    return None


def _set_aside(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name.endswith(".damaged")


def prune(parent: Path, keep: Collection[str]) -> None:
    """Remove the checkpoints under `parent` whose names are not in `keep`."""
    for folder in parent.glob("*"):
        if folder.is_dir() and not _set_aside(folder) and folder.name not in keep:
            shutil.rmtree(folder)


def metadata(folder: Path) -> dict[str, Any]:
    value = storage.read_json(folder / METADATA)
    if not isinstance(value, dict):
        raise DataError(f"{folder / METADATA}: expected an object")
    return value


def weights(folder: Path) -> dict[str, Tensor]:
    """The state dict, on the CPU. Verify first: safetensors reads flipped bits without a word.

    Raises:
        DataError: the file is whole, and none of safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS}: not a file of weights ({error})") from error


def training_state(folder: Path) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
    return state
