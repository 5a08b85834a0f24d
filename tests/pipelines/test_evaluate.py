"""Evaluation of checkpoints: what is recorded and used again, ensembles, and the choice of benchmarks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import numpy as arrays

from setwise.models.loss_config import SimilarityConfig
from setwise.models.retriever import SetRetriever
from setwise.models.similarity import Similarity
from setwise.pipelines import (
    batches,
    benchmarks,
    evaluate,
    index,
    metrics,
    prepare,
    ranking,
    tables,
    trained_model,
)
from setwise.pipelines.embeddings import Embeddings, embed
from setwise.pipelines.ranking import Member
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.references import Reference
from setwise.pipelines.retrieval import Retrieval
from setwise.pipelines.trained_model import TrainedModel
from setwise.platform import checkpoint, run, seeding, storage
from setwise.platform.errors import ConfigError, DataError, DivergedError
from setwise.platform.run import Run


@pytest.fixture
def place(store: Path, tmp_path: Path) -> Path:
    """A store of one's own with the small data set."""
    shutil.copytree(store / "data", tmp_path / "data")
    return tmp_path


def untrained(place: Path, recipe: Recipe, name: str, seed: int = 0) -> Reference:
    """A run whose best checkpoint has random weights."""
    prepared = prepare.open_prepared("digits", place)
    words = batches.open_words(recipe, prepared)
    seeding.seed_everything(seed)
    retrieval = Retrieval(recipe, len(words))
    made = Run(place / "runs" / name)
    storage.write_bytes(made.config, b"a: 1\n")
    metadata = {"epoch": 1, "recipe": recipe.model_dump(mode="json"), "vocabulary": list(words.words)}
    checkpoint.save(made.checkpoints / "epoch_0001", retrieval.state_dict(), metadata, None)
    return Reference(name, made.checkpoints / "epoch_0001", made)


@torch.inference_mode()
def matrix(model: TrainedModel, sets: Embeddings) -> NDArray[np.float64]:
    """All scores of a split."""
    found: NDArray[np.float64] = model.retrieval.similarity(sets.image_sets.double(), sets.text_sets.double()).numpy()
    return found


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("was measured again")


def test_each_image_is_encoded_once_and_what_is_recorded_is_not_measured_again(
    place: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, captions = [], []
    encode_images, encode_texts = SetRetriever.encode_images, SetRetriever.encode_texts

    def counted_images(self: SetRetriever, pixels: torch.Tensor, *more: Any) -> Any:
        images.append(len(pixels))
        return encode_images(self, pixels, *more)

    def counted_texts(self: SetRetriever, tokens: torch.Tensor, *more: Any) -> Any:
        captions.append(len(tokens))
        return encode_texts(self, tokens, *more)

    monkeypatch.setattr(SetRetriever, "encode_images", counted_images)
    monkeypatch.setattr(SetRetriever, "encode_texts", counted_texts)
    reference = untrained(place, tiny_recipe, "one")
    first = evaluate.evaluate([reference], place)
    assert [outcome.benchmark for outcome in first] == ["digits_1k", "digits_5k", "digits_extended"]
    assert (sum(images), sum(captions)) == (50, 250)

    assert reference.run is not None
    events = run.read_events(reference.run.events)
    monkeypatch.setattr(ranking, "count_ahead", forbidden)
    again = evaluate.evaluate([reference], place)
    assert [outcome.to_json() for outcome in again] == [outcome.to_json() for outcome in first]
    assert all(again[1].ranks["i2t"].ranks == first[1].ranks["i2t"].ranks)
    assert run.read_events(reference.run.events) == events and sum(images) == 50
    kept = evaluate.ranks(reference.run, "digits_5k")["t2i"]
    assert kept.ranks.dtype == np.int32 and len(kept.ids) == 250
    assert np.floor(np.median(kept.ranks)) == first[1].values["t2i_median_rank"]
    (extended,) = [one for one in evaluate.recorded(reference.run) if one.benchmark == "digits_extended"]
    with_queries = evaluate.with_queries(reference.run, extended)
    for direction, found in with_queries.ranks.items():
        for name, kept_of in (("map_at_r", found.average_precision), ("r_precision", found.r_precision)):
            assert kept_of is not None and kept_of.dtype == np.float32
            assert 100 * kept_of.mean() == pytest.approx(extended.values[f"{direction}_{name}"], rel=1e-5)


def test_a_benchmark_that_is_missing_or_damaged_is_measured_alone(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    folder = reference.run.evaluation if reference.run else place
    (only,) = evaluate.evaluate([reference], place, names=["digits_5k"])
    assert {path.name for path in folder.iterdir()} == {"digits_5k.json", "digits_5k.safetensors"}
    every = evaluate.evaluate([reference], place)
    assert every[1].to_json() == only.to_json() and len(list(folder.iterdir())) == 6
    (folder / "digits_1k.safetensors").write_bytes(b"half")
    assert [one.to_json() for one in evaluate.evaluate([reference], place)] == [one.to_json() for one in every]
    assert evaluate.ranks(reference.run, "digits_1k")["i2t"].ids.shape == (50,)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b'{"benchmark": "digits_5k", "val', b"[]", b'{"weights": 1}', b"\xff"])
