"""Search, where a model reads region features; and what an image file has to be where it reads pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from setwise.pipelines import prepare, recipe, search, train
from setwise.pipelines.datasets import Caption, Row, Source
from setwise.pipelines.prepare import PrepareConfig
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.workers import Worker
from setwise.platform import config, run
from setwise.platform.errors import ConfigError, DataError
from tiny import write_serially


def trained(store: Path, settings: Recipe, name: str) -> Reference:
    training = run.create(store / "runs", name, config.to_yaml(settings), experiment="tests")
    train.train(settings, training, store, Worker(), lambda values: None)
    return Reference(name, training.checkpoints / "epoch_0001", training)


@pytest.fixture
def regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """A model of four regions an image, each six wide, trained for one epoch, with batches made ahead."""
    monkeypatch.setattr(prepare, "_write_shards", write_serially)
    rows = []
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        np.save(tmp_path / f"{split}.npy", np.random.default_rng(0).normal(size=(count, 4, 6)).astype(np.float32))
        for place in range(count):
            number = len(rows)
            captions = (Caption(2 * number, f"word{place} here"), Caption(2 * number + 1, f"word{place} there"))
            rows.append(Row(number, split, tmp_path / f"{split}.npy", captions, place))
    target = tmp_path / "data" / "things_butd" / "prepared"
    source = Source("things_butd", "regions", rows, (), [], [], None)
    prepare.prepare(source, target, PrepareConfig(), lambda message: None)
    settings = recipe.load(
        "coco_butd_bigru",
        [
            "data.name=things_butd",
            "model.embed_size=16",
            "model.image_encoder.feature_dim=6",
            "model.text_encoder.word_dim=8",
            "model.set_prediction.head_dim=4",
            "train.epochs=1",
            "train.batch_size=12",
            "train.precision=fp32",
            "train.loader_threads=2",
        ],
    )
    return trained(tmp_path, settings, "regions")


def test_captions_find_images_of_which_only_features_are_there(regions: Reference, tmp_path: Path) -> None:
    answer = search.search("word3 here zebra", regions, tmp_path, top=3)
    assert len(answer.hits) == 3 and answer.unknown_words == ["zebra"]
    assert all(
        hit.captions == [f"word{hit.image_id - 32} here", f"word{hit.image_id - 32} there"] for hit in answer.hits
    )
    with pytest.raises(DataError, match="no images that could be saved"):
        search.export_images(answer, tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="search with a caption"):
        search.search(str(tmp_path / "x.jpg"), regions, tmp_path)


def test_an_image_file_of_any_kind_finds_captions(store: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    settings = recipe.load("digits_cnn_bigru", ["train.epochs=1", "train.batch_size=40", "model.embed_size=16"])
    reference = trained(store, settings, "search")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    for name, image in (("x.png", picture.convert("RGBA")), ("x.jpg", picture.convert("CMYK")), ("x.webp", picture)):
        buffer = io.BytesIO()
        image.save(buffer, {"x.png": "PNG", "x.jpg": "JPEG", "x.webp": "WEBP"}[name])
        (tmp_path / name).write_bytes(buffer.getvalue())
        answer = search.search(str(tmp_path / name), reference, store, top=4)
        texts = [text for hit in answer.hits for text in hit.captions]
        assert len(set(texts)) == len(texts) == 4
        assert [hit.score for hit in answer.hits] == sorted((hit.score for hit in answer.hits), reverse=True)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"cut\.jpg: not a readable"):
        search.search(str(tmp_path / "cut.jpg"), reference, store)

    answer = search.search("a red three", reference, store, top=2)
    for path, hit in zip(search.export_images(answer, store, tmp_path / "out"), answer.hits, strict=True):
        assert path.name.endswith(f"_{hit.image_id}.jpg") and Image.open(path).size == (64, 64)


def test_images_are_not_written_over_a_file(store: Path, tmp_path: Path) -> None:
    answer = search.Answer("model", "digits", "test", [], [])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file: images cannot be written there \(File exists\)"):
        search.export_images(answer, store, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
