"""Tests that `test_triton` runs in a process of its own: the Triton kernels, on a GPU or in Triton's interpreter."""

import pytest
import torch

from softlabel.loss import DistillationLoss, distillation_loss, linear_distillation_loss
from softlabel.loss.rows import LossCall, Settings, row_shares
from softlabel.loss.targets import as_target
from tests.support.loss_cases import Case, compare_with_reference, make_full_cases, make_quick_cases, make_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", [*make_quick_cases(), Case(classes=21841, rows=2)], ids=str)
def test_matrix(case: Case) -> None:
    compare_with_reference(case, "triton", upstream=3.0, device=DEVICE)


@pytest.mark.parametrize("kind", ["dense16", "topk"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_are_swept(kind: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from softlabel.loss import triton_ops

    monkeypatch.setattr(triton_ops, "ROW_LIMIT", 64)
    monkeypatch.setattr(triton_ops, "SWEEP", 64)
    for size in (4.0, 1e4):
        compare_with_reference(
            Case(kind=kind, classes=401, label_smoothing=smoothing, size=size, weight=True), "triton", device=DEVICE
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", list(make_full_cases()), ids=str)
def test_full(case: Case) -> None:
    compare_with_reference(case, "triton", upstream=0.25, device=DEVICE)


def test_operators_are_registered_as_torch_expects() -> None:
    from softlabel.loss import triton_ops

    logits_NC = torch.randn(5, 9, device=DEVICE, requires_grad=True)
    labels_N = torch.arange(5, device=DEVICE)
    share_N = torch.full((5,), 0.2, device=DEVICE)
    numbers = (2.0, 0.1, -100, False, True)
    teacher_NC = torch.randn(5, 9, device=DEVICE).half()
    dense = (logits_NC, teacher_NC, None, None, None, None, labels_N, share_N, share_N, 1.0, *numbers)
    torch.library.opcheck(triton_ops.dense_rows, dense)
    index_NK = torch.tensor([[0, 3]] * 5, device=DEVICE)
    p_NK, rest_N1 = torch.full((5, 2), 0.4, device=DEVICE), torch.full((5, 1), 0.2, device=DEVICE)
    kept = (logits_NC, index_NK, p_NK, p_NK.log(), rest_N1, rest_N1.log(), labels_N, share_N, share_N, "ghost")
    torch.library.opcheck(triton_ops.kept_rows, (*kept, *numbers))


def test_the_operator_is_one_node_of_a_compiled_graph() -> None:
    """Traced as on CUDA (`impl="triton"` while compiling), with no graph break, by the operator's autograd rule."""
    seen = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch.compiler.reset()
    loss = DistillationLoss(temperature=2.0, soft_weight=0.6, hard_weight=0.4, impl="triton")
    logits_NC = torch.randn(6, 10, device=DEVICE, requires_grad=True)
    teacher_NC, labels_N = torch.randn(6, 10, device=DEVICE), torch.arange(6, device=DEVICE)
    found = torch.compile(loss, fullgraph=True, backend=backend)(logits_NC, teacher_NC, labels_N)
    (gradient,) = torch.autograd.grad(found * 2, logits_NC)
    expected = loss(logits_NC, teacher_NC, labels_N)
    (expected_gradient,) = torch.autograd.grad(expected * 2, logits_NC)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert sum("dense_rows" in name for name in seen) == 1


def test_an_impossible_label_is_not_silent() -> None:
    """Where the labels are not looked at, on a device, the kernel makes the row NaN."""
    from softlabel.loss import triton_ops

    logits_NC, labels_N = torch.randn(2, 4, device=DEVICE), torch.tensor([1, 7], device=DEVICE)
    settings = Settings(
        temperature=1.0,
        soft_weight=0.0,
        hard_weight=1.0,
        label_smoothing=0.0,
        ignore_index=-100,
        tail="ghost",
        factor=1.0,
    )
    like = {"rows": 2, "dtype": torch.float32, "device": logits_NC.device}
    shares = row_shares(labels_N, None, None, ignore_index=-100, reduction="mean", **like)
    call = LossCall(target=as_target(logits_NC), labels=labels_N, shares=shares, settings=settings, reduction="mean")
    rows = triton_ops.row_losses(logits_NC, call, want_grad=False)
    assert rows.hard.isnan().tolist() == [False, True]
    if DEVICE == "cuda":
        value = distillation_loss(logits_NC, logits_NC, labels_N, temperature=1.0, soft_weight=0.0, hard_weight=1.0)
        assert value.isnan()


def test_half_gradients_of_many_small_rows() -> None:
    compare_with_reference(Case(rows=333, classes=3, dtype=torch.float16), "triton", device=DEVICE)
    compare_with_reference(Case(rows=65, classes=33, kind="sampled"), "triton", device=DEVICE)


@pytest.mark.parametrize("kind", ["dense16", "topk", "head"])
def test_rows_of_a_fused_linear_loss(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target, labels_N = make_target(kind, 7, 40, 2.0, generator), torch.tensor([0, 39, -100, 5, 5, -100, 1])
    leaves = [torch.randn(size, generator=generator).to(DEVICE).requires_grad_() for size in ((7, 6), (40, 6), (40,))]
    given = (*leaves, target.to(DEVICE), labels_N.to(DEVICE))
    options = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4, "chunk_rows": 3, "softcap": 4.0}
    options["weight"] = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 1.0], device=DEVICE)
    found = linear_distillation_loss(*given, **options, impl="triton")
    expected = linear_distillation_loss(*given, **options, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), rtol=1e-4, atol=1e-5
    )
