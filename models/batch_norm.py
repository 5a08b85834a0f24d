"""Batch normalisation (Ioffe and Szegedy, 2015) by the statistics of a whole batch: of its valid entries, whatever
padding stands beside them, and of all workers, however the batch is divided among them.

Shape suffixes: C channels, W workers. "..." are the axes over which a channel is averaged.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(_BatchNorm):
    """As torch's, with the same names of parameters and buffers, for inputs that may be padded.

    In training, each channel gets mean 0 and variance 1 over the valid entries of the batch; what stands at padding is
    mapped alike, but counts for nothing. The running variance is the unbiased one, as torch's. Fewer than two valid
    entries say nothing about a variance and leave the running statistics as they are. Statistics are computed in
    float32 or better, whatever the inputs or autocast say.

    `channel_dim` is -1 for tokens (B,N,C) or vectors (B,C), and 1 for images (B,C,H,W), as torch has it.

    Once `synchronize` was called for it, the batch is that of all workers of torch.distributed's default group, where
    there is one. All of them must then go forward and backward equally often; one that has no entry takes part with an
    empty tensor, or with padding alone.
    """

    synchronized = False
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5, channel_dim: int = -1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor, is_padding: Tensor | None = None) -> Tensor:
        """`x` normalised, of its shape and type; `is_padding` bool, of that shape without the channels.

        Raises ValueError where `x` has another number of channels.
        """
        if x.shape[self.channel_dim] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension {self.channel_dim}, got {tuple(x.shape)}"
            )
        if self.channel_dim == 1:
            return self._normalized(x, is_padding)
        flat = None if is_padding is None else is_padding.reshape(-1)
        return self._normalized(x.reshape(-1, self.num_features), flat).view(x.shape)

    def _normalized(self, x: Tensor, is_padding: Tensor | None) -> Tensor:
        """`x` (...,C,...) with its channels in dimension 1."""
        workers = _num_workers() if self.training and self.synchronized else 1
        natively = is_padding is None and workers == 1 and x.numel() > self.num_features
        if self.training:
            self.num_batches_tracked.add_(1)
        if natively or not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        y: Tensor
        y, mean_C, variance_C, count = _Normalization.apply(x, self.weight, self.bias, is_padding, self.eps, workers)
        with torch.no_grad():
            dtype = self.running_mean.dtype
            share = self.momentum * (count > 1).to(dtype)
            unbiased_C = variance_C * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean_C.to(dtype), share)
            self.running_var.lerp_(unbiased_C.to(dtype), share)
        return y


class _Normalization(torch.autograd.Function):
    """Normalised inputs, and mean, variance and number of the valid entries of all workers.

    As one function of its own, because the statistics of every worker depend on the inputs of all: two sums over the
    batch in the gradient have to be those of all workers too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor, is_padding: Tensor | None, eps: float, workers: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, mean_C, squares_C = _moments(x, is_padding)
        if workers > 1:
            count, mean_C, squares_C = _of_all_workers(count, mean_C, squares_C, workers)
        variance_C = squares_C / count.clamp(min=1)
        scale_C = (variance_C + eps).rsqrt()
        y = (x - _across(mean_C, x)).mul_(_across(scale_C * weight_C, x)).add_(_across(bias_C, x))
        ctx.save_for_backward(x, weight_C, is_padding, count, mean_C, scale_C)
        ctx.workers = workers
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return y.to(x.dtype), mean_C, variance_C, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, is_padding, count, mean_C, scale_C = ctx.saved_tensors
        grad = grad.to(mean_C.dtype)
        normed = (x - _across(mean_C, x)).mul_(_across(scale_C, x))
        bias_grad_C = grad.sum(_averaged(x))
        weight_grad_C = (grad * normed).sum(_averaged(x))
        sum_C, normed_sum_C = bias_grad_C, weight_grad_C
        if ctx.workers > 1:
            sums_2C = torch.stack((sum_C, normed_sum_C))
            distributed.all_reduce(sums_2C)
            sum_C, normed_sum_C = sums_2C
        # How the statistics move with a valid entry; padding does not move them.
        share = count.clamp(min=1)
        moved = normed.mul_(_across(normed_sum_C / share, x)).add_(_across(sum_C / share, x))
        if is_padding is not None:
            moved.masked_fill_(is_padding[:, None], 0)
        x_grad = (grad - moved).mul_(_across(weight_C * scale_C, x))
        parameter = weight_C.dtype
        return x_grad.to(x.dtype), weight_grad_C.to(parameter), bias_grad_C.to(parameter), None, None, None


def _moments(x: Tensor, is_padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Number of valid entries, their mean (C,), and the sum of their squared distances from it (C,)."""
    precise = torch.promote_types(x.dtype, torch.float32)
    x = x.to(precise)
    if is_padding is None:
        count = x.new_full((), x.numel() // x.shape[1])
    else:
        count = (~is_padding).sum().to(precise)
        x = x.masked_fill(is_padding[:, None], 0)
    mean_C = x.sum(_averaged(x)) / count.clamp(min=1)
    # A second pass, about the mean: the difference of two large sums would keep few digits of a small variance.
    centred = x - _across(mean_C, x)
    if is_padding is not None:
        centred.masked_fill_(is_padding[:, None], 0)
    return count, mean_C, centred.square_().sum(_averaged(x))


def _of_all_workers(count: Tensor, mean_C: Tensor, squares_C: Tensor, workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `_moments` would say of the entries of all workers (Chan, Golub and LeVeque, 1979)."""
    own = torch.cat((count[None], mean_C, squares_C))
    all_W = own.new_empty(workers, len(own))
    distributed.all_gather(list(all_W), own)
    count_W1, mean_WC, squares_WC = all_W[:, :1], all_W[:, 1 : 1 + len(mean_C)], all_W[:, 1 + len(mean_C) :]
    count = count_W1.sum()
    mean_C = (count_W1 * mean_WC).sum(0) / count.clamp(min=1)
    return count, mean_C, (squares_WC + count_W1 * (mean_WC - mean_C).square()).sum(0)


def _averaged(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _across(channel_C: Tensor, x: Tensor) -> Tensor:
    """One number a channel, to be broadcast along `x`."""
    return channel_C.view(-1, *(1,) * (x.ndim - 2))


def _num_workers() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def synchronize(module: nn.Module) -> nn.Module:
    """Let every batch normalisation inside `module` count the batch of all workers, torch's own ones included.

    Those become `BatchNorm`s with the same parameters and buffers, in place and under the same names, so that
    optimizers and checkpoints fit as before. torch's SyncBatchNorm needs a GPU; this runs wherever torch.distributed
    does.

    Returns:
        `module`, or its replacement if it is itself one of torch's batch normalisations.

    Raises:
        ValueError: one has no running statistics, no weights, or a cumulative average.
    """
    if isinstance(module, _BatchNorm):
        module = module if isinstance(module, BatchNorm) else _converted(module)
        module.synchronized = True
        return module
    for name, child in module.named_children():
        setattr(module, name, synchronize(child))
    return module


def _converted(norm: _BatchNorm) -> BatchNorm:
    if not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise ValueError(f"cannot synchronise {norm}: it needs weights, running statistics and a momentum")
    with torch.device("meta"):
        converted = BatchNorm(norm.num_features, norm.momentum, norm.eps, channel_dim=1)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(converted, name, getattr(norm, name))
    return converted.train(norm.training)


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether `module`, in its present mode, normalises a sample by its batch: then it may not be cut into pieces."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in module.modules())
