"""The loss computed in one pass is the authors', part by part and gradient by gradient, whatever the blocks; it neither
waits for a device nor keeps a matrix of all cosines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reference.official_loss import official_loss
from setwise.models import batch_loss as module
from setwise.models import losses
from setwise.models.batch_loss import batch_loss
from setwise.models.loss_config import Negatives, SimilarityConfig, TripletConfig
from setwise.models.set_prediction import SetEmbedding
from setwise.models.similarity import Similarity

GOLDEN = Path(__file__).parent.parent / "golden" / "dive_similarity_loss.npz"
KINDS = ("smooth_chamfer", "chamfer", "mil", "match_probability")
NEGATIVES: tuple[Negatives, ...] = ("all", "hardest", "violating", "semi_hard")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_negatives = pytest.mark.parametrize("negatives", NEGATIVES)
UNEVEN = torch.tensor([3, 0, 0, 5, 1, 3, 3, 6, 0, 1, 1, 5, 5])
"""Owners of thirteen captions of seven images, in no order; images 2 and 4 have none."""


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def embedding(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> SetEmbedding:
    """Unit sets, and slots of any length."""
    sets, slots = F.normalize(random(seed, *shape), dim=-1).to(dtype), 2 * random(seed + 1000, *shape, dtype=dtype)
    return SetEmbedding(sets.requires_grad_(), slots.requires_grad_())


def similarity_of(kind: str, alpha: float = 16) -> Similarity:
    similarity = Similarity(SimilarityConfig.model_validate({"kind": kind, "alpha": alpha})).double()
    if kind == "match_probability":
        similarity.load_state_dict({"scale": torch.tensor(1.7), "shift": torch.tensor(-0.3)})
    return similarity


def inputs(images: SetEmbedding, texts: SetEmbedding) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return images.sets, texts.sets, images.slots, texts.slots


def gradients(total: Tensor, images: SetEmbedding, texts: SetEmbedding, similarity: Similarity) -> list[Tensor]:
    """Zeros where there is none."""
    wanted = (*inputs(images, texts), *similarity.parameters())
    return list(torch.autograd.grad(total, wanted, materialize_grads=True))


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    """Relative to the size of each tensor."""
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm(), (number, a, b)


@pytest.fixture(params=[None, 3], ids=["usual_blocks", "three_blocks_a_side"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of tests fit in one block; so there are also as many as in a large batch."""
    if request.param is not None:
        monkeypatch.setattr(module, "block_size", lambda items, rows, device: -(-items // request.param))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("case", ["l1", "l2", "l3"])
def test_agrees_with_the_authors_code(case: str) -> None:
    with np.load(GOLDEN, allow_pickle=False) as file:
        golden = {key.removeprefix(f"{case}."): torch.from_numpy(file[key]) for key in file if key.startswith(case)}
    leaves = {name: golden[name].requires_grad_() for name in ("img", "txt", "img_res", "txt_res")}
    parts = batch_loss(
        SetEmbedding(leaves["img"], leaves["img_res"]),
        SetEmbedding(leaves["txt"], leaves["txt_res"]),
        torch.arange(len(leaves["txt"])) // 5,
        similarity_of("smooth_chamfer"),
        TripletConfig(margin=0.2, mmd_weight=0.01, mmd_gamma=0.5, diversity_weight=0.01),
        "hardest" if golden["hardest"] else "all",
    )
    names = ("i2t_loss", "t2i_loss", "mmd_loss", "unif_loss", "loss")
    for name, part in zip(names, parts, strict=True):
        assert part.item() == pytest.approx(golden[name].item(), rel=0, abs=1e-9), name
    parts.total.backward()
    for name, value in leaves.items():
        assert value.grad is not None
        torch.testing.assert_close(value.grad, golden[f"grad_{name}"], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("blocks")
@each_kind
@each_negatives
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 0.7), (0.3, 0.0), (0.0, 0.0)], ids=str)
def test_agrees_with_the_authors_formulation_for_any_captions_and_sizes_of_sets(
    kind: str, negatives: Negatives, weights: tuple[float, float]
) -> None:
    images, texts, similarity = embedding(0, 7, 4, 6), embedding(1, 13, 3, 6), similarity_of(kind)
    config = TripletConfig(margin=0.3, mmd_weight=weights[0], mmd_gamma=0.8, diversity_weight=weights[1])
    parts = batch_loss(images, texts, UNEVEN, similarity, config, negatives)
    expected = official_loss(
        *inputs(images, texts), UNEVEN, similarity.config, config, negatives, *similarity.parameters()
    )
    assert_same(list(parts), [part.detach() for part in expected])
    found = gradients(parts.total, images, texts, similarity)
    assert_same(found, gradients(expected[-1], images, texts, similarity))
    assert all(gradient.any() for gradient in found[:2])


