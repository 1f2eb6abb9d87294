"""How rows become one number: the share that each row has in the soft and in the hard mean.

N rows, C classes. Every implementation computes two losses per row and is given two coefficients per row, so that
reductions, weights, missing labels and missing targets are decided here, once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Reduction", "Shares", "row_shares", "work_dtype"]

Reduction = str  # "mean", "sum" or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """soft and hard (N,): what a row's soft and hard loss is multiplied by, before soft_weight and hard_weight.
    `gaps` says that some row may count for nothing at all, and must then not leak its NaN."""

    soft: Tensor
    hard: Tensor
    gaps: bool


def work_dtype(logits: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed and reported in float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_shares(
    logits_NC: Tensor,
    labels_N: Tensor | None,
    weight_N: Tensor | None,
    soft_mask_N: Tensor | None,
    *,
    ignore_index: int,
    reduction: Reduction,
) -> Shares:
    dtype, device, rows = work_dtype(logits_NC), logits_NC.device, logits_NC.shape[0]
    each_N = None if weight_N is None else weight_N.detach().to(dtype)
    soft_N = _part(each_N, soft_mask_N, rows, dtype, device, reduction)
    if labels_N is None:
        hard_N = torch.zeros(rows, dtype=dtype, device=device)
    else:
        hard_N = _part(each_N, labels_N != ignore_index, rows, dtype, device, reduction)
    return Shares(soft=soft_N, hard=hard_N, gaps=weight_N is not None or soft_mask_N is not None)


def _part(
    each_N: Tensor | None,
    counts_N: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    reduction: Reduction,
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
