"""What a trial costs in use: the objectives beside its validation RSUM."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from setwise.pipelines.recipe import Recipe
from setwise.sweeps.space import MAXIMISED, Objective

if TYPE_CHECKING:
    import torch

GALLERY = 5_000  # images, as in the COCO 5K test split
WORDS = 12  # in the caption that asks, about the mean of COCO's captions
REPETITIONS = 15


def directions(objectives: tuple[Objective, ...]) -> list[str]:
    """Optuna's word for each."""
    return ["maximize" if one in MAXIMISED else "minimize" for one in objectives]


def costs(
    recipe: Recipe, vocabulary_size: int, objectives: tuple[Objective, ...], device: torch.device
) -> dict[str, float]:
    """The objectives that are known before training.

    embedding_size: numbers that are stored of an image, K times D. query_ms: milliseconds to encode a caption of 12
    words and score it against 5,000 images, by weights as they are before training; the shortest of 15 times, since
    other trials may be at work beside it.
    """
    found: dict[str, float] = {}
    if "embedding_size" in objectives:
        found["embedding_size"] = float(recipe.retriever.set_prediction.num_slots * recipe.retriever.embed_size)
    if "query_ms" in objectives:
        found["query_ms"] = query_ms(recipe, vocabulary_size, device)
    return found


def query_ms(recipe: Recipe, vocabulary_size: int, device: torch.device) -> float:
    """The time that a caption's search takes, in milliseconds."""
    import torch
    from torch.nn import functional

    from setwise.pipelines.retrieval import Retrieval

    retrieval = Retrieval(recipe, vocabulary_size).to(device).eval()
    slots, width = recipe.retriever.set_prediction.num_slots, recipe.retriever.embed_size
    gallery = functional.normalize(torch.randn(GALLERY, slots, width, device=device), dim=-1)
    tokens = torch.ones(1, WORDS, dtype=torch.long, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(REPETITIONS + 2):
            started = time.perf_counter()
            sets = retrieval.retriever.encode_texts(tokens, torch.tensor([WORDS])).sets
            retrieval.similarity(gallery, sets).cpu()  # which waits for a GPU
            seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds[2:])
