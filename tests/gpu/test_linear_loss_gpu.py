"""The fused linear and distillation loss on a CUDA device: numbers of every type, memory, and no hidden waiting."""

import pytest
import torch

from softlabel.loss import linear_distillation_loss
from tests.loss.test_linear_loss import BOUNDS, HARD, KD, Case, compare

pytestmark = pytest.mark.gpu

# Two roundings more than on a CPU: the gradient of the logits goes into its products in half precision.
DEVICE_BOUNDS = {**BOUNDS, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense16", "int8", "topk", "sampled", "head", "head8", "hard"])
def test_numbers_of_every_type(device: str, kind: str, dtype: torch.dtype, impl: str) -> None:
    case = Case(kind, 40, 3000, 64, dtype)
    options = HARD if kind == "hard" else KD
    expected = case.expected(cap=20.0, **options)
    leaves = [one.to(device).requires_grad_() for one in case.given]
    target = None if case.target is None else case.target.to(device)
    rows = {name: one.to(device) for name, one in case.rows.items()}
    loss = linear_distillation_loss(
        *leaves, target, case.labels_N.to(device), **rows, **options, softcap=20.0, chunk_rows=16, impl=impl
    )
    loss.backward()
    compare([one.cpu() for one in (loss, *(one.grad for one in leaves))], expected, dtype, DEVICE_BOUNDS[dtype])
    assert leaves[0].grad[[0, 3]].eq(0).all()


def test_a_float16_mean_over_many_rows_does_not_vanish(device: str) -> None:
    """Shares of a mean over 65,536 rows are smaller than float16's numbers; a gradient scaler multiplies after them."""
    generator = torch.Generator().manual_seed(0)
    rows = 65_536 if device == "cuda" else 512
    given = [torch.randn(size, generator=generator).half() for size in ((rows, 16), (500, 16))]
    labels_N = torch.randint(0, 500, (rows,), generator=generator)
    exact = [one.double().requires_grad_() for one in given]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels_N).mul(2.0**16).backward()
    leaves = [one.to(device).requires_grad_() for one in given]
    loss = linear_distillation_loss(*leaves, None, None, labels_N.to(device), **{**HARD, "hard_weight": 1.0})
    loss.mul(2.0**16).backward()
    compare([one.grad.cpu() for one in leaves], [one.grad for one in exact], torch.float16, 5e-3)


def test_nothing_waits_where_every_row_counts(cuda: str) -> None:
    case = Case("dense16", 40, 3000, 64)
    leaves = [one.nan_to_num(0.0, 0.0).to(cuda).requires_grad_() for one in case.given]
    given = (*leaves, case.target.to(cuda), case.labels_N.to(cuda))
    linear_distillation_loss(*given, **KD).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_distillation_loss(*given, **KD).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_that_of_chunks(cuda: str) -> None:
    rows, classes, width = 4096, 65_536, 256
    hidden_ND = torch.randn(rows, width, device=cuda, dtype=torch.bfloat16).requires_grad_()
    weight_CD = torch.randn(classes, width, device=cuda, dtype=torch.bfloat16).requires_grad_()
    labels_N = torch.randint(0, classes, (rows,), device=cuda)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_distillation_loss(hidden_ND, weight_CD, None, None, labels_N, **HARD, chunk_rows=256).backward()
    extra = torch.cuda.max_memory_allocated() - before
    chunk, matrix = 256 * classes * 4, classes * width * 4
    assert extra < 4 * chunk + 2 * matrix < rows * classes * 2
