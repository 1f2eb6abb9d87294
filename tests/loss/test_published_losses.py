"""WTTM and MLKD against independent float64 formulas, and against what their authors' code computes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss import (
    DenseTarget,
    SampledTarget,
    SigmoidTarget,
    distillation_loss,
    jensen_shannon,
    multi_level_kd,
    reverse_kl,
    weighted_ttm,
)
from tests.support import reference
from tests.support.loss_cases import make_target, make_top_k_target

T = 3.0
ROWS, CLASSES = 6, 11


def student(dtype: torch.dtype = torch.float64, size: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(ROWS, CLASSES, generator=generator) * size).to(dtype).requires_grad_()


def teacher() -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 3


def naive_wttm_row(z: Tensor, raw: Tensor, temperature: float) -> Tensor:
    """Power transform of the probabilities, as in the paper's algorithm 1."""
    power = torch.softmax(raw.double(), 0) ** (1 / temperature)
    return power.sum() * reference.kl(power / power.sum(), reference.log_probs(z.double()))


def naive_mlkd(
    z_NC: Tensor, t_NC: Tensor, temperatures: tuple[float, ...], weights: tuple[float, float, float]
) -> Tensor:
    """Entry by entry; thresholds by numpy, as in the authors' code."""
    sure = torch.softmax(t_NC, 1)
    confidence, mass = sure.amax(1).numpy(), sure.sum(0).numpy()
    rows = float((confidence <= np.percentile(confidence, 50)).mean())
    classes = float((mass <= np.percentile(mass, 50)).mean())
    total = torch.zeros((), dtype=torch.float64)
    for one in temperatures:
        q, p = torch.softmax(z_NC.double() / one, 1), torch.softmax(t_NC / one, 1)
        kl = sum(reference.kl(p[i], q[i].log()) for i in range(len(q))) / len(q)
        batch = sum((q[i] @ q[j] - p[i] @ p[j]) ** 2 for i in range(len(q)) for j in range(len(q))) / len(q)
        columns = range(q.shape[1])
        of_class = sum((q[:, i] @ q[:, j] - p[:, i] @ p[:, j]) ** 2 for i in columns for j in columns) / q.shape[1]
        total = total + rows * (weights[0] * one**2 * kl + weights[1] * batch) + classes * weights[2] * of_class
    return total


@pytest.mark.parametrize("kind", ["raw", "dense32", "int8", "head8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_wttm_equals_the_formula(kind: str, dtype: torch.dtype, reduction: str) -> None:
    target = make_target(kind, ROWS, CLASSES, T, torch.Generator().manual_seed(2))
    logits_NC = student(dtype)
    weight_N = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.0]) if reduction != "sum" else None
    if weight_N is not None:
        with torch.no_grad():
            logits_NC[2] = torch.nan
    exact_NC = logits_NC.detach().double().requires_grad_()
    each = torch.ones(ROWS) if weight_N is None else weight_N
    rows = []
    for row, weight in enumerate(each.tolist()):
        scaled, own = reference.teacher_logits(target, row)
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(weight * naive_wttm_row(exact_NC[row], scaled * own, 5.0) if weight else zero)
    expected = torch.stack(rows)
    if reduction != "none":
        expected = expected.sum() / (each.sum() if reduction == "mean" else 1)
    found = weighted_ttm(logits_NC, target, temperature=5.0, weight=weight_N, reduction=reduction)
    bound = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-5}[dtype]
    bound = max(bound, 1e-5) if kind in ("int8", "head8") else bound
    torch.testing.assert_close(found.double(), expected.detach(), rtol=bound, atol=bound)
    found.sum().backward()
    expected.sum().backward()
    grad_bound = 1.7e-2 if dtype == torch.bfloat16 else 3e-5
    size = float(exact_NC.grad.nan_to_num().abs().max())
    assert (logits_NC.grad.double() - exact_NC.grad.nan_to_num()).abs().max() <= grad_bound * size


def test_wttm_of_the_most_probable_classes() -> None:
    """Classes that were left out are one outcome in the divergence, and exact in the power sum."""
    logits_NC, raw_NC = student(), teacher()
    target = make_top_k_target(raw_NC, 4, (1.0, 5.0))
    expected = []
    for row in range(ROWS):
        kept = raw_NC[row].topk(4).indices
        power = torch.softmax(raw_NC[row], 0) ** (1 / 5.0)
        p, log_q = power / power.sum(), reference.log_probs(logits_NC[row].detach())
        p = torch.cat([p[kept], 1 - p[kept].sum()[None]])
        others = [c for c in range(CLASSES) if c not in kept.tolist()]
        log_q = torch.cat([log_q[kept], torch.logsumexp(log_q[others], 0)[None]])
        expected.append(power.sum() * reference.kl(p, log_q))
    found = weighted_ttm(logits_NC, target, temperature=5.0, reduction="none")
    torch.testing.assert_close(found.detach(), torch.stack(expected), rtol=2e-4, atol=1e-3)  # float16
    with pytest.raises(MismatchError, match="its tail is known at temperature 5"):
        weighted_ttm(logits_NC, make_top_k_target(raw_NC, 4, (5.0,)), temperature=5.0)


