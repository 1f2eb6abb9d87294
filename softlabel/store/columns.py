"""What a row is stored as: columns, their types and widths.

B rows, M members, W elements of one column in one row.

A column is a named array of shape (B, W) and one little-endian dtype. Shards, stream and cache handle columns alike and
know no encoding; encodings/ turns them into scaled logits. A store that keeps its members has each column M times as
wide, the members side by side. In a store of tokens a column may have W elements per token, or per labelled position,
of each row: then it has the shape (P, W), the rows' elements one after another; see token_rows.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from softlabel.store.strict_json import OMIT

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]
Dtype = Literal["<f2", "<f4", "|i1", "|u1", "<u2", "<i4", "<u8"]
Per = Literal["row", "token", "position"]

ROW_NAMES = ("key", "view", "label", "content")  # taken by the row itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of a shard.

    Attributes:
        name: of the array.
        dtype: numpy's little-endian name ("<f2").
        width: W, the elements of a row, or of each token or labelled position of it.
        per: what has `width` elements.
    """

    name: str
    dtype: Dtype
    width: int
    per: Per = field(default="row", metadata=OMIT)

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of W elements."""
        return self.numpy.itemsize * self.width


def index_dtype(num_classes: int) -> Dtype:
    """The smallest type that holds every class id: ids never wrap and never pass through a float."""
    if num_classes <= 1 << 8:
        return "|u1"
    if num_classes <= 1 << 16:
        return "<u2"
    assert num_classes <= 1 << 31
    return "<i4"
