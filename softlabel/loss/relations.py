"""Losses that compare how the rows of a batch lie to one another, in the student's embedding and in the teacher's.

B batch, D width of an embedding (the student's and the teacher's may differ), E width of contrasted ones, K negatives,
A anchors of a chunk.

They need no projector. The rows that a mask leaves out are as if they were not in the batch. Half precision is computed
in float32. Fewer rows than a relation has give 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.embeddings import choose_rows

__all__ = [
    "contrast",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "relational_kd",
    "similarity_preserving",
]

_LEAST_TEMPERATURE = 0.03
_CHUNK_ELEMENTS = 2**20  # of the buffers of a chunk of anchors


def relational_kd(
    student_BD: Tensor,
    teacher_BD: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    triplet_rows: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """RKD (Park et al. 2019): distance_weight * distance + angle_weight * angle.

    The weights are those of Tian et al. 2020 (RepDistiller); the authors' are 25 and 50 for classification too.

    Args:
        student_BD: floating point (B, D).
        teacher_BD: (B, D'), without gradient.
        triplet_rows: see `relational_angle`.
        mask: bool (B,), the rows that count; None: all.

    Returns:
        A scalar; float32, or float64 of a float64 student.

    Raises:
        MismatchError: other shapes.
    """
    loss = distance_weight * relational_distance(student_BD, teacher_BD, mask=mask)
    return loss + angle_weight * relational_angle(student_BD, teacher_BD, triplet_rows=triplet_rows, mask=mask)


def relational_distance(student_BD: Tensor, teacher_BD: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Smooth L1 of the distances of two rows, each divided by their mean over all pairs: mean over B^2 pairs."""
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask, one_width=False)
    if len(s_BD) < 2:
        return s_BD.sum() * 0
    with torch.autocast(s_BD.device.type, enabled=False):
        return F.smooth_l1_loss(_scaled_distances(s_BD), _scaled_distances(t_BD))


