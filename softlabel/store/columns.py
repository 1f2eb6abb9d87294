"""What an encoding stores for a row, and how the stored numbers become scaled logits again.

B rows, C classes, M members, W elements of one column in one row (the row's numbers, flattened).

A column is a named array of shape (B, W) and one little-endian dtype. An encoding is the tuple of its columns and a
decoder; shards, stream and cache handle columns alike and know no encoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

_MINUS_INF = 0xFC00  # the bits of float16
ROW_NAMES = ("key", "view", "label", "content")  # taken by the row itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of a shard: `dtype` is numpy's little-endian name ("<f2"), `width` the elements per row."""

    name: str
    dtype: Literal["<f2", "<f4", "|i1", "|u1", "<u2", "<i4"]
    width: int

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.numpy.itemsize * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How scaled logits are stored.

    float16: column `logits`, z/T minus its row's maximum, members side by side (B, M*C).
    """

    name: Literal["float16"] = "float16"

    def columns(self, *, num_classes: int, members: int = 1) -> tuple[Column, ...]:
        """The columns of a row of `members` teachers (1 unless the store keeps its members apart)."""
        return (Column(name="logits", dtype="<f2", width=num_classes * members),)

    def decode(self, columns: Columns, *, num_classes: int, members: int = 1, kept: bool = False) -> Array:
        """Scaled logits, float32, up to a constant per row: (B, C), or (B, M, C) when members are `kept` apart."""
        logits = columns["logits"].astype(np.float32)
        return logits.reshape(-1, members, num_classes) if kept else logits

    def problem(self, columns: Columns, *, num_classes: int, members: int = 1) -> str | None:
        """What is wrong with stored values, None when nothing: every row is finite and led by its own maximum, 0.

        -inf is a masked class.
        """
        logits = columns["logits"].reshape(-1, num_classes)
        if not len(logits):
            return None
        # By their bits, which is much faster: 0 is the greatest int16 of a float16 that is not positive, and NaN with a
        # sign the greatest uint16.
        top = logits.view(np.int16).max(axis=1)
        if top.any() or logits.view(np.uint16).max() > _MINUS_INF:
            wrong = (top != 0) | np.isnan(logits).any(axis=1)
            row = int(np.flatnonzero(wrong)[0])
            found = logits[row].max()  # a row of masked classes only has -inf
            return f"row {row // members} of a block: the maximum of `logits` is {found}, expected 0"
        return None
