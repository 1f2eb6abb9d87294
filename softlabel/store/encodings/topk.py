"""topk: the largest classes, and how much the others weigh together at the declared temperatures.

R rows, C classes, K kept classes, E temperatures with a known tail.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from softlabel.store.columns import Array, Column, Columns, index_dtype
from softlabel.store.encodings.base import (
    Encoding,
    Finding,
    check_distinct,
    check_maximum,
    check_values,
    find_temperature,
)

_OFFERED = (10, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Encoding):
    """The `k` largest classes and the log-sum-exp of the others at each of `temperatures`, of which the store's is one
    (left out: it alone)."""

    name: ClassVar[str] = "topk"
    sparse: ClassVar[bool] = True

    k: int
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.k < 2**31:
            raise ValueError(f"encoding 'topk': k: expected at least 1, found {self.k}")
        if any(not 0 < one < 1e9 for one in self.temperatures):
            raise ValueError(f"encoding 'topk': temperatures: expected numbers above 0, found {self.temperatures}")

    @classmethod
    def from_options(cls, *, temperature: float, top_k: int = 50, temperatures: Sequence[float] = ()) -> Self:
        """The options of `softlabel generate`.

        Args:
            temperature: the store's.
            top_k: classes that encoding topk keeps of a row; 50 when absent.
            temperatures: where the tail of encoding topk is known; the store's temperature when absent.
        """
        return cls(k=top_k, temperatures=tuple(sorted({float(temperature), *temperatures})))

    @classmethod
    def offers(cls, *, num_classes: int, temperature: float) -> tuple[Self, ...]:
        declared = tuple(sorted({1.0, temperature}))
        return tuple(cls(k=k, temperatures=declared) for k in _OFFERED if k < num_classes)

    @property
    def title(self) -> str:
        return f"{self.name} {self.k}"

    def name_for(self, num_classes: int) -> str:
        return f"{self.name} {self.kept(num_classes)}"

    @property
    def declared(self) -> tuple[float, ...]:
        return self.temperatures

    def fit(self, *, temperature: float, **_: Any) -> "TopK":
        return self if self.temperatures else self.at_one_temperature(temperature)

    def at_one_temperature(self, temperature: float) -> "TopK":
        return replace(self, temperatures=(temperature,))

    def kept(self, num_classes: int) -> int:
        """K: how many classes a row has."""
        return min(self.k, num_classes)

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        kept = self.kept(num_classes)
        return (
            Column(name="index", dtype=index_dtype(num_classes), width=kept),
            Column(name="value", dtype="<f2", width=kept),
            Column(name="tail", dtype="<f4", width=len(self.temperatures)),
        )

    def decode_rows(self, columns: Columns, *, num_classes: int, temperature: float, **_: Any) -> Array:
        place = find_temperature(self.temperatures, temperature)
        assert place is not None, temperature
        even_R = columns["tail"][:, place] - np.log(max(1, num_classes - self.kept(num_classes)))
        logits_RC = np.repeat(even_R[:, None], num_classes, axis=1).astype(np.float32)
        np.put_along_axis(logits_RC, columns["index"].astype(np.int64), columns["value"].astype(np.float32), 1)
        return logits_RC

    def retemper(self, columns: Columns, factor: float) -> dict[str, Array]:
        return {**columns, "value": columns["value"].astype(np.float32) * np.float32(factor)}

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        yield from check_values(columns, num_classes, masked=("value", "tail"))
        yield from check_maximum(columns, "value")
        yield from check_distinct(columns, "index")
