"""Similarities agree with the authors' numbers and with the definitions, and stay finite in half precision."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reference.similarity as naive
from setwise.models.config import SimilarityConfig
from setwise.models.similarity import Similarity, chamfer, match_probability, mil, smooth_chamfer

GOLDEN = Path(__file__).parent.parent / "golden" / "dive_similarity_loss.npz"
SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_chamfer": lambda images, texts: smooth_chamfer(images, texts, 16.0),
    "chamfer": chamfer,
    "mil": mil,
    "match_probability": lambda images, texts: match_probability(images, texts, 1.7, -0.3),
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
    if name == "match_probability":
        similarity.load_state_dict({"scale": torch.tensor(1.7), "shift": torch.tensor(-0.3)})
    torch.testing.assert_close(similarity(images, texts), SIMILARITIES[name](images, texts), rtol=0, atol=1e-7)


@each_similarity
def test_a_part_of_all_cosines_gives_that_part_of_the_scores(name: str) -> None:
    images, texts = unit_sets(16, 3, 4, 8), unit_sets(17, 5, 2, 8)
    similarity = Similarity(SimilarityConfig.model_validate({"kind": name})).double()
    cosines = torch.einsum("ikd,tjd->iktj", images, texts)
    part = similarity.of_cosines(cosines[1:, :, 2:4])
    torch.testing.assert_close(part, similarity(images, texts)[1:, 2:4], rtol=0, atol=1e-12)


def test_match_probability_learns_its_scale_and_shift() -> None:
    similarity = Similarity(SimilarityConfig(kind="match_probability"))
    similarity(unit_sets(14, 2, 3, 8), unit_sets(15, 4, 3, 8)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in similarity.named_parameters()}
    assert set(gradients) == {"scale", "shift"}
    assert all(gradient is not None and gradient != 0 for gradient in gradients.values())
