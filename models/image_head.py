"""From local features of a fixed width to what the slots read, and to the global feature (Kim, Kim, Kwak, CVPR 2023;
the options of the authors' code).

Shape suffixes: B images, N regions or cells, F width of a raw local feature, D width of an embedding, H hidden width,
X any width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.batch_norm import BatchNorm
from setwise.models.config import ImageHeadConfig, Pooling
from setwise.models.dropout import SampleDropout

MOMENTUM = 0.1


class ImageHead(nn.Module):
    """Local features (B,N,X) and the global feature (B,D), from raw local features (B,N,F); X is `local_dim`.

    With the projection "mlp", phi(x) = fc(x) + mlp(fc(x)); with "raw_mlp", phi(x) = fc(x) + mlp(x), as in VSE-infinity
    (Chen et al., CVPR 2021); with "linear", phi(x) = fc(x); with "none" the slots read x itself. The global feature is
    the pooled phi(x) ("projected"), or a linear map of the pooled x ("linear").

    The slots and the pooling read phi(x) under two dropout masks, drawn independently. `dropout` counts wherever there
    is a phi; the authors' linear projection has none, which is dropout=0 here. They compute phi anew for each of the
    two, and fc twice in each; it is computed once here. For that reason their running statistics move twice a step
    towards the same numbers, and here once by as much; those of "raw_mlp", of which VSE-infinity makes one use, move
    once in both.

    Padding takes part neither in the pooling nor in the statistics of the MLP's batch normalisation (in the authors'
    code it does in the latter).
    """

    def __init__(self, config: ImageHeadConfig, input_dim: int, embed_size: int) -> None:
        super().__init__()
        projected, pools_projected = config.projection != "none", config.global_feature == "projected"
        self.pooling = config.pooling
        self.local_dim = embed_size if projected else input_dim
        self.fc = nn.Linear(input_dim, embed_size) if projected else None
        self.mlp_reads_raw = config.projection == "raw_mlp"
        self.mlp = None
        if config.projection == "mlp":
            momentum = 1 - (1 - MOMENTUM) ** 2 if pools_projected else MOMENTUM
            self.mlp = ResidualMLP(embed_size, embed_size, momentum)
        elif self.mlp_reads_raw:
            self.mlp = ResidualMLP(input_dim, embed_size, MOMENTUM)
        self.pooled_fc = None if pools_projected else nn.Linear(input_dim, embed_size)
        self.dropout = SampleDropout(config.dropout)

    def forward(
        self, local: Tensor, is_padding: Tensor | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of `local` (B,N,F), `is_padding` (B,N) bool, `keys` (B,) int64: local features (B,N,X), global ones (B,D).

        Each image needs one feature that is not padding. Another precision than the weights' is taken as it comes under
        autocast, and converted without.
        """
        if not torch.is_autocast_enabled(local.device.type):
            local = local.to(next(self.parameters()).dtype)
        raw_BNF = local
        if self.fc is not None:
            projected_BND = self.fc(raw_BNF)
            if self.mlp is not None:
                read = raw_BNF if self.mlp_reads_raw else projected_BND
                projected_BND = projected_BND + self.mlp(read, is_padding)
            local = self.dropout(projected_BND, keys)
        if self.pooled_fc is not None:
            return local, self.pooled_fc(pool(raw_BNF, is_padding, self.pooling))
        return local, pool(self.dropout(projected_BND, keys, call=1), is_padding, self.pooling)


class ResidualMLP(nn.Module):
    """fc2(ReLU(norm(fc1(x)))), with half of the final width in between; the residual is the caller's."""

    def __init__(self, input_dim: int, width: int, momentum: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, width // 2)
        self.norm = BatchNorm(width // 2, momentum=momentum)
        self.fc2 = nn.Linear(width // 2, width)

    def forward(self, x_BNX: Tensor, is_padding: Tensor | None) -> Tensor:
        hidden_BNH = F.relu(self.norm(self.fc1(x_BNX), is_padding))
        output_BND: Tensor = self.fc2(hidden_BNH)
        return output_BND


def pool(x: Tensor, is_padding: Tensor | None, how: Pooling) -> Tensor:
    """(B,X), the maximum or mean of `x` (B,N,X) over those N that are not `is_padding` (B,N); each sample needs one."""
    if how == "max":
        return (x if is_padding is None else x.masked_fill(is_padding[..., None], -torch.inf)).amax(1)
    if is_padding is None:
        return x.mean(1)
    return x.masked_fill(is_padding[..., None], 0).sum(1) / (~is_padding).sum(1, keepdim=True)
