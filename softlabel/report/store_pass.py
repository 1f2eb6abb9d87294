"""One pass over a store that feeds the sections of a report.

Legend: N samples, V views, R rows of a block, C classes, M members, S sampled rows, W elements of a column in one row.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from softlabel.common.multi_hot import MULTI_HOT, Labels
from softlabel.errors import MismatchError
from softlabel.report.judge import Judge, Judged, JudgedSigmoids
from softlabel.report.probabilities import LabelReader
from softlabel.store.columns import Array
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows

I64 = NDArray[np.int64]
T = TypeVar("T")
SAMPLE_ROWS = 50_000
SAMPLE_BYTES = 160 << 20  # of the stored columns, so that many classes and members do not fill the memory
_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Consecutive rows of one view.

    Attributes:
        first: number of the first row in the store.
        view: of all of them.
        samples: position of each row's sample in the dataset, int64 (R,).
        labels: hard labels, int64 (R,), negative for none; of independent sigmoids int8 (R, C), -1 where unknown.
        content: content hashes, uint64 (R,), 0 for none.
        judged: figures of each row at `LabelReader.judged`, see `Judged`; None where classes were drawn at random, and
            for independent sigmoids.
        sigmoids: sums over the rows of independent sigmoids; None for a softmax.
    """

    first: int
    view: int
    samples: I64
    labels: Labels
    content: NDArray[np.uint64]
    judged: Judged | None
    sigmoids: JudgedSigmoids | None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def rows(self) -> I64:
        """Their numbers in the store, int64 (R,)."""
        return np.arange(self.first, self.first + len(self), dtype=np.int64)


