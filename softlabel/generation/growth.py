"""The order in which a store's samples were labelled, and how a dataset that has grown since is laid behind it.

A store that grew keeps its old shards: its dataset is the samples that it knew, in the order in which it knew them, and
then what the source has more, in the source's order. Students join by key and do not care.
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

from softlabel.dataset import ReorderedSource, Source
from softlabel.errors import MismatchError, StoreCorruptError, StoreNotFoundError
from softlabel.generation.input_reader import InputReader
from softlabel.inputs.content import changed_content, hashes_of, why_not_comparable
from softlabel.store.manifest import DatasetInfo, Extent, ViewPolicy
from softlabel.store.manifest_read import load_root
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows
from softlabel.store.storage.open import open_folder
from softlabel.store.stored_rows import StoredRows
from softlabel.views import changed

log = logging.getLogger("softlabel")

GROWN = "grown"  # what `manifest.recorded` calls the samples that came with each growth
_RUNS = 200_000  # of known and new samples in turn: about 1 MB of JSON
_SHARDS, _ROWS = 64, 8  # how many shards a comparison looks into, and at how many rows of each
_FETCHED = 1 << 30  # bytes of a remote store that it may fetch for this


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a store knows of its dataset.

    Attributes:
        path: of the store.
        dataset: as its manifest has it.
        extents, views: as the run has them.
        complete: whether every shard is recorded.
        grown: for the fingerprint of every dataset that the store grew to, which samples were new; see `new_runs`.
        grow: whether more samples than these may come.
        damaged: numbers of shards whose bytes are not to be trusted; None where the store is not being repaired.
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
        cls,
        path: str | Path,
        *,
        grow: bool = False,
        views: int | None = None,
        damaged: Collection[int] | None = None,
    ) -> Self | None:
        """The history of a store that has grown or shall grow; None where the source's own order is the store's.

        views: how many are wanted; absent: those that the store has. damaged: shards that a repair is to replace.
        """
        try:
            manifest = load_root(open_folder(path))
        except StoreNotFoundError:
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
        """The source in the store's order, and the extents before the last one of a run with these views.

        Raises:
            MismatchError: samples that the store knows are not in the source; the store has more views, or is not
                finished with those that it has.
            StoreCorruptError: the order is known to damaged shards alone.
        """
        now = self.extents[-1]
        assert now.views is not None
        more = views.count > now.views
        if views.count < now.views or (more and not self.complete):
            why = "not all there yet" if more else "of which none can be taken away"
            raise MismatchError(f"{self.path}: has {now.views} views of each sample, {why}; give --views {now.views}")
        arranged = self._in_order(source)
        grown = [*self.extents[:-1]]
        # Views of another kind are no growth; the store's own check says what differs.
        if more and (views.policy, views.seed) == (self.views.policy, self.views.seed):
            grown.append(now)
            now = dataclasses.replace(now, views=views.count)
        if self.grow and self.complete and len(arranged) > self.dataset.rows:
            grown.append(now)
        return arranged, tuple(grown)

    def _in_order(self, source: Source) -> Source:
        """The source in the store's order, samples that are new to it last. What does not need the shards is tried
        first: a store is also repaired, and its shards are what is missing then."""
        rows = self.dataset.rows
        if len(source) >= rows and source.digest(0, rows) == self.dataset.fingerprint:
            return source
        if len(source) == rows and (order_N := self._grown_order()) is not None:
            again: Source = ReorderedSource(source, order_N)
            if self._matches(again):
                return again
        position = {key: index for index, key in enumerate(source.keys())}
        with open_store(self.path, verify="none", allow_incomplete=True) as store:
            sure, doubtful = _stored_keys(store, self.damaged or frozenset())
        guessed = [a if a is not None else b for a, b in zip(sure, doubtful, strict=True)]
        named = [key for key in guessed if key is not None]
        # Most damage is in the logits. Keys that fit the fingerprint are the right ones, wherever they come from.
        if guessed != sure and len(set(named)) == len(named) and all(key in position for key in named):
            again = self._filled(source, guessed, position)
            if self._matches(again):
                return again
        return self._filled(source, sure, position)

    def _matches(self, source: Source) -> bool:
        return len(source) == self.dataset.rows and source.digest(0, len(source)) == self.dataset.fingerprint

    def _grown_order(self) -> NDArray[np.int64] | None:
        """The store's order as indices into a source that has kept its own; None where it was not recorded."""
        left_N, behind = np.arange(self.dataset.rows, dtype=np.int64), []
        for before, after in reversed(list(itertools.pairwise(self._sample_extents()))):
            counts = self.grown.get(after.fingerprint, ())
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                return None
            if sum(counts) != after.rows or sum(counts[1::2]) != after.rows - before.rows:
                return None
            new_N = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
            behind.append(left_N[new_N])
            left_N = left_N[~new_N]
        return np.concatenate([left_N, *reversed(behind)])

    def _sample_extents(self) -> list[Extent]:
        """Those that differ in their samples."""
        return [next(group) for _, group in itertools.groupby(self.extents, key=lambda extent: extent.rows)]

    def _filled(self, source: Source, known: Sequence[str | None], position: Mapping[str, int]) -> Source:
        """The source with its samples where the store has them; what no readable shard tells, in the source's order."""
        named = [key for key in known if key is not None]
        if absent := [key for key in named if key not in position]:
            listed = ", ".join(repr(key) for key in absent[:3])
            raise MismatchError(
                f"{source.name}: {len(absent)} of the {len(named)} samples that {self.path} was made from are not "
                f"there: {listed}; give the data that was labelled, grown or as it was"
            )
        order_N = np.array([-1 if key is None else position[key] for key in known], np.int64)
        holes = np.flatnonzero(order_N < 0)
        free = np.setdiff1d(np.arange(len(source), dtype=np.int64), order_N)
        if len(holes) and self.complete and self.damaged is None:
            raise StoreCorruptError(
                f"{self.path}: {len(holes)} samples are known to missing or damaged shards alone; run "
                f"'softlabel repair {self.path}' first"
            )
        if len(free) < len(holes):
            raise MismatchError(
                f"{self.path}: {source.name} has {len(source)} samples, was made from {self.dataset.rows}; give the "
                "data that was labelled, grown or as it was"
            )
        growths = {int(one) for one in np.digitize(holes, [extent.rows for extent in self._sample_extents()])}
        if len(growths) > 1:
            raise StoreCorruptError(
                f"{self.path}: shards of several growths are missing, and nothing recorded says which samples of "
                f"{source.name} came with which of them; label the data again, into another folder"
            )
        order_N[holes] = free[: len(holes)]
        order_N = np.concatenate([order_N, free[len(holes) :]])
        return source if np.array_equal(order_N, np.arange(len(source))) else ReorderedSource(source, order_N)


