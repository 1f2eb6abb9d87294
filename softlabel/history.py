"""The order in which a store's samples were labelled, and how a dataset that has grown since is laid behind it.

A store that grew keeps its old shards: its dataset is the samples that it knew, in the order in which it knew them, and
then what the source has more, in the source's order. Students join by key and do not care.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from softlabel.dataset import Source, content_hash, known_first
from softlabel.errors import MismatchError, StoreNotFoundError
from softlabel.intake import Intake
from softlabel.store.folder import open_folder
from softlabel.store.listing import load_root
from softlabel.store.manifest import DatasetInfo, Extent, ViewPolicy
from softlabel.store.probe import probe
from softlabel.store.reader import Store, StoredRows, open_store
from softlabel.views import changed

_SHARDS, _ROWS = 64, 8  # how many shards a comparison looks into, and at how many rows of each
_FETCHED = 1 << 30  # bytes of a remote store that it may fetch for this


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a store knows of its dataset.

    Attributes:
        path: of the store.
        dataset: as its manifest has it.
        known: keys of all samples of the extents that are complete, in order, bad ones too.
        extents, views: as the run has them.
        complete: whether every row of the last one is there.
        grow: whether more samples than these may come.
    """

    path: str
    dataset: DatasetInfo
    known: tuple[str, ...]
    extents: tuple[Extent, ...]
    views: ViewPolicy
    complete: bool
    grow: bool = False

    @classmethod
    def of(cls, path: str | Path, *, grow: bool = False, views: int | None = None) -> Self | None:
        """The history of a store that has grown or shall grow; None where the source's own order is the store's.

        views: how many are wanted; absent: those that the store has.
        """
        try:
            manifest = load_root(open_folder(path))
        except StoreNotFoundError:
            return None
        run = manifest.run
        if not grow and not run.dataset.earlier and views in (None, run.views.count):
            return None
        with open_store(path, verify="none", allow_incomplete=True) as store:
            known = _known(store)
        return cls(
            path=str(path),
            dataset=run.dataset,
            known=known,
            extents=run.extents,
            views=run.views,
            complete=manifest.complete,
            grow=grow,
        )

    def arrange(self, source: Source, views: ViewPolicy) -> tuple[Source, tuple[Extent, ...]]:
        """The source in the store's order, and the extents before the last one of a run with these views.

        Raises:
            MismatchError: samples that the store knows are not in the source; the store has more views, or is not
                finished with those that it has.
        """
        now = self.extents[-1]
        assert now.views is not None
        more = views.count > now.views
        if views.count < now.views or (more and not self.complete):
            why = "not all there yet" if more else "of which none can be taken away"
            raise MismatchError(f"{self.path}: has {now.views} views of each sample, {why}; give --views {now.views}")
        arranged = known_first(source, self.known, where=self.path)
        grown = [*self.extents[:-1]]
        # Views of another kind are no growth; the store's own check says what differs.
        if more and (views.policy, views.seed) == (self.views.policy, self.views.seed):
            grown.append(now)
            now = dataclasses.replace(now, views=views.count)
        if self.grow and len(self.known) == self.dataset.rows and len(arranged) > self.dataset.rows:
            grown.append(now)
        return arranged, tuple(grown)


def recorded_there(path: str | Path) -> dict[str, Any]:
    """What the manifest of a store records beside its identity; empty where there is no store."""
    try:
        return dict(load_root(open_folder(path)).recorded)
    except StoreNotFoundError:
        return {}


def check_same_data(path: str | Path, intake: Intake) -> None:
    """Compare labelled samples with the source's, some of every part of the store: equal keys are not equal images.

    Raises:
        MismatchError: an image's bytes, hard label or view are not those that the store has.
    """
    source = intake.source
    with open_store(path, verify="none", allow_incomplete=True) as store:
        names = ["key", "label", "content", *(column.name for column in store.run.view_columns)]
        start = 0
        step = _step(store)
        for number, record in enumerate(store.shards):
            if record.rows and number % step == 0:
                bad = {row.index for row in record.bad}
                plan = store.run.shard(record.number)
                kept = [index for index in range(plan.start, plan.stop) if index not in bad]
                picked = np.unique(np.linspace(0, record.rows - 1, _ROWS).astype(np.int64))
                stored = probe(store, start + picked, names)
                for sample, key, label, content in zip(
                    source.read([kept[place] for place in picked.tolist()]),
                    stored.keys,
                    stored.labels.tolist(),
                    stored.content.tolist(),
                    strict=True,
                ):
                    now = content_hash(sample.image) if content else None
                    changed = now is not None and now != content
                    if sample.key != key or changed or sample.label != label:
                        what = "bytes" if changed else "hard label"
                        raise MismatchError(
                            f"{path}: dataset: the {what} of {key!r} in {source.name} are not what was labelled there; "
                            "give the data that it was made from, or another folder"
                        )
                if store.run.view_columns:
                    _check_same_view(store, stored, kept[picked[0]], intake)
            start += record.rows


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


def _check_same_view(store: Store, stored: StoredRows, index: int, intake: Intake) -> None:
    """The first of these rows, made again: rows to come must be views of the same kind."""
    made = intake.batch([index], view=int(stored.views[0])).columns
    for column in store.run.view_columns:
        if column.name not in made or not np.array_equal(made[column.name], stored.columns[column.name][:1]):
            raise MismatchError(
                f"{store.url}: the view of {stored.keys[0]!r} comes out otherwise now ({column.name} differs); "
                f"{changed(store.manifest.recorded.get('libraries'))}; go on with the libraries that began it, or "
                "choose another folder"
            )


def _known(store: Store) -> tuple[str, ...]:
    run = store.run
    last = len(run.dataset.earlier)
    complete = run.dataset.rows if store.manifest.complete else (run.dataset.earlier[-1].rows if last else 0)
    known: list[str | None] = [None] * complete
    start = 0
    for record in store.shards:
        plan = run.shard(record.number)
        if plan.view == 0 and plan.stop <= complete:
            bad = {row.index: row.key for row in record.bad}
            keys = iter(store.keys.slice(start, start + record.rows).to_list())
            for index in range(plan.start, plan.stop):
                known[index] = bad[index] if index in bad else next(keys)
        start += record.rows
    assert None not in known, "a complete extent has every sample"
    return tuple(key for key in known if key is not None)
