"""The registered models in MLflow, and the way of a version's files back to this machine.

Only files are taken from the registry, checked against the hash that was written down at promotion; MLflow's own
loaders run code from the files they load and are never called.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from setwise.platform import checkpoint, storage
from setwise.platform.errors import ConfigError, DataError, UnreachableError
from setwise.platform.tracking import Tracker

CHAMPION = "champion"
HASH_TAG = "setwise.manifest_sha256"
RUN_TAG = "setwise.run"


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
    return f"setwise-{dataset}"


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
        if error.error_code != "RESOURCE_DOES_NOT_EXIST" and "not found" not in str(error):
            raise UnreachableError(f"tracking store {tracker.uri}: {error}") from error
        raise ConfigError(
            f"'{uri}' is not registered in {tracker.uri}. Promote a run first: setwise promote REF"
        ) from error
    tags = dict(found.tags)
    return Version(name, int(found.version), tags.get(RUN_TAG, ""), found.source, tags.get(HASH_TAG, ""), tags)


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
