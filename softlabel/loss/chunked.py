"""The loss and its gradient together, a few rows at a time: plain torch, no compiler, any device.

N rows, C classes, R rows of a chunk. A chunk is small enough that its buffers stay in the cache from the first pass
over it to the last; outside of them, only the gradient (N, C) is allocated, and not even that where it may take the
place of the logits.

With x = z - max(z) and u = x / T, a row's terms and their gradients in z are
    hard = log sum e^x - (1 - s) x_y - s mean(x)                         softmax(x) - (1 - s) [y] - s / C
    soft = T^2 (sum p log p - sum p u + log sum e^u)                     T (softmax(u) - p)
A teacher of a few classes a row is `chunked_kept`'s.
"""

import torch
from torch import Tensor

from softlabel.loss.chunked_kept import kept_losses
from softlabel.loss.rows import LossCall, RowLosses, chunk_rows, work_dtype
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, TopKTarget

__all__ = ["row_losses"]


def row_losses(logits_NC: Tensor, call: LossCall, *, want_grad: bool, in_place: bool = False) -> RowLosses:
    """`in_place`: the gradient is written over the logits."""
    with torch.no_grad(), torch.autocast(logits_NC.device.type, enabled=False):
        if call.settings.soft_weight != 0 and isinstance(call.target, TopKTarget | SampledTarget):
            return kept_losses(logits_NC, call, want_grad=want_grad, in_place=in_place)
        return _Chunks(logits_NC, call, want_grad, in_place).run()


