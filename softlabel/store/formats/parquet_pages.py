"""The footer and the page headers of a Parquet file, in Thrift's compact protocol: where the rows of a plain column
lie, and what a compressed one takes when it is decompressed.

Read here because pyarrow ends the process at a codec or a type that it does not know, as one flipped bit makes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

PLAIN, ZSTD = 0, 6  # codecs
_VARINT = rb"([\x80-\xff]{0,4}[\x00-\x7f])"
# The header of a plain data page without levels: size, stored size, number of values.
_PLAIN_PAGE = re.compile(
    rb"\x15\x00\x15"
    + _VARINT
    + rb"\x15"
    + _VARINT
    + rb"\x2c\x15"
    + _VARINT
    + rb"\x15\x00\x15\x06\x15\x06(?:\x1c\x00)?\x00\x00",
    re.DOTALL,
)
_HEADERS = 64  # maximal number of different headers in a column; ours have a few
_DEPTH = 12  # of structures in structures; real ones have 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A column in one row group.

    Attributes:
        name: of the column.
        codec: PLAIN, ZSTD or another number of Parquet's.
        encodings: numbers of Parquet's.
        offset, stored: where its pages lie in the file, and their bytes there.
        size: their bytes when they are decompressed, as the footer says.
        dictionary: whether the first page is a dictionary.
    """

    name: str
    codec: int
    encodings: frozenset[int]
    offset: int
    stored: int
    size: int
    dictionary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    rows: int
    chunks: tuple[Chunk, ...]


def read_row_groups(data: mmap) -> list[RowGroup]:
    """Return the row groups that the footer lists.

    Raises:
        ValueError, IndexError, KeyError, TypeError: it is not a footer.
    """
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if start < 0:
        raise ValueError("the footer is longer than the file")
    return [
        RowGroup(rows=int(group[3]), chunks=tuple(_make_chunk(one[3]) for one in group[1]))
        for group in _read_struct(data[start:-8], 0, _DEPTH)[0][4]
    ]


def _make_chunk(found: Mapping[int, Any]) -> Chunk:
    first = found.get(11, 0)  # of a dictionary
    return Chunk(
        name=b".".join(found[3]).decode(),
        codec=found[4],
        encodings=frozenset(found[2]),
        offset=min(first, found[9]) if first > 0 else found[9],
        stored=found[7],
        size=found[6],
        dictionary=first > 0,
    )


def find_plain_pages(data: mmap, chunk: Chunk, rows: int, row_bytes: int) -> list[tuple[int, int]] | None:
    """Return (offset, rows) of each page of a column; None unless it consists of plain pages of `rows` rows."""
    if chunk.dictionary or chunk.codec != PLAIN:
        return None
    found: list[tuple[int, int]] = []
    known: dict[bytes, tuple[int, int]] = {}  # parsed headers: most pages have the same one
    position, end, left = chunk.offset, chunk.offset + chunk.stored, rows
    while left > 0:
        begin = next((begin for begin in known if data[position : position + len(begin)] == begin), None)
        if begin is None:
            header = _PLAIN_PAGE.match(data, max(position, 0), min(end, len(data)))
            if header is None or len(known) > _HEADERS:
                return None
            size, stored, values = (_read_whole(part, 0)[0] for part in header.groups())
            if size != stored or size != values * row_bytes:
                return None
            begin = header.group()
            known[begin] = size, values
        size, values = known[begin]
        if not 0 < values <= left:
            return None
        found.append((position + len(begin), values))
        position, left = position + len(begin) + size, left - values
    return None if position != end or end > len(data) else found


def sum_page_bytes(data: mmap, chunk: Chunk) -> int:
    """Return what the pages of a column take when they are decompressed, which is what a reader allocates.

    Raises:
        ValueError, IndexError, TypeError: they do not fill the column.
    """
    at, end, total = chunk.offset, chunk.offset + chunk.stored, 0
    if not 0 <= at <= end <= len(data):
        raise ValueError("a column lies outside the file")
    while at < end:
        header, at = _read_struct(data, at, _DEPTH)
        size, stored = header.get(2, -1), header.get(3, -1)
        if size < 0 or stored < 0:
            raise ValueError("a page has no size")
        total, at = total + size, at + stored
    if at != end:
        raise ValueError("a page lies outside its column")
    return total


def _read_struct(data: bytes | mmap, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a Thrift structure by number, and where it ends."""
    found: dict[int, Any] = {}
    field = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            field += head >> 4
        else:
            field, at = _read_whole(data, at)
        found[field], at = _read_value(data, at, head & 15, depth)
    return found, at + 1


def _read_value(data: bytes | mmap, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _read_whole(data, at)
    if kind in (1, 2):  # true and false
        return kind == 1, at
    if kind == 3:  # a byte
        return data[at], at + 1
    if kind == 8:
        size, at = _read_varint(data, at)
        return data[at : at + size], at + size
    if depth and kind == 12:
        return _read_struct(data, at, depth - 1)
    if depth and kind == 9:
        head, at = data[at], at + 1
        count, items = head >> 4, []
        if count == 15:
            count, at = _read_varint(data, at)
        if count and head & 15 in (1, 2):  # of no bytes, so that the file would not limit their number
            raise ValueError("a list is of booleans, of which a footer has none")
        for _ in range(count):
            item, at = _read_value(data, at, head & 15, depth - 1)
            items.append(item)
            if at >= len(data):  # a list is never the last thing
                raise ValueError("a list does not end")
        return items, at
    raise ValueError(f"a field is of kind {kind}")


def _read_varint(data: bytes | mmap, at: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while (byte := data[at]) >= 128 and shift < 63:
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
    return value | byte << shift, at + 1


def _read_whole(data: bytes | mmap, at: int) -> tuple[int, int]:
    """Return a number with a sign, zigzag, and where it ends."""
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at
