"""Which implementation computes the rows, and how its gradient is attached.

N rows, C classes. "auto" means: under `torch.compile`, what can be traced (the Triton operator on CUDA, the expressions
of `traced` elsewhere); else Triton kernels on CUDA where triton is installed, and `chunked` everywhere else.
"""

from __future__ import annotations  # dynamo of torch 2.9 cannot evaluate `X | None` inside a function

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.loss import chunked, reference, traced
from softlabel.loss.arguments import transforming
from softlabel.loss.attach import FusedLoss, TracedLoss, scale_by, tensors_of
from softlabel.loss.rows import LossCall, RowLosses, reduce_rows, work_dtype
from softlabel.loss.targets import blanked

__all__ = ["chunk_losses", "run_loss"]

HAS_TRITON = importlib.util.find_spec("triton") is not None  # looks for it, does not import it
Rows = Callable[..., RowLosses]
Losses = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


def run_loss(logits_NC: Tensor, call: LossCall, *, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """total (with its gradient), soft and hard: scalars, or (N,) with reduction "none"."""
    if transforming():
        if impl in ("compile", "triton"):
            raise UsageError(f"impl={impl!r}: has no rules for torch.func; use impl='reference' (or 'auto') there")
        return _transformed(logits_NC, call)
    if impl == "reference":
        return _reference(logits_NC, call)
    tracing = torch.compiler.is_compiling()
    if impl == "auto":
        impl = "triton" if logits_NC.device.type == "cuda" and HAS_TRITON else "torch"
    losses_of = _losses_of(impl, tracing)

    def compute(logits: Tensor, want_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return losses_of(logits, call, want_grad)

    if tracing:
        want_grad = torch.is_grad_enabled() and logits_NC.requires_grad
        if impl == "triton":
            return _traced_triton(logits_NC, call, want_grad)
        total, soft, hard, grad_NC = compute(logits_NC.detach(), want_grad)
        return (TracedLoss.apply(logits_NC, total, grad_NC) if want_grad else total), soft, hard
    parts = [getattr(call.target, name) for name in call.target.__slots__]
    inputs = tensors_of([call.labels, call.shares.soft, call.shares.hard, *parts])
    scale = _triton_scale() if impl == "triton" else scale_by
    result: tuple[Tensor, Tensor, Tensor] = FusedLoss.apply(logits_NC, compute, scale, *inputs)
    return result


def _reference(logits_NC: Tensor, call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    target, labels_N, shares, settings = call.target, call.labels, call.shares, call.settings
    # An empty sum ties the result to the logits, so that a loss without any term still has a gradient: zero.
    soft_N = hard_N = logits_NC[:0].to(reference.WORK).sum().expand(logits_NC.shape[0])
    if settings.soft_weight != 0:  # only rows that count are looked at, so that the others cannot leak their NaN
        counted = shares.soft.nonzero()[:, 0]
        rows = reference.soft_rows(logits_NC[counted], target.take(counted), settings.temperature, settings.tail)
        soft_N = soft_N.index_copy(0, counted, rows * shares.soft[counted])
    if settings.hard_weight != 0 and labels_N is not None:
        counted = shares.hard.nonzero()[:, 0]
        rows = reference.hard_rows(
            logits_NC[counted], labels_N[counted], settings.label_smoothing, settings.ignore_index
        )
        hard_N = hard_N.index_copy(0, counted, rows * shares.hard[counted])
    return _reduce(logits_NC, soft_N, hard_N, call)


def _transformed(logits_NC: Tensor, call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    """The reference without a choice of rows, which `torch.func.vmap` cannot make: those that do not count are blanked
    instead."""
    target, labels_N, shares, settings = call.target, call.labels, call.shares, call.settings
    soft_N = hard_N = logits_NC[:0].to(reference.WORK).sum().expand(logits_NC.shape[0])
    if settings.soft_weight != 0:
        counts_N = shares.soft != 0
        blank_NC = torch.where(counts_N[:, None], logits_NC, 0.0)
        rows = reference.soft_rows(blank_NC, blanked(target, counts_N), settings.temperature, settings.tail)
        soft_N = torch.where(counts_N, rows * shares.soft, 0.0)
    if settings.hard_weight != 0 and labels_N is not None:
        counts_N = shares.hard != 0
        blank_NC = torch.where(counts_N[:, None], logits_NC, 0.0)
        rows = reference.hard_rows(blank_NC, labels_N, settings.label_smoothing, settings.ignore_index)
        hard_N = torch.where(counts_N, rows * shares.hard, 0.0)
    return _reduce(logits_NC, soft_N, hard_N, call)


def _reduce(logits_NC: Tensor, soft_N: Tensor, hard_N: Tensor, call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    if call.reduction != "none":
        soft_N, hard_N = soft_N.sum(), hard_N.sum()
    total = call.settings.soft_weight * soft_N + call.settings.hard_weight * hard_N
    dtype = work_dtype(logits_NC)
    return total.to(dtype), soft_N.detach().to(dtype), hard_N.detach().to(dtype)


def chunk_losses(impl: str, device: torch.device) -> Rows:
    """What computes the losses of logits that nothing else needs: "auto", "torch" or "triton"."""
    if impl == "triton" or (impl == "auto" and device.type == "cuda" and HAS_TRITON):
        return _triton_rows()
    return functools.partial(chunked.row_losses, in_place=True)


def _losses_of(impl: str, tracing: bool) -> Losses:
    if impl == "triton":
        return functools.partial(_losses, _triton_rows())
    if tracing:
        return functools.partial(_losses, traced.row_losses)
    return _compiled() if impl == "compile" else functools.partial(_losses, chunked.row_losses)


def _losses(
    rows_of: Rows, logits_NC: Tensor, call: LossCall, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return reduce_rows(rows_of(logits_NC, call, want_grad=want_grad), call)


def _traced_triton(logits_NC: Tensor, call: LossCall, want_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    from softlabel.loss import triton_ops

    total_N, soft_N, hard_N = triton_ops.differentiable_losses(logits_NC, call, want_grad)
    soft_N, hard_N = soft_N * call.shares.soft, hard_N * call.shares.hard
    return (total_N, soft_N, hard_N) if call.reduction == "none" else (total_N.sum(), soft_N.sum(), hard_N.sum())


def _triton_rows() -> Rows:
    if not HAS_TRITON:
        raise UsageError("impl='triton': expected the package triton, found none; install it, or use impl='torch'")
    from softlabel.loss import triton_ops

    return triton_ops.row_losses


def _triton_scale() -> Callable[[Tensor, Tensor], Tensor]:
    from softlabel.loss import triton_ops

    return triton_ops.scale_by


@functools.cache
def _compiled() -> Losses:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in names):
        raise UsageError("impl='compile': expected a C++ compiler (g++, clang++ or $CXX), found none; use impl='torch'")
    # The reduction is compiled too: with it in the graph inductor keeps a row's exponentials in a small local buffer.
    compiled: Losses = torch.compile(functools.partial(_losses, traced.row_losses), fullgraph=True)
    return compiled
