"""Weights that a training starts from: published ones of the image backbone, of word vectors, of BERT; and those of an
image encoder that was pre-trained here."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from setwise.models.config import BertConfig, BiGRUConfig, GridConfig, WordMeanConfig
from setwise.models.devise import WordMean
from setwise.models.image_encoders import Grid
from setwise.models.text_encoders import Bert, BiGRU
from setwise.pipelines import image_weights, pretraining, text_weights, word_vectors
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.system import System
from setwise.pipelines.word_pieces import Words, published_file
from setwise.platform.errors import DataError


def locate(recipe: Recipe, cache: Path) -> None:
    """See to it that the weights that the recipe names are there; those with an address are fetched.

    Args:
        cache: where what is downloaded is kept.

    Raises:
        ConfigError: the pre-training does not fit the recipe.
        DataError: weights are not there.
        UnreachableError: they have to be downloaded, and the network does not answer.
    """
    pretraining.recipe_before(recipe)
    image, text = (getattr(recipe.model, name, None) for name in ("image_encoder", "text_encoder"))
    if isinstance(image, GridConfig) and image.weights is not None:
        image_weights.locate(image.weights, image.architecture, cache)
    vectors = getattr(text, "word_vectors", None)
    made = isinstance(text, WordMeanConfig) and vectors == word_vectors.CAPTIONS
    if vectors is not None and not made and not Path(vectors).is_file():
        raise DataError(f"model.text_encoder.word_vectors: there is no file {vectors}")
    if isinstance(text, BertConfig) and text.weights is not None:
        published_file(text.weights, "model.safetensors")


def start(system: System, recipe: Recipe, words: Words, prepared: Prepared, store: Path) -> dict[str, str]:
    """Put into `system` the weights that the recipe names; where it names none, the random ones stay.

    Returns:
        What to remember of it, as tags of the run.

    Args:
        store: whose folder `weights` keeps what is downloaded.

    Raises:
        ConfigError: the pre-training does not fit the recipe.
        DataError: weights are not there, are damaged, or belong to another model.
        UnreachableError: they have to be downloaded, and the network does not answer.
    """
    tags: dict[str, str] = {}
    before = pretraining.run_before(recipe, prepared, store)
    image, text = (getattr(recipe.model, name, None) for name in ("image_encoder", "text_encoder"))
    image_encoder, text_encoder = (getattr(system.encoder, name, None) for name in ("image_encoder", "text_encoder"))
    if before is not None:
        assert isinstance(image_encoder, nn.Module)
        tags["setwise.pretraining"] = pretraining.start(image_encoder, before)
    if isinstance(image, GridConfig) and image.weights is not None:
        assert isinstance(image_encoder, Grid)
        image_weights.load(image_encoder.backbone, image.weights, image.architecture, store / "weights")
        tags["setwise.image_weights"] = image.weights
    if isinstance(text, BiGRUConfig) and text.word_vectors is not None:
        assert isinstance(text_encoder, BiGRU)
        found = text_weights.start_from_word_vectors(text_encoder, Path(text.word_vectors), words.words)
        if not found:
            raise DataError(f"{text.word_vectors}: no word of the {len(words):,} in the vocabulary has a vector there")
        tags["setwise.word_vectors"] = f"{text.word_vectors}, {found:.1%} of the words found"
    if isinstance(text, WordMeanConfig):
        assert isinstance(text_encoder, WordMean)
        found = word_vectors.start_from(text_encoder, text.word_vectors, words, prepared)
        tags["setwise.word_vectors"] = f"{text.word_vectors}, {found:.1%} of the words found"
    if isinstance(text, BertConfig) and text.weights is not None:
        assert isinstance(text_encoder, Bert)
        text_weights.load_bert(text_encoder, text.weights)
        tags["setwise.text_weights"] = text.weights
    return tags