@each_negatives
@pytest.mark.parametrize(("images", "owners"), [(1, [0]), (1, [0, 0, 0]), (3, [2]), (2, [1, 0])])
@pytest.mark.parametrize(("k", "j"), [(1, 1), (1, 3), (4, 1)])
def test_agrees_with_the_authors_formulation_at_the_smallest_sizes(
    images: int, owners: list[int], k: int, j: int, negatives: Negatives
) -> None:
    embeddings = embedding(2, images, k, 5), embedding(3, len(owners), j, 5)
    similarity, config = similarity_of("smooth_chamfer"), TripletConfig(margin=0.5)
    parts = batch_loss(*embeddings, torch.tensor(owners), similarity, config, negatives)
    expected = official_loss(*inputs(*embeddings), torch.tensor(owners), similarity.config, config, negatives)
    torch.testing.assert_close(list(parts), [part.detach() for part in expected], rtol=1e-11, atol=1e-14)
    found, wanted = (gradients(total, *embeddings, similarity) for total in (parts.total, expected[-1]))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.usefixtures("blocks")
@each_negatives
def test_agrees_with_the_readable_losses_differentiated_by_autograd(negatives: Negatives) -> None:
    images, texts, similarity = embedding(4, 6, 3, 8), embedding(5, 30, 2, 8), similarity_of("match_probability")
    owners = torch.arange(30) // 5
    config = TripletConfig(margin=0.1, mmd_weight=0.2, diversity_weight=0.4)
    parts = batch_loss(images, texts, owners, similarity, config, negatives)
    triplet = {
        "all": lambda *arguments: losses.triplet(*arguments, hardest=False),
        "hardest": lambda *arguments: losses.triplet(*arguments, hardest=True),
        "violating": losses.triplet_violating,
        "semi_hard": losses.triplet_semi_hard,
    }[negatives]
    scores, positives = similarity(images.sets, texts.sets), owners == torch.arange(6)[:, None]
    of_triplet = triplet(scores, positives, config.margin)
    mmd = losses.mmd(images.sets.flatten(0, 1), texts.sets.flatten(0, 1), config.mmd_gamma)
    diversity = losses.diversity(images.slots) + losses.diversity(texts.slots)
    total = of_triplet + 0.2 * mmd + 0.4 * diversity
    expected = [x.detach() for x in (of_triplet, mmd, diversity, total)]
    assert_same([parts.i2t + parts.t2i, parts.mmd, parts.diversity, parts.total.detach()], expected)
    assert_same(gradients(parts.total, images, texts, similarity), gradients(total, images, texts, similarity))


def test_diversity_can_be_that_of_the_gram_matrix() -> None:
    images, texts, similarity = embedding(27, 6, 2, 8), embedding(28, 30, 3, 8), similarity_of("mil")
    owners = torch.arange(30) // 5
    config = TripletConfig(margin=0.1, mmd_weight=0, diversity_weight=0.4, diversity="gram")
    parts = batch_loss(images, texts, owners, similarity, config, "hardest")
    gram = losses.gram_diversity(images.slots) + losses.gram_diversity(texts.slots)
    scores, positives = similarity(images.sets, texts.sets), owners == torch.arange(6)[:, None]
    total = losses.triplet(scores, positives, 0.1, hardest=True) + 0.4 * gram
    assert_same([parts.diversity, parts.total.detach()], [gram.detach(), total.detach()])
    assert_same(gradients(parts.total, images, texts, similarity), gradients(total, images, texts, similarity))
    other = batch_loss(images, texts, owners, similarity, TripletConfig(mmd_weight=0), "hardest")
    assert (other.diversity - parts.diversity).abs() > 1e-3


@pytest.mark.usefixtures("blocks")
def test_the_gradient_of_mmd_is_right_for_vectors_of_any_length() -> None:
    images, texts = (
        SetEmbedding((3 * random(seed, *shape)).requires_grad_(), random(seed + 50, *shape).requires_grad_())
        for seed, shape in ((6, (5, 2, 4)), (7, (9, 3, 4)))
    )
    similarity, config = similarity_of("mil"), TripletConfig(mmd_weight=1, mmd_gamma=0.1, diversity_weight=0)
    owners = torch.arange(9) % 5
    parts = batch_loss(images, texts, owners, similarity, config, "hardest")
    expected = official_loss(*inputs(images, texts), owners, similarity.config, config, "hardest")
    assert_same(gradients(parts.total, images, texts, similarity), gradients(expected[-1], images, texts, similarity))


