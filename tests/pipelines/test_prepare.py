"""What was prepared is noticed when it is damaged, and preparing again mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from setwise.pipelines import datasets, prepare, shards
from setwise.pipelines.datasets import Caption, Row
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation, PrepareConfig
from setwise.platform.errors import DataError
from tiny import write_serially

SETTINGS = DigitsPreparation(generate=DigitsConfig(train=6, val=3, test=3), prepare=PrepareConfig(rows_per_shard=4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_write_shards", write_serially)
        prepare.prepare_digits(folder, SETTINGS, lambda message: None)
    return folder


@pytest.fixture
def own(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    return Path(shutil.copytree(whole, tmp_path / "store"))


def prepare_again(store: Path) -> list[str]:
    said: list[str] = []
    prepare.prepare_digits(store, SETTINGS, said.append)
    return said


def test_a_second_preparation_makes_nothing_anew(own: Path) -> None:
    (message,) = prepare_again(own)
    assert "prepared already" in message


def test_what_is_not_prepared_says_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="setwise data prepare digits"):
        prepare.open_prepared("digits", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_the_remedy_that_a_damaged_shard_is_answered_with_works(own: Path, damage: str) -> None:
    fingerprint = prepare.open_prepared("digits", own).fingerprint
    shard = own / "data" / "digits" / "prepared" / "train-00000.parquet"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"Make it again: setwise data prepare digits"):
        prepare.open_prepared("digits", own)
    prepare_again(own)
    assert prepare.open_prepared("digits", own).fingerprint == fingerprint


def test_other_settings_make_other_data(own: Path) -> None:
    before = prepare.open_prepared("digits", own)
    other = DigitsPreparation(generate=SETTINGS.generate, prepare=PrepareConfig(rows_per_shard=4, shorter_side=32))
    after = prepare.prepare_digits(own, other, lambda message: None)
    assert after.fingerprint != before.fingerprint
    assert after.manifest["splits"]["train"]["images"] == 6


def test_a_caption_that_is_no_unicode_text_is_set_aside_and_not_fatal(own: Path, tmp_path: Path) -> None:
    r"""JSON can say "\ud800", which no UTF-8 can."""
    image = next((own / "data" / "digits" / "source" / "images").rglob("*.jpg"))
    row = Row(1, "train", image, (Caption(1, "good"), Caption(2, json.loads('"half \\ud800 pair"'))))
    shard = shards.write(tmp_path / "x.parquet", shards.load_rows(shards.dump_rows([row])), 64, 95)
    assert (shard.images, shard.captions) == (1, 1)
    assert [bad["caption_id"] for bad in shard.quarantine] == [2]


def test_the_data_set_is_read_from_the_published_form(own: Path) -> None:
    source = datasets.open_source("digits", own / "data" / "digits" / "source")
    rows = source.rows()
    assert {row.split for row in rows} == {"train", "val", "test"}
    assert all(row.path.is_file() for row in rows)
