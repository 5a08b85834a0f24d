"""Word vectors and published BERTs are read as they are, or refused with the place of what is wrong."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from setwise.models.config import BertConfig, BiGRUConfig
from setwise.models.text_encoders import Bert, BiGRU
from setwise.pipelines.text_weights import load_bert, load_word_vectors, simpler, start_from_word_vectors
from setwise.pipelines.vocabulary import SPECIAL
from setwise.platform.errors import DataError

WORDS = (*SPECIAL, "red", "don't", "größe", "t-shirt/top", "zebra", "u.s.", "dont")
LINES = [
    "the 9 9 9",
    ". . . 9 9 9",
    "dont 1.5 -2 3e-1",
    "at name@domain.com 8 8 8",
    "größe 4 5 6",
    "<unk> 7 7 7",
    "tshirt 0.5 0.25 0.125",
    "us 1 1 1",
    "red 0.1 0.2 0.3",
    "u.s. 2 2 2",
    "red 9 9 9",
    "a\u00a0b\u0085 7 7 7",
]
FOUND = {
    "red": (0.1, 0.2, 0.3),
    "don't": (1.5, -2, 0.3),
    "dont": (1.5, -2, 0.3),
    "größe": (4, 5, 6),
    "t-shirt/top": (0.5, 0.25, 0.125),
    "u.s.": (2, 2, 2),
}


def text_of(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


@pytest.mark.parametrize("lines", [LINES, LINES[::-1][1:]], ids=["as they are", "backwards"])
@pytest.mark.parametrize("form", ["plain", "packed", "windows", "trailing space"])
def test_vectors_are_those_of_the_file(tmp_path: Path, lines: list[str], form: str) -> None:
    if lines is not LINES:
        lines = [line for line in lines if line != "red 9 9 9"]  # backwards it would come first, and count
    content = text_of(lines)
    if form == "windows":
        content = content.replace(b"\n", b"\r\n")
    if form == "trailing space":
        content = content.replace(b"\n", b" \n")
    path = tmp_path / "vectors.txt"
    path.write_bytes(gzip.compress(content) if form == "packed" else content)
    vectors, found = load_word_vectors(path, WORDS, 3)
    assert vectors.dtype == np.float32 and vectors.shape == (len(WORDS), 3)
    assert {word for word, is_found in zip(WORDS, found, strict=True) if is_found} == set(FOUND)
    for word, vector in zip(WORDS, vectors, strict=True):
        assert vector.tolist() == [np.float32(number) for number in FOUND.get(word, (0, 0, 0))], word


def test_a_word_is_looked_up_again_in_a_simpler_spelling() -> None:
    assert [simpler(word) for word in ("t-shirt/top", "u.s.", "don't", "red", "-", "/x")] == [
        *("tshirt", "us", "dont", "red"),
        *("", ""),
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (text_of([*LINES, "blue 1 2"]), ":13: 2 numbers behind the word, expected 3"),
        (text_of(["red 1 2 3 4", *LINES]), ":1: 4 numbers behind the word, expected 3"),
        (text_of(["400000 300", *LINES]), ":1: 1 numbers behind the word, expected 3"),
        (text_of([*LINES, ""]), ":13: 0 numbers behind the word"),
        (text_of(["zebra 1 two 3"]), ":1: could not convert string to float: b'two'"),
        (text_of(["zebra 1  3"]), ":1: could not convert string to float: b''"),
        (text_of(["zebra 1 nan 3"]), ":1: a number is not finite"),
        (text_of(["zebra 1 1e39 3"]), ":1: a number is not finite"),
        (b"caf\xe9 1 2 3\n", ":1: the word is not UTF-8"),
        (text_of(LINES) + b"zebra 1 2 3", ":13: the line has no end. The file is cut short"),
        (b"\x00" * 1_000_000, ":1: the line has no end"),
        (b"", ": the file is empty"),
        (gzip.compress(text_of(LINES), mtime=0)[:-12], ": cannot be unpacked"),
        (gzip.compress(text_of(LINES), mtime=0)[:20], ": cannot be unpacked"),
        (b"\x1f\x8b no gzip", ": cannot be unpacked"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_place(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_word_vectors(path, WORDS, 3)
    assert f"{path}{reason}" in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read .*expected a file of word vectors") as caught:
            load_word_vectors(path, WORDS, 3)
        assert str(path) in str(caught.value)


def test_words_that_are_not_asked_for_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    row = " ".join(["0.12345"] * 300)
    path.write_text("".join(f"word{number} {row}\n" for number in range(5000)))
    code = f"""