def new_runs(source: Source, known: int) -> list[int] | None:
    """Which samples of a source in a store's order came behind the first `known`, in the source's own order.

    Returns:
        Lengths of runs: so many samples that were known, so many that are new, so many that were known, and so on, by
        which the order is found again without the shards; None where the list would not fit into a manifest.
    """
    order_N = source.order_N if isinstance(source, ReorderedSource) else np.arange(len(source), dtype=np.int64)
    new_N = np.zeros(len(order_N) + 1, np.bool_)  # it begins with one that is not new, which is taken away again
    new_N[1 + order_N[known:]] = True
    edges = np.flatnonzero(np.diff(new_N)) if len(order_N) else np.zeros(0, np.int64)
    counts: list[int] = np.diff([0, *edges.tolist(), len(order_N)]).tolist()
    return counts if len(counts) <= _RUNS else None


def recorded_there(path: str | Path) -> dict[str, Any]:
    """What the manifest of a store records beside its identity; empty where there is no store."""
    try:
        return dict(load_root(open_folder(path)).recorded)
    except StoreNotFoundError:
        return {}


def check_same_data(path: str | Path, reader: InputReader, *, without: Collection[int] = ()) -> None:
    """Compare labelled samples with the source's, some of every part of the store: equal keys are not equal images.

    Args:
        path: the store.
        reader: reads the source.
        without: numbers of shards that cannot be read.

    Raises:
        MismatchError: an image's content, hard label or view are not those that the store has.
    """
    source = reader.source
    with open_store(path, verify="none", allow_incomplete=True) as store:
        names = ["key", "label", "content", *(column.name for column in store.run.view_columns)]
        start = 0
        step, unknown = _step(store), None
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
                    samples, stored.keys, stored.labels.tolist(), changed_B.tolist(), strict=True
                ):
                    if sample.key != key or changed or sample.label != label:
                        what = "content" if changed else "hard label"
                        raise MismatchError(
                            f"{path}: dataset: the {what} of {key!r} in {source.name} is not what was labelled there; "
                            "give the data that it was made from, or another folder"
                        )
                if store.run.view_columns:
                    _check_same_view(store, stored, kept[picked[0]], reader)
            start += record.rows
    if unknown is not None:
        log.warning(
            "warning: %s: images of %s cannot be compared with those that were labelled there (%s); keys and hard "
            "labels agree",
            path,
            source.name,
            unknown,
        )


