"""Prepared data sets in the mirror of a store: sent once they are made, fetched where they are wanted and not here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from setwise.pipelines import identity
from setwise.platform import storage
from setwise.platform.errors import DataError, UnreachableError
from setwise.platform.mirror import Mirror, open_mirror

if TYPE_CHECKING:
    from setwise.pipelines.prepare import Prepared

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FETCH_S = 3600  # to wait for another process of this store that is fetching the same data set


def name_of(dataset: str) -> str:
    """What a prepared data set is called in the mirror."""
    return f"data/{dataset}/prepared"


def keep(prepared: Prepared, store: Path, say: Callable[[str], None]) -> Prepared:
    """Send what was prepared to the mirror, if there is one that has not got it; if it is away, say how to do so later.

    Returns:
        `prepared`
    """
    dataset = prepared.folder.parent.name
    mirror = open_mirror(store)
    if mirror is not None:
        try:
            if mirror.push(name_of(dataset), MANIFEST):
                say(f"'{dataset}' is in the mirror {mirror.address}")
        except (UnreachableError, DataError) as error:
            say(f"'{dataset}' was not sent to the mirror: {error}. To send it: setwise store push data/{dataset}")
    return prepared


def fetch(dataset: str, store: Path) -> bool:
    """Bring a prepared data set that is not in the store from its mirror; whether there is one that had it.

    Raises:
        DataError: it is damaged there.
        UnreachableError: the mirror does not answer.
    """
    mirror = open_mirror(store)
    if mirror is None or mirror.read(f"{name_of(dataset)}/{MANIFEST}") is None:
        return False
    # The workers of a training ask for the same data set at once.
    with storage.lease(store / "data" / dataset / "fetch.lease", f"the fetching of '{dataset}'", wait_s=FETCH_S):
        if not (store / name_of(dataset) / MANIFEST).is_file():
            log.warning("'%s' is not in %s: fetching it from the mirror %s", dataset, store, mirror.address)
            pull(mirror, dataset)
    return True


def pull(mirror: Mirror, dataset: str) -> None:
    """Bring a prepared data set here; the one that is here, if any, is replaced.

    Raises:
        DataError: the mirror has none, or it is damaged there.
    """
    mirror.pull(name_of(dataset), MANIFEST, verify)


def verify(folder: Path) -> None:
    """Compare shards, offsets, vocabulary and extended positives with the manifest.

    Raises:
        DataError: naming the first shard that differs, or that one of the other files does.
    """
    try:
        manifest = storage.read_json(folder / MANIFEST)
        splits, features, fingerprint = (manifest[key] for key in ("splits", "features", "fingerprint"))
        wanted: dict[Path, str] = {}
        for split in splits.values():
            for shard in split["shards"]:
                path = folder / Path(shard["file"]).name
                wanted[path] = shard["sha256"]
                if shard["offsets_sha256"] is not None:
                    wanted[path.with_name(f"{path.stem}.offsets.npy")] = shard["offsets_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read, so this is no prepared data set") from error
    for path, digest in wanted.items():
        if not path.is_file() or storage.sha256(path) != digest:
            raise DataError(f"{path} is missing or damaged (its content is not what {MANIFEST} recorded)")
    vocabulary = folder / "vocabulary.json"
    if not vocabulary.is_file() or identity.of_prepared(folder, splits, features) != fingerprint:
        raise DataError(f"{folder}: the vocabulary or the extended positives are not those that {MANIFEST} stands for")
