"""A prepared data set that only the mirror has is fetched and verified; one that is prepared is sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from servers import BUCKET, S3Server
from setwise.pipelines import doctor, mirrored, prepare
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation, DigitsPrepareConfig
from setwise.pipelines.recipe import Recipe
from setwise.platform import config, run, run_mirror
from setwise.platform.errors import DataError, UnreachableError
from setwise.platform.mirror import open_mirror
from setwise.platform.run_mirror import Uploader
from setwise.platform.tracking import Tracker
from trainings import KilledError, digest, start, train_run, without_time

NAME = "data/digits/prepared"


@pytest.fixture(params=["s3", "file"])
def address(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty mirror, which is set."""
    place = s3.address(f"{BUCKET}/{tmp_path.name}") if request.param == "s3" else (tmp_path / "far").as_uri()
    point_to(place, s3, monkeypatch)
    return place


def point_to(address: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SETWISE_MIRROR", address)


def send(store: Path) -> list[str]:
    """Send the prepared digits of `store`; what was said."""
    said: list[str] = []
    mirrored.keep(prepare.open_prepared("digits", store), store, said.append)
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("address")
def test_a_data_set_that_is_not_here_is_fetched_when_it_is_opened(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(send(store)) == 1 and send(store) == [], "what is there is not sent again"
    fresh = tmp_path / "fresh"
    fetched = prepare.open_prepared("digits", fresh)
    assert "fetching it from the mirror" in caplog.text
    assert fetched.fingerprint == prepare.open_prepared("digits", store).fingerprint
    assert content(fetched.folder) == content(store / NAME)
    monkeypatch.setenv("SETWISE_MIRROR", "s3://nobody?endpoint_override=127.0.0.1:9&scheme=http")
    assert prepare.open_prepared("digits", fresh) == fetched, "what is here needs no mirror"


@pytest.mark.parametrize("file", ["train-00001.parquet", "val-00000.offsets.npy", "vocabulary.json"])
def test_a_bit_that_was_flipped_in_the_mirror_is_found_before_anything_is_read(
    file: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETWISE_MIRROR", (tmp_path / "far").as_uri())
    send(store)
    mirror = open_mirror(tmp_path / "fresh")
    assert mirror is not None
    damaged = bytearray(mirror.read(f"{NAME}/{file}") or b"")
    damaged[len(damaged) // 2] ^= 1
    mirror.write(f"{NAME}/{file}", bytes(damaged))
    with pytest.raises(DataError, match="vocabulary" if file == "vocabulary.json" else file):
        prepare.open_prepared("digits", tmp_path / "fresh")
    assert not (tmp_path / "fresh" / NAME).exists()


@pytest.mark.usefixtures("address")
def test_a_data_set_that_nobody_has_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'digits' is not prepared"):
        prepare.open_prepared("digits", tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def prepare_again(store: Path) -> list[str]:
    """What is said when the digits of `store`, which are prepared, are prepared."""
    said: list[str] = []
    settings = DigitsPreparation(
        generate=DigitsConfig(train=80, val=30, test=50), prepare=DigitsPrepareConfig(rows_per_shard=32)
    )
    prepare.prepare_digits(store, settings, said.append)
    assert "is prepared already" in said[0]
    return said[1:]


def test_what_was_prepared_is_sent(address: str, store: Path, tmp_path: Path) -> None:
    assert prepare_again(store) == [f"'digits' is in the mirror {address.partition('?')[0]}"]
    assert prepare_again(store) == []
    assert prepare.open_prepared("digits", tmp_path / "fresh").folder.is_dir()


def test_a_mirror_that_is_away_fails_no_preparation_and_is_no_missing_data_set(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = S3Server(tmp_path)
    point_to(away.address(BUCKET), away, monkeypatch)
    (said,) = prepare_again(store)
    assert "it does not answer" in said and said.endswith("To send it: setwise store push data/digits")
    with pytest.raises(UnreachableError, match="does not answer"):
        prepare.open_prepared("digits", tmp_path / "fresh")


def test_a_training_that_lost_its_store_ends_with_the_numbers_of_one_that_did_not(
    store: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = start(store, "mirrored-through", tiny_recipe)
    expected = train_run(store, through, tiny_recipe)
    own = tmp_path / "own"
    shutil.copytree(store / NAME, own / NAME)
    monkeypatch.setenv("SETWISE_MIRROR", (tmp_path / "far").as_uri())
    send(own)
    mirror = open_mirror(own)
    lost = start(own, "lost", tiny_recipe)
    with pytest.raises(KilledError):
        train_run(own, lost, tiny_recipe, stop_after=2)
    uploader = Uploader(mirror, lost)
    uploader.close()
    shutil.rmtree(own)

    assert run_mirror.restore_record(lost, own, config.to_yaml(tiny_recipe))
    again = start(own, "lost", tiny_recipe)
    assert run_mirror.restore(again, own) == "checkpoints/epoch_0002"
    resumed = train_run(own, again, tiny_recipe)
    assert without_time(resumed) == without_time(expected)
    assert digest(again.checkpoints / "epoch_0003") == digest(through.checkpoints / "epoch_0003")
    steps = [event["step"] for event in run.read_events(again.events) if event["kind"] == "metrics"]
    assert steps == [1, 2, 3]


def test_the_doctor_looks_at_a_mirror_and_fetches_nothing(
    store: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> doctor.Check | None:
        found = {check.name: check for check in doctor.examine(tmp_path, Tracker(tmp_path))}
        assert found["data: digits"].found.startswith("not prepared yet")
        return found.get("mirror")

    monkeypatch.delenv("SETWISE_MIRROR", raising=False)
    assert look() is None
    point_to(s3.address(f"{BUCKET}/doctor"), s3, monkeypatch)
    send(store)
    assert look() == doctor.Check("mirror", True, f"s3://{BUCKET}/doctor")
    point_to(s3.address("nowhere"), s3, monkeypatch)
    missing = look()
    assert missing is not None and not missing.ok and "no such bucket" in missing.found
    point_to("s3://a:b@c", s3, monkeypatch)
    refused = look()
    assert refused is not None and not refused.ok and "has credentials in it" in refused.found
