"""Rows of a `.jsonl` file: an object a line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from softlabel.errors import DataError


def iter_objects(file: Iterable[str], path: str, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each object with the number of its line; empty lines are skipped.

    Args:
        file: its lines.
        path: of the file, for errors.
        field: that an object has, for errors.

    Raises:
        DataError: a line is not an object.
    """
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number}: expected JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f'{path}: line {number}: expected an object such as {{"{field}": ...}}, found {value!r}')
        yield number, value
