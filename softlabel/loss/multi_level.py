"""MLKD: predictions compared row by row at several temperatures, and by the correlations of rows and of classes.

N rows, C classes. z student logits, t teacher logits, q = softmax(z / T), p = softmax(t / T).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.loss.others import check_dense
from softlabel.loss.reference import scaled_logits
from softlabel.loss.rows import work_dtype
from softlabel.loss.targets import SampledTarget, SigmoidTarget, Target, TopKTarget, as_target, retemper_factor

__all__ = ["TEMPERATURES", "multi_level_kd"]

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)  # of the reference code


def multi_level_kd(
    student_logits_NC: Tensor,
    target: Target | Tensor,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    by_confidence: bool = True,
) -> Tensor:
    """MLKD (Jin et al. 2023), the sum over temperatures of

    - instance: r T^2 KL(p || q), mean over rows,
    - batch: r |q q^T - p p^T|^2 / N, squared Frobenius norm of the (N, N) correlations of rows,
    - class: c |q^T q - p^T p|^2 / C, the same of the (C, C) correlations of classes,

    each times its weight. r is the share of rows whose highest teacher probability is at most the median one, c the
    share of classes whose summed teacher probability is; both at temperature 1, both about 1/2, and 1 without
    `by_confidence`. (The reference code multiplies a mask of these rows with the mean over all rows: the mask leaves no
    row out, it scales.) The reference code sees each sample in a weak and in a strong view; this is its loss of the
    weak one.

    A statement about the batch as a whole, so there are no weights and no other reduction.

    Args:
        student_logits_NC: floating-point (N, C).
        target: of all classes, at the temperatures given and, with `by_confidence`, at 1.

    Returns:
        A scalar, float64 for float64 logits, else float32.

    Raises:
        MismatchError: the target does not know a temperature, or is of another shape.
        UsageError: a target that does not have every class, or no temperature.
    """
    if not temperatures:
        raise UsageError("temperatures: expected at least one, found none")
    target = as_target(target)
    check_dense(student_logits_NC, target)
    assert not isinstance(target, TopKTarget | SampledTarget | SigmoidTarget)
    dtype = work_dtype(student_logits_NC)
    z_NC, scaled_NC = student_logits_NC.to(dtype), scaled_logits(target, dtype)
    rows, classes = z_NC.shape
    of_rows = of_classes = z_NC.new_ones(())
    if by_confidence:
        sure_NC = F.softmax(scaled_NC * retemper_factor(target, 1.0), 1)
        of_rows, of_classes = _share_below(sure_NC.amax(1)), _share_below(sure_NC.sum(0))
    total = z_NC.new_zeros(())
    with torch.autocast(z_NC.device.type, enabled=False):
        for one in temperatures:
            log_q_NC = F.log_softmax(z_NC / one, 1)
            log_p_NC = F.log_softmax(scaled_NC * retemper_factor(target, one), 1)
            q_NC, p_NC = log_q_NC.exp(), log_p_NC.exp()
            kl = torch.where(p_NC == 0, 0.0, p_NC * (log_p_NC - log_q_NC)).sum() / rows
            of_batch = (q_NC @ q_NC.T - p_NC @ p_NC.T).square().sum() / rows
            of_class = (q_NC.T @ q_NC - p_NC.T @ p_NC).square().sum() / classes
            total = total + of_rows * (instance_weight * one**2 * kl + batch_weight * of_batch)
            total = total + of_classes * class_weight * of_class
    return total


def _share_below(values: Tensor) -> Tensor:
    """The share of the numbers that are at most their median."""
    median = torch.quantile(values, 0.5)
    return (values <= median).to(values.dtype).mean()
