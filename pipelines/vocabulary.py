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

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unk>"
SPECIAL = (PAD, START, END, UNKNOWN)
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
MAX_TOKENS = 64
"""Longer captions are cut; most have 8 to 20 words."""


def tokenize(text: str) -> list[str]:
    """Lower-case words; punctuation is dropped, as it names nothing."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


@dataclass(frozen=True)
class Vocabulary:
    """Ids of words: 0 is padding, 1 and 2 mark start and end, 3 stands for every unknown word."""

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


def collect(captions: Iterable[str], min_count: int = 1) -> Vocabulary:
    """The words of `captions` that occur `min_count` times, most frequent first, ties in alphabetical order."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    return Vocabulary((*SPECIAL, *words))


def write(path: Path, vocabulary: Vocabulary) -> None:
    path.write_text(json.dumps(vocabulary.words, ensure_ascii=False, indent=0) + "\n")


def read(path: Path) -> Vocabulary:
    return Vocabulary(tuple(json.loads(path.read_bytes())))