class Meter(Protocol):
    """What a section gathers from all rows.

    To add one: write a class with `add`, which takes what it needs from a block (a few numbers a row at most: a store
    may have 100 million), and a `result` that returns the section's dataclass, and give it to `run_pass` with the
    others, as `softlabel.report.measure.measure_store` does:

        class Rows:
            def __init__(self) -> None:
                self.count = 0

            def add(self, block: Block) -> None:
                self.count += len(block)

        rows = Rows()
        sample = run_pass(store, LabelReader(store), [rows])

    Blocks come in the order of the rows, on the thread of the caller. What needs whole rows (C numbers and more) is a
    function of the `RowSample` that the pass returns: it has the same samples in every view.
    """

    def add(self, block: Block) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSample:
    """Whole rows of some samples, all views of each: of every sample if they are few.

    Attributes:
        reader: decodes them.
        rows: numbers in the store, int64 (S,), rising: views in turn.
        views: int32 (S,).
        samples: positions in the dataset, int64 (S,).
        labels: as in `Block`, (S,) or (S, C).
        columns: of the encoding, (S, W).
    """

    reader: LabelReader
    rows: I64
    views: NDArray[np.int32]
    samples: I64
    labels: Labels
    columns: dict[str, Array]

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, chosen: I64 | None = None, *, values: int = 1 << 20) -> Iterator[tuple[I64, dict[str, Array]]]:
        """Yield (positions in the sample, their columns) of parts that decode to about `values` numbers.

        Args:
            chosen: positions, int64; None: all.
        """
        chosen = np.arange(len(self)) if chosen is None else chosen
        step = max(1, values // (self.reader.members * self.reader.run.num_classes))
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            yield part, {name: column[part] for name, column in self.columns.items()}


def run_pass(
    store: Store,
    reader: LabelReader,
    meters: Sequence[Meter],
    *,
    sample_rows: int = SAMPLE_ROWS,
    progress: bool | None = None,
) -> RowSample:
    """Read every row of a store once and show it to the meters.

    Args:
        store: open, see `softlabel.open_store`.
        reader: of the store.
        meters: what takes the blocks, in the order of the rows.
        sample_rows: how many rows the returned sample holds at most (fewer where these would take more than 160 MiB).
        progress: show a bar; None: if standard error is a terminal.

    Returns:
        The sample: of each of equal stretches of the dataset one sample at a fixed random place, the same in every run.

    Raises:
        StoreCorruptError: a shard is missing or damaged.
    """
    chosen = choose_samples(store.run.dataset.rows, _count_sampled(store, sample_rows))
    kept: list[_Kept] = []
    hidden = None if progress is None else not progress
    with tqdm(total=len(store), unit="row", unit_scale=True, desc="measuring", disable=hidden) as bar:
        for block, part in _iter_blocks(store, reader, chosen):
            for meter in meters:
                meter.add(block)
            if part is not None:
                kept.append(part)
            bar.update(len(block))
    return _gather(store, reader, kept)


def choose_samples(samples: int, wanted: int) -> I64:
    """Positions in a dataset, rising: one in each of `wanted` equal stretches, at a fixed random place in it, so that
    no order of the dataset that repeats itself leaves classes out."""
    if wanted >= samples:
        return np.arange(samples, dtype=np.int64)
    starts = np.arange(wanted + 1, dtype=np.int64) * samples // wanted
    places = np.random.default_rng(0).random(wanted)
    return starts[:-1] + (places * np.diff(starts)).astype(np.int64)


def _count_sampled(store: Store, sample_rows: int) -> int:
    row_bytes = sum(column.row_bytes for column in store.run.label_columns)
    rows = min(sample_rows, SAMPLE_BYTES // row_bytes)
    return max(1, rows // store.run.views.count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Kept:
    """The part of a block that belongs to the sample."""

    rows: I64
    view: int
    samples: I64
    labels: Labels
    columns: dict[str, Array]


def _iter_blocks(store: Store, reader: LabelReader, chosen: I64) -> Iterator[tuple[Block, _Kept | None]]:
    """Yield blocks in order, judged ahead by threads."""

    def make(first: int, view: int, samples: I64, rows: StoredRows) -> tuple[Block, _Kept | None]:
        block = _judge_rows(reader, judge, first, view, samples, rows)
        here = chosen[np.searchsorted(chosen, samples[0]) : np.searchsorted(chosen, samples[-1], side="right")]
        picked = np.searchsorted(samples, here)
        picked = picked[samples[picked] == here]  # a sample that was bad has no row
        if not len(picked):
            return block, None
        columns = {name: rows.columns[name][picked] for name in reader.columns}
        kept = _Kept(
            rows=block.rows[picked], view=view, samples=samples[picked], labels=block.labels[picked], columns=columns
        )
        return block, kept

    judge = Judge(reader)
    yield from iter_in_order(make, _read_rows(store, reader))


def iter_in_order(make: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield what `make` returns for the arguments of each task, in their order, computed ahead by threads."""
    before = torch.get_num_threads()
    count = min(before, _THREADS)
    pending: deque[Future[T]] = deque()
    # A torch thread each: the arrays of a slice are too small to be shared by several.
    pool = ThreadPoolExecutor(count, "softlabel-report", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            pending.append(pool.submit(make, *task))
            del task
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what the threads have set is the default of threads to come


def _read_rows(store: Store, reader: LabelReader) -> Iterator[tuple[int, int, I64, StoredRows]]:
    """Yield (first row, view, positions of the samples in the dataset, rows) of each block."""
    names = [*reader.columns, "label", "content"]
    names += [column.name for column in store.run.sample_columns if column.name == MULTI_HOT]
    first = 0
    for record in store.shards:
        plan = store.run.shard(record.number)
        bad = [row.index for row in record.bad]
        samples = np.arange(plan.start, plan.stop, dtype=np.int64)
        samples = np.delete(samples, np.array(bad, np.int64) - plan.start)
        done = 0
        for rows in store.stream(names, start=first, stop=first + record.rows):
            yield first + done, plan.view, samples[done : done + len(rows)], rows
            done += len(rows)
            del rows
        first += record.rows


def _judge_rows(reader: LabelReader, judge: Judge, first: int, view: int, samples: I64, rows: StoredRows) -> Block:
    run = reader.run
    labels = np.asarray(rows.hard_labels)
    judged = sigmoids = None
    if run.activation == "sigmoid":
        sigmoids = judge.sigmoids(rows.columns, labels)
    else:
        if (highest := int(labels.max(initial=-1))) >= run.num_classes:
            raise MismatchError(
                f"hard labels: expected 0 to {run.num_classes - 1}, the teachers' classes, found {highest}"
            )
        if not reader.is_drawn:
            judged = judge.softmax(rows.columns, rows.labels)
    return Block(
        first=first,
        view=view,
        samples=samples,
        labels=labels,
        content=rows.content,
        judged=judged,
        sigmoids=sigmoids,
    )


def _gather(store: Store, reader: LabelReader, kept: list[_Kept]) -> RowSample:
    run = store.run
    none = np.zeros(0, np.int64)
    labels: Labels = none if run.activation == "softmax" else np.zeros((0, run.num_classes), np.int8)
    found = {
        column.name: np.concatenate(
            [np.zeros((0, column.width), column.numpy), *(part.columns.pop(column.name) for part in kept)]
        )
        for column in run.label_columns
    }
    rows = np.concatenate([none, *(part.rows for part in kept)])
    return RowSample(
        reader=reader,
        rows=rows,
        views=np.repeat(np.array([part.view for part in kept], np.int32), [len(part.rows) for part in kept]),
        samples=np.concatenate([none, *(part.samples for part in kept)]),
        labels=np.concatenate([labels, *(part.labels for part in kept)]),
        columns=found,
    )
