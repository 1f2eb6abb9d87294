"""The loss in float64, as plainly as it can be written: what every fast path must equal.

N rows, C classes, K kept classes, S drawn classes. Everything here is ordinary differentiable torch on (N, C) float64
tensors; nothing is fast and nothing is clever.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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

__all__ = ["hard_rows", "scaled_logits", "soft_rows"]

WORK = torch.float64


def scaled_logits(target: DenseTarget | Int8Target | HeadTarget | SigmoidTarget, dtype: torch.dtype = WORK) -> Tensor:
    """The target's scaled logits (N, C) at its own temperature."""
    if isinstance(target, DenseTarget | SigmoidTarget):
        return target.scaled_logits.to(dtype)
    if isinstance(target, Int8Target):
        decoded_NC = target.q.to(dtype) * target.scale.to(dtype)[:, None] + target.offset.to(dtype)[:, None]
        return decoded_NC.scatter(1, target.top_index.long(), target.top_value.to(dtype))
    hidden_ND = target.hidden.to(dtype)
    if target.hidden_scale is not None:
        hidden_ND = hidden_ND * target.hidden_scale.to(dtype)[:, None]
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NC = hidden_ND @ target.weight.to(dtype).T
    if target.bias is not None:
        logits_NC = logits_NC + target.bias.to(dtype)
    return logits_NC if target.softcap is None else target.softcap * torch.tanh(logits_NC / target.softcap)


def soft_rows(logits_NC: Tensor, target: Target, temperature: float, tail: str) -> Tensor:
    """(N,) temperature^2 * KL(teacher || student), both at `temperature`; sampled targets: the cross-entropy."""
    log_q_NC = F.log_softmax(logits_NC.to(WORK) / temperature, dim=1)
    factor = retemper_factor(target, temperature)
    if isinstance(target, TopKTarget):
        rows_N = _top_k_rows(log_q_NC, target, factor, temperature, tail)
    elif isinstance(target, SampledTarget):
        drawn_NS = log_q_NC.gather(1, target.index.long())
        weight_NS = target.weight.to(WORK)
        rows_N = -torch.where(weight_NS != 0, weight_NS * drawn_NS, 0.0).sum(1)
    else:
        log_p_NC = F.log_softmax(scaled_logits(target) * factor, dim=1)
        rows_N = _divergence(log_p_NC, log_q_NC)
    return rows_N * temperature**2


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p log(p / q) over the last dimension, where a class without teacher mass counts nothing."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def _top_k_rows(log_q_NC: Tensor, target: TopKTarget, factor: float, temperature: float, tail: str) -> Tensor:
    index_NK = target.index.long()
    value_NK = target.value.to(WORK) * factor
    log_q_NK = log_q_NC.gather(1, index_NK)
    classes, kept = log_q_NC.shape[1], index_NK.shape[1]
    if tail == "renormalize":
        return _divergence(F.log_softmax(value_NK, dim=1), log_q_NK)
    tail_N = target.tail[:, tail_column(target, temperature)].to(WORK)
    if kept == classes:
        tail_N = torch.full_like(tail_N, -torch.inf)
    log_p_NK1 = F.log_softmax(torch.cat([value_NK, tail_N[:, None]], dim=1), dim=1)
    log_p_NK, log_p_tail_N = log_p_NK1[:, :-1], log_p_NK1[:, -1]
    rows_N = _divergence(log_p_NK, log_q_NK)
    if kept == classes:
        return rows_N
    in_kept_NC = torch.zeros_like(log_q_NC, dtype=torch.bool).scatter(1, index_NK, True)
    if tail == "ghost":  # one more outcome: "none of the kept classes"
        log_q_tail_N = log_q_NC.masked_fill(in_kept_NC, -torch.inf).logsumexp(1)
        return rows_N + _divergence(log_p_tail_N[:, None], log_q_tail_N[:, None])
    spread_N = log_p_tail_N - torch.log(torch.tensor(classes - kept, dtype=WORK))
    log_p_rest_NC = spread_N[:, None].expand_as(log_q_NC).masked_fill(in_kept_NC, -torch.inf)
    return rows_N + _divergence(log_p_rest_NC, log_q_NC)


def hard_rows(logits_NC: Tensor, labels_N: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """(N,) cross-entropy with the labels, 0 in rows without one; smoothing as in `F.cross_entropy`."""
    log_q_NC = F.log_softmax(logits_NC.to(WORK), dim=1)
    labelled_N = labels_N != ignore_index
    picked_N = log_q_NC.gather(1, labels_N.where(labelled_N, 0)[:, None])[:, 0]
    rows_N = -(1.0 - label_smoothing) * picked_N
    if label_smoothing > 0:
        rows_N = rows_N - label_smoothing * log_q_NC.mean(1)
    return torch.where(labelled_N, rows_N, 0.0)
