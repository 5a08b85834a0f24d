"""Files of region features: whatever is wrong with one is said, and a file that was exchanged is noticed."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from setwise.pipelines import feature_files
from setwise.platform.errors import DataError

GOOD = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("canary-was-here"),)


def header_that_lies() -> bytes:
    """Says there are 10,000 rows, and holds 20."""
    return npy(GOOD).replace(b"(20, 3, 4), }    ", b"(10000, 3, 4), } ")


@pytest.mark.parametrize("kind", feature_files.TYPES)
def test_features_are_mapped_and_not_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.npy").write_bytes(npy(GOOD.astype(kind)))
    features = feature_files.open_features(tmp_path / "x.npy")
    assert isinstance(features, np.memmap) and not features.flags.writeable
    assert np.array_equal(features, GOOD.astype(kind))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole .npy file"),
        (npy(GOOD)[:-8], "not a whole .npy file"),
        (npy(GOOD)[:40], "not a whole .npy file"),
        (header_that_lies(), "not a whole .npy file"),
        (b"<html>404</html>", "not a whole .npy file"),
        (pickle.dumps(Canary()), "not a whole .npy file"),
        (npy(np.array([Canary()], dtype=object), allow_pickle=True), "not a whole .npy file"),
        (npy(GOOD.astype(np.int32)), "found int32"),
        (npy(GOOD.reshape(60, 4)), r"found float32 \(60, 4\)"),
        (npy(GOOD[:0]), "holds no feature"),
        (npy(np.asfortranarray(GOOD)), "Fortran"),
    ],
    ids=["empty", "cut", "cut header", "lies", "page", "pickle", "objects", "integers", "flat", "nothing", "fortran"],
)
def test_what_is_wrong_with_a_file_is_said_and_nothing_in_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(DataError, match=message):
        feature_files.open_features(tmp_path / "x.npy")
    assert not (tmp_path / "canary-was-here").exists()


def test_an_archive_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", GOOD)
    with pytest.raises(DataError, match="found an archive"):
        feature_files.open_features(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        feature_files.open_features(tmp_path / "none.npy")


def test_a_file_is_known_again_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(npy(GOOD))
    described = feature_files.describe(path)
    assert {name: described[name] for name in ("rows", "regions", "width", "dtype")} == {
        "rows": 20,
        "regions": 3,
        "width": 4,
        "dtype": "float32",
    }
    path.write_bytes(npy(GOOD))
    assert feature_files.change(described) is None
    for other in (GOOD + 1, GOOD[::-1], np.concatenate([GOOD, GOOD[:1]]), GOOD.astype(np.float64)):
        path.write_bytes(npy(np.ascontiguousarray(other)))
        change = feature_files.change(described)
        assert change is not None and "is another file now" in change and "digest" in change
    path.unlink()
    assert "cannot be read" in str(feature_files.change(described))


def test_rows_that_are_no_numbers_or_not_there_have_a_reason(tmp_path: Path) -> None:
    array = GOOD.copy()
    array[3, 1, 2], array[4, 0, 0], array[5] = np.nan, -np.inf, 3e38  # the last are large, and numbers
    (tmp_path / "x.npy").write_bytes(npy(array))
    features = feature_files.open_features(tmp_path / "x.npy")
    reasons = [feature_files.problem(features, place) for place in range(-1, 21)]
    bad = {place: reason for place, reason in zip(range(-1, 21), reasons, strict=True) if reason}
    assert set(bad) == {-1, 3, 4, 20}
    assert "not finite" in bad[3] and "which has 20 rows" in bad[20]
