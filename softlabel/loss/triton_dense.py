"""Triton kernels of the loss for a teacher of all classes: losses of the rows and the gradient in one launch.

N rows, C classes, R rows of a program, B classes of a block. `dense_row_kernel` holds R whole rows in registers and
reads them once; `dense_sweep_kernel` is for rows that do not fit and sweeps them twice, the second time in the cache.
One running maximum of z serves both temperatures, since max(z / T) = max(z) / T. W is float32, or float64 for float64
logits. Names as in `chunked`: x = z - max z, u = x / T.

The strides are constants, as the number of classes is: Triton then knows how far a row is aligned and reads 16 bytes at
a time, which it does only for multiples of 16 elements where a stride is an argument.

This module imports triton: only `triton_ops` imports it, when it is needed.
"""

# Kernels are compiled by triton, not run by Python: their arguments have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["dense_row_kernel", "dense_sweep_kernel", "load_shares", "safe_max", "scale_kernel", "store_hard"]


@triton.jit
def safe_max(top):
    """What to subtract from a row: its maximum, and nothing from a row of nothing but -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def load_shares(soft_scale_ptr, hard_scale_ptr, rows, GAPS: tl.constexpr, R: tl.constexpr):
    """The rows of this program, their scales, and which of their logits and targets may be read: a row that counts for
    nothing is not read at all, so that its NaN stays where it is."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    soft_scale = tl.load(soft_scale_ptr + row, mask=inside, other=0.0)
    hard_scale = tl.load(hard_scale_ptr + row, mask=inside, other=0.0)
    read_z = inside
    read_t = inside
    if GAPS:
        read_z = inside & ((soft_scale != 0) | (hard_scale != 0))
        read_t = inside & (soft_scale != 0)
    return row, inside, soft_scale, hard_scale, read_z, read_t


@triton.jit
def _load_z(logits_ptr, row, col, stride, live, read_z, W: tl.constexpr):
    z = tl.load(logits_ptr + row[:, None] * stride + col[None, :], mask=live & read_z[:, None], other=0.0).to(W)
    return tl.where(live, z, -float("inf"))