class _Chunks:
    """The buffers of one call, and the passes over one chunk.

    A pass leaves sums (N, 1) behind; what follows from them for the losses is done once, for all rows.
    """

    def __init__(self, logits_NC: Tensor, call: LossCall, want_grad: bool, in_place: bool) -> None:
        target, labels_N, shares, settings = call.target, call.labels, call.shares, call.settings
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
        self.slope_N1 = self.soft_scale_N1 * settings.temperature
        self.top_N1, self.sum_1_N1, self.sum_x_N1, self.x_label_N1, self.sum_q_N1, self.sum_p_N1, self.cross_N1 = (
            torch.zeros((rows, 1), dtype=dtype, device=device) for _ in range(7)
        )
        if self.hard_on:
            assert labels_N is not None
            self.labels_N1 = labels_N.long().where(labels_N != settings.ignore_index, 0)[:, None]
            self.label_slope_N1 = self.hard_scale_N1 * -(1.0 - settings.label_smoothing)
        self.step = chunk_rows(logits_NC)
        chunk = (self.step, classes)
        self.x_RC = torch.empty(chunk, dtype=dtype, device=device)
        self.e_RC = torch.empty(chunk, dtype=dtype, device=device)
        self.grad_NC: Tensor | None = None
        if want_grad:
            self.grad_NC = logits_NC if in_place else torch.empty_like(logits_NC, memory_format=torch.contiguous_format)
        # A half-precision gradient is summed in float32 and rounded once.
        narrow = want_grad and logits_NC.dtype != dtype
        self.g_RC = torch.empty(chunk, dtype=dtype, device=device) if narrow else None

    def run(self) -> RowLosses:
        rows = self.logits_NC.shape[0]
        for start in range(0, rows, self.step):
            self._compute_chunk(slice(start, min(start + self.step, rows)))
        nothing_N = torch.zeros_like(self.top_N1[:, 0])
        soft_N, hard_N = nothing_N, nothing_N
        if self.hard_on:
            hard_N = self._compute_hard()
        if self.soft_on:
            soft_N1 = self.cross_N1 / self.sum_p_N1 + self.sum_q_N1.log() - self.sum_p_N1.log()
            soft_N = soft_N1[:, 0] * self.settings.temperature**2
        return RowLosses(soft_N, hard_N, self.grad_NC)

    def _compute_chunk(self, rows: slice) -> None:
        count = rows.stop - rows.start
        x_RC, e_RC = self.x_RC[:count], self.e_RC[:count]
        z_RC = self.logits_NC[rows]
        if self.blank_N1 is not None:
            z_RC = x_RC.copy_(z_RC).masked_fill_(self.blank_N1[rows], 0.0)
        elif z_RC.dtype != x_RC.dtype:
            z_RC = x_RC.copy_(z_RC)
        top_R1 = torch.amax(z_RC, 1, keepdim=True, out=self.top_N1[rows])
        torch.sub(z_RC, top_R1, out=x_RC)
        g_RC = None
        if self.grad_NC is not None:
            g_RC = self.grad_NC[rows] if self.g_RC is None else self.g_RC[:count]
        if self.hard_on:
            self._add_hard(rows, x_RC, e_RC if g_RC is None else g_RC, g_RC)
        elif g_RC is not None:
            g_RC.zero_()
        if self.soft_on:
            if self.settings.temperature != 1:
                x_RC.mul_(1.0 / self.settings.temperature)
            self._compute_soft_dense(rows, x_RC, e_RC, g_RC)
        if g_RC is not None and self.g_RC is not None:
            assert self.grad_NC is not None
            self.grad_NC[rows] = g_RC

    def _add_hard(self, rows: slice, x_RC: Tensor, h_RC: Tensor, g_RC: Tensor | None) -> None:
        """Exponentials into h, which is the gradient if that is wanted: nothing is in it yet."""
        smoothing = self.settings.label_smoothing
        if smoothing < 1:
            torch.gather(x_RC, 1, self.labels_N1[rows], out=self.x_label_N1[rows])
        if smoothing > 0:
            torch.sum(x_RC, 1, keepdim=True, out=self.sum_x_N1[rows])
        sum_R1 = torch.sum(torch.exp(x_RC, out=h_RC), 1, keepdim=True, out=self.sum_1_N1[rows])
        if g_RC is not None:
            scale_R1 = self.hard_scale_N1[rows]
            g_RC.mul_(scale_R1 / sum_R1)
            if smoothing > 0:
                g_RC.sub_(scale_R1 * (smoothing / self.classes))
            g_RC.scatter_add_(1, self.labels_N1[rows], self.label_slope_N1[rows])

    def _compute_hard(self) -> Tensor:
        smoothing = self.settings.label_smoothing
        hard_N1 = self.sum_1_N1.log()
        if smoothing < 1:
            hard_N1.sub_(self.x_label_N1, alpha=1.0 - smoothing)
        if smoothing > 0:
            hard_N1.sub_(self.sum_x_N1, alpha=smoothing / self.classes)
        return hard_N1.masked_fill_(self.hard_scale_N1 == 0, 0.0)[:, 0]

    def _compute_soft_dense(self, rows: slice, u_RC: Tensor, e_RC: Tensor, g_RC: Tensor | None) -> None:
        slope_R1 = self.slope_N1[rows]
        sum_q_R1 = torch.sum(torch.exp(u_RC, out=e_RC), 1, keepdim=True, out=self.sum_q_N1[rows])
        if g_RC is not None:
            g_RC.addcmul_(e_RC, slope_R1 / sum_q_R1)
        t_RC = e_RC  # one buffer is the student's exponentials, then the teacher's logits, then their exponentials
        self._read_teacher(rows, t_RC)
        t_RC.sub_(t_RC.amax(1, keepdim=True))
        difference_RC = torch.sub(t_RC, u_RC, out=u_RC)
        sum_p_R1 = torch.sum(t_RC.exp_(), 1, keepdim=True, out=self.sum_p_N1[rows])
        if g_RC is not None:
            g_RC.addcmul_(t_RC, slope_R1 / sum_p_R1, value=-1.0)
        # nansum: where p is 0 and a logit -inf, 0 * inf has to count nothing. A NaN logit is in the sums of e.
        torch.nansum(difference_RC.mul_(t_RC), 1, keepdim=True, out=self.cross_N1[rows])

    def _read_teacher(self, rows: slice, t_RC: Tensor) -> None:
        target = self.target
        if isinstance(target, DenseTarget):
            t_RC.copy_(target.scaled_logits[rows])
        elif isinstance(target, Int8Target):
            t_RC.copy_(target.q[rows])
            t_RC.mul_(target.scale[rows, None].to(t_RC.dtype)).add_(target.offset[rows, None].to(t_RC.dtype))
            t_RC.scatter_(1, target.top_index[rows].long(), target.top_value[rows].to(t_RC.dtype))
        else:
            assert isinstance(target, HeadTarget)
            hidden_RD = target.hidden[rows].to(t_RC.dtype)
            if target.hidden_scale is not None:
                hidden_RD = hidden_RD * target.hidden_scale[rows, None].to(t_RC.dtype)
            torch.mm(hidden_RD, target.weight.to(t_RC.dtype).T, out=t_RC)
            if target.bias is not None:
                t_RC.add_(target.bias)
            target.cap(t_RC)
        if self.settings.factor != 1:
            t_RC.mul_(self.settings.factor)
        if self.blank_target_N1 is not None:
            t_RC.masked_fill_(self.blank_target_N1[rows], 0.0)
