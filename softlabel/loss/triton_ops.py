"""The Triton kernels as operators of torch: shapes for the compiler, a rule for autograd, launches that fit the row.

N rows, C classes, K kept or drawn classes. `softlabel::dense_rows` and `softlabel::kept_rows` return what a row adds to
the total, its soft and hard loss, and the gradient; only the first is differentiable, and only in the logits. Eager
code calls them below autograd, through `FusedLoss`; a compiled model calls them as they are and keeps one graph.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from softlabel.errors import UsageError
from softlabel.loss.reference import scaled_logits
from softlabel.loss.rows import LossCall, RowLosses, Shares, kept_probs, work_dtype
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, TopKTarget
from softlabel.loss.triton_dense import dense_row_kernel, dense_sweep_kernel, scale_kernel
from softlabel.loss.triton_kept import kept_kernel

__all__ = ["dense_rows", "kept_rows", "row_losses", "scale_by"]

ROW_LIMIT = 16384  # classes that one program holds in registers
TILE = 2048  # elements of the rows that share a program
SWEEP = 2048  # classes of a block of a sweep
SCALE_PROGRAMS = 2048  # enough to fill a device
HEAD_ELEMENTS = 2**26  # logits of a head target that exist at a time
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Launched = tuple[Tensor, Tensor, Tensor]


def row_losses(logits_NC: Tensor, call: LossCall, *, want_grad: bool) -> RowLosses:
    if isinstance(call.target, HeadTarget) and call.settings.soft_weight != 0:
        return _head_losses(logits_NC, call.target, call, want_grad)
    soft_N, hard_N, grad_NC = _launch(_EAGER, logits_NC, call, want_grad)
    return RowLosses(soft_N, hard_N, grad_NC if want_grad else None)


def differentiable_losses(logits_NC: Tensor, call: LossCall, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) each: what the rows add to the total, by the operator's own autograd rule; soft and hard losses."""
    if isinstance(call.target, HeadTarget):
        call = _with_rows(call, scaled_logits(call.target, work_dtype(logits_NC)), call.labels, call.shares)
    outputs: Outputs = _launch(_TRACED, logits_NC, call, want_grad)
    return outputs[:3]


def _with_rows(call: LossCall, scaled_RC: Tensor, labels_R: Tensor | None, shares: Shares) -> LossCall:
    """The call for a head target's rows, whose scaled logits are computed."""
    dense = DenseTarget(scaled_logits=scaled_RC, temperature=1.0, retemperable=True)
    return LossCall(target=dense, labels=labels_R, shares=shares, settings=call.settings, reduction=call.reduction)


