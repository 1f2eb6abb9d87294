"""The order of a store's samples, and how new samples of a grown dataset are appended.

A store that grows keeps its shards: its dataset is the known samples in their known order, then the new ones in the
source's order. Students join by key, so the order does not matter to them.
"""

import dataclasses
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from softlabel.common.multi_hot import to_multi_hot
from softlabel.dataset import ReorderedSource, Source
from softlabel.errors import MismatchError, StoreCorruptError
from softlabel.generation.input_reader import InputReader
from softlabel.inputs.content import changed_content, hashes_of, why_not_comparable
from softlabel.store.manifest import DatasetInfo, Extent
from softlabel.store.manifest_read import find_root
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows
from softlabel.store.storage.open import open_folder
from softlabel.store.stored_rows import StoredRows
from softlabel.store.view_columns import ViewPolicy
from softlabel.views import changed

log = logging.getLogger("softlabel")

GROWN = "grown"  # name in `manifest.recorded` of the samples that each growth added
_RUNS = 200_000  # maximal number of runs to record: about 1 MB of JSON
_SHARDS, _ROWS = 64, 8  # shards and rows of each that are compared with the source
_FETCHED = 1 << 30  # bytes of a remote store to fetch for this


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A store's record of its dataset.

    Attributes:
        path: of the store.
        dataset, extents, views: as in the run.
        complete: whether every shard is recorded.
        grown: fingerprint of each dataset that the store grew to -> which samples were new; see `new_runs`.
        grow: whether the dataset may have more samples.
        damaged: numbers of damaged shards; None if the store is not being repaired.
    """

    path: str
    dataset: DatasetInfo
    extents: tuple[Extent, ...]
    views: ViewPolicy
    complete: bool
    grown: Mapping[str, Sequence[int]]
    grow: bool = False
    damaged: frozenset[int] | None = None

    @classmethod
    def of(
        cls, path: str | Path, *, grow: bool = False, views: int | None = None, damaged: Collection[int] | None = None
    ) -> Self | None:
        """Load the history of a store that has grown or will grow.

        Args:
            path: the store.
            grow: whether it may get more samples.
            views: requested number of views; None: as in the store.
            damaged: shards to repair.

        Returns:
            None if the store has the source's order.
        """
        if (manifest := find_root(open_folder(path))) is None:
            return None
        run = manifest.run
        if not grow and not run.dataset.earlier and views in (None, run.views.count):
            return None
        return cls(
            path=str(path),
            dataset=run.dataset,
            extents=run.extents,
            views=run.views,
            complete=manifest.complete,
            grown=found if isinstance(found := manifest.recorded.get(GROWN), Mapping) else {},
            grow=grow,
            damaged=None if damaged is None else frozenset(damaged),
        )

    def arrange(self, source: Source, views: ViewPolicy) -> tuple[Source, tuple[Extent, ...]]:
        """Return the source in the store's order, and the earlier extents of a run with these views.

        Raises:
            MismatchError: samples of the store are missing in the source; the store has more views, or is not
                finished.
            StoreCorruptError: only damaged shards have the order.
        """
        now = self.extents[-1]
        assert now.views is not None
        more = views.count > now.views
        if views.count < now.views or (more and not self.complete):
            why = "which are not finished" if more else "which cannot be removed"
            raise MismatchError(f"{self.path}: has {now.views} views of each sample, {why}; give --views {now.views}")
        arranged = self._order_like_store(source)
        grown = [*self.extents[:-1]]
        # Other views are not a growth; the store reports the difference.
        if more and (views.policy, views.seed) == (self.views.policy, self.views.seed):
            grown.append(now)
            now = dataclasses.replace(now, views=views.count)
        if self.grow and self.complete and len(arranged) > self.dataset.rows:
            grown.append(now)
        return arranged, tuple(grown)

    def _order_like_store(self, source: Source) -> Source:
        """Return the source in the store's order, new samples last; reads shards only if needed: they may be lost."""
        rows = self.dataset.rows
        if len(source) >= rows and source.digest(0, rows) == self.dataset.fingerprint:
            return source
        if len(source) == rows and (order_N := self._find_grown_order()) is not None:
            again: Source = ReorderedSource(source, order_N)
            if self._matches(again):
                return again
        position = {key: index for index, key in enumerate(source.keys())}
        with open_store(self.path, verify="none", allow_incomplete=True) as store:
            sure, uncertain = _read_stored_keys(store, self.damaged or frozenset())
        guessed = [a if a is not None else b for a, b in zip(sure, uncertain, strict=True)]
        named = [key for key in guessed if key is not None]
        # Keys of damaged shards are right if they match the fingerprint: most damage is in the logits.
        if guessed != sure and len(set(named)) == len(named) and all(key in position for key in named):
            again = self._fill_order(source, guessed, position)
            if self._matches(again):
                return again
        return self._fill_order(source, sure, position)

    def _matches(self, source: Source) -> bool:
        return len(source) == self.dataset.rows and source.digest(0, len(source)) == self.dataset.fingerprint

    def _find_grown_order(self) -> NDArray[np.int64] | None:
        """Return the recorded order as indices into a source of unchanged order; None if it was not recorded."""
        left_N, behind = np.arange(self.dataset.rows, dtype=np.int64), []
        for before, after in reversed(list(itertools.pairwise(self._list_sample_extents()))):
            counts = self.grown.get(after.fingerprint, ())
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                return None
            if sum(counts) != after.rows or sum(counts[1::2]) != after.rows - before.rows:
                return None
            new_N = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
            behind.append(left_N[new_N])
            left_N = left_N[~new_N]
        return np.concatenate([left_N, *reversed(behind)])

    def _list_sample_extents(self) -> list[Extent]:
        """Return the extents that differ in their samples."""
        return [next(group) for _, group in itertools.groupby(self.extents, key=lambda extent: extent.rows)]

    def _fill_order(self, source: Source, known: Sequence[str | None], position: Mapping[str, int]) -> Source:
        """Return the source in the order of known keys; samples without a readable key follow the source's order."""
        named = [key for key in known if key is not None]
        if absent := [key for key in named if key not in position]:
            listed = ", ".join(repr(key) for key in absent[:3])
            raise MismatchError(
                f"{source.name}: {len(absent)} of the {len(named)} samples of {self.path} are missing: {listed}; give "
                "the data that was labelled, grown or unchanged"
            )
        order_N = np.array([-1 if key is None else position[key] for key in known], np.int64)
        holes = np.flatnonzero(order_N < 0)
        free = np.setdiff1d(np.arange(len(source), dtype=np.int64), order_N)
        if len(holes) and self.complete and self.damaged is None:
            raise StoreCorruptError(
                f"{self.path}: only missing or damaged shards have {len(holes)} samples; run "
                f"'softlabel repair {self.path}' first"
            )
        if len(free) < len(holes):
            raise MismatchError(
                f"{source.name}: expected at least the {self.dataset.rows} samples of {self.path}, found "
                f"{len(source)}; give the data that was labelled, grown or unchanged"
            )
        growths = {int(one) for one in np.digitize(holes, [extent.rows for extent in self._list_sample_extents()])}
        if len(growths) > 1:
            raise StoreCorruptError(
                f"{self.path}: shards of several growths are missing, and the samples of {source.name} in each are not "
                "recorded; label the data again, into another folder"
            )
        order_N[holes] = free[: len(holes)]
        order_N = np.concatenate([order_N, free[len(holes) :]])
        return source if np.array_equal(order_N, np.arange(len(source))) else ReorderedSource(source, order_N)


