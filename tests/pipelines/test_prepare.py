"""Preparation: the same whatever happens meanwhile, noticed when it is damaged, mended by preparing again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from setwise.pipelines import prepare, recipe, shards, vocabulary
from setwise.pipelines.batches import Split
from setwise.pipelines.datasets import Caption, Row
from setwise.pipelines.digits import DigitsConfig
from setwise.pipelines.prepare import DigitsPreparation, DigitsPrepareConfig, PrepareConfig
from setwise.pipelines.recipe import DataConfig
from setwise.platform import cluster
from setwise.platform.errors import ConfigError, DataError, SetwiseError
from tiny import images_source, regions_source, run, write_serially

SETTINGS = DigitsPreparation(
    generate=DigitsConfig(train=6, val=3, test=3), prepare=DigitsPrepareConfig(rows_per_shard=4)
)


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


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)


def prepare_again(store: Path) -> list[str]:
    said: list[str] = []
    prepare.prepare_digits(store, SETTINGS, said.append)
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_preparation_makes_nothing_anew(own: Path) -> None:
    (message,) = prepare_again(own)
    assert "prepared already" in message


def test_what_is_not_prepared_says_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"setwise data prepare digits$"):
        prepare.open_prepared("digits", tmp_path)
    with pytest.raises(DataError, match=r"setwise data prepare coco --from FOLDER$"):
        prepare.open_prepared("coco", tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut short", "without offsets"])
def test_the_remedy_that_a_damaged_shard_is_answered_with_works(own: Path, damage: str) -> None:
    fingerprint = prepare.open_prepared("digits", own).fingerprint
    shard = own / "data" / "digits" / "prepared" / "train-00000.parquet"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-10])
    else:
        shard.with_name("train-00000.offsets.npy").unlink()
    with pytest.raises(DataError, match=r"Make it again: setwise data prepare digits"):
        prepare.open_prepared("digits", own)
    prepare_again(own)
    assert prepare.open_prepared("digits", own).fingerprint == fingerprint


def test_other_settings_make_other_data(own: Path) -> None:
    before = prepare.open_prepared("digits", own)
    other = DigitsPreparation(
        generate=SETTINGS.generate, prepare=DigitsPrepareConfig(rows_per_shard=4, shorter_side=32)
    )
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


@pytest.mark.usefixtures("serial")
def test_a_file_that_changes_makes_another_data_set(tmp_path: Path) -> None:
    first = run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=2)
    written = content(first.folder)
    assert [len(split["shards"]) for split in first.manifest["splits"].values()] == [2, 2, 2]
    times = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=2)
    assert {path.name: path.stat().st_mtime_ns for path in again.folder.iterdir()} == times, "reused"
    shutil.rmtree(tmp_path / "prepared")
    run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=2)
    assert content(first.folder) == written, "the same bytes"

    Image.new("RGB", (80, 70)).save(tmp_path / "files" / "0.jpg")
    changed = run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=2)
    assert changed.fingerprint != first.fingerprint
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.usefixtures("serial")
def test_too_many_bad_images_are_fatal_until_more_are_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = images_source(tmp_path / "files", 4)
    (tmp_path / "files" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 4 images cannot be used.*3\.jpg: cannot be read"):
        run(source, tmp_path / "prepared", max_bad_share=0.2)
    assert not (tmp_path / "prepared").exists()

    def nothing_is_to_be_made(*arguments: Any) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(prepare, "_write_shards", nothing_is_to_be_made)
    allowed = run(source, tmp_path / "prepared", max_bad_share=0.25)
    images = {name: split["images"] for name, split in allowed.manifest["splits"].items()}
    assert sum(images.values()) == 3 and len(allowed.manifest["quarantine"]) == 1


@pytest.mark.usefixtures("serial")
def test_what_the_reader_left_out_counts_too(tmp_path: Path) -> None:
    left_out = [
        {"image_id": 99, "caption_id": None, "path": "x", "reason": "has four captions"},
        {"image_id": 0, "caption_id": 98, "path": "x", "reason": "the caption is not UTF-8"},
    ]
    source = replace(images_source(tmp_path / "files"), quarantine=left_out, notes=["something was noticed"])
    with pytest.raises(DataError, match=r"1 of 10 images cannot be used.*The first: x: has four captions$"):
        run(source, tmp_path / "prepared", max_bad_share=0.05)
    prepared = run(source, tmp_path / "prepared", max_bad_share=0.1)
    assert prepared.manifest["quarantine"] == left_out
    assert prepared.manifest["source"] == {
        "folder": str(tmp_path),
        "files": [str(tmp_path / "files" / "annotations.json")],
        "notes": ["something was noticed"],
    }


@pytest.mark.usefixtures("serial")
def test_an_image_that_another_of_equal_size_replaces_makes_another_data_set(tmp_path: Path) -> None:
    source = images_source(tmp_path / "files")
    one, other = (tmp_path / "files" / name for name in ("0.jpg", "3.jpg"))
    size = max(path.stat().st_size for path in (one, other))
    for path in (one, other):  # what stands behind a JPEG's end is no part of it
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    first = run(source, tmp_path / "prepared")
    one.write_bytes(other.read_bytes())
    assert run(source, tmp_path / "prepared").fingerprint != first.fingerprint


@pytest.mark.usefixtures("serial")
def test_other_captions_of_the_same_files_make_another_data_set(tmp_path: Path) -> None:
    """As source.captions_per_image does."""
    source = images_source(tmp_path / "files")
    run(source, tmp_path / "prepared")
    fewer = replace(source, rows=[replace(row, captions=row.captions[:1]) for row in source.rows])
    splits = run(fewer, tmp_path / "prepared").manifest["splits"]
    assert sum(split["captions"] for split in splits.values()) == 9


@pytest.mark.usefixtures("serial")
def test_lines_that_name_no_image_count_among_the_captions(tmp_path: Path) -> None:
    """And not as so many images."""
    lines = [{"image_id": None, "caption_id": None, "path": f"x:{n}", "reason": "not CSV"} for n in range(2)]
    source = replace(images_source(tmp_path / "files"), quarantine=lines)
    with pytest.raises(DataError, match=r"2 of 20 captions cannot be used, .*The first: x:0: not CSV; x:1: not CSV$"):
        run(source, tmp_path / "prepared", max_bad_share=0.09)
    assert run(source, tmp_path / "prepared", max_bad_share=0.1).manifest["quarantine"] == lines


@pytest.mark.usefixtures("serial")
def test_a_split_that_is_lost_is_fatal_and_one_that_lacks_images_is_said(tmp_path: Path) -> None:
    source, said = images_source(tmp_path / "files"), list[str]()
    for number in (1, 4):
        (tmp_path / "files" / f"{number}.jpg").write_bytes(b"")
    prepare.prepare(source, tmp_path / "prepared", PrepareConfig(max_bad_share=0.5), said.append)
    assert any(line.startswith("val lacks 2 of 3 images") for line in said)
    (tmp_path / "files" / "7.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 3 images of val can be used. The first: .*1\.jpg: the file"):
        run(source, tmp_path / "prepared", max_bad_share=0.5)


@pytest.mark.parametrize("content", [None, b"", b'{"name": "dig', b"[]", b"{}", b'{"identity": 3}', b"\xff"])
def test_a_damaged_manifest_is_named_and_preparing_again_mends_it(own: Path, content: bytes | None) -> None:
    manifest = own / "data" / "digits" / "prepared" / "manifest.json"
    before = prepare.open_prepared("digits", own).fingerprint
    manifest.write_bytes(manifest.read_bytes()[:300] if content is None else content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged. Make it again: setwise data prepare digits"):
        prepare.open_prepared("digits", own)
    assert any(line.startswith("preparing 12 images") for line in prepare_again(own))
    assert prepare.open_prepared("digits", own).fingerprint == before


@pytest.mark.parametrize("file", ["prepared/vocabulary.json", "source/generated.json"])
def test_what_else_is_damaged_is_made_again(own: Path, file: str) -> None:
    path = own / "data" / "digits" / file
    whole = path.read_bytes()
    path.write_bytes(b"{")
    if file.startswith("prepared"):
        with pytest.raises(DataError, match=r"vocabulary\.json: not a list of words"):
            vocabulary.read(path)
        path.unlink()
        with pytest.raises(DataError, match=r"vocabulary\.json is missing"):
            prepare.open_prepared("digits", own)
    prepare_again(own)
    assert path.read_bytes() == whole


@pytest.mark.ray
@pytest.mark.driver
def test_a_store_that_cannot_be_written_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images_source(tmp_path / "files")
    monkeypatch.setattr(prepare, "_remove_leftovers", lambda target, working: block(working))

    def block(working: Path) -> None:
        (working / "val-00000.parquet").mkdir(parents=True, exist_ok=True)

    with cluster.connect(cpus=2), pytest.raises(SetwiseError, match=r"val-00000\.parquet cannot be written \(Is a dir"):
        run(source, tmp_path / "prepared", rows_per_shard=3)
    assert not (tmp_path / "prepared").exists()


PREPARE_SLOWLY = """
import sys, time
from pathlib import Path
from setwise.pipelines import prepare
from tiny import images_source, run, write_serially

