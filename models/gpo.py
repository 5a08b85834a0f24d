"""Generalised pooling operator of VSE-infinity (Chen et al., "Learning the Best Pooling Strategy for Visual Semantic
Embedding", CVPR 2021): in each channel the features are sorted, and the sorted ones are averaged with learned weights.

A weight depends on the place in the order and on how many features there are, on nothing else. Weights 1, 0, 0, ...
make the maximum, equal ones the mean, and the operator learns what lies between and beyond.

Shape suffixes: B samples, N inputs, D width, P width of a position's code, H width of the GRU, L numbers of inputs
that a sample may have.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setwise.models.config import GPOConfig
from setwise.models.set_prediction import Features, SetEmbedding


class GPO(nn.Module):
    """One unit vector a sample: the pooled local features, normalised. The global feature is not read.

    Raises ValueError where the local features have another width than an embedding: pooling does not change it.
    """

    def __init__(self, config: GPOConfig, embed_size: int, input_dim: int) -> None:
        super().__init__()
        if input_dim != embed_size:
            raise ValueError(
                f"pooling keeps the width of local features: {input_dim} must be embed_size, which is {embed_size}"
            )
        self.pool = SortedPooling(config)

    def forward(self, features: Features, keys: Tensor | None = None, keep_attention: bool = False) -> SetEmbedding:
        """Sets (B,1,D) of `features`; `slots` (B,1,D) are the same before they were normalised.

        Nothing is random, so `keys` decide nothing. With `keep_attention` also (B,1,1,N): the weight that each input
        got, its mean over channels, which sums to 1.
        """
        pooled_BD, weight_BN = self.pool(features.local, features.is_padding, keep_attention)
        slots_B1D = pooled_BD[:, None]
        sets_B1D = F.normalize(slots_B1D, dim=-1)
        if weight_BN is None:
            return SetEmbedding(sets_B1D, slots_B1D)
        return SetEmbedding(sets_B1D, slots_B1D, (weight_BN[:, None, None].detach(),), (slots_B1D.detach(),))


class SortedPooling(nn.Module):
    """The operator itself, for features of any width.

    Two GRUs read the codes of the places, one from the first to the last and one back, and a linear map of the mean of
    their states is a place's logit; a softmax over places makes weights of logits divided by the temperature.
    """

    def __init__(self, config: GPOConfig) -> None:
        super().__init__()
        self.position_dim, self.temperature = config.position_dim, config.temperature
        self.ahead = nn.GRU(config.position_dim, config.hidden, batch_first=True)
        self.back = nn.GRU(config.position_dim, config.hidden, batch_first=True)
        self.logit = nn.Linear(config.hidden, 1, bias=False)

    def forward(
        self, local: Tensor, is_padding: Tensor | None = None, keep_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Pooled features (B,D) of `local` (B,N,D), and, if asked for, the weight of each input (B,N), its mean over
        channels.

        `is_padding` (B,N) bool may be true anywhere, and each sample needs one input that is not padding. Weights and
        the average are computed in float32 or better, whatever autocast says.
        """
        with torch.autocast(local.device.type, enabled=False):
            local_BND = local.to(torch.promote_types(local.dtype, torch.float32))
            num = local_BND.shape[1]
            if is_padding is None:
                weight_BN = self.weights(num)[None]
                sorted_BND, order_BND = local_BND.sort(1, descending=True)
            else:
                count_B = (~is_padding).sum(1)
                weight_BN = self.weights_by_count(num)[count_B - 1]
                ahead_BND = local_BND.masked_fill(is_padding[..., None], -torch.inf)
                sorted_BND, order_BND = ahead_BND.sort(1, descending=True)
                # Padding came out last. Its weight is zero, but zero times infinity would not be.
                beyond_BN = torch.arange(num, device=local.device) >= count_B[:, None]
                sorted_BND = sorted_BND.masked_fill(beyond_BN[..., None], 0)
            weight_BN1 = weight_BN.to(sorted_BND.dtype)[..., None]
            pooled_BD = (weight_BN1 * sorted_BND).sum(1)
            if not keep_weights:
                return pooled_BD, None
            of_input_BND = torch.zeros_like(sorted_BND).scatter(1, order_BND, weight_BN1.expand_as(sorted_BND))
            return pooled_BD, of_input_BND.mean(2)

    def weights(self, num: int) -> Tensor:
        """(num,): the weights of that many sorted inputs; they sum to 1."""
        code_NP = self._codes(num)
        ahead_1NH, _ = self.ahead(code_NP[None])
        back_1NH, _ = self.back(code_NP.flip(0)[None])
        logit_N1: Tensor = self.logit((ahead_1NH[0] + back_1NH[0].flip(0)) / 2)
        return (logit_N1[:, 0] / self.temperature).softmax(0)

    def weights_by_count(self, num: int) -> Tensor:
        """(num,num): in row l the weights of l + 1 sorted inputs, and zeros behind them.

        Samples with equally many inputs share a row, and no row depends on which there are. The GRU that reads ahead
        reaches a place in the same state however many come after it, so it reads once for all rows.
        """
        code_NP = self._codes(num)
        place_N = torch.arange(num, device=code_NP.device)
        turned_LN = place_N[:, None] - place_N
        is_beyond_LN = turned_LN < 0
        ahead_1NH, _ = self.ahead(code_NP[None])
        # Row l is read from place l on; what follows its place 0 is read too, and left out below.
        turned_LN = turned_LN.clamp(min=0)
        back_LNH, _ = self.back(code_NP[turned_LN])
        # The step at which the last GRU read a place is as far from the end as the place is.
        back_LNH = back_LNH.gather(1, turned_LN[..., None].expand_as(back_LNH))
        logit_LN1: Tensor = self.logit((ahead_1NH + back_LNH) / 2)
        return (logit_LN1[..., 0] / self.temperature).masked_fill(is_beyond_LN, -torch.inf).softmax(1)

    def _codes(self, num: int) -> Tensor:
        """(num,P): the sine code of places 0, 1, ... as they are, so that a place has the same code however many there
        are; sines in even channels, cosines in odd ones."""
        weight = self.logit.weight
        place_N = torch.arange(num, dtype=weight.dtype, device=weight.device)
        even = torch.arange(0, self.position_dim, 2, dtype=weight.dtype, device=weight.device)
        angle = place_N[:, None] / 10_000 ** (even / self.position_dim)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
