"""Regions are written in the published layout, once each, and killed at any moment the extraction goes on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.models import get_model

from setwise.pipelines import region_files, regions
from setwise.pipelines.datasets import Caption, Row, Source
from setwise.pipelines.detector import Chunk, Extractor
from setwise.pipelines.images import BadImageError, read_rgb
from setwise.pipelines.regions import DetectorConfig, RegionExtraction, Task
from setwise.platform import cluster, storage
from setwise.platform.errors import DataError

SPLITS = {"train": 7, "val": 2, "test": 3}
CHUNKS = [3, 3, 1, 2, 3]
"""Images of each, at most three: of the training split, then of the others."""
NAMES = {"train": "train", "val": "dev", "test": "testall"}


def make_source(folder: Path, **changes: Any) -> Source:
    """Twelve images with five captions each, the splits mixed."""
    folder.mkdir(exist_ok=True)
    (folder / "annotations.json").write_text("{}")
    members = [(split, number) for number in range(7) for split in SPLITS if number < SPLITS[split]]
    rows = []
    for image_id, (split, number) in enumerate(members, start=100):
        path = folder / f"{split}_{number}.png"
        if not path.exists():
            Image.fromarray(np.full((40 + number, 50, 3), image_id, np.uint8)).save(path)
        captions = tuple(Caption(10 * image_id + place, f"a {split}\n {number} \u2028{place}") for place in range(5))
        rows.append(Row(image_id, split, path, captions))
    given: dict[str, Any] = {"kind": "images", "rows": rows, "files": (folder / "annotations.json",)}
    return Source(**{"name": "toy", "quarantine": [], "notes": [], "extended_positives": None} | given | changes)


def find(images: list[tuple[int, str]]) -> Chunk:
    """Stands for a detector: two regions three wide, which tell the image's colour and height."""
    found, quarantine = [], []
    for image_id, path in images:
        try:
            image = read_rgb(Path(path).read_bytes())
        except BadImageError as error:
            quarantine.append({"image_id": image_id, "caption_id": None, "path": path, "reason": str(error)})
        else:
            found.append([[np.asarray(image)[0, 0, 0], image.height, region] for region in range(2)])
    ims = np.array(found, np.float32).reshape(-1, 2, 3)
    return Chunk(ims, ims.repeat(2, 2)[..., :4], ims[..., 0] / 255, quarantine)


seen: list[int] = []


def find_serially(tasks: list[Task], settings: RegionExtraction, weights: Path) -> Iterator[Chunk]:
    for task in tasks:
        seen.extend(image_id for image_id, _ in task.images)
        yield find(task.images)


@pytest.fixture(autouse=True)
def no_detector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    seen.clear()
    if "ray" not in request.keywords:
        monkeypatch.setattr(regions, "_chunks", find_serially)


@pytest.fixture
def settings(tmp_path: Path) -> RegionExtraction:
    (tmp_path / "weights.pth").write_bytes(b"weights")
    return RegionExtraction(detector=DetectorConfig(weights=str(tmp_path / "weights.pth")), images_per_chunk=3)


def extract(source: Source, target: Path, settings: RegionExtraction) -> list[str]:
    said: list[str] = []
    assert regions.extract(source, target, settings, target.parent / "cache", said.append) == target
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def changed(settings: RegionExtraction, **changes: Any) -> RegionExtraction:
    return settings.model_copy(update=changes)


# --- the layout -------------------------------------------------------------------------------------------------


