"""Whole numbers of Arrow arrays through their buffers.

`to_numpy`, `fill_null`, `pa.array` and `pa.scalar` import pandas where it is installed, which takes half a second:
these functions are for what every run reads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def read_numbers(array: Any, absent: int) -> NDArray[Any]:
    """The numbers of an Arrow array of integers, `absent` in place of null; read-only where none is null."""
    dtype = np.dtype(str(array.type))
    if array.null_count == len(array):
        return np.full(len(array), absent, dtype)
    valid, data = array.buffers()
    numbers = np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)
    if not array.null_count:
        return numbers
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[array.offset :][: len(array)]
    return np.where(bits == 1, numbers, np.array(absent, dtype))


def make_indices(rows: "NDArray[np.int64] | Sequence[int]") -> Any:
    """An Arrow array of int64, for `take`."""
    numbers = np.ascontiguousarray(rows, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
