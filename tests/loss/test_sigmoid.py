"""The loss of independent outputs against numpy in float64, one entry after the other, in value and gradient."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss import (
    SigmoidTarget,
    decoupled_kd,
    dist_loss,
    distillation_loss,
    distillation_loss_components,
    jensen_shannon,
    mse_logits,
    reverse_kl,
    soft_cross_entropy,
    standardized_kl,
)

SOFT, HARD = 0.7, 0.4


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def reference(
    z: Any, t: Any, y: Any, *, T: float, smoothing: float = 0.0, weight: Any = None, has: Any = None
) -> tuple[float, Any]:
    """The mean loss and its gradient in z; t are logits at temperature 1."""
    rows, classes = z.shape
    weight = np.ones(rows) if weight is None else weight
    has = np.ones(rows, bool) if has is None else has
    soft_share = weight * has / max((weight * has).sum(), 1e-300)
    hard_share = weight * (y >= 0).any(1)
    hard_share = hard_share / max(hard_share.sum(), 1e-300)
    loss, grad = 0.0, np.zeros((rows, classes))
    for n in range(rows):
        for c in range(classes):
            u, v = float(z[n, c]) / T, float(t[n, c]) / T
            p, q = math.exp(log_sigmoid(v)), math.exp(log_sigmoid(u))
            if soft_share[n]:
                divergence = p * (log_sigmoid(v) - log_sigmoid(u)) + (1 - p) * (log_sigmoid(-v) - log_sigmoid(-u))
                loss += SOFT * soft_share[n] * T * T * divergence / classes
                grad[n, c] += SOFT * soft_share[n] * T * (q - p) / classes
            if y[n, c] >= 0:
                target = y[n, c] * (1 - smoothing) + smoothing / 2
                x = float(z[n, c])
                loss -= HARD * hard_share[n] * (target * log_sigmoid(x) + (1 - target) * log_sigmoid(-x)) / classes
                grad[n, c] += HARD * hard_share[n] * (math.exp(log_sigmoid(x)) - target) / classes
    return loss, grad


def make(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    z = (torch.randn(rows, classes, generator=generator) * 4).to(dtype).requires_grad_()
    t = torch.randn(rows, classes, generator=generator) * 4
    y = torch.randint(-1, 2, (rows, classes), generator=generator, dtype=torch.int8)
    y[1] = -1  # a row of which nothing is known
    return z, t, y


def target_of(t: Tensor, at: float, *, retemperable: bool = True) -> SigmoidTarget:
    return SigmoidTarget(scaled_logits=t / at, temperature=at, retemperable=retemperable)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("stored", [1.0, 2.0])
def test_values_and_gradients(impl: Any, classes: int, T: float, stored: float) -> None:
    z, t, y = make(9, classes, torch.float64)
    weight, has = np.linspace(0, 2, 9), np.arange(9) % 4 != 3
    expected, slope = reference(z.detach().numpy(), t.numpy(), y.numpy(), T=T, smoothing=0.1, weight=weight, has=has)
    found = distillation_loss(
        z,
        target_of(t.double(), stored),
        y,
        temperature=T,
        soft_weight=SOFT,
        hard_weight=HARD,
        label_smoothing=0.1,
        weight=weight,
        soft_mask=has,
        impl=impl,
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(torch.autograd.grad(found, z)[0].numpy(), slope, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    z, t, y = make(6, 5, dtype)
    half = SigmoidTarget(scaled_logits=(t / 4).half(), temperature=4.0, retemperable=True)
    found = distillation_loss(z, half, y, temperature=4, soft_weight=SOFT, hard_weight=HARD)
    stored = half.scaled_logits.double().numpy() * 4
    expected, slope = reference(z.detach().double().numpy(), stored, y.numpy(), T=4.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(torch.autograd.grad(found, z)[0].double().numpy(), slope, rtol=tolerance, atol=1e-7)


def test_known_labels_alone_are_torchs_own_mean() -> None:
    z, t, y = make(6, 5)
    y = y.clamp_min(0)
    found = distillation_loss(z, target_of(t, 1), y, temperature=1, soft_weight=0, hard_weight=1)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(z, y.float()))


def test_terms_and_rows() -> None:
    z, t, y = make(6, 5)
    parts = distillation_loss_components(z, target_of(z.detach(), 2), y, temperature=2, soft_weight=1, hard_weight=1)
    assert parts.soft.item() == pytest.approx(0, abs=1e-9)  # the entropy of the teacher is taken off
    rows = distillation_loss(z, target_of(t, 2), y, temperature=2, soft_weight=1, hard_weight=1, reduction="none")
    assert rows.shape == (6,)
    one = distillation_loss(
        z[3:4], target_of(t, 2).take(slice(3, 4)), y[3:4], temperature=2, soft_weight=1, hard_weight=1
    )
    torch.testing.assert_close(rows[3], one)
    sequence = distillation_loss(
        z.reshape(2, 3, 5), target_of(t, 2), y.reshape(2, 3, 5), temperature=2, soft_weight=1, hard_weight=1
    )
    flat = distillation_loss(z, target_of(t, 2), y, temperature=2, soft_weight=1, hard_weight=1)
    torch.testing.assert_close(sequence, flat)


def test_rows_that_count_for_nothing_may_hold_anything() -> None:
    z, t, y = make(4, 3)
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with torch.no_grad():
        z[2] = math.nan
    found = distillation_loss(z, target_of(t, 1), y, temperature=1, soft_weight=1, hard_weight=1, weight=weight)
    (slope,) = torch.autograd.grad(found, z)
    assert found.isfinite()
    assert not slope[2].any()
    assert slope.isfinite().all()
    nothing = distillation_loss(z, target_of(t, 1), temperature=1, soft_weight=0, hard_weight=1)
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, z)[0].any()


def test_large_logits_and_temperatures_keep_their_digits() -> None:
    z = torch.tensor([[60.0, -60.0]], requires_grad=True)
    far = distillation_loss(z, target_of(-z.detach(), 1), temperature=1, soft_weight=1, hard_weight=0)
    assert far.item() == pytest.approx(60, rel=1e-6)
    z, t, _ = make(5, 4)
    # As T grows the loss becomes an eighth of the mean squared distance.
    hot = distillation_loss(z, target_of(t, 1), temperature=1e4, soft_weight=1, hard_weight=0)
    assert hot.item() == pytest.approx(float((z.detach() - t).square().mean()) / 8, rel=1e-3)


def test_compiled_and_transformed() -> None:
    z, t, y = make(6, 5)
    settings: dict[str, Any] = {"temperature": 2, "soft_weight": 1, "hard_weight": 1}

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits, target_of(t, 2), y, **settings)

    expected = torch.autograd.grad(loss(z), z)[0]
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), expected)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], expected)


def test_what_does_not_fit_is_refused() -> None:
    z, t, _ = make(4, 3)
    target = target_of(t, 2, retemperable=False)
    settings: dict[str, Any] = {"temperature": 2, "soft_weight": 1, "hard_weight": 1}
    with pytest.raises(MismatchError, match="averaged probabilities at temperature 2"):
        distillation_loss(z, target, **(settings | {"temperature": 1}))
    with pytest.raises(MismatchError, match="expected 4 rows of 3 outputs"):
        distillation_loss(z[:, :2], target, **settings)
    with pytest.raises(MismatchError, match=r"labels: expected integers of shape \(4, 3\)"):
        distillation_loss(z, target, torch.zeros(4, dtype=torch.int64), **settings)
    with pytest.raises(UsageError, match=r"labels: expected 1, 0 or -1 \(not known\) for each class, found 2"):
        distillation_loss(z, target, torch.full((4, 3), 2), **settings)
    with pytest.raises(UsageError, match="impl='triton': computes a softmax"):
        distillation_loss(z, target, **settings, impl="triton")
    others: list[Any] = [
        lambda: soft_cross_entropy(z, target, temperature=2),
        lambda: jensen_shannon(z, target, temperature=2),
        lambda: mse_logits(z, target),
        lambda: dist_loss(z, target, temperature=2),
        lambda: reverse_kl(z, target, temperature=2),
        lambda: standardized_kl(z, target, temperature=2),
        lambda: decoupled_kd(z, target, torch.zeros(4, dtype=torch.int64), temperature=2),
    ]
    for other in others:
        with pytest.raises(UsageError, match="expected one softmax over the classes, found SigmoidTarget"):
            other()
