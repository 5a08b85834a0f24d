"""The recurrent text encoder: what it hands over, and independence of padding and of the batch."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from setwise.models.config import BiGRUConfig
from setwise.models.text_encoders import BiGRU

LENGTHS = torch.tensor([2, 6, 4])
TOKENS = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0)) * (torch.arange(6) < LENGTHS[:, None])
Local = Literal["words", "states"]
both_local_features = pytest.mark.parametrize("local", ["words", "states"])


def encoder(local: Local = "words") -> BiGRU:
    torch.manual_seed(0)
    config = BiGRUConfig(kind="bigru", word_dim=10, dropout=0.5, local_features=local)
    return BiGRU(config, vocabulary_size=30, embed_size=12).eval()


def naive_states(net: BiGRU, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States (N,D) and global feature (D,) of one caption without padding, each direction run for itself."""
    forward, backward = torch.nn.GRUCell(10, 12), torch.nn.GRUCell(10, 12)
    for cell, suffix in ((forward, ""), (backward, "_reverse")):
        weights = {name: getattr(net.gru, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh")}
        biases = {name: getattr(net.gru, f"{name}_l0{suffix}") for name in ("bias_ih", "bias_hh")}
        cell.load_state_dict(weights | biases)
    words = net.embedding(tokens)
    runs = []
    for cell, order in ((forward, range(len(tokens))), (backward, reversed(range(len(tokens))))):
        state, states = torch.zeros(12), {}
        for n in order:
            state = cell(words[n], state)
            states[n] = state
        runs.append((torch.stack([states[n] for n in range(len(tokens))]), state))
    return (runs[0][0] + runs[1][0]) / 2, (runs[0][1] + runs[1][1]) / 2


def test_directions_are_averaged_and_padding_and_neighbours_have_no_influence() -> None:
    features = encoder("states")(TOKENS, LENGTHS)
    for b, length in enumerate(LENGTHS):
        states, pooled = naive_states(encoder(), TOKENS[b, :length])
        torch.testing.assert_close(features.local[b, :length], states, rtol=0, atol=1e-6)
        torch.testing.assert_close(features.pooled[b], pooled, rtol=0, atol=1e-6)


def test_words_are_the_embeddings_and_both_kinds_share_the_global_feature() -> None:
    words, states = encoder("words")(TOKENS, LENGTHS), encoder("states")(TOKENS, LENGTHS)
    torch.testing.assert_close(words.local, encoder().embedding(TOKENS))
    assert (encoder("words").local_dim, encoder("states").local_dim) == (10, 12)
    assert words.local.shape == (3, 6, 10) and states.local.shape == (3, 6, 12)
    assert torch.equal(words.pooled, states.pooled)
    assert words.lengths is not None and torch.equal(words.lengths, LENGTHS) and words.grid is None


@both_local_features
def test_wider_padding_keeps_shape_and_values(local: Local) -> None:
    wider = torch.nn.functional.pad(TOKENS, (0, 3))
    narrow, wide = encoder(local)(TOKENS, LENGTHS), encoder(local)(wider, LENGTHS)
    assert wide.local.shape[1] == 9
    torch.testing.assert_close(wide.pooled, narrow.pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(wide.local[:, :6], narrow.local, rtol=0, atol=1e-6)


@both_local_features
def test_dropout_acts_in_training_only(local: Local) -> None:
    net = encoder(local).train()
    assert (net(TOKENS, LENGTHS).local[1] == 0).any()
    assert not (encoder(local)(TOKENS, LENGTHS).local[1] == 0).any()


def test_padding_token_has_no_embedding_and_learns_none() -> None:
    net = encoder()
    features = net(TOKENS, LENGTHS)
    (features.local.sum() + features.pooled.sum()).backward()
    assert not net.embedding.weight[0].any()
    assert net.embedding.weight.grad is not None
    assert not net.embedding.weight.grad[0].any() and net.embedding.weight.grad[TOKENS[0, 0]].any()


def test_a_caption_without_words_is_refused() -> None:
    with pytest.raises(RuntimeError, match="greater than 0"):
        encoder()(TOKENS, torch.tensor([0, 6, 4]))
