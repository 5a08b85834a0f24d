"""The text encoders: what they hand over, and independence of padding and of the batch, in training as well."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from setwise.models.config import BertConfig, BiGRUConfig
from setwise.models.dropout import SampleDropout, name_layers
from setwise.models.set_prediction import Features
from setwise.models.text_encoders import Bert, BiGRU, text_encoder

LENGTHS = torch.tensor([2, 6, 4])
KEYS = torch.tensor([11, 2**40 + 3, 7])
TOKENS = torch.randint(1, 30, (3, 6), generator=torch.Generator().manual_seed(0)) * (torch.arange(6) < LENGTHS[:, None])
WIDER = nn.functional.pad(TOKENS, (0, 3))


def bigru(**settings: Any) -> BiGRU:
    torch.manual_seed(0)
    config = BiGRUConfig.model_validate({"kind": "bigru", "word_dim": 10, "dropout": 0.5} | settings)
    net = BiGRU(config, vocabulary_size=30, embed_size=12).double().eval()
    name_layers(net)
    return net


def bert(**settings: Any) -> Bert:
    torch.manual_seed(0)
    sizes = {"kind": "bert", "layers": 2, "width": 24, "heads": 3, "ff_width": 40, "max_tokens": 64, "dropout": 0.3}
    net = Bert(BertConfig.model_validate(sizes | settings), vocabulary_size=30, embed_size=12).double().eval()
    for parameter in net.bert.parameters():
        nn.init.normal_(parameter, std=0.3)  # from BERT's own start, attention makes next to no difference
    name_layers(net)
    return net


EVERY_BIGRU = [
    {"local_features": local, "directions": directions, "pooling": pooling}
    for local in ("words", "states")
    for directions in ("mean", "concatenated")
    for pooling in ("last", "max")
]
Make = Callable[[], BiGRU | Bert]
every_encoder = pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda s=s: bigru(**s), id="bigru-" + "-".join(s.values())) for s in EVERY_BIGRU),
        pytest.param(lambda: bert(pooling="max"), id="bert-max"),
        pytest.param(lambda: bert(pooling="cls"), id="bert-cls"),
    ],
)


def row_of(features: Features, row: int, length: int) -> tuple[Tensor, Tensor]:
    """One caption's local features without padding (n,X), and its global feature (D,)."""
    return features.local[row, :length], features.pooled[row]


def gradients(net: nn.Module, local: Tensor, pooled: Tensor) -> list[Tensor]:
    """Of a sum that weighs every number of one caption's features differently."""
    weights = torch.linspace(-1, 2, local.numel(), dtype=local.dtype).view_as(local)
    total = (local * weights).sum() + (pooled * torch.arange(len(pooled))).sum()
    return list(torch.autograd.grad(total, list(net.parameters()), retain_graph=True, materialize_grads=True))


@every_encoder
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_padding_and_neighbours_have_no_influence(make: Make, training: bool) -> None:
    net = make().train(training)
    order = [2, 0, 1]
    together = net(WIDER[order], LENGTHS[order], KEYS[order])
    assert together.local.shape[1] == 9
    for place, row in enumerate(order):
        length = int(LENGTHS[row])
        one = slice(row, row + 1)
        alone = row_of(net(TOKENS[one, :length], LENGTHS[one], KEYS[one]), 0, length)
        beside_others = row_of(together, place, length)
        torch.testing.assert_close(beside_others, alone)
        torch.testing.assert_close(gradients(net, *beside_others), gradients(net, *alone))
        if training:
            other = row_of(net(TOKENS[one, :length], LENGTHS[one], KEYS[one] + 1), 0, length)
            assert not torch.allclose(other[1], alone[1]), "another key drops other elements"


