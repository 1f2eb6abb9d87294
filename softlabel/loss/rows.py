"""What every implementation is given, and how its rows become one number.

N rows, C classes, K kept classes. An implementation computes two losses a row and one gradient; each row comes with
the share that it has in the soft and in the hard mean, so that reductions, weights, missing labels and missing targets
are decided here, once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softlabel.loss.targets import SampledTarget, Target, TopKTarget, tail_column

__all__ = [
    "Kept",
    "LossCall",
    "RowLosses",
    "Settings",
    "Shares",
    "chunk_rows",
    "kept_probs",
    "reduce_rows",
    "row_shares",
    "work_dtype",
]

CHUNK_ELEMENTS = 2**17
LEAST_CHUNK_ELEMENTS = 2**15
DEVICE_CHUNK_ELEMENTS = 2**24  # elsewhere than on the CPU: enough work for every launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The numbers of the loss. `factor` takes the target's scaled logits to `temperature`."""

    temperature: float
    soft_weight: float
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    tail: str
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """soft and hard (N,): what a row's soft and hard loss is multiplied by, before soft_weight and hard_weight.
    `gaps` says that some row may count for nothing at all, and must then not leak its NaN."""

    soft: Tensor
    hard: Tensor
    gaps: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCall:
    """One call of the loss, beside the logits: target of N rows, labels int64 (N,) or None, what each row counts, the
    numbers of the loss, and the reduction: "mean", "sum" or "none"."""

    target: Target
    labels: Tensor | None
    shares: Shares
    settings: Settings
    reduction: str


class RowLosses(NamedTuple):
    """soft (N,) with its T^2, hard (N,), and the gradient (N, C) of the sum over rows of
    soft_weight * share.soft * soft + hard_weight * share.hard * hard (None if it was not asked for)."""

    soft: Tensor
    hard: Tensor
    grad: Tensor | None


class Kept(NamedTuple):
    """The teacher on the classes that it names: probabilities (N, K) and their logs; what is left over (N, 1); what is
    taken off the scaled logits to make them log-probabilities (N, 1). Drawn classes have weights and no logs."""

    p: Tensor
    log_p: Tensor
    rest: Tensor
    log_rest: Tensor
    log_whole: Tensor


def work_dtype(logits: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed and reported in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def chunk_rows(logits_NC: Tensor, buffers: int = 2) -> int:
    """How many rows make a chunk, whose buffers are to be small against the gradient too."""
    rows, classes = logits_NC.shape
    elements = DEVICE_CHUNK_ELEMENTS
    if logits_NC.device.type == "cpu":
        elements = min(CHUNK_ELEMENTS, max(LEAST_CHUNK_ELEMENTS, rows * classes // (16 * buffers)))
    return max(1, min(rows, elements // max(classes, 1)))


def row_shares(
    labels_N: Tensor | None,
    weight_N: Tensor | None,
    soft_mask_N: Tensor | None,
    *,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    ignore_index: int,
    reduction: str,
) -> Shares:
    """What each of `rows` rows counts, in `dtype` on `device`."""
    each_N = None if weight_N is None else weight_N.detach().to(dtype)
    soft_N = _share_rows(each_N, soft_mask_N, rows, dtype, device, reduction)
    if labels_N is None:
        hard_N = torch.zeros(rows, dtype=dtype, device=device)
    else:
        hard_N = _share_rows(each_N, labels_N != ignore_index, rows, dtype, device, reduction)
    return Shares(soft=soft_N, hard=hard_N, gaps=weight_N is not None or soft_mask_N is not None)


def _share_rows(
    each_N: Tensor | None,
    counts_N: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    reduction: str,
) -> Tensor:
    if each_N is None and counts_N is None:
        share = 1.0 / max(rows, 1) if reduction == "mean" else 1.0
        return torch.full((rows,), share, dtype=dtype, device=device)
    if each_N is None:
        assert counts_N is not None
        part_N = counts_N.to(dtype)
    else:
        part_N = each_N if counts_N is None else each_N.where(counts_N, 0.0)
    if reduction != "mean":
        return part_N
    whole = part_N.sum()
    return part_N / whole.where(whole != 0, 1.0)


def kept_probs(target: TopKTarget | SampledTarget, settings: Settings, dtype: torch.dtype) -> Kept:
    """What a sparse target says at the loss's temperature, in O(K) a row; `chunked_kept` has a faster form."""
    if isinstance(target, SampledTarget):
        weight_NK = target.weight.to(dtype)
        nothing_N1 = torch.zeros_like(weight_NK[:, :1])
        return Kept(weight_NK, torch.zeros_like(weight_NK), nothing_N1, nothing_N1, nothing_N1)
    value_NK = target.value.to(dtype) * settings.factor
    if settings.tail == "renormalize" or target.index.shape[1] == target.num_classes:
        tail_N1 = torch.full_like(value_NK[:, :1], -torch.inf)
    else:
        tail_N1 = target.tail[:, tail_column(target, settings.temperature), None].to(dtype)
    top_N1 = torch.maximum(value_NK.amax(1, keepdim=True), tail_N1)
    whole_N1 = (value_NK - top_N1).exp().sum(1, keepdim=True) + (tail_N1 - top_N1).exp()
    log_whole_N1 = top_N1 + whole_N1.log()
    log_p_NK, log_rest_N1 = value_NK - log_whole_N1, tail_N1 - log_whole_N1
    return Kept(log_p_NK.exp(), log_p_NK, log_rest_N1.exp(), log_rest_N1, log_whole_N1)


def reduce_rows(rows: RowLosses, call: LossCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """total, soft and hard (scalars, or (N,) with reduction "none") and the gradient as it is."""
    soft, hard, settings = rows.soft * call.shares.soft, rows.hard * call.shares.hard, call.settings
    if call.reduction != "none":
        soft, hard = soft.sum(), hard.sum()
    return settings.soft_weight * soft + settings.hard_weight * hard, soft, hard, rows.grad
