"""The concatenated samples of stores, addressed by view and position in the dataset."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from softlabel.store.fidelity import Fidelity
from softlabel.store.manifest import BadRow, ShardRecord
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardSpan:
    """A shard with samples `start` to `stop`; the good ones are the store's rows from `row` on, in order."""

    start: int
    stop: int
    row: int
    record: ShardRecord

    def row_of(self, index: int) -> int:
        """Return the row of sample `index`, or of the next good one."""
        bad_before = bisect.bisect_left([bad.index for bad in self.record.bad], index)
        return self.row + index - self.start - bad_before


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The first `count` samples of a store, from position `offset` among all samples; spans per view, by start."""

    store: Store
    offset: int
    count: int
    spans: dict[int, list[_ShardSpan]]

    def overlapping(self, view: int, start: int, stop: int) -> Iterator[tuple[_ShardSpan, int, int]]:
        """Yield (span, first row, last row) of the shards that hold samples `start` to `stop` of all samples."""
        spans = self.spans.get(view, [])
        start, stop = max(0, start - self.offset), min(stop - self.offset, self.count)
        first = bisect.bisect_right(spans, start, key=lambda span: span.start) - 1
        for span in spans[max(0, first) :]:
            if span.start >= stop:
                break
            if span.stop > start:
                yield span, span.row_of(max(span.start, start)), span.row_of(min(span.stop, stop))


def _cut_cost(store: Store, cost: Fidelity | None, first: int, last: int) -> Fidelity | None:
    """A shard's cost as that of its rows `first` to `last`."""
    if cost is None or cost.positions is None:
        return cost
    start, stop = store.spans.cut("position", first, last)
    return dataclasses.replace(cost, positions=stop - start)


class Samples:
    """The samples of stores, concatenated.

    Args:
        stores: open stores.
        counts: number of first samples to use of each store; None: all.
    """

    def __init__(self, stores: Sequence[Store], counts: Sequence[int] | None = None) -> None:
        self.stores = tuple(stores)
        self._pieces: list[_Piece] = []
        self.count = 0
        for number, store in enumerate(stores):
            spans: dict[int, list[_ShardSpan]] = {}
            row = 0
            for record in store.shards:
                plan = store.run.shard(record.number)
                span = _ShardSpan(start=plan.start, stop=plan.stop, row=row, record=record)
                spans.setdefault(plan.view, []).append(span)
                row += record.rows
            for listed in spans.values():
                listed.sort(key=lambda span: span.start)
            count = store.run.dataset.rows if counts is None else counts[number]
            self._pieces.append(_Piece(store=store, offset=self.count, count=count, spans=spans))
            self.count += count

    @property
    def measured(self) -> bool:
        """Whether the cost of the encoding is known for every row."""
        return all(record.fidelity is not None for store in self.stores for record in store.shards if record.rows)

    def read(self, view: int, start: int, stop: int, *, columns: Sequence[str] | None = None) -> Iterator[StoredRows]:
        """Yield the rows of samples `start` to `stop`, in order, in batches of bounded size, each of one view."""
        for piece in self._pieces:
            for _, first, last in piece.overlapping(view, start, stop):
                yield from piece.store.stream(columns, start=first, stop=last)

    def bad(self, view: int, start: int, stop: int) -> list[BadRow]:
        """Return the samples among `start` to `stop` without a row, with positions among all samples."""
        return [
            dataclasses.replace(bad, index=bad.index + piece.offset)
            for piece in self._pieces
            for span, _, _ in piece.overlapping(view, start, stop)
            for bad in span.record.bad
            if bad.index < piece.count and start <= bad.index + piece.offset < stop
        ]

    def cost(self, view: int, start: int, stop: int) -> Fidelity | None:
        """Return the encoding's cost for samples `start` to `stop`; None if a shard was not measured.

        The mean weights shards by their rows, or labelled positions, in the range, so that totals equal those of the
        stores.
        """
        parts = self.costs(view, start, stop)
        return None if any(cost is None for _, cost in parts) else Fidelity.total(parts)

    def costs(self, view: int, start: int, stop: int) -> list[tuple[int, Fidelity | None]]:
        """Return the rows that each shard has of samples `start` to `stop`, with its cost for them."""
        return [
            (last - first, _cut_cost(piece.store, span.record.fidelity, first, last))
            for piece in self._pieces
            for span, first, last in piece.overlapping(view, start, stop)
            if last > first
        ]

    def keys(self) -> Iterator[str]:
        """Yield the key of every sample in order, also of samples without a row."""
        for piece in self._pieces:
            for span in piece.spans.get(0, []):
                bad = iter(span.record.bad)
                waiting = next(bad, None)
                index = span.start
                for rows in piece.store.stream(["key"], start=span.row, stop=span.row + span.record.rows):
                    for key in rows.keys:
                        while waiting is not None and waiting.index == index:
                            yield waiting.key
                            waiting, index = next(bad, None), index + 1
                        yield key
                        index += 1
                while waiting is not None:
                    yield waiting.key
                    waiting = next(bad, None)
