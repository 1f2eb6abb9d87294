"""What a row is stored as: columns, their types and widths.

B rows, M members, W elements of one column in one row.

A column is a named array of shape (B, W) and one little-endian dtype. Shards, stream and cache handle columns alike and
know no encoding; encodings/ turns them into scaled logits. A store that keeps its members has each column M times as
wide, the members side by side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]
Dtype = Literal["<f2", "<f4", "|i1", "|u1", "<u2", "<i4", "<u8"]

ROW_NAMES = ("key", "view", "label", "content")  # taken by the row itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of a shard: `dtype` is numpy's little-endian name ("<f2"), `width` the elements per row."""

    name: str
    dtype: Dtype
    width: int

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.numpy.itemsize * self.width


def index_dtype(num_classes: int) -> Dtype:
    """The smallest type that holds every class id: ids never wrap and never pass through a float."""
    if num_classes <= 1 << 8:
        return "|u1"
    if num_classes <= 1 << 16:
        return "<u2"
    assert num_classes <= 1 << 31
    return "<i4"
