"""float32: every class, as it was computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from softlabel.store.columns import Array, Column, Columns
from softlabel.store.encodings.base import Encoding, Finding, check_maximum, check_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32(Encoding):
    """`logits` float32 (C,)."""

    name: ClassVar[str] = "float32"
    sigmoid: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        return (Column(name="logits", dtype="<f4", width=num_classes),)

    def decode_rows(self, columns: Columns, **_: Any) -> Array:
        return columns["logits"].astype(np.float32)

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        yield from check_values(columns, num_classes, masked=("logits",))
        yield from check_maximum(columns, "logits")
