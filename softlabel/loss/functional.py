"""The soft+hard distillation loss, as a function and as a module.

    loss = hard_weight * CE(z, y) + soft_weight * T^2 * KL(softmax(t / T) || softmax(z / T))

Of independent outputs (`SigmoidTarget`) both terms are binary, see `softlabel.loss.sigmoid`.

N rows, C classes; z student logits, t teacher logits, y labels, T temperature (Hinton et al. 2015). T^2 once, and on
the soft term alone. The soft mean is over all rows that have a target, the hard mean over labelled rows.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from softlabel.loss.arguments import (
    REDUCTIONS,
    ArrayLike,
    check_choice,
    check_logits,
    loss_inputs,
    make_settings,
    widened,
)
from softlabel.loss.dispatch import run_loss
from softlabel.loss.rows import LossCall, row_shares, work_dtype
from softlabel.loss.sigmoid import sigmoid_loss
from softlabel.loss.targets import SigmoidTarget, Target, retemper_factor

__all__ = ["DistillationLoss", "Impl", "LossComponents", "distillation_loss", "distillation_loss_components"]

Impl = Literal["auto", "reference", "torch", "compile", "triton"]
IMPLS = ("auto", "reference", "torch", "compile", "triton")


class LossComponents(NamedTuple):
    """`total` is the loss and has the gradient; `soft` (with its T^2) and `hard` are its terms before soft_weight and
    hard_weight, reduced like it, without gradient. A term whose weight is 0 is not computed and reads 0."""

    total: Tensor
    soft: Tensor
    hard: Tensor


def distillation_loss(
    student_logits_NC: Tensor,
    target: Target | ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
    weight: ArrayLike | None = None,
    soft_mask: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    tail: str = "ghost",
    impl: Impl = "auto",
) -> Tensor:
    """The distillation loss of a student's logits against soft and hard labels.

    Under `torch.func` (grad, jvp, vmap) "auto", "torch" and "reference" are plain torch operations.

    Args:
        student_logits_NC: float16, bfloat16, float32 or float64 (N, C). Those of sequences are (B, L, C), and go with
            labels, weight and soft_mask (B, L) and a target of B * L rows.
        target: a record of `softlabel.loss.targets`, or the teacher's raw logits (N, C) as a tensor or array.
        labels: integers (N,), as a tensor, array or list, `ignore_index` where there is none; None: no hard term. For
            a target of independent outputs (N, C): 1, 0, or negative where it is not known.
        temperature: above 0, at most 100,000; above 50 the loss is computed in float64, as float32 would lose it in
            rounding.
        soft_weight: of the soft term, at least 0; a term of weight 0 is not computed.
        hard_weight: of the hard term, at least 0.
        label_smoothing: of the hard term, 0 to 1; of independent outputs towards 1/2.
        weight: (N,) weights of the rows, at least 0; a mean divides by their sum, and a row with weight 0 counts for
            nothing, even when it holds NaN.
        soft_mask: bool (N,), False where a row has no target: such a row has its hard term alone.
        ignore_index: the label of a row without one.
        reduction: "mean", "sum", or "none", which gives (N,).
        tail: for a top-k target; "ghost" compares the mass outside the k as one more outcome, "uniform" spreads the
            teacher's evenly over those classes, "renormalize" drops it (biased).
        impl: "auto" takes triton on CUDA and torch elsewhere, and is traceable under `torch.compile`; "compile"
            compiles it by itself; "reference" is float64. All are equal within rounding.

    Returns:
        A scalar (or (N,), or (B, L)) with the gradient, float64 for float64 logits, else float32.

    Raises:
        MismatchError: target and loss do not fit each other.
        UsageError: a value that makes no sense. The numbers in labels and weight are looked at on the CPU alone, where
            it costs no synchronisation: on a CUDA device a label that is no class makes the loss NaN ("triton") or
            stops in torch ("torch"), and a NaN weight makes it NaN.
    """
    return distillation_loss_components(
        student_logits_NC,
        target,
        labels,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        weight=weight,
        soft_mask=soft_mask,
        ignore_index=ignore_index,
        reduction=reduction,
        tail=tail,
        impl=impl,
    ).total


def distillation_loss_components(
    student_logits_NC: Tensor,
    target: Target | ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
    weight: ArrayLike | None = None,
    soft_mask: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    tail: str = "ghost",
    impl: Impl = "auto",
) -> LossComponents:
    """`distillation_loss` with its two terms beside it; arguments and errors are the same.

    Returns:
        `LossComponents`, each a scalar (or (N,), or (B, L)).
    """
    settings = make_settings(
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        tail=tail,
    )
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    if isinstance(target, SigmoidTarget):
        settings = replace(settings, factor=retemper_factor(target, temperature))
        given_rows = (student_logits_NC, target, labels, weight, soft_mask)
        return LossComponents(*sigmoid_loss(*given_rows, settings=settings, reduction=reduction, impl=impl))
    check_logits(student_logits_NC)
    shape, classes = student_logits_NC.shape[:-1], student_logits_NC.shape[-1]
    device = student_logits_NC.device
    given = loss_inputs(
        target, labels, weight, soft_mask, shape=shape, classes=classes, device=device, ignore_index=ignore_index
    )
    settings = replace(settings, factor=retemper_factor(given.target, temperature))
    rows_NC = student_logits_NC if len(shape) == 1 else student_logits_NC.reshape(-1, classes)
    logits_NC = widened(rows_NC, temperature)
    shares = row_shares(
        given.labels,
        given.weight,
        given.soft_mask,
        rows=len(logits_NC),
        dtype=work_dtype(logits_NC),
        device=device,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    call = LossCall(target=given.target, labels=given.labels, shares=shares, settings=settings, reduction=reduction)
    parts = run_loss(logits_NC, call, impl=impl)
    if logits_NC is not rows_NC:
        dtype = work_dtype(rows_NC)
        parts = (parts[0].to(dtype), parts[1].to(dtype), parts[2].to(dtype))
    if reduction == "none" and len(shape) > 1:
        parts = (parts[0].reshape(shape), parts[1].reshape(shape), parts[2].reshape(shape))
    return LossComponents(*parts)


class DistillationLoss(nn.Module):
    """`distillation_loss` with its settings kept: `loss(student_logits, target, labels, weight=None)`.

    Args:
        components: give `LossComponents` instead of the loss alone; the other settings are those of the function.
    """

    def __init__(
        self,
        *,
        temperature: float,
        soft_weight: float,
        hard_weight: float,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        tail: str = "ghost",
        impl: Impl = "auto",
        components: bool = False,
    ) -> None:
        super().__init__()
        make_settings(
            temperature=temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            tail=tail,
        )
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("impl", impl, IMPLS)
        self.temperature = temperature
        self.soft_weight = soft_weight
        self.hard_weight = hard_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.tail = tail
        self.impl: Impl = impl
        self.components = components

    def forward(
        self,
        student_logits_NC: Tensor,
        target: Target | ArrayLike,
        labels: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        soft_mask: ArrayLike | None = None,
    ) -> Tensor | LossComponents:
        parts = distillation_loss_components(
            student_logits_NC,
            target,
            labels,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight,
            label_smoothing=self.label_smoothing,
            weight=weight,
            soft_mask=soft_mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            tail=self.tail,
            impl=self.impl,
        )
        return parts if self.components else parts.total

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, soft_weight={self.soft_weight:g}, hard_weight={self.hard_weight:g}, "
            f"label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}, tail={self.tail!r}, "
            f"impl={self.impl!r}"
        )
