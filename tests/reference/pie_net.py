"""PIE-Net as it reads: one sample without padding, one attention and input after another; without dropout."""

import torch
from torch import Tensor

from setwise.models.pie_net import PIENet


def embed(net: PIENet, inputs_NX: Tensor, pooled_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Set (K,D), residuals (K,D) and attention (K,N) of one sample."""
    elements, residuals, maps = [], [], []
    for k in range(net.attend.logits.out_features):
        logits = []
        for x_X in inputs_NX:
            hidden_H = torch.stack([(row_X * x_X).sum().tanh() for row_X in net.attend.hidden.weight])
            logits.append((net.attend.logits.weight[k] * hidden_H).sum())
        total = sum(logit.exp() for logit in logits)
        weights = [logit.exp() / total for logit in logits]
        read_X = sum(weight * x_X for weight, x_X in zip(weights, inputs_NX, strict=True))
        residual_D = 1 / (1 + (-(net.fc.weight @ read_X) - net.fc.bias).exp())
        sum_D = pooled_D + residual_D
        centred_D = sum_D - sum_D.mean()
        normed_D = centred_D / (centred_D.square().mean() + net.norm.eps).sqrt() * net.norm.weight + net.norm.bias
        elements.append(normed_D / normed_D.square().sum().sqrt())
        residuals.append(residual_D)
        maps.append(torch.stack(weights))
    return torch.stack(elements), torch.stack(residuals), torch.stack(maps)
