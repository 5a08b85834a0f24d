"""Weights that text encoders start from: word vectors as GloVe publishes them, and published BERTs.

Shape suffixes: V words of a vocabulary, W width of a word vector.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from setwise.pipelines import vocabulary
from setwise.pipelines.word_pieces import published_file
from setwise.platform.errors import DataError

if TYPE_CHECKING:
    from setwise.models.text_encoders import Bert, BiGRU

Vectors = NDArray[np.float32]
NUMBER_BYTES, WORD_BYTES = 64, 65_536
"""No number and no word of a file of word vectors is longer, so that what is no such file is not read as one line."""

SIZES = {
    "vocab_size": "word pieces",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ff_width",
    "max_position_embeddings": "max_tokens",
    "type_vocab_size": "token types",
    "hidden_act": "activation",
    "layer_norm_eps": "epsilon of layer normalisation",
}
"""What two BERTs must agree in, by transformers' names, and how we call it."""


def load_word_vectors(path: Path, words: tuple[str, ...], width: int) -> tuple[Vectors, NDArray[np.bool_]]:
    """The vectors of `words` from a text file of GloVe's form, read line by line; no others are kept.

    A word that the file lacks is looked up as `simpler` writes it. Special words are not looked up. Of a word that the
    file has twice, the first vector counts.

    Args:
        path: a word and `width` numbers a line, between spaces, of which words may hold some too; UTF-8; or that packed
            by gzip.

    Returns:
        vectors (V,W), zero where nothing was found, and what was found (V,).

    Raises:
        DataError: the file cannot be read, is cut short, or has a line of another form; with the line's number.
    """
    # The places of the words that are spelt like this, and of those for which it would do.
    exact: dict[bytes, int] = {word.encode(): v for v, word in enumerate(words) if word not in vocabulary.SPECIAL}
    similar: dict[bytes, list[int]] = {}
    for word, v in exact.items():
        if spelling := simpler(word.decode()):
            similar.setdefault(spelling.encode(), []).append(v)

    vectors_VW = np.zeros((len(words), width), dtype=np.float32)
    found_V, is_exact_V = np.zeros(len(words), dtype=bool), np.zeros(len(words), dtype=bool)
    for place, word, numbers in _lines(path, width):
        places = [v for v in similar.get(word, ()) if not found_V[v]]
        if word in exact and not is_exact_V[exact[word]]:
            places.append(exact[word])
            is_exact_V[exact[word]] = True
        if places:
            vectors_VW[places] = _vector(numbers, place)
            found_V[places] = True
    return vectors_VW, found_V


def simpler(word: str) -> str:
    """How a word is looked up that has no vector: without - . and ', and only what stands before a stroke (/).

    Method: the authors' published code.
    """
    return word.replace("-", "").replace(".", "").replace("'", "").partition("/")[0]


def start_from_word_vectors(bigru: BiGRU, path: Path, words: tuple[str, ...]) -> float:
    """Put the vectors of `words` into the embedding of `bigru`; the others stay as they are.

    Returns:
        The share of the words, special ones aside, that a vector was found for.

    Raises:
        DataError: as `load_word_vectors`.
    """
    weight_VW = bigru.embedding.weight
    vectors_VW, found_V = load_word_vectors(path, words, weight_VW.shape[1])
    found = torch.from_numpy(found_V)
    with torch.no_grad():
        weight_VW[found.to(weight_VW.device)] = torch.from_numpy(vectors_VW)[found].to(weight_VW)
    return float(found_V.sum()) / max(sum(word not in vocabulary.SPECIAL for word in words), 1)


