"""The fused linear and distillation loss against logits of all rows in float64, and what it promises beyond numbers.

N rows, D width, C classes.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from softlabel.errors import MismatchError, UsageError
from softlabel.loss import (
    HeadTarget,
    SigmoidTarget,
    distillation_loss_components,
    linear_distillation_loss,
    linear_distillation_loss_components,
)
from tests.support import reference
from tests.support.loss_cases import TAILS, TARGETS, make_target

KD = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4}
HARD = {"temperature": 2.0, "soft_weight": 0.0, "hard_weight": 0.4}
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
IMPLS = ["reference", "auto"]


class Case:
    """Hidden states, matrix and bias of `dtype`; row 0 is of weight 0 and holds NaN, in the target too; row 1 has no
    label, row 2 no target, row 3 neither."""

    def __init__(
        self,
        kind: str,
        rows: int = 9,
        classes: int = 50,
        width: int = 6,
        dtype: torch.dtype = torch.float32,
        t: float = 2.0,
    ) -> None:
        generator = torch.Generator().manual_seed(rows + classes)
        hidden_ND = torch.randn(rows, width, generator=generator)
        hidden_ND[0] = torch.nan
        hidden_ND[3] = torch.inf
        weight_CD, bias_C = torch.randn(classes, width, generator=generator), torch.randn(classes, generator=generator)
        self.given = [one.to(dtype) for one in (hidden_ND, weight_CD, bias_C)]
        self.labels_N = torch.randint(0, classes, (rows,), generator=generator)
        self.labels_N[[1, 3]] = -100
        self.weight_N = torch.rand(rows, generator=generator) + 0.1
        self.weight_N[0] = 0
        self.mask_N = torch.ones(rows, dtype=torch.bool)
        self.mask_N[[2, 3]] = False
        self.rows = {"weight": self.weight_N, "soft_mask": self.mask_N}
        self.target = None if kind == "hard" else make_target(kind, rows, classes, t, generator)
        name = {"raw": None, "hard": None, "int8": "scale", "sampled": "weight"}.get(
            kind, "value" if "top" in kind else ""
        )
        if kind == "raw":
            self.target[0] = torch.nan
        elif name == "":
            name = {"head": "hidden", "head8": "hidden_scale"}.get(kind, "scaled_logits")
        if name:
            getattr(self.target, name)[0] = torch.nan

    def leaves(self) -> list[Tensor]:
        return [one.clone().requires_grad_() for one in self.given]

    def expected(
        self, up: Tensor | float = 1.0, scale: float = 1.0, cap: float | None = None, **options: Any
    ) -> list[Tensor]:
        """The loss, and the gradients of the three, of the rows that count in some term, all in float64."""
        hidden_ND, *rest = leaves = [one.double().clone().requires_grad_() for one in self.given]
        z_NC = F.linear(torch.where(hidden_ND.isfinite(), hidden_ND, 0.0), *rest) * scale
        z_NC = z_NC if cap is None else cap * torch.tanh(z_NC / cap)
        loss = reference.distillation(z_NC, self.target, self.labels_N, **self.rows, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.as_tensor(up).double().expand(loss.shape))]


def compare(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, bound: float | None = None) -> None:
    """Every difference against the largest number of its tensor."""
    for one, exact in zip(found, expected, strict=True):
        most = (BOUNDS[dtype] if bound is None else bound) * float(exact.abs().max())
        torch.testing.assert_close(one.detach().double(), exact, rtol=0, atol=most)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize("kind", ["dense16", "int8", "topk", "sampled", "head8", "hard"])
def test_a_large_vocabulary_in_chunks_of_any_size(kind: str, temperature: float) -> None:
    case = Case(kind, 64, 128_256, 32, t=temperature)
    options = {**(HARD if kind == "hard" else KD), "temperature": temperature}
    expected = case.expected(**options)
    for chunk_rows in (1, 7, 64):
        leaves = case.leaves()
        loss = linear_distillation_loss(
            *leaves, case.target, case.labels_N, **case.rows, **options, chunk_rows=chunk_rows
        )
        loss.backward()
        # One row times the matrix is summed in another order by BLAS, without blocks: 128,256 roundings in a line.
        compare([loss, *(one.grad for one in leaves)], expected, torch.float32, 1e-4 if chunk_rows == 1 else 1e-5)
        assert leaves[0].grad[[0, 3]].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*TARGETS, "hard"])
def test_every_target_and_reduction(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype=dtype)
    for tail in TAILS if kind.startswith("top") else TAILS[:1]:
        for reduction, impl in (("mean", "auto"), ("sum", "reference"), ("none", "torch")):
            up = torch.linspace(0.5, -2.0, 9) if reduction == "none" else torch.tensor(3.0)
            options = {**(HARD if kind == "hard" else KD), "tail": tail, "reduction": reduction, "label_smoothing": 0.1}
            expected = case.expected(up, **options)
            leaves = case.leaves()
            loss = linear_distillation_loss(
                *leaves, case.target, case.labels_N, **case.rows, **options, impl=impl, chunk_rows=4
            )
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            loss.backward(up.to(loss))
            assert [one.grad.dtype for one in leaves] == [dtype] * 3
            compare([loss.detach(), *(one.grad for one in leaves)], expected, dtype)
            assert leaves[0].grad[[0, 3]].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("scale", "cap"), [(0.3, None), (1.0, 2.0), (1.5, 3.0)])
def test_scaled_and_capped_logits(impl: str, scale: float, cap: float | None) -> None:
    for kind in ("dense32", "topk"):
        case = Case(kind, dtype=torch.float64)
        leaves = case.leaves()
        loss = linear_distillation_loss(
            *leaves,
            case.target,
            case.labels_N,
            **case.rows,
            **KD,
            logit_scale=scale,
            softcap=cap,
            chunk_rows=2,
            impl=impl,
        )
        loss.backward()
        compare([loss, *(one.grad for one in leaves)], case.expected(scale=scale, cap=cap, **KD), torch.float64)


@pytest.mark.parametrize("temperature", [100.0, 1e5])
def test_a_high_temperature_is_computed_in_float64(temperature: float) -> None:
    case = Case("raw")
    options = {**KD, "temperature": temperature}
    leaves = case.leaves()
    loss = linear_distillation_loss(
        *leaves, case.target, case.labels_N, **case.rows, **options, softcap=5.0, chunk_rows=4
    )
    assert loss.dtype == torch.float32
    loss.backward()
    compare([loss, *(one.grad for one in leaves)], case.expected(cap=5.0, **options), torch.float32)


def test_without_weights_bias_and_labels_and_with_frozen_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_ND, weight_CD = torch.randn(5, 4, generator=generator), torch.randn(11, 4, generator=generator)
    teacher_NC, labels_N = torch.randn(5, 11, generator=generator), torch.tensor([1, -100, 3, 10, 0])
    for labels in (None, labels_N):
        for wanted in ((True, False), (False, True), (True, True)):
            leaves = [
                one.clone().requires_grad_(want) for one, want in zip((hidden_ND, weight_CD), wanted, strict=True)
            ]
            parts = linear_distillation_loss_components(*leaves, None, teacher_NC, labels, **KD, chunk_rows=2)
            expected = distillation_loss_components(F.linear(*leaves), teacher_NC, labels, **KD)
            torch.testing.assert_close(parts, expected)
            grown = [one for one, want in zip(leaves, wanted, strict=True) if want]
            torch.testing.assert_close(
                torch.autograd.grad(parts.total, grown), torch.autograd.grad(expected.total, grown)
            )
    with torch.no_grad():
        found = linear_distillation_loss(*leaves, None, teacher_NC, labels_N, **KD)
    torch.testing.assert_close(found, expected.total.detach())
    assert not found.requires_grad
    nothing = linear_distillation_loss(*leaves, None, teacher_NC, labels_N, **KD, weight=torch.zeros(5))
    nothing.backward()
    assert nothing == 0
    assert all(one.grad.eq(0).all() for one in leaves)


@pytest.mark.parametrize("kind", ["dense16", "topk", "head"])
def test_accumulated_parts_are_the_whole(kind: str) -> None:
    """Sums over parts, divided by what counts in all of them: rows with a target and with a label differ in number."""
    case = Case(kind)
    expected = case.expected(**KD)
    counted_N = case.weight_N
    soft, hard = counted_N[case.mask_N].sum(), counted_N[case.labels_N != -100].sum()
    options = {**KD, "soft_weight": KD["soft_weight"] / float(soft), "hard_weight": KD["hard_weight"] / float(hard)}
    leaves, total = case.leaves(), torch.zeros(())
    for part in (slice(0, 5), slice(5, 9)):
        rows = {name: one[part] for name, one in case.rows.items()}
        target, labels_N = case.target.take(part), case.labels_N[part]
        loss = linear_distillation_loss(
            leaves[0][part], *leaves[1:], target, labels_N, **rows, **options, reduction="sum"
        )
        loss.backward()
        total += loss.detach()
    compare([total, *(one.grad for one in leaves)], expected, torch.float32)


class Largest(TorchDispatchMode):
    """The most elements of a result of an operation."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return result