def new_runs(source: Source, known: int) -> list[int] | None:
    """Find which samples were appended after the first `known` of a store's order.

    Returns:
        Lengths of alternating runs of known and new samples in the source's order, from which the store's order can be
        restored without shards; None if there are too many to record.
    """
    order_N = source.order_N if isinstance(source, ReorderedSource) else np.arange(len(source), dtype=np.int64)
    new_N = np.zeros(len(order_N) + 1, np.bool_)  # begins with a known one, so that the first run is of known samples
    new_N[1 + order_N[known:]] = True
    edges = np.flatnonzero(np.diff(new_N)) if len(order_N) else np.zeros(0, np.int64)
    counts: list[int] = np.diff([0, *edges.tolist(), len(order_N)]).tolist()
    return counts if len(counts) <= _RUNS else None


def check_same_data(path: str | Path, reader: InputReader, *, without: Collection[int] = ()) -> None:
    """Compare samples from all parts of a store with the source: images may change while keys stay.

    Args:
        path: the store.
        reader: reads the source.
        without: numbers of shards that cannot be read.

    Raises:
        MismatchError: the content, hard label or view of an image differs.
    """
    source = reader.source
    with open_store(path, verify="none", allow_incomplete=True) as store:
        names = ["key", "label", "content", *(column.name for column in store.run.sample_columns)]
        start = 0
        step, unknown = _choose_step(store), None
        for number, record in enumerate(store.shards):
            if record.rows and number % step == 0 and record.number not in without:
                bad = {row.index for row in record.bad}
                plan = store.run.shard(record.number)
                kept = [index for index in range(plan.start, plan.stop) if index not in bad]
                picked = np.unique(np.linspace(0, record.rows - 1, _ROWS).astype(np.int64))
                stored = sample_rows(store, start + picked, names)
                samples = source.read([kept[place] for place in picked.tolist()])
                hashes = hashes_of([sample.raw for sample in samples], source.inputs.content_hash)
                changed_B = changed_content(hashes, stored.content)
                unknown = unknown or why_not_comparable(hashes, stored.content)
                for sample, key, label, changed in zip(
                    samples, stored.keys, stored.hard_labels, changed_B.tolist(), strict=True
                ):
                    if sample.key != key or changed or _differ(sample.label, label):
                        what = "content" if changed else "hard label"
                        raise MismatchError(
                            f"{path}: dataset: the {what} of {key!r} in {source.name} differs from what was labelled; "
                            "give the data that was labelled, or another folder"
                        )
                if store.run.view_columns:
                    _check_same_view(store, stored, kept[picked[0]], reader)
            start += record.rows
    if unknown is not None:
        log.warning(
            "warning: %s: samples of %s cannot be compared with the labelled ones (%s); keys and hard labels agree",
            path,
            source.name,
            unknown,
        )


