"""The loss and its gradient for a teacher that names K classes a row, kept (top-k) or drawn.

N rows, C classes, R rows of a chunk, K kept or drawn classes. With u = z / T and q = softmax(u), everything of the
teacher is (R, K), or (R, K + 1) where the classes that it does not name are one more outcome, the rest:

    top-k, ghost:    KL divergence over K + 1 outcomes; gradient T (q_j - rest q_j / q_rest) outside of the kept classes
    top-k, uniform:  they share the teacher's rest evenly; gradient T (q_j - rest / (C - K))
    renormalize:     the rest is dropped; drawn classes: weights instead of probabilities, and cross-entropy

torch's softmax kernel is as exact as subtract, exp, sum and divide where rows are not long, and reads them once. A
probability that is not tiny gives its own logarithm; a chunk with a tiny one is computed from log-softmax instead.
"""

import math

import torch
from torch import Tensor

from softlabel.loss.rows import LossCall, RowLosses, chunk_rows, work_dtype
from softlabel.loss.targets import SampledTarget, TopKTarget, tail_column

__all__ = ["kept_losses"]

LEAST = 1e-30  # of a smaller probability float32 loses digits, and at last all of it
LEAST_REST = 0.25  # of a smaller one 1 - the kept probabilities has fewer digits than their sum has
LEAST_LOG = -1e30  # stands for log 0 of the teacher, where 0 * -inf has to be 0
CACHED_ELEMENTS = 2**18  # logits of a batch this small stay in the cache as a whole
KERNEL_CLASSES = 2**12  # the kernel sums a row in a straight line; `sum` adds parts, and stays exact for any length


def kept_losses(logits_NC: Tensor, call: LossCall, *, want_grad: bool, in_place: bool) -> RowLosses:
    """Losses and gradient of a call with a `TopKTarget` or `SampledTarget` and a soft weight above 0; `in_place`: the
    gradient is written over the logits."""
    chunks = _Chunks(logits_NC, call, want_grad, in_place)
    rows, step = len(logits_NC), chunks.step
    if rows <= step:
        return RowLosses(*chunks.compute(None), chunks.grad_NC)
    parts = [chunks.compute(slice(start, min(start + step, rows))) for start in range(0, rows, step)]
    soft_N, hard_N = (torch.cat(part) for part in zip(*parts, strict=True))
    return RowLosses(soft_N, hard_N, chunks.grad_NC)


def _take(rows_N: Tensor, rows: slice | None) -> Tensor:
    """Small tensors cost more to slice than to compute with."""
    return rows_N if rows is None else rows_N[rows]


def _write_softmax(u_RC: Tensor, out: Tensor) -> Tensor:
    if u_RC.shape[1] <= KERNEL_CLASSES:
        return torch.softmax(u_RC, 1, out=out)
    torch.sub(u_RC, u_RC.amax(1, keepdim=True), out=out).exp_()
    return out.div_(out.sum(1, keepdim=True))


def _write_log_softmax(u_RC: Tensor, out: Tensor) -> Tensor:
    if u_RC.shape[1] <= KERNEL_CLASSES:
        return torch.log_softmax(u_RC, 1, out=out)
    torch.sub(u_RC, u_RC.amax(1, keepdim=True), out=out)
    return out.sub_(out.logsumexp(1, keepdim=True))


