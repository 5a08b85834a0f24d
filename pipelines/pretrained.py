"""Published weights that a training starts from: of the image backbone, of word vectors, of BERT."""

from __future__ import annotations

from pathlib import Path

from setwise.models.config import BertConfig, BiGRUConfig, GridConfig
from setwise.models.image_encoders import Grid
from setwise.models.retriever import SetRetriever
from setwise.models.text_encoders import Bert, BiGRU
from setwise.pipelines import image_weights, text_weights
from setwise.pipelines.recipe import Recipe
from setwise.pipelines.word_pieces import Words, published_file
from setwise.platform.errors import DataError


def locate(recipe: Recipe, cache: Path) -> None:
    """See to it that the weights that the recipe names are there; those with an address are fetched.

    Args:
        cache: where what is downloaded is kept.

    Raises:
        DataError: weights are not there.
        UnreachableError: they have to be downloaded, and the network does not answer.
    """
    image, text = recipe.model.image_encoder, recipe.model.text_encoder
    if isinstance(image, GridConfig) and image.weights is not None:
        image_weights.locate(image.weights, image.architecture, cache)
    if isinstance(text, BiGRUConfig) and text.word_vectors is not None and not Path(text.word_vectors).is_file():
        raise DataError(f"model.text_encoder.word_vectors: there is no file {text.word_vectors}")
    if isinstance(text, BertConfig) and text.weights is not None:
        published_file(text.weights, "model.safetensors")


def start(retriever: SetRetriever, recipe: Recipe, words: Words, cache: Path) -> dict[str, str]:
    """Put into `retriever` the weights that the recipe names; where it names none, the random ones stay.

    Returns:
        What to remember of it, as tags of the run.

    Args:
        cache: as in `locate`.

    Raises:
        DataError: weights are not there, are damaged, or belong to another model.
        UnreachableError: they have to be downloaded, and the network does not answer.
    """
    tags: dict[str, str] = {}
    image, text = recipe.model.image_encoder, recipe.model.text_encoder
    if isinstance(image, GridConfig) and image.weights is not None:
        assert isinstance(retriever.image_encoder, Grid)
        image_weights.load(retriever.image_encoder.backbone, image.weights, image.architecture, cache)
        tags["setwise.image_weights"] = image.weights
    if isinstance(text, BiGRUConfig) and text.word_vectors is not None:
        assert isinstance(retriever.text_encoder, BiGRU)
        found = text_weights.start_from_word_vectors(retriever.text_encoder, Path(text.word_vectors), words.words)
        if not found:
            raise DataError(f"{text.word_vectors}: no word of the {len(words):,} in the vocabulary has a vector there")
        tags["setwise.word_vectors"] = f"{text.word_vectors}, {found:.1%} of the words found"
    if isinstance(text, BertConfig) and text.weights is not None:
        assert isinstance(retriever.text_encoder, Bert)
        text_weights.load_bert(retriever.text_encoder, text.weights)
        tags["setwise.text_weights"] = text.weights
    return tags
