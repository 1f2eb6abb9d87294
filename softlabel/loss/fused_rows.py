"""Other losses with their gradient in closed form, computed together in row chunks.

N rows, C classes, R rows of a chunk. z student logits, t scaled teacher logits, u = z / T, q = softmax(u),
p = softmax(t). A function of rows takes (z, t, labels) of a chunk and gives the losses (R,) and their gradients in z.
"""

from __future__ import annotations  # dynamo of torch 2.9 cannot evaluate `X | None` inside a function

from collections.abc import Callable

import torch
from torch import Tensor

from softlabel.loss.arguments import transforming
from softlabel.loss.attach import FusedLoss, TracedLoss, scale_by, tensors_of
from softlabel.loss.reference import scaled_logits
from softlabel.loss.rows import chunk_rows, work_dtype
from softlabel.loss.targets import SampledTarget, Target, TopKTarget

__all__ = ["dkd_rows", "fused_loss", "reverse_kl_rows", "standardized_rows"]

Rows = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def reverse_kl_rows(temperature: float) -> Rows:
    def rows(z_RC: Tensor, t_RC: Tensor, labels_R: Tensor | None) -> tuple[Tensor, Tensor]:
        log_q_RC = _log_softmax(z_RC / temperature)
        q_RC = log_q_RC.exp()
        ratio_RC = torch.where(q_RC == 0, 0.0, log_q_RC - _log_softmax(t_RC))
        kl_R1 = (q_RC * ratio_RC).sum(1, keepdim=True)
        return temperature**2 * kl_R1[:, 0], temperature * q_RC * (ratio_RC - kl_R1)

    return rows


def dkd_rows(temperature: float, target_weight: float, others_weight: float) -> Rows:
    """With the odds of the label, s = u_y - log sum of the others' e^u: d TCKD / ds = q_y - p_y, and ds / du is 1 at
    the label and minus the others' softmax elsewhere; NCKD is a KL divergence among the others."""

    def rows(z_RC: Tensor, t_RC: Tensor, labels_R: Tensor | None) -> tuple[Tensor, Tensor]:
        assert labels_R is not None
        y_R1 = labels_R[:, None]
        log_q_R1, log_not_q_R1, log_q_others_RC = _split(z_RC / temperature, y_R1)
        log_p_R1, log_not_p_R1, log_p_others_RC = _split(t_RC, y_R1)
        tckd_R1 = _times(log_p_R1.exp(), log_p_R1 - log_q_R1) + _times(log_not_p_R1.exp(), log_not_p_R1 - log_not_q_R1)
        p_others_RC, q_others_RC = log_p_others_RC.exp(), log_q_others_RC.exp()
        nckd_R1 = _times(p_others_RC, log_p_others_RC - log_q_others_RC).sum(1, keepdim=True)
        odds_R1 = target_weight * (log_q_R1.exp() - log_p_R1.exp())
        grad_RC = others_weight * (q_others_RC - p_others_RC) - odds_R1 * q_others_RC
        grad_RC = temperature * grad_RC.scatter(1, y_R1, odds_R1)
        return temperature**2 * (target_weight * tckd_R1 + others_weight * nckd_R1)[:, 0], grad_RC

    return rows


def standardized_rows(temperature: float, eps: float = 1e-7) -> Rows:
    def rows(z_RC: Tensor, t_RC: Tensor, labels_R: Tensor | None) -> tuple[Tensor, Tensor]:
        classes = z_RC.shape[1]
        c_RC = z_RC - z_RC.mean(1, keepdim=True)
        deviation_R1 = (c_RC.square().sum(1, keepdim=True) / (classes - 1)).sqrt()
        by_R1 = 1.0 / (deviation_R1 + eps)
        t_RC = t_RC - t_RC.mean(1, keepdim=True)
        t_RC = t_RC / ((t_RC.square().sum(1, keepdim=True) / (classes - 1)).sqrt() + eps)
        log_q_RC, log_p_RC = _log_softmax(c_RC * by_R1 / temperature), _log_softmax(t_RC / temperature)
        p_RC = log_p_RC.exp()
        loss_R = temperature**2 * _times(p_RC, log_p_RC - log_q_RC).sum(1)
        # In the standardised logits the gradient is T (q - p), whose sum over classes is 0, as is that of c.
        g_RC = temperature * (log_q_RC.exp() - p_RC) * by_R1
        along_R1 = (g_RC * c_RC).sum(1, keepdim=True) * by_R1 / (deviation_R1 * (classes - 1))
        return loss_R, g_RC - along_R1.where(deviation_R1 > 0, 0.0) * c_RC

    return rows


