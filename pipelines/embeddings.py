"""The embeddings of a split, and the scores between them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from setwise.models.retriever import SetRetriever
from setwise.models.similarity import Similarity
from setwise.pipelines import batches
from setwise.pipelines.batches import Batch, Split

SCORE_BLOCK = (64, 1024)
"""Images and captions that are compared at once: with K = 4 their cosines take 4 MB, which stay in a CPU's cache. Where
one side has fewer, more of the other."""


@dataclass(frozen=True)
class Embeddings:
    """The sets of a split, on the CPU. Captions are in the order of their images.

    image_sets (I,K,D) and text_sets (T,J,D) are float32, unit vectors but where set_prediction.py says otherwise;
    owners (T,) is the index of each caption's image.
    """

    image_sets: Tensor
    text_sets: Tensor
    image_ids: Tensor
    caption_ids: Tensor
    owners: Tensor


@torch.inference_mode()
def embed(retriever: SetRetriever, split: Split, batch_size: int, device: torch.device, threads: int = 0) -> Embeddings:
    """Encode each image and each caption of a split once, in evaluation mode; `threads` make the batches ahead."""
    was_training = retriever.training
    retriever.eval()
    images, texts = [], []
    with closing(batches.in_order(split, batch_size, threads)) as whole:
        for batch in whole:
            on_device: Batch = batch.to(device)
            images.append(retriever.encode_images(on_device.images).sets.float().cpu())
            texts.append(retriever.encode_texts(on_device.tokens, on_device.lengths).sets.float().cpu())
    retriever.train(was_training)
    return Embeddings(
        image_sets=torch.cat(images),
        text_sets=torch.cat(texts),
        image_ids=torch.from_numpy(split.image_ids.copy()),
        caption_ids=torch.from_numpy(split.caption_ids.copy()),
        owners=torch.from_numpy(split.owners.copy()),
    )


@torch.inference_mode()
def score(similarity: Similarity, image_sets: Tensor, text_sets: Tensor, device: torch.device) -> Tensor:
    """(I,K,D) against (T,J,D) to (I,T) float32 on the CPU, computed on `device` block by block."""
    scores = torch.empty(len(image_sets), len(text_sets))
    images, texts = image_sets.to(device), text_sets.to(device)
    rows, columns = _block(len(images), len(texts))
    for i in range(0, len(images), rows):
        for t in range(0, len(texts), columns):
            scores[i : i + rows, t : t + columns] = similarity(images[i : i + rows], texts[t : t + columns])
    return scores


def _block(images: int, texts: int) -> tuple[int, int]:
    """How many of so many images and captions are compared at once: about equally many pairs, whatever their shape."""
    rows, columns = SCORE_BLOCK
    pairs = rows * columns
    columns = max(columns, pairs // max(min(rows, images), 1))
    return max(rows, pairs // max(min(columns, texts), 1)), columns
