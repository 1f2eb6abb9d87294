"""Batch norm over the batch of all processes, for gloo and nccl (torch's own is for GPUs alone).

Legend: B batch of this process, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize(model: nn.Module) -> nn.Module:
    """The model with every batch norm replaced by one that synchronises; names and weights stay as they are."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, _SyncBatchNorm.of(child))
        else:
            synchronize(child)
    return model


class _SyncBatchNorm(_BatchNorm):
    @classmethod
    def of(cls, other: _BatchNorm) -> "_SyncBatchNorm":
        mine = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        mine.weight, mine.bias = other.weight, other.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(mine, name, getattr(other, name))
        return mine.train(other.training)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        values = input.float()
        # Every process has as many rows as every other: the loader sees to it.
        count = values.numel() / values.shape[1] * dist.get_world_size()
        mean_C: Tensor = _Sum.apply(values.sum(dims)) / count
        shape = (1, -1, *[1] * (input.dim() - 2))
        centred = values - mean_C.view(shape)
        var_C: Tensor = _Sum.apply(centred.square().sum(dims)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
                self.running_var.lerp_((var_C * count / max(count - 1, 1)).to(self.running_var.dtype), share)
        normal = centred * (var_C.view(shape) + self.eps).rsqrt()
        if self.affine:
            normal = torch.addcmul(self.bias.view(shape), normal, self.weight.view(shape))
        return normal.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
