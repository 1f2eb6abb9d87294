"""One shard: its rows in memory, its identity, and the interface of the file formats.

B rows of a shard, W elements of a column in one row. parquet.py and hdf5.py each have `write(path, identity, rows)` and
`open_shard(path)`.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys
from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.columns import Array, Column, Columns
from softlabel.store.manifest import FORMAT_VERSIONS, BadRow, Fidelity, Run, ShardPlan, ShardRecord
from softlabel.store.storage.base import reading
from softlabel.store.strict_json import SchemaError, dumps, from_json, loads, to_json

_VERSIONS = " or ".join(map(str, FORMAT_VERSIONS))

IGNORE = -100  # label of an unlabelled row
IDENTITY_NAME = "softlabel"  # Parquet key-value metadata and HDF5 attribute
IDENTITY_LIMIT = 32 << 20
GROUP_ROWS = 1 << 16
SMALL_BYTES = 32 << 20  # keys, labels and other small columns of a shard up to this size are read at once
GROUP_BYTES = 8 << 20  # 4096 rows of 1000 float16; a few row groups fit in memory whatever the class count


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows to write into a shard, in dataset order.

    Attributes:
        keys: B strings, or Keys.
        labels: int64 (B,), -100 for none; None: no row has one.
        content: content hashes uint64 (B,), 0 for none; None: no row has one.
        columns: the run's columns, (B, W) each.
    """

    keys: Keys | Sequence[str] | npt.NDArray[Any]
    labels: npt.NDArray[np.int64] | None = None
    content: npt.NDArray[np.uint64] | None = None
    columns: Columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckedRows:
    """Rows that match their run and plan, as little-endian contiguous arrays."""

    keys: Keys
    views: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint64]
    columns: dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIdentity:
    """The identity stored in a shard, sufficient to adopt it into the right manifest."""

    format: Literal["softlabel-shard"] = "softlabel-shard"
    format_version: int = 1
    run: str
    number: int
    view: int
    start: int
    stop: int
    rows: int
    columns: tuple[Column, ...]
    first_key: str | None = None
    last_key: str | None = None
    bad: tuple[BadRow, ...] = ()
    fidelity: Fidelity | None = None

    def encode(self) -> bytes:
        return dumps(to_json(self))

    def record(self, file: str, size: int, xxh3: str) -> ShardRecord:
        """Return the manifest's record of this shard, in a file of `size` bytes."""
        return ShardRecord(
            number=self.number,
            file=file,
            rows=self.rows,
            bytes=size,
            xxh3=xxh3,
            first_key=self.first_key,
            last_key=self.last_key,
            bad=self.bad,
            fidelity=self.fidelity,
        )

    @staticmethod
    def decode(raw: bytes, where: object) -> "ShardIdentity":
        """Decode an identity, named `where` in errors.

        Raises:
            StoreCorruptError: it is invalid.
        """
        try:
            found = from_json(ShardIdentity, loads(raw))
            if found.format_version not in FORMAT_VERSIONS:
                raise SchemaError(f"expected format version {_VERSIONS}, found {found.format_version}")
            if (
                not 0 <= found.rows <= found.stop - found.start
                or found.rows + len(found.bad) != found.stop - found.start
            ):
                raise SchemaError("rows and bad rows do not add up to its range")
            if any(not 0 < column.width < 2**31 for column in found.columns):
                raise SchemaError("a column's width is out of range")
        except SchemaError as error:
            raise StoreCorruptError(f"{where}: its identity: {error}") from None
        return found

    def belongs(self, run: Run, plan: ShardPlan) -> bool:
        """Whether this shard is the one that `run` planned."""
        place = (self.number, self.view, self.start, self.stop)
        return (
            place == (plan.number, plan.view, plan.start, plan.stop)
            and self.run == run.fingerprint(plan.part)
            and self.columns == run.columns
            and self.format_version == run.format_version
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardRows:
    """Rows as read: Keys, views int32 (B,), labels int64 (B,), content uint64 (B,), columns (B, W) each.

    Columns that were not requested are None or absent. Arrays may be read-only and share a buffer.
    """

    keys: Keys | None = None
    views: npt.NDArray[np.int32] | None = None
    labels: npt.NDArray[np.int64] | None = None
    content: npt.NDArray[np.uint64] | None = None
    columns: dict[str, Array] = field(default_factory=dict)


class OpenShard(Protocol):
    """A shard file open for reading; opening checks its identity and schema, not its bytes."""

    identity: ShardIdentity

    def blocks(self, names: Collection[str]) -> list[tuple[int, int]]:
        """Return the row ranges to read at once: all rows if only small columns of at most SMALL_BYTES are read."""
        ...

    def read(self, names: Collection[str], start: int, stop: int) -> ShardRows:
        """Read rows of the columns `names` ("key", "view", "label", "content" and the encoding's)."""
        ...

    def extents(self, name: str) -> list[tuple[int, int]] | None:
        """Return (offset, rows) of the contiguous pieces of a column, in order, for all rows; None if unknown."""
        ...

    def mapped(self, name: str) -> Array | None:
        """Return a column of the encoding (B, W) as a read-only map of the file; None if not possible."""
        ...

    def close(self) -> None: ...


def group_rows(columns: Sequence[Column]) -> int:
    """Return the rows of a Parquet row group and of a read: the power of two that fills 8 MiB, at most 65,536."""
    fitting = max(1, GROUP_BYTES // sum(column.row_bytes for column in columns))
    return min(GROUP_ROWS, 1 << (fitting.bit_length() - 1))


def in_one_go(identity: ShardIdentity, size: int, names: Collection[str]) -> bool:
    """Whether the columns `names` of a file of `size` bytes are small enough to read at once."""
    payload = sum(column.row_bytes for column in identity.columns)
    return size - identity.rows * payload <= SMALL_BYTES and not any(one.name in names for one in identity.columns)


def check_rows(rows: Rows, run: Run, plan: ShardPlan, bad: Sequence[BadRow]) -> CheckedRows:
    """Convert rows to little-endian arrays.

    Raises:
        ValueError: a number of rows, shape or dtype is wrong.
        DataError: a key is not Unicode text.
    """
    keys = Keys.of(rows.keys)
    count = len(keys)
    if count + len(bad) != plan.stop - plan.start:
        raise ValueError(
            f"shard {plan.number}: expected {plan.stop - plan.start} rows, found {count} and {len(bad)} bad ones"
        )
    if {column.name for column in run.columns} != set(rows.columns):
        raise ValueError(f"columns: expected {[one.name for one in run.columns]}, found {sorted(rows.columns)}")
    columns = {}
    for column in run.columns:
        array = rows.columns[column.name]
        if array.dtype != column.numpy or array.size != count * column.width:
            raise ValueError(
                f"column {column.name!r}: expected {column.numpy} ({count}, {column.width}), "
                f"found {array.dtype} {array.shape}"
            )
        columns[column.name] = np.ascontiguousarray(array, column.numpy).reshape(count, column.width)
    labels = np.full(count, IGNORE, "<i8") if rows.labels is None else np.ascontiguousarray(rows.labels, "<i8")
    content = np.zeros(count, "<u8") if rows.content is None else np.ascontiguousarray(rows.content, "<u8")
    if labels.shape != (count,) or content.shape != (count,):
        raise ValueError(f"labels and content: expected ({count},), found {labels.shape} and {content.shape}")
    views = np.full(count, plan.view, "<i4")
    return CheckedRows(keys=keys, views=views, labels=labels, content=content, columns=columns)


@contextlib.contextmanager
def reading_shard(path: Path, format: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors of a format's library about a damaged file into StoreCorruptError."""
    damaged: tuple[type[Exception], ...] = (OSError, ValueError, MemoryError, OverflowError, KeyError, *errors)
    try:
        with reading(path):
            yield
    except (StoreError, FileNotFoundError):
        raise
    except damaged as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreCorruptError(f"{path}: not readable as {format}: {text[:200]}") from None
