"""One shard: its rows in memory, the identity it carries inside, and the contract that both file formats keep.

B rows of a shard, W elements of a column in one row.

parquet.py and hdf5.py each have `write(path, identity, rows)` and `open_shard(path)`; this file knows no format.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys
from softlabel.errors import StoreCorruptError
from softlabel.store.columns import Array, Column, Columns
from softlabel.store.manifest import FORMAT_VERSIONS, BadRow, Fidelity, Run, ShardPlan, ShardRecord
from softlabel.store.strict_json import SchemaError, dumps, from_json, loads, to_json

_VERSIONS = " or ".join(map(str, FORMAT_VERSIONS))

IGNORE = -100  # label of a row without one

IDENTITY_NAME = "softlabel"  # Parquet key-value metadata and HDF5 attribute

IDENTITY_LIMIT = 32 << 20

GROUP_ROWS = 1 << 16

SMALL_BYTES = 32 << 20  # keys, labels and the like of a shard that are read at once

GROUP_BYTES = 8 << 20  # 4096 rows of 1000 float16; a few row groups fit in memory whatever the class count


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows on their way into a shard, in dataset order.

    keys: B strings or Keys; labels int64 (B,), -100 where there is none (None: nowhere); content uint64 (B,), the
    content hash of the image, 0 where there is none (None: nowhere); columns: the run's, (B, W) each.
    """

    keys: Keys | Sequence[str] | npt.NDArray[Any]
    labels: npt.NDArray[np.int64] | None = None
    content: npt.NDArray[np.uint64] | None = None
    columns: Columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckedRows:
    """Rows that fit their run and plan, as the little-endian contiguous arrays that a file format writes."""

    keys: Keys
    views: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]
    content: npt.NDArray[np.uint64]
    columns: dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIdentity:
    """What a shard says about itself: enough to adopt it into a manifest, and never into the wrong one."""

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
        """What a manifest says about this shard, in a file of `size` bytes."""
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
        """Raises StoreCorruptError."""
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
        """Whether this shard is the one that `run` plans there."""
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

    What was not asked for is None or not among the columns. Arrays may be read-only and share a buffer.
    """

    keys: Keys | None = None
    views: npt.NDArray[np.int32] | None = None
    labels: npt.NDArray[np.int64] | None = None
    content: npt.NDArray[np.uint64] | None = None
    columns: dict[str, Array] = field(default_factory=dict)


class OpenShard(Protocol):
    """A shard file open for reading; `identity` and the schema were checked on opening, the bytes were not."""

    identity: ShardIdentity

    def blocks(self, names: Collection[str]) -> list[tuple[int, int]]:
        """The row ranges of these columns that are best read in one go: all rows where only small columns are asked
        for, and they fit SMALL_BYTES."""
        ...

    def read(self, names: Collection[str], start: int, stop: int) -> ShardRows:
        """Some rows of the columns `names` ("key", "view", "label", "content" and the encoding's)."""
        ...

    def extents(self, name: str) -> list[tuple[int, int]] | None:
        """Where the file holds whole rows of a column back to back, as (offset, rows) that together are all rows in
        order; None when that is not plain to see."""
        ...

    def mapped(self, name: str) -> Array | None:
        """A column of the encoding as a read-only memory map of the file itself, (B, W); None when it cannot be."""
        ...

    def close(self) -> None: ...


def group_rows(columns: Sequence[Column]) -> int:
    """Rows of a Parquet row group (and of a read): the power of two that fills 8 MiB, at most 65,536."""
    fitting = max(1, GROUP_BYTES // sum(column.row_bytes for column in columns))
    return min(GROUP_ROWS, 1 << (fitting.bit_length() - 1))


def in_one_go(identity: ShardIdentity, size: int, names: Collection[str]) -> bool:
    """Whether all rows of these columns, in a file of `size` bytes, are a small read."""
    payload = sum(column.row_bytes for column in identity.columns)
    return size - identity.rows * payload <= SMALL_BYTES and not any(one.name in names for one in identity.columns)


def check_rows(rows: Rows, run: Run, plan: ShardPlan, bad: Sequence[BadRow]) -> CheckedRows:
    """Our caller's rows as little-endian arrays of the run's columns. ValueError for wrong shapes or dtypes."""
    keys = Keys.of(rows.keys)
    count = len(keys)
    if count + len(bad) != plan.stop - plan.start:
        raise ValueError(
            f"shard {plan.number}: {count} rows and {len(bad)} bad ones, planned are {plan.stop - plan.start}"
        )
    if {column.name for column in run.columns} != set(rows.columns):
        raise ValueError(f"columns {sorted(rows.columns)}, the run has {[column.name for column in run.columns]}")
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
        raise ValueError(f"labels {labels.shape} and content {content.shape}, expected ({count},)")
    views = np.full(count, plan.view, "<i4")
    return CheckedRows(keys=keys, views=views, labels=labels, content=content, columns=columns)
