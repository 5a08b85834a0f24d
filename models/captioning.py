"""Bicaptioning: an image encoder learns by writing captions in both directions (VirTex; Desai and Johnson, "VirTex:
Learning Visual Representations from Textual Annotations", CVPR 2021).

A caption is read from its start mark to its end mark, and by a second decoder of the same kind from the end mark back
to the start mark. Both share the word embedding, which is the output layer too, and the projection of the image's
local features.

Shape suffixes: B images, T captions, N tokens of a caption, Q tokens that are read to predict the next, M local
features of an image, X width of one, H width of the decoders, A attention heads, C width of a head, V words.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.batch_norm import has_batch_statistics
from setwise.models.dropout import SampleDropout, name_layers
from setwise.models.image_encoders import image_encoder
from setwise.models.micro_batches import in_micro_batches
from setwise.models.pretext_config import CaptionerConfig
from setwise.models.set_prediction import on_device, padding_after

PADDING_TOKEN = 0
INITIAL_DEVIATION = 0.02
EMBEDDING_EPSILON = 1e-8
"""Of the layer normalisation behind the embeddings, as in the authors' code."""


class CaptionScores(NamedTuple):
    """What the decoders make of the captions of a batch, a row a caption; sums of all rows give those of the batch."""

    forward: Tensor
    """(T,) sum of -log(probability) of the tokens, in nats, each given those before it."""
    backward: Tensor
    """(T,) the same, each given those behind it."""
    tokens: Tensor
    """(T,) how many tokens were predicted in either direction."""
    hits: Tensor
    """(T,) how many of both directions' tokens were the most probable word; in training, where nobody asks, 0."""


class Memory(NamedTuple):
    """What the decoders see of images."""

    features: Tensor
    """(B,M,H) projected local features."""
    is_padding: Tensor | None
    """(B,M) bool, True where there is no feature."""


