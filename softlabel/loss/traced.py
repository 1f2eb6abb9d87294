"""The loss and its gradient as whole-tensor expressions, for a compiler to fuse; the formulas are those of `chunked`.

N rows, C classes, K kept or drawn classes. Written so that inductor makes one loop over the rows of it: the gradient
is an expression of row sums (N, 1), and only single positions of a row are scattered. Run without a compiler it is
right, and slow.
"""

import math

import torch
from torch import Tensor

from softlabel.loss.reference import scaled_logits
from softlabel.loss.rows import LossCall, RowLosses, Settings, Shares, kept_probs, work_dtype
from softlabel.loss.targets import SampledTarget, Target, TopKTarget

__all__ = ["row_losses"]


def row_losses(logits_NC: Tensor, call: LossCall, *, want_grad: bool) -> RowLosses:
    target, labels_N, shares, settings = call.target, call.labels, call.shares, call.settings
    dtype = work_dtype(logits_NC)
    soft_on, hard_on = settings.soft_weight != 0, settings.hard_weight != 0 and labels_N is not None
    soft_scale_N1 = (shares.soft * (settings.soft_weight * settings.temperature))[:, None]
    hard_scale_N1 = (shares.hard * settings.hard_weight)[:, None]
    z_NC = logits_NC.to(dtype)
    if shares.gaps or not soft_on:
        blank_N1 = soft_scale_N1 == 0 if soft_on else torch.ones_like(soft_scale_N1, dtype=torch.bool)
        if hard_on:
            blank_N1 = blank_N1 & (hard_scale_N1 == 0)
        z_NC = torch.where(blank_N1, 0.0, z_NC)
    x_NC = z_NC - z_NC.amax(1, keepdim=True)
    u_NC = x_NC * (1.0 / settings.temperature)
    e_NC = u_NC.exp()
    soft_N = hard_N = torch.zeros(logits_NC.shape[0], dtype=dtype, device=logits_NC.device)
    grad_NC = torch.zeros((), dtype=dtype, device=logits_NC.device)
    moves: list[tuple[Tensor, Tensor]] = []  # (index, what is added to the gradient there)
    if soft_on and isinstance(target, (TopKTarget, SampledTarget)):
        soft_N, grad_NC, moves = _soft_kept(u_NC, e_NC, target, soft_scale_N1, shares, settings)
    elif soft_on:
        soft_N, grad_NC = _soft_dense(u_NC, e_NC, target, soft_scale_N1, shares, settings)
    if hard_on:
        assert labels_N is not None
        smoothing = settings.label_smoothing
        y_N1 = labels_N.long().where(labels_N != settings.ignore_index, 0)[:, None]
        h_NC = _power(e_NC, x_NC, settings.temperature)
        sum_N1 = h_NC.sum(1, keepdim=True)
        hard_N1 = sum_N1.log()
        if smoothing < 1:
            hard_N1 = hard_N1 - (1.0 - smoothing) * x_NC.gather(1, y_N1)
        if smoothing > 0:
            hard_N1 = hard_N1 - smoothing * x_NC.mean(1, keepdim=True)
        hard_N = hard_N1.where(hard_scale_N1 != 0, 0.0)[:, 0]
        even_N1 = hard_scale_N1 * (smoothing / logits_NC.shape[1])
        grad_NC = grad_NC + h_NC * (hard_scale_N1 / sum_N1) - even_N1
        moves.append((y_N1, hard_scale_N1 * -(1.0 - smoothing)))
    if not want_grad:
        return RowLosses(soft_N, hard_N, None)
    grad_NC = grad_NC.expand(logits_NC.shape)
    for index, change in moves:
        grad_NC = grad_NC.scatter_add(1, index, change)
    return RowLosses(soft_N, hard_N, grad_NC.to(logits_NC.dtype))


def _power(e_NC: Tensor, x_NC: Tensor, temperature: float) -> Tensor:
    """exp(x) from e = exp(x / temperature) where squaring gives it: an exponential costs more than two products."""
    if temperature == 1:
        return e_NC
    if temperature == 2:
        return e_NC * e_NC
    if temperature == 4:
        square_NC = e_NC * e_NC
        return square_NC * square_NC
    return x_NC.exp()


