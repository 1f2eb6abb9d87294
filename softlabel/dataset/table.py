"""Columns of numbers as samples: a row's numbers side by side, or the array that one column of lists holds.

Legend: R rows, K columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Raw

# float32 has every value of these; of the others float64 is what is hashed.
_NARROW = frozenset({"bool", "int8", "uint8", "int16", "uint16", "halffloat", "float"})
_EXACT_FLOAT32, _EXACT_FLOAT64 = 2**24, 2**53  # up to these every integer is exact


def holds_numbers(kind: pa.DataType) -> bool:
    """Whether a column has one number in each row."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column has lists, of any type."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def holds_lists(kind: pa.DataType) -> bool:
    """Whether a column has lists of numbers, or lists of such lists."""
    return is_list(kind) and holds_numbers(_innermost(kind))


def check_input_columns(names: Sequence[str], types: Sequence[pa.DataType], subject: str) -> None:
    """Check that input columns are numbers, or one column of lists of numbers.

    Raises:
        SpecError: they are not.
    """
    for name, kind in zip(names, types, strict=True):
        inner = _innermost(kind)
        if not holds_numbers(inner):
            raise SpecError(
                f"{subject}: column {name!r}: expected numbers or lists of numbers for inputs=, found {kind}; write it "
                "as numbers, or leave it out"
            )
        if is_list(kind) and len(names) > 1:
            raise SpecError(
                f"{subject}: inputs=: expected columns of one number each, or a single column of lists, found "
                f"{len(names)} columns, {name!r} among them of {kind}; several arrays by name come from a dataset in "
                "Python"
            )


def is_wide(schema: pa.Schema, name: str) -> bool:
    """Return whether float32 may not hold every number of a column of integers."""
    kind = schema.field(name).type
    return bool(pa.types.is_integer(kind)) and str(kind) not in _NARROW


def check_integers(name: str, largest: int, subject: str) -> str | None:
    """Check that a column of integers stays exact among floats.

    Args:
        name: of the column.
        largest: its largest number without its sign.
        subject: the source, for errors.

    Returns:
        A warning if float32, which most networks take, rounds some of them.

    Raises:
        DataError: float64 rounds some of them, and rows of different numbers would have one content hash.
    """
    remedy = "subtract a common start from them, or scale them"
    if largest > _EXACT_FLOAT64:
        raise DataError(
            f"{subject}: column {name!r}: expected integers of at most 2^53, the largest that float64 holds exactly, "
            f"found {largest}; {remedy}, or leave the column out of inputs="
        )
    if largest > _EXACT_FLOAT32:
        return (
            f"column {name!r} has integers up to {largest:,}; a network that takes float32 gets those above 2^24 "
            f"rounded, and close ones as equal numbers; {remedy}"
        )
    return None


def read_rows(names: Sequence[str], columns: Sequence[pa.ChunkedArray]) -> list[Raw]:
    """The sample of each row.

    Args:
        names: of the columns.
        columns: K columns of R numbers, or a single one of lists.

    Returns:
        R arrays: of shape (K,), float32 or float64 by the columns' types; or of the lists' shape and type. A null, or
        a number that is not finite, makes its row bad, by its column's name.
    """
    if is_list(columns[0].type):
        lists = columns[0].combine_chunks()
        try:
            return list(_array_of(lists))
        except ValueError:  # of some rows: each for itself
            return [_read_list(lists, row) for row in range(len(lists))]
    narrow = all(str(column.type) in _NARROW for column in columns)
    table_RK = np.empty((len(columns[0]), len(columns)), np.float32 if narrow else np.float64)
    is_null_RK = np.zeros(table_RK.shape, np.bool_)
    for place, column in enumerate(columns):
        kind = pa.float32() if narrow else pa.float64()
        table_RK[:, place] = column.cast(kind).to_numpy()  # exact: see `check_integers`
        if column.null_count:
            is_null_RK[:, place] = column.is_null().to_numpy()
    rows: list[Raw] = list(table_RK)
    wrong_RK = is_null_RK | ~np.isfinite(table_RK)
    for row in np.flatnonzero(wrong_RK.any(axis=1)).tolist():
        place = int(wrong_RK[row].argmax())
        number = table_RK[row, place]
        found = "null" if is_null_RK[row, place] else "NaN" if np.isnan(number) else "an infinite number"
        rows[row] = BadImageError(f"{found} in column {names[place]!r}")
    return rows


def _read_list(lists: pa.Array, row: int) -> Raw:
    if not lists[row].is_valid:
        return BadImageError("null instead of a list")
    try:
        found: NDArray[Any] = _array_of(lists.slice(row, 1))[0]
    except ValueError as error:
        return BadImageError(str(error))
    return found


def _array_of(values: pa.Array) -> NDArray[Any]:
    """Numbers, or lists of lists of one length, as one array; raises ValueError where they are none."""
    if values.null_count:
        raise ValueError("a null among its numbers")
    if not is_list(values.type):
        found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
        return found
    lengths = pc.unique(pc.list_value_length(values)).to_pylist()
    if len(lengths) > 1:
        raise ValueError(f"its lists have different lengths: {', '.join(map(str, sorted(lengths)[:4]))}")
    inner = _array_of(values.flatten())
    return inner.reshape(len(values), lengths[0] if lengths else 0, *inner.shape[1:])


def _innermost(kind: pa.DataType) -> pa.DataType:
    while is_list(kind):
        kind = kind.value_type
    return kind