class Attention(nn.Module):
    """Multi-head attention, whose dropout of a query's attention does not depend on how many others there are."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_query = nn.Linear(width, width)
        self.to_key = nn.Linear(width, width)
        self.to_value = nn.Linear(width, width)
        self.to_output = nn.Linear(width, width)
        self.dropout = SampleDropout(dropout)

    def forward(
        self,
        queries: Tensor,
        sources: Tensor,
        is_hidden: Tensor | None,
        owners: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """`queries` (T,Q,H) look at `sources` (T,M,H), or, with `owners` (T,), each at its owner among (B,M,H).

        `is_hidden` bool, broadcast to (T,A,Q,M), is True where a query must not look. `keys` (T,) as in SampleDropout.
        """
        query_TAQC, key_BAMC, value_BAMC = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.to_query, queries), (self.to_key, sources), (self.to_value, sources))
        )
        key, value = (x if owners is None else x[owners] for x in (key_BAMC, value_BAMC))
        logits_TAQM = query_TAQC @ key.transpose(-1, -2) * query_TAQC.shape[-1] ** -0.5
        if is_hidden is not None:
            logits_TAQM = logits_TAQM.masked_fill(is_hidden, -torch.inf)
        attention_TAQM = logits_TAQM.softmax(-1, dtype=torch.promote_types(logits_TAQM.dtype, torch.float32))
        attention_TAQM = self._dropped(attention_TAQM, keys).to(value.dtype)
        output: Tensor = self.to_output((attention_TAQM @ value).transpose(1, 2).flatten(2))
        return output

    def _dropped(self, attention_TAQM: Tensor, keys_T: Tensor | None) -> Tensor:
        """Each query of each head is a sample of its own, numbered so that more queries leave the first as they are."""
        if keys_T is None:
            return self.dropout(attention_TAQM)  # type: ignore[no-any-return]
        heads, queries = attention_TAQM.shape[1:3]
        place_Q = heads * torch.arange(queries, device=keys_T.device)
        place_AQ = torch.arange(heads, device=keys_T.device)[:, None] + place_Q
        keys_TAQ = keys_T[:, None, None] * 1_000_003 + place_AQ
        return self.dropout(attention_TAQM.flatten(0, 2), keys_TAQ.flatten()).view_as(attention_TAQM)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Self-attention to earlier tokens, attention to the image, a feed-forward layer; normalised behind each."""

    def __init__(self, width: int, heads: int, ff_width: int, dropout: float) -> None:
        super().__init__()
        self.to_tokens = Attention(width, heads, dropout)
        self.to_image = Attention(width, heads, dropout)
        self.hidden = nn.Linear(width, ff_width)
        self.output = nn.Linear(ff_width, width)
        self.token_norm, self.image_norm, self.output_norm = (nn.LayerNorm(width) for _ in range(3))
        self.token_dropout, self.image_dropout, self.hidden_dropout, self.output_dropout = (
            SampleDropout(dropout) for _ in range(4)
        )

    def forward(
        self, x: Tensor, memory: Memory, owners: Tensor, is_later: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """`x` (T,Q,H) to the same; `is_later` (Q,Q) bool, True where a token (row) must not see another (column)."""
        x = self.token_norm(x + self.token_dropout(self.to_tokens(x, x, is_later, keys=keys), keys))
        is_hidden = None if memory.is_padding is None else memory.is_padding[owners][:, None, None]
        seen = self.to_image(x, memory.features, is_hidden, owners, keys)
        x = self.image_norm(x + self.image_dropout(seen, keys))
        hidden = self.hidden_dropout(F.gelu(self.hidden(x)), keys)
        return self.output_norm(x + self.output_dropout(self.output(hidden), keys))  # type: ignore[no-any-return]


class Captioner(nn.Module):
    """An image encoder, and two decoders that tell from its local features how probable captions are.

    Token ids run from 0, which is padding, to `vocabulary_size` - 1; a caption is a whole one, from its start mark to
    its end mark. The authors cut captions into 10,000 pieces of words (SentencePiece); here tokens are whatever ids the
    batches hold, the words of the data set.

    What is random in training is a function of each sample's key, if keys are given. Raises ValueError for a
    vocabulary without a word.
    """

    def __init__(self, config: CaptionerConfig, vocabulary_size: int) -> None:
        super().__init__()
        if vocabulary_size < 2:
            raise ValueError(f"a vocabulary of {vocabulary_size} has no word beside the padding")
        width = config.width
        self.max_words = config.max_words
        self.image_encoder = image_encoder(config.image_encoder, width)
        self.visual = nn.Linear(self.image_encoder.local_dim, width)  # type: ignore[arg-type]
        self.words = nn.Embedding(vocabulary_size, width, padding_idx=PADDING_TOKEN)
        self.positions = nn.Embedding(config.max_words, width)
        self.embedding_norm = nn.LayerNorm(width, eps=EMBEDDING_EPSILON)
        self.embedding_dropout = SampleDropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.forward_layers, self.backward_layers = (
            nn.ModuleList(
                DecoderLayer(width, config.heads, config.ff_width, config.dropout) for _ in range(config.layers)
            )
            for _ in range(2)
        )
        for part in (self.visual, self.words, self.positions, self.forward_layers, self.backward_layers):
            part.apply(_initialise)
        # Decoders read no global feature; a layer that makes nothing else would be waited for by other workers.
        pooled = getattr(getattr(self.image_encoder, "head", None), "pooled_fc", None)
        if pooled is not None:
            pooled.requires_grad_(False)
        name_layers(self)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        owners: Tensor,
        image_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> CaptionScores:
        """How probable each caption is, given its image, in both directions.

        Args:
            images: what the configured encoder reads, a row an image.
            tokens: (T,N) ids; what stands behind a caption's end is ignored. Of captions longer than `max_words`
                tokens, the first ones and the last one are read.
            lengths: (T,) int64, at least 1 each.
            owners: (T,) int64, the index of each caption's image.
            image_keys, text_keys: (B,), (T,) int64, as in SampleDropout.
            micro_batch: how many images, and about their share of the captions, go forward at a time; the numbers are
                the same.

        Raises:
            ValueError: `micro_batch` with an image encoder that normalises by statistics of its batch.
        """
        if micro_batch is None:
            memory = self.read(images, image_keys)
            return self.score(memory, tokens, lengths, owners, text_keys)
        if has_batch_statistics(self.image_encoder):
            raise ValueError("an image encoder that normalises by its batch cannot run in micro-batches: freeze it")
        memory = in_micro_batches(self.read, micro_batch, images, image_keys)
        captions = max(-(-micro_batch * len(tokens) // max(len(images), 1)), 1)

        def score(*piece: Tensor) -> CaptionScores:
            return self.score(memory, *piece)

        return in_micro_batches(score, captions, tokens, lengths, owners, text_keys)

    def read(self, images: Tensor, keys: Tensor | None = None) -> Memory:
        """What decoders see of images."""
        features = self.image_encoder(images, None, keys)
        local_BMX, is_padding = features.local, features.is_padding
        if is_padding is not None:
            local_BMX = local_BMX.masked_fill(is_padding[..., None], 0)  # or a NaN there would pass through 0 * NaN
        return Memory(self.visual(local_BMX), is_padding)

    def score(
        self, memory: Memory, tokens: Tensor, lengths: Tensor, owners: Tensor, keys: Tensor | None = None
    ) -> CaptionScores:
        """How probable captions are, as in `forward`, where `memory` is what is seen of their images."""
        lengths_T = on_device(lengths, tokens.device)
        is_padding_TN = padding_after(lengths_T, tokens.shape[1], tokens.device)
        tokens_TN = tokens.masked_fill(is_padding_TN, PADDING_TOKEN)
        if tokens_TN.shape[1] > self.max_words:
            last_T1 = tokens_TN.gather(1, (lengths_T[:, None] - 1).clamp(min=0))
            is_cut_T1 = lengths_T[:, None] > self.max_words
            tokens_TN = tokens_TN[:, : self.max_words]
            ends_T1 = torch.where(is_cut_T1, last_T1, tokens_TN[:, -1:])
            tokens_TN = torch.cat((tokens_TN[:, :-1], ends_T1), dim=1)
            lengths_T = lengths_T.clamp(max=self.max_words)
        place_N = torch.arange(tokens_TN.shape[1], device=tokens.device)
        from_end_TN = lengths_T[:, None] - 1 - place_N
        reversed_TN = tokens_TN.gather(1, from_end_TN.clamp(min=0)).masked_fill(from_end_TN < 0, PADDING_TOKEN)
        forward, hits = self._direction(0, memory, tokens_TN, lengths_T, owners, keys)
        backward, more_hits = self._direction(1, memory, reversed_TN, lengths_T, owners, keys)
        return CaptionScores(forward, backward, (lengths_T - 1).clamp(min=0).to(forward.dtype), hits + more_hits)

    def _direction(
        self,
        number: int,
        memory: Memory,
        tokens_TN: Tensor,
        lengths_T: Tensor,
        owners_T: Tensor,
        keys_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sums (T,) of -log(probability) and of hits, of captions in the order in which direction `number` reads."""
        read_TQ, next_TQ = tokens_TN[:, :-1], tokens_TN[:, 1:]
        queries, device = read_TQ.shape[1], tokens_TN.device
        embedded_TQH = self.embedding_norm(self.words(read_TQ) + self.positions.weight[:queries])
        x_TQH = self.embedding_dropout(embedded_TQH, keys_T, number)
        # Earlier tokens alone are seen, and padding is later than all of them: it needs no mask of its own.
        is_later_QQ = torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1)
        for layer in (self.forward_layers, self.backward_layers)[number]:
            x_TQH = layer(x_TQH, memory, owners_T, is_later_QQ, keys_T)
        logits_TQV = F.linear(x_TQH, self.words.weight, self.output_bias)
        logits_TQV = logits_TQV.to(torch.promote_types(logits_TQV.dtype, torch.float32))
        is_padding_TQ = padding_after(lengths_T - 1, queries, device)
        surprise_TQ = F.cross_entropy(logits_TQV.flatten(0, 1), next_TQ.flatten(), reduction="none").view(next_TQ.shape)
        sums_T = surprise_TQ.masked_fill(is_padding_TQ, 0).sum(1)
        if self.training:
            return sums_T, torch.zeros_like(sums_T)
        hits_TQ = (logits_TQV.argmax(-1) == next_TQ) & ~is_padding_TQ
        return sums_T, hits_TQ.sum(1).to(sums_T.dtype)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx].detach())