def _lines(path: Path, width: int) -> Iterator[tuple[str, bytes, bytes]]:
    """(FILE:LINE, word, its numbers) of each line."""
    number = 0
    with _open(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(NUMBER_BYTES * width + WORD_BYTES), b""), start=1):
            place = f"{path}:{number}"
            if not line.endswith(b"\n"):
                raise DataError(
                    f"{place}: the line has no end. The file is cut short, or not one of word vectors: get it again "
                    "(an archive must be unpacked)"
                )
            fields = line.rstrip(b"\r\n ")
            spaces = fields.count(b" ")
            word, _, numbers = fields.partition(b" ")
            if spaces > width:  # spaces inside the word, or too many numbers
                *parts, numbers = fields.split(b" ", spaces - width + 1)
                word = b" ".join(parts)
                spaces = spaces if all(map(_is_number, parts[1:])) else width
            if spaces != width:
                raise DataError(f"{place}: {spaces} numbers behind the word, expected {width} (word_dim)")
            try:
                word.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: the word is not UTF-8 ({error.reason})") from error
            yield place, word, numbers
    if not number:
        raise DataError(f"{path}: the file is empty; expected a word and {width} numbers a line")


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file, unpacked if gzip packed it."""
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if packed else stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: cannot be unpacked ({error}). The file is cut short or damaged: get it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a file of word vectors") from error


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _vector(numbers: bytes, place: str) -> Vectors:
    try:
        with np.errstate(over="ignore"):
            vector_W = np.array([float(number) for number in numbers.split(b" ")]).astype(np.float32)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    if not np.isfinite(vector_W).all():
        raise DataError(f"{place}: a number is not finite, or too large for float32")
    return vector_W


def load_bert(bert: Bert, source: str) -> None:
    """Put published weights into `bert`, all but its projection; pooler and heads of other tasks are left out.

    Args:
        source: a folder with `config.json` and `model.safetensors`, or the name of a model on the Hugging Face hub.

    Raises:
        DataError: they are not there, damaged, or of a BERT of other sizes.
        UnreachableError: the hub cannot be asked.
    """
    _check_sizes(bert, published_file(source, "config.json"))
    try:
        path = published_file(source, "model.safetensors")
    except DataError as error:
        raise DataError(
            f"{error}. Other files of weights, such as pytorch_model.bin, are not read, since they may run code: "
            "let transformers save them as safetensors (save_pretrained)"
        ) from error
    own = bert.bert.state_dict()
    published = _tensors(path)
    if missing := sorted(own.keys() - published.keys()):
        raise DataError(f"{path}: {len(missing)} of {len(own)} weights are missing, the first {missing[0]}")
    for name, weight in own.items():
        if published[name].shape != weight.shape:
            shapes = tuple(published[name].shape), tuple(weight.shape)
            raise DataError(f"{path}: {name} has shape {shapes[0]}, expected {shapes[1]}")
    bert.bert.load_state_dict({name: published[name] for name in own})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights by today's names: the first BERTs were saved with a prefix and with other names for two of them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a file of weights, or damaged ({error}). Get it again") from error
    renamed = {}
    for name, tensor in saved.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        renamed[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    return renamed


def _check_sizes(bert: Bert, path: Path) -> None:
    """Raises DataError where the published `config.json` describes another model than `bert`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import BertConfig

    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        kind, positions = content.get("model_type"), content.get("position_embedding_type", "absolute")
        published = BertConfig.from_dict(content)
    except (OSError, ValueError, AttributeError, TypeError, StrictDataclassError) as error:
        raise DataError(f"{path}: not the configuration of a BERT ({error})") from error
    if kind != "bert" or positions != "absolute":
        raise DataError(
            f"{path}: a model of type {kind!r} with {positions} positions, expected 'bert' with absolute ones"
        )
    ours = bert.bert.config
    differences = [
        f"{meaning} {getattr(published, name)}, expected {getattr(ours, name)}"
        for name, meaning in SIZES.items()
        if getattr(published, name) != getattr(ours, name)
    ]
    if differences:
        raise DataError(
            f"{path}: another BERT than model.text_encoder and its words describe: {'; '.join(differences)}"
        )
