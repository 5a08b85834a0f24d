"""Words and their ids, taken from the training captions alone and saved with every model."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from setwise.platform.errors import DataError

if TYPE_CHECKING:
    import numpy as np

PAD, START, END, UNKNOWN, MASK = "<pad>", "<start>", "<end>", "<unk>", "<mask>"
SPECIAL = (PAD, START, END, UNKNOWN, MASK)
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
MAX_TOKENS = 64
"""Longer captions are cut; most have 8 to 20 words."""


def tokenize(text: str) -> list[str]:
    """Lower-case words; punctuation is dropped, as it names nothing."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


@dataclass(frozen=True)
class Vocabulary:
    """Ids of words: 0 is padding, 1 and 2 mark start and end, 3 stands for every unknown word, 4 hides a word."""

    words: tuple[str, ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, between the marks of start and end, cut to MAX_TOKENS."""
        words = tokenize(text)[: MAX_TOKENS - 2]
        unknown = self.ids[UNKNOWN]
        return [self.ids[START], *(self.ids.get(word, unknown) for word in words), self.ids[END]]

    def unknown(self, text: str) -> list[str]:
        """Words of `text` that no training caption has."""
        return [word for word in tokenize(text) if word not in self.ids]

    @cached_property
    def ordinary(self) -> list[int]:
        """Ids of what a caption can hold: all but the special ones."""
        return [index for index, word in enumerate(self.words) if word not in SPECIAL]

    def drop(self, ids: list[int], share: float, random: np.random.Generator) -> list[int]:
        """An encoded caption with words dropped as `drop_words` says; the marks of start and end stay."""
        words = drop_words([[index] for index in ids[1:-1]], share, random, self.ids[MASK], self.ordinary)
        return [ids[0], *words, ids[-1]]


def drop_words(
    words: list[list[int]], share: float, random: np.random.Generator, mask: int, others: list[int]
) -> list[int]:
    """Word drop, which augments captions in training (method: VSE infinity and the authors' published code).

    A word is hit with probability `share`. Of those hit, half are hidden, a tenth become other words, and the rest are
    left out; where that would leave nothing, one of them stays.

    Args:
        words: ids of each word, several where a word is cut into pieces, each of which is hidden or exchanged then.
        random: whose next numbers decide everything.
        mask: the id that hides.
        others: the ids that exchanged ones are drawn from; where it is empty, they are hidden.

    Returns:
        The ids of all words that are left, in order.
    """
    fate = random.random(len(words)) / share if share else [1.0] * len(words)
    result: list[int] = []
    for word, value in zip(words, fate, strict=True):
        if value >= 1:
            result += word
        elif value < 0.5 or (value < 0.6 and not others):
            result += [mask] * len(word)
        elif value < 0.6:
            result += [others[place] for place in random.integers(len(others), size=len(word))]
    if words and not result:
        result = list(words[random.integers(len(words))])
    return result


def collect(captions: Iterable[str], min_count: int = 1) -> Vocabulary:
    """The words of `captions` that occur `min_count` times, most frequent first, ties in alphabetical order."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    return Vocabulary((*SPECIAL, *words))


def write(path: Path, vocabulary: Vocabulary) -> None:
    path.write_text(json.dumps(vocabulary.words, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def read(path: Path) -> Vocabulary:
    """The words in a file. Raises DataError if it is missing or damaged."""
    try:
        words = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a list of words ({error}). Prepare the data set again") from error
    return Vocabulary(tuple(words))
