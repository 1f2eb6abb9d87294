"""The other losses of distillation, on the same targets, weights and reductions as `distillation_loss`.

N rows, C classes, R rows of a chunk. z student logits, t teacher logits, q = softmax(z / T), p = softmax(t / T).

They take targets of all classes: a tensor of raw teacher logits, DenseTarget, Int8Target, HeadTarget. The divergences
between p and q (Jensen-Shannon, reverse KL) take TopKTarget, too: the classes outside of the K are one outcome of both,
as in `distillation_loss`, which gives at most the divergence over all classes. "mean" is over rows (over labelled rows
where a label is needed), divided by the weights' sum;
a row with weight 0 counts for nothing, even when it holds NaN. float16 and bfloat16 are computed in float32. Reverse
KL, DKD and standardised logits have their gradient in closed form, computed with the loss in row chunks; the others
are plain torch.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.arguments import check_labels, check_temperature, check_weight, widened
from softlabel.loss.fused_rows import dkd_rows, fused_loss, reverse_kl_rows, standardized_rows
from softlabel.loss.reference import scaled_logits
from softlabel.loss.rows import Shares, row_shares, work_dtype
from softlabel.loss.targets import (
    DenseTarget,
    HeadTarget,
    SampledTarget,
    SigmoidTarget,
    Target,
    TopKTarget,
    as_target,
    retemper_factor,
    tail_column,
)

__all__ = [
    "check_dense",
    "decoupled_kd",
    "dist_loss",
    "jensen_shannon",
    "mse_logits",
    "reverse_kl",
    "soft_cross_entropy",
    "standardize_logits",
    "standardized_kl",
]

DenseKind = Target | Tensor
LEAST = -1e30  # in place of the logarithm of 0 where a difference of two of them would be NaN


def soft_cross_entropy(
    student_logits_NC: Tensor,
    target: DenseKind,
    *,
    temperature: float,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-T^2 sum_c p log q (Hinton et al. 2015): the KL divergence plus T^2 times the teacher's entropy."""

    def rows(z_NC: Tensor, t_NC: Tensor) -> Tensor:
        p_NC, log_q_NC = F.softmax(t_NC, 1), F.log_softmax(z_NC / temperature, 1)
        return -(temperature**2) * torch.where(p_NC == 0, 0.0, p_NC * log_q_NC).sum(1)

    return _plain(student_logits_NC, target, rows, temperature, weight, reduction)


