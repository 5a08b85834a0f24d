"""A run: one training, as a folder that records all of it.

NAME/
  run.json           experiment, parent, commit
  config.yaml        the resolved configuration
  environment.json   versions and machine
  code.diff          what differed from that commit
  events.jsonl       parameters, metrics and tags in order, with their times: the outbox that tracking delivers
  checkpoints/       epoch_0007/ ..., and best.json, which names the best of them
  steps/             epoch_0007_step_000500/ ...: within the epoch that is being trained, only to go on from
  process            of a trial: the process it is in
  stop               somebody's wish that the training stops after its next step
  evaluation/        one JSON file a benchmark
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform  # the standard library's: this folder has no __init__.py, so it cannot be shadowed
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError
from setwise.platform.masking import holds_secret, masked

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
MAX_DIFF_BYTES = 1_000_000
SENT_CODE = "code_state.json"
"""Lies beside the folder of this module where the code was sent to: what `code_state` said at the sender's."""
BUILT_FROM = "SETWISE_COMMIT"
"""Environment variable of an image: the commit it was built from, with `-dirty` behind it if there were changes."""
WRITER_WAIT_S = 60
RECORDED_PACKAGES = (
    *("setwise", "ray", "torch", "torchvision", "transformers", "tokenizers"),
    *("mlflow", "optuna", "numpy", "pyarrow", "pillow"),
)


@dataclass(frozen=True)
class Run:
    """The folder of one training and the names inside it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def steps(self) -> Path:
        return self.folder / "steps"

    @property
    def stop(self) -> Path:
        return self.folder / "stop"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def experiment(self) -> str:
        """The MLflow experiment that the run belongs to."""
        return str(storage.read_json(self.folder / "run.json")["experiment"])

    @property
    def parent(self) -> Run | None:
        """The run that this one is a part of, as a trial is of a sweep."""
        path = storage.read_json(self.folder / "run.json")["parent"]
        return Run((self.folder / path).resolve()) if path else None

    @property
    def status(self) -> str | None:
        """How it ended, FINISHED or FAILED; None while it has not."""
        ends = [event["value"] for event in read_events(self.events) if event["kind"] == "status"]
        return str(ends[-1]) if ends else None

    def best_checkpoint(self) -> Path:
        """The verified checkpoint with the best validation value.

        Raises:
            DataError: the run has none, or it is damaged.
        """
        try:
            name = str(storage.read_json(self.folder / "best.json")["checkpoint"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.folder}: this run has no checkpoint yet") from error
        folder = self.checkpoints / name
        if folder.name != name:
            raise DataError(f"{self.folder / 'best.json'}: '{name}' is no checkpoint of this run")
        checkpoint.verify(folder)
        return folder


@contextlib.contextmanager
def writing(run: Run) -> Iterator[None]:
    """Be the one process that trains `run`. What a killed driver left behind may train on for some seconds: wait."""
    with storage.lease(run.folder / "writer.lease", f"run '{run.name}'", wait_s=WRITER_WAIT_S):
        yield


def check_name(name: str) -> str:
    """A name that is safe as a folder: lower-case letters, digits, dot, dash and underscore."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot name a run: use lower-case letters, digits, '.', '_' and '-', 80 at most")
    return name


def create(folder: Path, name: str, config_yaml: str, experiment: str, parent: Run | None = None) -> Run:
    """The run called `name` in `folder`: made if new, reopened if it has this configuration.

    Raises:
        ConfigError: the name is taken by a run with another configuration, or the configuration holds a secret.
    """
    run = Run(folder / check_name(name))
    if holds_secret(config_yaml):
        raise ConfigError(
            f"the configuration of '{name}' holds a password, or what a secret environment variable does, and would be "
            "read by everybody in the record of the run: take it out"
        )
    if run.config.is_file():
        if run.config.read_text() != config_yaml:
            raise ConfigError(
                f"run '{name}' exists with another configuration ({run.config}). "
                f"Choose another name, or compare them: setwise config diff {run.config} ..."
            )
        return run
    run.folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(run.folder / "environment.json", environment())
    commit, difference = code_state(Path(__file__).parent)
    if difference:
        storage.write_bytes(run.folder / "code.diff", difference)
    path = os.path.relpath(parent.folder, run.folder) if parent else None
    identity = {"experiment": experiment, "parent": path, **commit}
    storage.write_json(run.folder / "run.json", identity)
    storage.write_bytes(run.config, config_yaml.encode())  # last: its presence means that the folder is complete
    return run


def environment() -> dict[str, Any]:
    """What this process runs on."""
    packages = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "command": [masked(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
    }


def code_state(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Commit of the code in `folder`, a package's, and the difference to it, capped, with `***` for secrets.

    It is known from the sender of the code, from the checkout that tracks it, or from the building of the image.
    """
    sent = folder.parent / SENT_CODE
    if sent.is_file():
        known = storage.read_json(sent)
        return known["state"], known["difference"].encode(errors="surrogateescape")

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit = git("rev-parse", "HEAD") if git("ls-files", "--", ".") else None  # a checkout of others may be around it
    if commit is None:
        built_from = os.environ.get(BUILT_FROM)
        dirty = built_from.endswith("-dirty") if built_from else None
        return {"commit": built_from.removesuffix("-dirty") if built_from else None, "dirty": dirty}, b""
    difference = git("diff", "HEAD", "--no-color", "--no-ext-diff") or b""
    unknown = (git("ls-files", "--others", "--exclude-standard", ":/") or b"").decode(errors="replace").splitlines()
    state = {
        "commit": commit.decode().strip(),
        "dirty": bool(difference or unknown),  # a run with a module that git does not know cannot be repeated either
        "diff_bytes": len(difference),
        "untracked": unknown[:100],
    }
    shown = masked(difference[: 2 * MAX_DIFF_BYTES].decode(errors="surrogateescape"))
    return state, shown.encode(errors="surrogateescape")[:MAX_DIFF_BYTES]


def describe_code(folder: Path) -> bytes:
    """What `code_state` says, as the file SENT_CODE of what is sent."""
    state, difference = code_state(folder)
    known = {"state": state, "difference": difference.decode(errors="surrogateescape")}
    return json.dumps(known, indent=1, sort_keys=True).encode()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in order. A line is a list of events written at once; one that was cut short is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [event for line in data.split(b"\n") for event in parse_events(line) or []]


def parse_events(line: bytes) -> list[dict[str, Any]] | None:
    """The events of a line; None if it is not a whole one. No beginning of a JSON list is one itself."""
    try:
        written_at_once = json.loads(line)
    except ValueError:
        return None
    if not isinstance(written_at_once, list):
        return None
    return [event for event in written_at_once if isinstance(event, dict)]
