"""sampled: classes drawn from the teacher, with importance weights.

R rows, C classes, S draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from softlabel.store.columns import Array, Column, Columns, index_dtype
from softlabel.store.encodings.base import Encoding, Finding, check_values
from softlabel.store.strict_json import OMIT

_OFFERED = (10, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Encoding):
    """`samples` draws from softmax(proposal * scaled logits), equal ones merged; unused places have weight 0."""

    name: ClassVar[str] = "sampled"
    drawn: ClassVar[bool] = True
    sparse: ClassVar[bool] = True

    samples: int
    proposal: float | None = field(default=None, metadata=OMIT)

    def __post_init__(self) -> None:
        if not 0 < self.samples < 2**31:
            raise ValueError(f"encoding 'sampled': samples: expected at least 1, found {self.samples}")
        if self.proposal is not None and not 0 < self.proposal <= 1:
            raise ValueError(f"encoding 'sampled': proposal: expected above 0 and at most 1, found {self.proposal}")

    @classmethod
    def from_options(cls, *, temperature: float, samples: int = 50) -> Self:
        """The options of `softlabel generate`.

        Args:
            temperature: the store's.
            samples: draws that encoding sampled keeps of a row; 50 when absent.
        """
        return cls(samples=samples)

    @classmethod
    def offers(cls, *, num_classes: int, temperature: float) -> tuple[Self, ...]:
        return tuple(cls(samples=samples) for samples in _OFFERED if samples < num_classes)

    @property
    def title(self) -> str:
        return f"{self.name} {self.samples}"

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        return (
            Column(name="index", dtype=index_dtype(num_classes), width=self.samples),
            Column(name="weight", dtype="<f4", width=self.samples),
        )

    def decode_rows(self, columns: Columns, *, num_classes: int, **_: Any) -> Array:
        weights_RC = np.zeros((len(columns["index"]), num_classes), np.float64)
        rows = np.arange(len(weights_RC))[:, None]
        np.add.at(weights_RC, (rows, columns["index"].astype(np.int64)), columns["weight"])
        with np.errstate(divide="ignore"):
            return np.log(weights_RC).astype(np.float32)

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        yield from check_values(columns, num_classes)
        weight_RS = columns["weight"]
        yield (weight_RS < 0).any(axis=1) | ~(weight_RS > 0).any(axis=1), "`weight` is negative or all 0"
