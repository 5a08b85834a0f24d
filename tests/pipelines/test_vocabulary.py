"""Words are found alike in training and in use, and a vocabulary survives its file."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from setwise.pipelines import vocabulary
from setwise.pipelines.vocabulary import MAX_TOKENS, SPECIAL, collect, tokenize


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
    assert made.ids["<pad>"] == 0, "the encoders' padding"


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
