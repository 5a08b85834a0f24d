"""Losses agree with the authors' numbers, gradients included, and with the definitions for any positives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import reference.losses as naive
from setwise.models.config import LossConfig
from setwise.models.losses import diversity, mmd, set_embedding_loss, triplet, triplet_violating
from setwise.models.set_prediction import SetEmbedding
from setwise.models.similarity import smooth_chamfer

GOLDEN = Path(__file__).parent.parent / "golden" / "dive_similarity_loss.npz"


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
    positives = five_captions_each(len(inputs["img"]))
    parts = set_embedding_loss(
        scores,
        positives,
        SetEmbedding(inputs["img"], inputs["img_res"]),
        SetEmbedding(inputs["txt"], inputs["txt_res"]),
        LossConfig(margin=0.2, mmd_weight=0.01, mmd_gamma=0.5, diversity_weight=0.01),
        negatives="hardest" if golden["hardest"] else "all",
    )
    names = ("i2t_loss", "t2i_loss", "mmd_loss", "unif_loss", "loss")
    for name, part in zip(names, parts, strict=True):
        assert part.item() == pytest.approx(golden[name].item(), rel=0, abs=1e-9), name
    parts.total.backward()
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
def test_violating_triplets_agree_with_the_definition(seed: int, margin: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(5, 9, generator=generator, dtype=torch.float64)
    positives = torch.rand(5, 9, generator=generator) < 0.3
    expected = naive.triplet_violating(scores.numpy(), positives.numpy(), margin)
    assert triplet_violating(scores, positives, margin).item() == pytest.approx(expected, abs=1e-12)


def test_without_a_violation_the_violating_loss_is_zero_and_so_is_its_gradient() -> None:
    scores = torch.eye(3, dtype=torch.float64, requires_grad=True)
    loss = triplet_violating(scores, torch.eye(3, dtype=torch.bool), 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()


def test_hardest_negatives_cost_more_than_the_mean() -> None:
    scores, positives = random(1, 6, 30) * 0.1, five_captions_each(6)
    assert triplet(scores, positives, 0.2, hardest=True) > triplet(scores, positives, 0.2, hardest=False) > 0


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


def test_total_is_the_weighted_sum_and_a_part_of_weight_zero_reads_zero() -> None:
    sets = [F.normalize(random(seed, 10, 3, 8), dim=-1) for seed in (8, 9)]
    images, texts = SetEmbedding(sets[0][:2], random(10, 2, 3, 8)), SetEmbedding(sets[1], random(11, 10, 3, 8))
    scores, positives = smooth_chamfer(images.sets, texts.sets, 16.0), five_captions_each(2)
    config = LossConfig(mmd_weight=0.3, diversity_weight=0.7)
    parts = set_embedding_loss(scores, positives, images, texts, config, negatives="hardest")
    assert parts.mmd > 0 and parts.diversity > 0
    expected = triplet(scores, positives, 0.2, hardest=True) + 0.3 * parts.mmd + 0.7 * parts.diversity
    torch.testing.assert_close(parts.total, expected)

    none = LossConfig(mmd_weight=0, diversity_weight=0)
    bare = set_embedding_loss(scores, positives, images, texts, none, negatives="hardest")
    assert bare.mmd == bare.diversity == 0
    torch.testing.assert_close(bare.total, bare.i2t + bare.t2i)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_losses(dtype: torch.dtype) -> None:
    sets = F.normalize(random(12, 12, 4, 16), dim=-1).to(dtype)
    images, texts = SetEmbedding(sets[:2], sets[:2]), SetEmbedding(sets[2:], sets[2:])
    scores = smooth_chamfer(images.sets, texts.sets, 64.0)
    parts = set_embedding_loss(scores, five_captions_each(2), images, texts, LossConfig(), negatives="hardest")
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)
