"""Settings of similarities and losses.

Nothing here imports torch, as in config.py. Defaults are the published values of the authors' script (COCO, region
features) wherever it has one.
"""

from typing import Annotated, Literal

from pydantic import Field

from setwise.models.config import ModelSettings

Negatives = Literal["all", "hardest", "violating", "semi_hard"]
Diversity = Literal["exponential", "gram"]


class SimilarityConfig(ModelSettings):
    """How two sets are compared."""

    kind: Literal[
        "smooth_chamfer", "chamfer", "mil", "match_probability", "cosine", "pcme", "csd", "cross_attention"
    ] = Field(
        "smooth_chamfer",
        description="the paper's, its limit, the best pair (PVSE), the mean probability of cosines, the mean cosine, "
        "the mean probability of distances (PCME), the closed form of their mean square (PCME++), or context-aware "
        "attention between fragments (CAAN)",
    )
    alpha: float = Field(16, gt=0, le=1024, description="sharpness of smooth_chamfer; infinity would be chamfer")


class TripletConfig(ModelSettings):
    """Triplet loss over the batch, plus two regularisers of the sets."""

    kind: Literal["triplet"] = "triplet"
    margin: float = Field(0.2, ge=0, le=2, description="by how much a positive must beat a negative")
    mmd_weight: float = Field(0.01, ge=0, description="weight of the discrepancy between image and text embeddings")
    mmd_gamma: float = Field(0.5, gt=0, description="of the kernel exp(-gamma * distance), distance not squared")
    diversity_weight: float = Field(0.01, ge=0, description="weight of the closeness of slots of one set")
    diversity: Diversity = Field(
        "exponential", description="closeness: mean exp(-2 squared distance), or PVSE's norm of the Gram matrix"
    )
    negatives: Negatives = Field(
        "hardest",
        description="in the triplet loss: the hardest; all; those that violate the margin; semi_hard, these cut at it",
    )
    all_negatives_epochs: float = Field(
        0, ge=0, description="the triplet loss averages over all negatives this long, whatever `negatives` says"
    )

    def negatives_at(self, epoch: float) -> Negatives:
        """Which negatives the triplet loss takes `epoch` epochs (fractions count) into training."""
        return "all" if epoch < self.all_negatives_epochs else self.negatives


class SoftContrastiveConfig(ModelSettings):
    """PCME's loss: -log match probability of matching pairs, -log of its complement of all others, and KL."""

    kind: Literal["soft_contrastive"]
    kl_weight: float = Field(1e-5, ge=0, description="weight of KL(distribution || N(0, I)), the bottleneck")
    uniformity_weight: float = Field(0, ge=0, description="weight of the closeness of samples of different items")


class MatchingConfig(ModelSettings):
    """PCME++'s loss: binary cross-entropy of every pair's match, pseudo-positives and KL."""

    kind: Literal["matching"]
    pseudo_positive_weight: float = Field(
        0.1, ge=0, description="weight of the same with pairs taken for positive that are nearer than the true one"
    )
    kl_weight: float = Field(1e-4, ge=0, description="weight of KL(distribution || N(0, I)), the bottleneck")


class HingeRankConfig(ModelSettings):
    """DeViSE's loss: an image's own caption is to beat every other by the margin; the sum over the others."""

    kind: Literal["hinge_rank"]
    margin: float = Field(0.1, ge=0, le=2, description="by how much the own caption must beat another")


LossConfig = Annotated[
    TripletConfig | SoftContrastiveConfig | MatchingConfig | HingeRankConfig, Field(discriminator="kind")
]
