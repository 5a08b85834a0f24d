"""Probabilistic embeddings: every image and every caption is a normal distribution with a variance for each dimension.

PCME (Chun et al., "Probabilistic Embeddings for Cross-Modal Retrieval", CVPR 2021) compares J samples of each, and
learns the probability that two of them match by the soft contrastive loss. PCME++ (Chun, "Improved Probabilistic
Image-Text Representations", ICLR 2024) needs no samples: the mean squared distance of two independent samples is

    |mu - mu'|^2 + sum(sigma^2 + sigma'^2),

its closed-form sampled distance. Here it is the squared Euclidean distance of two vectors, (mu, s, 0) of an image and
(mu', 0, s') of a caption, with s^2 the sum of all variances of the item. So whatever compares, stores or ranks vectors
handles distributions too.

Shape suffixes: B samples, N inputs, X width of an input, J draws, D width of an embedding; I images, T captions.
"""

import math
import zlib
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setwise.models.config import GaussianConfig, GPOConfig, PIENetConfig
from setwise.models.dropout import sample_normal
from setwise.models.gpo import GPO, SortedPooling
from setwise.models.loss_config import MatchingConfig, SoftContrastiveConfig
from setwise.models.losses import check_owners
from setwise.models.pie_net import MultiAttention, PIENet
from setwise.models.set_prediction import Features, SetEmbedding
from setwise.models.similarity import Similarity

LOGITS = 2**22
"""So many logits of pairs of draws, 16 MB, are in memory at once; where there are more, they are computed again for
the gradient."""


class Gaussian(nn.Module):
    """A mean, which is a unit vector, and a standard deviation of each dimension, whose logarithm has no bounds.

    With "pie_net" the mean is PIE-Net's only vector, and the logarithm is fc(what an attention of its own reads) plus a
    linear map of the global feature. With "gpo" both are pooled by the generalised pooling operator, the mean from the
    local features, the logarithm from a linear map of them.

    Draws are new for each sample in training. In evaluation all samples have the same J noise vectors, which were drawn
    with the module and are part of its state, so that a sample's set is a function of it alone.

    Differs from the authors' code: there PCME's caption has a GRU of its own for the variance, and here its head
    reads the global feature of the only one; PCME++'s heads read a Transformer layer of their own each. PCME++'s head
    there predicts the logarithm of the variance, here half of that. Raises ValueError where "gpo" does not fit (see
    GPO).
    """

    noise: Tensor

    def __init__(self, config: GaussianConfig, embed_size: int, input_dim: int, side: Literal["image", "text"]) -> None:
        super().__init__()
        self.samples, self.side = config.samples, side
        self.salt = zlib.crc32(f"draws of {side}".encode())
        self.mean: PIENet | GPO
        self.log_sigma: AttendedLogSigma | PooledLogSigma
        if config.pooling == "pie_net":
            self.mean = PIENet(PIENetConfig(kind="pie_net", num_slots=1), embed_size, input_dim)
            self.log_sigma = AttendedLogSigma(embed_size, input_dim)
        else:
            self.mean = GPO(GPOConfig(kind="gpo"), embed_size, input_dim)
            self.log_sigma = PooledLogSigma(embed_size, input_dim)
        nn.init.constant_(self.log_sigma.fc.bias, config.initial_log_sigma)
        if self.samples:
            self.register_buffer("noise", torch.randn(self.samples, embed_size))

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """Of `features`, with `slots` the mean (B,1,D) and `log_sigma` (B,1,D): the J draws (B,J,D) as `sets`, or, with
        no draws, the vector (B,1,D+2) by which the distribution is compared in closed form. In float32 or better.

        In training, draws are functions of the samples' `keys` (B,), or without keys of torch's generator. With
        `keep_attention` also the attention of the mean.
        """
        center = self.mean(features, keys, keep_attention)
        log_sigma = self.log_sigma(features)
        with torch.autocast(log_sigma.device.type, enabled=False):
            mean_B1D, log_sigma_B1D = (_at_least_float32(x) for x in (center.sets, log_sigma[:, None]))
            if self.samples:
                sets = mean_B1D + log_sigma_B1D.exp() * self._noise(len(mean_B1D), keys).to(mean_B1D.dtype)
            else:
                sets = self._closed_form(mean_B1D, log_sigma_B1D)
        return SetEmbedding(sets, mean_B1D, center.attention, center.slot_iterations, log_sigma_B1D)

    def _noise(self, batch: int, keys: Tensor | None) -> Tensor:
        """(B,J,D), or (1,J,D) where it is the same for all."""
        if not self.training:
            return self.noise[None]
        if keys is None:
            return torch.randn(batch, *self.noise.shape, device=self.noise.device)
        return sample_normal(keys, tuple(self.noise.shape), self.salt)

    def _closed_form(self, mean_B1D: Tensor, log_sigma_B1D: Tensor) -> Tensor:
        """(B,1,D+2)"""
        variance_B11 = (2 * log_sigma_B1D).exp().sum(-1, keepdim=True)
        # The slope of a root is infinite at 0, where variances may vanish in rounding.
        spread_B11 = variance_B11.clamp(min=torch.finfo(variance_B11.dtype).tiny).sqrt()
        nothing_B11 = torch.zeros_like(spread_B11)
        own, other = (spread_B11, nothing_B11) if self.side == "image" else (nothing_B11, spread_B11)
        return torch.cat((mean_B1D, own, other), dim=-1)