class _Chunks:
    """The buffers of one call, and the passes over one chunk."""

    def __init__(self, logits_NC: Tensor, call: LossCall, want_grad: bool, in_place: bool) -> None:
        target, labels_N, shares, settings = call.target, call.labels, call.shares, call.settings
        assert isinstance(target, TopKTarget | SampledTarget)
        rows, classes = logits_NC.shape
        self.logits_NC, self.target, self.settings = logits_NC, target, settings
        self.dtype, self.cpu = work_dtype(logits_NC), logits_NC.device.type == "cpu"
        self.others = classes - target.index.shape[1]
        self.tail = settings.tail if isinstance(target, TopKTarget) and self.others > 0 else "renormalize"
        self.slope_N1 = (shares.soft * (settings.soft_weight * settings.temperature))[:, None]
        self.hard_on = settings.hard_weight != 0 and labels_N is not None
        if self.hard_on:
            assert labels_N is not None
            self.hard_scale_N1 = (shares.hard * settings.hard_weight)[:, None]
            self.labels_N1 = labels_N.long().where(labels_N != settings.ignore_index, 0)[:, None]
        # One softmax serves both terms where it can.
        self.apart = self.hard_on and (settings.temperature != 1 or settings.label_smoothing > 0)
        # q at T = 1 is q at T to the power of T, divided by its sum; beyond 4 it would leave float32's range.
        self.raised = self.apart and settings.label_smoothing == 0 and settings.temperature in (2.0, 4.0)
        self.raised = self.raised and self.cpu and classes <= KERNEL_CLASSES
        # Dividing by 2, 4, ... rounds nothing; anything else is done to differences, which are small.
        self.halves = settings.temperature >= 1 and math.frexp(settings.temperature)[0] == 0.5
        # Rows that count for nothing are blanked before anything is computed from them: NaN * 0 is NaN.
        self.blank_target_N1 = self.slope_N1 == 0 if shares.gaps else None
        self.blank_N1 = self.blank_target_N1
        if self.blank_N1 is not None and self.hard_on:
            self.blank_N1 = self.blank_N1 & (self.hard_scale_N1 == 0)
        self.grad_NC: Tensor | None = None
        if want_grad:
            self.grad_NC = logits_NC if in_place else torch.empty_like(logits_NC, memory_format=torch.contiguous_format)
        # A half-precision gradient is summed in float32 and rounded once.
        self.copied = self.blank_N1 is not None or logits_NC.dtype != self.dtype
        self.direct = want_grad and not in_place and logits_NC.dtype == self.dtype
        wide, scaled = self.copied or self.apart or settings.temperature != 1, self.apart and self.copied
        needed = (wide, not self.direct, scaled)
        small = self.cpu and rows * classes <= CACHED_ELEMENTS
        self.step = rows if small else chunk_rows(logits_NC, max(1, sum(needed)))
        self.x_RC, self.q_RC, self.h_RC = (
            torch.empty((self.step, classes), dtype=self.dtype, device=logits_NC.device) if need else None
            for need in needed
        )

    def compute(self, rows: slice | None) -> tuple[Tensor, Tensor]:
        """soft (R,) with its T^2, hard (R,); the gradient of these rows is written."""
        g_RC = (
            _take(self.grad_NC, rows) if self.direct and self.grad_NC is not None else self._cut_buffer(self.q_RC, rows)
        )
        soft_R, hard_R = self._compute_soft(rows, g_RC)
        if hard_R is None:
            h_RC = self._cut_buffer(self.h_RC if self.copied else self.x_RC, rows)
            hard_R = self._compute_hard_apart(rows, self._read(rows), h_RC, g_RC)
        if self.grad_NC is not None and not self.direct:
            _take(self.grad_NC, rows).copy_(g_RC)
        return soft_R, hard_R

    def _scale(self, rows: slice | None) -> Tensor:
        """u (R, C), up to a constant per row."""
        z_RC = self._read(rows)
        if self.settings.temperature == 1:
            return z_RC
        u_RC = self._cut_buffer(self.x_RC, rows)
        if self.halves:
            return torch.mul(z_RC, 1.0 / self.settings.temperature, out=u_RC)
        return torch.sub(z_RC, z_RC.amax(1, keepdim=True), out=u_RC).mul_(1.0 / self.settings.temperature)

    def _read(self, rows: slice | None) -> Tensor:
        z_RC = _take(self.logits_NC, rows)
        if self.copied:
            z_RC = self._cut_buffer(self.x_RC, rows).copy_(z_RC)
            if self.blank_N1 is not None:
                z_RC.masked_fill_(_take(self.blank_N1, rows), 0.0)
        return z_RC

    @staticmethod
    def _cut_buffer(buffer_RC: Tensor | None, rows: slice | None) -> Tensor:
        assert buffer_RC is not None
        return buffer_RC if rows is None else buffer_RC[: rows.stop - rows.start]

    def _read_teacher(self, rows: slice | None) -> tuple[Tensor, Tensor]:
        """log-probabilities and probabilities (R, K or K + 1), the rest last; of drawn classes 0 and their weights."""
        target = self.target
        if isinstance(target, SampledTarget):
            p_RK = _take(target.weight, rows).to(self.dtype)
            log_p_RK = torch.zeros_like(p_RK)
        else:
            log_p_RK = _take(target.value, rows).to(self.dtype)
            if self.settings.factor != 1:
                log_p_RK = log_p_RK * self.settings.factor
            if self.tail != "renormalize":
                column = tail_column(target, self.settings.temperature)
                log_p_RK = torch.cat((log_p_RK, _take(target.tail, rows)[:, column : column + 1].to(self.dtype)), 1)
            # log_softmax is slow where rows are short.
            log_p_RK = log_p_RK - log_p_RK.amax(1, keepdim=True)
            p_RK = log_p_RK.exp()
            sum_R1 = p_RK.sum(1, keepdim=True)
            p_RK.div_(sum_R1)
            log_p_RK.sub_(sum_R1.log_()).clamp_min_(LEAST_LOG)
        if self.blank_target_N1 is not None:
            blank_R1 = _take(self.blank_target_N1, rows)
            log_p_RK, p_RK = log_p_RK.masked_fill(blank_R1, 0.0), p_RK.masked_fill(blank_R1, 0.0)
        return log_p_RK, p_RK

    def _compute_soft(self, rows: slice | None, g_RC: Tensor) -> tuple[Tensor, Tensor | None]:
        """The soft losses, and the hard ones, None where they have to be computed apart; the gradient into g."""
        u_RC = self._scale(rows)
        index_RK = _take(self.target.index, rows).long()
        kept = index_RK.shape[1]
        log_p_RK, p_RK = self._read_teacher(rows)
        with_hard = self.hard_on and not self.apart
        outside_R1 = None
        if self.tail == "uniform":
            log_q_RC = _write_log_softmax(u_RC, g_RC)
            log_q_RK = log_q_RC.gather(1, index_RK)
            outside_R1 = log_q_RC.scatter_(1, index_RK, torch.zeros_like(log_q_RK)).sum(1, keepdim=True)
        q_RC = _write_softmax(u_RC, g_RC)
        hard_R: Tensor | None = None
        if with_hard:
            hard_R = self._compute_hard(rows, q_RC, u_RC)
        elif not self.hard_on:
            hard_R = self.slope_N1.new_zeros(len(u_RC))
        raised_RC: Tensor | None = None
        if self.raised:  # in place of u
            raised_RC = torch.mul(q_RC, q_RC, out=u_RC)
            if self.settings.temperature == 4:
                raised_RC.mul_(raised_RC)
        q_RK = q_RC.gather(1, index_RK)
        if outside_R1 is not None:
            log_q_RK = torch.cat((log_q_RK, outside_R1 / self.others + math.log(self.others)), 1)
            exact = self._are_exact(log_q_RK, -torch.inf)
        else:
            if self.tail == "ghost" and self.cpu:
                q_RK = torch.cat((q_RK, self._sum_rest(q_RC, index_RK, q_RK)), 1)
            exact = self._are_exact(q_RK)
            if exact:
                log_q_RK = q_RK.log()
            else:
                u_RC, raised_RC = u_RC if raised_RC is None else self._scale(rows), None
                log_q_RK = self._compute_log_probs(u_RC, index_RK, q_RC)
        loss_RK = torch.sub(log_p_RK, log_q_RK, out=log_p_RK).mul_(p_RK)
        if not exact:
            loss_RK = loss_RK.masked_fill_(p_RK == 0, 0.0)
        soft_R = loss_RK.sum(1)
        if self.settings.temperature != 1:
            soft_R.mul_(self.settings.temperature**2)
        scale_R1: Tensor | None = None
        if raised_RC is not None:
            hard_R, scale_R1 = self._compute_hard_raised(rows, raised_RC)
        if self.grad_NC is None:
            return soft_R, hard_R
        slope_R1 = _take(self.slope_N1, rows)
        by_R1 = slope_R1
        if isinstance(self.target, SampledTarget):
            by_R1 = by_R1 * p_RK.sum(1, keepdim=True)
        if with_hard:
            by_R1 = by_R1 + _take(self.hard_scale_N1, rows)
        if not exact and self.tail == "ghost":
            q_RK = log_q_RK.exp()
        p_RK = p_RK * slope_R1  # drawn weights are the target's own
        if self.tail == "renormalize":
            # Drawn classes may repeat.
            g_RC.mul_(by_R1).scatter_add_(1, index_RK, p_RK.neg_())
        elif self.tail == "uniform":
            torch.addcmul(p_RK[:, kept:] / -self.others, g_RC, by_R1, out=g_RC)
            g_RC.scatter_(1, index_RK, q_RK.mul_(by_R1).sub_(p_RK[:, :kept]))
        else:
            grad_RK = torch.addcmul(p_RK.neg_(), q_RK, by_R1)
            # The long way leaves the distribution among the other classes in g.
            g_RC.mul_(grad_RK[:, kept:] / q_RK[:, kept:] if exact else grad_RK[:, kept:])
            g_RC.scatter_(1, index_RK, grad_RK[:, :kept])
        if raised_RC is not None and scale_R1 is not None:
            g_RC.addcmul_(raised_RC, scale_R1)
        if with_hard or scale_R1 is not None:
            g_RC.scatter_add_(1, _take(self.labels_N1, rows), -_take(self.hard_scale_N1, rows))
        return soft_R, hard_R

    def _sum_rest(self, q_RC: Tensor, index_RK: Tensor, q_RK: Tensor) -> Tensor:
        """What q gives to the other classes (R, 1); q at the kept ones is lost."""
        rest_R1 = torch.rsub(q_RK.sum(1, keepdim=True), 1.0)
        if self._are_exact(rest_R1, LEAST_REST):
            return rest_R1
        return q_RC.scatter_(1, index_RK, torch.zeros_like(q_RK)).sum(1, keepdim=True)

    def _are_exact(self, q_RK: Tensor, least: float = LEAST) -> bool:
        """Whether none is tiny or NaN. Looking waits for all of a device's work: there the long way is always taken."""
        return self.cpu and (not q_RK.numel() or q_RK.amin().item() > least)

    def _compute_log_probs(self, u_RC: Tensor, index_RK: Tensor, q_RC: Tensor) -> Tensor:
        """log q (R, K), with a ghost (R, K + 1); then q becomes the distribution among the other classes."""
        log_q_RC = _write_log_softmax(u_RC, torch.empty_like(u_RC))
        log_q_RK = log_q_RC.gather(1, index_RK)
        if self.tail != "ghost":
            return log_q_RK
        log_q_RC.scatter_(1, index_RK, torch.full_like(log_q_RK, -torch.inf))
        log_rest_R1 = log_q_RC.logsumexp(1, keepdim=True)
        _write_softmax(log_q_RC, q_RC).masked_fill_(log_rest_R1 == -torch.inf, 0.0)
        return torch.cat((log_q_RK, log_rest_R1), 1)

    def _compute_hard(self, rows: slice | None, q_RC: Tensor, z_RC: Tensor) -> Tensor:
        """-log q at the labels (R,), 0 where there is none."""
        labels_R1 = _take(self.labels_N1, rows)
        label_R1 = q_RC.gather(1, labels_R1)
        if self._are_exact(label_R1):
            log_R1 = label_R1.log_()
        else:
            log_R1 = _write_log_softmax(z_RC, torch.empty_like(z_RC)).gather(1, labels_R1)
        return log_R1.neg_().masked_fill_(_take(self.hard_scale_N1, rows) == 0, 0.0)[:, 0]

    def _compute_hard_raised(self, rows: slice | None, raised_RC: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The hard losses (R,) and what the powers are multiplied by in their gradient (R, 1); None where some label's
        power is tiny."""
        label_R1 = raised_RC.gather(1, _take(self.labels_N1, rows))
        if not self._are_exact(label_R1):
            return None, None
        sum_R1, scale_R1 = raised_RC.sum(1, keepdim=True), _take(self.hard_scale_N1, rows)
        hard_R1 = sum_R1.log().sub_(label_R1.log_()).masked_fill_(scale_R1 == 0, 0.0)
        return hard_R1[:, 0], scale_R1 / sum_R1

    def _compute_hard_apart(self, rows: slice | None, z_RC: Tensor, h_RC: Tensor, g_RC: Tensor) -> Tensor:
        """The hard losses (R,), from a softmax of their own; their gradient is added to g."""
        smoothing, classes = self.settings.label_smoothing, z_RC.shape[1]
        scale_R1, labels_R1 = _take(self.hard_scale_N1, rows), _take(self.labels_N1, rows)
        if smoothing > 0:
            log_q_RC = _write_log_softmax(z_RC, h_RC)
            hard_R1 = log_q_RC.sum(1, keepdim=True).mul_(-smoothing / classes)
            if smoothing < 1:
                hard_R1.sub_(log_q_RC.gather(1, labels_R1), alpha=1.0 - smoothing)
            hard_R = hard_R1.masked_fill_(scale_R1 == 0, 0.0)[:, 0]
            _write_softmax(z_RC, h_RC)
        else:
            hard_R = self._compute_hard(rows, _write_softmax(z_RC, h_RC), z_RC)
        if self.grad_NC is not None:
            g_RC.addcmul_(h_RC, scale_R1)
            if smoothing > 0:
                g_RC.sub_(scale_R1 * (smoothing / classes))
            g_RC.scatter_add_(1, labels_R1, scale_R1 * (smoothing - 1.0))
        return hard_R
