"""Tables of numbers as text: `.csv` and `.tsv` files with a heading, held in memory."""

import csv
import os
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from softlabel.dataset.line_errors import TABLE, reading_lines
from softlabel.dataset.suffixes import suffix_of
from softlabel.dataset.table_source import TableSource
from softlabel.errors import DataError, SpecError, one_line

_GROUP = 1 << 16  # rows
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Not "nan", which is a number.
_NULLS = ["", "NA", "N/A", "#N/A", "<NA>", "null", "NULL", "None"]
_MOST_BYTES = (1 << 31) - 1  # of a block of pyarrow


class CsvTableSource(TableSource):
    """Rows of a `.csv` or `.tsv` file whose columns ``inputs=`` names.

    A column is integers, floats or booleans if all of its cells are; an empty cell and NA are null.

    Raises:
        SpecError: an option is wrong, or it is another file.
        DataError: the file, a column, key or label cannot be used.
    """

    kind = "table"

    def __init__(self, path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name = name
        self._reset()
        key = options.get("key", "index")
        table = _read_table(path, None if key == "index" else key, name)
        self._choose_columns(table.schema, options, ignore_labels)
        chosen = self._columns
        used = dict.fromkeys(
            (*chosen.inputs, *([chosen.key] if chosen.key else []), *(chosen.multi_hot or [chosen.label or ""]))
        )
        self._table = table.select([column for column in used if column])
        self._check_rows([min(_GROUP, len(table) - start) for start in range(0, len(table), _GROUP)])

    def _load_column(self, path: str, group: int) -> pa.ChunkedArray:
        return self._table.column(path).slice(group * _GROUP, _GROUP)


def _read_table(path: str, key: str | None, name: str) -> pa.Table:
    suffix = suffix_of(path)
    if suffix not in _DELIMITERS:
        raise SpecError(f"{name}: inputs= names columns of a .parquet, .csv or .tsv file, found {suffix}; write one")
    heading, lines = _read_heading(path, _DELIMITERS[suffix])
    if again := next((column for column, count in Counter(heading).items() if count > 1 and column), None):
        raise DataError(f"{path}: column {again!r}: expected a different name for every column; rename one")
    if not heading:
        raise DataError(f"{path}: expected a heading that names the columns, found nothing")
    # Types are those of the first block, and this one is the whole file.
    size = min(max(os.path.getsize(path), 1 << 20), _MOST_BYTES)
    try:
        table = arrow_csv.read_csv(
            path,
            arrow_csv.ReadOptions(
                column_names=heading,
                skip_rows=lines,
                block_size=size,
                use_threads=False,  # a wrong row is then named by its number
            ),
            arrow_csv.ParseOptions(delimiter=_DELIMITERS[suffix], newlines_in_values=True),
            arrow_csv.ConvertOptions(
                # "007" is another key than "7".
                column_types={} if key is None else {key: pa.large_string()},
                null_values=_NULLS,
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: expected a table with the columns of its heading, found: {one_line(error)}"
        ) from error
    if not len(table):
        raise DataError(f"{path}: expected at least one row below the heading, found none; check the file")
    if key in heading:
        place = heading.index(key)
        keys = table.column(place)
        table = table.set_column(place, key, pc.if_else(pc.equal(keys, ""), pa.scalar(None, keys.type), keys))
    return table


def _read_heading(path: str, delimiter: str) -> tuple[list[str], int]:
    """The names of the columns, and the number of lines up to the first row."""
    with reading_lines(path, TABLE), open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        names = next((cells for cells in reader if cells), [])
        return [name.strip() for name in names], reader.line_num
