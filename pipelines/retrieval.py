"""Retrieval as a system to be trained: two encoders, and the similarity between their sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setwise.models.objective import loss_of_batch, similarity_of
from setwise.models.retriever import SetRetriever
from setwise.pipelines import embeddings, query_ranks, ranking
from setwise.pipelines.batches import Share, Split
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.set_health import set_health
from setwise.pipelines.system import Rows, System

OF_SETS = ("slots", "pie_net")
"""Set predictions whose elements are meant to differ. Draws of a distribution are none, nor is one pooled vector."""


class Retrieval(System):
    """Two encoders, and the similarity between their sets."""

    def __init__(self, recipe: Recipe, vocabulary_size: int) -> None:
        super().__init__(recipe)
        self.retriever = SetRetriever(recipe.retriever, vocabulary_size)
        self.similarity = similarity_of(recipe.similarity, recipe.retriever.embed_size)

    @property
    def encoder(self) -> SetRetriever:
        return self.retriever

    def encode(self, encoder: nn.Module, share: Share) -> tuple[Rows, Rows]:
        batch = share.batch
        images, texts = encoder(
            batch.images,
            batch.tokens,
            batch.lengths,
            image_keys=share.image_keys,
            text_keys=share.text_keys,
            micro_batch=self.recipe.train.micro_batch,
        )
        return images, texts

    def loss(self, images: Any, texts: Any, owners: Tensor, epoch: float) -> dict[str, Tensor]:
        return loss_of_batch(images, texts, owners, self.similarity, self.recipe.loss, epoch)

    def validate(self, split: Split, batch_size: int, device: torch.device, threads: int = 0) -> dict[str, float]:
        """R@K and RSUM on the validation split, as `val/...`, and the health of its sets, as `sets/...`."""
        sets = embeddings.embed(self.retriever, split, batch_size, device, threads)
        members = [ranking.member(sets.image_sets, sets.text_sets, self.similarity, device)]
        query_ranks.check_finite(members, "validation")
        values = query_ranks.own_metrics(members, sets.owners.numpy(), device)
        are_sets = self.recipe.retriever.set_prediction.kind in OF_SETS
        health = set_health(sets.image_sets, sets.text_sets, sets.owners) if are_sets else {}
        return {f"val/{name}": value for name, value in values.items()} | health

    def compiled(self) -> tuple[nn.Module, ...]:
        return self.retriever.image_sets, self.retriever.text_sets
