"""What a target says by itself, before any student: the teacher's most probable class and how sure it is.

N rows, C classes, K kept classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss.reference import scaled_logits
from softlabel.loss.targets import SampledTarget, SigmoidTarget, Target, TopKTarget, tail_column

__all__ = ["teacher_log_probs", "top_class", "top_class_and_entropy"]


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