def test_features_captions_and_ids_belong_together(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    extract(source, tmp_path / "made", settings)
    for split, name in NAMES.items():
        rows = [row for row in source.rows if row.split == split]
        ims, boxes, scores = (
            np.load(tmp_path / "made" / f"{name}_{array}.npy", mmap_mode="r", allow_pickle=False)
            for array in ("ims", "boxes", "scores")
        )
        assert (ims.shape, boxes.shape, scores.shape) == ((len(rows), 2, 3), (len(rows), 2, 4), (len(rows), 2))
        assert ims[:, 0, 0].tolist() == [row.image_id for row in rows]
        lines = {
            kind: (tmp_path / "made" / f"{name}_{kind}.txt").read_text("utf-8").splitlines()
            for kind in ("caps", "ids", "capids")
        }
        assert lines["ids"] == [str(row.image_id) for row in rows]
        assert lines["capids"] == [str(caption.caption_id) for row in rows for caption in row.captions]
        assert lines["caps"] == [f"a {split} {number} {place}" for number in range(len(rows)) for place in range(5)]
    made = storage.read_json(tmp_path / "made" / "regions.json")
    assert {name: (split["images"], split["captions"]) for name, split in made["splits"].items()} == {
        "train": (7, 35),
        "dev": (2, 10),
        "testall": (3, 15),
    }
    assert made["identity"]["weights"] == storage.sha256(tmp_path / "weights.pth")
    assert made["settings"]["detector"]["num_regions"] == 36
    assert set(made["versions"]) == {"torch", "torchvision", "pillow", "numpy"}
    assert len(list((tmp_path / "made").iterdir())) == 6 * 3 + 1


def test_the_reader_of_published_features_finds_the_same_images_and_captions(
    tmp_path: Path, settings: RegionExtraction
) -> None:
    source = make_source(tmp_path / "source")
    extract(source, tmp_path / "made", settings)
    read = region_files.read("toy_fasterrcnn", tmp_path / "made", None)
    assert (read.kind, read.quarantine, read.notes) == ("regions", [], [])
    found = {row.image_id: row for row in read.rows}
    assert len(read.rows) == len(found) == len(source.rows)
    for row in source.rows:
        assert found[row.image_id].split == row.split
        assert [caption.caption_id for caption in found[row.image_id].captions] == [
            caption.caption_id for caption in row.captions
        ]
        features = np.load(found[row.image_id].path)[found[row.image_id].place]
        assert features[0, 0] == row.image_id


def test_damaged_images_are_left_out_with_their_captions_and_listed(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    train = [row for row in source.rows if row.split == "train"]
    train[1].path.write_bytes(b"no image")
    train[4].path.unlink()
    blank = [*train[5].captions[:4], Caption(7, " \n")]
    rows = [Row(row.image_id, row.split, row.path, tuple(blank)) if row is train[5] else row for row in source.rows]
    reader = {"image_id": 9, "caption_id": None, "path": "x", "reason": "what the reader found"}
    source = make_source(tmp_path / "source", rows=rows, quarantine=[reader])
    train[4].path.unlink(missing_ok=True)
    extract(source, tmp_path / "made", changed(settings, max_bad_share=0.25))
    good = [row.image_id for place, row in enumerate(train) if place not in (1, 4, 5)]
    assert np.load(tmp_path / "made" / "train_ims.npy")[:, 0, 0].tolist() == good
    assert (tmp_path / "made" / "train_ids.txt").read_text().split() == [str(image_id) for image_id in good]
    assert len((tmp_path / "made" / "train_caps.txt").read_text("utf-8").splitlines()) == 5 * len(good)
    quarantine = storage.read_json(tmp_path / "made" / "regions.json")["quarantine"]
    assert {bad["image_id"]: bad["reason"].partition(",")[0] for bad in quarantine} == {
        9: "what the reader found",
        train[1].image_id: "not a readable JPEG",
        train[4].image_id: "there is no such file",
        train[5].image_id: "caption 7 is empty or no text",
    }


def test_too_many_missing_images_are_told_before_any_work(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    source.rows[5].path.unlink()
    with pytest.raises(DataError, match=r"1 of 12 images cannot be used, more than the 1.0% .* no such file"):
        extract(source, tmp_path / "made", settings)
    assert seen == []


def test_too_many_damaged_images_end_it_and_a_larger_share_lets_it_go_on(
    tmp_path: Path, settings: RegionExtraction
) -> None:
    source = make_source(tmp_path / "source")
    next(row for row in source.rows if row.split == "train").path.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 12 images cannot be used"):
            extract(source, tmp_path / "made", settings)
        assert len(seen) == 3
    extract(source, tmp_path / "made", changed(settings, max_bad_share=0.1))
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize("number", [0, 4, 6])
def test_other_than_five_captions_are_refused_with_the_remedy(
    tmp_path: Path, settings: RegionExtraction, number: int
) -> None:
    rows = make_source(tmp_path / "source").rows
    captions = (rows[3].captions * 2)[:number]
    rows[3] = Row(rows[3].image_id, rows[3].split, rows[3].path, captions)
    with pytest.raises(DataError, match=rf"image 103 .* with {number}\. .*source\.captions_per_image=5"):
        extract(make_source(tmp_path / "source", rows=rows), tmp_path / "made", settings)


def test_features_are_not_extracted_from_features(tmp_path: Path, settings: RegionExtraction) -> None:
    with pytest.raises(DataError, match="region features already"):
        extract(make_source(tmp_path / "source", kind="regions"), tmp_path / "made", settings)


# --- once, and to the end ---------------------------------------------------------------------------------------


def test_a_second_extraction_does_nothing_and_another_is_refused(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    extract(source, tmp_path / "made", settings)
    before = content(tmp_path / "made")
    seen.clear()
    (said,) = extract(source, tmp_path / "made", changed(settings, max_bad_share=0.5))
    assert "already" in said
    with pytest.raises(DataError, match=r"other settings or from other files \(dtype\)"):
        extract(source, tmp_path / "made", changed(settings, dtype="float16"))
    source.rows[0].path.write_bytes(source.rows[1].path.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"other settings or from other files \(images\)"):
        extract(source, tmp_path / "made", settings)
    assert seen == []
    assert content(tmp_path / "made") == before


def test_a_damaged_result_is_noticed(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    extract(source, tmp_path / "made", settings)
    os.truncate(tmp_path / "made" / "dev_ims.npy", 140)
    with pytest.raises(DataError, match=r"dev_ims\.npy is missing or cut short"):
        extract(source, tmp_path / "made", settings)


def test_a_folder_with_something_else_is_left_alone_and_an_empty_one_is_used(
    tmp_path: Path, settings: RegionExtraction
) -> None:
    source = make_source(tmp_path / "source")
    with pytest.raises(DataError, match="holds no extracted regions"):
        extract(source, tmp_path / "source", settings)
    (tmp_path / "empty").mkdir()
    extract(source, tmp_path / "empty", settings)
    assert (tmp_path / "empty" / "regions.json").is_file()


def extract_and_die(source: Source, target: Path, settings: RegionExtraction, step: int) -> None:
    """The process is killed when it is about to make its `step`-th write durable."""
    fsync, count = os.fsync, 0

    def fsync_or_die(descriptor: int) -> None:
        nonlocal count
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        fsync(descriptor)

    os.fsync = fsync_or_die
    extract(source, target, settings)


def test_killed_at_any_step_it_goes_on_and_the_files_are_the_same(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    source.rows[2].path.write_bytes(b"no image")
    settings = changed(settings, max_bad_share=0.1)
    extract(source, tmp_path / "whole", settings)
    whole = content(tmp_path / "whole")
    killed = 0
    for step in range(1000):
        target = tmp_path / f"killed_{step}"
        arguments = (source, target, settings, step)
        process = multiprocessing.get_context("fork").Process(target=extract_and_die, args=arguments)
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        record = tmp_path / f".{target.name}.extracting" / "progress.json"
        done = storage.read_json(record)["chunks"] if record.exists() else 0
        expected = 0 if target.exists() else sum(CHUNKS[done:])
        seen.clear()
        extract(source, target, settings)
        assert len(seen) == expected, step
        assert {name: data for name, data in content(target).items() if name != "progress.json"} == whole, step
    assert killed > 25


def test_an_extraction_that_was_begun_otherwise_is_not_mixed_with_another(
    tmp_path: Path, settings: RegionExtraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")

    def one_chunk(tasks: list[Task], *_: Any) -> Iterator[Chunk]:
        yield find(tasks[0].images)
        raise KeyboardInterrupt

    monkeypatch.setattr(regions, "_chunks", one_chunk)
    with pytest.raises(KeyboardInterrupt):
        extract(source, tmp_path / "made", settings)
    (tmp_path / "weights.pth").write_bytes(b"other weights")
    with pytest.raises(DataError, match=r"begun with other settings or files \(weights\)\. Remove it"):
        extract(source, tmp_path / "made", settings)


def test_two_do_not_extract_to_one_folder_at_once(tmp_path: Path, settings: RegionExtraction) -> None:
    source = make_source(tmp_path / "source")
    with storage.lease(tmp_path / ".made.lease", "it"), pytest.raises(storage.LeaseHeldError):
        extract(source, tmp_path / "made", settings)


# --- arrays that grow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_appended_rows_make_the_file_that_numpy_would_have_saved(tmp_path: Path, dtype: str) -> None:
    rows = np.random.default_rng(0).random((1_234, 3, 2)).astype(dtype)
    starts = [0, 1, 9, 9, 10, 1_000, 1_234]
    for start, end in itertools.pairwise(starts):
        regions.append_rows(tmp_path / "grown.npy", start, rows[start:end])
        np.testing.assert_array_equal(np.load(tmp_path / "grown.npy"), rows[:end])
    np.save(tmp_path / "saved.npy", rows)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_what_was_not_recorded_is_overwritten_and_what_is_lost_is_noticed(tmp_path: Path) -> None:
    rows = np.arange(12.0).reshape(6, 2)
    regions.append_rows(tmp_path / "x.npy", 0, rows[:5])
    with (tmp_path / "x.npy").open("ab") as stream:
        stream.write(b"half a row")
    regions.append_rows(tmp_path / "x.npy", 2, rows[2:4])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows[:4])
    with pytest.raises(DataError, match="cut short"):
        regions.append_rows(tmp_path / "x.npy", 5, rows[5:])


# --- settings, and Ray ------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_proposals=20 are fewer than num_regions=36"):
        DetectorConfig(num_proposals=20)
    with pytest.raises(ValidationError, match="max_size=400 is less than min_size=800"):
        DetectorConfig(max_size=400)


@pytest.mark.ray
@pytest.mark.driver
def test_the_files_do_not_depend_on_the_number_of_actors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    config = DetectorConfig(
        architecture="fasterrcnn_resnet50_fpn",
        weights=str(tmp_path / "weights.pth"),
        num_classes=5,
        num_regions=4,
        num_proposals=10,
        min_size=64,
        max_size=64,
        batch_size=2,
    )
    settings = RegionExtraction(detector=config, images_per_chunk=2)
    source = make_source(tmp_path / "source")
    with pytest.MonkeyPatch.context() as patch:
        extractor = Extractor(config, tmp_path / "weights.pth", "float32", "cpu")
        patch.setattr(regions, "_chunks", lambda tasks, *_: (extractor.extract(task.images) for task in tasks))
        extract(source, tmp_path / "alone", settings)
    with cluster.connect(cpus=3):
        extract(source, tmp_path / "two_actors", settings)
        other = changed(settings, detector=config.model_copy(update={"num_classes": 6}))
        one_task = make_source(tmp_path / "source", rows=source.rows[:1])
        with pytest.raises(DataError, match="these are not the weights of fasterrcnn_resnet50_fpn"):
            extract(one_task, tmp_path / "other", other)
    assert content(tmp_path / "two_actors") == content(tmp_path / "alone")
    assert np.load(tmp_path / "alone" / "train_ims.npy").shape == (7, 4, 1024)
