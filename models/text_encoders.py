"""Text encoders: token ids to local features, one a word, and a global feature.

Shape suffixes: B captions, N words, W width of a word embedding, D width of an embedding.
"""

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from setwise.models.config import BiGRUConfig
from setwise.models.set_prediction import Features

PADDING_TOKEN = 0


class BiGRU(nn.Module):
    """Word embeddings and a bidirectional GRU whose two directions are averaged.

    `local_dim` is the width of the local features: `word_dim` for "words", `embed_size` for "states".
    """

    def __init__(self, config: BiGRUConfig, vocabulary_size: int, embed_size: int) -> None:
        super().__init__()
        self.local_features = config.local_features
        self.local_dim = config.word_dim if config.local_features == "words" else embed_size
        self.embedding = nn.Embedding(vocabulary_size, config.word_dim, padding_idx=PADDING_TOKEN)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = nn.GRU(config.word_dim, embed_size, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Features:
        """`tokens` (B,N) integers, 0 where there is none; `lengths` (B,) integers, at least 1 each.

        Packing by length keeps padding out of both directions, so a caption's features do not depend on the captions
        beside it. Lengths on the CPU spare a wait for the device. Raises RuntimeError for a length of 0.
        """
        words_BNW = self.dropout(self.embedding(tokens))
        packed = pack_padded_sequence(words_BNW, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed_states, final_2BD = self.gru(packed)
        local = words_BNW
        if self.local_features == "states":
            states_BN2D, _ = pad_packed_sequence(packed_states, batch_first=True, total_length=tokens.shape[1])
            local = self.dropout(states_BN2D.reshape(*tokens.shape, 2, -1).mean(2))
        return Features(local, final_2BD.mean(0), lengths.to(tokens.device))
