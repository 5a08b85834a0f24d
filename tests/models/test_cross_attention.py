"""CAAN: the steps as written, padding that takes no part, bounded memory, and a short training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reference import cross_attention as naive
from setwise.models import cross_attention
from setwise.models.config import FragmentsConfig, ModelConfig
from setwise.models.cross_attention import CrossAttention, Fragments, triplet_of_scores
from setwise.models.loss_config import Negatives, SimilarityConfig, TripletConfig
from setwise.models.objective import loss_of_batch, similarity_of
from setwise.models.set_prediction import Features, SetEmbedding
from setwise.models.similarity import Similarity
from setwise.pipelines import query_ranks, ranking, recipe
from setwise.platform.errors import DivergedError
from tiny import TINY_MODEL
from trainings import start, train_run

CONFIG = SimilarityConfig(kind="cross_attention")
DIM = 8
IS_PADDING = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)


def attention() -> CrossAttention:
    """With a matrix that is no identity, and weights large enough to tell fragments apart."""
    torch.manual_seed(0)
    module = CrossAttention(CONFIG, DIM).double()
    with torch.no_grad():
        module.affinity += torch.randn(DIM, DIM)
        for layer in (module.image_weight, module.text_weight):
            layer.weight *= 5
    return module


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fragments(seed: int, lengths: list[int], num: int) -> Tensor:
    """Unit vectors; of each sample so many, and then zeros."""
    units = F.normalize(random(seed, len(lengths), num, DIM), dim=-1)
    return units * (torch.arange(num) < torch.tensor(lengths)[:, None])[..., None]


IMAGES, TEXTS = fragments(1, [4, 2, 3], 4), fragments(2, [5, 1, 3, 2, 5], 5)


@pytest.mark.parametrize("pairs", [2, 512])
@pytest.mark.parametrize("texts", [5, 2])
def test_agrees_with_the_steps_written_out_in_scores_and_gradients(
    texts: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are fewer images, by one image after another; where there are fewer captions, by one caption."""
    monkeypatch.setattr(cross_attention, "PAIRS", pairs)
    module, leaves = attention(), [IMAGES.clone().requires_grad_(), TEXTS[:texts].clone().requires_grad_()]
    found, expected = module(*leaves), naive.scores(module, *leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.std() > 0.05
    wanted, slope = [*leaves, *module.parameters()], random(3, 3, texts)
    ours, theirs = (torch.autograd.grad(scores, wanted, slope) for scores in (found, expected))
    real = [leaf.any(-1) for leaf in leaves]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # What stands at padding is a constant: Fragments put it there.
        a, b = (x[real[number]] if number < 2 else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert a.any()


def test_gradients_are_those_of_differences() -> None:
    module = attention()
    names = [name for name, _ in module.named_parameters()]

    def scores(images: Tensor, texts: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (images, texts))

    def without_checkpoint(*inputs: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross_attention, "checkpoint", lambda function, *arguments, **_: function(*arguments))
            return scores(*inputs)

    full = [x[:2, :2].clone().requires_grad_() for x in (IMAGES[[0, 2]], TEXTS[[0, 4]])]
    inputs = (*full, *(parameter.detach().clone().requires_grad_() for parameter in module.parameters()))
    assert torch.autograd.gradcheck(without_checkpoint, inputs)


@pytest.mark.parametrize(("images", "texts"), [(700, 1), (1, 700), (9, 4), (4, 9), (5, 5)])
def test_few_of_either_side_take_few_steps_and_a_score_is_that_of_the_pair_alone(
    images: int, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, sizes = attention().float(), []
    once = module._scores

    def counted(*inputs: Any) -> Tensor:
        sizes.append(len(inputs[-1]))
        return once(*inputs)

    image_sets, text_sets = (fragments(7, [3] * images, 4).float(), fragments(8, [2] * texts, 5).float())
    alone = [module(image_sets[i : i + 1], text_sets[t : t + 1]) for i in range(images) for t in range(texts)]
    monkeypatch.setattr(module, "_scores", counted)
    found = module(image_sets, text_sets)
    steps = min(images, texts) * -(-max(images, texts) // cross_attention.PAIRS)
    assert len(sizes) == steps and max(sizes) <= cross_attention.PAIRS and sum(sizes) == images * texts
    torch.testing.assert_close(found.flatten(), torch.cat(alone).flatten(), rtol=0, atol=1e-6)


def test_padding_takes_no_part_wherever_it_stands_and_order_says_nothing() -> None:
    module = attention()
    expected = module(IMAGES, TEXTS)
    few = module(IMAGES, TEXTS[:2])
    torch.testing.assert_close(few, expected[:, :2], rtol=0, atol=1e-12)
    more = torch.zeros(5, 9, DIM, dtype=torch.float64)
    places = torch.tensor([7, 0, 3, 8, 4])
    more[:, places] = TEXTS
    torch.testing.assert_close(module(IMAGES.flip(1), more), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(IMAGES.flip(1), more[:2]), few, rtol=0, atol=1e-12)
    shorter = module(IMAGES[1:2, :2], TEXTS[3:4, :2])
    torch.testing.assert_close(shorter, expected[1:2, 3:4], rtol=0, atol=1e-12)


def test_a_side_without_any_fragment_scores_zero_and_has_a_finite_gradient() -> None:
    module, images = attention(), torch.zeros(1, 4, DIM, dtype=torch.float64, requires_grad=True)
    scores = module(images, torch.cat((TEXTS, torch.zeros(1, 5, DIM, dtype=torch.float64))))
    assert torch.equal(scores, torch.zeros(1, 6, dtype=torch.float64))
    by_caption = module(torch.cat((images, IMAGES)), torch.zeros_like(images[:, :3]))
    assert torch.equal(by_caption, torch.zeros(4, 1, dtype=torch.float64))
    for one in (scores, by_caption):
        gradients = torch.autograd.grad(one.sum(), [images, *module.parameters()])
        assert all(x.isfinite().all() for x in gradients)


def test_no_image_or_no_caption_is_an_empty_matrix() -> None:
    module = attention()
    assert module(IMAGES[:0], TEXTS).shape == (0, 5) and module(IMAGES, TEXTS[:0]).shape == (3, 0)
    assert module(IMAGES[:0], TEXTS[:0]).shape == (0, 0)


def test_scores_are_inner_products_of_means_of_unit_vectors() -> None:
    module = attention()
    scores = module(IMAGES, TEXTS)
    assert (scores.abs() <= 1).all()
    # Of one fragment each, nothing is left to attend to.
    one = module(IMAGES[:, :1], TEXTS[:, :1])
    torch.testing.assert_close(one, IMAGES[:, 0] @ TEXTS[:, 0].T, rtol=0, atol=1e-12)


def test_starts_with_cosines_as_affinities() -> None:
    module = similarity_of(CONFIG, DIM)
    assert isinstance(module, CrossAttention) and not module.of_dot_products
    assert torch.equal(module.affinity, torch.eye(DIM))
    with pytest.raises(ValueError, match="no function of cosines"):
        Similarity(CONFIG).of_cosines(torch.zeros(1, 1, 1, 1))


def test_autocast_and_half_precision_change_nothing_but_the_rounding_of_the_sets() -> None:
    module, sets = attention().float(), (IMAGES.float(), TEXTS.float())
    expected = module(*sets)
    leaves = [x.clone().requires_grad_() for x in sets]
    with torch.autocast("cpu", torch.bfloat16):
        found = module(*leaves)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    found.sum().backward()  # where the blocks are computed again, outside of autocast's scope
    again = [x.clone().requires_grad_() for x in sets]
    module(*again).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, again, strict=True))
    torch.testing.assert_close(module(*(x.bfloat16() for x in sets)), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("fewer", ["images", "texts"])
def test_memory_of_a_step_does_not_grow_with_the_number_of_steps(fewer: str) -> None:
    """Kept for the backward pass is what enters the blocks, and nothing of their insides."""
    module = attention()

    def kept(steps: int) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        images, texts = (steps, 100) if fewer == "images" else (100, steps)
        inputs = (x[:1].repeat(n, 1, 1).requires_grad_() for x, n in ((IMAGES, images), (TEXTS, texts)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module(*inputs)
        return sum(sizes.values())

    growth = (kept(9) - kept(1)) / 8
    insides = 8 * 100 * 4 * 5  # the affinities of one step alone
    assert growth < insides / 4


def features(local: Tensor, is_padding: Tensor | None = None) -> Features:
    return Features(local, torch.full((len(local), DIM), math.nan, dtype=local.dtype), is_padding)


def words(max_words: int = 4, input_dim: int = 6) -> Fragments:
    torch.manual_seed(0)
    return Fragments(FragmentsConfig(kind="fragments", max_words=max_words), DIM, input_dim, "text").double()


@pytest.mark.parametrize(("max_words", "input_dim"), [(4, 6), (7, 6), (5, DIM)])
def test_fragments_are_unit_vectors_or_zeros_of_one_shape(max_words: int, input_dim: int) -> None:
    module, local = words(max_words, input_dim), random(4, 3, 5, input_dim)
    sets, slots, *_ = module(features(local, IS_PADDING))
    assert sets.shape == (3, max_words, DIM) and slots is sets
    weights = list(module.parameters())
    assert bool(weights) == (input_dim != DIM)
    for b in range(3):
        for n in range(max_words):
            if n >= 5 or IS_PADDING[b, n]:
                assert not sets[b, n].any()
            else:
                projected = weights[0] @ local[b, n] + weights[1] if weights else local[b, n]
                torch.testing.assert_close(sets[b, n], projected / projected.norm(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
def test_what_stands_at_padding_reaches_neither_fragments_nor_gradients(garbage: float) -> None:
    results = []
    for value in (0.0, garbage):
        module, local = words(), random(4, 3, 5, 6).masked_fill(IS_PADDING[..., None], value).requires_grad_()
        sets = module(features(local, IS_PADDING)).sets
        results.append([sets, *torch.autograd.grad(sets, [local, *module.parameters()], random(5, 3, 4, DIM))])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and clean.isfinite().all()


def test_images_keep_the_number_of_their_cells_and_captions_do_not_depend_on_their_batch() -> None:
    image = Fragments(FragmentsConfig(kind="fragments", max_words=2), DIM, DIM, "image").double()
    assert image(features(random(4, 3, 5, DIM))).sets.shape == (3, 5, DIM)
    module, local = words(), random(4, 3, 5, 6)
    whole = module(features(local, IS_PADDING)).sets
    alone = module(features(local[:1, :4], IS_PADDING[:1, :4])).sets
    torch.testing.assert_close(alone, whole[:1], rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        half = module.float()(features(local.float(), IS_PADDING)).sets
    assert torch.equal(half.any(-1), whole.any(-1))
    torch.testing.assert_close(half.double(), whole, rtol=0, atol=0.02)


@pytest.mark.parametrize("negatives", [name for name in get_args(Negatives) if name != "semi_hard"])
@pytest.mark.parametrize("owners", [[0, 0, 1, 2, 2], [1, 1, 1, 1, 1]])
def test_the_triplet_loss_is_the_sum_of_one_pair_after_another(negatives: Negatives, owners: list[int]) -> None:
    scores = random(6, 3, 5).div(4).requires_grad_()
    parts = triplet_of_scores(scores, torch.tensor(owners), TripletConfig(margin=0.2), negatives)
    expected = naive.triplet(scores.tolist(), owners, 0.2, negatives)
    assert set(parts) == {"i2t", "t2i", "total"}
    assert (parts["i2t"].item(), parts["t2i"].item()) == pytest.approx(expected, abs=1e-12)
    assert parts["total"].item() == pytest.approx(sum(expected), abs=1e-12)
    assert expected[1] > 0
    config, places = TripletConfig(margin=0.2), torch.tensor(owners)
    assert torch.autograd.gradcheck(lambda x: triplet_of_scores(x, places, config, negatives)["total"], scores)


def test_the_loss_of_a_batch_takes_all_pairs() -> None:
    sides = (SetEmbedding(IMAGES, IMAGES), SetEmbedding(TEXTS, TEXTS))
    owners, config = torch.tensor([0, 0, 1, 2, 2]), TripletConfig(negatives="hardest", all_negatives_epochs=1)
    module = attention()
    for epoch, negatives in ((0.5, "all"), (1.0, "hardest")):
        found = loss_of_batch(*sides, owners, module, config, epoch)["total"].item()
        assert found == pytest.approx(
            sum(naive.triplet(module(IMAGES, TEXTS).tolist(), owners.tolist(), 0.2, negatives))
        )


def test_owners_that_do_not_fit_are_refused() -> None:
    for owners in (torch.tensor([0, 1]), torch.zeros(5, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="each of the 5 captions"):
            triplet_of_scores(torch.zeros(3, 5), owners, TripletConfig(), "all")


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ({"kind": "cnn"}, {"kind": "bigru"}, "local_features='states'"),
        (
            {"kind": "butd", "head": {"global_feature": "linear"}},
            {"kind": "bigru", "local_features": "states"},
            "global_feature='projected'",
        ),
    ],
)
def test_weights_that_nobody_reads_are_refused(image: dict[str, Any], text: dict[str, Any], message: str) -> None:
    values = {"image_encoder": image, "text_encoder": text, "set_prediction": {"kind": "fragments"}}
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(values)


def test_scores_that_are_no_numbers_end_a_validation_as_embeddings_do() -> None:
    module = attention().float()
    found = ranking.member(IMAGES.float(), TEXTS.float(), module)
    query_ranks.check_finite([found], "validation")
    for wrong in (math.nan, math.inf):
        assert found.scores is not None
        scores = found.scores.clone()
        scores[1, 2] = wrong
        with pytest.raises(DivergedError, match="validation: a score is NaN or infinite"):
            query_ranks.check_finite([replace(found, scores=scores)], "validation")


def test_a_small_model_learns_through_the_loop(store: Path) -> None:
    small = [setting for setting in TINY_MODEL if "set_prediction" not in setting]
    settings = recipe.load("digits_cnn_bigru_caan", [*small, "train.batch_size=8", "train.epochs=2"])
    epochs = train_run(store, start(store, "caan-learns", settings), settings)
    assert epochs[1]["train/total"] < epochs[0]["train/total"] and math.isfinite(epochs[1]["val/rsum"])
    assert not any(name.startswith("sets/") for name in epochs[0])
