"""PIE-Net of PVSE (Song and Soleymani, "Polysemous Visual-Semantic Embedding for Cross-Modal Retrieval", CVPR 2019): K
attentions over the local features, each added to the global feature, make a set of K embeddings.

Shape suffixes: B samples, N inputs, X width of an input, H hidden width, K elements of a set, D width of an embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.config import PIENetConfig
from setwise.models.dropout import SampleDropout
from setwise.models.set_prediction import Features, SetEmbedding


class PIENet(nn.Module):
    """out_k = normalise(LN(global + dropout(r_k))), where r_k = sigmoid(fc(what attention k reads)).

    Unlike slots, the attentions do not compete: each is a softmax over the inputs by itself, so that nothing but the
    diversity loss keeps two of them apart.
    """

    def __init__(self, config: PIENetConfig, embed_size: int, input_dim: int) -> None:
        super().__init__()
        self.attend = MultiAttention(config.num_slots, input_dim)
        self.fc = nn.Linear(input_dim, embed_size)
        self.dropout = SampleDropout(config.dropout)
        self.norm = nn.LayerNorm(embed_size)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """Sets (B,K,D) of `features`; `slots` (B,K,D) are the residuals dropout(r_k), which diversity reads.

        Dropout is a function of the samples' `keys` (B,), as in `SampleDropout`. With `keep_attention` also the
        attention, one (B,1,K,N).
        """
        read_BKX, attention_BKN = self.attend(features.local, features.is_padding)
        residual_BKD = self.dropout(self.fc(read_BKX).sigmoid(), keys)
        sets_BKD = F.normalize(self.norm(features.pooled[:, None] + residual_BKD), dim=-1)
        if not keep_attention:
            return SetEmbedding(sets_BKD, residual_BKD)
        return SetEmbedding(sets_BKD, residual_BKD, (attention_BKN[:, None].detach(),), (residual_BKD.detach(),))


class MultiAttention(nn.Module):
    """K weighted means of the inputs; the logits are w2 tanh(w1 x), without biases (Lin et al., "A Structured
    Self-Attentive Sentence Embedding", ICLR 2017)."""

    def __init__(self, num: int, input_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_dim, max(input_dim // 2, 1), bias=False)
        self.logits = nn.Linear(self.hidden.out_features, num, bias=False)
        nn.init.xavier_uniform_(self.hidden.weight)
        nn.init.xavier_uniform_(self.logits.weight)

    def forward(self, local: Tensor, is_padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of `local` (B,N,X) and `is_padding` (B,N) bool: the means (B,K,X), and the weights (B,K,N), in float32 or
        better; they sum to 1 over the inputs. Each sample needs one input that is not padding."""
        if is_padding is not None:
            local = local.masked_fill(is_padding[..., None], 0)  # zero times what stands there need not be zero
        logit_BKN = self.logits(self.hidden(local).tanh()).transpose(1, 2)
        if is_padding is not None:
            logit_BKN = logit_BKN.masked_fill(is_padding[:, None], -torch.inf)
        weight_BKN = logit_BKN.softmax(-1, dtype=torch.promote_types(logit_BKN.dtype, torch.float32))
        return weight_BKN.to(local.dtype) @ local, weight_BKN