def test_equal_vectors_have_distance_zero_and_a_finite_gradient() -> None:
    axis = F.one_hot(torch.tensor([[0, 1], [0, 1], [2, 3]]), 4).double()  # dot products without rounding
    images, texts = (SetEmbedding(axis.clone().requires_grad_(), random(8, 3, 2, 4)) for _ in range(2))
    config = TripletConfig(mmd_weight=1, diversity_weight=0)
    parts = batch_loss(images, texts, torch.arange(3), similarity_of("smooth_chamfer"), config, "violating")
    assert parts.mmd.abs() < 1e-15
    parts.total.backward()
    for embedded in (images, texts):
        assert embedded.sets.grad is not None and embedded.sets.grad.isfinite().all()


def test_a_part_of_weight_zero_reads_zero_and_leaves_no_gradient() -> None:
    images, texts = embedding(9, 4, 2, 6), embedding(10, 8, 2, 6)
    config = TripletConfig(mmd_weight=0, diversity_weight=0)
    parts = batch_loss(images, texts, torch.arange(8) // 2, similarity_of("chamfer"), config, "hardest")
    parts.total.backward()
    assert parts.mmd == parts.diversity == 0 and parts.total == parts.i2t + parts.t2i
    assert images.slots.grad is None and texts.slots.grad is None and images.sets.grad is not None


def test_only_the_total_has_a_gradient_and_without_need_for_one_nothing_has() -> None:
    images, texts, owners = embedding(11, 4, 2, 6), embedding(12, 8, 2, 6), torch.arange(8) // 2
    arguments = (owners, similarity_of("smooth_chamfer"), TripletConfig(), "violating")
    parts = batch_loss(images, texts, *arguments)  # type: ignore[arg-type]
    assert [part.requires_grad for part in parts] == [False, False, False, False, True]
    with torch.no_grad():
        quiet = batch_loss(images, texts, *arguments)  # type: ignore[arg-type]
    detached = batch_loss(*(SetEmbedding(x.sets.detach(), x.slots.detach()) for x in (images, texts)), *arguments)  # type: ignore[arg-type]
    for other in (quiet, detached):
        assert not any(part.requires_grad for part in other)
        torch.testing.assert_close(list(other), [part.detach() for part in parts], rtol=0, atol=1e-15)


def test_what_needs_no_gradient_gets_none() -> None:
    images, texts = embedding(13, 4, 2, 6), embedding(14, 8, 2, 6)
    frozen = similarity_of("match_probability").requires_grad_(False)
    texts = SetEmbedding(texts.sets.detach(), texts.slots)
    batch_loss(images, texts, torch.arange(8) // 2, frozen, TripletConfig(), "hardest").total.backward()
    assert images.sets.grad is not None and texts.slots.grad is not None
    assert texts.sets.grad is None and all(parameter.grad is None for parameter in frozen.parameters())


def test_the_gradient_is_scaled_by_what_follows_and_handed_over_once() -> None:
    images, texts, owners = embedding(15, 4, 2, 6), embedding(16, 8, 2, 6), torch.arange(8) // 2
    similarity, config = similarity_of("match_probability"), TripletConfig()

    def total() -> Tensor:
        return batch_loss(images, texts, owners, similarity, config, "all").total

    once = gradients(total(), images, texts, similarity)
    loss = total()
    scaled = gradients(1024 * loss, images, texts, similarity)
    torch.testing.assert_close(scaled, [1024 * gradient for gradient in once], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        (2 * loss).backward()  # type: ignore[no-untyped-call]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_gives_gradients_of_its_own(kind: str, dtype: torch.dtype) -> None:
    images, texts = embedding(17, 4, 4, 16, dtype=dtype), embedding(18, 20, 4, 16, dtype=dtype)
    owners, similarity = torch.arange(20) // 5, similarity_of(kind, alpha=64).float()
    parts = batch_loss(images, texts, owners, similarity, TripletConfig(), "hardest")
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)
    found = gradients(parts.total, images, texts, similarity)
    assert [gradient.dtype for gradient in found[:4]] == [dtype] * 4

    exact_images, exact_texts = (
        SetEmbedding(x.sets.detach().float().requires_grad_(), x.slots.detach().float().requires_grad_())
        for x in (images, texts)
    )
    exact = batch_loss(exact_images, exact_texts, owners, similarity, TripletConfig(), "hardest")
    assert list(parts) == list(exact)
    expected = gradients(exact.total, exact_images, exact_texts, similarity)
    assert_same(found, [gradient.to(x.dtype) for gradient, x in zip(expected, found, strict=True)])


def test_autocast_changes_nothing() -> None:
    images, texts = embedding(19, 4, 4, 16, dtype=torch.float32), embedding(20, 8, 4, 16, dtype=torch.float32)
    arguments = (images, texts, torch.arange(8) // 2, similarity_of("smooth_chamfer", 64).float(), TripletConfig())
    plain = batch_loss(*arguments, "violating")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = batch_loss(*arguments, "violating")
    assert list(plain) == list(lowered)
    pairs = zip(*(gradients(x.total, *arguments[:2], arguments[3]) for x in (plain, lowered)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_sets_may_lie_in_memory_in_any_order() -> None:
    images, texts, similarity = embedding(21, 4, 3, 6), embedding(22, 8, 3, 6), similarity_of("chamfer")
    turned = [
        SetEmbedding(
            *(part.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for part in (x.sets, x.slots))
        )
        for x in (images, texts)
    ]
    results = []
    for first, second in ((images, texts), turned):
        total = batch_loss(first, second, torch.arange(8) // 2, similarity, TripletConfig(), "hardest").total
        results.append(gradients(total, first, second, similarity))
    assert not turned[0].sets.is_contiguous()
    assert_same(*results)


@each_negatives
def test_a_value_that_is_no_number_shows_in_the_loss_and_in_the_gradient(negatives: Negatives) -> None:
    images, texts = embedding(23, 4, 2, 6), embedding(24, 8, 2, 6)
    with torch.no_grad():
        texts.sets[3, 1, 2] = torch.nan
    config = TripletConfig(mmd_weight=0, diversity_weight=0)
    total = batch_loss(images, texts, torch.arange(8) // 2, similarity_of("mil"), config, negatives).total
    total.backward()  # type: ignore[no-untyped-call]
    assert total.isnan() and texts.sets.grad is not None and not texts.sets.grad.isfinite().all()


@pytest.mark.parametrize("owners", [torch.zeros(7), torch.zeros(8, 1), torch.tensor(0)])
def test_owners_that_do_not_match_the_captions_are_refused(owners: Tensor) -> None:
    images, texts = embedding(25, 4, 2, 6), embedding(26, 8, 2, 6)
    with pytest.raises(ValueError, match="for each of the 8 captions"):
        batch_loss(images, texts, owners.long(), similarity_of("mil"), TripletConfig(), "all")


class Operations(TorchDispatchMode):
    """How many operations there were, and the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def operations(images: int, kind: str, negatives: Negatives) -> Operations:
    """Of loss and gradient, with tensors that have no values: whatever asked for one would fail."""
    with FakeTensorMode(), Operations() as counted:
        embeddings = [
            SetEmbedding(*(torch.empty(batch, 4, 8, requires_grad=True) for _ in range(2)))
            for batch in (images, 5 * images)
        ]
        owners = torch.empty(5 * images, dtype=torch.int64)
        similarity = Similarity(SimilarityConfig.model_validate({"kind": kind}))
        parts = batch_loss(*embeddings, owners, similarity, TripletConfig(), negatives)
        parts.total.backward()
    return counted


@each_kind
@each_negatives
def test_no_value_is_waited_for_and_operations_do_not_grow_with_the_batch(
    kind: str, negatives: Negatives, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "block_size", lambda items, rows, device: -(-items // 2))
    assert operations(60, kind, negatives).number == operations(6000, kind, negatives).number
    with pytest.raises(Exception, match="nonzero"), FakeTensorMode():
        losses.triplet(torch.empty(2, 3), torch.empty(2, 3, dtype=torch.bool), 0.2, hardest=True)


@pytest.mark.parametrize("items", [1, 7, 100, 1000, 12345, 10**7])
@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_there_are_at_most_sixteen_blocks(items: int, rows: int, device: str) -> None:
    size = module.block_size(items, rows, torch.device(device))
    assert 1 <= size <= items and -(-items // size) <= 16


def test_with_hardest_negatives_nothing_is_kept_that_is_larger_than_the_scores() -> None:
    images = 500
    assert operations(images, "smooth_chamfer", "hardest").largest == images * 5 * images
