"""Columns of tables that say of every class whether a row has it: one for each class, or one of lists.

N rows, C classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.dataset.hard_labels import checked_multi_hot
from softlabel.errors import DataError


def find_multi_hot_columns(kinds: Mapping[str, pa.DataType], asked: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The columns that ``labels=a,b,c`` asks for, or the one of lists that ``label=`` names; none for other labels.

    Args:
        kinds: the type of each column.
        asked: the user's options.
        name: the source, for errors.

    Raises:
        DataError: a column is missing or holds something else than 0 and 1.
    """
    if "labels" in asked:
        columns = tuple(asked["labels"].split(","))
        if "label" in asked or len(columns) < 2 or len(set(columns)) < len(columns):
            raise DataError(
                f"{name}: labels={asked['labels']}: expected several columns, each once and without label=, that say 0 "
                "or 1 for a class each; name a column of class numbers with '?label=COLUMN'"
            )
        for column in columns:
            if column not in kinds:
                raise DataError(f"{name}: there is no column {column!r}; the file has {', '.join(kinds)}")
            if not _is_flag(kinds[column]):
                raise DataError(
                    f"{name}: column {column!r}: expected 0, 1 or null for a class, found {kinds[column]}; leave it "
                    "out of labels="
                )
        return columns
    column = asked.get("label", "none")
    if column not in kinds or not _is_list(kinds[column]):
        return ()
    if not _is_flag(kind := kinds[column].value_type):
        raise DataError(f"{name}: column {column!r}: expected lists of 0 and 1, one for each class, found {kind}")
    return (column,)


def read_multi_hot(columns: Sequence[pa.Array], names: Sequence[str], width: int | None, name: str) -> NDArray[np.int8]:
    """The labels of some rows, int8 (N, C): 1, 0, or -1 where a value, or a list, is null.

    Args:
        columns: as `find_multi_hot_columns` has found them.
        names: of the columns.
        width: C, where it is known; of lists else that of the first one, and 1 where all are null.
        name: the source, for errors.

    Raises:
        DataError: other values, or lists of another length.
    """
    if len(columns) > 1:
        flags = [column.cast(pa.float64()).to_numpy(zero_copy_only=False) for column in columns]
        return checked_multi_hot(np.stack(flags, axis=1), name, f"columns {', '.join(names)}")
    (rows,), where = columns, f"column {names[0]!r}"
    lengths = pc.unique(pc.list_value_length(rows).drop_null()).to_pylist()
    width = (lengths or [1])[0] if width is None else width
    if any(length != width for length in lengths):
        raise DataError(
            f"{name}: {where}: expected lists of one length, 0 or 1 for each class, found {sorted(lengths)[:3]}; lists "
            "of class numbers have to be written out so"
        )
    found = np.full((len(rows), width), np.nan)
    there_N = rows.is_valid().to_numpy(zero_copy_only=False)
    found[there_N] = rows.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, width)
    return checked_multi_hot(found, name, where)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_flag(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind))