def _differ(label: int | NDArray[np.int8], stored: Any) -> bool:
    """Return whether a source's hard label differs from the store's, a number or int8 (C,)."""
    if np.ndim(stored) == 0:
        return not np.array_equal(label, stored)
    now = label[None] if isinstance(label, np.ndarray) else np.array([label])
    return not np.array_equal(to_multi_hot(now, len(stored))[0], stored)


def _choose_step(store: Store) -> int:
    """Return the step between shards to read: `_SHARDS` in all, fewer of a remote store, to bound the bytes fetched."""
    if not store.shards:
        return 1
    count = _SHARDS
    if "://" in store.url:
        largest = max(record.bytes for record in store.shards)
        count = max(1, min(count, _FETCHED // max(1, largest)))
    return -(-len(store.shards) // count)


def _check_same_view(store: Store, stored: StoredRows, index: int, reader: InputReader) -> None:
    """Raise MismatchError if the first row's view cannot be reproduced: new rows would get other views."""
    made = reader.batch([index], view=int(stored.views[0])).columns
    for column in store.run.view_columns:
        if column.name not in made or not np.array_equal(made[column.name], stored.columns[column.name][:1]):
            raise MismatchError(
                f"{store.url}: the view of {stored.keys[0]!r} cannot be reproduced ({column.name} differs); "
                f"{changed(store.manifest.recorded.get('libraries'))}; use the libraries that began the store, or "
                "choose another folder"
            )


def _read_stored_keys(store: Store, damaged: Collection[int]) -> tuple[list[str | None], list[str | None]]:
    """Return the keys of all samples from intact shards, and the others from damaged ones; None if unknown."""
    run = store.run
    sure: list[str | None] = [None] * run.dataset.rows
    uncertain: list[str | None] = [None] * run.dataset.rows
    start = 0
    for record in store.shards:
        plan = run.shard(record.number)
        into = uncertain if record.number in damaged else sure
        if None in into[plan.start : plan.stop]:  # views of the same samples have the same keys
            bad = {row.index: row.key for row in record.bad}
            for index, key in bad.items():
                sure[index] = key
            good = [index for index in range(plan.start, plan.stop) if index not in bad]
            for index, key in zip(good, _read_shard_keys(store, start), strict=False):
                into[index] = key
        start += record.rows
    return sure, [None if known is not None else key for known, key in zip(sure, uncertain, strict=True)]


def _read_shard_keys(store: Store, row: int) -> list[str]:
    """Return the keys of the shard that begins with a row of the store; empty if it cannot be read."""
    try:
        for _, shard in store.open_shards(row, row + 1):
            keys = shard.read(["key"], 0, shard.identity.rows).keys
            assert keys is not None
            return keys.check().to_list()
    except (StoreCorruptError, ValueError):
        pass
    return []
