"""What a training loop gets, and what it takes to ask for it.

Legend: B batch, H and W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.keys import Keys
from softlabel.inputs.base import Inputs
from softlabel.loss.targets import Target


class BatchKeys(Sequence[str]):
    """The keys of a batch, a sequence like a tuple of strings, which are made when one is asked for.

    Few training loops do, and making them takes as long as gathering the images. Equal to a tuple of the same strings.
    """

    __slots__ = ("_rows", "_table", "_texts")

    def __init__(self, table: Keys, rows: NDArray[np.int64]) -> None:
        self._table, self._rows = table, rows
        self._texts: tuple[str, ...] | None = None

    def _all(self) -> tuple[str, ...]:
        if self._texts is None:
            self._texts = tuple(self._table.take(self._rows).to_list())
        return self._texts

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        return self._all()[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __add__(self, other: Sequence[str]) -> tuple[str, ...]:
        return (*self, *other)

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, BatchKeys) else other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        """The keys of this batch alone travel, as two arrays."""
        taken = self._table.take(self._rows)
        return BatchKeys, (taken, np.arange(len(taken)))


class NamedFields:
    """`batch["labels"]` and `"labels" in batch`, for loops that look into their batches as into a dict."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return any(one.name == name and getattr(self, one.name) is not None for one in fields(self))  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    # A batch is no sequence: without this, Python would ask for item 0.
    __iter__ = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch(NamedFields):
    """B samples on their way into a student.

    `batch["labels"]` and `"labels" in batch` work as well: loops that expect a dict, such as the Trainer of
    transformers, look into their batches so.

    Attributes:
        inputs: what the student takes, not normalised: of images uint8 (B, 3, H, W), RGB; of a student with several
            inputs a dict of tensors by name, each with B as its first axis.
        labels: int64 (B,), -100 where there is none; of independent outputs int8 (B, C): 1, 0, or -1 where unknown.
        keys: B keys, a sequence of strings.
        samples: int64 (B,), which samples of the dataset these are.
        rows: int64 (B,), which rows of the store they were joined to; -1 where there is none.
        target: what the teacher says, for `softlabel.distillation_loss`; None without a store or labels in it.
        has_target: bool (B,), False where the store has no row for the sample (its target, embedding and attention are
            filler); None: all have one, or there is no store at all.
        embedding: float32 (B, D), the teacher's embedding of each sample, or (B, M, D) of a store that keeps its
            members; None unless the loader was asked for it. `run.embedding` of the store says what it is.
        attention: float32 (B, S), or (B, M, S), its maps of attention one after another, which `run.attention` cuts;
            None likewise.
        difference: float32 (B, K, C), halved differences of the teacher's logits along K directions of noise; None
            unless the loader was asked for it.
        copies: uint8 (B, 2 K, 3, H, W), the noisy copies of the views that these are of, not normalised; likewise.
        weight: float32 (B,), 1 where the row counts and 0 where it is filler that makes the shares of all ranks, or
            the last batch, as large as the others; None: all count, on every rank. Filler repeats samples.
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor
    keys: Sequence[str]
    samples: Tensor
    rows: Tensor
    target: Target | None = None
    has_target: Tensor | None = None
    weight: Tensor | None = None
    embedding: Tensor | None = None
    attention: Tensor | None = None
    difference: Tensor | None = None
    copies: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on another device; `samples` and `rows` are for the reader and stay where they are."""
        return replace(
            self,
            inputs=Inputs.of(self.inputs).map(lambda one: one.to(device, non_blocking=non_blocking)).plain,
            labels=self.labels.to(device, non_blocking=non_blocking),
            **move_target(self, device, non_blocking=non_blocking),
            **_map_others(self, lambda one: one.to(device, non_blocking=non_blocking)),
        )

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return replace(
            self,
            inputs=Inputs.of(self.inputs).map(lambda one: one.pin_memory() if one.device.type == "cpu" else one).plain,
            labels=self.labels.pin_memory(),
            **pin_target(self),
            **_map_others(self, Tensor.pin_memory),
        )


# Tensors that few batches have; the first axis of each is B.
RARE = ("weight", "embedding", "attention", "difference", "copies")


def _map_others(batch: Batch, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The tensors that few batches have, changed."""
    found = {name: getattr(batch, name) for name in RARE}
    return {name: None if one is None else change(one) for name, one in found.items()}


class _Targeted(Protocol):
    @property
    def target(self) -> Target | None: ...
    @property
    def has_target(self) -> Tensor | None: ...


def move_target(batch: _Targeted, device: torch.device | str, *, non_blocking: bool) -> dict[str, Any]:
    """The target of a batch, and which rows have one, on another device."""
    return {
        "target": None if batch.target is None else batch.target.to(device, non_blocking=non_blocking),
        "has_target": None if batch.has_target is None else batch.has_target.to(device, non_blocking=non_blocking),
    }


def pin_target(batch: _Targeted) -> dict[str, Any]:
    """The target of a batch, and which rows have one, in page-locked memory."""
    return {
        "target": None if batch.target is None else batch.target.pin_memory(),
        "has_target": None if batch.has_target is None else batch.has_target.pin_memory(),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchRequest:
    """Which batch is wanted: positions are those of the joined dataset, `view` numbers the augmentation (the epoch),
    `counted` is how many of them count (None: all), the others being filler behind them."""

    positions: NDArray[np.int64]
    view: int
    counted: int | None = None
