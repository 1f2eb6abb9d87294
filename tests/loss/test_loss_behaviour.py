"""What the loss promises beyond its numbers: autograd's corner cases, parity with torch, refusals, statistics."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from softlabel.errors import MismatchError, UsageError
from softlabel.loss import (
    DenseTarget,
    DistillationLoss,
    SampledTarget,
    decoupled_kd,
    distillation_loss,
    distillation_loss_components,
    jensen_shannon,
    mse_logits,
    reverse_kl,
    standardized_kl,
)
from tests.loss.test_loss_matrix import needs_compiler
from tests.support import reference
from tests.support.loss_cases import TARGETS, make_target, make_top_k_target
from tests.support.shared_data import ROOT

KD = {"temperature": 3.0, "soft_weight": 0.7, "hard_weight": 0.4}
IMPLS = ["reference", "torch"]


def batch(rows: int = 6, classes: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    student_NC = (torch.randn(rows, classes, generator=generator) * 3).to(dtype).requires_grad_()
    teacher_NC = torch.randn(rows, classes, generator=generator) * 3
    return student_NC, teacher_NC, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parity_with_torch(impl: str, smoothing: float) -> None:
    student_NC, teacher_NC, labels_N = batch(dtype=torch.float64)
    labels_N[1] = -100
    found = distillation_loss(student_NC, teacher_NC, labels_N, **KD, label_smoothing=smoothing, impl=impl)
    soft = F.kl_div(F.log_softmax(student_NC / 3, 1), F.softmax(teacher_NC.double() / 3, 1), reduction="batchmean")
    expected = 0.4 * F.cross_entropy(student_NC, labels_N, label_smoothing=smoothing) + 0.7 * 9 * soft
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student_NC), torch.autograd.grad(expected, student_NC), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
def test_gradcheck(impl: str, kind: str) -> None:
    target = make_target(kind, 4, 5, 2.0, torch.Generator().manual_seed(3))
    labels_N = torch.tensor([0, -100, 4, 2])
    weight_N = torch.tensor([0.5, 1.0, 0.0, 2.0])
    logits_NC = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for tail in ("ghost", "uniform") if kind.startswith("top") else ("ghost",):

        def loss(logits: Tensor, tail: str = tail) -> Tensor:
            options = {**KD, "temperature": 2.0, "tail": tail, "impl": impl, "label_smoothing": 0.1}
            value = distillation_loss(logits, target, labels_N, weight=weight_N, reduction="none", **options)
            assert isinstance(value, Tensor)
            return value

        assert torch.autograd.gradcheck(loss, (logits_NC,))


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("compile", marks=[needs_compiler, pytest.mark.slow])])
def test_backward_twice_gives_the_same_gradient(impl: str) -> None:
    student_NC, teacher_NC, labels_N = batch()
    loss = distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl)
    first = torch.autograd.grad(loss, student_NC, torch.tensor(5.0), retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, student_NC, retain_graph=True)[0].clone()
    third = torch.autograd.grad(loss, student_NC, torch.tensor(0.0))[0]
    torch.testing.assert_close(first, second * 5)
    assert third.eq(0).all()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student_NC)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_given_away_is_not_written_to_later(impl: str) -> None:
    student_NC, teacher_NC, labels_N = batch()
    loss = distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl)
    (first,) = torch.autograd.grad(loss, student_NC, retain_graph=True)
    kept = first.clone()
    torch.autograd.grad(loss, student_NC, torch.tensor(7.0))
    assert torch.equal(first, kept)
    student_NC.grad = None
    loss = distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student_NC.grad, 2 * kept)


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_given_is_not_written_to(kind: str) -> None:
    student_NC, _, labels_N = batch(classes=11)
    target = make_target(kind, 6, 11, KD["temperature"], torch.Generator().manual_seed(2))
    parts = [target] if isinstance(target, Tensor) else [getattr(target, name) for name in target.__slots__]
    given = [part for part in (student_NC, labels_N, *parts) if isinstance(part, Tensor)]
    before = [part.detach().clone() for part in given]
    distillation_loss(student_NC, target, labels_N, **KD).backward()
    for part, earlier in zip(given, before, strict=True):
        torch.testing.assert_close(part.detach(), earlier, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_losses_on_one_input(impl: str) -> None:
    student_NC, teacher_NC, labels_N = batch()
    one = distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl)
    two = distillation_loss(student_NC, -teacher_NC, labels_N, temperature=1.0, soft_weight=1, hard_weight=0, impl=impl)
    apart = [torch.autograd.grad(x, student_NC, retain_graph=True)[0].clone() for x in (one, two)]
    (one + 3 * two).backward()
    torch.testing.assert_close(student_NC.grad, apart[0] + 3 * apart[1])


def test_an_input_changed_before_a_second_backward_is_noticed() -> None:
    student_NC, teacher_NC, labels_N = batch()
    logits_NC = student_NC * 1.0
    loss = distillation_loss(logits_NC, teacher_NC, labels_N, **KD, impl="torch")
    torch.autograd.grad(loss, logits_NC, retain_graph=True)
    teacher_NC.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits_NC)


def test_double_backward_is_refused_with_the_remedy() -> None:
    student_NC, teacher_NC, labels_N = batch()
    loss = distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl="torch")
    (gradient,) = torch.autograd.grad(loss, student_NC, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*impl='reference'"):
        gradient.pow(2).sum().backward()


def test_the_reference_can_be_differentiated_twice() -> None:
    student_NC, teacher_NC, labels_N = batch(3, 4, torch.float64)

    def loss(logits: Tensor) -> Tensor:
        value = distillation_loss(logits, teacher_NC, labels_N, **KD, impl="reference")
        assert isinstance(value, Tensor)
        return value

    assert torch.autograd.gradgradcheck(loss, (student_NC,))


@pytest.mark.parametrize("impl", IMPLS)
def test_components_are_the_terms_of_the_total(impl: str) -> None:
    student_NC, teacher_NC, labels_N = batch()
    parts = distillation_loss_components(student_NC, teacher_NC, labels_N, **KD, impl=impl)
    torch.testing.assert_close(parts.total, 0.7 * parts.soft + 0.4 * parts.hard)
    torch.testing.assert_close(parts.hard, F.cross_entropy(student_NC, labels_N).detach())
    assert parts.total.requires_grad
    assert not parts.soft.requires_grad
    assert not parts.hard.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradient_and_under_inference_mode(impl: str) -> None:
    student_NC, teacher_NC, labels_N = batch()
    expected = distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl).detach()
    with torch.no_grad():
        assert torch.equal(distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl), expected)
    with torch.inference_mode():
        assert torch.equal(distillation_loss(student_NC, teacher_NC, labels_N, **KD, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["dense16", "head"])
def test_autocast_changes_nothing(impl: str, kind: str) -> None:
    student_NC, _, labels_N = batch()
    target = make_target(kind, 6, 11, 3.0, torch.Generator().manual_seed(1))
    expected = distillation_loss(student_NC, target, labels_N, **KD, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(student_NC, target, labels_N, **KD, impl=impl)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_masked_classes(impl: str, kind: str) -> None:
    """-inf in both, in the teacher alone, or (where the teacher has nothing) in the student alone."""
    student_NC, teacher_NC, _ = batch(5, 9)
    labels_N = torch.tensor([0, 1, 2, -100, 4])
    with torch.no_grad():
        student_NC[:, 7] = -torch.inf
    teacher_NC[:, 6:8] = -torch.inf
    target = teacher_NC if kind == "dense" else make_top_k_target(teacher_NC, 4, (3.0,))
    exact_NC = student_NC.detach().double().requires_grad_()
    for tail in ("ghost", "renormalize"):
        found = distillation_loss(student_NC, target, labels_N, **KD, tail=tail, impl=impl)
        (gradient,) = torch.autograd.grad(found, student_NC)
        expected = reference.distillation(exact_NC, target, labels_N, **KD, tail=tail)
        (expected_gradient,) = torch.autograd.grad(expected, exact_NC)
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        assert gradient[:, 7].eq(0).all()
        torch.testing.assert_close(gradient.double(), expected_gradient.nan_to_num(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_student_without_mass_where_the_teacher_has_some_has_infinite_loss(impl: str) -> None:
    student_NC, teacher_NC, _ = batch(2, 4)
    with torch.no_grad():
        student_NC[0, 1] = -torch.inf
    loss = distillation_loss(student_NC, teacher_NC, None, **KD, impl=impl)
    assert loss == torch.inf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("exponent", range(1, 12))
def test_ghost_tail_of_any_mass(impl: str, exponent: int) -> None:
    """The mass outside of the k, of the teacher and of the student, from 1e-1 to 1e-11."""
    classes, mass = 40, 10.0**-exponent
    tail_logit = torch.log(torch.tensor(mass / (1 - mass) / (classes - 2), dtype=torch.float64))
    student_NC = torch.full((2, classes), float(tail_logit))
    student_NC[0, :2], student_NC[1, :2] = torch.tensor([0.0, -30.0]), torch.tensor([-0.1, -2.0])
    teacher_NC = torch.full((2, classes), float(tail_logit) - 1)
    teacher_NC[:, 0], teacher_NC[:, 1] = 0.0, -0.7
    target = make_top_k_target(teacher_NC, 2, (1.0,))
    options = {"temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.0, "reduction": "none"}
    exact_NC = student_NC.double().requires_grad_()
    student_NC.requires_grad_()
    found = distillation_loss(student_NC, target, None, **options, impl=impl)
    expected = reference.distillation(exact_NC, target, None, **options)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)
    found.sum().backward()
    expected.sum().backward()
    tail_found, tail_expected = student_NC.grad[:, 2:].double(), exact_NC.grad[:, 2:]
    torch.testing.assert_close(tail_found, tail_expected, rtol=1e-4, atol=1e-7 * mass)


def test_sampled_targets_are_unbiased() -> None:
    """The mean over 10,000 draws of value and gradient against cross-entropy and gradient with all classes."""
    draws, size, classes = 10_000, 6, 30
    student_NC, teacher_NC, _ = batch(1, classes)
    p_C = F.softmax(teacher_NC[0].double() / 2, 0)
    proposal_C = F.softmax(teacher_NC[0].double() / 4, 0)
    index_NS = torch.multinomial(
        proposal_C.expand(draws, -1), size, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    weight_NS = (p_C / proposal_C)[index_NS] / size
    target = SampledTarget(index=index_NS, weight=weight_NS, temperature=2.0, num_classes=classes)
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0}
    rows_NC = student_NC.detach().double().expand(draws, -1).clone().requires_grad_()
    losses_N = distillation_loss(rows_NC, target, None, **options, reduction="none")
    losses_N.sum().backward()
    exact = reference.soft_cross_entropy_row(student_NC[0], p_C, 2.0).detach()
    error = losses_N.detach().std() / draws**0.5
    assert abs(losses_N.detach().mean() - exact) < 4 * error
    full_NC = student_NC.detach().double().requires_grad_()
    distillation_loss(full_NC, teacher_NC, None, **options).backward()
    errors_C = rows_NC.grad.std(0) / draws**0.5
    assert ((rows_NC.grad.mean(0) - full_NC.grad[0]).abs() < 5 * errors_C).all()


def test_no_labelled_row_is_zero_not_nan() -> None:
    student_NC, teacher_NC, labels_N = batch()
    parts = distillation_loss_components(student_NC, teacher_NC, torch.full_like(labels_N, -100), **KD)
    assert parts.hard == 0
    assert parts.total.isfinite()


def test_a_row_without_target_keeps_its_hard_term() -> None:
    student_NC, teacher_NC, labels_N = batch()
    teacher_NC[2] = torch.nan
    mask_N = torch.arange(6) != 2
    parts = distillation_loss_components(student_NC, teacher_NC, labels_N, **KD, soft_mask=mask_N)
    torch.testing.assert_close(parts.hard, F.cross_entropy(student_NC, labels_N).detach())
    without = distillation_loss_components(student_NC[mask_N], teacher_NC[mask_N], None, **KD)
    torch.testing.assert_close(parts.soft, without.soft)
    parts.total.backward()
    assert student_NC.grad.isfinite().all()


def test_probability_averages_do_not_retemper() -> None:
    student_NC, teacher_NC, labels_N = batch()
    target = DenseTarget(scaled_logits=teacher_NC, temperature=4.0, retemperable=False)
    with pytest.raises(MismatchError, match=r"temperature 4.*temperature 3.*combine"):
        distillation_loss(student_NC, target, labels_N, **KD)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_sparse_targets_know_only_their_temperatures(kind: str) -> None:
    target = make_target(kind, 6, 11, 2.0, torch.Generator().manual_seed(1))
    with pytest.raises(MismatchError, match="temperature 3"):
        distillation_loss(batch()[0], target, None, **KD)


def test_a_top_k_target_is_exact_at_each_declared_temperature() -> None:
    """K = C - 1: the ghost is one class, so that the top-k loss is the dense loss."""
    student_NC, teacher_NC, labels_N = batch()
    target = make_top_k_target(teacher_NC, 10, (1.0, 3.0))
    exact = DenseTarget(scaled_logits=teacher_NC, temperature=1.0, retemperable=True)
    for temperature in (1.0, 3.0):
        options = {**KD, "temperature": temperature}
        torch.testing.assert_close(
            distillation_loss(student_NC, target, labels_N, **options),
            distillation_loss(student_NC, exact, labels_N, **options),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(6, 12)}, "expected 12 classes"),
        ({"target": torch.zeros(5, 11)}, "expected 6 rows"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "labels"),
        ({"labels": torch.zeros(6)}, "int64"),
        ({"weight": torch.zeros(6, 1)}, "weight"),
        ({"soft_mask": torch.ones(6)}, "bool"),
        ({"labels": torch.tensor([0, 1, -100, 11, 4, 5])}, "from 0 to 10, or -100 for none, found 11 in row 3"),
        ({"labels": torch.tensor([0, 1, -100, -1, 4, 5])}, "found -1 in row 3"),
        ({"weight": torch.tensor([0, 1, -0.5, 1, 1, 1])}, "weight: .* at least 0, found -0.5 in row 2"),
        ({"weight": torch.tensor([0, 1, 1, 1, 1, torch.nan])}, "found nan in row 5"),
        ({"weight": torch.tensor([0, torch.inf, 1, 1, 1, 1])}, "found inf in row 1"),
        ({"soft_weight": -0.1}, "soft_weight: expected a number of at least 0"),
        ({"hard_weight": float("nan")}, "hard_weight: expected a number of at least 0"),
        ({"temperature": float("inf")}, "at most 100000, found inf; mse_logits"),
        ({"temperature": 1e6}, "at most 100000"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "above 0"),
        ({"label_smoothing": 1.5}, "from 0 to 1"),
        ({"reduction": "batchmean"}, "mean, sum, none"),
        ({"tail": "none"}, "ghost, uniform, renormalize"),
        ({"impl": "cuda"}, "auto, reference"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    student_NC, teacher_NC, labels_N = batch()
    arguments = {"target": teacher_NC, "labels": labels_N, **KD, **change}
    with pytest.raises((MismatchError, UsageError), match=message):
        distillation_loss(student_NC, **arguments)


SEQUENCES = {"labels": (2, 3), "weight": (2, 3), "soft_mask": (2, 3)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", TARGETS)
def test_sequences_are_their_positions(impl: str, kind: str) -> None:
    """(B, L, C) with (B, L) is the rows one behind the other, whichever of both shapes the target has."""
    student_NC, _, labels_N = batch(rows=6, classes=11)
    labels_N[4] = -100
    target = make_target(kind, 6, 11, 3.0, torch.Generator().manual_seed(5))
    weight_N, mask_N = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0]), torch.tensor([True, False, True, True, True, True])
    options = {**KD, "impl": impl, "reduction": "none"}
    expected = distillation_loss(student_NC, target, labels_N, weight=weight_N, soft_mask=mask_N, **options)
    (gradient,) = torch.autograd.grad(expected.sum(), student_NC)
    folded = target.reshape(2, 3, 11) if isinstance(target, Tensor) else target._map(
        lambda tensor: tensor.reshape(2, 3, *tensor.shape[1:]), rows_only=True
    )  # fmt: skip
    for given in (target, folded):
        found = distillation_loss(
            student_NC.reshape(2, 3, 11), given, labels_N.reshape(2, 3), weight=weight_N.reshape(2, 3),
            soft_mask=mask_N.reshape(2, 3), **options,
        )  # fmt: skip
        assert torch.equal(found, expected.reshape(2, 3))
        assert torch.equal(torch.autograd.grad(found.sum(), student_NC)[0], gradient)


@pytest.mark.parametrize("change", SEQUENCES)
def test_sequences_that_do_not_fit_are_named(change: str) -> None:
    arguments = {name: torch.ones(shape, dtype=torch.long) for name, shape in SEQUENCES.items()}
    arguments[change] = torch.ones(6, dtype=torch.long)
    with pytest.raises(MismatchError, match=rf"{change}: expected shape \(2, 3\), one value a row, found \(6,\)"):
        distillation_loss(torch.zeros(2, 3, 11), torch.zeros(6, 11), **KD, **arguments)
    with pytest.raises(MismatchError, match=r"target: expected shape \(2, 3, 11\)"):
        distillation_loss(torch.zeros(2, 3, 11), torch.zeros(3, 2, 11), **KD)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16, list])
def test_labels_and_weights_may_be_arrays_and_lists(dtype: Any) -> None:
    student_NC, teacher_NC, labels_N = batch()
    expected = distillation_loss(student_NC, teacher_NC, labels_N, weight=torch.arange(6.0), **KD)
    labels, weight, mask = labels_N.numpy(), np.arange(6), np.ones(6, dtype=bool)
    given = labels.tolist() if dtype is list else labels.astype(dtype)
    weight.flags.writeable = False
    found = distillation_loss(student_NC, teacher_NC.numpy(), given, weight=weight, soft_mask=mask.tolist(), **KD)
    torch.testing.assert_close(found, expected)
    with pytest.raises(MismatchError, match="labels: expected a tensor, an array or a list, found str"):
        distillation_loss(student_NC, teacher_NC, "0 1 2 3 4 5", **KD)
    with pytest.raises(MismatchError, match="labels: expected a tensor, an array or a list of numbers"):
        distillation_loss(student_NC, teacher_NC, ["cat"] * 6, **KD)


@pytest.mark.parametrize("temperature", [100.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
def test_a_high_temperature_is_as_exact_as_a_low_one(temperature: float, dtype: torch.dtype, kept: bool) -> None:
    """Against torch in float64, which at 100,000 agrees with the limit: half the variance of the difference."""
    classes = 50 if kept else 1000
    student_NC, teacher_NC, _ = batch(32, classes, dtype)
    target = make_top_k_target(teacher_NC, classes, (temperature,)) if kept else teacher_NC
    if kept:
        teacher_NC = torch.zeros(32, classes).scatter(1, target.index.long(), target.value.float())
    z_NC = student_NC.detach().double().requires_grad_()
    log_q_NC, p_NC = F.log_softmax(z_NC / temperature, 1), F.softmax(teacher_NC.double() / temperature, 1)
    expected = temperature**2 * F.kl_div(log_q_NC, p_NC, reduction="batchmean")
    difference_NC = z_NC.detach() - teacher_NC
    if temperature == 1e5:
        variance = difference_NC.var(1, correction=0).mean()
        assert float(expected) == pytest.approx(float(variance) / 2, rel=1e-3)

    found = distillation_loss(student_NC, target, temperature=temperature, soft_weight=1.0, hard_weight=0.0)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    (gradient_NC,) = torch.autograd.grad(found, student_NC)
    (exact_NC,) = torch.autograd.grad(expected, z_NC)
    assert gradient_NC.dtype == dtype
    torch.testing.assert_close(
        gradient_NC.double(), exact_NC.to(dtype).double(), rtol=1e-2, atol=1e-4 / exact_NC.numel()
    )
    if not kept:
        q_NC, log_p_NC = log_q_NC.detach().exp(), p_NC.log()
        reverse = temperature**2 * (q_NC * (log_q_NC.detach() - log_p_NC)).sum(1).mean()
        assert float(reverse_kl(student_NC, target, temperature=temperature)) == pytest.approx(float(reverse), rel=1e-4)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("kind", TARGETS)
def test_torch_func(impl: str, kind: str) -> None:
    """grad, jvp, vmap and a Hessian, against autograd of the reference; a row that counts for nothing holds NaN."""
    student_NC, _, labels_N = batch(5, 7, torch.float64)
    student_NC.data[3] = torch.nan
    labels_N[1] = -100
    weight_N = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0])
    target = make_target(kind, 5, 7, 3.0, torch.Generator().manual_seed(5))
    options = {**KD, "label_smoothing": 0.1}

    def loss(logits: Tensor, labels: Tensor = labels_N, by: Tensor = weight_N, **others: Any) -> Any:
        return distillation_loss(logits, target, labels, weight=by, **{**options, "impl": impl, **others})

    logits_NC = student_NC.detach()
    (expected_NC,) = torch.autograd.grad(loss(student_NC, impl="reference"), student_NC)
    torch.testing.assert_close(torch.func.grad(loss)(logits_NC), expected_NC)
    direction_NC = torch.randn(5, 7, dtype=torch.float64)
    _, along = torch.func.jvp(loss, (logits_NC,), (direction_NC,))
    torch.testing.assert_close(along, (expected_NC * direction_NC).sum())
    many = torch.stack([logits_NC, logits_NC * 2, logits_NC - 1])
    labels = torch.stack([labels_N, labels_N, torch.full_like(labels_N, -100)])
    found = torch.func.vmap(loss)(many, labels, weight_N.expand(3, 5))
    torch.testing.assert_close(found, torch.stack([loss(*each) for each in zip(many, labels, strict=True)]))


@pytest.mark.parametrize(
    "loss", [reverse_kl, decoupled_kd, standardized_kl, jensen_shannon, mse_logits], ids=lambda loss: loss.__name__
)
def test_torch_func_of_the_other_losses(loss: Any) -> None:
    student_NC, teacher_NC, labels_N = batch(5, 7, torch.float64)
    more = {} if loss is mse_logits else {"temperature": 2.0}

    def of(logits: Tensor) -> Tensor:
        return loss(logits, teacher_NC, *([labels_N] if loss is decoupled_kd else []), **more)

    (expected_NC,) = torch.autograd.grad(of(student_NC), student_NC)
    torch.testing.assert_close(torch.func.grad(of)(student_NC.detach()), expected_NC)


def test_transforms_that_a_fast_path_has_no_rules_for_are_refused() -> None:
    student_NC, teacher_NC, _ = batch()
    for impl in ("compile", "triton"):
        with pytest.raises(UsageError, match=r"no rules for torch.func; use impl='reference'"):
            torch.func.grad(lambda z, impl=impl: distillation_loss(z, teacher_NC, **KD, impl=impl))(student_NC.detach())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"impl='reference'"):
        distillation_loss(forward_ad.make_dual(student_NC.detach(), teacher_NC), teacher_NC, **KD)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_is_one_graph() -> None:
    """`torch.compile(fullgraph=True)` over a user's own model and the module's default implementation."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Linear(5, 11)
    loss = DistillationLoss(**KD, label_smoothing=0.1)
    inputs, teacher_NC = torch.randn(6, 5), torch.randn(6, 11)
    labels_N = torch.tensor([0, 1, -100, 3, 4, 5])
    target = DenseTarget(scaled_logits=teacher_NC.half(), temperature=3.0, retemperable=False)

    def step(x: Tensor, target: DenseTarget, labels: Tensor) -> Tensor:
        value = loss(model(x), target, labels)
        assert isinstance(value, Tensor)
        return value

    expected = step(inputs, target, labels_N)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(step, fullgraph=True)(inputs, target, labels_N)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_importing_the_loss_does_not_import_triton() -> None:
    code = "import sys, softlabel.loss; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_triton_on_the_cpu_says_what_is_missing() -> None:
    """In a process of its own: whether triton interprets is decided when it is imported."""
    code = (
        "import torch, softlabel.errors, softlabel.loss as L\n"
        "z = torch.randn(2, 3)\n"
        "try:\n    L.distillation_loss(z, z, temperature=1., soft_weight=1., hard_weight=0., impl='triton')\n"
        "except softlabel.errors.UsageError as error:\n    print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "impl='triton': expected" in done.stdout, done.stderr
