"""Word vectors from captions: counted pair by pair, decomposed whole; and those of a file, put into a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reference import devise as naive
from setwise.models.devise import WordMean
from setwise.pipelines import batches, prepare, pretrained, recipe, word_vectors
from setwise.pipelines.prepare import Prepared
from setwise.pipelines.trained_model import untrained
from setwise.pipelines.vocabulary import SPECIAL, Vocabulary
from setwise.platform.errors import DataError

NOWHERE = Prepared(Path(), {})
WORDS = Vocabulary((*SPECIAL, "red", "green", "three"))


def captions(count: int = 80, number: int = 12, seed: int = 0) -> list[list[int]]:
    """Words that keep to their kind: even ones beside even ones, mostly."""
    rng = np.random.default_rng(seed)
    return [
        [int(2 * rng.integers(number // 2) + (parity if rng.random() < 0.9 else 1 - parity)) for _ in range(length)]
        for parity, length in zip(rng.integers(2, size=count), rng.integers(1, 9, size=count), strict=True)
    ]


@pytest.mark.parametrize("words", [7, 10_000])
@pytest.mark.parametrize(("window", "negatives", "width"), [(20, 1, 12), (20, 1, 5), (2, 1, 4), (20, 2, 12)])
def test_agrees_with_the_decomposition_of_the_whole_matrix(
    words: int, window: int, negatives: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_vectors, "WORDS", words)
    monkeypatch.setattr(word_vectors, "WINDOW", window)
    monkeypatch.setattr(word_vectors, "NEGATIVES", negatives)
    found = word_vectors.of_captions(captions(), 12, width).astype(np.float64)
    matrix = naive.information(captions(), 12, window, negatives)
    assert matrix.any() and found.shape == (12, width)
    np.testing.assert_allclose(found @ found.T, naive.best_gram(matrix, width), rtol=0, atol=1e-5)


def test_the_largest_are_found_among_many_words() -> None:
    """More words than the iteration carries vectors, and a few directions that matter."""
    rng = np.random.default_rng(1)
    dense = rng.standard_normal((90, 4)) * [4, 3, 2, 1]
    matrix = dense @ np.diag([1, -1, 1, 1]) @ dense.T + 0.01 * rng.standard_normal((90, 90))
    matrix = (matrix + matrix.T) / 2
    row, column = (index.ravel() for index in np.indices(matrix.shape))
    values, vectors = word_vectors._largest(row, column, matrix.ravel(), 90, 3)
    u, s, _ = np.linalg.svd(matrix)
    np.testing.assert_allclose(np.abs(values), s[:3], rtol=1e-9)
    np.testing.assert_allclose(np.abs((vectors * u[:, :3]).sum(0)), 1, rtol=1e-9)
    assert (vectors.max(0) == np.abs(vectors).max(0)).all()


def test_is_the_same_each_time_and_words_of_a_kind_lie_together() -> None:
    first, again = (word_vectors.of_captions(captions(400), 12, 3) for _ in range(2))
    assert np.array_equal(first, again)
    unit = first / np.linalg.norm(first, axis=1, keepdims=True)
    same = np.add.outer(np.arange(12), np.arange(12)) % 2 == 0
    cosine = unit @ unit.T
    assert cosine[same].mean() > cosine[~same].mean() + 0.5


def test_narrow_vocabularies_leave_columns_empty_and_words_without_context_get_zeros() -> None:
    found = word_vectors.of_captions([[3, 4, 3, 4, 0], [5, 6], [7], []], 9, 20, left_out=[0])
    assert found.shape == (9, 20) and not found[:, 9:].any()
    assert found.any(1).tolist() == [word in (3, 4, 5, 6) for word in range(9)]
    assert not word_vectors.of_captions([], 3, 2).any()


def test_vectors_of_the_training_captions_are_put_into_a_model(store: Path) -> None:
    settings = recipe.load("digits_cnn_words_devise", ["model.embed_size=16", "model.image_encoder.channels=[8,8]"])
    prepared = prepare.open_prepared("digits", store)
    words = batches.open_words(settings, prepared)
    pretrained.locate(settings, store / "weights")
    systems = [untrained(settings, len(words)) for _ in range(2)]
    tags = [pretrained.start(system, settings, words, prepared, store) for system in systems]
    assert tags[0] == {"setwise.word_vectors": "captions, 100.0% of the words found"}
    first, again = (system.encoder.text_encoder.vectors for system in systems)
    assert torch.equal(first, again)
    special = [words.ids[word] for word in SPECIAL[1:]]
    assert not first[special].any() and first.any(1).sum() == len(words) - len(special)
    ids = [words.ids[word] for word in ("seven", "eight", "red")]
    assert not torch.allclose(first[ids[0]], first[ids[1]], atol=0.1)


def test_vectors_of_a_file_are_put_into_a_model(tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text("red 3 0 0 4\nblue 9 9 9 9\nthree 0 0 2 0\n")
    encoder = WordMean(len(WORDS), 4)
    assert word_vectors.start_from(encoder, str(file), WORDS, NOWHERE) == pytest.approx(2 / 3)
    assert encoder.vectors[WORDS.ids["red"]].tolist() == pytest.approx([0.6, 0, 0, 0.8])
    assert (
        encoder.vectors[WORDS.ids["three"]].tolist() == [0, 0, 1, 0] and not encoder.vectors[WORDS.ids["green"]].any()
    )


def test_a_file_without_a_known_word_and_one_that_is_not_there_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text("rouge 1 2 3 4\n")
    with pytest.raises(DataError, match="no word of the 8 in the vocabulary has a vector there"):
        word_vectors.start_from(WordMean(len(WORDS), 4), str(file), WORDS, NOWHERE)
    named = recipe.load("digits_cnn_words_devise", ["model.text_encoder.word_vectors=nowhere.txt"])
    with pytest.raises(DataError, match=r"there is no file nowhere\.txt"):
        pretrained.locate(named, tmp_path)