@pytest.mark.parametrize("kind", ["topk", "sampled", "head", "head8", "hard"])
def test_logits_of_all_rows_never_exist(kind: str) -> None:
    case = Case(kind, 60, 2000, 3)
    with Largest() as largest:
        loss = linear_distillation_loss(
            *case.leaves(), case.target, case.labels_N, **case.rows, **(HARD if kind == "hard" else KD), chunk_rows=6
        )
        loss.backward()
    assert largest.elements == 6 * 2000


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_large_head_is_its_logits(dtype: torch.dtype) -> None:
    """One whose matrix is larger than a chunk, and has to be multiplied part by part in half precision."""
    generator = torch.Generator().manual_seed(2)
    hidden_ND, weight_CD = torch.randn(3, 200, generator=generator), torch.randn(100_000, 200, generator=generator) / 10
    head = HeadTarget(
        hidden=hidden_ND.to(dtype), weight=weight_CD.to(dtype), bias=torch.randn(100_000, generator=generator)
    )
    logits_NC = F.linear(head.hidden.double(), head.weight.double(), head.bias.double())
    given = (
        torch.randn(3, 4, generator=generator).requires_grad_(),
        torch.randn(100_000, 4, generator=generator),
        None,
    )
    found, expected = (linear_distillation_loss(*given, target, None, **KD) for target in (head, logits_NC))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, given[0]), torch.autograd.grad(expected, given[0]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["dense16", "head", "hard"])
