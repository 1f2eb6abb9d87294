"""The order in which a store's samples were labelled, and how a dataset that has grown since is laid behind it.

A store that grew keeps its old shards: its dataset is the samples that it knew, in the order in which it knew them, and
then what the source has more, in the source's order. Students join by key and do not care.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from softlabel.dataset import Source, content_hash, known_first
from softlabel.errors import MismatchError, StoreNotFoundError
from softlabel.store.manifest import DatasetInfo, Extent
from softlabel.store.reader import Store, open_store

_SHARDS, _ROWS = 64, 8  # how many shards a comparison looks into, and at how many rows of each


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a store knows of its dataset.

    Attributes:
        path: of the store.
        dataset: as its manifest has it.
        known: keys of all samples of the extents that are complete, in order, bad ones too.
        grow: whether more samples than these may come.
    """

    path: str
    dataset: DatasetInfo
    known: tuple[str, ...]
    grow: bool = False

    @classmethod
    def of(cls, path: str | Path, *, grow: bool = False) -> Self | None:
        """The history of a store that has grown or shall grow; None where the source's own order is the store's."""
        try:
            store = open_store(path, verify="none", allow_incomplete=True)
        except StoreNotFoundError:
            return None
        dataset = store.run.dataset
        if not grow and not dataset.earlier:
            return None
        return cls(path=str(path), dataset=dataset, known=_known(store), grow=grow)

    def arrange(self, source: Source) -> tuple[Source, tuple[Extent, ...]]:
        """The source in the store's order, and the extents before its last one.

        Raises:
            MismatchError: samples that the store knows are not in the source.
        """
        arranged = known_first(source, self.known, where=self.path)
        if len(self.known) == self.dataset.rows and len(arranged) > self.dataset.rows and self.grow:
            grown = Extent(rows=self.dataset.rows, fingerprint=self.dataset.fingerprint)
            return arranged, (*self.dataset.earlier, grown)
        return arranged, self.dataset.earlier


def check_same_data(path: str | Path, source: Source) -> None:
    """Compare labelled samples with the source's, some of every part of the store: equal keys are not equal images.

    Raises:
        MismatchError: an image's bytes or hard label are not those that the store has.
    """
    with open_store(path, verify="none", allow_incomplete=True) as store:
        start = 0
        step = -(-len(store.shards) // _SHARDS)
        for number, record in enumerate(store.shards):
            if record.rows and number % step == 0:
                bad = {row.index for row in record.bad}
                plan = store.run.shard(record.number)
                kept = [index for index in range(plan.start, plan.stop) if index not in bad]
                picked = np.unique(np.linspace(0, record.rows - 1, _ROWS).astype(np.int64))
                stored = store.take(start + picked)
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
            start += record.rows


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
