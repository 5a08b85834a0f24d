"""What `setwise data verify` finds in a data set's files, and in what was prepared of them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setwise.pipelines import content_checks, datasets, prepare, verify
from setwise.pipelines.datasets import Published, SourceConfig
from setwise.pipelines.findings import Finding, Report
from setwise.pipelines.prepare import PrepareConfig, PrepareSettings
from setwise.platform.errors import ConfigError, DataError
from tiny import write_serially
from trees import any_folder, coco_karpathy, coco_pictures, flickr30k, flickr30k_pictures, karpathy_json, scan_features


def silent(message: str) -> None:
    pass


def check(name: str, folder: Path, deep: bool = False) -> Report:
    return verify.verify(name, SourceConfig(folder=str(folder)), folder / "store", deep=deep, say=silent)


def found(report: Report, what: str) -> Finding:
    """The one finding that says `what`."""
    (finding,) = [finding for finding in report.findings if what in finding.what]
    return finding


def says(report: Report, what: str) -> bool:
    return any(what in finding.what for finding in report.findings)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trees' sizes are the published ones."""
    sizes = {"coco": (16, 5, 10), "coco_butd": (16, 5, 10), "f30k": (12, 5, 10), "f30k_butd": (12, 5, 10)}
    for name, (train, val, test) in sizes.items():
        monkeypatch.setitem(datasets.PUBLISHED, name, Published(train, val, test, vocabulary=1))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["coco", "coco_butd", "f30k", "f30k_butd"])
@pytest.mark.parametrize("deep", [True, False])
def test_a_data_set_as_published_has_no_mistakes(tmp_path: Path, name: str, deep: bool) -> None:
    pictures = coco_pictures(many_captions=0) if name.startswith("coco") else flickr30k_pictures()
    if name.endswith("_butd"):
        scan_features(tmp_path, pictures, caption_ids=True)
    elif name == "coco":
        coco_karpathy(tmp_path, pictures)
    else:
        flickr30k(tmp_path, pictures)
    report = check(name, tmp_path, deep)
    assert report.ok and {finding.severity for finding in report.findings} <= {"information", "warning"}
    train = 16 if name.startswith("coco") else 12
    expected = {"train": train, "val": 5, "test": 10}
    assert report.counts == {split: {"images": n, "captions": 5 * n} for split, n in expected.items()}
    assert found(report, "legal advice").severity == "information"
    if name.startswith("coco"):
        assert found(report, "of COCO's 5,000 test images").what.startswith("10 of COCO's")


def test_other_counts_are_an_error_of_coco_and_none_of_ones_own(tmp_path: Path) -> None:
    coco_karpathy(tmp_path)
    for name in ("coco", "coco_of_ours"):
        report = check(name, tmp_path)
        finding = found(report, "train has 16 images and 80 captions; everybody's has 113,287 and 566,435")
        assert finding.severity == "error" and not report.ok
        assert "test has 10 images" in report.findings[2].what
    assert check("mine", tmp_path).ok and not says(check("mine", tmp_path), "everybody's")
    flickr30k(tmp_path / "flickr")
    assert found(check("f30k", tmp_path / "flickr"), "everybody's has 29,000 and 145,000").severity == "error"


def images(folder: Path) -> dict[str, list[Path]]:
    entries = json.loads((folder / "dataset_flickr30k.json").read_text())["images"]
    paths: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for entry in entries:
        paths[entry["split"]].append(folder / "flickr30k-images" / entry["filename"])
    return paths


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damage_pixels(path: Path) -> None:
    """Header and end stay."""
    Image.effect_noise((60, 50), 50).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "not a readable JPEG"),
        (cut, "cannot be decoded"),
        (lambda path: Image.new("L", (1, 60)).save(path), "narrower than"),
        (lambda path: Image.new("L", (6000, 6000)).save(path), "pixels; the limit is"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no file"),
    ],
)
def test_missing_and_damaged_images_are_found_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], reason: str
) -> None:
    monkeypatch.setattr(content_checks, "SAMPLE", 1)
    flickr30k(tmp_path, flickr30k_pictures(train=200, val=2, test=2))
    own = images(tmp_path)
    damage(own["train"][7])
    report = check("mine", tmp_path)
    finding = found(report, "1 training images (0.49% of all images)")
    assert report.ok and finding.severity == "warning"
    assert finding.where.startswith(f"{own['train'][7]}: ") and reason in finding.where
    damage(own["test"][0])
    report = check("mine", tmp_path)
    assert not report.ok and found(report, "1 images of val and test").severity == "error"
    for path in own["train"][8:11]:
        damage(path)
    assert found(check("mine", tmp_path), "4 training images (1.96%").severity == "error"


