"""How a gradient that was computed with the loss reaches autograd.

N rows, C classes. `FusedLoss` for eager code hands its one (N, C) buffer over as the gradient, and computes it again
for a second backward; `FusedLinearLoss` does the same with the gradients of hidden states, matrix and bias;
`TracedLoss` is what `torch.compile` can trace.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FusedLinearLoss", "FusedLoss", "TracedLoss", "scale_by", "tensors_of"]

# (logits, want_grad) -> total, soft, hard, gradient of the total's sum in the logits
Compute = Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor | None]]
Scale = Callable[[Tensor, Tensor], Tensor]
Gradients = Sequence[Tensor | None]
# (hidden states, matrix and bias; which gradients are wanted; a factor (N,) for each row, or None)
# -> total, soft, hard, gradients of the total's sum
ComputeLinear = Callable[
    [Sequence[Tensor | None], tuple[bool, bool, bool], Tensor | None], tuple[Tensor, Tensor, Tensor, Gradients]
]

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


class FusedLinearLoss(torch.autograd.Function):
    """total, soft, hard = FusedLinearLoss.apply(hidden, weight, bias, compute, at_once, *tensors compute looks at).

    `at_once`: the gradients are computed with the loss. They cannot be for a total of each row (N,): the matrix's is a
    sum over rows, which can only be made once each row's factor is known, in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor | None,
        compute: ComputeLinear,
        at_once: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = [None if one is None else one.detach() for one in (hidden_ND, weight_CD, bias_C)]
        wanted = ctx.needs_input_grad[:3] if at_once else (False, False, False)
        total, soft, hard, gradients = compute(given, wanted, None)
        ctx.gradients, ctx.compute = gradients if at_once else None, compute
        ctx.save_for_backward(hidden_ND, weight_CD, bias_C, *inputs)
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        given = ctx.saved_tensors[:3]
        gradients, ctx.gradients = ctx.gradients, None
        factor_N = upstream[0] if upstream[0].dim() == 1 else None
        results: list[Tensor | None] = []
        with torch.no_grad():
            if gradients is None:
                detached = [None if one is None else one.detach() for one in given]
                gradients = ctx.compute(detached, ctx.needs_input_grad[:3], factor_N)[3]
            for gradient, of in zip(gradients, given, strict=True):
                if gradient is not None and factor_N is None:
                    gradient = scale_by(gradient, upstream[0])
                results.append(None if gradient is None else gradient.to(of.dtype))
        if torch.is_grad_enabled():
            depends_on = tensors_of([*given, upstream[0]])
            results = [None if one is None else _Once.apply(one, *depends_on) for one in results]
        return *results, *([None] * (len(ctx.needs_input_grad) - 3))

    jvp = FusedLoss.jvp


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