def test_a_damaged_record_is_measured_again_and_until_then_refused(
    place: Path, tiny_recipe: Recipe, content: bytes
) -> None:
    reference = untrained(place, tiny_recipe, "one")
    assert reference.run is not None
    every = evaluate.evaluate([reference], place)
    file = reference.run.evaluation / "digits_5k.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"digits_5k\.json: damaged\. Delete it, and measure again: setwise eval one"):
        evaluate.recorded(reference.run)
    assert [one.to_json() for one in evaluate.evaluate([reference], place)] == [one.to_json() for one in every]
    file.write_bytes(content)
    evaluate.evaluate([reference], place, names=["digits_1k"], ties="official")
    assert len(evaluate.recorded(reference.run)) == 3, "what is left of a damaged one went"


def test_whoever_is_stopped_before_the_events_are_written_has_recorded_nothing(
    place: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = untrained(place, tiny_recipe, "one")
    assert reference.run is not None
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Outbox", forbidden)
        with pytest.raises(AssertionError):
            evaluate.evaluate([reference], place, names=["digits_5k"])
    evaluate.evaluate([reference], place, names=["digits_5k"])
    events = run.read_events(reference.run.events)
    assert [event["kind"] for event in events] == ["metrics", "tags"]


def test_a_record_of_an_earlier_version_is_shown_and_measured_again(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    assert reference.run is not None
    (new,) = evaluate.evaluate([reference], place, names=["digits_5k"])
    file = reference.run.evaluation / "digits_5k.json"
    content = storage.read_json(file)
    del content["ties"], content["protocol"]["members"]
    storage.write_json(file, content | {"values": {"rsum": 1.0}})
    assert evaluate.recorded(reference.run)[0].values == {"rsum": 1.0}
    assert evaluate.evaluate([reference], place, names=["digits_5k"])[0].values == new.values
    assert storage.read_json(file)["ties"] == "pessimistic"


def test_what_another_version_kept_of_each_query_is_measured_again(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    assert reference.run is not None
    (new,) = evaluate.evaluate([reference], place, names=["digits_5k"])
    file = reference.run.evaluation / "digits_5k.safetensors"
    tensors = arrays.load_file(file)
    less = {name: values for name, values in tensors.items() if not name.endswith(".images")}
    for kept in ({}, less, tensors | {"i2t.later": tensors["i2t.ids"]}):
        file.write_bytes(arrays.save(kept))
        with pytest.raises(DataError, match="another version kept other things of a query; measure again: "):
            evaluate.with_queries(reference.run, new)
        evaluate.evaluate([reference], place, names=["digits_5k"])
        assert all(np.array_equal(values, tensors[name]) for name, values in arrays.load_file(file).items())


def test_what_was_kept_of_other_weights_goes_when_new_ones_are_measured(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    assert reference.run is not None
    every = evaluate.evaluate([reference], place)
    for file in reference.run.evaluation.glob("*.json"):
        storage.write_json(file, storage.read_json(file) | {"weights": "before", "values": {"rsum": 600}})
    (only,) = evaluate.evaluate([reference], place, names=["digits_5k"])
    assert only.to_json() == every[1].to_json()
    assert [one.to_json() for one in evaluate.recorded(reference.run)] == [only.to_json()]
    assert {path.name for path in reference.run.evaluation.iterdir()} == {"digits_5k.json", "digits_5k.safetensors"}


def test_the_authors_order_of_ties_is_kept_beside_and_not_over_the_values(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    usual = evaluate.evaluate([reference], place)
    official = evaluate.evaluate([reference], place, ties="official")
    assert [one.benchmark for one in official] == [f"{one.benchmark}.official_ties" for one in usual]
    assert all(one.protocol["ties"] == "official" for one in official)
    assert not {one.fingerprint for one in official} & {one.fingerprint for one in usual}
    assert [one.to_json() for one in evaluate.evaluate([reference], place)] == [one.to_json() for one in usual]
    assert reference.run is not None and len(evaluate.recorded(reference.run)) == 6


def test_an_ensemble_averages_scores_and_is_recorded_with_nobody(place: Path, tiny_recipe: Recipe) -> None:
    sharper = tiny_recipe.model_copy(update={"similarity": tiny_recipe.similarity.model_copy(update={"alpha": 4})})
    both = [untrained(place, tiny_recipe, "one", 1), untrained(place, sharper, "two", 2)]
    together = evaluate.evaluate(both, place, names=["digits_5k"])[0]
    prepared = prepare.open_prepared("digits", place)
    matrices = []
    for reference in both:
        model = trained_model.load(reference.checkpoint)
        sets = index.stored(model, prepared, "test", place)
        assert sets is not None
        matrices.append(matrix(model, sets))
        assert reference.run is not None and evaluate.recorded(reference.run) == []
    owners = np.repeat(np.arange(50), 5)
    scores = (sum(matrices) / 2).astype(np.float32)
    expected = metrics.retrieval_metrics(scores, owners[None, :] == np.arange(50)[:, None])
    assert together.values == pytest.approx(expected)
    assert together.protocol["members"] == 2
    assert [one["alpha"] for one in together.protocol["similarity"]] == [tiny_recipe.similarity.alpha, 4]


def test_a_model_is_no_ensemble_with_itself(place: Path, tiny_recipe: Recipe) -> None:
    one, copy = (untrained(place, tiny_recipe, name) for name in ("one", "copy"))
    for other in (one, copy):
        with pytest.raises(ConfigError, match=f"one and {other.label} are one model"):
            evaluate.evaluate([one, other], place)
    sharper = tiny_recipe.model_copy(update={"similarity": tiny_recipe.similarity.model_copy(update={"alpha": 4})})
    assert evaluate.evaluate([one, untrained(place, sharper, "sharper")], place, names=["digits_5k"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_refused(place: Path, tiny_recipe: Recipe, value: float) -> None:
    reference = untrained(place, tiny_recipe, "one")
    model, prepared = trained_model.load(reference.checkpoint), prepare.open_prepared("digits", place)
    for parameter in model.retrieval.parameters():
        parameter.detach().fill_(value)
    with pytest.raises(DivergedError, match="validation: an embedding is NaN"):
        model.retrieval.validate(index.open_split(model, prepared, "val"), 50, model.device)
    metadata = {name: content for name, content in model.metadata.items() if name != "weights_sha256"}
    shutil.rmtree(reference.checkpoint)
    checkpoint.save(reference.checkpoint, model.retrieval.state_dict(), metadata, None)
    with pytest.raises(DivergedError, match="The model has diverged"):
        evaluate.evaluate([reference], place)


def test_members_of_an_ensemble_read_the_same_data(place: Path, tiny_recipe: Recipe) -> None:
    other = tiny_recipe.model_copy(update={"data": tiny_recipe.data.model_copy(update={"name": "birds"})})
    both = [untrained(place, tiny_recipe, "one"), untrained(place, other, "two")]
    with pytest.raises(ConfigError, match="one reads data set 'digits' and two 'birds'"):
        evaluate.evaluate(both, place)


def test_an_unknown_benchmark_is_refused_with_the_nearest(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    with pytest.raises(ConfigError, match=r"no benchmark is called 'digits5k'\. Did you mean 'digits_5k'\?"):
        evaluate.evaluate([reference], place, names=["digits5k"])


def test_what_the_data_has_no_truth_for_is_left_out_and_if_asked_for_by_name_refused(
    place: Path, tiny_recipe: Recipe
) -> None:
    shutil.rmtree(place / "data" / "digits" / "prepared" / "extended_positives")
    reference = untrained(place, tiny_recipe, "one")
    said: list[str] = []
    measured = evaluate.evaluate([reference], place, say=said.append)
    assert [one.benchmark for one in measured] == ["digits_1k", "digits_5k"]
    assert said == ["digits_extended: left out, since the data set has no extended positives"]
    with pytest.raises(DataError, match="digits_extended cannot be measured on the test split"):
        evaluate.evaluate([reference], place, names=["digits_5k", "digits_extended"])


def test_ratings_are_looked_for_and_their_place_is_said(
    place: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small data set posing as the beginning of COCO's test split."""
    from setwise.pipelines import positives

    truth = json.loads((positives.package_data() / positives.TEST_CAPTIONS).read_bytes())
    test = np.load(positives.package_data() / "coco_test_ids.npy", allow_pickle=False)[:250]
    stored = index.stored_or_made

    def as_coco(*arguments: Any) -> Embeddings:
        sets = stored(*arguments)
        images = torch.tensor([truth[str(caption)][0] for caption in test[::5]])
        return Embeddings(sets.image_sets, sets.text_sets, images, torch.from_numpy(test), owners=sets.owners)

    monkeypatch.setattr(index, "stored_or_made", as_coco)
    monkeypatch.setattr(benchmarks, "family", lambda dataset: "coco")
    reference = untrained(place, tiny_recipe, "one")
    said: list[str] = []
    (without,) = evaluate.evaluate([reference], place, names=["cxc"], say=said.append)
    assert set(without.values) == {f"{direction}_R{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)}
    assert len(said) == 1 and str(place / "data" / "cxc") in said[0]
    shutil.copytree(Path(__file__).parent.parent / "golden" / "cxc", place / "data" / "cxc")
    (whole,) = evaluate.evaluate([reference], place, names=["cxc"], say=said.append)
    assert {"t2t_R1", "i2i_R1", "sits_spearman"} <= set(whole.values) and len(said) == 1
    monkeypatch.setattr(ranking, "count_ahead", forbidden)
    assert evaluate.evaluate([reference], place, names=["cxc"], cxc=place / "data" / "cxc")[0] == whole
    shown = tables.outcome(whole)
    from rich.console import Console

    console = Console(width=150)
    with console.capture() as printed:
        console.print(shown)
    assert "text to text" in printed.get() and "SITS (image and text), Spearman with the ratings:" in printed.get()
    shutil.rmtree(place / "data" / "cxc")
    assert evaluate.evaluate([reference], place, names=["cxc"])[0] == whole, "without ratings, those with them stay"
    with pytest.raises(DataError, match="neither sts_test"):
        evaluate.evaluate([reference], place, names=["cxc"], cxc=place / "data" / "digits")


@pytest.mark.parametrize("damage", ["cut", "flipped", "no hash"])
def test_a_damaged_index_is_noticed_and_made_again(place: Path, tiny_recipe: Recipe, damage: str) -> None:
    reference = untrained(place, tiny_recipe, "one")
    model, prepared = trained_model.load(reference.checkpoint), prepare.open_prepared("digits", place)
    made = index.stored_or_made(model, prepared, "test", place)
    (file,) = (place / "index").glob("*/embeddings.safetensors")
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-100])
    elif damage == "flipped":
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 16]) + data[-8:])
    else:
        file.with_name("embeddings.sha256").unlink()
    assert index.stored(model, prepared, "test", place) is None
    again = index.stored_or_made(model, prepared, "test", place)
    assert torch.equal(again.image_sets, made.image_sets) and torch.equal(again.text_sets, made.text_sets)
    assert file.read_bytes() == data and index.stored(model, prepared, "test", place) is not None


def test_validation_gives_the_values_of_the_whole_matrix(place: Path, tiny_recipe: Recipe) -> None:
    reference = untrained(place, tiny_recipe, "one")
    model, prepared = trained_model.load(reference.checkpoint), prepare.open_prepared("digits", place)
    split = index.open_split(model, prepared, "val")
    values = model.retrieval.validate(split, 7, model.device)
    sets = embed(model.retrieval.retriever, split, 7, model.device)
    owners = sets.owners.numpy()
    scores = matrix(model, sets).astype(np.float32)
    expected = metrics.retrieval_metrics(scores, owners[None, :] == np.arange(30)[:, None])
    assert {name: values[f"val/{name}"] for name in expected} == pytest.approx(expected)


def test_the_same_ids_with_other_captions_are_another_protocol() -> None:
    sets = torch.nn.functional.normalize(torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    member = Member(sets, sets, Similarity(SimilarityConfig()))
    ids = np.arange(10)
    one, other = (benchmarks.Encoded((member,), ids, ids, ids, texts) for texts in ("this", "that"))
    published = benchmarks.Encoded((member,), ids, ids, ids)
    assert one.protocol("pessimistic") != other.protocol("pessimistic")
    assert "texts" not in published.protocol("pessimistic")
    assert benchmarks.has_published_ids("coco_butd") and benchmarks.has_published_ids("f30k")
    assert not benchmarks.has_published_ids("digits") and not benchmarks.has_published_ids("birds")
