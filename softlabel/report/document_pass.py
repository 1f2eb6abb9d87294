"""One pass over a store of documents that feeds the sections of a report.

Legend: B documents of a block, L tokens and P labelled positions of them, C tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from softlabel.report.positions import JudgedPositions, PositionJudge
from softlabel.report.probabilities import LabelReader
from softlabel.report.store_pass import SAMPLE_BYTES, SAMPLE_ROWS, RowSample, choose_samples, iter_in_order
from softlabel.store.columns import Array
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows
from softlabel.store.token_rows import LENGTH, MASK, POSITIONS, TOKENS

I64 = NDArray[np.int64]
TOKEN_NAMES = (LENGTH, POSITIONS, TOKENS, MASK)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DocumentBlock:
    """Consecutive documents.

    Attributes:
        first: number of the first row in the store.
        content: content hashes, uint64 (B,), 0 for none.
        lengths: tokens of each document, int64 (B,).
        tokens: int64 (L,), one document's after another's.
        document: of each position, from 0, int64 (P,).
        place: of each position in its document, from 0, int64 (P,).
        counts: which positions count, bool (P,).
        next: the token after each position, int64 (P,), -1 where the document ends.
        judged: None where labels are tokens drawn at random.
    """

    first: int
    content: NDArray[np.uint64]
    lengths: I64
    tokens: I64
    document: I64
    place: I64
    counts: NDArray[np.bool_]
    next: I64
    judged: JudgedPositions | None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Positions that count and are followed by a token, bool (P,)."""
        return self.counts & (self.next >= 0)


class DocumentMeter(Protocol):
    """What a section gathers from all documents; see `softlabel.report.store_pass.Meter`."""

    def add(self, block: DocumentBlock) -> None: ...


def make_block(rows: StoredRows, judge: PositionJudge | None, first: int = 0) -> DocumentBlock:
    """What `rows` say, of which the token columns, the content and, with a judge, the encoding's were read."""
    lengths_B, place_P = rows.lengths, rows.places
    ends_B = np.cumsum(lengths_B)
    document_P = np.repeat(np.arange(len(rows)), rows.positions)
    at_P = (ends_B - lengths_B)[document_P] + place_P
    tokens_L = rows.columns[TOKENS].reshape(-1).astype(np.int64)
    goes_on_P = at_P + 1 < ends_B[document_P]
    next_P = np.where(goes_on_P, np.append(tokens_L, -1)[at_P + 1], -1)
    return DocumentBlock(
        first=first,
        content=rows.content,
        lengths=lengths_B,
        tokens=tokens_L,
        document=document_P,
        place=place_P,
        counts=rows.columns[MASK].reshape(-1)[at_P] == 1,
        next=next_P,
        judged=None if judge is None else judge.judge(rows.columns, next_P),
    )


def run_document_pass(
    store: Store, reader: LabelReader, meters: Sequence[DocumentMeter], *, progress: bool | None = None
) -> RowSample:
    """Read every document of a store once and show it to the meters.

    Returns:
        Where members are kept, labels of at most 50,000 positions that count, spread evenly over the store: as rows
        whose hard label is the next token. No row otherwise.

    Raises:
        StoreCorruptError: a shard is missing or damaged.
    """
    judge = None if reader.is_drawn else PositionJudge(reader)
    chosen = _choose_positions(store) if store.run.kept and judge is not None else np.zeros(0, np.int64)
    kept: list[tuple[I64, I64, dict[str, Array]]] = []

    def make(first: int, rows: StoredRows, before: int) -> tuple[DocumentBlock, tuple[I64, I64, dict[str, Array]]]:
        block = make_block(rows, judge, first)
        here = chosen[np.searchsorted(chosen, before) : np.searchsorted(chosen, before + len(block.place))] - before
        here = here[block.counts[here]]
        columns = {name: rows.columns[name][here] for name in reader.columns} if len(here) else {}
        return block, (here + before, block.next[here], columns)

    def read() -> Iterator[tuple[int, StoredRows, int]]:
        first = done = 0  # documents, labelled positions
        names = ["content", *TOKEN_NAMES, *(() if judge is None else reader.columns)]
        for rows in store.stream(names):
            yield first, rows, done
            first, done = first + len(rows), done + int(rows.positions.sum())

    hidden = None if progress is None else not progress
    with tqdm(total=len(store), unit="doc", unit_scale=True, desc="measuring", disable=hidden) as bar:
        for block, part in iter_in_order(make, read()):
            for meter in meters:
                meter.add(block)
            if len(part[0]):
                kept.append(part)
            bar.update(len(block))
    return _gather(reader, kept)


def _choose_positions(store: Store) -> I64:
    row_bytes = sum(column.row_bytes for column in store.run.label_columns)
    return choose_samples(store.spans.total("position"), max(1, min(SAMPLE_ROWS, SAMPLE_BYTES // row_bytes)))


def _gather(reader: LabelReader, kept: list[tuple[I64, I64, dict[str, Array]]]) -> RowSample:
    rows = np.concatenate([np.zeros(0, np.int64), *(numbers for numbers, _, _ in kept)])
    return RowSample(
        reader=reader,
        rows=rows,
        views=np.zeros(len(rows), np.int32),
        samples=rows,
        labels=np.concatenate([np.zeros(0, np.int64), *(following for _, following, _ in kept)]),
        columns={
            column.name: np.concatenate(
                [np.zeros((0, column.width), column.numpy), *(part[column.name] for _, _, part in kept)]
            )
            for column in reader.run.label_columns
        },
    )
