"""Cases of the loss that every implementation has to get right, and how they are compared.

N rows, C classes, K kept classes, T temperature.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softlabel.loss import (
    DenseTarget,
    HeadTarget,
    Int8Target,
    SampledTarget,
    Target,
    TopKTarget,
    distillation_loss,
)
from tests.support import reference

# Half-precision logits are computed in float32, so that values are as good; their gradient is rounded once, and once
# more by an upstream gradient that is not 1 (bfloat16 keeps 8 bits, and the Triton interpreter truncates it).
VALUE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
GRAD_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.7e-2, torch.float16: 2e-3}

TARGETS = ("dense16", "dense32", "raw", "int8", "top1", "topk", "topall", "sampled", "head", "head8")
TAILS = ("ghost", "uniform", "renormalize")


def narrow_index(index: Tensor) -> Tensor:
    """Class ids in the type in which a store has them."""
    return index.to(torch.uint8 if not len(index) or index.max() < 256 else torch.uint16)


def make_top_k_target(teacher_NC: Tensor, k: int, temperatures: tuple[float, ...]) -> TopKTarget:
    """Keeps the k largest of raw logits (temperature 1), in float16 as a store does."""
    relative_NC = teacher_NC.double() - teacher_NC.double().amax(1, keepdim=True)
    value_NK, index_NK = relative_NC.topk(k, dim=1)
    rest_NC = relative_NC.scatter(1, index_NK, -torch.inf)
    tail_NE = torch.stack([(rest_NC / t).logsumexp(1) for t in temperatures], dim=1)
    return TopKTarget(
        index=narrow_index(index_NK) if k == 1 else index_NK,
        value=value_NK.half(),
        tail=tail_NE.float(),
        tail_temperatures=temperatures,
        temperature=1.0,
        num_classes=teacher_NC.shape[1],
    )


def make_target(kind: str, rows: int, classes: int, temperature: float, generator: torch.Generator) -> Target | Tensor:
    teacher_NC = torch.randn(rows, classes, generator=generator) * 4
    if kind == "raw":
        return teacher_NC
    if kind == "dense16":
        scaled_NC = (teacher_NC - teacher_NC.amax(1, keepdim=True)) / temperature
        return DenseTarget(scaled_logits=scaled_NC.half(), temperature=temperature, retemperable=False)
    if kind == "dense32":
        return DenseTarget(scaled_logits=teacher_NC / 3, temperature=3.0, retemperable=True)
    if kind == "int8":
        exact = min(8, classes)
        order_NX = torch.rand(rows, classes, generator=generator).topk(exact, dim=1).indices
        return Int8Target(
            q=torch.randint(-127, 128, (rows, classes), dtype=torch.int8, generator=generator),
            scale=torch.rand(rows, generator=generator) * 0.05,
            offset=torch.randn(rows, generator=generator),
            top_index=narrow_index(order_NX),
            top_value=(torch.rand(rows, exact, generator=generator) * 9).half(),
            temperature=2.0,
            retemperable=True,
        )
    if kind == "sampled":
        return SampledTarget(
            index=torch.randint(0, classes, (rows, 7), generator=generator),
            weight=torch.rand(rows, 7, generator=generator) * (torch.rand(rows, 7, generator=generator) > 0.3) / 2.5,
            temperature=temperature,
            num_classes=classes,
        )
    if kind.startswith("head"):
        hidden_ND = torch.randn(rows, 6, generator=generator)
        weight_CD = torch.randn(classes, 6, generator=generator)
        if kind == "head":
            return HeadTarget(hidden=hidden_ND.half(), weight=weight_CD)
        scale_N = hidden_ND.abs().amax(1) / 127
        return HeadTarget(
            hidden=(hidden_ND / scale_N[:, None]).round().to(torch.int8),
            hidden_scale=scale_N,
            weight=weight_CD,
            bias=torch.randn(classes, generator=generator),
        )
    kept = {"top1": 1, "topk": min(5, classes), "topall": classes}[kind]
    return make_top_k_target(teacher_NC, kept, (1.0, temperature))


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str = "dense16"
    dtype: torch.dtype = torch.float32
    classes: int = 10
    rows: int = 7
    temperature: float = 4.0
    soft_weight: float = 0.7
    hard_weight: float = 0.4
    label_smoothing: float = 0.0
    labelled: str = "some"  # all, some, none, absent
    weight: bool = False
    soft_mask: bool = False
    reduction: str = "mean"
    tail: str = "ghost"
    layout: str = "contiguous"  # contiguous, transposed, sliced
    size: float = 4.0

    def __str__(self) -> str:
        plain = Case()
        parts = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)]
        return ",".join(parts).replace("torch.", "") or "plain"

    def make(self) -> tuple[Tensor, Target | Tensor, Tensor | None, Tensor | None, Tensor | None]:
        generator = torch.Generator().manual_seed(len(str(self)) + self.classes)
        logits_NC = (torch.randn(self.rows, self.classes, generator=generator) * self.size).to(self.dtype)
        if self.layout == "transposed":
            logits_NC = logits_NC.T.contiguous().T
        elif self.layout == "sliced":
            wide = torch.zeros(self.rows, self.classes + 3, dtype=self.dtype)
            wide[:, 2:-1] = logits_NC
            logits_NC = wide[:, 2:-1]
        labels_N = torch.randint(0, self.classes, (self.rows,), generator=generator)
        if self.labelled == "some":
            labels_N[1::3] = -100
        elif self.labelled == "none":
            labels_N[:] = -100
        weight_N = mask_N = None
        if self.weight:
            weight_N = torch.rand(self.rows, generator=generator)
            weight_N[::3] = 0
            with torch.no_grad():
                logits_NC[0] = torch.nan
        if self.soft_mask:
            mask_N = torch.arange(self.rows) % 3 != 2
        target = make_target(self.kind, self.rows, self.classes, self.temperature, generator)
        return logits_NC, target, None if self.labelled == "absent" else labels_N, weight_N, mask_N


def compare_with_reference(case: Case, impl: str, *, upstream: float = 1.0, device: str = "cpu") -> None:
    """Value and gradient of one case against the naive reference."""
    logits_NC, target, labels_N, weight_N, mask_N = case.make()
    options = {
        "temperature": case.temperature,
        "soft_weight": case.soft_weight,
        "hard_weight": case.hard_weight,
        "label_smoothing": case.label_smoothing,
        "reduction": case.reduction,
        "tail": case.tail,
    }
    exact_NC = logits_NC.detach().double().requires_grad_()
    expected = reference.distillation(exact_NC, target, labels_N, weight=weight_N, soft_mask=mask_N, **options)
    place = [None if x is None else x.to(device) for x in (logits_NC, target, labels_N, weight_N, mask_N)]
    student_NC = place[0].detach().requires_grad_()
    before = student_NC.detach().clone()
    found = distillation_loss(student_NC, place[1], place[2], weight=place[3], soft_mask=place[4], impl=impl, **options)
    assert found.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert found.shape == expected.shape
    # Triton takes its scalars (temperature, smoothing) in float32, which shows with float64 logits.
    rounded = 1e-6 if impl == "triton" else 0.0
    value_bound = max(VALUE_TOLERANCE[case.dtype], rounded)
    torch.testing.assert_close(found.double().cpu(), expected.detach(), rtol=value_bound, atol=value_bound)

    by = (
        torch.linspace(0.5, 2.0, len(found)).to(found) if case.reduction == "none" else torch.tensor(upstream).to(found)
    )
    if expected.requires_grad:
        expected.backward(by.double().cpu())
    expected_grad = torch.zeros_like(exact_NC) if exact_NC.grad is None else exact_NC.grad
    found.backward(by)
    assert student_NC.grad is not None
    assert student_NC.grad.dtype == case.dtype
    grad_bound = max(GRAD_TOLERANCE[case.dtype], rounded)
    size = max(expected_grad.nan_to_num().abs().max().item(), 1e-2) if expected_grad.numel() else 1.0
    torch.testing.assert_close(
        student_NC.grad.double().cpu(), expected_grad, rtol=0, atol=grad_bound * size, equal_nan=False
    )
    assert torch.equal(student_NC.detach().nan_to_num(), before.nan_to_num()), "the student's logits were written to"


def make_quick_cases() -> Iterator[Case]:
    """Every switch once, and every target with the switches that meet it."""
    for kind in TARGETS:
        for tail in TAILS if kind.startswith("top") else ("ghost",):
            yield Case(kind=kind, tail=tail, label_smoothing=0.1)
            yield Case(kind=kind, tail=tail, weight=True, soft_mask=True, dtype=torch.bfloat16, temperature=2.0)
    for temperature in (0.5, 1.0, 2.0, 20.0):
        yield Case(temperature=temperature)
        yield Case(kind="topk", temperature=temperature)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        yield Case(dtype=dtype)
        yield Case(dtype=dtype, kind="topk", classes=401)
    for soft_weight, hard_weight in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        yield Case(soft_weight=soft_weight, hard_weight=hard_weight)
        yield Case(soft_weight=soft_weight, hard_weight=hard_weight, weight=True, kind="topk")
    for labelled in ("all", "none", "absent"):
        yield Case(labelled=labelled, label_smoothing=0.2)
    for reduction in ("sum", "none"):
        yield Case(reduction=reduction)
        yield Case(reduction=reduction, weight=True, soft_mask=True)
    for layout in ("transposed", "sliced"):
        yield Case(layout=layout)
        yield Case(layout=layout, kind="topk", dtype=torch.bfloat16)
    for classes in (1, 2, 401, 1000, 1271):
        yield Case(classes=classes)
        yield Case(classes=classes, kind="topk")
    yield Case(rows=0, labelled="all")
    yield Case(rows=0, kind="topk", reduction="none")
    yield Case(size=1e4)
    yield Case(size=1e4, kind="topk")
    yield Case(label_smoothing=1.0)


def make_full_cases() -> Iterator[Case]:
    for kind in TARGETS:
        for tail in TAILS if kind.startswith("top") else ("ghost",):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for temperature in (0.5, 1.0, 2.0, 4.0, 20.0):
                    for soft_weight, hard_weight, weight in ((0.6, 0.5, True), (1.0, 0.0, False), (0.0, 1.0, True)):
                        yield Case(
                            kind=kind,
                            tail=tail,
                            dtype=dtype,
                            temperature=temperature,
                            soft_weight=soft_weight,
                            hard_weight=hard_weight,
                            weight=weight,
                            label_smoothing=0.1 if weight else 0.0,
                        )
            for classes in (1, 2, 10, 401, 1000, 1271, 21841):
                for labelled in ("all", "some", "none"):
                    for layout in ("contiguous", "transposed"):
                        rows = 3 if classes > 10000 else 7
                        yield Case(kind=kind, tail=tail, classes=classes, rows=rows, labelled=labelled, layout=layout)
            yield Case(kind=kind, tail=tail, size=1e4)
            yield Case(kind=kind, tail=tail, rows=0)
