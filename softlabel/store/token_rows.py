"""Rows of tokens: a row is a document, with as many tokens, and labelled positions, as the document has.

B rows, N rows of a store, L tokens and P labelled positions of several rows together, W elements of a column.

Position t of a document has the answer after its tokens 0 to t; FORMAT.md defines the columns. The elements of a column
per token or per position lie one after another in the order of the rows: (L, W) or (P, W). Where a row's elements begin
follows from the running sums of `length` or `positions`.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import xxhash

from softlabel.common.activation import Activation
from softlabel.store.columns import Column, Columns, Per, index_dtype
from softlabel.store.strict_json import OMIT

I64 = npt.NDArray[np.int64]

LENGTH, POSITIONS, TOKENS, MASK = "length", "positions", "tokens", "mask"
TOKENIZER = "tokenizer"  # file that all shards share: the teacher's tokenizer.json
COUNTS: Mapping[Per, str] = {"token": LENGTH, "position": POSITIONS}  # the row column that counts them
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """How the documents of a store became tokens, and which of their positions are labelled.

    Attributes:
        tokenizer: SHA-256 of the vocabulary, see FORMAT.md.
        max_length: the largest number of tokens of a document.
        template: SHA-256 of the chat template, where documents are chats.
        bos, eos: ids that were added at the beginning and at the end; None: none.
        positions: ``all``, or those alone whose `mask` is 1.

    Raises:
        ValueError: a field is out of range.
    """

    tokenizer: str
    max_length: int
    template: str | None = field(default=None, metadata=OMIT)
    bos: int | None = field(default=None, metadata=OMIT)
    eos: int | None = field(default=None, metadata=OMIT)
    positions: Literal["all", "masked"] = field(default="all", metadata=OMIT)

    def __post_init__(self) -> None:
        for name in ("tokenizer", "template"):
            text = getattr(self, name)
            if text is not None and not _SHA256.fullmatch(text):
                raise ValueError(f"tokens.{name}: expected 64 hexadecimal digits, found {text[:80]!r}")
        if not 1 <= self.max_length < 2**31:
            raise ValueError(f"tokens.max_length: expected at least 1, found {self.max_length}")
        if self.positions not in ("all", "masked"):
            raise ValueError(f"tokens.positions: expected 'all' or 'masked', found {self.positions!r}")

    def check_run(self, input: str, activation: Activation, num_classes: int, *, views: bool) -> None:
        """Raises ValueError where a run of these samples, with `views` of them or not, has no documents."""
        if input != "tokens":
            raise ValueError(f"tokens: expected input 'tokens', found {input!r}")
        if activation != "softmax" or views:
            raise ValueError(
                "tokens: expected a softmax over the vocabulary and unchanged documents, found views or sigmoids"
            )
        for name, found in (("bos", self.bos), ("eos", self.eos)):
            if found is not None and not 0 <= found < num_classes:
                raise ValueError(f"tokens.{name}: expected an id below {num_classes}, found {found}")


@functools.cache  # requested with every batch
def per_position(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """Return columns of rows as columns of labelled positions."""
    return tuple(replace(column, per="position") for column in columns)


@functools.cache
def token_columns(num_classes: int) -> tuple[Column, ...]:
    """Return the columns of a row of tokens beside the teachers' answers."""
    return (
        Column(name=LENGTH, dtype="<i4", width=1),
        Column(name=POSITIONS, dtype="<i4", width=1),
        Column(name=TOKENS, dtype=index_dtype(num_classes), width=1, per="token"),
        Column(name=MASK, dtype="|u1", width=1, per="token"),
    )


def list_counts(columns: Iterable[Column]) -> set[str]:
    """Return the names of the row columns that count the elements of `columns`."""
    return {COUNTS[column.per] for column in columns if column.per != "row"}


def add_counts(names: Collection[str], columns: Iterable[Column]) -> list[str]:
    """Return `names` with the counts without which the named ones of `columns` have no rows."""
    counts = list_counts(column for column in columns if column.name in names)
    return [*names, *sorted(counts.difference(names))]