def write_slowly(tasks, folder, settings):
    for task in tasks:
        write_serially([task], folder, settings)
        print("written", flush=True)
        time.sleep(0.2)

prepare._write_shards = write_slowly
run(images_source(Path(sys.argv[1]), 24), Path(sys.argv[2]), rows_per_shard=2)
"""


def test_a_preparation_that_is_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGKILL, twice, once at the end of a shard and once anywhere."""
    target, working = tmp_path / "prepared", ".prepared-*/*.json"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PREPARE_SLOWLY, str(tmp_path / "files"), str(target)]
    for delay in (0.0, 0.21):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(2):
                assert process.stdout.readline() == "written\n"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(working)}
    assert 4 <= len(before) < 12

    made: list[str] = []

    def write(tasks: list[prepare.Task], folder: Path, settings: PrepareConfig) -> None:
        made.extend(Path(file).stem + ".json" for file, _ in tasks)
        write_serially(tasks[::-1], folder, settings)  # in whichever order

    monkeypatch.setattr(prepare, "_write_shards", write)
    source = images_source(tmp_path / "files", 24)
    resumed = run(source, target, rows_per_shard=2)
    assert set(made).isdisjoint(before) and len(made) + len(before) == 12
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    through = run(source, tmp_path / "other" / "prepared", rows_per_shard=2)
    assert through.fingerprint == resumed.fingerprint
    one, other = content(through.folder), content(target)
    assert one.pop("manifest.json") != other.pop("manifest.json"), "which says from where"
    assert one == other
    assert not list(tmp_path.glob(".prepared*"))


