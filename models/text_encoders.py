"""Text encoders: token ids to local features, one a token, and a global feature.

Shape suffixes: B captions, N tokens, W width of a word embedding or of BERT, S width of one direction's state,
D width of an embedding, H attention heads, Q tokens that attend, C width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from setwise.models.config import BertConfig, BiGRUConfig, WordMeanConfig
from setwise.models.devise import WordMean
from setwise.models.dropout import SampleDropout
from setwise.models.set_prediction import Features, on_device, padding_after

PADDING_TOKEN = 0
ATTENTION = "setwise_sample_dropout"
"""Name of `_attention` in transformers' registry."""


class BiGRU(nn.Module):
    """Word embeddings and a bidirectional GRU, as in PVSE and the authors' published code."""

    def __init__(self, config: BiGRUConfig, vocabulary_size: int, embed_size: int) -> None:
        super().__init__()
        self.config = config
        state_dim = embed_size if config.directions == "mean" else embed_size // 2
        self.embedding = nn.Embedding(vocabulary_size, config.word_dim, padding_idx=PADDING_TOKEN)
        self.gru = nn.GRU(config.word_dim, state_dim, batch_first=True, bidirectional=True)
        self.word_dropout = SampleDropout(config.dropout)
        self.state_dropout = SampleDropout(config.dropout)
        self.final_dropout = SampleDropout(config.dropout)

    def forward(self, tokens: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Features:
        """`tokens` (B,N) integers, 0 where there is none; `lengths` (B,) integers, at least 1 each; `keys` (B,) int64
        as in `SampleDropout`.

        Packing by length keeps padding out of both directions, so a caption's features do not depend on the captions
        beside it. Lengths on the CPU spare a wait for the device. Raises RuntimeError for a length of 0.
        """
        if tokens.shape[0] == 0:  # of len() torch.export would make a constant
            return _no_captions(self, tokens, lengths)
        words_BNW = self.word_dropout(self.embedding(tokens), keys)
        # A program written by torch.export cannot pack; both ways of reading are the same function.
        read = self._read_padded if torch.compiler.is_exporting() else self._read_packed
        wants_states = self.config.local_features == "states" or self.config.pooling == "max"
        states_BN2S, final_B2S = read(words_BNW, lengths, wants_states)
        is_padding_BN = padding_after(lengths, tokens.shape[1], tokens.device)

        states_BND = words_BNW
        if states_BN2S is not None:
            states_BND = self.state_dropout(self._join(states_BN2S), keys)
        if self.config.pooling == "max":
            pooled_BD = _maximum(states_BND, is_padding_BN)
        else:
            pooled_BD = self.final_dropout(self._join(final_B2S), keys)
        local = words_BNW if self.config.local_features == "words" else states_BND
        return Features(local, pooled_BD, is_padding_BN)

    def _read_packed(self, words_BNW: Tensor, lengths: Tensor, wants_states: bool) -> tuple[Tensor | None, Tensor]:
        """The states at each word in both directions (B,N,2,S), if wanted, and where each direction ends (B,2,S)."""
        # Sorted by length here, on the CPU: left to torch, the order would be sent to a GPU in a way that waits for it.
        sorted_lengths, order = lengths.cpu().sort(descending=True, stable=True)
        to_sorted_B, back_B = (on_device(places, words_BNW.device) for places in (order, order.argsort()))
        packed = pack_padded_sequence(words_BNW.index_select(0, to_sorted_B), sorted_lengths, batch_first=True)
        packed_states, final_2BS = self.gru(packed)
        final_B2S = final_2BS.index_select(1, back_B).transpose(0, 1)
        if not wants_states:
            return None, final_B2S
        states, _ = pad_packed_sequence(packed_states, batch_first=True, total_length=words_BNW.shape[1])
        states = states.index_select(0, back_B)
        return states.reshape(*words_BNW.shape[:2], 2, -1), final_B2S

    def _read_padded(self, words_BNW: Tensor, lengths: Tensor, wants_states: bool) -> tuple[Tensor | None, Tensor]:
        """The same without packing: each caption is also read with its words turned round. So its last word comes
        before all padding in both directions, and no state up to there depends on what follows."""
        place_N = torch.arange(words_BNW.shape[1], device=words_BNW.device)
        turned_BN1 = (lengths[:, None] - 1 - place_N).clamp(min=0)[..., None]
        ahead_BNS = self._one_direction(words_BNW, "")
        turned_BNW = words_BNW.gather(1, turned_BN1.expand(-1, -1, words_BNW.shape[2]))
        back_BNS = self._one_direction(turned_BNW, "_reverse")
        last_B1S = (lengths - 1)[:, None, None].expand(-1, -1, self.gru.hidden_size)
        final_B2S = torch.cat((ahead_BNS.gather(1, last_B1S), back_BNS.gather(1, last_B1S)), dim=1)
        if not wants_states:
            return None, final_B2S
        back_BNS = back_BNS.gather(1, turned_BN1.expand(-1, -1, self.gru.hidden_size))
        states_BN2S = torch.stack((ahead_BNS, back_BNS), dim=2)
        return states_BN2S.masked_fill((place_N >= lengths[:, None])[..., None, None], 0), final_B2S

    def _one_direction(self, words_BNW: Tensor, direction: str) -> Tensor:
        """(B,N,S): the states of the GRU's weights that are named so, from the first word on."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(self.gru, f"{name}_l0{direction}") for name in names]
        start_1BS = words_BNW.new_zeros(1, words_BNW.shape[0], self.gru.hidden_size)
        return torch.gru(words_BNW, start_1BS, weights, True, 1, 0.0, False, False, True)[0]

    def _join(self, directions: Tensor) -> Tensor:
        """(...,2,S) states of the two directions to (...,D)."""
        return directions.mean(-2) if self.config.directions == "mean" else directions.flatten(-2)


class Bert(nn.Module):
    """BERT (Devlin et al., NAACL 2019) and one linear layer: every token's last hidden state becomes a local feature,
    those of the marks of start and end too, and the first one or the maximum of all is the global feature.

    The class that computes it is transformers' own, so that its published weights fit; its dropouts are replaced, so
    that a caption is dropped in the same way whatever its batch.
    """

    def __init__(self, config: BertConfig, vocabulary_size: int, embed_size: int) -> None:
        super().__init__()
        import transformers  # takes three seconds, which nobody else shall wait for

        transformers.AttentionInterface.register(ATTENTION, _attention)
        self.config = config
        self.bert = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=vocabulary_size,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.ff_width,
                max_position_embeddings=config.max_tokens,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                pad_token_id=PADDING_TOKEN,
                attn_implementation=ATTENTION,
            ),
            add_pooling_layer=False,
        )
        for module in list(self.bert.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, name, _BertDropout(child.p))
        self.project = nn.Linear(config.width, embed_size)

    def forward(self, tokens: Tensor, lengths: Tensor, keys: Tensor | None = None) -> Features:
        """`tokens` (B,N) integers, or floats (B,N,W) that stand for BERT's last hidden state, computed before;
        `lengths` (B,) integers, at least 1 each; `keys` (B,) int64 as in `SampleDropout`.

        Raises ValueError for more tokens than there are positions, and, where `lengths` are on the CPU, for a length
        of 0.
        """
        if tokens.shape[0] == 0:
            return _no_captions(self, tokens, lengths)
        if not torch.compiler.is_exporting() and lengths.is_cpu and lengths.numpy().min() < 1:
            raise ValueError(f"caption {int(lengths.argmin())} of the batch has no token; BERT reads at least one")
        is_padding_BN = padding_after(lengths, tokens.shape[1], tokens.device)
        hidden_BNW = tokens if tokens.is_floating_point() else self._read(tokens, is_padding_BN, keys)
        local_BND = self.project(hidden_BNW)
        pooled_BD = local_BND[:, 0] if self.config.pooling == "cls" else _maximum(local_BND, is_padding_BN)
        return Features(local_BND, pooled_BD, is_padding_BN)

    def _read(self, tokens_BN: Tensor, is_padding_BN: Tensor, keys_B: Tensor | None) -> Tensor:
        """BERT's last hidden state, (B,N,W)."""
        if tokens_BN.shape[1] > self.config.max_tokens:
            raise ValueError(
                f"captions of {tokens_BN.shape[1]} tokens, but BERT has a code for {self.config.max_tokens} positions: "
                "cut them, or raise max_tokens if it is not to start from published weights"
            )
        for module in self.bert.modules():
            if isinstance(module, _BertDropout):
                module.keys = keys_B
        # With all four axes the mask is taken as it is; made from two, it would be looked through for padding, and the
        # host would wait for the device.
        hidden_BNW: Tensor = self.bert(tokens_BN, attention_mask=~is_padding_BN[:, None, None]).last_hidden_state
        return hidden_BNW


def text_encoder(
    config: BiGRUConfig | BertConfig | WordMeanConfig, vocabulary_size: int, embed_size: int
) -> BiGRU | Bert | WordMean:
    """The text encoder that `config` describes, with random weights."""
    match config:
        case BertConfig():
            return Bert(config, vocabulary_size, embed_size)
        case BiGRUConfig():
            return BiGRU(config, vocabulary_size, embed_size)
        case WordMeanConfig():
            return WordMean(vocabulary_size, embed_size)


class _BertDropout(SampleDropout):
    """A dropout inside BERT, whose layers hand it nothing but its input: its `keys` are left here by `Bert.forward`,
    at the start of each call. So a forward that is repeated as a whole, as torch.utils.checkpoint does, drops alike.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.keys: Tensor | None = None

    def forward(self, x: Tensor, keys: Tensor | None = None, call: int = 0) -> Tensor:
        return super().forward(x, self.keys if keys is None else keys, call)


def _attention(
    module: nn.Module,
    query_BHQC: Tensor,
    key_BHNC: Tensor,
    value_BHNC: Tensor,
    mask_B11N: Tensor,
    *,
    dropout: float,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it for BERT's self-attention `module`; returns (B,Q,H,C).

    Where there is dropout by keys, each query of each head is a sample of its own to `SampleDropout`, with a key made
    of its caption's, so that what it drops of the other tokens does not depend on how many of them there are.
    """
    drop = module.dropout
    assert isinstance(drop, _BertDropout)
    keys_B = drop.keys
    if not dropout or keys_B is None:
        result_BHQC = F.scaled_dot_product_attention(
            query_BHQC, key_BHNC, value_BHNC, attn_mask=mask_B11N, dropout_p=dropout, scale=scaling
        )
        return result_BHQC.transpose(1, 2), None

    logits_BHQN = (query_BHQC @ key_BHNC.transpose(-1, -2) * scaling).masked_fill(~mask_B11N, -torch.inf)
    attention_BHQN = logits_BHQN.softmax(-1, dtype=torch.promote_types(logits_BHQN.dtype, torch.float32))
    heads, queries = attention_BHQN.shape[1:3]
    place_HQ = torch.arange(heads, device=keys_B.device)[:, None] + heads * torch.arange(queries, device=keys_B.device)
    keys_BHQ = keys_B[:, None, None] * 1_000_003 + place_HQ
    kept_BHQN = drop(attention_BHQN.flatten(0, 2), keys_BHQ.flatten()).view_as(attention_BHQN)
    return (kept_BHQN.to(value_BHNC.dtype) @ value_BHNC).transpose(1, 2), None


def _no_captions(encoder: BiGRU | Bert, tokens_0N: Tensor, lengths_0: Tensor) -> Features:
    """Features of an empty batch, which neither GRU nor BERT can read: those of a made-up caption, cut off again.

    So every weight gets a gradient of zero, for which workers that do have captions wait.
    """
    made_up: Features = encoder(tokens_0N.new_zeros(1, *tokens_0N.shape[1:]), lengths_0.new_ones(1))
    return Features(
        made_up.local[:0], made_up.pooled[:0], padding_after(lengths_0, tokens_0N.shape[1], tokens_0N.device)
    )


def _maximum(features_BND: Tensor, is_padding_BN: Tensor) -> Tensor:
    """(B,D): the maximum over all but padding."""
    return features_BND.masked_fill(is_padding_BN[:, :, None], -torch.inf).amax(1)
