"""One shard: its rows in memory, its identity, and the interface of the file formats.

B rows of a shard, L tokens and P labelled positions of them, W elements of a column. parquet.py and hdf5.py each have
`write(path, identity, rows)` and `open_shard(path)`.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys
from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.columns import Array, Column, Columns
from softlabel.store.fidelity import Fidelity
from softlabel.store.manifest import FORMAT_VERSIONS, BadRow, Run, ShardPlan, ShardRecord
from softlabel.store.storage.base import reading
from softlabel.store.strict_json import SchemaError, dumps, from_json, loads, to_json
from softlabel.store.token_rows import RowSpans, find_token_problem, lacks_counts, list_counts

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
        columns: the run's columns, (B, W) each, or (L, W), (P, W): the rows' elements one after another.
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
    spans: RowSpans


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

    @classmethod
    def of(
        cls, run: Run, plan: ShardPlan, rows: CheckedRows, bad: tuple[BadRow, ...], fidelity: Fidelity | None
    ) -> "ShardIdentity":
        """Return the identity of the shard that has these rows."""
        keys = rows.keys
        if fidelity is not None and run.tokens is not None:
            fidelity = replace(fidelity, positions=rows.spans.total("position"))
        return cls(
            format_version=run.format_version,
            run=run.fingerprint(plan.part),
            number=plan.number,
            view=plan.view,
            start=plan.start,
            stop=plan.stop,
            rows=len(keys),
            columns=run.columns,
            first_key=keys[0] if len(keys) else None,
            last_key=keys[len(keys) - 1] if len(keys) else None,
            bad=bad,
            fidelity=fidelity,
        )

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
            if lacks_counts(found.columns):
                raise SchemaError(
                    f"columns per token or position without their {' and '.join(sorted(list_counts(found.columns)))}"
                )
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
    """Rows as read: Keys, views int32 (B,), labels int64 (B,), content uint64 (B,), columns (B, W), (L, W) or (P, W).

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
    spans: RowSpans

    def blocks(self, names: Collection[str]) -> list[tuple[int, int]]:
        """Return the row ranges to read at once: all rows if only small columns of at most SMALL_BYTES are read."""
        ...

    def read(self, names: Collection[str], start: int, stop: int) -> ShardRows:
        """Read rows of the columns `names` ("key", "view", "label", "content" and the encoding's)."""
        ...

    def extents(self, name: str) -> list[tuple[int, int]] | None:
        """Return (offset, count) of the contiguous pieces of a column, in order, W elements each; None if unknown."""
        ...

    def mapped(self, name: str) -> Array | None:
        """Return a column of all rows as a read-only map of the file; None if not possible."""
        ...

    def close(self) -> None: ...


def cut_into_groups(columns: Sequence[Column], spans: RowSpans) -> list[int]:
    """Return the first rows of row groups and of reads, and the number of rows: 8 MiB each, at most 65,536 rows.

    Rows of one size come in powers of two. A row that is larger has a group of its own.
    """
    if not spans.offsets:
        fitting = max(1, GROUP_BYTES // sum(column.row_bytes for column in columns))
        step = min(GROUP_ROWS, 1 << (fitting.bit_length() - 1))
        return [*range(0, spans.rows, step), spans.rows]
    sums = spans.sum_bytes(columns)
    starts = [0]
    while (start := starts[-1]) < spans.rows:
        fitting = int(np.searchsorted(sums, sums[start] + GROUP_BYTES, side="right")) - 1
        starts.append(min(max(fitting, start + 1), start + GROUP_ROWS, spans.rows))
    return starts


def count_payload(columns: Sequence[Column], spans: RowSpans) -> int:
    """Return the bytes of all columns but the counts of tokens and positions, which are as small as labels."""
    counts = list_counts(columns)
    return spans.nbytes(column for column in columns if column.name not in counts)


def in_one_go(columns: Sequence[Column], small_bytes: int, names: Collection[str]) -> bool:
    """Whether the columns `names` are among the small ones of a file, which have `small_bytes` in all, and few."""
    large = {column.name for column in columns} - list_counts(columns)
    return large.isdisjoint(names) and small_bytes <= SMALL_BYTES


def check_rows(rows: Rows, run: Run, plan: ShardPlan, bad: Sequence[BadRow]) -> CheckedRows:
    """Convert rows to little-endian arrays.

    Raises:
        ValueError: a number of rows, shape, dtype or token is wrong.
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
    counts = {name: rows.columns[name] for name in list_counts(run.columns)}
    if odd := [name for name, array in counts.items() if array.dtype != "<i4" or array.size != count]:
        raise ValueError(f"column {odd[0]!r}: expected int32 ({count}, 1), found {counts[odd[0]].shape}")
    spans = RowSpans.of(count, counts)
    columns = {}
    for column in run.columns:
        array, total = rows.columns[column.name], spans.total(column.per)
        if array.dtype != column.numpy or array.size != total * column.width:
            raise ValueError(
                f"column {column.name!r}: expected {column.numpy} ({total}, {column.width}), "
                f"found {array.dtype} {array.shape}"
            )
        columns[column.name] = np.ascontiguousarray(array, column.numpy).reshape(total, column.width)
    labels = np.full(count, IGNORE, "<i8") if rows.labels is None else np.ascontiguousarray(rows.labels, "<i8")
    content = np.zeros(count, "<u8") if rows.content is None else np.ascontiguousarray(rows.content, "<u8")
    if labels.shape != (count,) or content.shape != (count,):
        raise ValueError(f"labels and content: expected ({count},), found {labels.shape} and {content.shape}")
    if run.tokens is not None:
        if (labels != IGNORE).any():
            raise ValueError("labels: expected none in a store of tokens, whose hard labels are its next tokens")
        if problem := find_token_problem(run.tokens, run.num_classes, columns):
            raise ValueError(f"shard {plan.number}: {problem}")
    views = np.full(count, plan.view, "<i4")
    return CheckedRows(keys=keys, views=views, labels=labels, content=content, columns=columns, spans=spans)


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
