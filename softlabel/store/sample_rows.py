"""Read a few rows of a large store once, opening only their shards; `Store.take` loads or maps whole columns."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys, PickedKeys
from softlabel.store.formats.base import ShardRows
from softlabel.store.reader import Store
from softlabel.store.stored_rows import StoredRows
from softlabel.store.token_rows import add_counts


def sample_rows(store: Store, rows: Sequence[int] | npt.NDArray[np.int64], columns: Collection[str]) -> StoredRows:
    """Read rows like `Store.take`; each of their shards is opened once.

    Args:
        store: an open store.
        rows: int64 (B,), at least one, rising.
        columns: names from "key", "label", "content" and the encoding's columns.

    Raises:
        StoreCorruptError: a shard is missing or damaged.
    """
    rows_B, columns = np.asarray(rows, np.int64), add_counts(columns, store.run.columns)
    assert len(rows_B)
    assert (np.diff(rows_B) > 0).all()
    found: list[ShardRows] = []
    views: list[int] = []
    while len(found) < len(rows_B):
        first = int(rows_B[len(found)])
        for base, shard in store.open_shards(first, first + 1):
            stop = base + shard.identity.rows
            here = rows_B[len(found) :][rows_B[len(found) :] < stop] - base
            found += [shard.read(columns, row, row + 1) for row in here.tolist()]
            views += [shard.identity.view] * len(here)
    keys = [one.keys for one in found if one.keys is not None]
    labels = [one.labels for one in found if one.labels is not None]
    content = [one.content for one in found if one.content is not None]
    # Keys can be read even if the head is damaged.
    decodes = not {column.name for column in store.run.label_columns}.isdisjoint(columns)
    return StoredRows(
        run=store.run,
        views=np.array(views, np.int32),
        key_data=PickedKeys(Keys.join(keys)) if keys else None,
        label_data=np.concatenate(labels) if labels else None,
        content_data=np.concatenate(content) if content else None,
        columns={name: np.concatenate([one.columns[name] for one in found]) for name in found[0].columns},
        extra=store.extra if decodes else None,
    )
