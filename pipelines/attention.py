"""What each slot sees: its attention in the last iteration, over an image's cells or regions or a caption's words, and
what the embedding that it makes is nearest to.

Shape suffixes: S pixels along a side, N inputs, F width of a region's feature, K slots or elements of a set, D width of
an embedding, h rows and w columns of a grid of cells, G items of a gallery, J elements of their sets, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from setwise.models.config import PIENetConfig, SetPredictionConfig
from setwise.models.set_prediction import Features, SetEmbedding
from setwise.pipelines import batches
from setwise.pipelines.embeddings import Embeddings
from setwise.pipelines.trained_model import TrainedModel
from setwise.pipelines.word_pieces import Words

HOT, OPAQUE = (255.0, 140.0, 0.0), 0.8
"""RGB of attention, and how much of it lies over the image where there is the most."""
GREY = (0.299, 0.587, 0.114)
"""Luma of RGB (ITU-R BT.601)."""
DARK, LIGHT = 40.0, 190.0
"""The greys that an image's darkest and lightest pixels get, so that it is seen under the colour and beside it."""
PAIRS = 4096
"""Images and captions written for them that are compared at once."""


@dataclass(frozen=True)
class Attention:
    """One image or caption as the slots read it, on the CPU.

    weights (K,N): the mean over heads of each slot's attention; a row sums to 1. sets (K,D): the embeddings that came
    of it. names: what the N inputs are called, words or word pieces with the marks of start and end, or regions by
    number; empty for cells of an image, which lie row by row on `grid`, rows and columns.
    """

    weights: Tensor
    sets: Tensor
    names: list[str]
    grid: tuple[int, int] | None = None


def has_slots(model: TrainedModel) -> bool:
    """Whether a set's elements come of attentions of their own, which can be shown side by side. One alone has no other
    to compete with: slots' attention is the same everywhere then."""
    prediction = model.recipe.retriever.set_prediction
    return isinstance(prediction, SetPredictionConfig | PIENetConfig) and prediction.num_slots > 1


@torch.inference_mode()
def of_image(model: TrainedModel, image: Tensor) -> Attention:
    """Of pixels (3,S,S) uint8 as evaluation sees them, or region features (N,F)."""
    # In the two steps of encode_images, since only the features in between know their grid.
    retriever = model.retrieval.retriever
    features: Features = retriever.image_encoder(image[None].to(model.device))
    read: SetEmbedding = retriever.image_sets(features, keep_attention=True)
    names = [] if features.grid else [str(number) for number in range(features.local.shape[1])]
    return _last(read, names, features.grid)


@torch.inference_mode()
def of_caption(model: TrainedModel, text: str) -> Attention:
    """Of a caption, by itself, so that there is no padding."""
    ids = model.vocabulary.encode(text)
    tokens, lengths = batches.pad([ids])
    read = model.retrieval.retriever.encode_texts(tokens.to(model.device), lengths, keep_attention=True)
    return _last(read, pieces(model.vocabulary, ids), None)


def pieces(words: Words, ids: list[int]) -> list[str]:
    """The words or word pieces that a caption was read as; one that the model does not know is the mark for that."""
    return [words.words[index] for index in ids]


def _last(read: SetEmbedding, names: list[str], grid: tuple[int, int] | None) -> Attention:
    weights_KN = read.attention[-1][0].float().mean(0)
    return Attention((weights_KN / weights_KN.sum(-1, keepdim=True)).cpu(), read.sets[0].float().cpu(), names, grid)


def overlay(image: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image in grey, and in orange over it what one slot attends to, (3,S,S) uint8.

    Args:
        image: (3,S,S) uint8, the square that the encoder saw.
        weights: (N,) of the grid's cells, row by row. The strongest cell is the most orange; between the middles of
            cells, weights go over into each other.
    """
    map_hw = (weights / weights.max()).view(1, 1, *grid)
    share_SS = OPAQUE * functional.interpolate(map_hw, image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    luma_SS = (image.float() * torch.tensor(GREY)[:, None, None]).sum(0)
    darkest, lightest = luma_SS.aminmax()
    grey_SS = DARK + (LIGHT - DARK) * (luma_SS - darkest) / (lightest - darkest).clamp(min=1)
    painted_3SS = (1 - share_SS) * grey_SS + share_SS * torch.tensor(HOT)[:, None, None]
    return painted_3SS.round().clamp(0, 255).to(torch.uint8)


def nearest(set_KD: Tensor, gallery_GJD: Tensor) -> list[tuple[int, float]]:
    """For each element of a set the item of a gallery that has the nearest element, as its index, and their cosine."""
    cosine_GK = (gallery_GJD @ set_KD.T).amax(1)
    best = cosine_GK.max(0)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def usage(sets: Embeddings) -> tuple[list[float], list[float]]:
    """Of each element of images' sets, and of each of captions', the share of true pairs whose best cosine it holds.

    The `slot_usage` of set_health.py is the effective number of these elements.
    """
    images, texts = (torch.zeros(side.shape[1]) for side in (sets.image_sets, sets.text_sets))
    for owners, texts_PJD in zip(torch.split(sets.owners, PAIRS), torch.split(sets.text_sets, PAIRS), strict=True):
        best_P = (sets.image_sets[owners] @ texts_PJD.mT).flatten(1).argmax(1)
        images += torch.bincount(best_P // len(texts), minlength=len(images))
        texts += torch.bincount(best_P % len(texts), minlength=len(texts))
    return (images / images.sum()).tolist(), (texts / texts.sum()).tolist()
