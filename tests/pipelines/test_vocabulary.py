"""Words are found alike in training and in use, and a vocabulary survives its file."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from setwise.pipelines import vocabulary
from setwise.pipelines.vocabulary import MAX_TOKENS, SPECIAL, Vocabulary, collect, tokenize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red THREE, above a green seven.", ["a", "red", "three", "above", "a", "green", "seven"]),
        ("don't  stop\tthe well-known\nman’s dog", ["don't", "stop", "the", "well-known", "man’s", "dog"]),
        ("'quoted' -dashed- snake_case", ["quoted", "dashed", "snake", "case"]),
        ("3 cats & 2 dogs!!", ["3", "cats", "2", "dogs"]),
        ("Größe 日本 été", ["größe", "日本", "été"]),
        ("<start> <pad>", ["start", "pad"]),
        ("... !!! —", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert tokenize(text) == words


def test_the_two_ways_to_write_an_accent_are_one_word() -> None:
    """A file from another system may spell é as e and a combining accent."""
    assert tokenize(unicodedata.normalize("NFD", "café crème")) == tokenize("café crème")


def test_ids_are_in_the_order_of_frequency_then_of_the_alphabet() -> None:
    made = collect(["b a c", "c a", "c zz"])
    assert made.words == (*SPECIAL, "c", "a", "b", "zz")
    assert collect(["c zz", "c a", "c b a"]).words == made.words
    assert collect(["b a c", "c a", "c zz"], min_count=2).words == (*SPECIAL, "c", "a")


def test_a_caption_is_encoded_between_its_marks_with_unknown_words_as_one() -> None:
    made = collect(["red three"])
    start, end, unknown = made.ids["<start>"], made.ids["<end>"], made.ids["<unk>"]
    assert made.encode("RED blue three") == [start, made.ids["red"], unknown, made.ids["three"], end]
    assert made.encode("") == [start, end]
    assert made.unknown("RED blue three blue") == ["blue", "blue"]
    assert [made.ids[word] for word in ("<pad>", "<start>", "<end>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [MAX_TOKENS - 3, MAX_TOKENS - 2, MAX_TOKENS - 1, 1000])
def test_a_long_caption_is_cut_and_still_ends(count: int) -> None:
    made = collect(["red"])
    ids = made.encode("red " * count)
    assert len(ids) == min(count + 2, MAX_TOKENS)
    assert ids[-1] == made.ids["<end>"]
    assert ids.count(made.ids["<end>"]) == 1


def test_a_vocabulary_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = collect(["größe 日本 don't", 'quote " and \\ slash'])
    vocabulary.write(tmp_path / "vocabulary.json", made)
    assert vocabulary.read(tmp_path / "vocabulary.json") == made
    assert vocabulary.read(tmp_path / "vocabulary.json").encode("日本") == made.encode("日本")


LONG = Vocabulary((*SPECIAL, *(f"w{number}" for number in range(30_000))))
"""A caption of it may hold every word once, so that what became of each can be told."""


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_of_the_words_hit_half_are_hidden_a_tenth_exchanged_and_the_rest_left_out(share: float) -> None:
    words = list(range(5, 20_005))
    result = LONG.drop([1, *words, 2], share, np.random.default_rng(0))
    assert result[0] == 1 and result[-1] == 2
    hidden = result.count(4)
    exchanged_outside = sum(index >= 20_005 for index in result)  # about a third of those exchanged
    assert hidden / len(words) == pytest.approx(0.5 * share, rel=0.05)
    assert exchanged_outside / len(words) == pytest.approx(0.1 * share / 3, rel=0.25)
    assert 1 - (len(result) - 2) / len(words) == pytest.approx(0.4 * share, rel=0.05)
    come_back = 1 - np.exp(-0.1 * share * 20_000 / 30_000)  # as what another was exchanged for
    assert len(set(words) - set(result)) / len(words) == pytest.approx(share * (1 - come_back), rel=0.03)


def test_words_that_are_kept_stay_in_order() -> None:
    words = list(range(5, 205))
    without_others = vocabulary.drop_words([[word] for word in words], 0.5, np.random.default_rng(1), mask=4, others=[])
    kept = [index for index in without_others if index != 4]
    assert kept == sorted(kept) and 60 < len(kept) < 140
    assert set(kept) <= set(words)


def test_words_are_never_exchanged_for_special_ones() -> None:
    made = collect(["red three"])
    seen = {
        index for seed in range(300) for index in made.drop([1, 5, 6, 5, 6, 3, 2], 1.0, np.random.default_rng(seed))
    }
    assert seen == {1, 2, 4, 5, 6, 3}
    exchanged = [made.drop([1, 3, 3, 3, 3, 2], 1.0, np.random.default_rng(seed))[1:-1] for seed in range(300)]
    assert {index for result in exchanged if len(result) > 1 for index in result} == {4, 5, 6}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_at_least_one_word_stays(count: int) -> None:
    ids = [1, *range(5, 5 + count), 2]
    results = [LONG.drop(ids, 1.0, np.random.default_rng(seed)) for seed in range(500)]
    assert min(map(len, results)) == 3
    left = {result[1] for result in results if len(result) == 3 and result[1] in ids}
    assert left == set(ids[1:-1]), "which one stays is drawn"


def test_word_drop_is_a_function_of_its_arguments_and_share_zero_is_none() -> None:
    ids = LONG.encode("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")
    assert LONG.drop(ids, 0.5, np.random.default_rng([3, 7])) == LONG.drop(ids, 0.5, np.random.default_rng([3, 7]))
    assert len({tuple(LONG.drop(ids, 0.5, np.random.default_rng([3, seed]))) for seed in range(50)}) > 40
    assert LONG.drop(ids, 0.0, np.random.default_rng(0)) == ids == LONG.encode("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")
    assert LONG.drop([1, 2], 0.5, np.random.default_rng(0)) == [1, 2]
