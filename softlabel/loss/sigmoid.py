"""The distillation loss of independent outputs: several labels at once, or one single output.

    loss = hard_weight * BCE(sigmoid(z), y) + soft_weight * T^2 * KL(sigmoid(t / T) || sigmoid(z / T))

N rows, C classes; z student logits, t teacher logits, y labels, T temperature. Both terms are means over the C classes,
as `torch.nn.BCEWithLogitsLoss` is. The KL divergence is that of two outcomes for each class, the binary cross-entropy
minus the teacher's entropy, which no gradient sees: T (sigmoid(z / T) - sigmoid(t / T)) / C a row. (The multi-label
logits distillation of Yang et al. 2023, "Multi-Label Knowledge Distillation", sums over the classes: C times this.) A
label that is not known counts 0, and does not make the others count more (U-Ignore of Irvin et al. 2019, "CheXpert").

Plain differentiable torch, in float32, or float64 where it is the reference; under `torch.compile`, `torch.func` and on
every device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.arguments import ArrayLike, as_tensor, check_logits, check_weight, may_look, widened
from softlabel.loss.rows import Settings, row_shares, work_dtype
from softlabel.loss.targets import SigmoidTarget, flatten_target

__all__ = ["binary_cross_entropy", "binary_divergence", "sigmoid_loss"]

Rows = Callable[[Tensor, Tensor], Tensor]
_IMPLS = ("auto", "torch", "reference")


def sigmoid_loss(
    student_logits_NC: Tensor,
    target: SigmoidTarget,
    labels: ArrayLike | None,
    weight: ArrayLike | None,
    soft_mask: ArrayLike | None,
    *,
    settings: Settings,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """total (with its gradient), soft and hard; see `distillation_loss`.

    Args:
        labels: integers or booleans (N, C): 1, 0, or negative where it is not known; those of sequences (B, L, C).

    Raises:
        MismatchError: shapes or types that do not fit.
        UsageError: an implementation that there is none of, or a label that is neither 0 nor 1.
    """
    if impl not in _IMPLS:
        raise UsageError(f"impl={impl!r}: computes a softmax, found a target of independent sigmoids; use impl='auto'")
    check_logits(student_logits_NC)
    shape, classes = student_logits_NC.shape[:-1], student_logits_NC.shape[-1]
    target = flatten_target(target, shape)
    if (len(target), target.num_classes) != (shape.numel(), classes):
        raise MismatchError(
            f"student logits: expected {len(target)} rows of {target.num_classes} outputs as in the target, found "
            f"{tuple(student_logits_NC.shape)}; give the student {target.num_classes} outputs"
        )
    device = student_logits_NC.device
    labels_NC = None if labels is None else _flatten_labels(as_tensor("labels", labels, device), student_logits_NC)
    weight_N = None if weight is None else _flatten_rows(as_tensor("weight", weight, device), shape, "weight")
    mask_N = None if soft_mask is None else _flatten_rows(as_tensor("soft_mask", soft_mask, device), shape, "soft_mask")
    if weight_N is not None:
        check_weight(weight_N)
    if mask_N is not None and mask_N.dtype != torch.bool:
        raise MismatchError(f"soft_mask: expected bool, found {mask_N.dtype}")

    dtype = torch.float64 if impl == "reference" else work_dtype(student_logits_NC)
    logits_NC = widened(student_logits_NC.reshape(-1, classes), settings.temperature)
    # -100 and 0 in place of class numbers: whether a row has a label at all.
    known_N = None if labels_NC is None else torch.where((labels_NC >= 0).any(dim=1), 0, settings.ignore_index)
    shares = row_shares(
        known_N,
        weight_N,
        mask_N,
        rows=len(logits_NC),
        dtype=work_dtype(logits_NC),
        device=device,
        ignore_index=settings.ignore_index,
        reduction=reduction,
    )
    with torch.autocast(device.type, enabled=False):
        z_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, dtype))
        # An empty sum ties the result to the logits, so that a loss without any term still has a gradient: zero.
        soft_N = hard_N = z_NC[:0].sum().expand(len(z_NC))
        if settings.soft_weight != 0:
            t_NC = target.scaled_logits.to(z_NC.dtype) * settings.factor
            cold = settings.temperature
            rows_N = _weigh_rows(shares.soft, z_NC, t_NC, lambda z, t: binary_divergence(t, z / cold))
            soft_N = rows_N * cold**2
        if settings.hard_weight != 0 and labels_NC is not None:
            smoothing = settings.label_smoothing
            hard_N = _weigh_rows(shares.hard, z_NC, labels_NC, lambda z, y: binary_cross_entropy(z, y, smoothing))
    if reduction != "none":
        soft_N, hard_N = soft_N.sum(), hard_N.sum()
    total = settings.soft_weight * soft_N + settings.hard_weight * hard_N
    given = work_dtype(student_logits_NC)
    parts = [total.to(given), soft_N.detach().to(given), hard_N.detach().to(given)]
    if reduction == "none" and len(shape) > 1:
        parts = [part.reshape(shape) for part in parts]
    return parts[0], parts[1], parts[2]


def binary_divergence(teacher_NC: Tensor, student_NC: Tensor) -> Tensor:
    """KL(sigmoid(teacher) || sigmoid(student)) in nats, mean over the classes: (N,)."""
    on = teacher_NC.sigmoid() * (F.logsigmoid(teacher_NC) - F.logsigmoid(student_NC))
    off = (-teacher_NC).sigmoid() * (F.logsigmoid(-teacher_NC) - F.logsigmoid(-student_NC))
    return (on + off).mean(dim=-1)


def binary_cross_entropy(logits_NC: Tensor, labels_NC: Tensor, smoothing: float) -> Tensor:
    """(N,): the sum over known labels, divided by all classes. Smoothing draws labels towards 1/2."""
    y_NC = labels_NC.clamp_min(0).to(logits_NC.dtype) * (1 - smoothing) + smoothing / 2
    rows_NC = F.binary_cross_entropy_with_logits(logits_NC, y_NC, reduction="none")
    return torch.where(labels_NC >= 0, rows_NC, 0.0).mean(dim=-1)


def _weigh_rows(share_N: Tensor, logits_NC: Tensor, other_NC: Tensor, rows_of: Rows) -> Tensor:
    """Losses of rows times their shares; rows that count for nothing are blanked first, as NaN * 0 is NaN."""
    counts_N1 = (share_N != 0)[:, None]
    nothing = torch.zeros((), dtype=other_NC.dtype, device=other_NC.device)
    rows_N = rows_of(torch.where(counts_N1, logits_NC, 0.0), torch.where(counts_N1, other_NC, nothing))
    return torch.where(counts_N1[:, 0], rows_N * share_N, 0.0)


def _flatten_rows(given: Tensor, shape: torch.Size, name: str) -> Tensor:
    if given.shape != shape:
        raise MismatchError(f"{name}: expected shape {tuple(shape)}, one value a row, found {tuple(given.shape)}")
    return given.reshape(-1)


def _flatten_labels(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.shape != logits.shape or labels.is_floating_point():
        raise MismatchError(
            f"labels: expected integers of shape {tuple(logits.shape)}, 1, 0 or -1 (not known) for each class, found "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    labels_NC = labels.reshape(-1, labels.shape[-1])
    if labels_NC.dtype == torch.bool:
        return labels_NC.to(torch.int8)
    if may_look(labels_NC) and labels_NC.numel() and int(labels_NC.max()) > 1:
        raise UsageError(f"labels: expected 1, 0 or -1 (not known) for each class, found {int(labels_NC.max())}")
    return labels_NC