@every_encoder
def test_padding_is_named_and_captions_have_no_grid(make: Make) -> None:
    net = make()
    features = net(WIDER, LENGTHS)
    words = isinstance(net, BiGRU) and net.config.local_features == "words"
    assert features.local.shape == (3, 9, 10 if words else 12) and features.pooled.shape == (3, 12)
    assert features.is_padding is not None and features.grid is None
    assert [row.tolist() for row in features.is_padding] == [[n >= length for n in range(9)] for length in LENGTHS]


@every_encoder
def test_every_parameter_learns(make: Make) -> None:
    net = make().train()
    features = net(TOKENS, LENGTHS, KEYS)
    (features.local.square().sum() + features.pooled.square().sum()).backward()
    silent = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {name for name, _ in net.named_parameters() if name.endswith("key.bias")}, "softmax ignores it"


@every_encoder
@pytest.mark.parametrize("keys", [None, KEYS[:0]], ids=["keyless", "keyed"])
def test_no_captions_have_features_that_reach_every_parameter(make: Make, keys: Tensor | None) -> None:
    """A worker may be left without captions in an epoch's last batch, while the others wait for its gradients."""
    net = make().train()
    some, none = net(TOKENS, LENGTHS, KEYS), net(TOKENS[:0], LENGTHS[:0], keys)
    assert none.local.shape == (0, *some.local.shape[1:]) and none.pooled.shape == (0, 12)
    assert none.is_padding.shape == (0, 6)
    (none.local.sum() + none.pooled.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.parameters())


def test_the_encoder_is_the_one_of_the_settings() -> None:
    assert isinstance(text_encoder(BiGRUConfig(kind="bigru"), 30, 12), BiGRU)
    assert isinstance(text_encoder(bert().config, 30, 12), Bert)


