"""What a teacher says about a batch of rows, in the forms in which a store can hold it.

N rows, C classes, K kept classes, S drawn classes, D width of the teacher's last hidden layer, E temperatures
for which a top-k target knows its tail, X exact entries of an int8 row.

`scaled_logits` are logits divided by `temperature`, up to a constant per row (a store subtracts the row's maximum).
A target is a plain frozen record of tensors: indexing, moving and pinning it give another one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from softlabel.errors import MismatchError

__all__ = [
    "DenseTarget",
    "HeadTarget",
    "Int8Target",
    "SampledTarget",
    "SigmoidTarget",
    "Target",
    "TopKTarget",
    "as_target",
    "blanked",
    "flatten_target",
    "retemper_factor",
]


class _Record:
    """Moves every tensor of a target at once. Tensors of a head that all rows share are not indexed by row."""

    __slots__ = ()
    _shared: ClassVar[tuple[str, ...]] = ()

    def _map(self, change: Callable[[Tensor], Tensor], *, rows_only: bool = False) -> Self:
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and not (rows_only and field.name in self._shared):
                changed[field.name] = change(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def take(self, rows: slice | Tensor) -> Self:
        """The same target for some of the rows (a slice, or int64 / bool positions)."""
        return self._map(lambda tensor: _take_rows(tensor, rows), rows_only=True)


# Types of class numbers that torch cannot index on a GPU -> those of as many bytes that it can.
_INDEXED_AS = {torch.uint16: torch.int16, torch.uint32: torch.int32}


def _take_rows(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    kind = _INDEXED_AS.get(tensor.dtype)
    return tensor[rows] if kind is None else tensor.view(kind)[rows].view(tensor.dtype)


T = TypeVar("T", bound=_Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTarget(_Record):
    """Every class: `scaled_logits` (N, C) float16, bfloat16, float32 or float64."""

    scaled_logits: Tensor
    temperature: float
    retemperable: bool

    def __len__(self) -> int:
        return self.scaled_logits.shape[0]

    @property
    def num_classes(self) -> int:
        return self.scaled_logits.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Target(_Record):
    """Every class in one byte: scaled logits `q * scale + offset`, with `top_value` in place of it at `top_index`.

    q (N, C) int8, scale and offset (N,) float32, top_index (N, X) of any integer type, top_value (N, X) float16 or
    float32.
    """

    q: Tensor
    scale: Tensor
    offset: Tensor
    top_index: Tensor
    top_value: Tensor
    temperature: float
    retemperable: bool

    def __len__(self) -> int:
        return self.q.shape[0]

    @property
    def num_classes(self) -> int:
        return self.q.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTarget(_Record):
    """The K largest classes and how much the others weigh together.

    index (N, K) of any integer type, distinct in a row. value (N, K): scaled logits minus the row's maximum.
    tail (N, E) float32: for each of the E `tail_temperatures`, log-sum-exp over the classes that were not kept of
    (logit - row maximum) / temperature; -inf when nothing was left out. Kept probabilities and tail mass are exact at
    those temperatures and unknown at every other one.
    """

    index: Tensor
    value: Tensor
    tail: Tensor
    tail_temperatures: tuple[float, ...]
    temperature: float
    num_classes: int

    def __len__(self) -> int:
        return self.index.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTarget(_Record):
    """Classes drawn from the teacher: index (N, S) of any integer type, weight (N, S) float whose expectation, summed
    by class, is the teacher's softmax at `temperature`. A class may be drawn twice; padding has weight 0 (and any valid
    index). It knows no other temperature, and not the teacher's entropy: its soft term is the cross-entropy, which is
    the KL divergence plus a constant that no gradient sees."""

    index: Tensor
    weight: Tensor
    temperature: float
    num_classes: int

    def __len__(self) -> int:
        return self.index.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTarget(_Record):
    """The teacher's last hidden layer, from which logits at temperature 1 follow: z = `hidden @ weight.T + bias`, or
    with a `softcap` c, c tanh(z / c).

    hidden (N, D) float, or int8 with hidden_scale (N,) float32; weight (C, D) and bias (C,) or None, shared by all
    rows.
    """

    _shared: ClassVar[tuple[str, ...]] = ("weight", "bias")

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    hidden_scale: Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise MismatchError(f"head target: softcap: expected a number above 0, found {self.softcap}")

    def cap(self, logits: Tensor) -> Tensor:
        """The logits that answers of the last layer stand for, in their place."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def temperature(self) -> float:
        return 1.0

    @property
    def retemperable(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmoidTarget(_Record):
    """Independent outputs, each a sigmoid of its own: `scaled_logits` (N, C) float16, bfloat16, float32 or float64,
    logits divided by `temperature`, with nothing subtracted."""

    scaled_logits: Tensor
    temperature: float
    retemperable: bool

    def __len__(self) -> int:
        return self.scaled_logits.shape[0]

    @property
    def num_classes(self) -> int:
        return self.scaled_logits.shape[1]


Target = DenseTarget | Int8Target | TopKTarget | SampledTarget | HeadTarget | SigmoidTarget


def as_target(target: Target | Tensor) -> Target:
    """A plain tensor is the teacher's raw logits (N, C): temperature 1, any other follows exactly."""
    if isinstance(target, Tensor):
        return DenseTarget(scaled_logits=target, temperature=1.0, retemperable=True)
    return target


def make_empty_target(rows: int, classes: int, temperature: float, device: torch.device) -> SampledTarget:
    """A target of which nothing is known, for a loss of hard labels alone."""
    index_N0 = torch.zeros((rows, 0), dtype=torch.int64, device=device)
    return SampledTarget(index=index_N0, weight=index_N0.float(), temperature=float(temperature), num_classes=classes)


def flatten_target(target: T, shape: torch.Size) -> T:
    """Rows that lie in several dimensions (B, L) one behind the other; a target of B * L rows is that already."""
    if len(shape) < 2:
        return target
    first: Any = getattr(target, fields(target)[0].name)  # type: ignore[arg-type]
    if first.shape[:-1] != shape:
        return target
    return target._map(lambda tensor: tensor.reshape(-1, *tensor.shape[len(shape) :]), rows_only=True)


def blanked(target: Target, counts_N: Tensor) -> Target:
    """The target with 0 in every number of the rows that do not count, so that nothing of them can become NaN."""

    def blank(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.where(counts_N.reshape(-1, *[1] * (tensor.dim() - 1)), tensor, 0.0)

    return target._map(blank, rows_only=True)


def retemper_factor(target: Target, temperature: float) -> float:
    """By what the target's scaled logits are multiplied to be those at `temperature`.

    Raises MismatchError where that would not be exact.
    """
    factor = target.temperature / temperature
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        return 1.0
    if isinstance(target, TopKTarget):
        tail_column(target, temperature)
    elif isinstance(target, SampledTarget):
        raise MismatchError(
            f"sampled target: expected temperature {target.temperature:g}, the one at which its classes were drawn, "
            f"found a loss with temperature {temperature:g}; use that temperature or generate another store"
        )
    elif not target.retemperable:
        raise MismatchError(
            f"target: averaged probabilities at temperature {target.temperature:g} do not re-temper exactly, found a "
            f"loss with temperature {temperature:g}; use temperature {target.temperature:g}, or generate with "
            f"'--combine logits' or '--combine keep'"
        )
    return factor


def tail_column(target: TopKTarget, temperature: float) -> int:
    """Which column of `tail` belongs to `temperature`; MismatchError if there is none."""
    for column, known in enumerate(target.tail_temperatures):
        if math.isclose(known, temperature, rel_tol=1e-6):
            return column
    known_text = ", ".join(f"{known:g}" for known in target.tail_temperatures)
    raise MismatchError(
        f"top-k target: its tail is known at temperature {known_text}, found a loss with temperature {temperature:g}; "
        f"use one of those, or generate a store that declares {temperature:g}"
    )