@pytest.mark.ray
@pytest.mark.driver
def test_ray_data_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of features, of several shards at once, and with an image that cannot be used."""
    sources = images_source(tmp_path / "files", 24), regions_source(tmp_path / "regions", bad=(3,))
    (tmp_path / "files" / "5.jpg").write_bytes(b"")
    with cluster.connect(cpus=3):
        for source in sources:
            run(source, tmp_path / f"ray-{source.name}" / "prepared", rows_per_shard=2, max_bad_share=0.1)
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    for source in sources:
        serial = run(source, tmp_path / f"serial-{source.name}" / "prepared", rows_per_shard=2, max_bad_share=0.1)
        one, other = content(serial.folder), content(tmp_path / f"ray-{source.name}" / "prepared")
        assert one.pop("manifest.json") and other.pop("manifest.json") and len(one) > 25
        assert one == other and len(serial.manifest["quarantine"]) == 1


@pytest.mark.usefixtures("serial")
def test_what_was_left_of_other_files_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".prepared-0123456789abcdef"
    left.mkdir()
    (left / "train-00000.parquet").write_bytes(b"of other settings")
    run(images_source(tmp_path / "files"), tmp_path / "prepared")
    assert not left.exists()


def test_killed_between_the_two_renames_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    first = run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=2)
    renamed: list[Path] = []
    rename = Path.rename

    def killed(path: Path, to: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=3)
    assert renamed == [first.folder] and not first.folder.exists()

    def nothing_is_to_be_made(*arguments: Any) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(prepare, "_write_shards", nothing_is_to_be_made)
    again = run(images_source(tmp_path / "files"), tmp_path / "prepared", rows_per_shard=3)
    assert again.manifest["splits"]["train"]["images"] == 3 and not list(tmp_path.glob(".prepared*"))


@pytest.mark.usefixtures("serial")
def test_a_recipe_and_data_that_do_not_fit_are_told_what_to_do(tmp_path: Path) -> None:
    pictures = run(images_source(tmp_path / "files", size=(100, 80)), tmp_path / "a" / "prepared", shorter_side=64)
    originals = run(images_source(tmp_path / "files"), tmp_path / "b" / "prepared", shorter_side=None)
    features = run(regions_source(tmp_path / "regions"), tmp_path / "c" / "prepared")
    pixels = recipe.load("digits_cnn_bigru")
    large = recipe.load("digits_cnn_bigru", ["data.image_size=128"])
    wide = recipe.load("coco_butd_bigru")
    regions = recipe.load("coco_butd_bigru", ["model.image_encoder.feature_dim=5"])

    for prepared, fitting in ((pictures, pixels), (originals, large), (features, regions)):
        prepare.check_fits(prepared, fitting)
    again = f"setwise data prepare pictures --from {tmp_path / 'a'} prepare.shorter_side=128"
    with pytest.raises(ConfigError, match=f"image_size=64 or less, or prepare them again: {again}"):
        prepare.check_fits(pictures, large)
    with pytest.raises(DataError, match=r"reads region features.*setwise data prepare pictures_butd --from FOLDER"):
        prepare.check_fits(pictures, regions)
    with pytest.raises(DataError, match=r"reads images.*setwise data prepare pictures --from FOLDER"):
        prepare.check_fits(features, pixels)
    with pytest.raises(ConfigError, match=r"model\.image_encoder\.feature_dim=5, or prepare others"):
        prepare.check_fits(features, wide)


@pytest.mark.usefixtures("serial")
def test_images_are_reduced_once_or_kept(tmp_path: Path) -> None:
    source = images_source(tmp_path / "files", size=(100, 80))
    for side, expected in ((None, (100, 80)), (64, (80, 64)), (512, (100, 80))):
        prepared = run(source, tmp_path / f"{side}" / "prepared", shorter_side=side)
        split = Split(prepared, "val", DataConfig(), vocabulary.read(prepared.folder / "vocabulary.json"))
        stored = [split.image(index) for index in range(len(split))]
        assert {shape(jpeg) for jpeg in stored} == {expected}
        if side != 64:
            assert stored == [row.path.read_bytes() for row in source.rows if row.split == "val"]


def shape(jpeg: bytes) -> tuple[int, int]:
    from setwise.pipelines.images import read_rgb

    return read_rgb(jpeg).size


def test_a_source_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'pictures' has no image"):
        run(replace(images_source(tmp_path / "files"), rows=[]), tmp_path / "prepared")


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a data set"):
        prepare.prepare_source("../x", tmp_path, prepare.PrepareSettings(), lambda message: None)
