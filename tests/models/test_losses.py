"""Losses agree with the authors' numbers, gradients included, and with the definitions for any positives; derivatives
that are written out are those that autograd finds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reference.losses as naive
from setwise.models import losses
from setwise.models.loss_config import Diversity, Negatives
from setwise.models.losses import diversity, gram_diversity, mmd, triplet, triplet_semi_hard, triplet_violating
from setwise.models.similarity import smooth_chamfer

GOLDEN = Path(__file__).parent.parent / "golden" / "dive_similarity_loss.npz"
AVERAGED = {
    "all": lambda scores, positives, margin: triplet(scores, positives, margin, hardest=False),
    "violating": triplet_violating,
    "semi_hard": triplet_semi_hard,
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def five_captions_each(images: int) -> Tensor:
    return torch.arange(5 * images) // 5 == torch.arange(images)[:, None]


@pytest.mark.parametrize("case", ["l1", "l2", "l3"])
def test_agrees_with_the_authors_code(case: str) -> None:
    with np.load(GOLDEN, allow_pickle=False) as file:
        golden = {key.removeprefix(f"{case}."): torch.from_numpy(file[key]) for key in file if key.startswith(case)}
    inputs = {name: golden[name].requires_grad_() for name in ("img", "txt", "img_res", "txt_res")}
    scores = smooth_chamfer(inputs["img"], inputs["txt"], 16.0)
    parts = {
        "triplet": triplet(scores, five_captions_each(len(inputs["img"])), 0.2, bool(golden["hardest"])),
        "mmd_loss": mmd(inputs["img"].flatten(0, 1), inputs["txt"].flatten(0, 1), 0.5),
        "unif_loss": diversity(inputs["img_res"]) + diversity(inputs["txt_res"]),
    }
    parts["loss"] = parts["triplet"] + 0.01 * parts["mmd_loss"] + 0.01 * parts["unif_loss"]
    golden["triplet"] = golden["i2t_loss"] + golden["t2i_loss"]
    for name, part in parts.items():
        assert part.item() == pytest.approx(golden[name].item(), rel=0, abs=1e-9), name
    parts["loss"].backward()
    for name, value in inputs.items():
        assert value.grad is not None
        torch.testing.assert_close(value.grad, golden[f"grad_{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_triplet_agrees_with_the_definition_for_any_positives(hardest: bool, seed: int) -> None:
    scores = random(seed, 5, 9).mul(0.2).requires_grad_()
    positives = random(seed + 100, 5, 9) > 0.5
    positives[0] = False  # an image whose captions are not in the batch
    positives[1] = True  # an image of which every caption is true: no negative
    positives[:, 2] = False  # a caption without its image
    expected = naive.triplet(scores.detach().numpy(), positives.numpy(), 0.2, hardest)
    loss = triplet(scores, positives, 0.2, hardest)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad.any()


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("positive", [True, False])
def test_triplet_without_negatives_or_without_positives_is_zero(hardest: bool, positive: bool) -> None:
    scores = random(0, 3, 4).requires_grad_()
    loss = triplet(scores, torch.full((3, 4), positive), 0.2, hardest)
    loss.backward()
    assert loss == 0
    assert scores.grad is not None and torch.equal(scores.grad, torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("margin", [0.05, 0.4])
@pytest.mark.parametrize("name", ["triplet_violating", "triplet_semi_hard"])
def test_means_over_violations_agree_with_the_definitions(name: str, seed: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    positives = torch.rand(5, 9, generator=generator) < 0.3
    expected = getattr(naive, name)(scores.numpy(), positives.numpy(), margin)
    assert getattr(losses, name)(scores, positives, margin).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [triplet_violating, triplet_semi_hard])
def test_without_a_violation_the_mean_over_violations_is_zero_and_so_is_its_gradient(loss: object) -> None:
    assert callable(loss)
    scores = torch.eye(3, dtype=torch.float64, requires_grad=True)
    value = loss(scores, torch.eye(3, dtype=torch.bool), 0.2)
    value.backward()
    assert value.item() == 0 and scores.grad is not None and not scores.grad.any()


def test_a_semi_hard_negative_above_the_positive_costs_the_margin_and_has_no_gradient() -> None:
    scores = torch.tensor([[0.5, 0.9], [0.4, 0.5]], dtype=torch.float64, requires_grad=True)
    loss = triplet_semi_hard(scores, torch.eye(2, dtype=torch.bool), 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    # In each direction one hinge of 0.6, cut to 0.2, and one of 0.1.
    assert loss.item() == pytest.approx(2 * (0.2 + 0.1) / 2)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor([[-0.5, 0.0], [1.0, -0.5]], dtype=torch.float64))


def test_hardest_negatives_cost_more_than_the_mean() -> None:
    scores, positives = random(1, 6, 30) * 0.1, five_captions_each(6)
    assert triplet(scores, positives, 0.2, hardest=True) > triplet(scores, positives, 0.2, hardest=False) > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("images", "texts"), [(7, 20), (1, 3), (4, 1)])
@pytest.mark.parametrize("negatives", ["hardest", *AVERAGED])
def test_written_out_slopes_of_the_triplet_loss_are_those_of_autograd(
    negatives: Negatives, images: int, texts: int, seed: int
) -> None:
    scores = random(seed, images, texts).mul(0.2).requires_grad_()
    owners = torch.randint(images, (texts,), generator=torch.Generator().manual_seed(seed))
    positives = owners == torch.arange(images)[:, None]
    if negatives == "hardest":
        expected = triplet(scores, positives, 0.2, hardest=True)
        i2t, t2i, pairs = losses.hardest_with_slopes(scores.detach().clone(), owners, 0.2)
        assert len(pairs.slopes) == 2 * texts + images
        slopes = torch.zeros(images, texts, dtype=torch.float64)
        slopes.index_put_((pairs.images, pairs.texts), pairs.slopes, accumulate=True)
    else:
        expected = AVERAGED[negatives](scores, positives, 0.2)
        i2t, t2i, slopes = losses.averaged_with_slopes(scores.detach().clone(), owners, 0.2, negatives, block=3)
    torch.testing.assert_close(i2t + t2i, expected.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected, scores)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["exponential", "gram"])
def test_written_out_gradient_of_diversity_is_that_of_autograd(kind: Diversity, size: int) -> None:
    slots = (3 * random(7, 5, size, 6)).requires_grad_()
    expected = diversity(slots) if kind == "exponential" else gram_diversity(slots)
    value, gradient = losses.diversity_with_gradient(slots.detach(), kind)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, slots)[0], rtol=0, atol=1e-14)


def test_mmd_agrees_with_the_definition() -> None:
    x, y = F.normalize(random(2, 6, 5), dim=1), F.normalize(random(3, 9, 5), dim=1)
    assert mmd(x, y, 0.5).item() == pytest.approx(naive.mmd(x.numpy(), y.numpy(), 0.5), abs=1e-12)


def test_mmd_of_a_set_with_itself_is_zero_and_its_gradient_finite() -> None:
    x = F.normalize(random(4, 6, 5), dim=1).float()
    x[1] = x[0]  # two equal captions
    x.requires_grad_()
    loss = mmd(x, x.detach().clone(), 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-3)  # a row's distance to its copy is the root of a rounding error
    assert x.grad is not None and x.grad.isfinite().all()


def test_diversity_agrees_with_the_definition_at_any_length_of_the_slots() -> None:
    slots = random(5, 3, 4, 6)
    assert diversity(slots).item() == pytest.approx(naive.diversity(slots.numpy()), abs=1e-12)
    torch.testing.assert_close(diversity(7 * slots), diversity(slots))


def test_diversity_is_one_when_slots_collapse_and_zero_for_a_single_slot() -> None:
    assert diversity(random(6, 3, 1, 8).expand(-1, 4, -1)).item() == pytest.approx(1)
    assert diversity(random(7, 3, 1, 8)) == 0


def test_diversity_by_the_gram_matrix_agrees_with_the_definition_at_any_length_of_the_slots() -> None:
    slots = random(8, 3, 4, 6)
    assert gram_diversity(slots).item() == pytest.approx(naive.gram_diversity(slots.numpy()), abs=1e-12)
    torch.testing.assert_close(gram_diversity(7 * slots), gram_diversity(slots))
    assert torch.autograd.gradcheck(gram_diversity, slots.requires_grad_())


def test_diversity_by_the_gram_matrix_has_its_least_at_right_angles_where_it_has_no_slope() -> None:
    collapsed = gram_diversity(random(6, 3, 1, 8).expand(-1, 4, -1))
    assert collapsed.item() == pytest.approx((4 * 3) ** 0.5 / 4**2)
    assert gram_diversity(random(7, 3, 1, 8)) == 0
    upright = torch.eye(4, dtype=torch.float64)[None, :3].requires_grad_()
    for value, gradient in (
        losses.diversity_with_gradient(upright.detach(), "gram"),
        (gram_diversity(upright), torch.autograd.grad(gram_diversity(upright), upright)[0]),
    ):
        assert value == 0 and not gradient.any()


def test_a_slot_that_is_no_number_shows_in_diversity_by_the_gram_matrix() -> None:
    slots = random(9, 2, 3, 4)
    slots[1, 2, 0] = torch.nan
    value, gradient = losses.diversity_with_gradient(slots, "gram")
    assert value.isnan() and gradient[1].isnan().any() and gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_losses(dtype: torch.dtype) -> None:
    sets = F.normalize(random(12, 12, 4, 16), dim=-1).to(dtype)
    scores = smooth_chamfer(sets[:2], sets[2:], 64.0)
    parts = (
        triplet(scores.to(dtype), five_captions_each(2), 0.2, hardest=True),
        mmd(sets[:2].flatten(0, 1), sets[2:].flatten(0, 1), 0.5),
        diversity(sets),
        gram_diversity(sets),
    )
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)
