"""Context-aware attention as its steps read: one pair after another, one fragment after another, padding cut off."""

import math

import torch
from torch import Tensor

from setwise.models.cross_attention import CrossAttention


def scores(module: CrossAttention, image_sets: Tensor, text_sets: Tensor) -> Tensor:
    """(I,T) of fragments (I,N,D) and (T,J,D), whose rows of zeros are padding."""
    images = [torch.stack([row for row in rows if row.any()]) for rows in image_sets]
    texts = [torch.stack([row for row in rows if row.any()]) for rows in text_sets]
    return torch.stack([torch.stack([pair(module, image, text) for text in texts]) for image in images])


def pair(module: CrossAttention, regions: Tensor, words: Tensor) -> Tensor:
    """Of the fragments (N,D) and (J,D) of one image and one caption, none of them padding."""
    affinity = [[torch.tanh(region @ module.affinity @ word) for word in words] for region in regions]
    turned = [[affinity[n][j] for n in range(len(regions))] for j in range(len(words))]
    image = pooled(
        regions, words, affinity, module.image_within.weight, module.image_between.weight, module.image_weight.weight
    )
    text = pooled(
        words, regions, turned, module.text_within.weight, module.text_between.weight, module.text_weight.weight
    )
    return sum(a * b for a, b in zip(image, text, strict=True))  # type: ignore[return-value]


def pooled(
    own: Tensor, other: Tensor, affinity: list[list[Tensor]], within: Tensor, between: Tensor, weight: Tensor
) -> Tensor:
    """(D,) of one side's own fragments, whose affinities to the other's are `affinity`."""
    logits = []
    for mine in affinity:
        to_own = softmax([cosine(mine, theirs) for theirs in affinity])
        to_other = softmax(mine)
        gathered = sum(share * (within @ fragment) for share, fragment in zip(to_own, own, strict=True))
        gathered = gathered + sum(share * (between @ fragment) for share, fragment in zip(to_other, other, strict=True))
        logits.append((weight[0] * torch.tanh(gathered)).sum())
    return sum(share * fragment for share, fragment in zip(softmax(logits), own, strict=True))  # type: ignore[return-value]


def cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    product, lengths = sum(x * y for x, y in zip(a, b, strict=True)), [sum(x * x for x in one) for one in (a, b)]
    return product / (lengths[0] * lengths[1]) ** 0.5  # type: ignore[no-any-return, operator]


def softmax(logits: list[Tensor]) -> list[Tensor]:
    total = sum(logit.exp() for logit in logits)
    return [logit.exp() / total for logit in logits]


def triplet(scores: list[list[float]], owners: list[int], margin: float, negatives: str) -> tuple[float, float]:
    """Both directions of the triplet loss, of one positive pair after another."""
    images, captions = range(len(scores)), range(len(owners))
    i2t, t2i = [], []
    for t in captions:
        own = scores[owners[t]][t]
        i2t.append(
            [max(0.0, margin + scores[owners[t]][other] - own) for other in captions if owners[other] != owners[t]]
        )
        t2i.append([max(0.0, margin + scores[other][t] - own) for other in images if other != owners[t]])
    return reduced(i2t, negatives), reduced(t2i, negatives)


def reduced(hinges: list[list[float]], negatives: str) -> float:
    if negatives == "hardest":
        return math.fsum(max(each, default=0.0) for each in hinges) / len(hinges)
    if negatives == "all":
        return math.fsum(math.fsum(each) / max(len(each), 1) for each in hinges) / len(hinges)
    violations = [hinge for each in hinges for hinge in each if hinge > 0]
    return math.fsum(violations) / max(len(violations), 1)
