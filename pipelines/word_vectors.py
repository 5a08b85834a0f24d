"""Word vectors made from captions, where no published ones are given: skip-gram's, without its stochastic training.

Skip-gram with negative sampling factorises the matrix of shifted positive pointwise mutual information, nearly (Levy
and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", NeurIPS 2014), and so its truncated singular
value decomposition gives vectors like it, always the same ones. The matrix is sparse and is kept so.

Shape suffixes: V words of the vocabulary, B words of some captions, W width of a vector, E pairs of words that have an
entry, R columns of a dense matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from setwise.models.devise import WordMean
from setwise.pipelines import shards, text_weights, vocabulary
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.word_pieces import Words
from setwise.platform.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
CAPTIONS = "captions"
"""What a recipe names instead of a file."""
WINDOW = 20
"""Words that are at most so far apart are in each other's context: in most captions all of them; DeViSE's."""
NEGATIVES = 1
"""Skip-gram's negative samples, whose logarithm is taken off the matrix: of one it is 0, as few data allow no more."""
WORDS = 200_000
"""Words whose neighbours are counted at once."""
EXTRA, ROUNDS = 16, 12
"""Of the iteration that finds the largest singular values: more vectors than wanted, and how often it multiplies."""


def start_from(encoder: WordMean, source: str, words: Words, prepared: Prepared) -> float:
    """Put word vectors into `encoder`: those of a file, or, if `source` is CAPTIONS, made from the training captions.

    Returns:
        The share of the words, special ones aside, that have a vector.

    Raises:
        DataError: the file cannot be read or is no file of word vectors of that width, or no word has a vector.
    """
    number, width = encoder.vectors.shape
    if source == CAPTIONS:
        encoded = (
            words.encode(text) for text in shards.captions(prepared.folder, prepared.manifest["splits"]["train"])
        )
        special = [place for place, word in enumerate(words.words) if word in vocabulary.SPECIAL]
        vectors_VW = of_captions(encoded, number, width, special)
    else:
        vectors_VW, _ = text_weights.load_word_vectors(Path(source), words.words, width)
    found = int(vectors_VW.any(1).sum())
    if not found:
        raise DataError(f"{source}: no word of the {number:,} in the vocabulary has a vector there")
    encoder.set_vectors(torch.from_numpy(vectors_VW))
    return found / max(sum(word not in vocabulary.SPECIAL for word in words.words), 1)


def of_captions(
    captions: Iterable[Sequence[int]], number: int, width: int, left_out: Sequence[int] = ()
) -> NDArray[np.float32]:
    """The vectors (V,W) of words 0 to `number` - 1 in `captions`, lists of their ids; a deterministic function of them.

    Words `left_out`, those that occur nowhere, and those beside which nothing comes more often than by chance get
    zeros. Where there are fewer words than `width`, so do the columns that are left.
    """
    row_E, column_E, value_E = _shifted_positive_information(*_counts(captions, number, left_out), number)
    values, vectors_VR = _largest(row_E, column_E, value_E, number, width)
    # The symmetric division of the singular values between words and contexts, which Levy and Goldberg found best.
    vectors_VW = np.zeros((number, width), np.float32)
    vectors_VW[:, : len(values)] = vectors_VR * np.sqrt(np.abs(values))
    vectors_VW[np.bincount(row_E, minlength=number) == 0] = 0  # exactly, where rounding noise is left
    return vectors_VW


def _counts(
    captions: Iterable[Sequence[int]], number: int, left_out: Sequence[int]
) -> tuple[Integers, Integers, Floats]:
    """How often word (row) has word (column) in its context: both (E,), sorted, and the counts (E,)."""
    is_left_out_V = np.zeros(number, dtype=bool)
    is_left_out_V[list(left_out)] = True
    pair_E: Integers = np.empty(0, np.int64)
    count_E: Floats = np.empty(0)
    for word_B, caption_B in _blocks(captions):
        kept = ~is_left_out_V[word_B]
        word_B, caption_B = word_B[kept], caption_B[kept]
        found = [pair_E]
        for distance in range(1, min(WINDOW, len(word_B) - 1) + 1):
            together = caption_B[:-distance] == caption_B[distance:]
            first, second = word_B[:-distance][together], word_B[distance:][together]
            found += [first * number + second, second * number + first]
        old = len(pair_E)
        pair_E, place = np.unique(np.concatenate(found), return_inverse=True)
        weights = np.concatenate((count_E, np.ones(len(place) - old)))
        count_E = np.bincount(place, weights, len(pair_E)).astype(np.float64, copy=False)
    row_E, column_E = np.divmod(pair_E, number)
    return row_E, column_E, count_E


def _blocks(captions: Iterable[Sequence[int]]) -> Iterator[tuple[Integers, Integers]]:
    """Whole captions, about WORDS words at a time: the words (B,), and the number of each one's caption."""
    words: list[int] = []
    lengths: list[int] = []
    for caption in captions:
        words.extend(caption)
        lengths.append(len(caption))
        if len(words) >= WORDS:
            yield np.array(words, np.int64), np.repeat(np.arange(len(lengths)), lengths)
            words, lengths = [], []
    yield np.array(words, np.int64), np.repeat(np.arange(len(lengths)), lengths)


def _shifted_positive_information(
    row_E: Integers, column_E: Integers, count_E: Floats, number: int
) -> tuple[Integers, Integers, Floats]:
    """max(0, log(p(word, context) / (p(word) p(context))) - log(NEGATIVES)): its entries above zero."""
    total_V = np.bincount(row_E, count_E, number)
    information_E = np.log(count_E * total_V.sum() / (total_V[row_E] * total_V[column_E])) - np.log(NEGATIVES)
    kept = information_E > 0
    return row_E[kept], column_E[kept], information_E[kept]


def _largest(row_E: Integers, column_E: Integers, value_E: Floats, number: int, width: int) -> tuple[Floats, Floats]:
    """Of a symmetric matrix the eigenvalues (R,) that are largest in magnitude, and their vectors (V,R), R being
    `width` or the number of words: its singular values, but for the sign, and their vectors.

    By subspace iteration from vectors that are always the same. An eigenvector's sign is arbitrary: its largest entry
    is made positive.
    """
    size = min(number, width + EXTRA)
    basis_VR = np.linalg.qr(np.random.default_rng(0).standard_normal((number, size)))[0]
    for _ in range(ROUNDS):
        basis_VR = np.linalg.qr(_product(row_E, column_E, value_E, basis_VR))[0]
    values, turn_RR = np.linalg.eigh(basis_VR.T @ _product(row_E, column_E, value_E, basis_VR))
    order = np.argsort(-np.abs(values), kind="stable")[: min(number, width)]
    vectors_VR: Floats = basis_VR @ turn_RR[:, order]
    largest_R = np.abs(vectors_VR).argmax(0)
    vectors_VR *= np.where(vectors_VR[largest_R, np.arange(len(order))] < 0, -1.0, 1.0)
    return values[order], vectors_VR


def _product(row_E: Integers, column_E: Integers, value_E: Floats, dense_VR: Floats) -> Floats:
    """The sparse matrix times a dense one, column by column."""
    columns = [np.bincount(row_E, value_E * column[column_E], len(dense_VR)) for column in dense_VR.T]
    return np.stack(columns, 1)
