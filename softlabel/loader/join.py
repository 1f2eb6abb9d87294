"""Which row of a store belongs to which sample of a source: the join by key, done once for all samples.

Legend: N samples of the source, K samples that are kept.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.dataset import Source
from softlabel.errors import DataError, MismatchError, MissingKeyError
from softlabel.store.reader import Store

Missing = Literal["error", "skip", "hard-only"]
Int64s = NDArray[np.int64]

_CHUNK = 1 << 16  # keys handled at a time
_LISTED = 3  # keys that an error spells out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """The samples that stay.

    Attributes:
        samples: int64 (K,), their places in the source.
        skipped_bad: samples left out because the store lists them as bad.
        skipped_missing: samples left out because the store has no row for them.
    """

    samples: Int64s
    skipped_bad: int = 0
    skipped_missing: int = 0


def refuse_positions(store: Store) -> None:
    """Raise MismatchError for a store whose rows are documents with a label for each position."""
    if store.run.tokens is not None:
        raise MismatchError(
            f"{store.url}: has a label for every position of a document, expected one a sample; "
            "softlabel.loader.token_loader.TokenLoader joins documents"
        )


def read_keys(source: Source) -> Keys:
    """All keys of a source."""
    chunks = [source.key_table(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    return Keys.join(chunks)


def choose_kept(source: Source, store: Store, keys: Keys, rows_N: Int64s, missing: Missing) -> Kept:
    """Choose what becomes of samples without a row.

    Args:
        rows_N: the row of each sample, -1 for none.
        missing: ``error`` names such keys, ``skip`` leaves the samples out, ``hard-only`` keeps them. Samples that the
            store lists as bad are left out in any case.

    Raises:
        MissingKeyError: see `missing`.
        DataError: no sample is left.
    """
    absent = np.flatnonzero(rows_N < 0)
    if not len(absent):
        return Kept(samples=np.arange(len(keys)))
    bad = store.bad
    is_bad = np.array([key in bad for key in keys.take(absent).to_list()]) if bad else np.zeros(len(absent), bool)
    lost = absent[~is_bad]
    if len(lost) and missing == "error":
        named = ", ".join(repr(key) for key in keys.take(lost[:_LISTED]).to_list())
        more = f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
        raise MissingKeyError(
            f"{source.name}: {len(lost)} of {len(keys)} samples have no row in {store.path}: {named}{more}; "
            "label them ('softlabel generate'), or use --missing skip or --missing hard-only"
        )
    drop = absent if missing == "skip" else absent[is_bad]
    if len(drop) == len(keys):
        raise DataError(
            f"{source.name}: none of its {len(keys):,} samples is in the store; give the data that it was made from"
        )
    return Kept(
        samples=np.delete(np.arange(len(keys)), drop),
        skipped_bad=int(is_bad.sum()),
        skipped_missing=len(drop) - int(is_bad.sum()),
    )


def describe_changed(name: str, keys: list[str], changed: Int64s, store: Store) -> str:
    """The message about samples whose content is not what was labelled.

    Args:
        name: of the source.
        keys: of the samples that were compared.
        changed: which of them differ.
    """
    return (
        f"{name}: sample {keys[int(changed[0])]!r} is not the one that was labelled in {store.path} (its content, "
        f"xxh3-64, differs; {len(changed)} of {len(keys)} compared here); use the samples that were labelled, in their "
        "order where keys are numbers and without a random transform, or label these"
    )
