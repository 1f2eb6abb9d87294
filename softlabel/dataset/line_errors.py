"""What is wrong in a file of lines."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager

from softlabel.errors import DataError

TABLE = "a table in UTF-8 with a heading"


@contextmanager
def reading_lines(path: str, expected: str) -> Iterator[None]:
    """Name the file, and what was expected in it, in errors of reading its lines.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or the csv module refuses it.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected {expected}, found: {_describe_error(error, path)}") from error


def _describe_error(error: Exception, path: str) -> str:
    """Return an error of the csv module as it is, and one of UTF-8 with its line and a remedy."""
    if not isinstance(error, UnicodeDecodeError):
        return str(error)
    with open(path, "rb") as file:  # the error has a place in a part of the file
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                byte = line[wrong.start]
                return f"byte 0x{byte:02x} in line {number}; convert it, such as with 'iconv -f latin1 -t utf-8'"
    return str(error)
