"""The soft+hard distillation loss, as a function and as a module.

    loss = hard_weight * CE(z, y) + soft_weight * T^2 * KL(softmax(t / T) || softmax(z / T))

N rows, C classes; z student logits, t teacher logits, y labels, T temperature (Hinton et al. 2015). T^2 once, and on
the soft term alone. The soft mean is over all rows that have a target, the hard mean over labelled rows.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.dispatch import run_loss
from softlabel.loss.rows import Settings, row_shares
from softlabel.loss.targets import Target, as_target, retemper_factor

__all__ = ["DistillationLoss", "Impl", "LossComponents", "distillation_loss"]

Impl = Literal["auto", "reference", "torch", "compile", "triton"]
IMPLS = ("auto", "reference", "torch", "compile", "triton")
TAILS = ("ghost", "uniform", "renormalize")
REDUCTIONS = ("mean", "sum", "none")


class LossComponents(NamedTuple):
    """`total` is the loss and has the gradient; `soft` (with its T^2) and `hard` are its terms before soft_weight and
    hard_weight, reduced like it, without gradient. A term whose weight is 0 is not computed and reads 0."""

    total: Tensor
    soft: Tensor
    hard: Tensor


@overload
def distillation_loss(
    student_logits_NC: Tensor,
    target: Target | Tensor,
    labels: Tensor | None = ...,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    soft_mask: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    tail: str = ...,
    impl: Impl = ...,
    components: Literal[False] = ...,
) -> Tensor: ...


@overload
def distillation_loss(
    student_logits_NC: Tensor,
    target: Target | Tensor,
    labels: Tensor | None = ...,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    soft_mask: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    tail: str = ...,
    impl: Impl = ...,
    components: Literal[True],
) -> LossComponents: ...


@overload
def distillation_loss(
    student_logits_NC: Tensor,
    target: Target | Tensor,
    labels: Tensor | None = ...,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    soft_mask: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    tail: str = ...,
    impl: Impl = ...,
    components: bool,
) -> Tensor | LossComponents: ...


def distillation_loss(
    student_logits_NC: Tensor,
    target: Target | Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    soft_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    tail: str = "ghost",
    impl: Impl = "auto",
    components: bool = False,
) -> Tensor | LossComponents:
    """The loss of a student's logits (N, C), float16, bfloat16, float32 or float64, against soft and hard labels.

    target: a record of `softlabel.loss.targets`, or the teacher's raw logits (N, C) as a tensor.
    labels: int64 (N,), `ignore_index` where there is none; None: no hard term.
    weight: (N,) weights of the rows; a mean divides by their sum, and a row with weight 0 counts for nothing, even
        when it holds NaN.
    soft_mask: bool (N,), False where a row has no target: such a row has its hard term alone.
    reduction: "mean", "sum", or "none", which gives (N,).
    tail: for a top-k target; "ghost" compares the mass outside the k as one more outcome, "uniform" spreads the
        teacher's evenly over those classes, "renormalize" drops it (biased).
    impl: "auto" takes triton on CUDA and torch elsewhere, and is traceable under `torch.compile`; "compile" compiles
        it by itself; "reference" is float64. All are equal within rounding.

    Returns a scalar (or (N,)), float64 for float64 logits, else float32; LossComponents with `components=True`.
    Raises MismatchError when target and loss do not fit each other, UsageError for a value that makes no sense.
    """
    target = as_target(target)
    _check(student_logits_NC, target, labels, weight, soft_mask)
    _check_options(temperature, label_smoothing, reduction, tail, impl)
    settings = Settings(
        temperature=float(temperature),
        soft_weight=float(soft_weight),
        hard_weight=float(hard_weight),
        label_smoothing=float(label_smoothing),
        ignore_index=ignore_index,
        tail=tail,
        factor=retemper_factor(target, temperature),
    )
    shares = row_shares(student_logits_NC, labels, weight, soft_mask, ignore_index=ignore_index, reduction=reduction)
    parts = run_loss(student_logits_NC, target, labels, shares, settings, reduction=reduction, impl=impl)
    return LossComponents(*parts) if components else parts[0]


class DistillationLoss(nn.Module):
    """`distillation_loss` with its settings kept: `loss(student_logits, target, labels, weight=None)`."""

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
        _check_options(temperature, label_smoothing, reduction, tail, impl)
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
        target: Target | Tensor,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        soft_mask: Tensor | None = None,
    ) -> Tensor | LossComponents:
        return distillation_loss(
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
            components=self.components,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, soft_weight={self.soft_weight:g}, hard_weight={self.hard_weight:g}, "
            f"label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}, tail={self.tail!r}, "
            f"impl={self.impl!r}"
        )


def _check_options(temperature: float, label_smoothing: float, reduction: str, tail: str, impl: str) -> None:
    if not temperature > 0:
        raise UsageError(f"temperature: expected a number above 0, found {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"label_smoothing: expected a number from 0 to 1, found {label_smoothing}")
    for name, value, known in (("reduction", reduction, REDUCTIONS), ("tail", tail, TAILS), ("impl", impl, IMPLS)):
        if value not in known:
            raise UsageError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def _check(
    logits_NC: Tensor, target: Target, labels: Tensor | None, weight: Tensor | None, soft_mask: Tensor | None
) -> None:
    if logits_NC.dim() != 2 or not logits_NC.is_floating_point():
        raise MismatchError(
            f"student logits: expected a floating-point tensor (N, C), found {logits_NC.dtype} {tuple(logits_NC.shape)}"
        )
    rows, classes = logits_NC.shape
    if target.num_classes != classes:
        raise MismatchError(
            f"student logits: expected {target.num_classes} classes as in the target, found {classes}; "
            f"give the student {target.num_classes} outputs"
        )
    if len(target) != rows:
        raise MismatchError(f"target: expected {rows} rows as in the student's logits, found {len(target)}")
    for name, tensor in (("labels", labels), ("weight", weight), ("soft_mask", soft_mask)):
        if tensor is not None and tensor.shape != (rows,):
            raise MismatchError(f"{name}: expected shape ({rows},), one value a row, found {tuple(tensor.shape)}")
    if labels is not None and labels.dtype not in (torch.int64, torch.int32):
        raise MismatchError(f"labels: expected int64 class numbers, found {labels.dtype}")
    if soft_mask is not None and soft_mask.dtype != torch.bool:
        raise MismatchError(f"soft_mask: expected bool, found {soft_mask.dtype}")