@triton.jit
def _load_t(
    teacher_ptr, scale_ptr, offset_ptr, top_index_ptr, top_value_ptr, row, col, stride, live, read_t, factor,
    INT8: tl.constexpr, TOP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The teacher's logits at the loss's temperature; 0 in rows that are not read, -inf outside of the row."""
    read = live & read_t[:, None]
    t = tl.load(teacher_ptr + row[:, None] * stride + col[None, :], mask=read, other=0).to(W)
    if INT8:
        scale = tl.load(scale_ptr + row, mask=read_t, other=0.0).to(W)
        offset = tl.load(offset_ptr + row, mask=read_t, other=0.0).to(W)
        t = t * scale[:, None] + offset[:, None]
        for j in tl.static_range(TOP):
            index = tl.load(top_index_ptr + row * TOP + j, mask=read_t, other=-1).to(tl.int32)
            value = tl.load(top_value_ptr + row * TOP + j, mask=read_t, other=0.0).to(W)
            t = tl.where(col[None, :] == index[:, None], value[:, None], t)
    return tl.where(live, t * factor, -float("inf"))


@triton.jit
def store_hard(
    hard_ptr, logits_ptr, labels_ptr, row, inside, read_z, hard_scale, classes: tl.constexpr, stride, top_z,
    sum_1, sum_x, smoothing, ignore_index, W: tl.constexpr,
):  # fmt: skip
    """Stores the hard losses and returns the labels."""
    label = tl.load(labels_ptr + row, mask=inside, other=0).to(tl.int64)
    labelled = inside & (label != ignore_index) & read_z
    known = (label >= 0) & (label < classes)
    z_label = tl.load(logits_ptr + row * stride + label, mask=labelled & known, other=0.0).to(W)
    hard = tl.log(sum_1)
    if smoothing < 1:
        hard -= (1.0 - smoothing) * (z_label - top_z)
    if smoothing > 0:
        hard -= smoothing * (sum_x / classes)
    # A label that is no class cannot raise on the device: it makes the loss NaN.
    hard = tl.where(known, hard, float("nan"))
    tl.store(hard_ptr + row, tl.where(labelled & (hard_scale != 0), hard, 0.0), mask=inside)
    return label


@triton.jit
def _store_grad(
    grad_ptr, row, col, live, classes, e_1, e_q, e_p, by_1, by_q, by_p, even, by_label, label,
    SOFT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    if SOFT:
        grad = e_q * by_q[:, None] - e_p * by_p[:, None]
        if HARD:
            grad += e_1 * by_1[:, None] - even[:, None]
            grad -= tl.where(col[None, :] == label[:, None], by_label[:, None], 0.0)
    elif HARD:
        grad = e_1 * by_1[:, None] - even[:, None]
        grad -= tl.where(col[None, :] == label[:, None], by_label[:, None], 0.0)
    else:
        grad = e_q * 0.0
    tl.store(grad_ptr + row[:, None] * classes + col[None, :], grad.to(grad_ptr.dtype.element_ty), mask=live)


@triton.jit
def dense_row_kernel(
    logits_ptr, teacher_ptr, scale_ptr, offset_ptr, top_index_ptr, top_value_ptr, labels_ptr, soft_scale_ptr,
    hard_scale_ptr, soft_ptr, hard_ptr, grad_ptr, rows, classes: tl.constexpr, logits_stride: tl.constexpr,
    teacher_stride: tl.constexpr, temperature, factor, smoothing, ignore_index,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, GAPS: tl.constexpr, GRAD: tl.constexpr,
    INT8: tl.constexpr, TOP: tl.constexpr, R: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    per_t = 1.0 / temperature
    row, inside, soft_scale, hard_scale, read_z, read_t = load_shares(soft_scale_ptr, hard_scale_ptr, rows, GAPS, R)
    col = tl.arange(0, B)
    live = inside[:, None] & (col < classes)[None, :]
    z = _load_z(logits_ptr, row, col, logits_stride, live, read_z, W)
    top_z = safe_max(tl.max(z, axis=1))
    x = z - top_z[:, None]
    u = x * per_t
    e_1 = x
    e_q = x
    e_p = x
    sum_1 = tl.full((R,), 1.0, W)
    sum_q = tl.full((R,), 1.0, W)
    sum_p = tl.full((R,), 1.0, W)
    label = tl.full((R,), -1, tl.int64)
    if HARD:
        e_1 = tl.exp(x)
        sum_1 = tl.sum(e_1, axis=1)
        sum_x = tl.zeros((R,), W)
        if SMOOTH:
            sum_x = tl.sum(tl.where(live, x, 0.0), axis=1)
        label = store_hard(
            hard_ptr, logits_ptr, labels_ptr, row, inside, read_z, hard_scale, classes, logits_stride, top_z, sum_1,
            sum_x, smoothing, ignore_index, W,
        )  # fmt: skip
    if SOFT:
        t = _load_t(
            teacher_ptr, scale_ptr, offset_ptr, top_index_ptr, top_value_ptr, row, col, teacher_stride, live, read_t,
            factor, INT8, TOP, W,
        )  # fmt: skip
        t -= safe_max(tl.max(t, axis=1))[:, None]
        e_q = tl.exp(u)
        e_p = tl.exp(t)
        sum_q = tl.sum(e_q, axis=1)
        sum_p = tl.sum(e_p, axis=1)
        soft = tl.sum(tl.where(e_p == 0, 0.0, e_p * (t - u)), axis=1) / sum_p + tl.log(sum_q) - tl.log(sum_p)
        tl.store(soft_ptr + row, tl.where(read_t, soft * temperature * temperature, 0.0), mask=inside)
    if GRAD:
        slope = soft_scale * temperature
        _store_grad(
            grad_ptr, row, col, live, classes, e_1, e_q, e_p, hard_scale / sum_1, slope / sum_q, slope / sum_p,
            hard_scale * smoothing / classes, hard_scale * (1.0 - smoothing), label, SOFT, HARD,
        )  # fmt: skip


@triton.jit
def dense_sweep_kernel(
    logits_ptr, teacher_ptr, scale_ptr, offset_ptr, top_index_ptr, top_value_ptr, labels_ptr, soft_scale_ptr,
    hard_scale_ptr, soft_ptr, hard_ptr, grad_ptr, rows, classes: tl.constexpr, logits_stride: tl.constexpr,
    teacher_stride: tl.constexpr, temperature, factor, smoothing, ignore_index,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, GAPS: tl.constexpr, GRAD: tl.constexpr,
    INT8: tl.constexpr, TOP: tl.constexpr, R: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    per_t = 1.0 / temperature
    row, inside, soft_scale, hard_scale, read_z, read_t = load_shares(soft_scale_ptr, hard_scale_ptr, rows, GAPS, R)
    # Maxima so far, and sums against them. A sum has a place for every class of a block until the row has been read:
    # adding up across threads costs more than the exponentials, so that only the maxima do it in every block.
    top_z = tl.full((R,), -float("inf"), W)
    top_t = tl.full((R,), -float("inf"), W)
    sum_1 = tl.zeros((R, B), W)
    sum_q = tl.zeros((R, B), W)
    sum_p = tl.zeros((R, B), W)
    sum_x = tl.zeros((R, B), W)
    cross = tl.zeros((R, B), W)  # sum of e^t (t - u)
    for start in range(0, classes, B):
        col = start + tl.arange(0, B)
        live = inside[:, None] & (col < classes)[None, :]
        z = _load_z(logits_ptr, row, col, logits_stride, live, read_z, W)
        new_z = tl.maximum(top_z, tl.max(z, axis=1))
        move_z = safe_max(top_z) - safe_max(new_z)
        x = z - safe_max(new_z)[:, None]
        if HARD:
            sum_1 = sum_1 * tl.exp(move_z)[:, None] + tl.exp(x)
            if SMOOTH:
                sum_x += (move_z * (start // B))[:, None] + tl.where(live, x, 0.0)
        if SOFT:
            u = x * per_t
            sum_q = sum_q * tl.exp(move_z * per_t)[:, None] + tl.exp(u)
            t = _load_t(
                teacher_ptr, scale_ptr, offset_ptr, top_index_ptr, top_value_ptr, row, col, teacher_stride, live,
                read_t, factor, INT8, TOP, W,
            )  # fmt: skip
            new_t = tl.maximum(top_t, tl.max(t, axis=1))
            move_t = safe_max(top_t) - safe_max(new_t)
            t -= safe_max(new_t)[:, None]
            e_p = tl.exp(t)
            # What was summed before is measured against the new maxima, then faded.
            moved = tl.where(sum_p == 0, 0.0, sum_p * (move_t - move_z * per_t)[:, None])
            cross = (cross + moved) * tl.exp(move_t)[:, None] + tl.where(e_p == 0, 0.0, e_p * (t - u))
            sum_p = sum_p * tl.exp(move_t)[:, None] + e_p
            top_t = new_t
        top_z = new_z
    sum_1 = tl.sum(sum_1, axis=1)
    sum_q = tl.sum(sum_q, axis=1)
    sum_p = tl.sum(sum_p, axis=1)
    sum_x = tl.sum(sum_x, axis=1)
    cross = tl.sum(cross, axis=1)
    top_z = safe_max(top_z)
    top_t = safe_max(top_t)
    label = tl.full((R,), -1, tl.int64)
    if HARD:
        label = store_hard(
            hard_ptr, logits_ptr, labels_ptr, row, inside, read_z, hard_scale, classes, logits_stride, top_z, sum_1,
            sum_x, smoothing, ignore_index, W,
        )  # fmt: skip
    if SOFT:
        soft = cross / sum_p + tl.log(sum_q) - tl.log(sum_p)
        tl.store(soft_ptr + row, tl.where(read_t, soft * temperature * temperature, 0.0), mask=inside)
    if GRAD:
        slope = soft_scale * temperature
        for start in range(0, classes, B):
            col = start + tl.arange(0, B)
            live = inside[:, None] & (col < classes)[None, :]
            x = _load_z(logits_ptr, row, col, logits_stride, live, read_z, W) - top_z[:, None]
            e_1 = x
            e_q = x
            e_p = x
            if HARD:
                e_1 = tl.exp(x)
            if SOFT:
                e_q = tl.exp(x * per_t)
                t = _load_t(
                    teacher_ptr, scale_ptr, offset_ptr, top_index_ptr, top_value_ptr, row, col, teacher_stride, live,
                    read_t, factor, INT8, TOP, W,
                )  # fmt: skip
                e_p = tl.exp(t - top_t[:, None])
            _store_grad(
                grad_ptr, row, col, live, classes, e_1, e_q, e_p, hard_scale / sum_1, slope / sum_q, slope / sum_p,
                hard_scale * smoothing / classes, hard_scale * (1.0 - smoothing), label, SOFT, HARD,
            )  # fmt: skip


@triton.jit
def scale_kernel(grad_ptr, upstream_ptr, size, classes, EACH_ROW: tl.constexpr, B: tl.constexpr):
    """grad *= upstream in place, without the host knowing its value. Where it is 1 nothing is read or written, which is
    why few programs go over everything."""
    first = tl.program_id(0).to(tl.int64) * B
    step = tl.num_programs(0).to(tl.int64) * B
    if EACH_ROW:
        for start in range(first, size, step):
            at = start + tl.arange(0, B)
            inside = at < size
            by = tl.load(upstream_ptr + at // classes, mask=inside, other=1.0)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
            tl.store(grad_ptr + at, (grad * by).to(grad_ptr.dtype.element_ty), mask=inside)
    else:
        whole = tl.load(upstream_ptr)
        if whole != 1.0:
            for start in range(first, size, step):
                at = start + tl.arange(0, B)
                inside = at < size
                grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
                tl.store(grad_ptr + at, (grad * whole).to(grad_ptr.dtype.element_ty), mask=inside)