class AttendedLogSigma(nn.Module):
    """log sigma (B,D) = fc(what one attention reads) + a linear map of the global feature: PIE-Net's form, with neither
    sigmoid nor normalisation behind it, which would bound it."""

    def __init__(self, embed_size: int, input_dim: int) -> None:
        super().__init__()
        self.attend = MultiAttention(1, input_dim)
        self.fc = nn.Linear(input_dim, embed_size)
        self.of_pooled = nn.Linear(embed_size, embed_size)
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, features: Features) -> Tensor:
        read_B1X, _ = self.attend(features.local, features.is_padding)
        log_sigma_BD: Tensor = self.fc(read_B1X[:, 0]) + self.of_pooled(features.pooled)
        return log_sigma_BD


class PooledLogSigma(nn.Module):
    """log sigma (B,D): the pooled linear map of the local features."""

    def __init__(self, embed_size: int, input_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_dim, embed_size)
        self.pool = SortedPooling(GPOConfig(kind="gpo"))
        nn.init.xavier_uniform_(self.fc.weight)

    def forward(self, features: Features) -> Tensor:
        local_BNX, is_padding_BN = features.local, features.is_padding
        if is_padding_BN is not None:  # what stands there would reach the map's gradient, times zero
            local_BNX = local_BNX.masked_fill(is_padding_BN[..., None], 0)
        log_sigma_BD: Tensor = self.pool(self.fc(local_BNX), is_padding_BN)[0]
        return log_sigma_BD


