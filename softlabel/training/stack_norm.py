"""Batch norms of a stack: those of all students as one batch norm with more channels.

torch has no rule for `vmap` of a batch norm on every device and in every version; this one is torch's own kernel
everywhere, with the running statistics of the students updated in place.

Legend: S students, B batch, C channels.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, autograd, nn
from torch.nn.modules.batchnorm import _BatchNorm


def stack_norms(model: nn.Module) -> nn.Module:
    """The model with each batch norm of torch replaced by one that `vmap` takes; names and tensors stay."""
    for name, child in model.named_children():
        # Others may do more, and a cumulative average needs the number of batches as a number.
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and child.momentum is not None:
            assert isinstance(child, _BatchNorm)
            setattr(model, name, _StackNorm(child))
        else:
            stack_norms(child)
    return model


class _StackNorm(nn.Module):
    """A batch norm with the parameters and buffers of another one."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self._norm = [norm]  # in a list, as its parameters are this module's
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, inputs: Tensor) -> Tensor:
        norm = self._norm[0]
        norm._check_input_dim(inputs)  # type: ignore[no-untyped-call]
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)  # type: ignore[operator]
        by_batch = self.training or self.running_mean is None
        state = (self.weight, self.bias, self.running_mean, self.running_var)
        output: Tensor = _Norm.apply(inputs, *state, by_batch, norm.momentum, norm.eps)
        return output


class _Norm(autograd.Function):
    """A batch norm whose `vmap` is a batch norm of S * C channels."""

    generate_vmap_rule = False

    @staticmethod
    def forward(inputs: Tensor, *state: Any) -> Tensor:
        return _normalize(inputs, *state)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("only the rule of vmap is used")

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, *state: Any) -> tuple[Tensor, int]:
        students = info.batch_size
        inputs_BSC = inputs.unsqueeze(1) if in_dims[0] is None else inputs.movedim(in_dims[0], 1)
        inputs_BSC = inputs_BSC.expand(-1, students, *inputs_BSC.shape[2:])
        # The tensors of a stack have the students first, so that these are views, which are updated in place.
        assert all(dim == 0 for dim, one in zip(in_dims[1:5], state[:4], strict=True) if one is not None)
        tensors: list[Any] = [None if one is None else one.view(-1) for one in state[:4]]
        return _normalize(inputs_BSC.flatten(1, 2), *tensors, *state[4:]).view(inputs_BSC.shape), 1


def _normalize(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    by_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    return F.batch_norm(inputs, mean, variance, weight, bias, by_batch, momentum, eps)
