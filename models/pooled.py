"""One vector an image or caption, made of the global feature alone: what retrieval was before sets, as in VSE++ (Faghri
et al., "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", BMVC 2018).

Shape suffixes: B samples, D width of an embedding.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.set_prediction import Features, SetEmbedding


class Pooled(nn.Module):
    """The global feature, normalised. It has no weights, and local features are not read."""

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """Sets (B,1,D); `slots` (B,1,D) are the same before they were normalised. Nothing is random, and there is no
        attention."""
        slots_B1D = features.pooled[:, None]
        return SetEmbedding(F.normalize(slots_B1D, dim=-1), slots_B1D)