def _step(store: Store) -> int:
    """Every how many shards one is looked into: of `_SHARDS` of them, or of as few as `_FETCHED` bytes of a store
    behind a URL, whose shards arrive whole."""
    if not store.shards:
        return 1
    count = _SHARDS
    if "://" in store.url:
        largest = max(record.bytes for record in store.shards)
        count = max(1, min(count, _FETCHED // max(1, largest)))
    return -(-len(store.shards) // count)


def _check_same_view(store: Store, stored: StoredRows, index: int, reader: InputReader) -> None:
    """The first of these rows, made again: rows to come must be views of the same kind."""
    made = reader.batch([index], view=int(stored.views[0])).columns
    for column in store.run.view_columns:
        if column.name not in made or not np.array_equal(made[column.name], stored.columns[column.name][:1]):
            raise MismatchError(
                f"{store.url}: the view of {stored.keys[0]!r} comes out otherwise now ({column.name} differs); "
                f"{changed(store.manifest.recorded.get('libraries'))}; go on with the libraries that began it, or "
                "choose another folder"
            )


def _stored_keys(store: Store, damaged: Collection[int]) -> tuple[list[str | None], list[str | None]]:
    """The key of every sample, bad ones too, and None where no shard tells it: as whole shards have them, and as
    damaged ones have the others."""
    run = store.run
    sure: list[str | None] = [None] * run.dataset.rows
    doubtful: list[str | None] = [None] * run.dataset.rows
    start = 0
    for record in store.shards:
        plan = run.shard(record.number)
        into = doubtful if record.number in damaged else sure
        if None in into[plan.start : plan.stop]:  # views of the same samples have the same keys
            bad = {row.index: row.key for row in record.bad}
            for index, key in bad.items():
                sure[index] = key
            good = [index for index in range(plan.start, plan.stop) if index not in bad]
            for index, key in zip(good, _shard_keys(store, start), strict=False):
                into[index] = key
        start += record.rows
    return sure, [None if known is not None else key for known, key in zip(sure, doubtful, strict=True)]


def _shard_keys(store: Store, row: int) -> list[str]:
    """The keys of the shard that begins with a row of the store; none where it cannot be read."""
    try:
        for _, shard in store.open_shards(row, row + 1):
            keys = shard.read(["key"], 0, shard.identity.rows).keys
            assert keys is not None
            return keys.check().to_list()
    except (StoreCorruptError, ValueError):
        pass
    return []
