"""What the loss promises on a CUDA device. `tests/loss/triton_interpreter.py` compares values with the reference."""

import pytest
import torch
from torch import Tensor

from softlabel.loss import DenseTarget, distillation_loss
from tests.benchmarks.bench_loss_gpu import as_graph

pytestmark = pytest.mark.gpu

OPTIONS = {"temperature": 4.0, "soft_weight": 0.9, "hard_weight": 0.1, "impl": "triton"}


class Step:
    """A loss and its gradient, over and over."""

    def __init__(self, device: str, rows: int = 512, classes: int = 1000) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student_NC = torch.randn(rows, classes, generator=generator).to(device).requires_grad_()
        teacher_NC = torch.randn(rows, classes, generator=generator).to(device, torch.float16)
        self.labels_N = torch.randint(0, classes, (rows,), generator=generator).to(device)
        self.target = DenseTarget(scaled_logits=teacher_NC, temperature=4.0, retemperable=False)

    def __call__(self) -> Tensor:
        self.student_NC.grad = None
        distillation_loss(self.student_NC, self.target, self.labels_N, **OPTIONS).backward()  # type: ignore[arg-type]
        assert self.student_NC.grad is not None
        return self.student_NC.grad


def test_repeats_are_bit_identical(device: str) -> None:
    step = Step(device) if device == "cuda" else Step(device, rows=3, classes=40)
    first = step().clone()
    assert all(torch.equal(step(), first) for _ in range(1000 if device == "cuda" else 3))


def test_nothing_waits_for_the_device(cuda: str) -> None:
    step = Step(cuda)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        distillation_loss(step.student_NC, step.target, step.labels_N, **OPTIONS).mul(3.0).backward()  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_to_the_same_gradient(cuda: str) -> None:
    step = Step(cuda)
    expected = step().clone()
    replay = as_graph(step, step.student_NC)
    gradient = step.student_NC.grad
    assert gradient is not None
    for _ in range(2):
        gradient.zero_()
        replay()
    torch.cuda.synchronize()
    assert torch.equal(gradient, expected)


def test_autocast_changes_nothing(device: str) -> None:
    step = Step(device) if device == "cuda" else Step(device, rows=3, classes=40)
    expected = step().clone()
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(step(), expected)


def test_more_than_2_to_the_31_numbers(cuda: str) -> None:
    """The last rows against the same rows alone."""
    classes = 21841
    rows = 2**31 // classes + 64
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory on the device")
    student_NC = torch.randn(rows, classes, device=cuda, dtype=torch.bfloat16)
    teacher_NC = torch.randn(rows, classes, device=cuda, dtype=torch.float16)
    labels_N = torch.randint(0, classes, (rows,), device=cuda)
    gradients = []
    for part in (slice(None), slice(-32, None)):
        leaf_NC = student_NC[part].detach().requires_grad_()
        target = DenseTarget(scaled_logits=teacher_NC[part], temperature=4.0, retemperable=False)
        distillation_loss(leaf_NC, target, labels_N[part], reduction="sum", **OPTIONS).backward()  # type: ignore[arg-type]
        assert leaf_NC.grad is not None
        gradients.append(leaf_NC.grad[-32:].clone())
    assert torch.equal(*gradients)
