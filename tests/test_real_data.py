"""COCO, Flickr30K and a folder of one's own, small but in their real formats: from files to values, as a user types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trees
from commands import setwise
from setwise.pipelines import datasets, evaluate
from setwise.platform.run import Run

pytestmark = pytest.mark.end_to_end
SMALL = (
    *("model.embed_size=16", "model.set_prediction.head_dim=4", "model.set_prediction.iterations=2"),
    *("model.text_encoder.word_dim=8", "train.epochs=2", "train.batch_size=8", "train.precision=fp32"),
)
PIXELS = (
    *("model.image_encoder.architecture=resnet18", "model.image_encoder.weights=null"),
    *("model.image_encoder.frozen_batch_norm=false", "optimizer.frozen_backbone_epochs=0"),
    *("data.image_size=64", "data.eval_shorter_side=72"),
)
REGIONS = ("model.image_encoder.feature_dim=16",)


def answer(store: Path, *arguments: str) -> Any:
    return json.loads(setwise(store, *arguments, "--json").stdout)


def from_files_to_values(
    store: Path, folder: Path, name: str, recipe: str, *overrides: str
) -> dict[str, dict[str, float]]:
    """verify, prepare, train and eval of one data set; the values by benchmark."""
    published = name in datasets.PUBLISHED
    report = json.loads(
        setwise(store, "data", "verify", name, "--from", str(folder), "--json", code=5 * published).stdout
    )
    wrong = [finding["what"] for finding in report["findings"] if finding["severity"] == "error"]
    assert len(wrong) == (3 if published else 0), "each split is far smaller than the published one, and nothing else"
    prepared = answer(store, "data", "prepare", name, "--from", str(folder))
    assert {split: count["images"] for split, count in report["counts"].items()} == {
        split: count["images"] for split, count in prepared["splits"].items()
    }
    assert answer(store, "data", "prepare", name, "--from", str(folder)) == prepared
    answer(store, "train", recipe, *SMALL, *overrides, "--name", f"{name}-run")
    measured = answer(store, "eval", f"{name}-run")["benchmarks"]
    for one in measured:
        assert len(one["fingerprint"]) == 16
        assert all(np.isfinite(value) for value in one["values"].values()), one
    return {one["benchmark"]: one["values"] for one in measured}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def test_coco_as_images(store: Path, tmp_path: Path) -> None:
    trees.coco_karpathy(tmp_path)
    values = from_files_to_values(store, tmp_path, "coco", "coco_resnet152_bigru", *PIXELS)
    assert {"coco_1k", "coco_5k", "eccv", "cxc"} >= set(values) >= {"coco_1k", "coco_5k", "cxc"}
    kept = evaluate.ranks(Run(store / "runs" / "coco-run"), "coco_5k")
    assert len(kept["i2t"].ids) == 10 and len(kept["t2i"].ids) == 50
    recall = float((kept["t2i"].ranks <= 1).mean() * 100)
    assert recall == pytest.approx(values["coco_5k"]["t2i_R1"]), "values and ranks say the same"


def test_coco_as_region_features(store: Path, tmp_path: Path) -> None:
    trees.scan_features(tmp_path)
    values = from_files_to_values(store, tmp_path, "coco_butd", "coco_butd_bigru", *REGIONS)
    assert {"coco_1k", "coco_5k"} <= set(values)


def test_flickr30k_as_images(store: Path, tmp_path: Path) -> None:
    trees.flickr30k(tmp_path)
    values = from_files_to_values(store, tmp_path, "f30k", "f30k_resnet152_bigru", *PIXELS)
    assert set(values) == {"f30k"}


def test_flickr30k_as_region_features(store: Path, tmp_path: Path) -> None:
    trees.scan_features(tmp_path, trees.flickr30k_pictures())
    values = from_files_to_values(store, tmp_path, "f30k_butd", "f30k_butd_bigru", *REGIONS)
    assert set(values) == {"f30k"}


def test_a_folder_of_ones_own(store: Path, tmp_path: Path) -> None:
    trees.any_folder(tmp_path)
    recipe = tmp_path / "shapes_cnn_bigru.yaml"
    recipe.write_text("extends: digits_cnn_bigru\ndata: {name: shapes}\n")
    values = from_files_to_values(store, tmp_path, "shapes", str(recipe))
    assert set(values) == {"shapes", "shapes_folds"}
    assert "shapes" in setwise(store, "data", "ls").stdout
    info = setwise(store, "data", "info", "shapes").stdout
    assert str(tmp_path) in info and "vocabulary" in info