def relational_angle(
    student_BD: Tensor, teacher_BD: Tensor, *, triplet_rows: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Smooth L1 of the cosine of the angle at row i between rows j and k: mean over B^3 triplets.

    Triplets with j = i or k = i, or of equal rows, have cosine 0. Memory is that of a chunk of anchors i, and of the
    embeddings; the gradient, in closed form, is computed with the loss, which cannot be differentiated twice.

    Args:
        student_BD: floating point (B, D).
        teacher_BD: (B, D'), without gradient.
        triplet_rows: triplets are those of every so many rows of the batch, and of the rest, in its order: B^3 of them
            grow fast; None: all. The mean is over the triplets that there are.
        mask: bool (B,), the rows that count; None: all.
    """
    if triplet_rows is not None and triplet_rows < 3:
        raise UsageError(f"triplet_rows: expected at least 3, found {triplet_rows}")
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask, one_width=False)
    if len(s_BD) < 3:
        return s_BD.sum() * 0
    size = len(s_BD) if triplet_rows is None else triplet_rows
    # Of the groups the last one may be smaller: by its B^3 it weighs less.
    groups = list(zip(torch.split(s_BD, size), torch.split(t_BD, size), strict=True))
    total = sum(len(s) ** 3 for s, _ in groups)
    with torch.autocast(s_BD.device.type, enabled=False):
        parts: list[Tensor] = [_SumOfAngles.apply(s, _narrow(t)) for s, t in groups]
        return torch.stack(parts).sum() / total


def probabilistic_transfer(
    student_BD: Tensor, teacher_BD: Tensor, *, eps: float = 1e-7, mask: Tensor | None = None
) -> Tensor:
    """PKT (Passalis and Tefas 2018): p_t log(p_t / p_s), mean over B^2 pairs, p the rows of (1 + cos) / 2 divided by
    their sums, a row's cosine with itself included. Arguments are those of `relational_kd`."""
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask, one_width=False)
    if len(s_BD) < 2:
        return s_BD.sum() * 0
    with torch.autocast(s_BD.device.type, enabled=False):
        q_BB, p_BB = _share_similarities(s_BD), _share_similarities(t_BD)
        return (p_BB * ((p_BB + eps) / (q_BB + eps)).log()).mean()


def similarity_preserving(student_BD: Tensor, teacher_BD: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """SP (Tung and Mori 2019): (G_s - G_t)^2, mean over B^2 pairs, G the rows of F F^T divided by their norms.

    The paper takes the last map for F, flattened; here it is what the teacher's store has. Arguments are those of
    `relational_kd`.
    """
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask, one_width=False)
    if len(s_BD) < 2:
        return s_BD.sum() * 0
    with torch.autocast(s_BD.device.type, enabled=False):
        return F.mse_loss(F.normalize(s_BD @ s_BD.T), F.normalize(t_BD @ t_BD.T))


def contrast(
    anchor_BE: Tensor,
    positive_BE: Tensor,
    negative_KE: Tensor,
    *,
    samples: int,
    scale: Tensor | None = None,
    temperature: float = 0.07,
    counts_BK: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The noise contrastive estimate of CRD (Tian et al. 2020, equation 18): one anchor's positive against negatives.

    With h(a, v) = exp(<a, v> / temperature) / Z and a noise of 1 / samples, m negatives an anchor: mean over anchors of
    -log(h+ / (h+ + m / samples)) - sum log((m / samples) / (h- + m / samples)). The paper draws negatives for each
    anchor; here the anchors of a batch share them, each without those that `counts_BK` takes from it, which gives the
    same in the mean.

    Args:
        anchor_BE: of norm 1, with gradient.
        positive_BE: of norm 1, without gradient.
        negative_KE: of norm 1, without gradient.
        samples: of the data.
        scale: Z; None: samples times the mean of exp(<a, v> / temperature) of this batch.
        temperature: of the paper; at least 0.03, by which exp stays in float32.
        counts_BK: bool, which negatives each anchor has; None: all.
        mask: bool (B,), the anchors that count; None: all.

    Returns:
        The loss, a scalar, and Z.

    Raises:
        UsageError: a lower temperature.
        MismatchError: other shapes.
    """
    if not temperature >= _LEAST_TEMPERATURE:
        raise UsageError(f"temperature: expected at least {_LEAST_TEMPERATURE}, found {temperature}")
    if anchor_BE.shape != positive_BE.shape or anchor_BE.shape[1:] != negative_KE.shape[1:]:
        raise MismatchError(
            f"contrast: expected anchors and positives (B, E), negatives (K, E), found {tuple(anchor_BE.shape)}, "
            f"{tuple(positive_BE.shape)} and {tuple(negative_KE.shape)}"
        )
    counts_BK = counts_BK if counts_BK is None or mask is None else counts_BK[mask]
    a_BE, p_BE = choose_rows(anchor_BE, positive_BE, mask)
    with torch.autocast(a_BE.device.type, enabled=False):
        n_KE = negative_KE.detach().to(a_BE.dtype)
        near_B, far_BK = (a_BE * p_BE).sum(1) / temperature, a_BE / temperature @ n_KE.T
        drawn_B = near_B.new_full(near_B.shape, far_BK.shape[1])
        h_BK = far_BK.exp()
        if counts_BK is not None:
            h_BK = h_BK * counts_BK
            drawn_B = counts_BK.sum(1).to(near_B.dtype)
        if scale is None:
            whole = near_B.detach().exp().sum() + h_BK.detach().sum()
            scale = samples * whole / (drawn_B.sum() + len(a_BE)).clamp_min(1)
        noise_B = scale * drawn_B / samples
        # Not log1p, which takes as long as all of the rest: what 1 + x rounds away is small against the sum.
        far_B = (1 + h_BK * noise_B.reciprocal().where(drawn_B > 0, 0.0)[:, None]).log().sum(1)
        loss_B = F.softplus(noise_B.log() - near_B) + far_B
        return loss_B.sum() / max(len(a_BE), 1), scale


class _SumOfAngles(torch.autograd.Function):
    """The sum of `relational_angle` over all triplets of the rows, and its gradient.

    With E the normalised differences to an anchor, the cosines are A = E E^T and the difference of the student's and
    the teacher's is one product, of (E_s, E_t) and (E_s, -E_t). Its clamp c to [-1, 1] is the slope of smooth L1, whose
    value is c (x - c / 2).
    """

    @staticmethod
    def forward(ctx: Any, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        rows, width = student_BD.shape
        per_anchor = rows * (2 * (width + teacher_BD.shape[1]) + rows)
        chunk = max(1, min(rows, _CHUNK_ELEMENTS // per_anchor))
        total = student_BD.new_zeros(())
        grad_BD = torch.zeros_like(student_BD) if ctx.needs_input_grad[0] else None
        for start in range(0, rows, chunk):
            anchors = slice(start, start + chunk)
            e_ABD, by_AB1 = _unit_differences(student_BD, anchors)
            t_ABD, _ = _unit_differences(teacher_BD, anchors)
            apart_ABB = torch.cat([e_ABD, t_ABD], 2) @ torch.cat([e_ABD, -t_ABD], 2).mT
            slope_ABB = apart_ABB.clamp(-1, 1)
            total += torch.vdot(slope_ABB.ravel(), (apart_ABB - 0.5 * slope_ABB).ravel())
            if grad_BD is None:
                continue
            # Of the unit vectors, then of the differences, which are those of the rows to their anchor.
            de_ABD = 2 * (slope_ABB @ e_ABD)
            de_ABD = (de_ABD - e_ABD * (de_ABD * e_ABD).sum(2, keepdim=True)) * by_AB1
            grad_BD += de_ABD.sum(0)
            grad_BD[anchors] -= de_ABD.sum(1)
        if grad_BD is not None:
            ctx.save_for_backward(grad_BD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad_BD,) = ctx.saved_tensors
        return upstream * grad_BD, None


def _narrow(values_BD: Tensor) -> Tensor:
    """Rows that lie to one another as these do, and are no wider than they are many."""
    if values_BD.shape[1] <= len(values_BD):
        return values_BD
    narrow_BB: Tensor = torch.linalg.qr(values_BD.T, mode="r").R
    return narrow_BB.T


def _unit_differences(values_BD: Tensor, anchors: slice) -> tuple[Tensor, Tensor]:
    """The differences of all rows to each anchor, of norm 1, or 0 where there is no difference, (A, B, D); and what
    they were multiplied by, (A, B, 1)."""
    apart_ABD = values_BD[None] - values_BD[anchors, None]
    norm_AB1 = torch.linalg.vector_norm(apart_ABD, dim=2, keepdim=True)
    by_AB1 = norm_AB1.reciprocal().where(norm_AB1 > 0, 0.0)
    return apart_ABD.mul_(by_AB1), by_AB1


def _scaled_distances(values_BD: Tensor) -> Tensor:
    """Distances of all pairs, divided by the mean of those of two rows."""
    rows = len(values_BD)
    centered_BD = values_BD - values_BD.mean(0).detach()  # distances stay, and rounding is that of smaller numbers
    square_B = centered_BD.square().sum(1)
    both_BB = square_B[:, None] + square_B
    square_BB = both_BB - 2 * (centered_BD @ centered_BD.T)
    # Equal rows, and each row and itself: what is left is rounding, whose square root would have a steep slope.
    differ_BB = square_BB > 8 * torch.finfo(square_BB.dtype).eps * both_BB
    distance_BB = square_BB.where(differ_BB, 1.0).sqrt().where(differ_BB, 0.0)
    mean = distance_BB.sum() / (rows * (rows - 1))
    return distance_BB / mean.where(mean > 0, 1.0)


def _share_similarities(values_BD: Tensor) -> Tensor:
    unit_BD = F.normalize(values_BD, dim=1)
    similarity_BB = (unit_BD @ unit_BD.T + 1) / 2
    return similarity_BB / similarity_BB.sum(1, keepdim=True)
