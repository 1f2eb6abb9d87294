"""WTTM: a temperature for the teacher alone, and a weight for each row.

N rows, C classes, K kept classes. z student logits, t teacher logits.
"""

import torch
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.loss.arguments import check_temperature, check_weight
from softlabel.loss.functional import distillation_loss
from softlabel.loss.reference import scaled_logits
from softlabel.loss.rows import row_shares, work_dtype
from softlabel.loss.targets import (
    SampledTarget,
    SigmoidTarget,
    Target,
    TopKTarget,
    as_target,
    retemper_factor,
    tail_column,
)

__all__ = ["weighted_ttm"]


def weighted_ttm(
    student_logits_NC: Tensor,
    target: Target | Tensor,
    *,
    temperature: float,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """WTTM (Zheng and Yang 2024): U KL(softmax(t / T) || softmax(z)) with U = sum_c softmax(t)_c^(1 / T).

    The student has no temperature, and there is no factor T^2. The power sum U is 1 where the teacher is certain and
    grows with its uncertainty, to C^(1 - 1 / T).

    Args:
        student_logits_NC: floating-point (N, C).
        target: any that knows the temperatures 1 and T; of top-k labels those classes that were left out count as one
            outcome, in the KL divergence and exactly in U.
        temperature: T, of the teacher; 1 / T is the paper's gamma.
        weight: (N,) weights of the rows; a mean divides by their sum, not by that of U.
        reduction: "mean", "sum", or "none", which gives (N,).

    Returns:
        A scalar (or (N,)), float64 for float64 logits, else float32.

    Raises:
        MismatchError: the target does not know both temperatures, or is of another shape.
        UsageError: a target of drawn classes or of independent outputs, which have no power sum.
    """
    check_temperature(temperature)
    target = as_target(target)
    if isinstance(target, SampledTarget | SigmoidTarget):
        raise UsageError(
            f"target: expected a softmax whose power sum is known, found {type(target).__name__}; use "
            "distillation_loss, or a store with a dense encoding or topk"
        )
    if weight is not None:
        check_weight(weight)
    dtype = work_dtype(student_logits_NC)
    shares = row_shares(
        None,
        weight,
        None,
        rows=len(student_logits_NC),
        dtype=dtype,
        device=student_logits_NC.device,
        ignore_index=-100,
        reduction=reduction,
    )
    each_N = torch.where(shares.soft == 0, 0.0, shares.soft * _sum_powers(target, temperature, dtype))
    return distillation_loss(
        student_logits_NC.to(dtype) * temperature,  # which the loss divides by the temperature
        target,
        temperature=temperature,
        soft_weight=temperature**-2,
        hard_weight=0.0,
        weight=each_N,
        reduction="none" if reduction == "none" else "sum",
    )


def _sum_powers(
    target: Target,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """(N,) sum over classes of softmax(t)^(1 / T), which is exp(lse(t / T) - lse(t) / T)."""
    assert not isinstance(target, SampledTarget | SigmoidTarget)
    logs = []
    for one in (1.0, temperature):
        factor = retemper_factor(target, one)
        if isinstance(target, TopKTarget):
            tail_N1 = target.tail[:, tail_column(target, one), None].to(dtype)
            if target.index.shape[1] == target.num_classes:
                tail_N1 = torch.full_like(tail_N1, -torch.inf)
            logits_NC = torch.cat([target.value.to(dtype) * factor, tail_N1], dim=1)
        else:
            logits_NC = scaled_logits(target, dtype) * factor
        logs.append(torch.logsumexp(logits_NC, dim=1))
    whole_N: Tensor = (logs[1] - logs[0] / temperature).exp()
    return whole_N