def jensen_shannon(
    student_logits_NC: Tensor,
    target: DenseKind,
    *,
    temperature: float,
    beta: float = 0.5,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q (Agarwal et al. 2024, GKD).

    beta near 0 behaves like beta * KL(p || q), near 1 like (1 - beta) * KL(q || p).
    """
    if not 0 < beta < 1:
        raise UsageError(
            f"beta: expected a number between 0 and 1, found {beta}; for the ends use distillation_loss or reverse_kl"
        )

    def rows(z_NC: Tensor, t_NC: Tensor) -> Tensor:
        log_p_NC = F.log_softmax(t_NC, 1).clamp(min=LEAST)
        log_q_NC = F.log_softmax(z_NC / temperature, 1).clamp(min=LEAST)
        logs = torch.stack([log_p_NC + math.log(beta), log_q_NC + math.log(1 - beta)])
        log_m_NC = torch.logsumexp(logs, 0)
        first_N = _mass_times(log_p_NC.exp(), log_p_NC - log_m_NC)
        second_N = _mass_times(log_q_NC.exp(), log_q_NC - log_m_NC)
        return temperature**2 * (beta * first_N + (1 - beta) * second_N)

    return _plain(student_logits_NC, target, rows, temperature, weight, reduction, takes_top_k=True)


def mse_logits(
    student_logits_NC: Tensor,
    target: DenseKind,
    *,
    center: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared distance of the logits at temperature 1, mean over classes (Ba and Caruana 2014; Kim et al. 2021, who sum
    over classes: multiply by C for theirs).

    A store keeps logits up to a constant per row, which the softmax does not see and a distance does; `center` takes
    both rows' means off first. `center=False` compares the numbers themselves, and needs raw logits.
    """
    target = as_target(target)
    raw = isinstance(target, HeadTarget) or (isinstance(target, DenseTarget) and target.temperature == 1)
    if not center and not raw:
        raise MismatchError(
            "mse_logits: expected raw teacher logits for center=False, found a target that knows them up to a constant "
            "per row; use center=True"
        )

    def rows(z_NC: Tensor, t_NC: Tensor) -> Tensor:
        if center:
            z_NC, t_NC = z_NC - z_NC.mean(1, keepdim=True), t_NC - t_NC.mean(1, keepdim=True)
        return (z_NC - t_NC).square().mean(1)

    return _plain(student_logits_NC, target, rows, 1.0, weight, reduction)


def dist_loss(
    student_logits_NC: Tensor,
    target: DenseKind,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """DIST (Huang et al. 2022): T^2 times (inter_weight * (1 - correlation of q and p in each row, mean over rows)
    + intra_weight * (1 - correlation of each class's column over the batch, mean over classes)).

    A statement about the batch as a whole, so there are no weights and no other reduction.
    """
    z_NC, t_NC = _logits(student_logits_NC, target, temperature)
    if z_NC.shape[0] < 2 or z_NC.shape[1] < 2:
        raise UsageError(f"dist_loss: expected at least 2 rows and 2 classes to correlate, found {tuple(z_NC.shape)}")
    q_NC, p_NC = F.softmax(z_NC / temperature, 1), F.softmax(t_NC, 1)
    inter = 1 - _correlation(q_NC, p_NC).mean()
    intra = 1 - _correlation(q_NC.T, p_NC.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def reverse_kl(
    student_logits_NC: Tensor,
    target: DenseKind,
    *,
    temperature: float,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T^2 KL(q || p), which seeks a mode where KL(p || q) covers all of them (Gu et al. 2024, MiniLLM)."""
    if isinstance(target, TopKTarget):

        def rows(z_NC: Tensor, t_NC: Tensor) -> Tensor:
            log_p_NC, log_q_NC = F.log_softmax(t_NC, 1), F.log_softmax(z_NC / temperature, 1)
            return temperature**2 * _mass_times(log_q_NC.exp(), log_q_NC.clamp(min=LEAST) - log_p_NC.clamp(min=LEAST))

        return _plain(student_logits_NC, target, rows, temperature, weight, reduction, takes_top_k=True)
    target, factor = _dense(student_logits_NC, target, temperature)
    z_NC = widened(student_logits_NC, temperature)
    shares = _shares(z_NC, None, weight, reduction)
    loss = fused_loss(z_NC, target, None, shares.soft, reverse_kl_rows(temperature), factor, reduction)
    return loss.to(work_dtype(student_logits_NC))


def decoupled_kd(
    student_logits_NC: Tensor,
    target: DenseKind,
    labels: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    others_weight: float = 8.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """DKD (Zhao et al. 2022): T^2 (target_weight * TCKD + others_weight * NCKD), alpha and beta in the paper.

    TCKD is the KL divergence between "the label" and "anything else", NCKD the one among the other classes. It is
    defined by the label: a row without one counts for nothing.
    """
    target, factor = _dense(student_logits_NC, target, temperature)
    check_labels(labels, student_logits_NC.shape[1], ignore_index)
    z_NC = widened(student_logits_NC, temperature)
    shares = _shares(z_NC, labels, weight, reduction, ignore_index)
    labels_N = labels.long().where(labels != ignore_index, 0)
    rows = dkd_rows(temperature, target_weight, others_weight)
    loss = fused_loss(z_NC, target, labels_N, shares.hard, rows, factor, reduction)
    return loss.to(work_dtype(student_logits_NC))


def standardize_logits(logits_NC: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Every row with mean 0 and (unbiased) standard deviation 1 (Sun et al. 2024), float32 for half-precision input."""
    logits_NC = logits_NC.to(work_dtype(logits_NC))
    centered_NC = logits_NC - logits_NC.mean(1, keepdim=True)
    return centered_NC / (logits_NC.std(1, keepdim=True) + eps)


def standardized_kl(
    student_logits_NC: Tensor,
    target: DenseKind,
    *,
    temperature: float,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T^2 KL(softmax(s(t) / T) || softmax(s(z) / T)), s the standardisation of each row (Sun et al. 2024, whose T is
    the base temperature). Standardised logits do not depend on the temperature that a target is scaled by."""
    check_temperature(temperature)
    target = as_target(target)
    check_dense(student_logits_NC, target)
    z_NC = widened(student_logits_NC, temperature)
    shares = _shares(z_NC, None, weight, reduction)
    loss = fused_loss(z_NC, target, None, shares.soft, standardized_rows(temperature), target.temperature, reduction)
    return loss.to(work_dtype(student_logits_NC))


def _mass_times(mass: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(mass == 0, 0.0, mass * log_ratio).sum(1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


def _shares(
    logits_NC: Tensor, labels: Tensor | None, weight: Tensor | None, reduction: str, ignore_index: int = -100
) -> Shares:
    if weight is not None:
        check_weight(weight)
    return row_shares(
        labels,
        weight,
        None,
        rows=len(logits_NC),
        dtype=work_dtype(logits_NC),
        device=logits_NC.device,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def check_dense(logits_NC: Tensor, target: Target) -> None:
    """Raises UsageError for a target that is no softmax over all classes, MismatchError for one of another shape."""
    if isinstance(target, SigmoidTarget):
        raise UsageError(
            "target: expected one softmax over the classes, found SigmoidTarget of independent outputs; use "
            "distillation_loss"
        )
    if isinstance(target, (TopKTarget, SampledTarget)):
        raise UsageError(
            f"target: expected one of all classes, found {type(target).__name__}; use distillation_loss, or a store "
            f"with a dense encoding"
        )
    _check_shape(logits_NC, target)


def _check_shape(logits_NC: Tensor, target: Target) -> None:
    if logits_NC.dim() != 2 or (len(target), target.num_classes) != tuple(logits_NC.shape):
        raise MismatchError(
            f"student logits: expected shape {(len(target), target.num_classes)} as in the target, found "
            f"{tuple(logits_NC.shape)}"
        )


def _dense(logits_NC: Tensor, target: DenseKind, temperature: float) -> tuple[Target, float]:
    check_temperature(temperature)
    target = as_target(target)
    check_dense(logits_NC, target)
    return target, retemper_factor(target, temperature)


def _logits(logits_NC: Tensor, target: DenseKind, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's logits and the teacher's, the latter at `temperature`."""
    target, factor = _dense(logits_NC, target, temperature)
    assert not isinstance(target, (TopKTarget, SampledTarget, SigmoidTarget))
    logits_NC = widened(logits_NC, temperature)
    dtype = work_dtype(logits_NC)
    return logits_NC.to(dtype), scaled_logits(target, dtype) * factor


def _keep_outcomes(logits_NC: Tensor, target: TopKTarget, temperature: float) -> tuple[Tensor, Tensor]:
    """The same (N, K + 1) of the K classes that a target names, and of all others as one; the student's times
    `temperature`, which the loss divides by."""
    check_temperature(temperature)
    _check_shape(logits_NC, target)
    factor = retemper_factor(target, temperature)
    dtype = work_dtype(logits_NC)
    log_q_NC = F.log_softmax(widened(logits_NC, temperature).to(dtype) / temperature, 1)
    index_NK = target.index.long()
    log_q_NK, t_NK = log_q_NC.gather(1, index_NK), target.value.to(dtype) * factor
    if index_NK.shape[1] == target.num_classes:
        return log_q_NK * temperature, t_NK
    is_kept_NC = torch.zeros_like(log_q_NC, dtype=torch.bool).scatter(1, index_NK, True)
    rest_N1 = log_q_NC.masked_fill(is_kept_NC, -torch.inf).logsumexp(1, keepdim=True)
    tail_N1 = target.tail[:, tail_column(target, temperature), None].to(dtype)
    return torch.cat([log_q_NK, rest_N1], 1) * temperature, torch.cat([t_NK, tail_N1], 1)


def _plain(
    logits_NC: Tensor,
    target: DenseKind,
    rows: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    weight: Tensor | None,
    reduction: str,
    *,
    takes_top_k: bool = False,
) -> Tensor:
    if takes_top_k and isinstance(target, TopKTarget):
        z_NC, t_NC = _keep_outcomes(logits_NC, target, temperature)
    else:
        z_NC, t_NC = _logits(logits_NC, target, temperature)
    shares = _shares(z_NC, None, weight, reduction)
    if shares.gaps:
        blank_N1 = (shares.soft == 0)[:, None]
        z_NC, t_NC = z_NC.masked_fill(blank_N1, 0.0), t_NC.masked_fill(blank_N1, 0.0)
    with torch.autocast(z_NC.device.type, enabled=False):
        loss_N = rows(z_NC, t_NC) * shares.soft
    return (loss_N if reduction == "none" else loss_N.sum()).to(work_dtype(logits_NC))
