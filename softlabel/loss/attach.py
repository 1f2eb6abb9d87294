"""How a gradient that was computed with the loss reaches autograd.

N rows, C classes. Two ways: `FusedLoss` for eager code hands its one (N, C) buffer over as the gradient, and computes
it again for a second backward; `TracedLoss` is what `torch.compile` can trace.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FusedLoss", "TracedLoss", "scale_by", "tensors_of"]

# (logits, want_grad) -> total, soft, hard, gradient of the total's sum in the logits
Compute = Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor | None]]
Scale = Callable[[Tensor, Tensor], Tensor]

_TWICE = (
    "the distillation loss cannot be differentiated twice: its gradient is computed in closed form, without a graph; "
    "use impl='reference' for second derivatives"
)


class _Once(torch.autograd.Function):
    """The gradient as it is; a clear error if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_TWICE)


def scale_by(grad_NC: Tensor, upstream: Tensor) -> Tensor:
    """grad * upstream, in place; upstream is a scalar or (N,). On the CPU a factor of 1 costs nothing."""
    if upstream.dim() == 1:
        return grad_NC.mul_(upstream[:, None])
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return grad_NC
    return grad_NC.mul_(upstream)


class FusedLoss(torch.autograd.Function):
    """total, soft, hard = FusedLoss.apply(logits, compute, scale, *tensors that compute looks at).

    The gradient is computed with the loss and given away by the first backward; a second one (`retain_graph`) computes
    it again, so that at no time there is more than one buffer, and no buffer that autograd owns is ever written to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NC: Tensor,
        compute: Compute,
        scale: Scale,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, soft, hard, grad_NC = compute(logits_NC.detach(), ctx.needs_input_grad[0])
        ctx.grad_NC, ctx.compute, ctx.scale = grad_NC, compute, scale
        ctx.save_for_backward(logits_NC, *inputs)
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        grad_NC, ctx.grad_NC = ctx.grad_NC, None
        # What was saved also shows, by its version, whether a second backward would see other numbers.
        with torch.no_grad():
            if grad_NC is None:
                grad_NC = ctx.compute(ctx.saved_tensors[0].detach(), True)[3]
            grad_NC = ctx.scale(grad_NC, upstream[0])
        if torch.is_grad_enabled():
            grad_NC = _Once.apply(grad_NC, ctx.saved_tensors[0], upstream[0])
        return grad_NC, *([None] * (len(ctx.needs_input_grad) - 1))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise RuntimeError(
            "the distillation loss has no derivative in forward mode outside of torch.func: use torch.func.jvp, or "
            "impl='reference'"
        )


class TracedLoss(torch.autograd.Function):
    """total = TracedLoss.apply(logits, total, grad): the same for `torch.compile`, which plans the memory itself."""

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, total: Tensor, grad_NC: Tensor) -> Tensor:
        ctx.save_for_backward(grad_NC)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (grad_NC,) = ctx.saved_tensors
        by = upstream[0] if upstream[0].dim() == 0 else upstream[0][:, None]
        return grad_NC * by.to(grad_NC.dtype), None, None


def tensors_of(parts: Sequence[object]) -> tuple[Tensor, ...]:
    return tuple(part for part in parts if isinstance(part, Tensor))
