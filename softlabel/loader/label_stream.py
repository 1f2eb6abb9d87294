"""Soft labels read a window of blocks at a time, in step with the images, for stores that no memory or disk holds.

Legend: B rows of a batch, R rows of a window, W elements of a column in one row.

    window w      in use: batches gather from it
    window w + 1  read ahead by a thread, shard by shard, in the order in which it was written

Memory is that of two windows, three while a batch lies across the edge of two.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import MismatchError
from softlabel.labels.combine import Combination
from softlabel.loader.features import BatchFeature, decode_features, list_columns
from softlabel.loader.order import BlockOrder
from softlabel.loader.target import make_target
from softlabel.loss.targets import Target
from softlabel.store.reader import Store

Int64s = NDArray[np.int64]

# Rows that lie further apart are read as two pieces; what lies between them would be read for nothing.
_GAP = 4096


class LabelStream:
    """Targets for the batches of one epoch after another, which have to be asked for in their order.

    Args:
        store: where the rows are.
        order: of the epoch's samples; whose windows are read.
        rows_of: (epoch, samples) -> int64 rows of the store, -1 where there is none. Neighbouring samples have
            neighbouring rows, or much is read for nothing: see `check_same_order`.
        combination: see `make_target`.
        also: what a batch has of a teacher beside its logits.
    """

    def __init__(
        self,
        store: Store,
        order: BlockOrder,
        rows_of: Callable[[int, Int64s], Int64s],
        *,
        combination: Combination | None = None,
        also: Sequence[BatchFeature] = (),
    ) -> None:
        self._store, self._order, self._rows_of, self._combination = store, order, rows_of, combination
        self._also = also
        self._names = [*(column.name for column in store.run.label_columns), *list_columns(store.run, also)]
        self._loading: dict[int, Future[_Window]] = {}
        self._epoch = -1
        self._pool: ThreadPoolExecutor | None = None

    def take(
        self, epoch: int, start: int, stop: int, rows_B: Int64s, members_B: Int64s | None = None
    ) -> tuple[Target | None, dict[str, Tensor]]:
        """The target and features of rows that belong to the positions start to stop of an epoch; -1 gives another row
        as filler. There is no target where rows have no labels. `members_B`: see `make_target`.

        Raises:
            StoreCorruptError: a shard is gone, or is not what the manifest promises.
        """
        windows = self._order.windows(epoch)
        first = int(np.searchsorted(windows, start, side="right")) - 1
        last = int(np.searchsorted(windows, stop - 1, side="right")) - 1
        needed = range(first, min(last + 2, len(windows) - 1))
        self._ask(epoch, needed)
        try:
            parts = [self._loading[number].result() for number in needed if number <= last]
        except BaseException:
            self._loading.clear()  # after the store is repaired, the old error must not come again
            raise
        run, columns = self._store.run, _gather(parts, rows_B)
        features = decode_features(run, self._also, columns)
        if not run.encoding.labels:
            return None, features
        target = make_target(run, columns, extra=self._store.extra, combination=self._combination, members=members_B)
        return target, features

    def close(self) -> None:
        """End the thread and let go of the windows."""
        self._loading.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the thread and what it has read."""
        return {**self.__dict__, "_loading": {}, "_pool": None, "_epoch": -1}

    def _ask(self, epoch: int, needed: range) -> None:
        if epoch != self._epoch:
            self._loading.clear()
            self._epoch = epoch
        for number in [number for number in self._loading if number not in needed]:
            del self._loading[number]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabel-labels")
        windows = self._order.windows(epoch)
        for number in needed:
            if number not in self._loading:
                samples = self._order.at(epoch, np.arange(windows[number], windows[number + 1]))
                rows = self._rows_of(epoch, np.sort(samples))
                # A window without labels still has to give filler.
                rows = rows[rows >= 0] if (rows >= 0).any() else np.zeros(1, np.int64)
                self._loading[number] = self._pool.submit(self._read, np.unique(rows))

    def _read(self, rows_R: Int64s) -> "_Window":
        """These rows, rising, piece by piece."""
        widths = {column.name: column for column in self._store.run.columns if column.name in self._names}
        columns = {name: np.empty((len(rows_R), one.width), one.numpy) for name, one in widths.items()}
        for piece in np.split(rows_R, np.flatnonzero(np.diff(rows_R) > _GAP) + 1):
            at = int(piece[0])
            for part in self._store.stream(self._names, start=at, stop=int(piece[-1]) + 1):
                begin, end = np.searchsorted(rows_R, (at, at + len(part)))
                for name, array in part.columns.items():
                    np.take(array, rows_R[begin:end] - at, axis=0, out=columns[name][begin:end])
                at += len(part)
        return _Window(rows=rows_R, columns=columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Window:
    """Rows of the store, rising, and their columns (R, W)."""

    rows: Int64s
    columns: dict[str, NDArray[Any]]


def _gather(parts: list[_Window], rows_B: Int64s) -> dict[str, NDArray[Any]]:
    rows_B = np.where(rows_B < 0, parts[0].rows[0], rows_B)
    found = {name: np.empty((len(rows_B), array.shape[1]), array.dtype) for name, array in parts[0].columns.items()}
    open_B = np.ones(len(rows_B), dtype=np.bool_)
    for part in parts:
        at_B = np.minimum(np.searchsorted(part.rows, rows_B), len(part.rows) - 1)
        here = open_B & (part.rows[at_B] == rows_B)
        for name, array in part.columns.items():
            if here.all():
                found[name] = array[at_B]
            else:
                found[name][here] = array[at_B[here]]
        open_B &= ~here
    assert not open_B.any(), "rows outside the windows of their batch"
    return found


def check_same_order(store: Store, rows_N: Int64s, name: str, key_at: Callable[[int], str | int]) -> None:
    """Labels can be read in step with the images only where both were written in one order.

    Args:
        rows_N: the rows of the samples in their order, -1 for none.
        name: of the source.
        key_at: position -> key, for the message.

    Raises:
        MismatchError: some sample's row lies before that of the sample before it.
    """
    places = np.flatnonzero(rows_N >= 0)
    falls = np.flatnonzero(np.diff(rows_N[places]) < 0)
    if len(falls):
        one, other = (key_at(int(places[place])) for place in (falls[0], falls[0] + 1))
        raise MismatchError(
            f"streaming: {name} has {one!r} before {other!r}, {store.url} has them the other way round; labels are "
            "streamed in the order in which they were written: train without streaming, or label this data again"
        )
