"""Columns of tables that say of every class whether a row has it: one for each class, or one of lists; as Arrow
columns, or as the cells of rows out of a text file.

N rows, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.common.multi_hot import UNKNOWN, Labels, stack_labels
from softlabel.dataset.hard_labels import checked_labels, checked_multi_hot, class_number
from softlabel.dataset.table import holds_numbers, is_list
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE


def ask_columns(labels: str, label: str | None, present: Iterable[str], name: str) -> tuple[str, ...]:
    """The columns that ``labels=a,b,c`` names.

    Args:
        labels, label: the user's options.
        present: the columns that there are.
        name: the source, for errors.

    Raises:
        SpecError: there are fewer than two, one is given twice or missing, or ``label=`` is given too.
    """
    columns, present = tuple(labels.split(",")), list(present)
    if label is not None or len(columns) < 2 or len(set(columns)) < len(columns):
        raise SpecError(
            f"{name}: labels={labels}: expected several columns, each once and without label=, that say 0 or 1 for a "
            "class each; name a column of class numbers with '?label=COLUMN'"
        )
    for column in columns:
        if column not in present:
            raise SpecError(f"{name}: there is no column {column!r}; the file has {', '.join(present)}")
    return columns


def parse_flags(cells: Sequence[object], names: Sequence[str] | None = None) -> list[int]:
    """The label of one row: 1, 0, or -1 (not known) for each class.

    Args:
        cells: C numbers, booleans or texts of them; None, NaN, an empty text, -1 and -100 are not known.
        names: of their columns, for errors.

    Raises:
        ValueError: another value.
    """
    return [_parse_flag(cell, names[at] if names else at) for at, cell in enumerate(cells)]


def _parse_flag(cell: object, where: str | int) -> int:
    text = "" if cell is None else str(cell).strip().lower()
    try:
        number = float({"": UNKNOWN, "true": 1, "false": 0}.get(text, text))
    except ValueError:
        number = math.inf
    if math.isnan(number) or number in (UNKNOWN, IGNORE):
        return UNKNOWN
    if number not in (0, 1):
        what = f"column {where!r}" if isinstance(where, str) else f"class {where}"
        raise ValueError(
            f"{what}: expected 1, 0 or -1 (not known) for a class, found {str(cell)[:40]!r}; name other labels"
        )
    return int(number)


def parse_label(cell: object, numbers: Mapping[str, int] | None) -> int | list[int]:
    """A class number (see `class_number`), or, of a list in JSON, 1, 0 or -1 for each class.

    Raises:
        ValueError: it is neither.
    """
    return parse_flags(cell) if isinstance(cell, list) else class_number(cell, numbers)


def stack_parsed(labels: Sequence[int | list[int]], name: str) -> Labels:
    """The labels of N rows as `parse_label` and `parse_flags` return them: int64 (N,), or int8 (N, C).

    Raises:
        DataError: lists of different lengths, or class numbers beside lists.
    """
    width = next((len(label) for label in labels if isinstance(label, list)), None)
    if width is None:
        return checked_labels(np.array(labels, dtype=np.int64), name)
    for row, label in enumerate(labels):
        if label != IGNORE and not (isinstance(label, list) and len(label) == width and width):
            raise DataError(
                f"{name}: sample {row}: expected a list of {width or 'several'} labels, 0 or 1 for each class, as "
                f"before, found {label}; lists of class numbers have to be written out so"
            )
    return stack_labels(labels, width)


def find_multi_hot_columns(kinds: Mapping[str, pa.DataType], asked: Mapping[str, str], name: str) -> tuple[str, ...]:
    """The columns that ``labels=a,b,c`` asks for, or the one of lists that ``label=`` names; none for other labels.

    Args:
        kinds: the type of each column.
        asked: the user's options.
        name: the source, for errors.

    Raises:
        SpecError: a column is missing or holds something else than 0 and 1.
    """
    if "labels" in asked:
        columns = ask_columns(asked["labels"], asked.get("label"), kinds, name)
        for column in columns:
            if not _holds_flags(kinds[column]):
                raise SpecError(
                    f"{name}: column {column!r}: expected 0, 1 or null for a class, found {kinds[column]}; leave it "
                    "out of labels="
                )
        return columns
    column = asked.get("label", "none")
    if column not in kinds or not is_list(kinds[column]):
        return ()
    if not _holds_flags(kind := kinds[column].value_type):
        raise SpecError(f"{name}: column {column!r}: expected lists of 0 and 1, one for each class, found {kind}")
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


def _holds_flags(kind: pa.DataType) -> bool:
    return holds_numbers(kind) or bool(pa.types.is_null(kind))  # null: nothing is known of this class
