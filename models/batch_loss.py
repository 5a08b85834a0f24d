"""The loss of a whole batch and its gradient, computed together in one pass (Kim, Kim, Kwak, CVPR 2023).

losses.py and similarity.py say what is computed. This file computes it for little more than the cost of its matrix
products, and, beside the scores, in memory that grows with the batch and, up to some thousand images, not with its
square. All dot products are
visited tile by tile: while a tile is in cache it gives its scores and its part of MMD, becomes d(loss)/d(dot product)
and is multiplied back onto the rows. The gradient of the hardest negatives touches few pairs of sets and goes back
through these alone; for other negatives the tiles between images and captions are kept until all scores are known.
Nothing waits for a device, and the number of operations is bounded whatever the size of the batch.

Shape suffixes: I images, T captions, K elements of an image's set, J elements of a caption's, D width; B sets of one
side; N and M rows, the elements of many sets; P pairs of an image and a caption.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from setwise.models import losses
from setwise.models.loss_config import Negatives, TripletConfig
from setwise.models.set_prediction import SetEmbedding
from setwise.models.similarity import Similarity


class LossParts(NamedTuple):
    """The named parts of the loss, each a scalar before weighting, and `total`, what is minimised; it alone has a
    gradient."""

    i2t: Tensor
    t2i: Tensor
    mmd: Tensor
    diversity: Tensor
    total: Tensor


def batch_loss(
    images: SetEmbedding,
    texts: SetEmbedding,
    owners: Tensor,
    similarity: Similarity,
    config: TripletConfig,
    negatives: Negatives,
) -> LossParts:
    """The whole loss of one batch, by parts: triplet loss of the similarities, MMD of the sets, diversity of the slots.
    A part whose weight is 0 is not computed and reads 0.

    Computed in float32, or float64 if the sets are, whatever autocast says; a gradient has the dtype of its tensor.
    Gradients are ready when this returns, and `total.backward()` hands them over: it can be called once.

    Args:
        images: sets and slots (I,K,D).
        texts: sets and slots (T,J,D), at least one caption.
        owners: (T,) int64 on the same device: the index of the image that each caption belongs to. An image may have
            any number of captions, or none.

    Raises:
        ValueError: `owners` is not one index for each caption, or a side has nothing.
    """
    losses.check_owners(owners, len(images.sets), len(texts.sets))
    parameters = [parameter for parameter in similarity.parameters() if parameter.requires_grad]
    slots_of_sides = (images.slots, texts.slots) if config.diversity_weight else ()
    inputs = (images.sets, texts.sets, *slots_of_sides, *parameters)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.no_grad(), torch.autocast(owners.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(images.sets.dtype, texts.sets.dtype), torch.float32)
        sides = _Side(images.sets.to(dtype)), _Side(texts.sets.to(dtype))
        comparison = _Comparison(*sides, similarity, parameters, config, differentiate)
        i2t, t2i = comparison.triplet(owners, negatives)
        for side in sides if config.mmd_weight else ():
            comparison.kernel_within(side)
            side.gradient_rows.addcmul_(side.along[:, None], side.rows)
        diversity, of_slots = torch.zeros_like(i2t), []
        for slots in slots_of_sides:
            closeness, gradient = losses.diversity_with_gradient(slots.to(dtype), config.diversity)
            diversity += closeness
            of_slots.append(gradient.mul_(config.diversity_weight))
        mmd = comparison.mmd
        total = i2t + t2i + config.mmd_weight * mmd + config.diversity_weight * diversity
    if differentiate:
        of_sets = (side.gradient for side in sides)
        gradients = [*of_sets, *of_slots, *comparison.parameter_gradients]
        total = _WithGradients.apply(total, gradients, *inputs)
    return LossParts(i2t, t2i, mmd, diversity, total)


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of batch_loss were handed over already: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: copies would double the memory
        scaled = (gradient.mul_(scale) for gradient in gradients)
        return None, None, *(x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True))


class _Side:
    """The sets (B,K,D) of one side, in blocks, and what is added up for them."""

    def __init__(self, sets_BKD: Tensor) -> None:
        self.sets = sets_BKD.contiguous()
        self.gradient = torch.zeros_like(self.sets)
        self.rows, self.gradient_rows = self.sets.flatten(0, 1), self.gradient.flatten(0, 1)
        self.squared_lengths = torch.linalg.vector_norm(self.rows, dim=1).square_()
        self.along = torch.zeros_like(self.squared_lengths)
        """How often each row is to be added to its own gradient."""
        self.sets_of_a_block = block_size(len(self.sets), self.sets.shape[1], self.sets.device)
        size = self.sets_of_a_block * self.sets.shape[1]
        self.blocks = [slice(start, start + size) for start in range(0, len(self.rows), size)]
        """Of rows, each of whole sets."""


class _Comparison:
    """Triplet loss and MMD of the two sides, and their gradients if `differentiate`."""

    def __init__(
        self,
        images: _Side,
        texts: _Side,
        similarity: Similarity,
        parameters: list[nn.Parameter],
        config: TripletConfig,
        differentiate: bool,
    ) -> None:
        self.images, self.texts, self.similarity, self.config = images, texts, similarity, config
        self.parameters, self.differentiate = parameters, differentiate
        self.parameter_gradients = [torch.zeros_like(parameter) for parameter in parameters]
        self.mmd = images.rows.new_zeros(())

    def triplet(self, owners_T: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor]:
        """Both directions of the triplet loss; and in the same tiles MMD's kernel between the sides."""
        images, texts, margin = self.images, self.texts, self.config.margin
        scores_IT = images.rows.new_empty(len(images.sets), len(texts.sets))
        keep = self.differentiate and negatives != "hardest"
        kept: list[Tensor] = []
        for i, t, part_IT in self._tiles(scores_IT):
            dot_NM = images.rows[i] @ texts.rows[t].T
            part_IT.copy_(self.similarity.of_cosines(self._by_set(dot_NM)))
            if keep:
                kept.append(dot_NM)
            else:
                self._visit(images, i, texts, t, dot_NM)
        if negatives == "hardest":
            i2t, t2i, pairs = losses.hardest_with_slopes(scores_IT, owners_T, margin)
            if self.differentiate:
                self._visit_pairs(pairs)
            return i2t, t2i
        block = block_size(len(owners_T), 1, owners_T.device)
        i2t, t2i, slope_IT = losses.averaged_with_slopes(scores_IT, owners_T, margin, negatives, block)
        for dot_NM, (i, t, part_IT) in zip(kept, self._tiles(slope_IT) if keep else (), strict=True):
            weight_IKTJ = self._through_similarity(self._by_set(dot_NM), part_IT)
            self._visit(images, i, texts, t, dot_NM, weight_IKTJ.reshape_as(dot_NM))
        return i2t, t2i

    def kernel_within(self, side: _Side) -> None:
        """MMD's kernel between all elements of one side; its matrix is symmetric, so half of the tiles are enough."""
        for number, i in enumerate(side.blocks):
            for j in side.blocks[number:]:
                self._visit(side, i, side, j, side.rows[i] @ side.rows[j].T)

    def _tiles(self, table_IT: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Each block of images with each of captions: their rows, and their part of `table_IT`."""
        for i, band in zip(self.images.blocks, torch.split(table_IT, self.images.sets_of_a_block), strict=True):
            for t, part in zip(self.texts.blocks, torch.split(band, self.texts.sets_of_a_block, dim=1), strict=True):
                yield i, t, part

    def _by_set(self, dot_NM: Tensor) -> Tensor:
        elements, others = self.images.sets.shape[1], self.texts.sets.shape[1]
        return dot_NM.view(len(dot_NM) // elements, elements, dot_NM.shape[1] // others, others)

    def _through_similarity(self, cosine_IKTJ: Tensor, slope_IT: Tensor) -> Tensor:
        """d(loss)/d(score) to d(loss)/d(cosine); what the similarity's parameters get is added up."""
        with torch.enable_grad():
            cosine_IKTJ = cosine_IKTJ.detach().requires_grad_()
            scores_IT = self.similarity.of_cosines(cosine_IKTJ)
        weight_IKTJ, *of_parameters = torch.autograd.grad(scores_IT, (cosine_IKTJ, *self.parameters), slope_IT)
        for total, part in zip(self.parameter_gradients, of_parameters, strict=True):
            total += part
        return weight_IKTJ

    def _visit_pairs(self, pairs: losses.Pairs) -> None:
        """Add the gradient of single scores."""
        size = block_size(len(pairs.slopes), 1, pairs.slopes.device)
        for i, t, slope_P in zip(*(torch.split(x, size) for x in pairs), strict=True):
            x_PKD, y_PJD = self.images.sets[i], self.texts.sets[t]
            cosine_PKJ = x_PKD @ y_PJD.transpose(1, 2)
            weight_PKJ = self._through_similarity(cosine_PKJ[:, :, None], slope_P[:, None])[:, :, 0]
            self.images.gradient.index_add_(0, i, weight_PKJ @ y_PJD)
            self.texts.gradient.index_add_(0, t, weight_PKJ.transpose(1, 2) @ x_PKD)

    def _visit(self, a: _Side, i: slice, b: _Side, j: slice, dot_NM: Tensor, weight_NM: Tensor | None = None) -> None:
        """Add MMD of a tile of dot products, and its derivative to `weight_NM`, which is d(loss)/d(dot product) so far;
        then multiply that back onto the rows. A block with itself holds each of its pairs twice."""
        itself = a is b and i == j
        if self.config.mmd_weight:
            squared_NM = torch.add(a.squared_lengths[i, None], b.squared_lengths[j]).sub_(dot_NM, alpha=2)
            if itself:
                squared_NM.fill_diagonal_(0)
            distance_NM = squared_NM.clamp_(min=0).sqrt_()
            kernel_NM = torch.mul(distance_NM, -self.config.mmd_gamma).exp_()
            factor = (2 if a is b else -2) / (len(a.rows) * len(b.rows))
            self.mmd += kernel_NM.sum() * (factor / 2 if itself else factor)
        if self.config.mmd_weight and self.differentiate:
            slope_NM = kernel_NM.mul_(self.config.mmd_weight * factor * self.config.mmd_gamma).div_(distance_NM)
            slope_NM.nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0)  # at distance 0 there is no gradient
            a.along[i] -= slope_NM.sum(1)
            if not itself:
                b.along[j] -= slope_NM.sum(0)
            weight_NM = slope_NM if weight_NM is None else weight_NM.add_(slope_NM)
        if weight_NM is not None:
            a.gradient_rows[i].addmm_(weight_NM, b.rows[j])
            if not itself:
                b.gradient_rows[j].addmm_(weight_NM.T, a.rows[i])


def block_size(items: int, rows_of_an_item: int, device: torch.device) -> int:
    """Items of a block: on a CPU so few that a tile stays in its cache, elsewhere more, so that fewer kernels are
    started; and never more than 16 blocks, so that the number of operations does not grow with the batch."""
    rows = 512 if device.type == "cpu" else 2048
    return -(-items // min(-(-items * rows_of_an_item // rows), 16))
