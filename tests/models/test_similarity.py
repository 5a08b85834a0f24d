"""Similarities agree with the authors' numbers and with the definitions, and stay finite in half precision."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reference.similarity as naive
from setwise.models import losses
from setwise.models.batch_loss import batch_loss
from setwise.models.loss_config import Negatives, SimilarityConfig, TripletConfig
from setwise.models.set_prediction import SetEmbedding
from setwise.models.similarity import (
    Similarity,
    chamfer,
    match_probability,
    mean_cosine,
    mil,
    sampled_match_probability,
    smooth_chamfer,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "dive_similarity_loss.npz"
SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_chamfer": lambda images, texts: smooth_chamfer(images, texts, 16.0),
    "chamfer": chamfer,
    "mil": mil,
    "match_probability": lambda images, texts: match_probability(images, texts, 1.7, -0.3),
    "cosine": mean_cosine,
    "pcme": lambda images, texts: sampled_match_probability(images, texts, 1.7, -0.3),
}
each_similarity = pytest.mark.parametrize("name", SIMILARITIES)


def unit_sets(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(draw, dim=-1).to(dtype)


@pytest.mark.parametrize("case", "abcd")
def test_agrees_with_the_authors_code(case: str) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        images, texts = (torch.from_numpy(golden[f"{case}.{side}"]) for side in ("img", "txt"))
        scores = {
            "smooth_chamfer": smooth_chamfer(images, texts, float(golden[f"{case}.temp"])),
            "chamfer": chamfer(images, texts),
            "max": mil(images, texts),
            "mp": match_probability(images, texts, 1.7, -0.3),
        }
        for name, score in scores.items():
            np.testing.assert_allclose(score.numpy(), golden[f"{case}.{name}"], rtol=0, atol=1e-9, err_msg=name)


def test_agrees_with_the_definitions() -> None:
    images, texts = unit_sets(0, 3, 4, 5), unit_sets(1, 6, 2, 5)
    oracles = {
        "smooth_chamfer": lambda cosines: naive.smooth_chamfer(cosines, 16.0),
        "chamfer": naive.chamfer,
        "mil": naive.mil,
        "match_probability": lambda cosines: naive.match_probability(cosines, 1.7, -0.3),
        "cosine": lambda cosines: sum(cosines.flat) / cosines.size,
        "pcme": lambda cosines: naive.match_probability(-np.sqrt(2 - 2 * cosines), 1.7, -0.3),
    }
    for name, oracle in oracles.items():
        expected = naive.each_pair(images.numpy(), texts.numpy(), oracle)
        np.testing.assert_allclose(SIMILARITIES[name](images, texts).numpy(), expected, rtol=0, atol=1e-12)


@each_similarity
def test_order_inside_a_set_does_not_matter(name: str) -> None:
    images, texts = unit_sets(2, 3, 4, 8), unit_sets(3, 5, 3, 8)
    shuffled = SIMILARITIES[name](images[:, [2, 0, 3, 1]], texts[:, [1, 2, 0]])
    torch.testing.assert_close(shuffled, SIMILARITIES[name](images, texts), rtol=0, atol=1e-12)


@each_similarity
def test_gradients_are_those_of_the_function(name: str) -> None:
    images, texts = unit_sets(4, 2, 3, 4).requires_grad_(), unit_sets(5, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(SIMILARITIES[name], (images, texts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close_at_alpha_64(dtype: torch.dtype) -> None:
    images = unit_sets(6, 3, 4, 32, dtype=dtype).requires_grad_()
    texts = torch.cat((images.detach()[:1], unit_sets(7, 4, 4, 32, dtype=dtype)))  # the first has cosines of one
    scores = smooth_chamfer(images, texts, 64.0)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert images.grad is not None and images.grad.isfinite().all()
    exact = smooth_chamfer(images.detach().double(), texts.double(), 64.0)
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    images, texts = unit_sets(8, 3, 4, 32, dtype=torch.float32), unit_sets(9, 5, 4, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = smooth_chamfer(images, texts, 64.0)
    assert torch.equal(scores, smooth_chamfer(images, texts, 64.0))


def test_smooth_chamfer_tends_to_chamfer() -> None:
    images, texts = unit_sets(10, 3, 4, 8), unit_sets(11, 5, 4, 8)
    torch.testing.assert_close(smooth_chamfer(images, texts, 1e6), chamfer(images, texts), rtol=0, atol=1e-5)


@each_similarity
def test_the_configured_similarity_is_the_named_function(name: str) -> None:
    images, texts = unit_sets(12, 3, 4, 8), unit_sets(13, 5, 4, 8)
    similarity = Similarity(SimilarityConfig.model_validate({"kind": name, "alpha": 16})).double()
    if name in ("match_probability", "pcme"):
        similarity.load_state_dict({"scale": torch.tensor(1.7), "shift": torch.tensor(-0.3)})
    torch.testing.assert_close(similarity(images, texts), SIMILARITIES[name](images, texts), rtol=0, atol=1e-7)


@each_similarity
def test_a_part_of_all_cosines_gives_that_part_of_the_scores(name: str) -> None:
    images, texts = unit_sets(16, 3, 4, 8), unit_sets(17, 5, 2, 8)
    similarity = Similarity(SimilarityConfig.model_validate({"kind": name})).double()
    cosines = torch.einsum("ikd,tjd->iktj", images, texts)
    part = similarity.of_cosines(cosines[1:, :, 2:4])
    torch.testing.assert_close(part, similarity(images, texts)[1:, 2:4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["match_probability", "pcme"])
def test_match_probability_learns_its_scale_and_shift(kind: str) -> None:
    similarity = Similarity(SimilarityConfig.model_validate({"kind": kind}))
    similarity(unit_sets(14, 2, 3, 8), unit_sets(15, 4, 3, 8)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in similarity.named_parameters()}
    assert set(gradients) == {"scale", "shift"}
    assert all(gradient is not None and gradient != 0 for gradient in gradients.values())


def test_samples_may_have_any_length() -> None:
    images, texts = 3 * unit_sets(18, 3, 4, 8), torch.rand(5, 1, 1, dtype=torch.float64) * unit_sets(19, 5, 2, 8)
    expected = [
        [np.mean([1 / (1 + math.exp(1.7 * math.dist(a, b) + 0.3)) for a in image for b in text]) for text in texts]
        for image in images
    ]
    found = sampled_match_probability(images, texts, 1.7, -0.3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_samples_coincide(dtype: torch.dtype) -> None:
    images = unit_sets(20, 3, 4, 8, dtype=dtype).requires_grad_()
    texts = images.detach()[[0, 0, 2], :2].clone().requires_grad_()
    similarity = Similarity(SimilarityConfig(kind="pcme")).to(dtype)
    for scores in (similarity(images, texts), similarity.of_cosines(torch.ones(2, 3, 2, 3, dtype=dtype))):
        gradients = torch.autograd.grad(
            scores.sum(), [images, texts, *similarity.parameters()], materialize_grads=True, allow_unused=True
        )
        assert scores.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["cosine", "pcme"])
@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_the_loss_of_a_batch_is_that_of_the_definition(kind: str, negatives: Negatives) -> None:
    """As the model has it, whose last step makes unit vectors: so along a vector there is no gradient."""
    raw = [2 * unit_sets(21, 4, 3, 8), 3 * unit_sets(22, 6, 2, 8)]
    raw[1][0] = raw[0][1, :2] * 2  # a caption whose elements are an image's: distances of 0
    owners, config = torch.tensor([0, 0, 1, 2, 3, 3]), TripletConfig(mmd_weight=0, diversity_weight=0)
    similarity = Similarity(SimilarityConfig.model_validate({"kind": kind})).double()
    inputs = [x.requires_grad_() for x in raw]
    images, texts = (F.normalize(x, dim=-1) for x in inputs)
    wanted = [*inputs, *similarity.parameters()]

    parts = batch_loss(SetEmbedding(images, images), SetEmbedding(texts, texts), owners, similarity, config, negatives)
    found = torch.autograd.grad(parts.total, wanted, retain_graph=True)
    distances = (images[:, :, None, None] - texts).square().sum(-1).clamp(min=1e-30).sqrt()
    scores = {
        "cosine": lambda: torch.einsum("ikd,tjd->it", images, texts) / 6,
        "pcme": lambda: torch.sigmoid(similarity.shift - similarity.scale * distances).mean((1, 3)),
    }[kind]()
    positives = owners == torch.arange(4)[:, None]
    expected = losses.triplet(scores, positives, config.margin, negatives == "hardest")
    torch.testing.assert_close(parts.total, expected, rtol=1e-9, atol=0)
    for ours, theirs in zip(found, torch.autograd.grad(expected, wanted), strict=True):
        assert ours.isfinite().all() and ours.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.norm()))