def naive_bigru(net: BiGRU, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States (N,D) and the final states (D,) of one caption without padding, each direction run for itself."""
    state_dim = net.gru.hidden_size
    runs = []
    for suffix, order in (("", range(len(tokens))), ("_reverse", reversed(range(len(tokens))))):
        cell = nn.GRUCell(10, state_dim).double()
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        cell.load_state_dict({name: getattr(net.gru, f"{name}_l0{suffix}") for name in names})
        words, state, states = net.embedding(tokens), torch.zeros(state_dim).double(), {}
        for n in order:
            state = cell(words[n], state)
            states[n] = state
        runs.append((torch.stack([states[n] for n in range(len(tokens))]), state))
    (forward, final_forward), (backward, final_backward) = runs
    if net.config.directions == "mean":
        return (forward + backward) / 2, (final_forward + final_backward) / 2
    return torch.cat((forward, backward), dim=1), torch.cat((final_forward, final_backward))


@pytest.mark.parametrize("settings", EVERY_BIGRU, ids=lambda settings: "-".join(settings.values()))
def test_bigru_is_what_two_runs_over_the_words_give(settings: dict[str, Any]) -> None:
    net = bigru(**settings)
    features = net(TOKENS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        states, final = naive_bigru(net, TOKENS[row, :length])
        local = net.embedding(TOKENS[row, :length]) if settings["local_features"] == "words" else states
        pooled = final if settings["pooling"] == "last" else states.max(0).values
        torch.testing.assert_close(row_of(features, row, length), (local, pooled))


def test_bigru_drops_words_states_and_final_states_independently() -> None:
    tokens, lengths, keys = torch.full((200, 8), 5), torch.full((200,), 8), torch.arange(200)
    words = bigru(local_features="words").train()(tokens, lengths, keys)
    states = bigru(local_features="states").train()(tokens, lengths, keys)
    masks = [words.local == 0, states.local == 0, states.pooled == 0]
    for mask in masks:
        assert 0.47 < mask.double().mean() < 0.53
    assert torch.equal(states.pooled, words.pooled)
    # A word's ten elements against a state's first, the last state's against the final one's: alike by chance alone.
    assert 0.45 < (masks[0] == masks[1][..., :10]).double().mean() < 0.55
    assert 0.45 < (masks[1][:, -1] == masks[2]).double().mean() < 0.55


def test_padding_token_has_no_embedding_and_learns_none() -> None:
    net = bigru()
    features = net(TOKENS, LENGTHS)
    (features.local.sum() + features.pooled.sum()).backward()
    assert not net.embedding.weight[0].any()
    assert net.embedding.weight.grad is not None
    assert not net.embedding.weight.grad[0].any() and net.embedding.weight.grad[TOKENS[0, 0]].any()


def naive_bert(net: Bert, tokens: Tensor) -> Tensor:
    """Last hidden state (N,W) of one caption without padding, by torch's own layer."""
    weights = net.bert.state_dict()
    words, places, kinds = (
        weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
    )
    norm = weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]
    x = nn.functional.layer_norm(words[tokens] + places[: len(tokens)] + kinds[0], (24,), *norm, eps=1e-12)
    for number in range(net.config.layers):
        layer = nn.TransformerEncoderLayer(24, 3, 40, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
        state = {}
        for kind in ("weight", "bias"):
            name = f"encoder.layer.{number}.{{}}.{kind}".format
            attention = [weights[name(f"attention.self.{part}")] for part in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(attention)
            state[f"self_attn.out_proj.{kind}"] = weights[name("attention.output.dense")]
            state[f"norm1.{kind}"] = weights[name("attention.output.LayerNorm")]
            state[f"linear1.{kind}"] = weights[name("intermediate.dense")]
            state[f"linear2.{kind}"] = weights[name("output.dense")]
            state[f"norm2.{kind}"] = weights[name("output.LayerNorm")]
        layer.load_state_dict(state)
        x = layer.double().eval()(x[None])[0]
    return x


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_bert_is_what_torch_s_own_layers_give(pooling: str) -> None:
    net = bert(pooling=pooling)
    features = net(TOKENS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        local = naive_bert(net, TOKENS[row, :length]) @ net.project.weight.T + net.project.bias
        pooled = local[0] if pooling == "cls" else local.max(0).values
        torch.testing.assert_close(row_of(features, row, length), (local, pooled))


def test_attention_by_keys_without_anything_dropped_is_plain_attention() -> None:
    net = bert()
    plain = net(WIDER, LENGTHS)
    for module in net.train().modules():
        if isinstance(module, SampleDropout):
            module.p = 1e-9
    by_keys = net(WIDER, LENGTHS, KEYS)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(row_of(by_keys, row, length), row_of(plain, row, length), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keys", [None, KEYS], ids=["keyless", "keyed"])
def test_bert_takes_its_last_hidden_state_instead_of_tokens(keys: Tensor | None) -> None:
    net = bert()
    hidden = torch.stack(
        [nn.functional.pad(naive_bert(net, TOKENS[r, :n]), (0, 0, 0, 6 - n)) for r, n in enumerate(LENGTHS)]
    )
    expected, features = net(TOKENS, LENGTHS), net(hidden, LENGTHS, keys)
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(row_of(features, row, length), row_of(expected, row, length))


def test_all_of_bert_s_dropouts_go_by_keys_each_in_its_own_way() -> None:
    net = bert()
    layers = [module for module in net.modules() if isinstance(module, SampleDropout)]
    assert not [module for module in net.modules() if isinstance(module, nn.Dropout)]
    assert len({layer.salt for layer in layers}) == len(layers) == 1 + 3 * 2
    assert {layer.p for layer in layers} == {0.3}


def dropped_attention(net: Bert, keys: Tensor | None) -> list[Tensor]:
    """Where the attention of each layer was dropped, (B,H,Q,N) bool, for captions of sixteen equal tokens."""
    seen: list[Tensor] = []
    hooks = [
        layer.attention.self.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
        for layer in net.bert.encoder.layer
    ]
    net.train()(torch.full((60, 16), 5), torch.full((60,), 16), keys)
    for hook in hooks:
        hook.remove()
    return [mask.view(60, 3, 16, 16) for mask in seen]


def test_attention_is_dropped_by_head_query_and_token() -> None:
    first, second = dropped_attention(bert(), torch.arange(60))
    assert 0.29 < first.double().mean() < 0.31
    for axis in range(4):  # each caption, head, query and token is dropped from as often as the others
        shares = first.double().mean([other for other in range(4) if other != axis])
        assert shares.min() > 0.2 and shares.max() < 0.4
    chance = 0.3**2 + 0.7**2
    for one, other in (
        (first, second),
        (first[1:], first[:-1]),
        (first[:, 1:], first[:, :-1]),
        (first[:, :, 1:], first[:, :, :-1]),
        (first[..., 1:], first[..., :-1]),
        (first, first.transpose(2, 3)),
    ):
        assert abs((one == other).double().mean() - chance) < 0.03
    assert dropped_attention(bert(), None) == [], "without keys the fused attention draws its own"


def test_bert_drops_alike_when_a_forward_is_computed_again() -> None:
    net = bert().train()
    parameters = list(net.parameters())
    plain, recomputed = [], []
    for keys in (KEYS, KEYS + 1):
        plain.append(net(TOKENS, LENGTHS, keys).pooled)
        recomputed.append(checkpoint(lambda k: net(TOKENS, LENGTHS, k).pooled, keys, use_reentrant=False))
    for expected, result in zip(plain, recomputed, strict=True):  # after another forward has left other keys
        torch.testing.assert_close(result, expected)
        wanted = torch.autograd.grad(expected.square().sum(), parameters)
        torch.testing.assert_close(torch.autograd.grad(result.square().sum(), parameters), wanted)


@pytest.mark.parametrize("training", [False, True])
def test_bert_works_without_memory_for_its_numbers(training: bool) -> None:
    with torch.device("meta"):
        net = Bert(BertConfig(kind="bert"), 30_522, 1024).train(training)
        tokens, keys = torch.zeros(4, 20, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert {tensor.device.type for tensor in (*net.parameters(), *net.buffers())} == {"meta"}
    assert sum(parameter.numel() for parameter in net.bert.parameters()) == 108_891_648
    features = net(tokens, torch.full((4,), 20), keys)
    assert features.local.shape == (4, 20, 1024) and features.local.device.type == "meta"


@pytest.mark.parametrize("training", [False, True])
def test_bert_computes_in_half_precision(training: bool) -> None:
    net = bert().float().train(training)
    precise = net(TOKENS, LENGTHS, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(TOKENS, LENGTHS, KEYS)
    assert half.local.dtype == half.pooled.dtype == torch.bfloat16
    error = (half.pooled.float() - precise.pooled).norm() / precise.pooled.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("settings", EVERY_BIGRU, ids=lambda s: "-".join(s.values()))
def test_an_exported_gru_reads_without_packing_and_gives_the_same(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (tokens, lengths) = bigru(**settings), (WIDER, LENGTHS)
    packed = net(tokens, lengths)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(net, "_read_packed", None)
    for expected, result in zip(packed, net(tokens, lengths), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
    single = net(tokens[:1, :1], torch.tensor([1])).pooled
    monkeypatch.undo()
    torch.testing.assert_close(single, net(tokens[:1, :1], torch.tensor([1])).pooled, rtol=0, atol=1e-14)


def test_a_caption_without_words_is_refused() -> None:
    with pytest.raises(RuntimeError, match="greater than 0"):
        bigru()(TOKENS, torch.tensor([0, 6, 4]))
    with pytest.raises(ValueError, match="caption 1 of the batch has no token"):
        bert()(TOKENS, torch.tensor([1, 0, 4]))


def test_more_tokens_than_positions_are_refused() -> None:
    assert bert()(torch.full((1, 64), 5), torch.tensor([64])).local.shape[1] == 64
    with pytest.raises(ValueError, match="captions of 65 tokens, but BERT has a code for 64"):
        bert()(torch.full((1, 65), 5), torch.tensor([65]))
