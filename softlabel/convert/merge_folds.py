"""Merge the stores of cross-fitting, each labelled by the teacher that was not trained on its samples.

Legend: N samples, B rows.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys, PickedKeys
from softlabel.convert.answers import NUMBERS
from softlabel.convert.merge import compute_fingerprint, refuse_difference
from softlabel.convert.rewrite import RewriteSummary, open_whole, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError
from softlabel.store.fidelity import Fidelity
from softlabel.store.manifest import BadRow, DatasetInfo, Member, Run
from softlabel.store.origins import CROSSFIT
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows
from softlabel.store.token_rows import RowSpans, list_counts


class FoldedSamples(Samples):
    """The samples of the stores of several folds, in the order of the whole dataset.

    Args:
        stores: of fold 0, 1, ...; each has its samples in the order of the whole dataset.
        folds_N: fold of each sample of the whole dataset, int64 (N,).
    """

    def __init__(self, stores: Sequence[Store], folds_N: NDArray[np.int64]) -> None:
        super().__init__(stores)
        assert self.count == len(folds_N)
        self._folds_N = folds_N
        self._parts = [Samples([store]) for store in stores]
        self._places = [np.flatnonzero(folds_N == fold) for fold in range(len(stores))]

    def read(self, view: int, start: int, stop: int, *, columns: Sequence[str] | None = None) -> Iterator[StoredRows]:
        run = self.stores[0].run
        step = max(1, NUMBERS // (run.num_classes * run.members_stored))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            found: list[StoredRows] = []
            places: list[NDArray[np.int64]] = []
            for part, places_N, begin, end in self._overlapping(first, last):
                found += part.read(view, begin, end, columns=columns)
                bad = [row.index for row in part.bad(view, begin, end)]
                places.append(places_N[np.setdiff1d(np.arange(begin, end), bad)])
            if found:
                yield _take_rows(found, np.argsort(np.concatenate(places)))

    def bad(self, view: int, start: int, stop: int) -> list[BadRow]:
        found = [
            dataclasses.replace(row, index=int(places_N[row.index]))
            for part, places_N, begin, end in self._overlapping(start, stop)
            for row in part.bad(view, begin, end)
        ]
        return sorted(found, key=lambda row: row.index)

    def costs(self, view: int, start: int, stop: int) -> list[tuple[int, Fidelity | None]]:
        return [cost for part, _, begin, end in self._overlapping(start, stop) for cost in part.costs(view, begin, end)]

    def keys(self) -> Iterator[str]:
        keys = [part.keys() for part in self._parts]
        for fold in self._folds_N:
            yield next(keys[fold])

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[Samples, NDArray[np.int64], int, int]]:
        """Yield each fold's samples, their places in the whole, and which of them are samples `start` to `stop`."""
        for part, places_N in zip(self._parts, self._places, strict=True):
            begin, end = np.searchsorted(places_N, [start, stop]).tolist()
            if begin < end:
                yield part, places_N, begin, end


def merge_folds(
    stores: Sequence[str | Path],
    out: str | Path,
    *,
    folds_N: NDArray[np.int64],
    dataset: DatasetInfo,
    spec: str,
    recorded: Mapping[str, Any],
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> RewriteSummary:
    """Merge the stores of folds; labels do not change. The same call resumes an interrupted one.

    The merged store has one member, which stands for the teachers of all folds: its `sha256` is the SHA-256 of their
    hexadecimal hashes, joined in the order of the folds.

    Args:
        stores: folders of the finished stores of fold 0, 1, ..., alike but for their teachers and samples.
        out: folder of the new one.
        folds_N: fold of each sample of the whole dataset, int64 (N,).
        dataset: the whole dataset.
        spec: what the member is called.
        recorded: further content of the manifest.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the manifest under `recorded.options`.

    Raises:
        MismatchError: stores differ, or `out` holds another store.
        StoreError: a store cannot be read or written.
    """
    opened = [open_whole(store, of=CROSSFIT, out=out) for store in stores]
    hashes = "".join(store.run.members[0].sha256 for store in opened)
    sha256 = hashlib.sha256(hashes.encode()).hexdigest()
    runs = [_merged_run(store, dataset, spec, sha256) for store in opened]
    for store, run in zip(opened[1:], runs[1:], strict=True):
        refuse_difference(opened[0].url, runs[0], store.url, run)
    samples = FoldedSamples(opened, folds_N)
    if compute_fingerprint(samples) != dataset.fingerprint:
        raise MismatchError(
            f"{', '.join(store.url for store in opened)}: expected the folds of the data (fingerprint "
            f"{dataset.fingerprint}), found other samples; remove these stores and repeat the command"
        )
    return rewrite(
        samples,
        out,
        runs[0],
        None,
        command=CROSSFIT,
        truth="carried",
        progress=progress,
        recorded=recorded,
        options=options,
    )


def _merged_run(store: Store, dataset: DatasetInfo, spec: str, sha256: str) -> Run:
    member: Member = dataclasses.replace(store.run.members[0], spec=spec, sha256=sha256)
    return dataclasses.replace(store.run, members=(member,), dataset=dataset)


def _take_rows(parts: Sequence[StoredRows], order_B: NDArray[np.int64]) -> StoredRows:
    """Join rows and put them in another order; all columns were read."""
    run, count = parts[0].run, len(order_B)
    joined = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    spans = RowSpans.of(count, {name: joined[name] for name in list_counts(run.columns)})
    per = {column.name: column.per for column in run.columns}
    keys = []
    for part in parts:
        assert part.key_data is not None
        keys.append(part.key_data.get())
    return dataclasses.replace(
        parts[0],
        views=np.concatenate([part.views for part in parts])[order_B],
        key_data=PickedKeys(Keys.join(keys).take(order_B)),
        label_data=np.concatenate([part.labels for part in parts])[order_B],
        content_data=np.concatenate([part.content for part in parts])[order_B],
        columns={name: array[spans.numbers(per[name], order_B)] for name, array in joined.items()},
    )
