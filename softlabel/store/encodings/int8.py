"""int8: every class in a byte, the largest ones exactly.

R rows, C classes, X exact classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from softlabel.store.columns import Array, Column, Columns, index_dtype
from softlabel.store.encodings.base import Encoding, Finding, check_distinct, check_maximum, check_values

EXACT = 8  # classes of a row that are stored exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8(Encoding):
    """`q * scale + offset` for each class, `top_value` in place of it at `top_index`."""

    name: ClassVar[str] = "int8"
    sigmoid: ClassVar[bool] = True

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        exact = min(EXACT, num_classes)
        return (
            Column(name="q", dtype="|i1", width=num_classes),
            Column(name="scale", dtype="<f4", width=1),
            Column(name="offset", dtype="<f4", width=1),
            Column(name="top_index", dtype=index_dtype(num_classes), width=exact),
            Column(name="top_value", dtype="<f2", width=exact),
        )

    def decode_rows(self, columns: Columns, **_: Any) -> Array:
        logits_RC: Array = columns["q"] * columns["scale"] + columns["offset"]
        top_index_RX, top_value_RX = columns["top_index"].astype(np.int64), columns["top_value"].astype(np.float32)
        np.put_along_axis(logits_RC, top_index_RX, top_value_RX, 1)
        return logits_RC

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        yield from check_values(columns, num_classes, masked=("top_value",))
        yield from check_maximum(columns, "top_value")
        yield from check_distinct(columns, "top_index")

    def check_sigmoid_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        yield from check_values(columns, num_classes)
        yield from check_distinct(columns, "top_index")
