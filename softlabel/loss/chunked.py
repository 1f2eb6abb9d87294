"""The loss and its gradient together, a few rows at a time: plain torch, no compiler, any device.

N rows, C classes, R rows of a chunk, K kept or drawn classes. A chunk is small enough that its buffers stay in the
cache from the first pass over it to the last; outside of them, only the gradient (N, C) is allocated.

With x = z - max(z) and u = x / T, a row's terms and their gradients in z are
    hard = log sum e^x - (1 - s) x_y - s mean(x)                         softmax(x) - (1 - s) [y] - s / C
    soft = T^2 (sum p log p - sum p u + log sum e^u)                     T (softmax(u) - p)
"""

import math

import torch
from torch import Tensor

from softlabel.loss.rows import Kept, RowLosses, Settings, Shares, kept_probs, work_dtype
from softlabel.loss.targets import DenseTarget, Int8Target, SampledTarget, Target, TopKTarget

__all__ = ["chunk_rows", "row_losses"]

CHUNK_ELEMENTS = 2**17
LEAST_CHUNK_ELEMENTS = 2**15
DEVICE_CHUNK_ELEMENTS = 2**24  # elsewhere than on the CPU: enough work for every launch
LEAST_REST = 1e-30  # a sum of exponentials below this is taken again, against its own maximum


