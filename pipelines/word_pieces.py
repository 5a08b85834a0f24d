"""Word pieces, as BERT reads captions: words that its vocabulary lacks are spelt in pieces.

A list of pieces is all it takes, and like the list of a vocabulary's words it is saved with every model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setwise.pipelines.vocabulary import MAX_TOKENS, Vocabulary, drop_words
from setwise.pipelines.vocabulary import PAD as PAD_WORD
from setwise.platform.errors import DataError, UnreachableError

if TYPE_CHECKING:
    import numpy as np

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNKNOWN, START, END, MASK)
INSIDE = "##"
"""How pieces begin that go on with a word."""


@dataclass(frozen=True)
class WordPieces:
    """Ids of word pieces in lower case without accents, cut as for `bert-base-uncased`; 0 is padding."""

    words: tuple[str, ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.words)}

    @cached_property
    def _tokenizer(self) -> Any:
        # Not the library's ready-made BERT tokenizer, which takes a "[SEP]" in a caption for the mark of its end.
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        tokenizer = Tokenizer(models.WordPiece(self.ids, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of a caption's pieces, between the marks of start and end, cut to MAX_TOKENS."""
        pieces: list[int] = self._tokenizer.encode(text).ids
        return [self.ids[START], *pieces[: MAX_TOKENS - 2], self.ids[END]]

    def unknown(self, text: str) -> list[str]:
        """Words of `text` that cannot be spelt in these pieces."""
        encoding = self._tokenizer.encode(text)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end].lower() for index, (start, end) in spans if index == self.ids[UNKNOWN]]

    @cached_property
    def ordinary(self) -> list[int]:
        """Ids of what a caption can hold: all but the special ones and those that were left free, [unused0]..."""
        return [
            index for index, piece in enumerate(self.words) if not (len(piece) > 2 and piece[0] + piece[-1] == "[]")
        ]

    def drop(self, ids: list[int], share: float, random: np.random.Generator) -> list[int]:
        """An encoded caption with words dropped, all pieces of each, as `drop_words` says; the marks stay."""
        words: list[list[int]] = []
        for index in ids[1:-1]:
            if words and self.words[index].startswith(INSIDE):
                words[-1].append(index)
            else:
                words.append([index])
        return [ids[0], *drop_words(words, share, random, self.ids[MASK], self.ordinary), ids[-1]]


Words = Vocabulary | WordPieces
"""What turns a caption into ids."""


def tokeniser(words: tuple[str, ...]) -> Words:
    """The vocabulary or the word pieces that a saved list belongs to, told apart by their padding.

    Raises:
        ValueError: it is neither.
    """
    if words[:1] == (PAD_WORD,):
        return Vocabulary(words)
    if words[:1] == (PAD,):
        return WordPieces(words)
    raise ValueError(
        f"a list of words begins with {PAD_WORD}, one of word pieces with {PAD}; this one with {words[:1]}"
    )


def read(source: str) -> WordPieces:
    """The word pieces that BERT weights were trained with.

    Args:
        source: a folder with `vocab.txt` or `tokenizer.json`, or the name of a model on the Hugging Face hub.

    Raises:
        DataError: they are not there, or not those of an uncased BERT.
        UnreachableError: the hub cannot be asked.
    """
    path = published_file(source, "vocab.txt", "tokenizer.json")
    try:
        text = path.read_text("utf-8")
        words = _of_tokenizer(json.loads(text)) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
        _check(words)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: these are not the word pieces of an uncased BERT: {error}") from error
    return WordPieces(tuple(words))


def _of_tokenizer(tokenizer: Any) -> list[str]:
    """The pieces in the order of their ids, from the content of a `tokenizer.json`."""
    try:
        kind, ids, normalizer = tokenizer["model"]["type"], tokenizer["model"]["vocab"], tokenizer["normalizer"]
        words = sorted(ids, key=ids.__getitem__)
        in_order = [ids[word] for word in words] == list(range(len(words)))
        uncased = normalizer["lowercase"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("it has not the form of a BERT tokenizer") from error
    if kind != "WordPiece" or not in_order or not uncased:
        raise ValueError(
            f"model {kind}, {len(words):,} ids {'' if in_order else 'not '}in a row, lower case: {uncased}"
        )
    return words


def _check(words: list[str]) -> None:
    if words[:1] != [PAD]:
        raise ValueError(f"it begins with {words[:1]}, expected {PAD}, since 0 is padding")
    if missing := [piece for piece in SPECIAL if piece not in words]:
        raise ValueError(f"{', '.join(missing)} is missing")
    if len(set(words)) != len(words):
        raise ValueError(f"{len(words) - len(set(words))} of {len(words):,} are there twice")
    cased = [piece for piece in words if re.search("[A-Z]", piece) and not piece.startswith("[")]
    if cased:
        raise ValueError(f"{len(cased):,} are in upper case, the first {cased[0]!r}")


def published_file(source: str, *names: str) -> Path:
    """The first of the files called `names` that a published model has.

    Args:
        source: a folder, or the name of a model on the Hugging Face hub, from where the file comes into its cache.

    Raises:
        DataError: there is no such folder or model, or it has none of these files.
        UnreachableError: the hub cannot be asked, or HF_HUB_OFFLINE forbids it, and the cache has none of the files.
    """
    folder, wanted = Path(source).expanduser(), " or ".join(names)
    if source and folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise DataError(f"{folder} has no {wanted}")
    from huggingface_hub import errors, hf_hub_download

    unreachable: Exception | None = None
    for name in names:
        try:
            # Where the hub did not answer, only the cache is asked for the other names: each try takes half a minute.
            return Path(hf_hub_download(source, name, local_files_only=unreachable is not None))
        except errors.HFValidationError as error:
            raise DataError(f"{source}: neither a folder nor the name of a model on the Hugging Face hub") from error
        except errors.RepositoryNotFoundError as error:
            raise DataError(
                f"'{source}' is no folder here, and the Hugging Face hub has no such model, or none that it shows you "
                "(for a private one, log in: hf auth login)"
            ) from error
        except errors.RemoteEntryNotFoundError:
            continue
        except (OSError, errors.HTTPError) as error:
            unreachable = unreachable or error
    if unreachable is None:
        raise DataError(f"model '{source}' on the Hugging Face hub has no {wanted}")
    reason = str(unreachable.__cause__ or unreachable).partition("\n")[0]
    raise UnreachableError(
        f"'{source}' is no folder here, and the Hugging Face hub gave no {wanted} of a model of that name: {reason} "
        f"Name a folder that has it, or run `hf download {source}` once with a network and without HF_HUB_OFFLINE."
    ) from unreachable
