"""Losses of a student's embedding against the teacher's, row by row or by the statistics of the batch.

B batch, D width of the embeddings.

The student's embedding has the teacher's width: what a projector makes of it, where the widths differ. All take a mask
of the rows that count; a row that does not may hold anything, NaN too. Half precision is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.rows import work_dtype

__all__ = ["attention_transfer", "choose_rows", "cosine_distance", "embedding_mse", "simple_recipe"]


def cosine_distance(student_BD: Tensor, teacher_BD: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """1 - cos(s, t), mean over rows.

    Args:
        student_BD: floating point (B, D).
        teacher_BD: (B, D), without gradient.
        mask: bool (B,), the rows that count; None: all.

    Returns:
        A scalar, 0 where no row counts; float32, or float64 of a float64 student.

    Raises:
        MismatchError: other shapes.
    """
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask)
    with torch.autocast(s_BD.device.type, enabled=False):
        return (1 - F.cosine_similarity(s_BD, t_BD, dim=1)).sum() / max(len(s_BD), 1)


def embedding_mse(student_BD: Tensor, teacher_BD: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(s - t)^2, mean over rows and over the width. Arguments and errors are those of `cosine_distance`."""
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask)
    return (s_BD - t_BD).square().sum() / max(s_BD.numel(), 1)


def simple_recipe(
    student_BD: Tensor, teacher_BD: Tensor, *, exponent: float = 4.0, eps: float = 1e-4, mask: Tensor | None = None
) -> Tensor:
    """SRD (Miles and Mikolajczyk 2024): log sum |n(s) - n(t)|^exponent, over rows and width, n the standardisation of
    each dimension over the batch, by its biased variance plus `eps`.

    Arguments are those of `cosine_distance`.

    Raises:
        UsageError: fewer than 2 rows count, of which each is its own mean.
        MismatchError: other shapes.
    """
    s_BD, t_BD = choose_rows(student_BD, teacher_BD, mask)
    if len(s_BD) < 2:
        raise UsageError(f"srd: expected at least 2 rows, by which a batch is standardised, found {len(s_BD)}")
    with torch.autocast(s_BD.device.type, enabled=False):
        apart_BD = _standardize(s_BD, eps) - _standardize(t_BD, eps)
        return apart_BD.abs().pow(exponent).sum().log()


def attention_transfer(student_BS: Tensor, teacher_BS: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """AT (Zagoruyko and Komodakis 2017) of one map: mean of (Q_s - Q_t)^2 over rows and the S places of a map, Q the
    map divided by its norm. Other arguments are those of `cosine_distance`.

    Args:
        student_BS, teacher_BS: floating point (B, S), means of squares over the channels; of any norm.
    """
    s_BS, t_BS = choose_rows(student_BS, teacher_BS, mask)
    apart_BS = F.normalize(s_BS, dim=1) - F.normalize(t_BS, dim=1)
    return apart_BS.square().sum() / max(apart_BS.numel(), 1)


def choose_rows(
    student_BD: Tensor, teacher_BD: Tensor, mask: Tensor | None, *, one_width: bool = True
) -> tuple[Tensor, Tensor]:
    """The rows that count, in the type in which they are computed, the teacher's without gradient.

    Args:
        student_BD, teacher_BD: (B, D), of widths of their own unless `one_width`.
        mask: bool (B,); None: all.

    Raises:
        MismatchError: other shapes.
    """
    if student_BD.dim() != 2 or teacher_BD.dim() != 2 or len(student_BD) != len(teacher_BD):
        raise MismatchError(
            f"embeddings: expected (B, D) of the student and of the teacher, found {tuple(student_BD.shape)} and "
            f"{tuple(teacher_BD.shape)}"
        )
    if one_width and student_BD.shape[1] != teacher_BD.shape[1]:
        raise MismatchError(
            f"embeddings: expected the teacher's width {teacher_BD.shape[1]}, found {student_BD.shape[1]}; bring the "
            "student's to it by a projector"
        )
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != student_BD.shape[:1]:
            raise MismatchError(f"mask: expected bool ({len(student_BD)},), found {mask.dtype} {tuple(mask.shape)}")
        student_BD, teacher_BD = student_BD[mask], teacher_BD[mask]
    dtype = work_dtype(student_BD)
    return student_BD.to(dtype), teacher_BD.detach().to(dtype)


def _standardize(values_BD: Tensor, eps: float) -> Tensor:
    centered_BD = values_BD - values_BD.mean(0)
    return centered_BD * (centered_BD.square().mean(0) + eps).rsqrt()
