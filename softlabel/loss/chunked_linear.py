"""The loss of logits that are a matrix product, some rows at a time, so that there are never logits of all rows.

N rows, D width, C classes, R rows of a chunk. A chunk's logits z = h W^T + b are made, `chunked` or the Triton kernels
put their gradient g in their place, and what follows from it is added up: g W for the hidden states, g^T h for the
matrix, the sum of g for the bias. Rows that count for nothing are left out before the product. Sums over rows are
float32 (float64 for float64), whatever the type of the matrix.

On CUDA, half-precision numbers are multiplied as they are and their products summed in float32; elsewhere, where torch
has no such product, a copy of the matrix in float32 is multiplied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from softlabel.loss.arguments import widened
from softlabel.loss.rows import LossCall, RowLosses, Shares, reduce_rows, work_dtype
from softlabel.loss.targets import DenseTarget, HeadTarget, Target

__all__ = ["LinearGradients", "LogitSettings", "Parameters", "cap_logits", "counted_rows", "linear_losses"]

# Logits of a chunk. The more rows the fewer passes over the gradient of the matrix, which every chunk adds to.
CHUNK_ELEMENTS = 2**24
DEVICE_CHUNK_ELEMENTS = 2**26
HALF_RANGE = 1024.0  # the largest element of a float16 gradient: far from its largest and its smallest number
_HALF = (torch.float16, torch.bfloat16)
Rows = Callable[..., RowLosses]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitSettings:
    """From the product to the logits: softcap * tanh(scale * (h W^T + b) / softcap), or without softcap
    scale * (h W^T + b). `chunk_rows` None: as many as suit the device."""

    scale: float
    softcap: float | None
    chunk_rows: int | None


class Parameters(NamedTuple):
    """hidden (N, D), weight (C, D), bias (C,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class LinearGradients(NamedTuple):
    """In float32 or float64; None where it is not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def cap_logits(logits: Tensor, settings: LogitSettings) -> Tensor:
    """The logits that the product, without scale and softcap, stands for; differentiable."""
    logits = logits * settings.scale
    return logits if settings.softcap is None else settings.softcap * torch.tanh(logits / settings.softcap)


def counted_rows(call: LossCall) -> Tensor:
    """bool (N,): which rows count in a term that is computed."""
    settings, shares = call.settings, call.shares
    counts_N = torch.zeros_like(shares.soft, dtype=torch.bool)
    if settings.soft_weight != 0:
        counts_N = counts_N | (shares.soft != 0)
    if settings.hard_weight != 0 and call.labels is not None:
        counts_N = counts_N | (shares.hard != 0)
    return counts_N


def linear_losses(
    given: Parameters,
    call: LossCall,
    settings: LogitSettings,
    rows_of: Rows,
    wanted: tuple[bool, bool, bool],
    observe: Callable[[slice | Tensor, Tensor, Target | None], None] | None,
) -> tuple[Tensor, Tensor, Tensor, LinearGradients]:
    """total, soft and hard, reduced as the call says, and the gradients of the total's sum over rows.

    Args:
        rows_of: losses and gradient of logits (R, C), see `softlabel.loss.rows.RowLosses`; it may write over them.
        wanted: whether the gradients of hidden states, matrix and bias are.
        observe: is called with rows, logits and target (None without a soft term) of each chunk.
    """
    with torch.no_grad(), torch.autocast(given.hidden.device.type, enabled=False):
        chunks = _LinearChunks(given, call, settings, rows_of, wanted)
        chunks.observe = observe
        return chunks.run()


class _LinearChunks:
    """The buffers of one call, and the passes over one chunk."""

    def __init__(
        self, given: Parameters, call: LossCall, settings: LogitSettings, rows_of: Rows, wanted: tuple[bool, bool, bool]
    ) -> None:
        hidden_ND, weight_CD = given.hidden, given.weight
        device, dtype = hidden_ND.device, work_dtype(hidden_ND)
        self.hidden_ND, self.bias_C, self.call, self.settings = hidden_ND, given.bias, call, settings
        self.rows_of, self.want_grad, self.dtype = rows_of, any(wanted), dtype
        self.half = device.type == "cuda" and hidden_ND.dtype in _HALF
        self.weight_CD = weight_CD if self.half else weight_CD.to(dtype)
        self.soft_N, self.hard_N = torch.zeros_like(call.shares.soft), torch.zeros_like(call.shares.hard)
        self.grad_ND = torch.zeros(hidden_ND.shape, dtype=dtype, device=device) if wanted[0] else None
        self.grad_CD = torch.zeros(weight_CD.shape, dtype=dtype, device=device) if wanted[1] else None
        self.grad_C = torch.zeros(len(weight_CD), dtype=dtype, device=device) if wanted[2] else None
        self.observe: Callable[[slice | Tensor, Tensor, Target | None], None] | None = None
        self.range: Tensor | None = None
        if self.half and hidden_ND.dtype == torch.float16 and self.want_grad:
            self.range = self._half_range()

        rows, classes = len(hidden_ND), len(weight_CD)
        self.counted: Tensor | None = None
        self.gaps = call.shares.gaps
        if self.gaps or call.settings.soft_weight == 0:
            counted = counted_rows(call).nonzero()[:, 0]  # the one wait for a device, which knows how many there are
            self.counted = None if len(counted) == rows else counted
            rows = len(counted)
            if device.type == "cpu" and call.settings.soft_weight != 0:
                self.gaps = not bool(call.shares.soft[counted].all())
        self.rows, self.step = rows, self._chunk_rows(rows, classes, device)
        chunk = (self.step, classes)
        self.z_RC = torch.empty(chunk, dtype=dtype, device=device)
        self.tanh_RC = torch.empty(chunk, dtype=dtype, device=device) if settings.softcap is not None else None
        head = isinstance(call.target, HeadTarget) and call.settings.soft_weight != 0
        self.t_RC = torch.empty(chunk, dtype=dtype, device=device) if head else None

    def _chunk_rows(self, rows: int, classes: int, device: torch.device) -> int:
        most = self.settings.chunk_rows
        if most is not None:
            return max(1, min(rows, most))
        elements = CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
        chunks = max(1, -(-rows // max(1, elements // classes)))
        return max(1, -(-rows // chunks))  # chunks of one size: a last one of few rows costs as much as a full one

    def _half_range(self) -> Tensor:
        """What brings the largest slope of a row to HALF_RANGE: shares of a mean are too small for float16."""
        shares, settings = self.call.shares, self.call.settings
        soft_N = shares.soft.abs() * (settings.soft_weight * settings.temperature)
        slope = (soft_N + shares.hard.abs() * settings.hard_weight).amax().to(self.dtype)
        return HALF_RANGE / slope.where(slope > 0, 1.0)

    def run(self) -> tuple[Tensor, Tensor, Tensor, LinearGradients]:
        for start in range(0, self.rows, self.step):
            part = slice(start, min(start + self.step, self.rows))
            self._chunk(part if self.counted is None else self.counted[part], part.stop - start)
        total, soft, hard, _ = reduce_rows(RowLosses(self.soft_N, self.hard_N, None), self.call)
        by = self.settings.scale if self.range is None else self.settings.scale / self.range
        gradients = LinearGradients(self.grad_ND, self.grad_CD, self.grad_C)
        for gradient in gradients:
            if gradient is not None and (self.range is not None or by != 1):
                gradient.mul_(by)
        return total, soft, hard, gradients

    def _chunk(self, rows: slice | Tensor, count: int) -> None:
        hidden_RD = self.hidden_ND[rows]
        if not self.half:
            hidden_RD = hidden_RD.to(self.dtype)
        z_RC = self._logits(hidden_RD, self.z_RC[:count])
        call = self._call_of(rows, count)
        if self.observe is not None:
            self.observe(rows, z_RC, call.target if call.settings.soft_weight != 0 else None)
        losses = self.rows_of(widened(z_RC, call.settings.temperature), call, want_grad=self.want_grad)
        self.soft_N[rows], self.hard_N[rows] = losses.soft, losses.hard
        if losses.grad is None:
            return
        g_RC = losses.grad.to(self.dtype)
        if self.tanh_RC is not None:  # 1 - tanh^2 is the slope of the cap
            g_RC.addcmul_(g_RC, self.tanh_RC[:count].square_(), value=-1.0)
        if self.range is not None:
            g_RC.mul_(self.range)
        if self.grad_C is not None:
            self.grad_C += g_RC.sum(0)
        if self.half:
            g_RC = g_RC.to(self.weight_CD.dtype)
        if self.grad_ND is not None:
            self.grad_ND[rows] = self._multiply(g_RC, self.weight_CD)
        if self.grad_CD is not None:
            if self.half:
                torch.addmm(self.grad_CD, g_RC.T, hidden_RD, out_dtype=self.dtype, out=self.grad_CD)
            else:
                self.grad_CD.addmm_(g_RC.T, hidden_RD)

    def _logits(self, hidden_RD: Tensor, z_RC: Tensor) -> Tensor:
        self._multiply(hidden_RD, self.weight_CD.T, z_RC)
        if self.bias_C is not None:
            z_RC.add_(self.bias_C)
        if self.settings.scale != 1:
            z_RC.mul_(self.settings.scale)
        if self.tanh_RC is not None:
            softcap = self.settings.softcap
            assert softcap is not None
            tanh_RC = torch.tanh(z_RC.mul_(1.0 / softcap), out=self.tanh_RC[: len(z_RC)])
            torch.mul(tanh_RC, softcap, out=z_RC)
        return z_RC

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b, the sums and the product in float32 or float64."""
        if a.dtype == self.dtype:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=self.dtype, out=out)

    def _call_of(self, rows: slice | Tensor, count: int) -> LossCall:
        """The call for the rows of a chunk."""
        call, shares = self.call, self.call.shares
        return replace(
            call,
            target=self._target_of(rows, count),
            labels=None if call.labels is None else call.labels[rows],
            shares=Shares(soft=shares.soft[rows], hard=shares.hard[rows], gaps=self.gaps),
        )

    def _target_of(self, rows: slice | Tensor, count: int) -> Target:
        """The target of a chunk; a head's logits are made here, as those of the student are."""
        target = self.call.target
        if self.call.settings.soft_weight == 0:
            return target  # nothing looks at it
        target = target.take(rows)
        if self.t_RC is None:
            return target
        assert isinstance(target, HeadTarget)
        t_RC, weight_CD, hidden_RD = self.t_RC[:count], target.weight, target.hidden
        same = hidden_RD.dtype == weight_CD.dtype and target.hidden_scale is None
        if same and (weight_CD.dtype == self.dtype or (weight_CD.is_cuda and weight_CD.dtype in _HALF)):
            self._multiply(hidden_RD, weight_CD.T, t_RC)
        else:
            hidden_RD = hidden_RD.to(self.dtype)
            if target.hidden_scale is not None:
                hidden_RD = hidden_RD * target.hidden_scale[:, None].to(self.dtype)
            # A part of the matrix at a time: a copy of all of it may be larger than a chunk.
            step = max(1, CHUNK_ELEMENTS // weight_CD.shape[1])
            for start in range(0, len(weight_CD), step):
                part = slice(start, start + step)
                t_RC[:, part] = torch.mm(hidden_RD, weight_CD[part].to(self.dtype).T)
        if target.bias is not None:
            t_RC.add_(target.bias)
        target.cap(t_RC)
        return DenseTarget(scaled_logits=t_RC, temperature=1.0, retemperable=True)
