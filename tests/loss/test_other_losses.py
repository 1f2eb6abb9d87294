"""The other distillation losses against independent float64 formulas, each row on its own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss import (
    DenseTarget,
    decoupled_kd,
    dist_loss,
    jensen_shannon,
    mse_logits,
    reverse_kl,
    soft_cross_entropy,
    standardize_logits,
    standardized_kl,
)
from tests.loss.test_loss_matrix import needs_compiler
from tests.support import reference
from tests.support.loss_cases import make_target, make_top_k_target

T = 3.0
ROWS, CLASSES = 6, 11
Loss = Callable[..., Tensor]


def with_labels(logits: Tensor, target: object, **options: object) -> Tensor:
    return decoupled_kd(logits, target, LABELS, others_weight=2.5, target_weight=0.7, **options)


LABELS = torch.tensor([3, -100, 0, 10, 5, -100])


def naive_rows(name: str, z: Tensor, target: object, row: int) -> Tensor:
    p = reference.teacher_probs(target, row, T)
    scaled, own = reference.teacher_logits(target, row)
    if name == "soft_cross_entropy":
        return reference.soft_cross_entropy_row(z, p, T)
    if name == "reverse_kl":
        return reference.reverse_kl_row(z, p, T)
    if name == "jensen_shannon":
        return reference.jensen_shannon_row(z, p, T, 0.3)
    if name == "decoupled_kd":
        return reference.dkd_row(z, scaled * own, int(LABELS[row]), T, 0.7, 2.5)
    if name == "standardized_kl":
        q = reference.standardized(z[None])[0] / T
        return T**2 * reference.kl(
            torch.softmax(reference.standardized((scaled * own)[None])[0] / T, 0), reference.log_probs(q)
        )
    assert name == "mse_logits"
    raw = scaled * own
    return ((z - z.mean()) - (raw - raw.mean())).pow(2).sum() / len(z)


LOSSES: dict[str, Loss] = {
    "soft_cross_entropy": lambda z, t, **k: soft_cross_entropy(z, t, temperature=T, **k),
    "reverse_kl": lambda z, t, **k: reverse_kl(z, t, temperature=T, **k),
    "jensen_shannon": lambda z, t, **k: jensen_shannon(z, t, temperature=T, beta=0.3, **k),
    "decoupled_kd": lambda z, t, **k: with_labels(z, t, temperature=T, **k),
    "standardized_kl": lambda z, t, **k: standardized_kl(z, t, temperature=T, **k),
    "mse_logits": mse_logits,
}
FUSED = ("reverse_kl", "decoupled_kd", "standardized_kl")


def student(dtype: torch.dtype = torch.float32, size: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(ROWS, CLASSES, generator=generator) * size).to(dtype).requires_grad_()


def expected_loss(name: str, logits: Tensor, target: object, weight: Tensor | None, reduction: str) -> Tensor:
    counted = [float(w) for w in (torch.ones(ROWS) if weight is None else weight)]
    if name == "decoupled_kd":
        counted = [w if label >= 0 else 0.0 for w, label in zip(counted, LABELS.tolist(), strict=True)]
    zero = torch.zeros((), dtype=torch.float64)
    rows = torch.stack([w * naive_rows(name, logits[i], target, i) if w else zero for i, w in enumerate(counted)])
    if reduction == "none":
        return rows
    return rows.sum() / (sum(counted) if reduction == "mean" else 1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["raw", "dense32", "int8", "head8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_formula(name: str, kind: str, dtype: torch.dtype, reduction: str) -> None:
    target = make_target(kind, ROWS, CLASSES, T, torch.Generator().manual_seed(2))
    logits_NC = student(dtype)
    weight_N = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.0]) if reduction != "sum" else None
    if weight_N is not None:
        with torch.no_grad():
            logits_NC[2] = torch.nan
    exact_NC = logits_NC.detach().double().requires_grad_()
    expected = expected_loss(name, exact_NC, target, weight_N, reduction)
    found = LOSSES[name](logits_NC, target, weight=weight_N, reduction=reduction)
    bound = 1e-9 if dtype == torch.float64 else 3e-5
    if kind in ("int8", "head8"):  # the teacher itself is computed in the working precision
        bound = max(bound, 1e-5)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=bound, atol=bound)
    upstream = torch.full_like(found, 1.5)
    found.backward(upstream)
    expected.backward(upstream.double())
    grad_bound = {torch.float64: bound, torch.float32: 3e-5, torch.bfloat16: 1.7e-2}[dtype]
    size = exact_NC.grad.nan_to_num().abs().max().item()
    torch.testing.assert_close(
        logits_NC.grad.double(), exact_NC.grad.nan_to_num(), rtol=0, atol=grad_bound * max(size, 1e-3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_equals_the_formula(dtype: torch.dtype) -> None:
    logits_NC = student(dtype)
    target = make_target("dense32", ROWS, CLASSES, T, torch.Generator().manual_seed(2))
    exact_NC = logits_NC.detach().double().requires_grad_()
    found = dist_loss(logits_NC, target, temperature=2.0, inter_weight=1.5, intra_weight=0.5)
    teacher_NC = torch.stack([reference.teacher_logits(target, row)[0] * 3.0 for row in range(ROWS)])
    expected = reference.dist(exact_NC, teacher_NC, 2.0, 1.5, 0.5)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits_NC.grad.double(), exact_NC.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    teacher_NC = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, teacher_NC, reduction="none"), (student(torch.float64),))


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "mse_logits"])
def test_extreme_and_masked_logits_stay_finite(name: str) -> None:
    logits_NC = student(size=1e3)
    teacher_NC = torch.randn(ROWS, CLASSES) * 1e3
    if name != "standardized_kl":
        with torch.no_grad():
            logits_NC[:, 7] = -torch.inf
        teacher_NC[:, 7] = -torch.inf
    found = LOSSES[name](logits_NC, teacher_NC)
    found.backward()
    assert found.isfinite()
    assert logits_NC.grad.isfinite().all()


@pytest.mark.parametrize("name", FUSED)
def test_fused_losses_keep_the_promises_of_autograd(name: str) -> None:
    logits_NC, teacher_NC = student(), torch.randn(ROWS, CLASSES)
    found = LOSSES[name](logits_NC, teacher_NC)
    first = torch.autograd.grad(found, logits_NC, torch.tensor(4.0), retain_graph=True)[0].clone()
    second = torch.autograd.grad(found, logits_NC, retain_graph=True)[0].clone()
    torch.testing.assert_close(first, 4 * second)
    (gradient,) = torch.autograd.grad(found, logits_NC, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_traceable_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()
    logits_NC, teacher_NC = student(), torch.randn(ROWS, CLASSES)
    expected = torch.autograd.grad(LOSSES[name](logits_NC, teacher_NC) * 2, logits_NC)
    compiled = torch.compile(LOSSES[name], fullgraph=True)
    found = torch.autograd.grad(compiled(logits_NC, teacher_NC) * 2, logits_NC)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_soft_cross_entropy_is_kl_plus_entropy() -> None:
    logits_NC, teacher_NC = student(), torch.randn(ROWS, CLASSES)
    p_NC = F.softmax(teacher_NC / T, 1)
    kl = F.kl_div(F.log_softmax(logits_NC / T, 1), p_NC, reduction="batchmean")
    entropy = -(p_NC * p_NC.log()).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(logits_NC, teacher_NC, temperature=T), T**2 * (kl + entropy))


def test_jensen_shannon_is_symmetric_at_one_half() -> None:
    a, b = student().detach(), torch.randn(ROWS, CLASSES)
    torch.testing.assert_close(jensen_shannon(a, b, temperature=1.0), jensen_shannon(b, a, temperature=1.0))


def test_decoupled_kd_with_the_papers_identity_is_kl() -> None:
    """KL = TCKD + (1 - p_y) NCKD (Zhao et al. 2022, equation 6), row by row."""
    logits_NC, teacher_NC = student().detach(), torch.randn(ROWS, CLASSES)
    labels_N = LABELS.clamp(min=0)
    options = {"temperature": T, "reduction": "none"}
    target_part = decoupled_kd(logits_NC, teacher_NC, labels_N, target_weight=1.0, others_weight=0.0, **options)
    others_part = decoupled_kd(logits_NC, teacher_NC, labels_N, target_weight=0.0, others_weight=1.0, **options)
    p_y = F.softmax(teacher_NC / T, 1).gather(1, labels_N[:, None])[:, 0]
    kl = F.kl_div(F.log_softmax(logits_NC / T, 1), F.softmax(teacher_NC / T, 1), reduction="none").sum(1)
    torch.testing.assert_close(target_part + (1 - p_y) * others_part, T**2 * kl, rtol=1e-5, atol=1e-5)


def test_standardized_logits() -> None:
    logits_NC = student(torch.float64)
    torch.testing.assert_close(standardize_logits(logits_NC), reference.standardized(logits_NC), rtol=1e-9, atol=1e-9)
    moved = standardized_kl(logits_NC * 3 + 2, logits_NC, temperature=2.0)
    torch.testing.assert_close(moved, torch.zeros_like(moved), rtol=0, atol=1e-9)


def test_mistakes_are_named() -> None:
    logits_NC, teacher_NC = student(), torch.randn(ROWS, CLASSES)
    with pytest.raises(UsageError, match="TopKTarget"):
        standardized_kl(logits_NC, make_top_k_target(teacher_NC, 3, (T,)), temperature=T)
    with pytest.raises(UsageError, match="beta"):
        jensen_shannon(logits_NC, teacher_NC, temperature=T, beta=1.0)
    frozen = DenseTarget(scaled_logits=teacher_NC, temperature=4.0, retemperable=False)
    stored = DenseTarget(scaled_logits=teacher_NC, temperature=2.0, retemperable=True)
    with pytest.raises(MismatchError, match="do not re-temper"):
        reverse_kl(logits_NC, frozen, temperature=T)
    with pytest.raises(MismatchError, match="up to a constant"):
        mse_logits(logits_NC, stored, center=False)
    with pytest.raises(MismatchError, match="expected shape"):
        soft_cross_entropy(logits_NC, teacher_NC[:3], temperature=T)
    with pytest.raises(UsageError, match="2 rows"):
        dist_loss(logits_NC[:1], teacher_NC[:1])
