"""The loss on a network's differences along noise: matching derivatives without a derivative.

B batch, K directions, C classes. d = P (z+ - z-) / 2 with z+ and z- the logits of two noisy copies of a sample, x + s e
and x - s e, and P = I - 11^T / C, because logits are known up to a constant of each row.
"""

import torch
from torch import Tensor

from softlabel.errors import MismatchError
from softlabel.loss.rows import work_dtype

__all__ = ["difference_loss", "halve_differences"]


def halve_differences(plus_NC: Tensor, minus_NC: Tensor) -> Tensor:
    """P (z+ - z-) / 2 of logits (N, C) at temperature 1, float32 for half-precision input: (N, C)."""
    dtype = work_dtype(plus_NC)
    halved_NC = (plus_NC.to(dtype) - minus_NC.to(dtype)) / 2
    return halved_NC - halved_NC.mean(1, keepdim=True)


def difference_loss(
    student_logits_BJC: Tensor, differences_BKC: Tensor, *, mask: Tensor | None = None, rows: float | None = None
) -> Tensor:
    """1 / (K C) sum_k |P (z+ - z-) / 2 - d_k|^2, mean over rows.

    For small steps s and noise e of independent signs its expectation is (s / 255)^2 / C times the squared distance of
    the two networks' Jacobians (Srinivas and Fleuret 2018, proposition 1), by derivatives along random directions as in
    Czarnecki et al. 2017.

    Args:
        student_logits_BJC: (B, 2 K, C): of each direction the logits of x + s e, then of x - s e.
        differences_BKC: the teacher's halved differences, as a store keeps them.
        mask: bool (B,), the rows that count; None: all do.
        rows: what the sum over rows is divided by; None: how many count, at least 1.

    Raises:
        MismatchError: the shapes do not belong together.
    """
    found, expected = tuple(student_logits_BJC.shape), tuple(differences_BKC.shape)
    if len(expected) != 3 or found != (expected[0], 2 * expected[1], expected[2]):
        raise MismatchError(
            f"difference_loss: expected logits (B, 2 K, C) beside differences (B, K, C), found {found} beside "
            f"{expected}"
        )
    plus_NC, minus_NC = (student_logits_BJC[:, sign::2].flatten(0, 1) for sign in (0, 1))
    with torch.autocast(student_logits_BJC.device.type, enabled=False):
        halved_BKC = halve_differences(plus_NC, minus_NC).view_as(differences_BKC)
        if mask is not None:  # a row that does not count must not leak its NaN
            blank_B11 = ~mask[:, None, None]
            halved_BKC = halved_BKC.masked_fill(blank_B11, 0.0)
            differences_BKC = differences_BKC.masked_fill(blank_B11, 0.0)
        loss_B = (halved_BKC - differences_BKC.to(halved_BKC.dtype)).square().mean(dim=(1, 2))
        if rows is None:
            rows = float(len(loss_B) if mask is None else mask.sum())
        return loss_B.sum() / max(rows, 1.0)
