"""float16: every class, rounded; finest near the row's maximum, which is 0.

R rows, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from softlabel.store.columns import Array, Column, Columns
from softlabel.store.encodings.base import Encoding, Finding

_MINUS_INF = 0xFC00  # the bits of float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Float16(Encoding):
    """`logits` float16 (C,)."""

    name: ClassVar[str] = "float16"
    sigmoid: ClassVar[bool] = True
    scanned: ClassVar[str | None] = "logits"

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        return (Column(name="logits", dtype="<f2", width=num_classes),)

    def decode_rows(self, columns: Columns, **_: Any) -> Array:
        return columns["logits"].astype(np.float32)

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        logits_RC = columns["logits"]
        if not self.is_clean(logits_RC):
            wrong_R = (logits_RC.view(np.int16).max(axis=1) != 0) | np.isnan(logits_RC).any(axis=1)
            found = logits_RC[wrong_R.argmax()].max()  # a row of masked classes only has -inf
            yield wrong_R, f"the maximum of `logits` is {found}, expected 0"

    def is_clean(self, rows_RW: Array) -> bool:
        """Whether 0 is the maximum of every row and nothing is NaN."""
        # By their bits, which is much faster: 0 is the greatest int16 of a float16 that is not positive, and NaN with a
        # sign the greatest uint16. Flat where it can be: the processor then compares 32 numbers at once.
        bits = rows_RW.reshape(-1).view(np.int16)
        tops_R = np.maximum.reduceat(bits, np.arange(0, len(bits), rows_RW.shape[1]))
        return not tops_R.any() and bool(bits.view(np.uint16).max() <= _MINUS_INF)