def test_an_image_whose_middle_is_damaged_is_found_by_the_deep_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_checks, "SAMPLE", 1)
    flickr30k(tmp_path)
    damage_pixels(images(tmp_path)["test"][3])
    shallow, deep = check("mine", tmp_path), check("mine", tmp_path, deep=True)
    assert shallow.ok and found(shallow, "headers of 27 images read, 1 decoded").remedy == "--deep: all of them"
    assert not deep.ok and says(deep, "1 images of val and test are missing or damaged")
    assert found(deep, "headers of 27 images read, 27 decoded").remedy == ""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_whole_images_of_all_forms_need_no_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    decoded: list[int] = []
    monkeypatch.setattr(content_checks, "read_rgb", lambda data: decoded.append(len(data)))
    Image.effect_noise((60, 50), 50).convert("RGB").save(tmp_path / "a", form)
    assert content_checks.image_problem(tmp_path / "a", decode=False) is None and decoded == []
    whole = (tmp_path / "a").read_bytes()
    for content in (whole[:-20], whole + b"more" if form == "JPEG" else whole[:-1]):
        (tmp_path / "a").write_bytes(content)
        content_checks.image_problem(tmp_path / "a", decode=False)
    assert decoded == [len(whole) - 20, len(whole) + 4 if form == "JPEG" else len(whole) - 1]


def test_one_file_in_two_splits_is_an_error(tmp_path: Path) -> None:
    pictures = flickr30k_pictures()
    first = {split: next(p for p in pictures if p.split == split) for split in ("train", "test")}
    changed = [replace(p, file_name=first["train"].file_name) if p is first["test"] else p for p in pictures]
    flickr30k(tmp_path, changed)
    report = check("mine", tmp_path)
    assert not report.ok
    assert first["train"].file_name in found(report, "1 files are images of several splits").where


def test_captions_that_are_none_and_captions_that_leak_are_counted(tmp_path: Path) -> None:
    any_folder(tmp_path)
    lines = (tmp_path / "captions.csv").read_text().splitlines()
    names = {
        split: next(line for line in lines if line.endswith(split)).partition(",")[0] for split in ("train", "val")
    }
    lines += [
        f"{names['train']},   ,train",
        f"{names['train']},{'x' * 6000},train",
        f"{names['train']},Very same,train",
    ]
    lines += [f"{names['val']},very  SAME,val", "../secret.jpg,a caption,val", "gone.jpg"]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    report = check("mine", tmp_path)
    bad = found(report, "2 captions cannot be used")
    assert "the caption is empty" in bad.where and "6,000 characters" in bad.where
    lost = found(report, "2 lines or images cannot be used")
    assert f"captions.csv:{len(lines) - 1}: it names '../secret.jpg'" in lost.where and lost.severity == "warning"
    rows = [row for row in csv.reader(lines[1:-2]) if row[2] in ("train", "val")]
    texts = [(split, " ".join(text.lower().split())) for _, text, split in rows]
    validated = [text for split, text in texts if split == "val"]
    leaked = [text for text in validated if ("train", text) in texts]
    assert "very same" in leaked
    assert says(report, f"{len(leaked)} of {len(validated)} captions of val are captions of training images too")
    assert report.ok


def test_wrong_annotations_are_one_error_with_what_is_wrong(tmp_path: Path) -> None:
    flickr30k(tmp_path)
    content = karpathy_json("flickr30k", flickr30k_pictures())
    content["images"][3]["imgid"] = content["images"][5]["imgid"]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(content))
    report = check("f30k", tmp_path)
    (finding,) = report.findings
    assert not report.ok and report.counts == {}
    assert finding.severity == "error" and f"same id {content['images'][5]['imgid']}" in finding.what


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    scan_features(tmp_path, flickr30k_pictures(), regions=3, width=5)
    features = np.load(tmp_path / "train_ims.npy", allow_pickle=False)
    features[3, 2, 4] = value
    features[7] = 0
    np.save(tmp_path / "train_ims.npy", features)
    report = check("mine_butd", tmp_path)
    assert not report.ok
    assert found(report, "1 of 12 images' features hold values that").where == f"{tmp_path}/train_ims.npy, row 3"
    assert found(report, "1 of 12 images' features are nothing but zeros").severity == "warning"
    monkeypatch.setattr(content_checks, "SAMPLE", 2)
    assert check("mine_butd", tmp_path).ok, "of a sample of two rows, neither is bad"
    assert found(check("mine_butd", tmp_path), "of 12 images, 2 of them read").remedy == "--deep: all of them"
    assert not check("mine_butd", tmp_path, deep=True).ok


@pytest.mark.parametrize("block", [1, 1000, 2**25])
def test_features_are_read_alike_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(content_checks, "BLOCK_BYTES", block)
    scan_features(tmp_path, flickr30k_pictures(train=40, val=20), regions=3, width=5)
    features = np.load(tmp_path / "dev_ims.npy", allow_pickle=False)
    bad = [10, 35, 95]
    features[bad, 1, 1] = np.nan
    features[47, 0, 0] += 1  # a copy of row 45, and of an image that the reader does not compare
    np.save(tmp_path / "dev_ims.npy", features)
    monkeypatch.setattr("setwise.pipelines.region_files.COMPARED_IMAGES", 1)
    report = check("mine_butd", tmp_path, deep=True)
    assert found(report, "hold values that").where == f"{tmp_path}/dev_ims.npy, row 10, 35, 95"
    assert found(report, "differ from the other copies").where == f"{tmp_path}/dev_ims.npy, row 10, 35, 45, 95"


