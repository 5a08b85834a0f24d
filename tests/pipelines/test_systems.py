"""Every system of the table: its recipes, and the whole way of one model of each, from training to an answer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from numpy.testing import assert_allclose

from setwise.models.config import ModelConfig
from setwise.models.set_prediction import SetEmbedding
from setwise.pipelines import evaluate, export, gallery, index, prepare, ranking, recipe, search, trained_model
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import Retrieval
from setwise.platform import config
from setwise.platform.errors import ConfigError
from tiny import TINY_MODEL
from trainings import start, train_run

DIGITS = [name for name in recipe.names() if name.startswith("digits")]
SYSTEMS = [name for name in DIGITS if isinstance(recipe.load(name).model, ModelConfig)]
PUBLISHED = [name for name in recipe.names() if not name.startswith("digits")]
SAID = re.compile(r"# \[(script|code|author|user|DDAN|deck|paper|virtex|method|differs|guess)\] ?(.*)")


def smaller(name: str) -> Recipe:
    """A digits recipe that trains in a second or two."""
    kind = recipe.load(name).retriever
    narrow = {
        "model.embed_size=16",
        "model.image_encoder.channels=[8, 8]",
        "train.batch_size=20",
        "train.epochs=2",
        "pretraining=null",
    }
    if kind.text_encoder.kind == "bigru":
        narrow.add("model.text_encoder.word_dim=8")
    if kind.set_prediction.kind == "slots":
        narrow |= {text for text in TINY_MODEL if text.startswith("model.set_prediction")}
    return recipe.load(name, sorted(narrow))


@pytest.fixture(scope="module")
def place(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of this file's own with the small data set."""
    folder = tmp_path_factory.mktemp("systems")
    shutil.copytree(store / "data", folder / "data")
    return folder


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request: pytest.FixtureRequest, place: Path) -> Iterator[Reference]:
    settings = smaller(request.param)
    training = start(place, f"system-{request.param}"[:60], settings)
    values = train_run(place, training, settings)
    assert all(torch.tensor(list(epoch.values())).isfinite().all() for epoch in values)
    yield Reference(training.name, training.best_checkpoint(), training)


def test_it_is_evaluated_searched_and_shown(trained: Reference, place: Path) -> None:
    outcome = evaluate.evaluate([trained], place)[0]
    assert 0 < outcome.values["rsum"] <= 600
    model = trained_model.load(trained.checkpoint)
    hits = search.search("a red three", trained, place, top=5).hits
    assert len(hits) == 5 and hits == sorted(hits, key=lambda hit: -hit.score)
    page = gallery.make(trained, place, queries=4)
    assert ("What each slot sees" in page) == (model.recipe.retriever.set_prediction.num_slots > 1) or (
        model.recipe.retriever.set_prediction.kind not in ("slots", "pie_net")
    )


def test_its_weights_are_exported_or_what_does_not_go_is_said(trained: Reference, place: Path, tmp_path: Path) -> None:
    done = export.export(trained, tmp_path / "exported", "safetensors", place)
    assert done.image_difference == done.text_difference == 0


def test_its_scores_are_its_similarity(trained: Reference, place: Path) -> None:
    """The engine of ranks and the module that training used agree."""
    model = trained_model.load(trained.checkpoint)
    sets = index.stored_or_made(model, prepare.open_prepared("digits", place), "val", place)
    images, texts, similarity = sets.image_sets[:6], sets.text_sets[:9], model.retrieval.similarity
    found = ranking.score_matrix([ranking.member(images, texts, similarity)])
    with torch.no_grad():
        assert_allclose(found, similarity(images, texts).numpy(), rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_two_systems_is_ranked(place: Path) -> None:
    references = []
    for name in ("digits_cnn_bigru", "digits_cnn_bigru_caan"):
        settings = smaller(name)
        training = start(place, f"ensemble-{name}", settings)
        train_run(place, training, settings)
        references.append(Reference(training.name, training.best_checkpoint(), training))
    (first, *_) = evaluate.evaluate(references, place)
    assert first.protocol["members"] == 2 and 0 < first.values["rsum"] <= 600


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_says_where_it_is_from(name: str) -> None:
    lines = recipe.find(name).read_text().splitlines()
    layer = config.read_yaml(recipe.find(name))
    silent = []
    for keys, spot in layer.places.items():
        value = layer.values
        for key in keys:
            value = value[key]
        if isinstance(value, dict) or keys == ("extends",):
            continue
        assert spot.line is not None
        said = SAID.search(lines[spot.line - 1])
        if said is None or (said[1] == "guess" and not said[2]):
            silent.append(lines[spot.line - 1])
    assert silent == []


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["similarity.kind=cross_attention"], "go together"),
        (["similarity.kind=csd"], "samples=0"),
        (["loss.kind=soft_contrastive"], "pcme"),
        (["model.set_prediction={kind: gaussian}", "similarity.kind=pcme"], "soft_contrastive"),
        (["model.set_prediction={kind: fragments}"], "go together"),
        (["model.set_prediction={kind: word_space}"], "word_mean"),
        (["loss={kind: hinge_rank}"], "word_space"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe.load("digits_cnn_bigru", overrides)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_batch_without_a_caption_or_without_an_image_is_refused_by_every_loss(name: str) -> None:
    system = trained_model.untrained(smaller(name), 20)
    assert isinstance(system, Retrieval)
    images = system.retriever.encode_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    texts = system.retriever.encode_texts(torch.ones(3, 4, dtype=torch.long), torch.tensor([4, 4, 1]))
    none = torch.zeros(0, dtype=torch.long)
    for sides, owners in (
        ((images, SetEmbedding(*(None if part is None else part[:0] for part in texts))), none),
        ((SetEmbedding(*(None if part is None else part[:0] for part in images)), texts), torch.zeros(3).long()),
    ):
        with pytest.raises(ValueError, match="there is nothing to compare"):
            system.loss(*sides, owners, 3.0)
    with pytest.raises(ValueError, match="owners must be a vector"):
        system.loss(images, texts, none, 3.0)
