"""Scores of a gallery: the same in blocks of any shape, in few of them, and in none that is large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from setwise.models.loss_config import SimilarityConfig
from setwise.models.objective import similarity_of
from setwise.models.similarity import Similarity
from setwise.pipelines import embeddings

CPU = torch.device("cpu")
SHAPES = [(300, 1), (1, 300), (300, 9), (9, 300), (40, 40), (5, 3), (0, 4), (4, 0)]


def sets(seed: int, count: int) -> Tensor:
    return F.normalize(torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("kind", ["smooth_chamfer", "cross_attention"])
@pytest.mark.parametrize(("images", "texts"), SHAPES)
def test_blocks_change_no_score(images: int, texts: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SCORE_BLOCK", (4, 16))
    similarity = similarity_of(SimilarityConfig.model_validate({"kind": kind}), 8)
    found = embeddings.score(similarity, sets(0, images), sets(1, texts), CPU)
    with torch.inference_mode():
        at_once = similarity(sets(0, images), sets(1, texts))
    assert found.shape == (images, texts)
    torch.testing.assert_close(found, at_once, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("images", "texts"), SHAPES)
def test_there_are_as_few_blocks_as_their_size_allows(images: int, texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SCORE_BLOCK", (4, 16))
    pairs: list[int] = []

    class Counted(Similarity):
        def forward(self, image_sets: Tensor, text_sets: Tensor) -> Tensor:
            pairs.append(len(image_sets) * len(text_sets))
            return super().forward(image_sets, text_sets)

    embeddings.score(Counted(SimilarityConfig(kind="chamfer")), sets(0, images), sets(1, texts), CPU)
    assert sum(pairs) == images * texts and max(pairs, default=0) <= 4 * 16
    assert len(pairs) <= 2 * (images * texts / 64 + 1)


def test_a_caption_is_compared_with_a_gallery_at_once() -> None:
    assert embeddings._block(5000, 1)[0] >= 5000 and embeddings._block(1, 25000)[1] >= 25000
    assert embeddings._block(5000, 25000) == embeddings.SCORE_BLOCK
