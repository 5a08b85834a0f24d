"""What is exported runs elsewhere, on any number of images and captions, and gives the model's embeddings."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from setwise.pipelines import export, prepare, recipe, trained_model
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import Retrieval
from setwise.platform import checkpoint
from setwise.platform.errors import ConfigError, DataError, SetwiseError
from tiny import TINY_MODEL

WORDS = ("<pad>", "<start>", "<end>", "<unk>", "<mask>", *(f"w{number}" for number in range(20)))
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(20)))
SMALL = ["model.embed_size=16", "model.set_prediction.head_dim=4", "model.set_prediction.iterations=2"]


def made(folder: Path, settings: Recipe, words: Sequence[str] = WORDS, fingerprint: str = "f") -> Reference:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    weights = Retrieval(settings, len(words)).state_dict()
    metadata = {
        "schema": 2,
        "run": "made",
        "epoch": 1,
        "recipe": settings.model_dump(mode="json"),
        "vocabulary": words,
        "data": {"name": settings.data.name, "fingerprint": fingerprint},
        "history": [{"val/rsum": 1.0}],
    }
    checkpoint.save(folder, weights, metadata, None)
    return Reference("made", folder, None)


def run(folder: Path, name: str, **inputs: torch.Tensor) -> torch.Tensor:
    """One encoder, as somebody runs it who has the exported file alone."""
    if (path := folder / f"{name}.pt2").is_file():
        return torch.export.load(path).module()(**inputs)  # type: ignore[no-any-return]
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    given = {key: value.numpy() for key, value in inputs.items()}
    return torch.from_numpy(np.asarray(session.run(["sets"], given)[0]))


def check(reference: Reference, folder: Path, images: torch.Tensor, vocabulary: int) -> None:
    """Both encoders against the model, on sizes that the export has not compared."""
    retriever = trained_model.load(reference.checkpoint, torch.device("cpu")).retrieval.retriever
    lengths = torch.tensor([5, 1, 17, 2, 17, 1, 3])
    tokens = torch.randint(1, vocabulary, (7, 17)) * (torch.arange(17) < lengths[:, None])
    with torch.no_grad():
        expected = retriever.encode_images(images).sets, retriever.encode_texts(tokens, lengths).sets
        result = (
            run(folder, "image_encoder", images=images),
            run(folder, "text_encoder", tokens=tokens, lengths=lengths),
        )
    for one, other in zip(expected, result, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-6)


def test_onnx_files_compared_over_the_test_split_with_a_manifest(store: Path, tmp_path: Path) -> None:
    settings = recipe.load("digits_cnn_bigru", [*TINY_MODEL, *SMALL])
    words = json.loads((prepare.open_prepared("digits", store).folder / "vocabulary.json").read_text())
    reference = made(tmp_path / "made", settings, words)
    done = export.export(reference, tmp_path / "out", "onnx", store)
    check(reference, done.folder, torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8), len(words))

    manifest = json.loads((done.folder / checkpoint.MANIFEST).read_text())
    files = {path.name: path.read_bytes() for path in done.folder.iterdir() if path.name != checkpoint.MANIFEST}
    assert set(files) == {"image_encoder.onnx", "text_encoder.onnx", "config.json", "vocabulary.json"}
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items()
    }
    assert Recipe.model_validate(json.loads(files["config.json"])) == settings
    assert json.loads(files["vocabulary.json"])["words"] == words
    assert manifest["largest_difference"] == {"images": done.image_difference, "captions": done.text_difference}
    assert 0 <= max(manifest["largest_difference"].values()) < 2e-6
    assert "16 images and 80 captions of the test split of digits" in manifest["compared"]
    assert (manifest["origin"]["run"], manifest["origin"]["data"]["fingerprint"]) == ("made", "f")
    root = str(Path(export.__file__).parents[1]).encode()
    assert [name for name, data in files.items() if root in data] == [], "paths of this machine"


def test_regions_and_bert_as_programs_of_torch(tmp_path: Path) -> None:
    base = recipe.load("coco_butd_bigru", SMALL).model_dump(mode="json")
    base["model"]["image_encoder"]["feature_dim"] = 6
    base["model"]["text_encoder"] = {"kind": "bert", "layers": 2, "width": 16, "heads": 2, "ff_width": 24}
    reference = made(tmp_path / "made", Recipe.model_validate(base), PIECES)
    done = export.export(reference, tmp_path / "out", "torch", tmp_path)
    assert done.compared == "made-up batches"
    check(reference, done.folder, torch.randn(6, 11, 6), len(PIECES))


def test_a_grid_and_the_gru_states_under_official_padding_as_programs_of_torch(tmp_path: Path) -> None:
    changed = ["model.image_encoder.architecture=resnet18", "data.image_size=64", "model.padding=official"]
    changed += ["model.text_encoder.word_dim=8", "model.text_encoder.local_features=states"]
    reference = made(tmp_path / "made", recipe.load("coco_resnet152_bigru", [*SMALL, *changed]))
    done = export.export(reference, tmp_path / "out", "torch", tmp_path)
    check(reference, done.folder, torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8), len(WORDS))


def test_weights_alone_make_the_same_model(tmp_path: Path) -> None:
    reference = made(tmp_path / "made", recipe.load("digits_cnn_bigru", TINY_MODEL))
    done = export.export(reference, tmp_path / "out", "safetensors", tmp_path)
    assert (done.image_difference, done.text_difference) == (0, 0)
    assert (done.folder / checkpoint.WEIGHTS).read_bytes() == (reference.checkpoint / checkpoint.WEIGHTS).read_bytes()


@pytest.mark.parametrize("broken", ["weights", "not a number"])
def test_an_export_that_differs_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    reference = made(tmp_path / "made", recipe.load("digits_cnn_bigru", TINY_MODEL))
    real = export._read_weights

    def read(folder: Path) -> Any:
        images, texts = real(folder)
        with torch.no_grad():
            texts.prediction.slots[0, 0] += torch.nan if broken == "not a number" else 0.01  # type: ignore[attr-defined]
        return images, texts

    monkeypatch.setattr(export, "_read_weights", read)
    with pytest.raises(SetwiseError, match=r"differs from the model, and nothing of it is kept.*captions") as caught:
        export.export(reference, tmp_path / "out", "safetensors", tmp_path)
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_export_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = made(tmp_path / "made", recipe.load("digits_cnn_bigru", TINY_MODEL))

    def fails(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("expected 33")

    monkeypatch.setattr(export, "_read_weights", lambda folder: (fails, fails))
    with pytest.raises(SetwiseError, match=r"does not run on \(1, 3, 64, 64\) images .*expected 33"):
        export.export(reference, tmp_path / "out", "safetensors", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_model_that_torch_cannot_write_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = made(tmp_path / "made", recipe.load("digits_cnn_bigru", TINY_MODEL))

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("no such operator\nand more")

    monkeypatch.setattr(torch.export, "export", refuses)
    with pytest.raises(ConfigError, match=r"image encoder cannot .*'torch' \(ValueError: no such operator\).*safetens"):
        export.export(reference, tmp_path / "out", "torch", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_mistakes_are_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Reference("nowhere", tmp_path / "nowhere", None)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="--format is 'tflite'; it can be torch, onnx, safetensors"):
        export.export(nowhere, tmp_path / "out", "tflite", tmp_path)
    with pytest.raises(ConfigError, match="there: it exists already"):
        export.export(nowhere, tmp_path / "there", "torch", tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        export.export(nowhere, tmp_path / "out", "onnx", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ONNX needs onnx, onnxruntime, onnxscript.*setwise\[export\]"):
        export.export(nowhere, tmp_path / "out", "onnx", tmp_path)
