"""Captions are cut into pieces as BERT's own tokenizer cuts them; the pieces are found where they are published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

from setwise.pipelines import word_pieces
from setwise.pipelines.vocabulary import MAX_TOKENS, Vocabulary, collect
from setwise.pipelines.word_pieces import SPECIAL, WordPieces, tokeniser
from setwise.platform.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = (
    "[PAD]",
    *(f"[unused{number}]" for number in range(3)),
    *SPECIAL[1:],
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS[:20]),
    *("red", "three", "##ing", "above", "the", "##teen", "'", ".", ",", "-", "[", "]", "日", "本", "#", "cafe"),
)
TEXTS = [
    "A red THREE, above the threeing.",
    "don't stop-the red\tred\n",
    "Café naïve ÀÉÎ",
    "日本 red日",
    "thirteen zzz xray 2nd",
    "[SEP] [the] #red ##red",
    "a\x00b\u200bc �",
    "... --- !!!",
    "",
    "b" * 300,
]
words_of = WordPieces(PIECES)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_bert_s_own_tokenizer(text: str) -> None:
    official = BertWordPieceTokenizer(dict(words_of.ids))
    official._tokenizer.encode_special_tokens = True  # "[SEP]" in a caption is text
    assert words_of.encode(text) == official.encode(text).ids


def test_a_caption_is_encoded_between_its_marks() -> None:
    pieces = ["[CLS]", "t", "##h", "##i", "##r", "##teen", ",", "red", "[SEP]"]
    assert words_of.encode("Thirteen, RED") == [words_of.ids[piece] for piece in pieces]
    assert words_of.encode("") == [words_of.ids["[CLS]"], words_of.ids["[SEP]"]]
    assert words_of.ids["[PAD]"] == 0, "the encoders' padding"
    assert len(words_of) == len(PIECES)


@pytest.mark.parametrize("count", [MAX_TOKENS - 3, MAX_TOKENS - 2, MAX_TOKENS - 1, 1000])
def test_a_long_caption_is_cut_and_still_ends(count: int) -> None:
    ids = words_of.encode("red " * count)
    assert len(ids) == min(count + 2, MAX_TOKENS)
    assert ids[-1] == words_of.ids["[SEP]"] and ids.count(words_of.ids["[SEP]"]) == 1


def test_words_that_cannot_be_spelt_are_named() -> None:
    assert words_of.unknown("a Ünited RED !? zxz Xyzzy") == ["!", "?", "zxz", "xyzzy"]
    assert words_of.unknown("A red three") == []


def test_a_mark_in_a_caption_is_text() -> None:
    ids = words_of.encode("[SEP] [PAD] [MASK]")[1:-1]
    assert not set(ids) & {words_of.ids[mark] for mark in ("[CLS]", "[SEP]", "[PAD]", "[MASK]")}


def test_all_pieces_of_a_word_share_its_fate() -> None:
    ids = words_of.encode("thirteen red xzz")
    mask = words_of.ids["[MASK]"]
    words = [ids[1:6], ids[6:7], ids[7:8]]
    assert [words_of.words[word[0]] for word in words] == ["t", "red", "[UNK]"]
    outcomes = set()
    for seed in range(300):
        dropped = words_of.drop(ids, 0.9, np.random.default_rng(seed))
        assert dropped[0] == ids[0] and dropped[-1] == ids[-1]
        rest = dropped[1:-1]
        for word in words:
            if rest[: len(word)] == word:
                outcomes.add(("kept", len(word)))
            elif rest[: len(word)] == [mask] * len(word):
                outcomes.add(("hidden", len(word)))
            elif len(rest) >= len(word) and not set(rest[: len(word)]) & {mask, *word}:
                outcomes.add(("exchanged", len(word)))
            else:
                continue
            rest = rest[len(word) :]
    assert {("kept", 5), ("hidden", 5), ("exchanged", 5), ("hidden", 1)} <= outcomes


def test_words_are_exchanged_for_pieces_that_captions_hold() -> None:
    seen = {
        i for seed in range(500) for i in words_of.drop(words_of.encode("red " * 50), 1.0, np.random.default_rng(seed))
    }
    pieces = {words_of.words[index] for index in seen}
    assert {"[", "]", "##ing", "the"} < pieces
    assert {piece for piece in pieces if len(piece) > 2 and piece.startswith("[")} == {"[CLS]", "[SEP]", "[MASK]"}


def test_the_two_kinds_of_lists_are_told_apart() -> None:
    vocabulary = collect(["a red three"])
    assert tokeniser(vocabulary.words) == vocabulary and isinstance(tokeniser(vocabulary.words), Vocabulary)
    assert tokeniser(PIECES) == words_of and isinstance(tokeniser(PIECES), WordPieces)
    for words in ((), ("red", "three")):
        with pytest.raises(ValueError, match=r"begins with <pad>, one of word pieces with \[PAD\]"):
            tokeniser(words)


def tokenizer_json(words: tuple[str, ...] = PIECES, kind: str = "WordPiece", lowercase: bool = True) -> dict[str, Any]:
    ids = {word: index for index, word in reversed(list(enumerate(words)))}
    return {"model": {"type": kind, "vocab": ids}, "normalizer": {"type": "BertNormalizer", "lowercase": lowercase}}


def test_pieces_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    assert word_pieces.read(str(tmp_path)) == words_of
    shorter = PIECES[:-1]
    (tmp_path / "vocab.txt").write_text("\n".join(shorter) + "\n")
    assert word_pieces.read(str(tmp_path)).words == shorter, "the list itself comes first"
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(shorter).encode())
    assert word_pieces.read(str(tmp_path)).words == shorter


def test_transformers_tokenizer_files_are_read(tmp_path: Path) -> None:
    BertWordPieceTokenizer(dict(words_of.ids)).save(str(tmp_path / "tokenizer.json"))
    assert word_pieces.read(str(tmp_path)) == words_of


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("vocab.txt", "\n".join(PIECES[1:]), r"begins with \['\[unused0\]'\], expected \[PAD\]"),
        ("vocab.txt", "\n".join(piece for piece in PIECES if piece != "[MASK]"), r"\[MASK\] is missing"),
        ("vocab.txt", "\n".join((*PIECES, "red", "the")), "2 of .* are there twice"),
        ("vocab.txt", "\n".join((*PIECES, "The", "##Ing")), "2 are in upper case, the first 'The'"),
        ("vocab.txt", b"[PAD]\n\xff\n", "decode"),
        ("vocab.txt", "", r"begins with \[''\]"),
        ("tokenizer.json", "[PAD]", "Expecting value"),
        ("tokenizer.json", "[]", "not the form"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "not the form"),
        ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": 3}, "normalizer": {}}', "not the form"),
        ("tokenizer.json", json.dumps(tokenizer_json(())), r"begins with \[\]"),
        ("tokenizer.json", json.dumps(tokenizer_json(kind="BPE")), "model BPE"),
        ("tokenizer.json", json.dumps(tokenizer_json(lowercase=False)), "lower case: False"),
        ("tokenizer.json", json.dumps(tokenizer_json()).replace('"[PAD]": 0', '"[PAD]": -1'), "ids not in a row"),
    ],
)
def test_a_file_that_is_not_an_uncased_bert_s_is_refused(
    tmp_path: Path, file: str, content: str | bytes, reason: str
) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason) as caught:
        word_pieces.read(str(tmp_path))
    assert str(tmp_path / file) in str(caught.value)


def test_a_folder_without_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no vocab.txt or tokenizer.json"):
        word_pieces.read(str(tmp_path))


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub that has one model, `org/bert`, without a `vocab.txt`."""
    content = json.dumps(tokenizer_json()).encode()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.partition("?")[0]
            if name != "/org/bert/resolve/main/tokenizer.json":
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if name.startswith("/org/b") else "RepoNotFound")
                self.send_header("Content-Length", "0")
            else:
                self.send_response(200)
                self.send_header("ETag", '"1"')
                self.send_header("X-Repo-Commit", "1" * 40)
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if self.path.startswith("/org/bert/resolve/main/tokenizer.json"):
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read_elsewhere(names: list[str], **environment: str) -> list[str]:
    """What reading each of `names` gives in a process of its own, as the hub's client reads its settings once."""
    code = f"""
from setwise.pipelines import word_pieces
from setwise.platform.errors import SetwiseError
for name in {names!r}:
    try:
        print(len(word_pieces.read(name)))
    except SetwiseError as error:
        print(type(error).__name__, error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_pieces_are_read_from_the_hub_and_then_from_its_cache(tmp_path: Path, hub: str) -> None:
    found, other, none, wrong = read_elsewhere(
        ["org/bert", "org/bare", "nobody/bert", "a/b/c"], HF_ENDPOINT=hub, HF_HOME=str(tmp_path)
    )
    assert found == str(len(PIECES))
    assert other == "DataError model 'org/bare' on the Hugging Face hub has no vocab.txt or tokenizer.json"
    assert none.startswith("DataError 'nobody/bert' is no folder here, and the Hugging Face hub has no such model")
    assert wrong == "DataError a/b/c: neither a folder nor the name of a model on the Hugging Face hub"
    assert read_elsewhere(["org/bert"], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)) == [found]


def test_offline_one_message_says_what_was_wanted_and_what_to_do(tmp_path: Path) -> None:
    (message,) = read_elsewhere(["bert-base-uncased"], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert message.startswith("UnreachableError 'bert-base-uncased' is no folder here")
    for part in (
        "no vocab.txt or tokenizer.json",
        "HF_HUB_OFFLINE",
        "Name a folder",
        "`hf download bert-base-uncased`",
    ):
        assert part in message