def chunk_rows(logits_NC: Tensor) -> int:
    """How many rows make a chunk: its two buffers are to be small against the gradient too."""
    rows, classes = logits_NC.shape
    elements = DEVICE_CHUNK_ELEMENTS
    if logits_NC.device.type == "cpu":
        elements = min(CHUNK_ELEMENTS, max(LEAST_CHUNK_ELEMENTS, rows * classes // 25))
    return max(1, min(rows, elements // max(classes, 1)))


def row_losses(
    logits_NC: Tensor,
    target: Target,
    labels_N: Tensor | None,
    shares: Shares,
    settings: Settings,
    *,
    want_grad: bool,
) -> RowLosses:
    with torch.no_grad(), torch.autocast(logits_NC.device.type, enabled=False):
        return _Chunks(logits_NC, target, labels_N, shares, settings, want_grad).run()


class _Chunks:
    """The buffers of one call, and the passes over one chunk."""

    def __init__(
        self,
        logits_NC: Tensor,
        target: Target,
        labels_N: Tensor | None,
        shares: Shares,
        settings: Settings,
        want_grad: bool,
    ) -> None:
        rows, classes = logits_NC.shape
        dtype, device = work_dtype(logits_NC), logits_NC.device
        self.logits_NC, self.target, self.settings, self.classes = logits_NC, target, settings, classes
        self.soft_on = settings.soft_weight != 0
        self.hard_on = settings.hard_weight != 0 and labels_N is not None
        self.soft_scale_N1 = (shares.soft * settings.soft_weight)[:, None]
        self.hard_scale_N1 = (shares.hard * (settings.hard_weight if self.hard_on else 0.0))[:, None]
        # Rows that count for nothing are blanked before anything is computed from them: NaN * 0 is NaN.
        self.blank_target_N1 = self.soft_scale_N1 == 0 if shares.gaps and self.soft_on else None
        self.blank_N1: Tensor | None = None
        if shares.gaps or not self.soft_on:
            self.blank_N1 = self.hard_scale_N1 == 0
            if self.soft_on:
                self.blank_N1 &= self.soft_scale_N1 == 0
        if self.hard_on:
            assert labels_N is not None
            labels_N = labels_N.long()
            self.labels_N1 = labels_N.where(labels_N != settings.ignore_index, 0)[:, None]
        self.kept: Kept | None = None
        if self.soft_on and isinstance(target, TopKTarget | SampledTarget):
            kept = kept_probs(target, settings, dtype)
            if self.blank_target_N1 is not None:
                kept = Kept(*(part.masked_fill(self.blank_target_N1, 0.0) for part in kept))
            self.kept = kept
            self.index_NK = target.index.long()
            self.p_log_p_N1 = torch.where(kept.p == 0, 0.0, kept.p * kept.log_p).sum(1, keepdim=True)
            # Importance weights need not sum to 1; the student's part has the weight of the teacher's.
            self.mass_N1 = kept.p.sum(1, keepdim=True)
            others = classes - target.index.shape[1]
            self.tail = settings.tail if isinstance(target, TopKTarget) and others > 0 else "renormalize"
            if self.tail == "uniform":
                per_class_N1 = kept.log_rest - math.log(others)
                self.p_log_p_N1 += torch.where(kept.rest == 0, 0.0, kept.rest * per_class_N1)
                self.mass_N1 += kept.rest
                self.each_N1 = kept.rest / others
        self.step = chunk_rows(logits_NC)
        chunk = (self.step, classes)
        self.x_RC = torch.empty(chunk, dtype=dtype, device=device)
        self.e_RC = torch.empty(chunk, dtype=dtype, device=device)
        self.grad_NC = torch.empty((rows, classes), dtype=logits_NC.dtype, device=device) if want_grad else None
        # A half-precision gradient is summed in float32 and rounded once.
        narrow = want_grad and logits_NC.dtype != dtype
        self.g_RC = torch.empty(chunk, dtype=dtype, device=device) if narrow else None
        self.soft_N = torch.zeros(rows, dtype=dtype, device=device)
        self.hard_N = torch.zeros(rows, dtype=dtype, device=device)

    def run(self) -> RowLosses:
        for start in range(0, self.logits_NC.shape[0], self.step):
            self._chunk(slice(start, min(start + self.step, self.logits_NC.shape[0])))
        return RowLosses(self.soft_N, self.hard_N, self.grad_NC)

    def _chunk(self, rows: slice) -> None:
        count = rows.stop - rows.start
        x_RC, e_RC = self.x_RC[:count], self.e_RC[:count]
        z_RC = self.logits_NC[rows]
        if self.blank_N1 is not None:
            z_RC = x_RC.copy_(z_RC).masked_fill_(self.blank_N1[rows], 0.0)
        elif z_RC.dtype != x_RC.dtype:
            z_RC = x_RC.copy_(z_RC)
        torch.sub(z_RC, z_RC.amax(1, keepdim=True), out=x_RC)
        g_RC = None
        if self.grad_NC is not None:
            g_RC = self.grad_NC[rows] if self.g_RC is None else self.g_RC[:count]
        if self.hard_on:
            self._hard(rows, x_RC, e_RC, g_RC)
        elif g_RC is not None:
            g_RC.zero_()
        if self.soft_on:
            if self.settings.temperature != 1:
                x_RC.mul_(1.0 / self.settings.temperature)
            if self.kept is None:
                self._soft_dense(rows, x_RC, e_RC, g_RC)
            else:
                self._soft_kept(rows, x_RC, e_RC, g_RC)
        if g_RC is not None and self.g_RC is not None:
            assert self.grad_NC is not None
            self.grad_NC[rows] = g_RC

    def _hard(self, rows: slice, x_RC: Tensor, e_RC: Tensor, g_RC: Tensor | None) -> None:
        smoothing = self.settings.label_smoothing
        y_R1, scale_R1 = self.labels_N1[rows], self.hard_scale_N1[rows]
        h_RC = torch.exp(x_RC, out=e_RC if g_RC is None else g_RC)
        sum_R1 = h_RC.sum(1, keepdim=True)
        hard_R1 = sum_R1.log()
        if smoothing < 1:
            hard_R1.sub_(x_RC.gather(1, y_R1), alpha=1.0 - smoothing)
        if smoothing > 0:
            hard_R1.sub_(x_RC.mean(1, keepdim=True), alpha=smoothing)
        self.hard_N[rows] = hard_R1[:, 0].masked_fill_((scale_R1 == 0)[:, 0], 0.0)
        if g_RC is not None:
            g_RC.mul_(scale_R1 / sum_R1)
            if smoothing > 0:
                g_RC.sub_(scale_R1 * (smoothing / self.classes))
            g_RC.scatter_add_(1, y_R1, scale_R1 * -(1.0 - smoothing))

    def _soft_dense(self, rows: slice, u_RC: Tensor, e_RC: Tensor, g_RC: Tensor | None) -> None:
        temperature = self.settings.temperature
        slope_R1 = self.soft_scale_N1[rows] * temperature
        sum_q_R1 = torch.exp(u_RC, out=e_RC).sum(1, keepdim=True)
        if g_RC is not None:
            g_RC.addcmul_(e_RC, slope_R1 / sum_q_R1)
        t_RC = e_RC  # one buffer is the student's exponentials, then the teacher's logits, then their exponentials
        self._teacher(rows, t_RC)
        t_RC.sub_(t_RC.amax(1, keepdim=True))
        difference_RC = torch.sub(t_RC, u_RC, out=u_RC)
        sum_p_R1 = t_RC.exp_().sum(1, keepdim=True)
        if g_RC is not None:
            g_RC.addcmul_(t_RC, slope_R1 / sum_p_R1, value=-1.0)
        # nansum: where p is 0 and a logit -inf, 0 * inf has to count nothing. A NaN logit is in the sums of e.
        cross_R1 = difference_RC.mul_(t_RC).nansum(1, keepdim=True)
        soft_R1 = (cross_R1 / sum_p_R1 + sum_q_R1.log() - sum_p_R1.log()) * temperature**2
        self.soft_N[rows] = soft_R1[:, 0]

    def _teacher(self, rows: slice, t_RC: Tensor) -> None:
        target = self.target
        if isinstance(target, DenseTarget):
            t_RC.copy_(target.scaled_logits[rows])
        elif isinstance(target, Int8Target):
            t_RC.copy_(target.q[rows])
            t_RC.mul_(target.scale[rows, None].to(t_RC.dtype)).add_(target.offset[rows, None].to(t_RC.dtype))
            t_RC.scatter_(1, target.top_index[rows].long(), target.top_value[rows].to(t_RC.dtype))
        else:
            assert not isinstance(target, TopKTarget | SampledTarget)
            hidden_RD = target.hidden[rows].to(t_RC.dtype)
            if target.hidden_scale is not None:
                hidden_RD = hidden_RD * target.hidden_scale[rows, None].to(t_RC.dtype)
            torch.mm(hidden_RD, self._head_weight().T, out=t_RC)
            if target.bias is not None:
                t_RC.add_(target.bias)
        if self.settings.factor != 1:
            t_RC.mul_(self.settings.factor)
        if self.blank_target_N1 is not None:
            t_RC.masked_fill_(self.blank_target_N1[rows], 0.0)

    def _head_weight(self) -> Tensor:
        assert not isinstance(self.target, DenseTarget | Int8Target | TopKTarget | SampledTarget)
        return self.target.weight.to(self.soft_N.dtype)

    def _soft_kept(self, rows: slice, u_RC: Tensor, e_RC: Tensor, g_RC: Tensor | None) -> None:
        kept, temperature = self.kept, self.settings.temperature
        assert kept is not None
        index_RK, p_RK = self.index_NK[rows], kept.p[rows]
        slope_R1 = self.soft_scale_N1[rows] * temperature
        u_RK = u_RC.gather(1, index_RK)
        torch.exp(u_RC, out=e_RC)
        # p = 0 at u = -inf counts nothing; a NaN logit is in the sums of e.
        cross_R1 = (p_RK * u_RK).nansum(1, keepdim=True)
        if self.tail == "ghost":
            log_sum_R1, rest_soft_R1, by_R1 = self._ghost(rows, u_RC, u_RK, e_RC, index_RK)
            soft_R1 = rest_soft_R1 + kept.p[rows].sum(1, keepdim=True) * log_sum_R1
            if g_RC is not None:
                g_RC.addcmul_(e_RC, slope_R1 * by_R1)
                g_RC.scatter_add_(1, index_RK, ((u_RK - log_sum_R1).exp_() - p_RK).mul_(slope_R1))
        else:
            sum_R1 = e_RC.sum(1, keepdim=True)
            mass_R1 = self.mass_N1[rows]
            soft_R1 = mass_R1 * sum_R1.log()
            if g_RC is not None:
                g_RC.addcmul_(e_RC, slope_R1 * mass_R1 / sum_R1)
                g_RC.scatter_add_(1, index_RK, p_RK * -slope_R1)
            if self.tail == "uniform":
                each_R1 = self.each_N1[rows]
                outside_R1 = u_RC.scatter_(1, index_RK, 0.0).sum(1, keepdim=True)
                cross_R1 += torch.where(each_R1 == 0, 0.0, each_R1 * outside_R1)
                if g_RC is not None:
                    g_RC.sub_(slope_R1 * each_R1)
                    g_RC.scatter_add_(1, index_RK, (slope_R1 * each_R1).expand_as(p_RK))
        soft_R1 = soft_R1 + self.p_log_p_N1[rows] - cross_R1
        self.soft_N[rows] = soft_R1[:, 0] * temperature**2

    def _ghost(
        self, rows: slice, u_RC: Tensor, u_RK: Tensor, e_RC: Tensor, index_RK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the sum over all classes, the rest's part of the loss, and the slope of the gradient outside of the
        kept classes, whose entries of `e` become 0: 1 - the sum of their probabilities would cancel to nothing."""
        assert self.kept is not None
        rest_R1, log_rest_R1 = self.kept.rest[rows], self.kept.log_rest[rows]
        sum_rest_R1 = e_RC.scatter_(1, index_RK, 0.0).sum(1, keepdim=True)
        top_R1 = torch.zeros_like(sum_rest_R1)
        # Looking costs a device synchronisation elsewhere than on the CPU: there it is always done the long way.
        if u_RC.device.type != "cpu" or bool((sum_rest_R1 < LEAST_REST).any()):
            u_RC.scatter_(1, index_RK, -torch.inf)
            top_R1 = u_RC.amax(1, keepdim=True)
            top_R1.masked_fill_(top_R1 == -torch.inf, 0.0)
            sum_rest_R1 = torch.exp(u_RC.sub_(top_R1), out=e_RC).sum(1, keepdim=True)
            log_sum_R1 = torch.logaddexp(sum_rest_R1.log() + top_R1, u_RK.logsumexp(1, keepdim=True))
        else:
            log_sum_R1 = (sum_rest_R1 + u_RK.exp().sum(1, keepdim=True)).log_()
        log_q_rest_R1 = sum_rest_R1.log() + top_R1 - log_sum_R1
        loss_R1 = torch.where(rest_R1 == 0, 0.0, rest_R1 * (log_rest_R1 - log_q_rest_R1))
        spread_R1 = torch.where(rest_R1 == 0, 0.0, rest_R1 / sum_rest_R1)
        return log_sum_R1, loss_R1, (top_R1 - log_sum_R1).exp_() - spread_R1