def _soft_dense(
    u_NC: Tensor, e_NC: Tensor, target: Target, scale_N1: Tensor, shares: Shares, settings: Settings
) -> tuple[Tensor, Tensor]:
    assert not isinstance(target, (TopKTarget, SampledTarget))
    t_NC = scaled_logits(target, u_NC.dtype)
    if settings.factor != 1:
        t_NC = t_NC * settings.factor
    if shares.gaps:
        t_NC = torch.where(scale_N1 == 0, 0.0, t_NC)
    t_NC = t_NC - t_NC.amax(1, keepdim=True)
    p_NC = t_NC.exp()
    sum_q_N1, sum_p_N1 = e_NC.sum(1, keepdim=True), p_NC.sum(1, keepdim=True)
    cross_N1 = torch.where(p_NC == 0, 0.0, p_NC * (t_NC - u_NC)).sum(1, keepdim=True)
    soft_N1 = (cross_N1 / sum_p_N1 + sum_q_N1.log() - sum_p_N1.log()) * settings.temperature**2
    return soft_N1[:, 0], e_NC * (scale_N1 / sum_q_N1) - p_NC * (scale_N1 / sum_p_N1)


def _soft_kept(
    u_NC: Tensor,
    e_NC: Tensor,
    target: TopKTarget | SampledTarget,
    scale_N1: Tensor,
    shares: Shares,
    settings: Settings,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    kept = kept_probs(target, settings, u_NC.dtype)
    p_NK, log_p_NK, rest_N1, log_rest_N1, _ = kept
    if shares.gaps:
        p_NK, log_p_NK, rest_N1, log_rest_N1 = (torch.where(scale_N1 == 0, 0.0, part) for part in kept[:4])
    index_NK = target.index.long()
    others = target.num_classes - index_NK.shape[1]
    u_NK = u_NC.gather(1, index_NK)
    if isinstance(target, TopKTarget) and settings.tail == "ghost" and others > 0:
        u_rest_NC = u_NC.scatter(1, index_NK, -torch.inf)
        top_N1 = u_rest_NC.amax(1, keepdim=True)
        top_N1 = top_N1.where(top_N1 != -torch.inf, 0.0)
        e_rest_NC = (u_rest_NC - top_N1).exp()
        sum_rest_N1 = e_rest_NC.sum(1, keepdim=True)
        log_sum_rest_N1 = sum_rest_N1.log() + top_N1
        log_sum_N1 = torch.logaddexp(log_sum_rest_N1, u_NK.logsumexp(1, keepdim=True))
        rest_soft_N1 = torch.where(rest_N1 == 0, 0.0, rest_N1 * (log_rest_N1 - (log_sum_rest_N1 - log_sum_N1)))
        spread_N1 = torch.where(rest_N1 == 0, 0.0, rest_N1 / sum_rest_N1)
        grad_NC = e_rest_NC * (scale_N1 * ((top_N1 - log_sum_N1).exp() - spread_N1))
        moves = [(index_NK, scale_N1 * ((u_NK - log_sum_N1).exp() - p_NK))]
    else:
        sum_N1 = e_NC.sum(1, keepdim=True)
        log_sum_N1 = sum_N1.log()
        mass_N1 = p_NK.sum(1, keepdim=True) if isinstance(target, SampledTarget) else torch.ones_like(sum_N1)
        grad_NC = e_NC * (scale_N1 * mass_N1 / sum_N1)
        moves = [(index_NK, scale_N1 * -p_NK)]
        rest_soft_N1 = torch.zeros_like(sum_N1)
        if isinstance(target, TopKTarget) and settings.tail == "uniform" and others > 0:
            each_N1 = rest_N1 / others
            log_q_sum_N1 = u_NC.scatter(1, index_NK, 0.0).sum(1, keepdim=True) - others * log_sum_N1
            cross_N1 = rest_N1 * (log_rest_N1 - math.log(others)) - each_N1 * log_q_sum_N1
            rest_soft_N1 = torch.where(rest_N1 == 0, 0.0, cross_N1)
            grad_NC = grad_NC - scale_N1 * each_N1
            moves.append((index_NK, (scale_N1 * each_N1).expand_as(p_NK)))
    kept_N1 = torch.where(p_NK == 0, 0.0, p_NK * (log_p_NK - (u_NK - log_sum_N1))).sum(1, keepdim=True)
    return (kept_N1 + rest_soft_N1)[:, 0] * settings.temperature**2, grad_NC, moves