import resource
from pathlib import Path
from setwise.pipelines.text_weights import load_word_vectors
load_word_vectors(Path({str(path)!r}), ("word1",), 300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
vectors, found = load_word_vectors(Path({str(path)!r}), ("word1", "word4999", "none"), 300)
print(found.sum(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    found, kilobytes = map(int, done.stdout.split())
    assert found == 2 and kilobytes < 2_000


def test_an_embedding_starts_from_the_vectors_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(text_of([line.removesuffix(line[-1]) + line[-1] + " 0.75" for line in LINES]))
    torch.manual_seed(0)
    bigru = BiGRU(BiGRUConfig(kind="bigru", word_dim=4), len(WORDS), 8)
    before = bigru.embedding.weight.detach().clone()
    assert start_from_word_vectors(bigru, path, WORDS) == pytest.approx(6 / 7)
    after = bigru.embedding.weight.detach()
    for word, old, new in zip(WORDS, before, after, strict=True):
        expected = torch.tensor([*FOUND[word], 0.75]) if word in FOUND else old
        assert torch.equal(new, expected), word
    assert not after[0].any(), "padding has no embedding"
    assert bigru.embedding.weight.requires_grad


def test_vectors_of_another_width_than_the_embedding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_bytes(text_of(LINES))
    bigru = BiGRU(BiGRUConfig(kind="bigru", word_dim=4), len(WORDS), 8)
    with pytest.raises(DataError, match=r"vectors.txt:1: 3 numbers behind the word, expected 4 \(word_dim\)"):
        start_from_word_vectors(bigru, tmp_path / "vectors.txt", WORDS)


SIZES = {"layers": 2, "width": 24, "heads": 3, "ff_width": 40, "max_tokens": 64}


def our_bert(**settings: Any) -> Bert:
    torch.manual_seed(1)
    return Bert(
        BertConfig.model_validate({"kind": "bert"} | SIZES | settings), vocabulary_size=30, embed_size=12
    ).eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random BERT as transformers saves it, with heads of other tasks."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    transformers.BertForPreTraining(config).save_pretrained(folder)
    return folder


def copy(published: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a copy of the folder, to be changed and saved there."""
    (folder / "config.json").write_bytes((published / "config.json").read_bytes())
    return load_file(published / "model.safetensors")


def hidden(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(torch.arange(1, 25).view(2, 12)).last_hidden_state
    return result


def test_a_published_bert_computes_what_transformers_own_does(published: Path) -> None:
    bert = our_bert()
    projection = bert.project.weight.detach().clone()
    load_bert(bert, str(published))
    tokens, lengths = torch.arange(1, 25).view(2, 12), torch.tensor([12, 7])
    expected = transformers.BertModel.from_pretrained(published).eval()(
        tokens, attention_mask=(torch.arange(12) < lengths[:, None]).long()
    )
    local = bert.project(expected.last_hidden_state)
    features = bert(tokens, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(features.local[row, :length], local[row, :length], rtol=0, atol=1e-5)
    assert torch.equal(bert.project.weight, projection)


def test_the_names_of_the_first_berts_are_understood(published: Path, tmp_path: Path) -> None:
    tensors = copy(published, tmp_path)
    assert any(name.startswith("cls.") for name in tensors)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    bare = {name.removeprefix("bert."): tensor.half() for name, tensor in tensors.items()}
    expected = our_bert()
    load_bert(expected, str(published))
    for number, weights in enumerate((old, bare)):
        assert weights.keys() != tensors.keys()
        save_file(weights, tmp_path / "model.safetensors")
        bert = our_bert()
        load_bert(bert, str(tmp_path))
        for name, weight in bert.bert.state_dict().items():
            torch.testing.assert_close(weight, expected.bert.state_dict()[name], rtol=0, atol=[0, 1e-3][number])
            assert weight.dtype == torch.float32


def test_a_bert_of_other_sizes_is_refused_with_both(published: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_bert(our_bert(width=36, layers=1, heads=2), str(published))
    message = str(caught.value)
    assert str(published / "config.json") in message
    for part in ("width 24, expected 36", "layers 2, expected 1", "heads 3, expected 2"):
        assert part in message
    assert "ff_width" not in message
    other_words = Bert(our_bert().config, vocabulary_size=31, embed_size=12)
    with pytest.raises(DataError, match="word pieces 30, expected 31"):
        load_bert(other_words, str(published))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "roberta"}, "type 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "relative_key positions"),
        ({"hidden_act": "gelu_new"}, "activation gelu_new, expected gelu"),
        ({"hidden_size": "wide"}, "not the configuration of a BERT|width wide, expected"),  # by transformers' version
        ([], "not the configuration of a BERT"),
        ("{", "not the configuration of a BERT"),
    ],
)
def test_another_kind_of_model_is_refused(published: Path, tmp_path: Path, config: Any, reason: str) -> None:
    copy(published, tmp_path)
    content = json.loads((published / "config.json").read_text())
    text = config if isinstance(config, str) else json.dumps(content | config if isinstance(config, dict) else config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        load_bert(our_bert(), str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_weights_that_lack_some_are_refused_and_nothing_is_changed(published: Path, tmp_path: Path) -> None:
    tensors = copy(published, tmp_path)
    bert = our_bert()
    before = {name: weight.clone() for name, weight in bert.state_dict().items()}
    name = "bert.encoder.layer.1.output.dense.bias"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"1 of 37 weights are missing, the first encoder.layer.1.output.dense.bias"):
        load_bert(bert, str(tmp_path))
    save_file(tensors | {name: torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"encoder.layer.1.output.dense.bias has shape \(7,\), expected \(24,\)"):
        load_bert(bert, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model.safetensors: not a file of weights, or damaged"):
        load_bert(bert, str(tmp_path))
    assert all(torch.equal(weight, before[name]) for name, weight in bert.state_dict().items())


def test_a_folder_without_weights_or_with_pickled_ones_is_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no config.json"):
        load_bert(our_bert(), str(tmp_path))
    tensors = copy(published, tmp_path)
    with pytest.raises(DataError, match=r"has no model.safetensors"):
        load_bert(our_bert(), str(tmp_path))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model.bin, are not read, since they may run code.*save_pretrained"):
        load_bert(our_bert(), str(tmp_path))


def test_offline_one_message_says_what_was_wanted_and_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, as the hub's client reads its settings once."""
    code = """
from setwise.pipelines import text_weights
from setwise.platform.errors import UnreachableError
try:
    text_weights.load_bert(None, "bert-base-uncased")
except UnreachableError as error:
    print(error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    (message,) = done.stdout.splitlines()
    for part in (
        "'bert-base-uncased' is no folder",
        "no config.json",
        "HF_HUB_OFFLINE",
        "`hf download bert-base-uncased`",
    ):
        assert part in message
