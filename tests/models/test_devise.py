"""DeViSE: means of word vectors that stand still, one linear map, the loss term by term, and a short training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import devise as naive
from setwise.models.config import ModelConfig
from setwise.models.devise import WordMean, WordSpace, hinge_rank
from setwise.models.loss_config import HingeRankConfig, SimilarityConfig
from setwise.models.objective import loss_of_batch
from setwise.models.retriever import SetRetriever
from setwise.models.set_prediction import Features, SetEmbedding
from setwise.models.similarity import Similarity
from setwise.pipelines import recipe
from setwise.platform import checkpoint
from tiny import TINY_MODEL
from trainings import start, train_run

LOSS = HingeRankConfig(kind="hinge_rank", margin=0.1)
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2])
TOKENS, LENGTHS = torch.tensor([[5, 2, 2, 7], [4, 3, 0, 0], [6, 0, 0, 0]]), torch.tensor([4, 2, 1])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def words(vectors: Tensor) -> WordMean:
    module = WordMean(*vectors.shape).double()
    module.set_vectors(vectors)
    return module


def test_a_caption_is_the_mean_of_its_words_at_length_one() -> None:
    vectors = random(1, 8, 6)
    found = words(vectors)(TOKENS, LENGTHS)
    assert found.is_padding is not None
    for b, length in enumerate(LENGTHS.tolist()):
        expected = naive.caption(vectors.numpy(), TOKENS[b, :length].tolist())
        np.testing.assert_allclose(found.pooled[b], expected, rtol=0, atol=1e-12)
        for n, token in enumerate(TOKENS[b].tolist()):
            unit = vectors[token] / vectors[token].norm() if n < length else torch.zeros(6).double()
            torch.testing.assert_close(found.local[b, n], unit, rtol=0, atol=1e-12)
    assert torch.equal(found.is_padding, TOKENS == 0)


def test_vectors_stand_still_and_are_saved() -> None:
    module = words(random(1, 8, 6))
    assert not list(module.parameters()) and list(module.state_dict()) == ["vectors"]
    assert not module(TOKENS, LENGTHS).pooled.requires_grad
    first = WordMean(8, 6)
    torch.testing.assert_close(first.vectors.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_caption_depends_neither_on_padding_nor_on_the_captions_beside_it(dtype: torch.dtype) -> None:
    module = words(random(1, 8, 6)).to(dtype)
    whole = module(TOKENS, LENGTHS).pooled
    padded = torch.cat((TOKENS, torch.full((3, 40), 6)), 1)  # a word that lengths say is not there
    atol = torch.finfo(dtype).eps
    torch.testing.assert_close(module(padded, LENGTHS).pooled, whole, rtol=0, atol=atol)
    for b, length in enumerate(LENGTHS.tolist()):
        alone = module(TOKENS[b : b + 1, :length], LENGTHS[b : b + 1]).pooled
        torch.testing.assert_close(alone, whole[b : b + 1], rtol=0, atol=atol)
    assert module(TOKENS[:0], LENGTHS[:0]).pooled.shape == (0, 6)


def test_words_without_a_vector_say_nothing_and_captions_of_them_alone_are_the_mean_of_all() -> None:
    vectors = random(1, 8, 6)
    vectors[[2, 6]] = 0
    found = words(vectors)(TOKENS, LENGTHS).pooled
    np.testing.assert_allclose(found[0], naive.caption(vectors.numpy(), [5, 7]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[2], naive.caption(vectors.numpy(), [1, 3, 4, 5, 7]), rtol=0, atol=1e-12)
    opposite = torch.zeros(8, 6).double()
    opposite[1], opposite[2] = vectors[1], -vectors[1]
    cancelled = words(opposite)(torch.tensor([[1, 2]]), torch.tensor([2])).pooled
    assert cancelled.norm().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(8, 5), r"shape \(8, 5\), expected \(8, 6\)"),
        (torch.zeros(8, 6), "no word has a vector"),
        (torch.full((8, 6), math.nan), "not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vectors: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordMean(8, 6).set_vectors(vectors)


def test_an_image_goes_through_one_linear_map_and_a_caption_stays() -> None:
    torch.manual_seed(0)
    image, text = WordSpace(6, "image").double(), WordSpace(6, "text")
    features = Features(torch.full((3, 2, 6), math.nan), random(2, 3, 6))
    (weight,) = image.parameters()
    found = image(features)
    for b in range(3):
        mapped = torch.stack([(row * features.pooled[b]).sum() for row in weight])
        torch.testing.assert_close(found.slots[b, 0], mapped, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sets[b, 0], mapped / mapped.norm(), rtol=0, atol=1e-12)
    assert torch.equal(text(features).slots[:, 0], features.pooled) and not list(text.parameters())


def sides() -> tuple[Tensor, SetEmbedding]:
    """Mapped images of various lengths, and captions that resemble them."""
    images = random(3, 3, 6)
    texts = torch.nn.functional.normalize(images[OWNERS] + random(4, 6, 6), dim=-1)[:, None]
    return images, SetEmbedding(texts, texts)


def test_the_loss_is_the_sum_over_the_other_captions() -> None:
    images, texts = sides()
    embedding = SetEmbedding(torch.full((3, 1, 6), math.nan), images[:, None])
    parts = hinge_rank(embedding, texts, OWNERS, LOSS)
    expected = naive.hinge_rank(images.numpy(), texts.sets[:, 0].numpy(), OWNERS.tolist(), 0.1)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx({"total": expected})
    assert expected > 0.1
    similarity = Similarity(SimilarityConfig(kind="cosine"))
    assert loss_of_batch(embedding, texts, OWNERS, similarity, LOSS, 3.0)["total"].item() == pytest.approx(expected)


def test_the_gradient_of_the_loss_is_that_of_differences() -> None:
    images, texts = sides()

    def loss(mapped: Tensor) -> Tensor:
        return hinge_rank(SetEmbedding(mapped, mapped), texts, OWNERS, LOSS)["total"]

    assert torch.autograd.gradcheck(loss, images[:, None].requires_grad_())


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    images, texts = sides()
    both = SetEmbedding(images[:, None].float(), images[:, None].float()), SetEmbedding(*(x.float() for x in texts[:2]))
    expected = hinge_rank(*both, OWNERS, LOSS)["total"]
    with torch.autocast("cpu", torch.bfloat16):
        found = hinge_rank(*both, OWNERS, LOSS)["total"]
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_owners_that_do_not_fit_are_refused() -> None:
    images, texts = sides()
    with pytest.raises(ValueError, match="each of the 6 captions"):
        hinge_rank(SetEmbedding(images[:, None], images[:, None]), texts, OWNERS[:5], LOSS)


@pytest.mark.parametrize(
    ("global_feature", "text", "sets", "message"),
    [
        ("projected", "word_mean", "slots", "go together"),
        ("projected", "bigru", "word_space", "go together"),
        ("linear", "word_mean", "word_space", "projection='none'"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(global_feature: str, text: str, sets: str, message: str) -> None:
    values = {
        "image_encoder": {"kind": "butd", "head": {"global_feature": global_feature}},
        "text_encoder": {"kind": text},
        "set_prediction": {"kind": sets},
    }
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(values)


def test_a_small_model_learns_through_the_loop_and_keeps_its_word_vectors(store: Path) -> None:
    small = [setting for setting in TINY_MODEL if "set_prediction" not in setting and "word_dim" not in setting]
    settings = recipe.load("digits_cnn_words_devise", small)
    training = start(store, "devise-learns", settings)
    epochs = train_run(store, training, settings)
    assert epochs[-1]["train/total"] < epochs[0]["train/total"] and math.isfinite(epochs[-1]["val/rsum"])
    saved = [checkpoint.weights(folder) for folder in sorted(training.checkpoints.iterdir())]
    names = [name for name in saved[0] if name.endswith("text_encoder.vectors")]
    assert len(names) == 1 and len(saved) > 1
    assert all(torch.equal(weights[names[0]], saved[0][names[0]]) for weights in saved)
    torch.manual_seed(0)
    at_random = SetRetriever(settings.retriever, len(saved[0][names[0]])).text_encoder.vectors
    assert not torch.allclose(saved[0][names[0]], at_random)
    assert "captions" in training.events.read_text() and "setwise.word_vectors" in training.events.read_text()
