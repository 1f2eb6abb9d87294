"""The distillation loss of a language model's last layer: the product with its matrix and the loss, fused.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap)      the loss of z is that of `softlabel.loss.functional`

N rows, D width, C classes (the vocabulary). Logits and their gradient exist for a chunk of rows at a time, never for
all of them; the gradients of h, W and b are computed with the loss and handed out by the backward pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.arguments import (
    REDUCTIONS,
    ArrayLike,
    check_choice,
    loss_inputs,
    make_settings,
    transforming,
    widened,
)
from softlabel.loss.attach import FusedLinearLoss, tensors_of
from softlabel.loss.chunked_linear import (
    LinearGradients,
    LogitSettings,
    Parameters,
    cap_logits,
    counted_rows,
    linear_losses,
)
from softlabel.loss.dispatch import chunk_losses, run_loss
from softlabel.loss.functional import LossComponents
from softlabel.loss.rows import LossCall, Shares, row_shares, work_dtype
from softlabel.loss.targets import SigmoidTarget, Target, make_empty_target, retemper_factor

__all__ = ["LinearImpl", "Observe", "linear_distillation_loss", "linear_distillation_loss_components"]

LinearImpl = Literal["auto", "reference", "torch", "triton"]
IMPLS = ("auto", "reference", "torch", "triton")
# Rows of a chunk (a slice or int64 positions), their logits and their target (None without a soft term).
Observe = Callable[[slice | Tensor, Tensor, Target | None], None]


def linear_distillation_loss(
    hidden_ND: Tensor,
    head_weight_CD: Tensor,
    head_bias_C: Tensor | None,
    target: Target | ArrayLike | None,
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: LinearImpl = "auto",
) -> Tensor:
    """`distillation_loss` of the logits `hidden @ head_weight.T + head_bias`, which never exist for all rows.

    Rows that count for nothing (weight 0, or neither a target nor a label) are left out before the product: what they
    hold, NaN included, changes nothing, and the gradient of their hidden states is 0. Arguments that are not listed
    here are those of `distillation_loss`.

    Args:
        hidden_ND: float16, bfloat16, float32 or float64 (N, D), the input of the last layer; that of sequences is
            (B, L, D), and goes with labels, weight and soft_mask (B, L) and a target of B * L rows.
        head_weight_CD: (C, D), the layer's matrix, in the type of the hidden states. Under autocast the types may
            differ; on CUDA the product is then computed in autocast's type.
        head_bias_C: (C,) or None.
        target: as in `distillation_loss`, except `SigmoidTarget`; None with soft_weight 0: hard labels alone. The
            logits of a `HeadTarget` are made chunk by chunk as well.
        weight: (N,) weights of the rows.
        logit_scale: above 0; what the product, with the bias, is multiplied by.
        softcap: above 0; logits are softcap * tanh(logits / softcap), after `logit_scale`. None: no cap.
        chunk_rows: rows whose logits exist at a time; None: 64 MiB of them in float32 on a CPU, 256 MiB elsewhere.
        impl: "auto" takes triton for the rows of a chunk on CUDA and torch elsewhere; "reference" is float64, of all
            rows at once, and differentiable twice. Under `torch.func` all are the reference. Under `torch.compile` the
            fused ones end the graph and run outside of it.

    Returns:
        A scalar (or (N,), or (B, L)) with the gradient, float64 for float64 hidden states, else float32. With reduction
        "none" the product is computed once more in the backward pass.

    Raises:
        MismatchError: hidden states, matrix, bias, target and loss do not fit each other.
        UsageError: a value that makes no sense; see `distillation_loss`.
    """
    return linear_distillation_loss_components(
        hidden_ND,
        head_weight_CD,
        head_bias_C,
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
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
        impl=impl,
    ).total


def linear_distillation_loss_components(
    hidden_ND: Tensor,
    head_weight_CD: Tensor,
    head_bias_C: Tensor | None,
    target: Target | ArrayLike | None,
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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: LinearImpl = "auto",
    observe: Observe | None = None,
) -> LossComponents:
    """`linear_distillation_loss` with its two terms beside it; arguments and errors are the same.

    Args:
        observe: is given the logits of each chunk of rows while they exist, without gradient, for figures such as the
            accuracy, which need no second product so; it must not change them. Rows that count for nothing are left
            out.

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
    logit_settings = _check_logit_settings(logit_scale, softcap, chunk_rows)
    _check_head(hidden_ND, head_weight_CD, head_bias_C)
    shape, classes, device = hidden_ND.shape[:-1], head_weight_CD.shape[0], hidden_ND.device
    if isinstance(target, SigmoidTarget):
        raise UsageError(
            "target: expected one softmax over the classes, found SigmoidTarget of independent outputs; use "
            "distillation_loss of the logits"
        )
    if target is None:
        if settings.soft_weight != 0:
            raise UsageError(
                f"target: expected one for soft_weight {settings.soft_weight:g}, found None; give soft_weight=0 to "
                "train on hard labels alone"
            )
        target = make_empty_target(shape.numel(), classes, temperature, device)
    given = loss_inputs(
        target, labels, weight, soft_mask, shape=shape, classes=classes, device=device, ignore_index=ignore_index
    )
    settings = replace(settings, factor=retemper_factor(given.target, temperature))
    shares = row_shares(
        given.labels,
        given.weight,
        given.soft_mask,
        rows=shape.numel(),
        dtype=work_dtype(widened(hidden_ND.new_empty(0), temperature)),
        device=device,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    call = LossCall(target=given.target, labels=given.labels, shares=shares, settings=settings, reduction=reduction)
    rows_ND = hidden_ND if len(shape) == 1 else hidden_ND.reshape(-1, hidden_ND.shape[-1])
    run = _run_whole if impl == "reference" or transforming() else _run_fused
    if torch.compiler.is_compiling() and run is _run_fused:
        run = torch.compiler.disable(  # type: ignore[no-untyped-call]
            _run_fused, reason="the fused linear distillation loss cannot be traced; compile without fullgraph"
        )
    parts = run(Parameters(rows_ND, head_weight_CD, head_bias_C), call, logit_settings, impl, observe)
    dtype = work_dtype(hidden_ND)
    parts = (parts[0].to(dtype), parts[1].to(dtype), parts[2].to(dtype))
    if reduction == "none" and len(shape) > 1:
        parts = (parts[0].reshape(shape), parts[1].reshape(shape), parts[2].reshape(shape))
    return LossComponents(*parts)


def _run_whole(
    given: Parameters, call: LossCall, settings: LogitSettings, impl: str, observe: Observe | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all rows in float64, plain differentiable torch."""
    bias_C = None if given.bias is None else given.bias.double()
    with torch.autocast(given.hidden.device.type, enabled=False):
        counted_N = counted_rows(call)
        hidden_ND = torch.where(counted_N[:, None], given.hidden, 0.0).double()
        logits_NC = cap_logits(F.linear(hidden_ND, given.weight.double(), bias_C), settings)
        if observe is not None:
            rows = counted_N.nonzero()[:, 0]
            target = call.target.take(rows) if call.settings.soft_weight != 0 else None
            observe(rows, logits_NC.detach()[rows], target)
        return run_loss(logits_NC, call, impl="reference")


def _run_fused(
    given: Parameters, call: LossCall, settings: LogitSettings, impl: str, observe: Observe | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = given.hidden.device
    rows_of = chunk_losses(impl, device)
    observers = [observe]  # of the first pass: a backward pass may compute all of it once more
    # What autocast would do with the product; the loss itself is never in half precision.
    half = torch.get_autocast_dtype(device.type) if _is_autocast(given.hidden) and device.type == "cuda" else None

    def compute(
        tensors: Sequence[Tensor | None], wanted: tuple[bool, bool, bool], factor_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, LinearGradients]:
        hidden_ND, weight_CD, bias_C = tensors
        assert hidden_ND is not None
        assert weight_CD is not None
        if half is not None:
            hidden_ND, weight_CD = hidden_ND.to(half), weight_CD.to(half)
        shares = call.shares
        if factor_N is not None:
            factor_N = factor_N.to(shares.soft.dtype)
            shares = Shares(soft=shares.soft * factor_N, hard=shares.hard * factor_N, gaps=True)
        rows = Parameters(hidden_ND, weight_CD, bias_C)
        watching = observers.pop() if observers else None
        return linear_losses(rows, replace(call, shares=shares), settings, rows_of, wanted, watching)

    parts = [getattr(call.target, name) for name in call.target.__slots__]
    inputs = tensors_of([call.labels, call.shares.soft, call.shares.hard, *parts])
    at_once = torch.is_grad_enabled() and call.reduction != "none"
    result: tuple[Tensor, Tensor, Tensor] = FusedLinearLoss.apply(*given, compute, at_once, *inputs)
    return result


def _check_logit_settings(logit_scale: float, softcap: float | None, chunk_rows: int | None) -> LogitSettings:
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name}: expected a number above 0, found {value}")
    if chunk_rows is not None and chunk_rows < 1:
        raise UsageError(f"chunk_rows: expected at least 1, found {chunk_rows}")
    return LogitSettings(
        scale=float(logit_scale), softcap=None if softcap is None else float(softcap), chunk_rows=chunk_rows
    )


def _check_head(hidden: Tensor, weight_CD: Tensor, bias_C: Tensor | None) -> None:
    if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not hidden.is_floating_point():
        raise MismatchError(f"hidden: expected a floating-point tensor (N, D) or (B, L, D), found {_describe(hidden)}")
    width = hidden.shape[-1]
    if not isinstance(weight_CD, Tensor) or weight_CD.dim() != 2 or weight_CD.shape[1] != width:
        raise MismatchError(
            f"head_weight: expected a tensor (C, {width}), as wide as the hidden states, found {_describe(weight_CD)}"
        )
    classes = len(weight_CD)
    if bias_C is not None and (not isinstance(bias_C, Tensor) or bias_C.shape != (classes,)):
        raise MismatchError(f"head_bias: expected a tensor ({classes},) or None, found {_describe(bias_C)}")
    for name, one in (("head_weight", weight_CD), ("head_bias", bias_C)):
        if one is None:
            continue
        if one.device != hidden.device:
            raise MismatchError(
                f"{name}: expected a tensor on {hidden.device} as the hidden states, found {one.device}"
            )
        if one.dtype != hidden.dtype and not (one.is_floating_point() and _is_autocast(hidden)):
            raise MismatchError(
                f"{name}: expected {hidden.dtype} as the hidden states, found {one.dtype}; cast one of them, or use "
                f"torch.autocast"
            )


def _is_autocast(hidden: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def _describe(found: object) -> str:
    return f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
