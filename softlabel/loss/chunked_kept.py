"""The soft term of a teacher that names K classes a row (top-k or drawn), as `chunked` computes it.

N rows, C classes, R rows of a chunk, K kept or drawn classes. x = z - max z, u = x / T. The student's row is
passed over as for a dense teacher; everything of the teacher is (R, K) or (N, 1).

    top-k, ghost:    the classes that were not kept are one more outcome; gradient T (q_j - rest q_j / q_rest) there
    top-k, uniform:  they share the teacher's rest evenly; gradient T (q_j - rest / (C - K))
    renormalize:     the rest is dropped; drawn classes: weights instead of probabilities, and cross-entropy
"""

import math

import torch
from torch import Tensor

from softlabel.loss.rows import Settings, kept_probs
from softlabel.loss.targets import SampledTarget, TopKTarget

__all__ = ["KeptPart"]

LEAST_REST = 1e-30  # a sum of exponentials below this is taken again, against its own maximum


class KeptPart:
    """slope (N, 1): what the gradient of a row is multiplied by; blank (N, 1): rows whose target must not be seen."""

    def __init__(
        self,
        target: TopKTarget | SampledTarget,
        settings: Settings,
        slope_N1: Tensor,
        blank_N1: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.target, self.factor, self.slope_N1, self.blank_N1 = target, settings.factor, slope_N1, blank_N1
        self.per_t = 1.0 / settings.temperature
        self.index_NK = target.index.long()
        kept = kept_probs(target, settings, dtype)
        if blank_N1 is not None:
            kept = kept._replace(**{name: part.masked_fill(blank_N1, 0.0) for name, part in kept._asdict().items()})
        self.rest_N1, self.log_rest_N1 = kept.rest, kept.log_rest
        # (N, K) probabilities are not kept: a chunk's follow from these numbers of its rows.
        self.log_whole_N1 = kept.log_whole
        self.others = target.num_classes - target.index.shape[1]
        self.tail = settings.tail if isinstance(target, TopKTarget) and self.others > 0 else "renormalize"
        # sum p log p - sum p u + mass * log sum e^u, where importance weights need not have mass 1
        self.loss_N1 = torch.where(kept.p == 0, 0.0, kept.p * kept.log_p).sum(1, keepdim=True)
        self.mass_N1 = kept.p.sum(1, keepdim=True)
        self.each_N1 = torch.zeros_like(self.rest_N1)
        if self.tail == "uniform":
            self.loss_N1 += torch.where(kept.rest == 0, 0.0, kept.rest * (kept.log_rest - math.log(self.others)))
            self.mass_N1 += kept.rest
            self.each_N1 = kept.rest / self.others
        self.log_sum_N1 = torch.zeros_like(self.rest_N1)
        self.log_sum_rest_N1 = torch.zeros_like(self.rest_N1)

    def _probs(self, rows: slice) -> Tensor:
        dtype = self.log_whole_N1.dtype
        if isinstance(self.target, SampledTarget):
            p_RK = self.target.weight[rows].to(dtype)
        else:
            p_RK = self.target.value[rows].to(dtype) * self.factor
            p_RK.sub_(self.log_whole_N1[rows]).exp_()
        return p_RK if self.blank_N1 is None else p_RK.masked_fill(self.blank_N1[rows], 0.0)

    def losses(self) -> Tensor:
        """(N,) without T^2, after every chunk."""
        loss_N1 = self.loss_N1 + self.mass_N1 * self.log_sum_N1
        if self.tail == "ghost":
            log_q_rest_N1 = self.log_sum_rest_N1 - self.log_sum_N1
            loss_N1 += torch.where(self.rest_N1 == 0, 0.0, self.rest_N1 * (self.log_rest_N1 - log_q_rest_N1))
        return loss_N1[:, 0]

    def chunk(self, rows: slice, x_RC: Tensor, e_RC: Tensor, *, want_grad: bool) -> None:
        """Leaves x as it is, and in e (another buffer) the soft term's gradient, if that is wanted."""
        index_RK, p_RK, slope_R1 = self.index_NK[rows], self._probs(rows), self.slope_N1[rows]
        u_RK = x_RC.gather(1, index_RK).mul_(self.per_t)
        # nansum: p = 0 at u = -inf counts nothing. A NaN logit is in the sums of e.
        self.loss_N1[rows] -= (p_RK * u_RK).nansum(1, keepdim=True)
        each_R1 = self.each_N1[rows]
        if self.tail == "uniform":
            outside_R1 = torch.mul(x_RC, self.per_t, out=e_RC).scatter_(1, index_RK, 0.0).sum(1, keepdim=True)
            self.loss_N1[rows] -= torch.where(each_R1 == 0, 0.0, each_R1 * outside_R1)
        torch.mul(x_RC, self.per_t, out=e_RC).exp_()
        if self.tail == "ghost":
            by_R1, q_RK = self._ghost(rows, x_RC, u_RK, e_RC)
            if want_grad:
                e_RC.mul_(by_R1 * slope_R1)
                e_RC.scatter_add_(1, index_RK, q_RK.sub_(p_RK).mul_(slope_R1))
            return
        sum_R1 = e_RC.sum(1, keepdim=True)
        torch.log(sum_R1, out=self.log_sum_N1[rows])
        if want_grad:
            e_RC.mul_(slope_R1 * self.mass_N1[rows] / sum_R1)
            e_RC.scatter_add_(1, index_RK, p_RK * -slope_R1)
            if self.tail == "uniform":
                e_RC.sub_(slope_R1 * each_R1)
                e_RC.scatter_add_(1, index_RK, (slope_R1 * each_R1).expand_as(p_RK))

    def _ghost(self, rows: slice, x_RC: Tensor, u_RK: Tensor, e_RC: Tensor) -> tuple[Tensor, Tensor]:
        """What e is multiplied by outside of the kept classes, and the student's probabilities of these.

        Their entries of e become 0 before it is summed: 1 - the sum of their probabilities would cancel to nothing.
        """
        index_RK, rest_R1 = self.index_NK[rows], self.rest_N1[rows]
        sum_rest_R1 = e_RC.scatter_(1, index_RK, 0.0).sum(1, keepdim=True)
        # Looking costs a device synchronisation elsewhere than on the CPU: there it is always done the long way.
        if x_RC.device.type != "cpu" or bool((sum_rest_R1 < LEAST_REST).any()):
            u_RC = torch.mul(x_RC, self.per_t, out=e_RC).scatter_(1, index_RK, -torch.inf)
            top_R1 = u_RC.amax(1, keepdim=True)
            top_R1.masked_fill_(top_R1 == -torch.inf, 0.0)
            sum_rest_R1 = u_RC.sub_(top_R1).exp_().sum(1, keepdim=True)
            log_sum_rest_R1 = sum_rest_R1.log() + top_R1
            log_sum_R1 = torch.logaddexp(log_sum_rest_R1, u_RK.logsumexp(1, keepdim=True))
            self.log_sum_N1[rows], self.log_sum_rest_N1[rows] = log_sum_R1, log_sum_rest_R1
            spread_R1 = torch.where(rest_R1 == 0, 0.0, rest_R1 / sum_rest_R1)
            return (top_R1 - log_sum_R1).exp_() - spread_R1, (u_RK - log_sum_R1).exp_()
        q_RK = u_RK.exp_()
        sum_R1 = q_RK.sum(1, keepdim=True).add_(sum_rest_R1)
        torch.log(sum_R1, out=self.log_sum_N1[rows])
        torch.log(sum_rest_R1, out=self.log_sum_rest_N1[rows])
        by_R1 = sum_R1.reciprocal_()
        return by_R1 - rest_R1 / sum_rest_R1, q_RK.mul_(by_R1)