def fused_loss(
    logits_NC: Tensor,
    target: Target,
    labels_N: Tensor | None,
    share_N: Tensor,
    rows: Rows,
    factor: float,
    reduction: str,
) -> Tensor:
    """The loss reduced, its gradient attached as in `distillation_loss`."""
    assert not isinstance(target, (TopKTarget, SampledTarget))
    whole = reduction != "none"
    if transforming():  # torch.func takes the derivative of the losses themselves
        t_NC = scaled_logits(target, work_dtype(logits_NC)) * factor
        loss_N = _shared(logits_NC, t_NC, labels_N, share_N, rows)[0]
        return loss_N.sum() if whole else loss_N
    if torch.compiler.is_compiling():
        t_NC = scaled_logits(target, work_dtype(logits_NC)) * factor
        loss_N, grad_NC = _shared(logits_NC.detach(), t_NC, labels_N, share_N, rows)
        total = loss_N.sum() if whole else loss_N
        if not (torch.is_grad_enabled() and logits_NC.requires_grad):
            return total
        traced: Tensor = TracedLoss.apply(logits_NC, total, grad_NC.to(logits_NC.dtype))
        return traced

    def compute(logits: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dtype = work_dtype(logits)
        loss_N = torch.zeros(logits.shape[0], dtype=dtype, device=logits.device)
        grad_NC = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want_grad else None
        step = chunk_rows(logits)
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            for start in range(0, logits.shape[0], step):
                part = slice(start, start + step)
                t_RC = scaled_logits(target.take(part), dtype) * factor
                labels_R = None if labels_N is None else labels_N[part]
                loss_N[part], grad_RC = _shared(logits[part], t_RC, labels_R, share_N[part], rows)
                if grad_NC is not None:
                    grad_NC[part] = grad_RC
        total = loss_N.sum() if whole else loss_N
        nothing = total.new_zeros(())
        return total, nothing, nothing.clone(), grad_NC

    parts = [getattr(target, name) for name in target.__slots__]
    result: tuple[Tensor, Tensor, Tensor] = FusedLoss.apply(
        logits_NC, compute, scale_by, *tensors_of([labels_N, share_N, *parts])
    )
    return result[0]


def _shared(z_RC: Tensor, t_RC: Tensor, labels_R: Tensor | None, share_R: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Losses and gradients times the rows' shares; a row without a share is blanked before it is looked at."""
    blank_R1 = (share_R == 0)[:, None]
    z_RC = z_RC.to(share_R.dtype).masked_fill(blank_R1, 0.0)
    loss_R, grad_RC = rows(z_RC, t_RC.masked_fill(blank_R1, 0.0), labels_R)
    return loss_R * share_R, grad_RC * share_R[:, None]


def _times(mass: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(mass == 0, 0.0, mass * log_ratio)


def _log_softmax(x_RC: Tensor) -> Tensor:
    x_RC = x_RC - x_RC.amax(1, keepdim=True)
    return x_RC - x_RC.exp().sum(1, keepdim=True).log()


def _split(u_RC: Tensor, y_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the label, of anything else, and of each other class among those (-inf at the label).

    The others are summed without the label: 1 - q_y would cancel.
    """
    u_R1 = u_RC.gather(1, y_R1)
    others_RC = u_RC.scatter(1, y_R1, -torch.inf)
    log_others_R1 = others_RC.logsumexp(1, keepdim=True)
    log_all_R1 = torch.logaddexp(u_R1, log_others_R1)
    return u_R1 - log_all_R1, log_others_R1 - log_all_R1, others_RC - log_others_R1