def lacks_counts(columns: Sequence[Column]) -> bool:
    """Whether a column per token or position has no column that counts them."""
    return any(Column(name=name, dtype="<i4", width=1) not in columns for name in list_counts(columns))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSpans:
    """Where the elements of B rows lie in columns per row, per token and per position.

    Attributes:
        rows: B.
        offsets: int64 (B + 1,) for "token" and "position" if there are columns of them: row i has the elements
            offsets[i] to offsets[i + 1].
    """

    rows: int
    offsets: Mapping[Per, I64] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: int, columns: Columns) -> Self:
        """Sum up the counts (B, 1) that are among `columns`.

        Raises:
            ValueError: one is negative.
        """
        offsets: dict[Per, I64] = {}
        for per, name in COUNTS.items():
            if name in columns:
                counts_B = columns[name].reshape(rows)
                if rows and counts_B.min() < 0:
                    raise ValueError(f"`{name}` is negative in row {int(counts_B.argmin())}")
                offsets[per] = np.zeros(rows + 1, np.int64)
                np.cumsum(counts_B, out=offsets[per][1:])
        return cls(rows=rows, offsets=offsets)

    def cut(self, per: Per, start: int, stop: int) -> tuple[int, int]:
        """Return the first element of rows `start` to `stop`, and the one after the last."""
        if per == "row":
            return start, stop
        return int(self.offsets[per][start]), int(self.offsets[per][stop])

    def total(self, per: Per) -> int:
        """Return the elements of all rows."""
        return self.cut(per, 0, self.rows)[1]

    def numbers(self, per: Per, rows_B: I64) -> I64:
        """Return the numbers of the elements of some rows, in their order."""
        if per == "row":
            return rows_B
        starts_B = self.offsets[per][rows_B]
        counts_B = self.offsets[per][rows_B + 1] - starts_B
        ends_B = np.cumsum(counts_B)
        return np.repeat(starts_B - (ends_B - counts_B), counts_B) + np.arange(int(counts_B.sum()))

    def row_of(self, per: Per, element: int) -> tuple[int, int]:
        """Return the row of an element, and which of the row's elements it is."""
        if per == "row":
            return element, 0
        row = int(np.searchsorted(self.offsets[per], element, side="right")) - 1
        return row, element - int(self.offsets[per][row])

    def nbytes(self, columns: Iterable[Column]) -> int:
        """Return the bytes of these columns of all rows."""
        return sum(self.total(column.per) * column.row_bytes for column in columns)

    def sum_bytes(self, columns: Iterable[Column]) -> I64:
        """Return the running sum of the rows' bytes in these columns, int64 (B + 1,)."""
        sums = np.zeros(self.rows + 1, np.int64)
        for column in columns:
            sums += (np.arange(self.rows + 1) if column.per == "row" else self.offsets[column.per]) * column.row_bytes
        return sums


def find_token_problem(tokens: TokenRun, num_classes: int, columns: Columns) -> str | None:
    """Return what is wrong with the columns of `token_columns` of some rows, or None."""
    lengths_B, positions_B = (columns[name].reshape(-1).astype(np.int64) for name in (LENGTH, POSITIONS))
    tokens_L, mask_L = columns[TOKENS].reshape(-1), columns[MASK].reshape(-1)
    spans = RowSpans.of(len(lengths_B), columns)
    if (wrong_B := lengths_B > tokens.max_length).any():
        row = int(wrong_B.argmax())
        return f"row {row} of a block: `{LENGTH}` {lengths_B[row]} is more than the run's {tokens.max_length}"
    for name, wrong_L, text in (
        (TOKENS, (tokens_L.astype(np.int64) >= num_classes) | (tokens_L.astype(np.int64) < 0), "is not a class"),
        (MASK, mask_L > 1, "is not 0 or 1"),
    ):
        if wrong_L.any():
            row, place = spans.row_of("token", int(wrong_L.argmax()))
            return f"row {row} of a block: token {place}: `{name}` {text}"
    if tokens.positions == "masked":
        sums = np.concatenate([[0], np.cumsum(mask_L, dtype=np.int64)])
        ones_B = np.diff(sums[spans.offsets["token"]])
        wrong_B, text = positions_B != ones_B, f"is not the sum of its `{MASK}`"
    else:
        wrong_B, text = positions_B > lengths_B, f"is more than its `{LENGTH}`"
    if wrong_B.any():
        return f"row {int(wrong_B.argmax())} of a block: `{POSITIONS}` {text}"
    return None


def find_content_problem(content_B: npt.NDArray[np.uint64], columns: Columns) -> str | None:
    """Return which row's tokens do not have its content hash, or None; rows without a hash say nothing."""
    offsets = RowSpans.of(len(content_B), {LENGTH: columns[LENGTH]}).offsets["token"].tolist()
    tokens: Any = np.ascontiguousarray(columns[TOKENS], "<i4").reshape(-1).view(np.uint8).data
    for row, expected in enumerate(content_B.tolist()):
        if expected and (xxhash.xxh3_64_intdigest(tokens[4 * offsets[row] : 4 * offsets[row + 1]]) or 1) != expected:
            return f"row {row} of a block: `{TOKENS}` differ from its content hash"
    return None