def _head_losses(logits_NC: Tensor, target: HeadTarget, call: LossCall, want_grad: bool) -> RowLosses:
    """The teacher's logits come from a matrix product, a block of rows at a time."""
    rows, classes = logits_NC.shape
    step = max(1, HEAD_ELEMENTS // max(classes, 1))
    dtype = work_dtype(logits_NC)
    soft_N = torch.zeros(rows, dtype=dtype, device=logits_NC.device)
    hard_N = torch.zeros_like(soft_N)
    grad_NC = torch.empty((rows, classes), dtype=logits_NC.dtype, device=logits_NC.device) if want_grad else None
    for start in range(0, rows, step):
        part = slice(start, start + step)
        shares = Shares(soft=call.shares.soft[part], hard=call.shares.hard[part], gaps=call.shares.gaps)
        labels_R = None if call.labels is None else call.labels[part]
        rows_call = _with_rows(call, scaled_logits(target.take(part), dtype), labels_R, shares)
        soft_N[part], hard_N[part], grad = _launch(_EAGER, logits_NC[part], rows_call, want_grad)
        if grad_NC is not None:
            if step >= rows:
                return RowLosses(soft_N, hard_N, grad)
            grad_NC[part] = grad
    return RowLosses(soft_N, hard_N, grad_NC)


def _launch(
    kernels: "tuple[Callable[..., Any], Callable[..., Any]]", logits_NC: Tensor, call: LossCall, want_grad: bool
) -> Any:
    """What `kernels`, a way to run the dense ones and one to run the sparse one, gives for this call's target."""
    dense, sparse = kernels
    target, labels_N, shares, settings = call.target, call.labels, call.shares, call.settings
    soft, hard = settings.soft_weight != 0, settings.hard_weight != 0 and labels_N is not None
    soft_scale_N = shares.soft * settings.soft_weight
    hard_scale_N = shares.hard * (settings.hard_weight if hard else 0.0)
    gaps = shares.gaps or not soft
    labels_N = labels_N if hard else None
    numbers = (settings.temperature, settings.label_smoothing, settings.ignore_index, gaps, want_grad)
    if not soft:
        return dense(logits_NC, None, None, None, None, None, labels_N, soft_scale_N, hard_scale_N, 1.0, *numbers)
    if isinstance(target, (TopKTarget, SampledTarget)):
        kept = kept_probs(target, settings, work_dtype(logits_NC))
        drawn = isinstance(target, SampledTarget)
        mode = "drawn" if drawn else settings.tail if target.index.shape[1] < target.num_classes else "renormalize"
        parts = [_ids(target.index), *(part.contiguous() for part in kept[:4])]
        return sparse(logits_NC, *parts, labels_N, soft_scale_N, hard_scale_N, mode, *numbers)
    scales = (labels_N, soft_scale_N, hard_scale_N, settings.factor)
    if isinstance(target, Int8Target):
        row = (target.scale, target.offset, _ids(target.top_index), target.top_value.contiguous())
        return dense(logits_NC, target.q, *row, *scales, *numbers)
    assert isinstance(target, DenseTarget)
    return dense(logits_NC, target.scaled_logits, None, None, None, None, *scales, *numbers)


def _ids(index: Tensor) -> Tensor:
    """Class ids as the kernels read them: signed, so that -1 is no class."""
    return (index if index.dtype in (torch.int32, torch.int64) else index.to(torch.int32)).contiguous()


@torch.library.custom_op("softlabel::dense_rows", mutates_args=())
def dense_rows(
    logits: Tensor,
    teacher: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    top_index: Tensor | None,
    top_value: Tensor | None,
    labels: Tensor | None,
    soft_scale: Tensor,
    hard_scale: Tensor,
    factor: float,
    temperature: float,
    smoothing: float,
    ignore_index: int,
    gaps: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = (teacher, scale, offset, top_index, top_value, labels, soft_scale, hard_scale)
    soft, hard, grad = _launch_dense(logits, *row, factor, temperature, smoothing, ignore_index, gaps, want_grad)
    return soft * soft_scale + hard * hard_scale, soft, hard, grad


def _launch_dense(
    logits: Tensor,
    teacher: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    top_index: Tensor | None,
    top_value: Tensor | None,
    labels: Tensor | None,
    soft_scale: Tensor,
    hard_scale: Tensor,
    factor: float,
    temperature: float,
    smoothing: float,
    ignore_index: int,
    gaps: bool,
    want_grad: bool,
) -> Launched:
    """What the operator does, without the operator's cost on the host, which is several times that of a launch."""
    logits = _rows_contiguous(logits)
    teacher = None if teacher is None else _rows_contiguous(teacher)
    rows, classes = logits.shape
    soft, hard, grad = _empty_outputs(logits, want_grad)
    if rows:
        one_block = classes <= ROW_LIMIT
        block = triton.next_power_of_2(classes) if one_block else SWEEP
        per_program = max(1, TILE // block) if one_block else 1
        kernel = dense_row_kernel if one_block else dense_sweep_kernel
        with _device(logits):
            kernel[(triton.cdiv(rows, per_program),)](
                logits, teacher, scale, offset, top_index, top_value, labels, soft_scale, hard_scale, soft, hard,
                grad, rows, classes, logits.stride(0), 0 if teacher is None else teacher.stride(0), temperature,
                factor, smoothing, ignore_index,
                SOFT=teacher is not None, HARD=labels is not None, SMOOTH=smoothing > 0, GAPS=gaps, GRAD=want_grad,
                INT8=scale is not None, TOP=0 if top_index is None else top_index.shape[1], R=per_program, B=block,
                W=_work(logits), num_warps=_warps(per_program * block) if one_block else 8,
            )  # fmt: skip
    return soft, hard, grad


@torch.library.custom_op("softlabel::kept_rows", mutates_args=())
def kept_rows(
    logits: Tensor,
    index: Tensor,
    p: Tensor,
    log_p: Tensor,
    rest: Tensor,
    log_rest: Tensor,
    labels: Tensor | None,
    soft_scale: Tensor,
    hard_scale: Tensor,
    mode: str,
    temperature: float,
    smoothing: float,
    ignore_index: int,
    gaps: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = (index, p, log_p, rest, log_rest, labels, soft_scale, hard_scale)
    soft, hard, grad = _launch_kept(logits, *row, mode, temperature, smoothing, ignore_index, gaps, want_grad)
    return soft * soft_scale + hard * hard_scale, soft, hard, grad


def _launch_kept(
    logits: Tensor,
    index: Tensor,
    p: Tensor,
    log_p: Tensor,
    rest: Tensor,
    log_rest: Tensor,
    labels: Tensor | None,
    soft_scale: Tensor,
    hard_scale: Tensor,
    mode: str,
    temperature: float,
    smoothing: float,
    ignore_index: int,
    gaps: bool,
    want_grad: bool,
) -> Launched:
    logits = _rows_contiguous(logits)
    (rows, classes), kept = logits.shape, index.shape[1]
    soft, hard, grad = _empty_outputs(logits, want_grad)
    if rows:
        block = min(triton.next_power_of_2(classes), SWEEP)
        width = triton.next_power_of_2(kept)
        per_program = max(1, TILE // max(block, width))
        with _device(logits):
            kept_kernel[(triton.cdiv(rows, per_program),)](
                logits, index, p, log_p, rest, log_rest, labels, soft_scale, hard_scale, soft, hard, grad, rows,
                classes, kept, logits.stride(0), temperature, smoothing, ignore_index,
                HARD=labels is not None, GAPS=gaps, GRAD=want_grad, GHOST=mode == "ghost", UNIFORM=mode == "uniform",
                DRAWN=mode == "drawn", R=per_program, B=block, K=width, W=_work(logits),
                num_warps=_warps(per_program * block),
            )  # fmt: skip
    return soft, hard, grad


_EAGER = (_launch_dense, _launch_kept)
_TRACED = (dense_rows, kept_rows)


def _fake(logits: Tensor, *arguments: Any) -> Outputs:
    per_row = [logits.new_empty(logits.shape[0], dtype=work_dtype(logits)) for _ in range(3)]
    return (*per_row, logits.new_empty(logits.shape if arguments[-1] else (0, 0)))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.save_for_backward(output[3])
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return grad * upstream[:, None].to(grad.dtype), *([None] * (ctx.arguments - 1))


for _operator in (dense_rows, kept_rows):
    _operator.register_fake(_fake)
    _operator.register_autograd(_backward, setup_context=_setup_context)


def scale_by(grad_NC: Tensor, upstream: Tensor) -> Tensor:
    """grad * upstream (a scalar or (N,)) in place; the host does not wait to learn whether it is 1."""
    if grad_NC.numel():
        with _device(grad_NC):
            programs = min(triton.cdiv(grad_NC.numel(), TILE), SCALE_PROGRAMS)
            scale_kernel[(programs,)](
                grad_NC, upstream.contiguous(), grad_NC.numel(), grad_NC.shape[1], EACH_ROW=upstream.dim() == 1, B=TILE
            )
    return grad_NC


def _empty_outputs(logits: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    soft = torch.zeros(logits.shape[0], dtype=work_dtype(logits), device=logits.device)
    grad = torch.empty(logits.shape if want_grad else (0, 0), dtype=logits.dtype, device=logits.device)
    return soft, torch.zeros_like(soft), grad


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _work(logits: Tensor) -> Any:
    return tl.float64 if logits.dtype == torch.float64 else tl.float32


def _warps(elements: int) -> int:
    return 4 if elements <= 2048 else 8 if elements <= 4096 else 16


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if not isinstance(dense_row_kernel, InterpretedFunction):
        raise UsageError(
            f"impl='triton': expected tensors on a CUDA device, found {tensor.device}; use impl='auto', or set "
            f"TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    return contextlib.nullcontext()
