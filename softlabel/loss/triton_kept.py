"""The Triton kernel of the loss for a teacher of K classes a row (top-k or drawn), which reads O(K) of the teacher.

N rows, C classes, R rows of a program, B classes of a block, K kept classes padded to a power of two. The student's row
is swept twice, whatever its length: the second sweep is served by the cache. The gradient of the K classes is written
after everything else of the row. W is float32, or float64 for float64 logits.

This module imports triton: only `triton_ops` imports it, when it is needed.
"""

# Kernels are compiled by triton, not run by Python: their arguments have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

from softlabel.loss.triton_dense import load_shares, safe_max, store_hard

__all__ = ["kept_kernel"]

# Below this share of the whole, what is left of a float64 sum after subtracting the kept classes is recomputed by
# leaving them out one by one: rare, and K times as slow.
LEAST_REST = tl.constexpr(1e-10)


@triton.jit
def _load(logits_ptr, row, col, stride, live, read_z, W: tl.constexpr):
    z = tl.load(logits_ptr + row[:, None] * stride + col[None, :], mask=live & read_z[:, None], other=0.0).to(W)
    return tl.where(live, z, -float("inf"))


@triton.jit
def _rest_one_by_one(
    logits_ptr, index_ptr, row, inside, read_z, read_t, classes: tl.constexpr, kept: tl.constexpr, stride, per_t,
    R: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Maximum of the classes outside of the kept, and sum of e^(z / T) against it."""
    top = tl.full((R,), -float("inf"), W)
    total = tl.zeros((R,), W)
    for start in range(0, classes, B):
        col = start + tl.arange(0, B)
        live = inside[:, None] & (col < classes)[None, :]
        z = _load(logits_ptr, row, col, stride, live, read_z, W)
        for j in range(kept):
            taken = tl.load(index_ptr + row * kept + j, mask=read_t, other=-1)
            z = tl.where(col[None, :] == taken[:, None], -float("inf"), z)
        new = tl.maximum(top, tl.max(z, axis=1))
        move = (safe_max(top) - safe_max(new)) * per_t
        total = total * tl.exp(move) + tl.sum(tl.exp((z - safe_max(new)[:, None]) * per_t), axis=1)
        top = new
    return safe_max(top), total


@triton.jit
def kept_kernel(
    logits_ptr, index_ptr, p_ptr, log_p_ptr, rest_ptr, log_rest_ptr, labels_ptr, soft_scale_ptr, hard_scale_ptr,
    soft_ptr, hard_ptr, grad_ptr, rows, classes: tl.constexpr, kept: tl.constexpr, logits_stride: tl.constexpr,
    temperature, smoothing, ignore_index,
    HARD: tl.constexpr, GAPS: tl.constexpr, GRAD: tl.constexpr, GHOST: tl.constexpr, UNIFORM: tl.constexpr,
    DRAWN: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    per_t = 1.0 / temperature
    row, inside, soft_scale, hard_scale, read_z, read_t = load_shares(soft_scale_ptr, hard_scale_ptr, rows, GAPS, R)
    nth = tl.arange(0, K)
    named = read_t[:, None] & (nth < kept)[None, :]
    at = row[:, None] * kept + nth[None, :]
    index = tl.load(index_ptr + at, mask=named, other=0).to(tl.int64)
    p = tl.load(p_ptr + at, mask=named, other=0.0)
    log_p = tl.load(log_p_ptr + at, mask=named, other=0.0)
    rest = tl.load(rest_ptr + row, mask=read_t, other=0.0)
    log_rest = tl.load(log_rest_ptr + row, mask=read_t, other=0.0)
    z_kept = tl.load(logits_ptr + row[:, None] * logits_stride + index, mask=named, other=-float("inf")).to(W)

    top_z = tl.full((R,), -float("inf"), W)
    sum_1 = tl.zeros((R,), W)
    sum_q = tl.zeros((R,), W)
    sum_x = tl.zeros((R,), W)  # over the classes that are not -inf, which `masked` counts
    masked = tl.zeros((R,), W)
    rest_64 = tl.zeros((R,), tl.float64)
    for start in range(0, classes, B):
        col = start + tl.arange(0, B)
        live = inside[:, None] & (col < classes)[None, :]
        z = _load(logits_ptr, row, col, logits_stride, live, read_z, W)
        new_z = tl.maximum(top_z, tl.max(z, axis=1))
        base = safe_max(new_z)
        move = safe_max(top_z) - base
        x = z - base[:, None]
        e_q = tl.exp(x * per_t)
        sum_q = sum_q * tl.exp(move * per_t) + tl.sum(e_q, axis=1)
        if HARD:
            sum_1 = sum_1 * tl.exp(move) + tl.sum(tl.exp(x), axis=1)
        sum_x += move * (start - masked) + tl.sum(tl.where(z > -float("inf"), x, 0.0), axis=1)
        masked += tl.sum((live & (z == -float("inf"))).to(W), axis=1)
        if GHOST:
            # 1 - sum of the kept cancels in float32. The same exponentials, summed and subtracted in float64, do not.
            here = named & (index >= start) & (index < start + B)
            e_kept = tl.where(here, tl.exp((z_kept - base[:, None]) * per_t), 0.0)
            block_64 = tl.sum(e_q.to(tl.float64), axis=1) - tl.sum(e_kept.to(tl.float64), axis=1)
            rest_64 = rest_64 * tl.exp((move * per_t).to(tl.float64)) + block_64
        top_z = new_z
    top_z = safe_max(top_z)

    log_sum = tl.log(sum_q)  # against top_z / T
    x_kept = z_kept - top_z[:, None]
    log_q = x_kept * per_t - log_sum[:, None]
    soft = tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)), axis=1)
    slope = soft_scale * temperature
    mass = tl.full((R,), 1.0, W)
    each = tl.zeros((R,), W)
    top_rest = top_z
    by_rest = slope / sum_q  # what e^((z - top_rest) / T) is multiplied by outside of the kept classes
    if DRAWN:
        mass = tl.sum(p, axis=1)
        by_rest = slope * mass / sum_q
    if GHOST:
        sum_rest = rest_64.to(W)
        thin = read_t & (rest != 0) & (sum_rest < sum_q * LEAST_REST)
        if tl.max(thin.to(tl.int32), axis=0) > 0:
            top_rest, sum_rest = _rest_one_by_one(
                logits_ptr, index_ptr, row, inside, read_z, read_t, classes, kept, logits_stride, per_t, R, B, W
            )
        log_q_rest = tl.log(sum_rest) + (top_rest - top_z) * per_t - log_sum
        soft += tl.where(rest == 0, 0.0, rest * (log_rest - log_q_rest))
        share = tl.exp((top_rest - top_z) * per_t - log_sum)
        by_rest = slope * (share - tl.where(rest == 0, 0.0, rest / sum_rest))
    if UNIFORM:
        others = classes - kept
        each = rest / others
        finite = named & (z_kept > -float("inf"))
        outside = sum_x - tl.sum(tl.where(finite, x_kept, 0.0), axis=1)
        hidden = masked - tl.sum((named & (z_kept == -float("inf"))).to(W), axis=1)
        outside = tl.where(hidden > 0, -float("inf"), outside)
        log_q_sum = outside * per_t - others * log_sum
        soft += tl.where(
            rest == 0, 0.0, rest * log_rest - rest * tl.log(tl.zeros_like(rest) + others) - each * log_q_sum
        )
    tl.store(soft_ptr + row, tl.where(read_t, soft * temperature * temperature, 0.0), mask=inside)
    label = tl.full((R,), -1, tl.int64)
    if HARD:
        sum_all = tl.where(masked > 0, -float("inf"), sum_x)
        label = store_hard(
            hard_ptr, logits_ptr, labels_ptr, row, inside, read_z, hard_scale, classes, logits_stride, top_z, sum_1,
            sum_all, smoothing, ignore_index, W,
        )  # fmt: skip

    if GRAD:
        even = hard_scale * smoothing / classes
        by_label = hard_scale * (1.0 - smoothing)
        for start in range(0, classes, B):
            col = start + tl.arange(0, B)
            live = inside[:, None] & (col < classes)[None, :]
            z = _load(logits_ptr, row, col, logits_stride, live, read_z, W)
            grad = tl.exp((z - top_rest[:, None]) * per_t) * by_rest[:, None] - (slope * each)[:, None]
            if HARD:
                grad += tl.exp(z - top_z[:, None]) * (hard_scale / sum_1)[:, None] - even[:, None]
                grad -= tl.where(col[None, :] == label[:, None], by_label[:, None], 0.0)
            tl.store(grad_ptr + row[:, None] * classes + col[None, :], grad.to(grad_ptr.dtype.element_ty), mask=live)
        if DRAWN:
            # A class drawn twice: both draws write the same sum to the same place.
            p = tl.zeros((R, K), W)
            for j in range(kept):
                other = tl.load(index_ptr + row * kept + j, mask=read_t, other=-1).to(tl.int64)
                weight = tl.load(p_ptr + row * kept + j, mask=read_t, other=0.0)
                p += tl.where(index == other[:, None], weight[:, None], 0.0)
        grad_kept = slope[:, None] * (tl.exp(log_q) * mass[:, None] - p)
        if HARD:
            grad_kept += tl.exp(x_kept) * (hard_scale / sum_1)[:, None] - even[:, None]
            grad_kept -= tl.where(index == label[:, None], by_label[:, None], 0.0)
        # After every thread of the program has written its part of the row, the K classes are written over it.
        tl.debug_barrier()
        tl.store(grad_ptr + row[:, None] * classes + index, grad_kept.to(grad_ptr.dtype.element_ty), mask=named)