def test_logits_are_observed_once_and_change_nothing(kind: str, impl: str) -> None:
    case = Case(kind)
    settings = HARD if kind == "hard" else KD
    found: dict[int, Tensor] = {}
    targets = []

    def observe(rows: slice | Tensor, logits_RC: Tensor, target: object) -> None:
        places = torch.arange(9)[rows].tolist()
        assert not found.keys() & set(places)
        found.update(zip(places, logits_RC.clone(), strict=True))
        targets.append(0 if target is None else len(target))  # type: ignore[arg-type]

    leaves = case.leaves()
    given = {**settings, **case.rows, "chunk_rows": 2, "impl": impl}
    loss = linear_distillation_loss_components(*leaves, case.target, case.labels_N, observe=observe, **given).total
    plain = linear_distillation_loss(*case.leaves(), case.target, case.labels_N, **given)
    assert loss.equal(plain)
    loss.backward(retain_graph=True)
    loss.backward()
    counted = [row for row in range(9) if row not in ((0, 1, 3) if kind == "hard" else (0, 3))]
    assert sorted(found) == counted
    assert sum(targets) == (0 if kind == "hard" else len(counted))
    hidden_ND, weight_CD, bias_C = case.given
    for row, logits_C in found.items():
        assert torch.allclose(logits_C.float(), F.linear(hidden_ND[row], weight_CD, bias_C), atol=1e-5)


@pytest.mark.parametrize("kind", ["dense16", "head"])
def test_sequences_are_their_positions(kind: str) -> None:
    case = Case(kind)
    options = {**KD, "reduction": "none"}
    expected = linear_distillation_loss(*case.given, case.target, case.labels_N, **case.rows, **options)
    rows = {name: one.reshape(3, 3) for name, one in case.rows.items()}
    hidden = case.given[0].reshape(3, 3, 6)
    found = linear_distillation_loss(
        hidden, *case.given[1:], case.target, case.labels_N.reshape(3, 3), **rows, **options
    )
    assert torch.equal(found, expected.reshape(3, 3))


def test_backward_again_gives_the_same_gradients_and_notices_changes() -> None:
    case = Case("topk")
    leaves = case.leaves()
    weight_CD = leaves[1] * 1.0
    loss = linear_distillation_loss(leaves[0], weight_CD, leaves[2], case.target, case.labels_N, **case.rows, **KD)
    wanted = [leaves[0], weight_CD, leaves[2]]
    first = torch.autograd.grad(loss, wanted, torch.tensor(5.0), retain_graph=True)
    kept = [one.clone() for one in first]
    second = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(kept, [5 * one for one in second])
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    with torch.no_grad():
        weight_CD.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused_with_the_remedy(reduction: str) -> None:
    case = Case("dense16", dtype=torch.float64)
    for each in range(3):
        leaves = case.leaves()
        loss = linear_distillation_loss(*leaves, case.target, case.labels_N, **case.rows, **KD, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), leaves[each], create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*impl='reference'"):
            gradient.sum().backward()
    with forward_ad.dual_level():
        parts = [forward_ad.make_dual(one, torch.ones_like(one)) for one in case.given]
        with pytest.raises(RuntimeError, match=r"impl='reference'"):
            linear_distillation_loss(*parts, case.target, case.labels_N, **case.rows, **KD)
    leaves = [case.given[0][4:7].clone().requires_grad_(), *case.leaves()[1:]]

    def loss_of(*given: Tensor) -> Tensor:
        return linear_distillation_loss(
            *given, case.target.take(slice(4, 7)), None, **KD, impl="reference", softcap=3.0
        )

    assert torch.autograd.gradgradcheck(loss_of, leaves)


