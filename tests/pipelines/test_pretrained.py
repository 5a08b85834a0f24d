"""What a recipe names is where a training starts from, and is remembered with the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from setwise.models.retriever import SetRetriever
from setwise.pipelines import pretrained, recipe
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.vocabulary import SPECIAL, Vocabulary
from setwise.platform.errors import DataError

WORDS = Vocabulary((*SPECIAL, "red", "green", "three"))


def named(part: str, encoder: dict[str, Any]) -> Recipe:
    values = recipe.load("digits_cnn_bigru", ["model.embed_size=16", "model.text_encoder.word_dim=4"]).model_dump()
    values["model"][part] = encoder
    return Recipe.model_validate(values)


def started(settings: Recipe, folder: Path) -> tuple[SetRetriever, SetRetriever, dict[str, str]]:
    """A retriever before and after, and the tags."""
    systems = []
    for _ in range(2):
        torch.manual_seed(0)
        systems.append(Retrieval(settings, len(WORDS)))
    pretrained.locate(settings, folder)
    tags = pretrained.start(systems[1], settings, WORDS, Prepared(folder, {}), folder)
    return systems[0].retriever, systems[1].retriever, tags


def test_words_start_from_their_vectors_and_the_others_at_random(tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text("red 1 2 3 4\nblue 9 9 9 9\nthree 5 6 7 8\n")
    settings = named("text_encoder", {"kind": "bigru", "word_dim": 4, "word_vectors": str(file)})
    before, after, tags = started(settings, tmp_path)
    rows = after.text_encoder.embedding.weight
    assert rows[WORDS.ids["red"]].tolist() == [1, 2, 3, 4] and rows[WORDS.ids["three"]].tolist() == [5, 6, 7, 8]
    assert torch.equal(rows[WORDS.ids["green"]], before.text_encoder.embedding.weight[WORDS.ids["green"]])
    assert tags == {"setwise.word_vectors": f"{file}, 66.7% of the words found"}


def test_vectors_of_other_words_alone_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text("rouge 1 2 3 4\n")
    settings = named("text_encoder", {"kind": "bigru", "word_dim": 4, "word_vectors": str(file)})
    with pytest.raises(DataError, match="no word of the 8 in the vocabulary has a vector there"):
        started(settings, tmp_path)


def test_a_backbone_starts_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(7)
    weights = resnet18().state_dict()
    save_file(weights, tmp_path / "resnet18.safetensors")
    settings = named(
        "image_encoder",
        {"kind": "grid", "architecture": "resnet18", "weights": str(tmp_path / "resnet18.safetensors")},
    )
    before, after, tags = started(settings, tmp_path)
    assert torch.equal(after.image_encoder.backbone.conv1.weight, weights["conv1.weight"])
    assert not torch.equal(before.image_encoder.backbone.conv1.weight, weights["conv1.weight"])
    assert tags == {"setwise.image_weights": str(tmp_path / "resnet18.safetensors")}


def test_a_recipe_that_names_nothing_starts_at_random(tmp_path: Path) -> None:
    before, after, tags = started(recipe.load("digits_cnn_bigru", ["model.embed_size=16"]), tmp_path)
    assert tags == {}
    assert all(torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))
