"""What a target says by itself, before any student: the teacher's most probable class, and how sure it is.

N rows, C classes, K kept classes.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss.reference import scaled_logits
from softlabel.loss.targets import (
    DenseTarget,
    HeadTarget,
    Int8Target,
    SampledTarget,
    SigmoidTarget,
    Target,
    TopKTarget,
    retemper_factor,
    tail_column,
)

__all__ = ["swap_to_labels", "teacher_log_probs", "top_class", "top_class_and_entropy", "top_probability"]


def top_class(target: Target) -> Tensor | None:
    """int64 (N,), the teacher's most probable class; None for drawn classes, which do not determine it, and for
    independent outputs, of which several may be."""
    if isinstance(target, SampledTarget | SigmoidTarget):
        return None
    if isinstance(target, TopKTarget):
        best_N1 = target.value.argmax(dim=1, keepdim=True)
        return target.index.gather(1, best_N1)[:, 0].long()
    return scaled_logits(target, torch.float32).argmax(dim=1)


def top_class_and_entropy(target: Target) -> tuple[Tensor, Tensor] | None:
    """The most probable class, int64 (N,), and the entropy in nats at the target's own temperature, float32 (N,).

    The classes that a top-k target left out count as one, which is the least that their entropy can be. None for drawn
    classes.
    """
    if isinstance(target, TopKTarget):
        column = tail_column(target, target.temperature)
        log_p = F.log_softmax(torch.cat([target.value.float(), target.tail[:, column, None].float()], dim=1), dim=1)
        top_N = top_class(target)
    elif isinstance(target, SampledTarget | SigmoidTarget):
        return None
    else:
        log_p = teacher_log_probs(target)  # once: for a head it is a product of matrices
        top_N = log_p.argmax(dim=1)
    assert top_N is not None
    p = log_p.exp()
    return top_N, -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)


def teacher_log_probs(target: Target, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, C) log-probabilities at the target's own temperature, of a target that has every class."""
    assert not isinstance(target, TopKTarget | SampledTarget | SigmoidTarget), "is no softmax over all classes"
    return F.log_softmax(scaled_logits(target, dtype), dim=1)


def top_probability(target: Target) -> Tensor:
    """float32 (N,), the teacher's highest probability at temperature 1, exact for a top-k target.

    Raises:
        MismatchError: the target does not know temperature 1.
    """
    assert not isinstance(target, SampledTarget | SigmoidTarget), "has no most probable class"
    factor = retemper_factor(target, 1.0)
    if isinstance(target, TopKTarget):
        tail_N1 = target.tail[:, tail_column(target, 1.0), None].float()
        logits = torch.cat([target.value.float() * factor, tail_N1], dim=1)
        return (logits[:, :-1].amax(dim=1) - logits.logsumexp(dim=1)).exp()
    logits = scaled_logits(target, torch.float32) * factor
    return (logits.amax(dim=1) - logits.logsumexp(dim=1)).exp()


def swap_to_labels(target: DenseTarget | Int8Target | HeadTarget, labels_N: Tensor) -> DenseTarget:
    """The target with the logits of the label and of the most probable class exchanged in every row, so that the label
    is the most probable one (the probability shift of Wen et al. 2019, "knowledge adjustment").

    Args:
        labels_N: int64 (N,); negative where a row stays as it is.
    """
    if not isinstance(target, DenseTarget):
        target = DenseTarget(
            scaled_logits=scaled_logits(target, torch.float32),
            temperature=target.temperature,
            retemperable=target.retemperable,
        )
    logits_NC = target.scaled_logits.clone()
    rows_R = (labels_N >= 0).nonzero()[:, 0]
    label_R = labels_N[rows_R]
    top_R = logits_NC[rows_R].float().argmax(dim=1)
    of_label_R, of_top_R = logits_NC[rows_R, label_R], logits_NC[rows_R, top_R]
    logits_NC[rows_R, top_R] = of_label_R
    logits_NC[rows_R, label_R] = of_top_R
    return replace(target, scaled_logits=logits_NC)