def test_ids_that_are_not_cocos_and_another_order_are_found(tmp_path: Path) -> None:
    pictures = coco_pictures()
    coco_karpathy(tmp_path, pictures)
    tested = [picture for picture in pictures if picture.split == "test"]
    assert found(check("coco", tmp_path), "10 of COCO's 5,000 test images and 50 of 25,000").severity == "warning"

    other = [p for p in pictures if p.split != "test"]
    coco_karpathy(tmp_path, [*other, *tested[::-1]])
    assert found(check("coco", tmp_path), "not in the order of coco_test_ids.npy").severity == "error"

    ids = [picture.caption_ids for picture in tested]
    mixed = [replace(p, caption_ids=own) for p, own in zip(tested, [ids[1], ids[0], *ids[2:]], strict=True)]
    coco_karpathy(tmp_path, [*other, *mixed])
    assert found(check("coco", tmp_path), "10 test captions have ids that COCO gave").severity == "error"

    numbered = [replace(p, caption_ids=tuple(10**8 + 10 * n + c for c in range(5))) for n, p in enumerate(tested)]
    coco_karpathy(tmp_path, [*other, *numbered])
    assert found(check("coco", tmp_path), "no test caption has an id of COCO's").severity == "warning"


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> Path:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    settings = PrepareSettings(source=SourceConfig(folder=str(folder)), prepare=PrepareConfig(rows_per_shard=7))
    prepare.prepare_source(name, tmp_path / "store", settings, silent)
    return tmp_path / "store"


def test_what_was_prepared_is_compared_with_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flickr30k(tmp_path / "source")
    store = prepared(tmp_path, monkeypatch, "f30k", tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    report = verify.verify("f30k", None, store, deep=False, say=silent)
    assert says(report, "files of shards are as they were written")
    assert report.counts["test"] == {"images": 10, "captions": 50}
    assert found(report, "test has 10 images").severity == "error"
    shard = next((store / "data" / "f30k" / "prepared").glob("train-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"1 files are missing.*{shard.name}.*setwise data prepare f30k --from"):
        verify.verify("f30k", None, store, deep=False, say=silent)


def test_prepared_features_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_features(tmp_path / "source", flickr30k_pictures(train=40), regions=3, width=5)
    store = prepared(tmp_path, monkeypatch, "mine", tmp_path / "source")
    assert verify.verify("mine", None, store, deep=True, say=silent).ok
    features = np.lib.format.open_memmap(tmp_path / "source" / "train_ims.npy", "r+")
    features[1, 0, 0] = np.nan  # the file is known again by 16 of its rows, of which this is none
    features.flush()
    report = verify.verify("mine", None, store, deep=True, say=silent)
    assert not report.ok and found(report, "hold values that are not finite").where.endswith("train_ims.npy, row 1")


def test_what_was_not_prepared_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="setwise data prepare f30k --from FOLDER"):
        verify.verify("f30k", None, tmp_path, deep=False, say=silent)
    with pytest.raises(ConfigError, match="cannot name a data set"):
        verify.verify("../f30k", None, tmp_path, deep=False, say=silent)


def test_a_report_is_a_table_and_json_with_the_worst_first(tmp_path: Path) -> None:
    from rich.console import Console

    coco_karpathy(tmp_path)
    report = check("coco", tmp_path)
    content = json.loads(json.dumps(report.to_json()))
    assert content["ok"] is False and content["counts"]["val"] == {"images": 5, "captions": 25}
    severities = [finding["severity"] for finding in content["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "information"].index)
    assert set(content["findings"][0]) == {"severity", "what", "where", "remedy"}
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report.table())
    assert "coco: has mistakes. train: 16 images, 80 captions" in captured.get()
    assert "everybody's has 113,287" in captured.get()


def test_a_line_of_progress_comes_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(content_checks.time, "monotonic", lambda: now[0])
    said: list[str] = []
    progress = content_checks.Progress(said.append, "images", 5000)
    for done in range(0, 5000, 100):
        now[0] += 1
        progress.at(done)
    assert len(said) == 10 and said[0] == "checked 400 of 5,000 images"


@pytest.mark.parametrize("file", ["vocabulary.json", "extended_positives/x.json"])
def test_words_and_extended_positives_are_checked_as_shards_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    any_folder(tmp_path / "files")
    (tmp_path / "files" / "extended_positives").mkdir()
    (tmp_path / "files" / "extended_positives" / "x.json").write_text("{}")
    settings = PrepareSettings(source=SourceConfig(folder=str(tmp_path / "files")))
    prepared = prepare.prepare_source("mine", tmp_path, settings, silent)
    assert verify.verify("mine", None, tmp_path, deep=False, say=silent).ok
    (prepared.folder / file).write_text('["other"]')
    with pytest.raises(DataError, match=r"vocabulary\.json or extended_positives are not as they were written"):
        verify.verify("mine", None, tmp_path, deep=False, say=silent)