def test_torch_func_is_the_reference() -> None:
    case = Case("topk", dtype=torch.float64)

    def loss_of(*given: Tensor) -> Tensor:
        return linear_distillation_loss(*given, case.target, case.labels_N, **case.rows, **KD)

    found = torch.func.grad(loss_of, argnums=(0, 1, 2))(*case.given)
    compare(list(found), case.expected(**KD)[1:], torch.float64)


def test_a_compiled_step_breaks_the_graph_and_is_right() -> None:
    """A whole graph is refused; without `fullgraph` the loss runs between two graphs."""
    torch.compiler.reset()
    case = Case("topk")
    hidden_ND = case.given[0].nan_to_num(0.0, 0.0)
    model, head = nn.Linear(6, 6), nn.Linear(6, 50)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step() -> Tensor:
        parts = (model(hidden_ND), head.weight, head.bias, case.target, case.labels_N)
        return linear_distillation_loss(*parts, **case.rows, **KD) * 2

    expected = torch.autograd.grad(step(), [*model.parameters(), *head.parameters()])
    found = torch.autograd.grad(torch.compile(step, backend=backend)(), [*model.parameters(), *head.parameters()])
    torch.testing.assert_close(found, expected)
    assert graphs
    torch.compiler.reset()
    with pytest.raises(Exception, match="linear distillation loss cannot be traced"):
        torch.compile(step, fullgraph=True, backend=backend)()


def test_autocast_takes_parts_of_other_types() -> None:
    case = Case("head")
    expected = linear_distillation_loss(*case.given, case.target, case.labels_N, **case.rows, **KD)
    leaves = [case.given[0].bfloat16().requires_grad_(), *case.leaves()[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_distillation_loss(*leaves, case.target, case.labels_N, **case.rows, **KD)
    found.backward()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-2, atol=0)
    assert [one.grad.dtype for one in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    with pytest.raises(
        MismatchError, match=r"head_weight: expected torch.bfloat16 as the hidden states, found .*autocast"
    ):
        linear_distillation_loss(*leaves, case.target, case.labels_N, **case.rows, **KD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_ND": torch.zeros(6)},
            r"hidden: expected a floating-point tensor \(N, D\) or \(B, L, D\), found .* \(6,\)",
        ),
        ({"head_weight_CD": torch.zeros(11, 5)}, r"head_weight: expected a tensor \(C, 4\), .* found .* \(11, 5\)"),
        ({"head_bias_C": torch.zeros(10)}, r"head_bias: expected a tensor \(11,\) or None, found .* \(10,\)"),
        ({"head_bias_C": torch.zeros(11).double()}, "head_bias: expected torch.float32"),
        ({"target": torch.zeros(6, 12)}, "expected 12 classes"),
        ({"target": None}, "target: expected one for soft_weight 0.7, found None; give soft_weight=0"),
        (
            {"target": SigmoidTarget(scaled_logits=torch.zeros(6, 11), temperature=1.0, retemperable=True)},
            "SigmoidTarget",
        ),
        ({"target": HeadTarget(hidden=torch.zeros(5, 3), weight=torch.zeros(11, 3))}, "expected 6 rows"),
        ({"labels": torch.tensor([0, 1, -100, 11, 4, 5])}, "found 11 in row 3"),
        ({"weight": torch.tensor([0, 1, -0.5, 1, 1, 1])}, "found -0.5 in row 2"),
        ({"soft_weight": -0.1}, "soft_weight: expected a number of at least 0"),
        ({"temperature": 0.0}, "temperature: .* above 0"),
        ({"label_smoothing": 1.5}, "from 0 to 1"),
        ({"reduction": "batchmean"}, "mean, sum, none"),
        ({"tail": "none"}, "ghost, uniform, renormalize"),
        ({"impl": "compile"}, "impl: expected one of auto, reference, torch, triton"),
        ({"softcap": 0.0}, "softcap: expected a number above 0, found 0.0"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a number above 0, found nan"),
        ({"chunk_rows": 0}, "chunk_rows: expected at least 1, found 0"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden_ND": torch.zeros(6, 4),
        "head_weight_CD": torch.zeros(11, 4),
        "head_bias_C": None,
        "target": torch.zeros(6, 11),
        "labels": torch.zeros(6, dtype=torch.long),
        **KD,
    }
    with pytest.raises((MismatchError, UsageError), match=message):
        linear_distillation_loss(**{**arguments, **change})