def soft_contrastive(
    images: SetEmbedding, texts: SetEmbedding, owners: Tensor, similarity: Similarity, config: SoftContrastiveConfig
) -> dict[str, Tensor]:
    """PCME's loss of one batch, as scalars: `contrastive`, `kl`, `uniformity` and `total`.

    Each image with each caption costs -log(match probability) if the caption is its own, else -log(1 - match
    probability), the probability being the mean over pairs of draws. As in the authors' code these costs are added up,
    and counted twice, once for each direction; `kl` is a sum over the items and dimensions of both sides. So the loss
    grows with the batch, and the limit on the gradient's norm holds nearly always.

    Differs from the authors' code: their sigmoid is that of twice the logit; their KL takes the mean of the draws for
    the mean and log sigma for the logarithm of the variance, and is here that of the distribution that is drawn from;
    their batches hold one caption an image.

    Args:
        images, texts: of I images and T captions, with `log_sigma`.
        owners: (T,) int64: the index of the image that each caption belongs to.
        similarity: of the kind `pcme`.

    Raises:
        ValueError: `owners` is not one index for each caption, or a side has nothing.
    """
    check_owners(owners, len(images.sets), len(texts.sets))
    with torch.autocast(owners.device.type, enabled=False):
        image_sets, text_sets = _at_least_float32(images.sets), _at_least_float32(texts.sets)
        logits_of_an_image = image_sets.shape[1] * text_sets.shape[0] * text_sets.shape[1]
        parts = torch.split(image_sets, max(LOGITS // max(logits_of_an_image, 1), 1))
        first, costs = 0, []
        for part in parts:
            mine_IT = owners == torch.arange(first, first + len(part), device=owners.device)[:, None]
            arguments = part, text_sets, mine_IT, similarity
            if len(parts) == 1:
                costs.append(_costs(*arguments))
            else:
                costs.append(checkpoint(_costs, *arguments, use_reentrant=False))
            first += len(part)
        contrastive = 2 * torch.stack(costs).sum()
        kl = kl_divergence(images).sum() + kl_divergence(texts).sum()
        total = contrastive + config.kl_weight * kl
        uniformity = torch.zeros_like(contrastive)
        if config.uniformity_weight:
            uniformity = closeness_of_draws(image_sets, text_sets)
            total = total + config.uniformity_weight * uniformity
    return {"contrastive": contrastive, "kl": kl, "uniformity": uniformity, "total": total}


def _costs(image_sets_IJD: Tensor, text_sets_TJD: Tensor, mine_IT: Tensor, similarity: Similarity) -> Tensor:
    """Sum over pairs of -log p or -log(1 - p), as logarithms all the way: far from 0, neither p nor 1 - p is a number
    whose logarithm could be taken."""
    logit_IJTJ = similarity.pair_logits(image_sets_IJD, text_sets_TJD)
    signed_IJTJ = torch.where(mine_IT[:, None, :, None], logit_IJTJ, -logit_IJTJ)
    draws = logit_IJTJ.shape[1] * logit_IJTJ.shape[3]
    cost_IT = math.log(draws) - F.logsigmoid(signed_IJTJ).logsumexp((1, 3))
    return cost_IT.sum()


def matching(
    images: SetEmbedding, texts: SetEmbedding, owners: Tensor, similarity: Similarity, config: MatchingConfig
) -> dict[str, Tensor]:
    """PCME++'s loss of one batch, as scalars: `matching`, `pseudo_positive`, `kl` and `total`.

    `matching` is the binary cross-entropy of every pair of an image and a caption, whose logit is its score, averaged
    and counted twice, once for each direction. `pseudo_positive` is the same with other labels: of a query, all items
    that score at least what its true one scores are positive too. Each direction has its own labels; their losses are
    added. An image with several captions asks once with each of them, and the mean over them is taken. `kl` is averaged
    over items and dimensions, and the two sides are added.

    The authors mix pairs of images and smooth labels as well, which is left out here.

    Args:
        images, texts: of I images and T captions, with `log_sigma`.
        owners: (T,) int64: the index of the image that each caption belongs to.
        similarity: of the kind `csd`.

    Raises:
        ValueError: `owners` is not one index for each caption, or a side has nothing.
    """
    check_owners(owners, len(images.sets), len(texts.sets))
    with torch.autocast(owners.device.type, enabled=False):
        score_IT = similarity(images.sets, texts.sets)
        mine_IT = (owners == torch.arange(len(score_IT), device=owners.device)[:, None]).to(score_IT.dtype)
        matched = 2 * F.binary_cross_entropy_with_logits(score_IT, mine_IT)
        kl = kl_divergence(images).mean() + kl_divergence(texts).mean()
        total = matched + config.kl_weight * kl
        pseudo = torch.zeros_like(matched)
        if config.pseudo_positive_weight:
            labels = pseudo_positives(score_IT.detach(), owners)
            pseudo = pseudo + F.binary_cross_entropy_with_logits(score_IT.expand(2, -1, -1), torch.stack(labels)) * 2
            total = total + config.pseudo_positive_weight * pseudo
    return {"matching": matched, "pseudo_positive": pseudo, "kl": kl, "total": total}


def pseudo_positives(scores: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of all pairs, (I,T) of images that ask and (I,T) of captions that ask, in the dtype of `scores` (I,T).

    A caption has one true image, and its label is 1 of each image that scores no less. An image may have several true
    captions: its label of a caption is the share of these that do not score more, and 1 if it is one of them. (Binary
    cross-entropy is linear in the label, so this is the mean loss over its captions.)
    """
    every_T = torch.arange(len(owners), device=owners.device)
    own_T = scores[owners, every_T]
    of_texts_IT = (scores >= own_T).to(scores.dtype)
    reaches_TT = (scores[owners] >= own_T[:, None]).to(scores.dtype)
    count_I = torch.zeros_like(scores[:, 0]).index_add_(0, owners, torch.ones_like(own_T))
    of_images_IT = torch.zeros_like(scores).index_add_(0, owners, reaches_TT) / count_I.clamp(min=1)[:, None]
    of_images_IT[owners, every_T] = 1
    return of_images_IT, of_texts_IT


def kl_divergence(embedding: SetEmbedding) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of each item and dimension, (B,1,D): the variational information bottleneck, which
    keeps variances from vanishing. Raises ValueError for embeddings that are no distributions."""
    if embedding.log_sigma is None:
        raise ValueError("embeddings without log_sigma are no distributions: they have no divergence")
    mean_B1D, log_sigma_B1D = _at_least_float32(embedding.slots), _at_least_float32(embedding.log_sigma)
    return (mean_B1D.square() + (2 * log_sigma_B1D).exp() - 1) / 2 - log_sigma_B1D


def closeness_of_draws(image_sets: Tensor, text_sets: Tensor) -> Tensor:
    """Log of the mean of exp(-2 * squared distance) over all pairs of the draws (I,J,D) and (T,J,D) of both sides: the
    uniformity of Wang and Isola, "Understanding Contrastive Representation Learning", ICML 2020. At most 0.

    The authors draw a part of the pairs at random where there are many; here all of them count. Distances come from dot
    products: torch's `pdist` would, for its gradient on a GPU, take the room of N times the matrix of N draws.
    """
    draws_ND = torch.cat((image_sets.flatten(0, 1), text_sets.flatten(0, 1)))
    lengths_N = draws_ND.square().sum(1)
    squared_NN = (lengths_N[:, None] + lengths_N - 2 * draws_ND @ draws_ND.T).clamp(min=0)
    is_pair_NN = torch.ones_like(squared_NN, dtype=torch.bool).triu(1)
    closeness = (-2 * squared_NN).masked_fill(~is_pair_NN, -math.inf).flatten().logsumexp(0)
    return closeness - math.log(len(draws_ND) * (len(draws_ND) - 1) / 2)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
