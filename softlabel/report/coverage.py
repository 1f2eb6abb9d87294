"""What has labels, and which samples are the same. Legend: N samples, R rows of a block, C classes."""

import numpy as np
from numpy.typing import NDArray

from softlabel.report.examples import ExampleReader
from softlabel.report.figures import Coverage, Duplicates
from softlabel.report.store_pass import Block
from softlabel.store.reader import Store

BAD_LISTED, GROUPS_LISTED, OF_A_GROUP = 100, 30, 8


class CoverageMeter:
    """Content hashes and hard labels of the samples, from view 0; see `Meter`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows_V = np.zeros(store.run.views.count, np.int64)
        self._with_label = 0
        self.non_finite = 0  # rows
        self._samples_C = np.zeros(store.run.num_classes, np.int64)
        self._rows: list[NDArray[np.int64]] = []  # of those with a hash
        self._content: list[NDArray[np.uint64]] = []
        self._labels: list[NDArray[np.int64]] = []  # equal numbers for equal labels, negative for none
        # Of several labels a sum of these stands for the set; others have the same by a chance of 2 ** -62.
        self._mix_C = np.random.default_rng(0).integers(1, 1 << 62, store.run.num_classes, dtype=np.int64)

    def add(self, block: Block) -> None:
        self._rows_V[block.view] += len(block)
        if block.judged is not None:
            self.non_finite += int(np.isnan(block.judged.p_top).sum())
        elif block.sigmoids is not None:
            self.non_finite += block.sigmoids.non_finite
        if block.view:
            return
        if block.labels.ndim == 1:
            labels_R = block.labels.astype(np.int64)
            self._samples_C += np.bincount(labels_R[labels_R >= 0], minlength=len(self._samples_C))
        else:
            self._samples_C += (block.labels == 1).sum(axis=0)
            labels_R = self._number(block.labels)
        self._with_label += int((labels_R >= 0).sum())
        hashed_R = block.content != 0
        self._rows.append(block.rows[hashed_R])
        self._content.append(block.content[hashed_R])
        self._labels.append(labels_R[hashed_R])

    def _number(self, labels_RC: NDArray[np.integer]) -> NDArray[np.int64]:
        """A number for each set of labels, which takes less memory than the set."""
        found_R = (labels_RC.astype(np.int64) @ self._mix_C) & np.int64((1 << 62) - 1)
        return np.where((labels_RC >= 0).any(axis=1), found_R, -1)

    def result(self, examples: ExampleReader) -> Coverage:
        run, bad = self._store.run, self._store.bad
        return Coverage(
            samples=run.dataset.rows,
            with_hard_label=self._with_label,
            class_samples=tuple(self._samples_C.tolist()),
            bad_count=len(bad),
            bad=tuple(list(bad.items())[:BAD_LISTED]),
            missing=max(0, run.dataset.rows - len(bad) - int(self._rows_V.min())),
            non_finite=self.non_finite,
            duplicates=self._find_duplicates(examples),
        )

    def _find_duplicates(self, examples: ExampleReader) -> Duplicates:
        none = np.zeros(0, np.int64)
        content = np.concatenate([np.zeros(0, np.uint64), *self._content])
        members, sizes = find_equal(content)
        rows = np.concatenate([none, *self._rows])[members]
        labels = np.concatenate([none, *self._labels])[members]
        firsts = np.cumsum(sizes) - sizes
        conflicting = np.zeros(len(sizes), np.bool_)
        if len(sizes):
            # An unlabelled sample contradicts no label.
            lowest = np.minimum.reduceat(np.where(labels >= 0, labels, np.iinfo(np.int64).max), firsts)
            conflicting = np.maximum.reduceat(labels, firsts) > lowest
        shown = np.lexsort((rows[firsts] if len(firsts) else firsts, ~conflicting))[:GROUPS_LISTED]
        groups = [rows[firsts[group] : firsts[group] + min(sizes[group], OF_A_GROUP)].tolist() for group in shown]
        listed = [row for group in groups for row in group]
        made = iter(examples.read(listed, scores=[0.0] * len(listed)))
        return Duplicates(
            groups=len(sizes),
            samples=int(sizes.sum()),
            conflicting=int(conflicting.sum()),
            compared=len(content),
            examples=tuple(tuple(next(made) for _ in group) for group in groups),
        )


def find_equal(content_N: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups of two and more equal hashes.

    Returns:
        Positions of their members, group after group, rising in each, int64; and how many each group has, int64.
    """
    order = np.argsort(content_N, kind="stable")
    sorted_N = content_N[order]
    starts = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]][: len(content_N)])
    sizes = np.diff(np.r_[starts, len(content_N)])
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    members = np.repeat(starts, sizes) + np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[members], sizes
