"""The registered models in MLflow, and the way of a version's files back to this machine.

Only files are taken from the registry, checked against the hash that was written down at promotion; MLflow's own
loaders run code from the files they load and are never called.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setwise.platform import checkpoint, config, storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.tracking import Tracker

CHAMPION = "champion"
HASH_TAG = "setwise.manifest_sha256"
RUN_TAG = "setwise.run"
PREFIX = "setwise-"
LEDGER_SUFFIX = ".ledger"
"""Ends the name of what only points at the ledger of a model that was registered by somebody else."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: int
    run: str
    source: str
    manifest_sha256: str
    tags: dict[str, str]


def model_name(dataset: str) -> str:
    return f"{PREFIX}{dataset}"


def names(tracker: Tracker) -> list[str]:
    """The registered models of ours."""
    found, token = [], None
    with reaching(tracker):
        while True:
            page = tracker.client.search_registered_models(f"name LIKE '{PREFIX}%'", page_token=token)
            found += [model.name for model in page if not model.name.endswith(LEDGER_SUFFIX)]
            token = page.token
            if not token:
                return sorted(found)


def full_name(text: str, tracker: Tracker) -> str:
    """The registered model that a user calls `setwise-digits` or `digits`.

    Raises:
        ConfigError: there is none.
    """
    name = text if text.startswith(PREFIX) else model_name(text)
    if text.endswith(LEDGER_SUFFIX) or model_tags(tracker, name) is None:
        raise config.no_such("registered model", name, names(tracker), ". Promote a run first: setwise promote REF")
    return name


@contextlib.contextmanager
def reaching(tracker: Tracker) -> Iterator[None]:
    """An error of MLflow in this block means that the store cannot be asked."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise UnreachableError(f"tracking store {tracker.address}: {error}") from error


def _is_missing(error: Exception) -> bool:
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST" or "not found" in str(error)


def model_tags(tracker: Tracker, name: str) -> dict[str, str] | None:
    """The tags of a registered model, None if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(tracker.client.get_registered_model(name).tags)
    except MlflowException as error:
        if not _is_missing(error):
            raise UnreachableError(f"tracking store {tracker.address}: {error}") from error
        return None


def versions(tracker: Tracker, name: str) -> list[int]:
    """The numbers of a model's versions, ascending."""
    found, token = [], None
    with reaching(tracker):
        while True:
            page = tracker.client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [int(one.version) for one in page]
            token = page.token
            if not token:
                return sorted(found)


def version(tracker: Tracker, name: str, number: int) -> Version | None:
    """A version by its number, None if it is gone."""
    try:
        return find(tracker, f"models:/{name}/{number}")
    except ConfigError:
        return None


def champion(tracker: Tracker, name: str) -> Version | None:
    """The version that is served, None if nothing was promoted yet."""
    try:
        return find(tracker, f"models:/{name}@{CHAMPION}")
    except ConfigError:
        return None


def find(tracker: Tracker, uri: str) -> Version:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises:
        ConfigError: it is not of that form, or there is none.
    """
    from mlflow.exceptions import MlflowException

    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            found = tracker.client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.rpartition("/")
            if not name or not number.isdigit():
                raise ConfigError(f"'{uri}': write models:/NAME@ALIAS or models:/NAME/VERSION")
            found = tracker.client.get_model_version(name, number)
    except MlflowException as error:
        if not _is_missing(error):
            raise UnreachableError(f"tracking store {tracker.address}: {error}") from error
        raise ConfigError(
            f"'{uri}' is not registered in {tracker.address}. Promote a run first: setwise promote REF"
        ) from error
    tags = dict(found.tags)
    return Version(name, int(found.version), tags.get(RUN_TAG, ""), found.source, tags.get(HASH_TAG, ""), tags)


def missing_files(tracker: Tracker, version: Version) -> str:
    """What is missing of a version's files where they are kept, as a sentence; empty if they are all there."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    try:
        there = mlflow.artifacts.list_artifacts(artifact_uri=version.source, tracking_uri=tracker.uri)
    except (MlflowException, OSError) as error:
        return f"its files in {version.source} cannot be listed ({error})"
    found = {Path(one.path).name for one in there}
    lacking = [name for name in (*checkpoint.INFERENCE_FILES, checkpoint.MANIFEST) if name not in found]
    return f"{', '.join(lacking)} of its files in {version.source} are gone" if lacking else ""


def download(tracker: Tracker, version: Version, store: Path) -> Path:
    """The version's checkpoint as a folder here, verified; it is fetched once.

    Raises:
        DataError: its files are gone, or are not those that were promoted.
    """
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    folder = store / "registry" / version.name / f"v{version.version}"
    if not folder.is_dir():
        with storage.publish_folder(folder) as building:
            try:
                fetched = mlflow.artifacts.download_artifacts(artifact_uri=version.source, tracking_uri=tracker.uri)
            except (MlflowException, OSError) as error:
                raise DataError(f"{version.name} version {version.version}: its files are gone ({error})") from error
            for path in Path(fetched).iterdir():
                shutil.copyfile(path, building / path.name)
    checkpoint.verify(folder)
    if storage.sha256(folder / checkpoint.MANIFEST) != version.manifest_sha256:
        raise DataError(
            f"{version.name} version {version.version}: the files in {folder} are not those that were promoted. "
            "Remove that folder to fetch them again, or promote another version."
        )
    return folder