@pytest.mark.parametrize("kept", [4, CLASSES])
def test_divergences_of_the_most_probable_classes(kept: int) -> None:
    """Those between the K classes and all others as one outcome, which cannot be more than those over all classes."""
    logits_NC, raw_NC = student(), teacher()
    target = make_top_k_target(raw_NC, kept, (T,))
    found = {
        "reverse": reverse_kl(logits_NC, target, temperature=T, reduction="none"),
        "js": jensen_shannon(logits_NC, target, temperature=T, beta=0.3, reduction="none"),
    }
    whole = {
        "reverse": reverse_kl(logits_NC, raw_NC, temperature=T, reduction="none"),
        "js": jensen_shannon(logits_NC, raw_NC, temperature=T, beta=0.3, reduction="none"),
    }
    found, whole = ({name: one.detach() for name, one in rows.items()} for rows in (found, whole))
    for row in range(ROWS):
        p, q = torch.softmax(raw_NC[row] / T, 0), torch.softmax(logits_NC[row].detach() / T, 0)
        names = raw_NC[row].topk(kept).indices
        others = [c for c in range(CLASSES) if c not in names.tolist()]
        if others:
            p, q = (torch.cat([one[names], one[others].sum()[None]]) for one in (p, q))
        middle = 0.3 * p + 0.7 * q
        js = 0.3 * reference.kl(p, middle.log()) + 0.7 * reference.kl(q, middle.log())
        assert float(found["reverse"][row]) == pytest.approx(T**2 * float(reference.kl(q, p.log())), rel=2e-3)
        assert float(found["js"][row]) == pytest.approx(T**2 * float(js), rel=2e-3)
    for name, rows_N in found.items():
        assert (rows_N <= whole[name] + 1e-2).all()
    for loss in (reverse_kl, jensen_shannon):
        assert torch.autograd.gradcheck(
            lambda z, loss=loss: loss(z, target, temperature=T, reduction="none"), (logits_NC,)
        )


def test_wttm_at_temperature_1_is_the_divergence() -> None:
    logits_NC, raw_NC = student(), teacher()
    expected = distillation_loss(logits_NC, raw_NC, temperature=1.0, soft_weight=1.0, hard_weight=0.0)
    torch.testing.assert_close(weighted_ttm(logits_NC, raw_NC, temperature=1.0), expected)


def test_wttm_on_a_worked_example() -> None:
    """p = (0.8, 0.2), gamma = 1/2: U = 0.8944 + 0.4472 = 1.3416, p_T = (2/3, 1/3); q uniform: ln 2 - H(2/3, 1/3)."""
    raw_NC, logits_NC = torch.tensor([[0.8, 0.2]]).log(), torch.zeros(1, 2)
    assert float(weighted_ttm(logits_NC, raw_NC, temperature=2.0)) == pytest.approx(1.3416408 * 0.0566330, rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 4.0)])
@pytest.mark.parametrize("kind", ["raw", "dense32", "head8"])
def test_mlkd_equals_the_formula(kind: str, weights: tuple[float, float, float]) -> None:
    target = make_target(kind, ROWS, CLASSES, T, torch.Generator().manual_seed(2))
    logits_NC = student()
    rows = [reference.teacher_logits(target, row) for row in range(ROWS)]
    raw_NC = torch.stack([scaled * own for scaled, own in rows])
    names = ("instance_weight", "batch_weight", "class_weight")
    found = multi_level_kd(logits_NC, target, temperatures=(2.0, 5.0), **dict(zip(names, weights, strict=True)))
    expected = naive_mlkd(logits_NC, raw_NC, (2.0, 5.0), weights)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    grads = [torch.autograd.grad(one, logits_NC)[0] for one in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


def test_mlkd_on_a_worked_example() -> None:
    """Two rows, two classes, the student uniform: q q^T = 1/2 everywhere; the teacher all but certain of a class each:
    p p^T = p^T p = I."""
    logits_NC, raw_NC = torch.zeros(2, 2), torch.tensor([[60.0, 0.0], [0.0, 60.0]])
    instance = multi_level_kd(logits_NC, raw_NC, temperatures=(1.0,), batch_weight=0.0, class_weight=0.0)
    both = multi_level_kd(logits_NC, raw_NC, temperatures=(1.0,), instance_weight=0.0)
    assert float(instance) == pytest.approx(np.log(2))  # equal confidence: no row is above the median
    assert float(both) == pytest.approx(2 * (4 * 0.25) / 2)


def test_mlkd_needs_no_temperature_1_without_its_shares() -> None:
    logits_NC = student()
    frozen = DenseTarget(scaled_logits=teacher() / T, temperature=T, retemperable=False)
    assert multi_level_kd(logits_NC, frozen, temperatures=(T,), by_confidence=False).isfinite()
    with pytest.raises(MismatchError, match="do not re-temper"):
        multi_level_kd(logits_NC, frozen, temperatures=(T,))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wttm": lambda z, t: weighted_ttm(z, t, temperature=T, reduction="none"),
    "mlkd": lambda z, t: multi_level_kd(z, t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, teacher()), (student(size=1.0),))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_and_masked_logits_stay_finite(name: str) -> None:
    logits_NC, raw_NC = student(torch.float32, size=1e3), teacher().float() * 1e3
    raw_NC[:, 7] = -torch.inf
    found = LOSSES[name](logits_NC, raw_NC).sum()
    found.backward()
    assert found.isfinite()
    assert logits_NC.grad.isfinite().all()


def test_mistakes_are_named() -> None:
    logits_NC = student()
    drawn = SampledTarget(
        index=torch.zeros(ROWS, 1, dtype=torch.int64), weight=torch.ones(ROWS, 1), temperature=T, num_classes=CLASSES
    )
    apart = SigmoidTarget(scaled_logits=teacher(), temperature=1.0, retemperable=True)
    for target in (drawn, apart):
        with pytest.raises(UsageError, match=type(target).__name__):
            weighted_ttm(logits_NC, target, temperature=T)
        with pytest.raises(UsageError, match=type(target).__name__):
            multi_level_kd(logits_NC, target)
    with pytest.raises(UsageError, match="temperatures: expected at least one"):
        multi_level_kd(logits_NC, teacher(), temperatures=())
