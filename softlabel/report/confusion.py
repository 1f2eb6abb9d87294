"""Which classes the teachers mix up, and which are alike.

Legend: S rows of the sample, R rows of a part, C classes.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softlabel.report.figures import Absent, Confusion
from softlabel.report.store_pass import RowSample

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
MATRIX, TREE, PAIRS = 50, 200, 50  # classes of a matrix, classes of a dendrogram, pairs of a list


def measure_confusion(sample: RowSample) -> Confusion | Absent:
    """Measure the rows of a sample at the store's temperature."""
    classes = sample.reader.run.num_classes
    if classes < 2:
        return Absent(reason="the store has a single class, which cannot be mixed up with another")
    by, rows_P, class_P = _group(sample)
    if not len(rows_P):
        return Absent(reason="no row of the store belongs to a class, so that classes cannot be compared")
    order = np.lexsort((rows_P, class_P))
    means_CC = np.zeros((classes, classes)) if classes <= TREE else None
    listed: list[tuple[float, int, int]] = []
    for one, mean_C in _iter_means(sample, rows_P[order], class_P[order]):
        if means_CC is not None:
            means_CC[one] = mean_C
        others_C = mean_C.copy()
        others_C[one] = -1.0
        largest = np.lexsort((np.arange(classes), -others_C))[: min(PAIRS, classes - 1)]
        listed += [(-float(others_C[other]), one, int(other)) for other in largest if others_C[other] > 0]
        listed = sorted(listed)[:PAIRS]
    return Confusion(
        matrix=None if means_CC is None or classes > MATRIX else tuple(tuple(row) for row in means_CC.tolist()),
        pairs=tuple((one, other, -less) for less, one, other in listed),
        merges=() if means_CC is None else link(_compute_distances(means_CC)),
        by=by,
    )


def _group(sample: RowSample) -> tuple[Literal["label", "prediction"], I64, I64]:
    """Pairs of a position in the sample and a class that it belongs to, (P,) each."""
    labels = sample.labels
    if labels.ndim == 1 and (labels >= 0).any():
        rows = np.flatnonzero(labels >= 0)
        return "label", rows, labels[rows].astype(np.int64)
    if labels.ndim == 2 and (labels == 1).any():
        rows, classes = np.nonzero(labels == 1)
        return "label", rows, classes
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for part, columns in sample.parts():
        p_RC = sample.reader.read_probabilities(columns, sample.reader.judged).numpy()
        if labels.ndim == 2:
            rows, classes = np.nonzero(p_RC > 0.5)
            found.append((part[rows], classes))
        else:
            found.append((part, p_RC.argmax(axis=1)))
    rows, classes = (np.concatenate(column) for column in zip(*found, strict=True))
    return "prediction", rows, classes


def _iter_means(sample: RowSample, rows_P: I64, class_P: I64) -> Iterator[tuple[int, F64]]:
    """Yield (class, mean probabilities (C,)) of pairs in the order of the classes."""
    reader = sample.reader
    counts_C = np.bincount(class_P, minlength=reader.run.num_classes)
    current, sum_C = -1, np.zeros(reader.run.num_classes)
    done = 0
    for part, columns in sample.parts(rows_P):
        here_R = class_P[done : done + len(part)]
        done += len(part)
        p_RC = reader.read_probabilities(columns, reader.run.temperature).numpy()
        starts = np.flatnonzero(np.r_[True, here_R[1:] != here_R[:-1]])
        sums = np.add.reduceat(p_RC, starts, axis=0, dtype=np.float64)
        for one, of_part_C in zip(here_R[starts].tolist(), sums, strict=True):
            if one != current:
                if current >= 0:
                    yield current, sum_C / counts_C[current]
                current, sum_C = one, np.zeros_like(sum_C)
            sum_C += of_part_C
    yield current, sum_C / counts_C[current]


def _compute_distances(means_CC: F64) -> F64:
    """1 - cosine of each two rows, (C, C); a row of zeros has distance 1 from all."""
    norms_C1 = np.linalg.norm(means_CC, axis=1, keepdims=True)
    unit_CC = means_CC / np.where(norms_C1 > 0, norms_C1, 1.0)
    found: F64 = np.clip(1.0 - unit_CC @ unit_CC.T, 0.0, 2.0)
    return found


def link(distances_CC: F64) -> tuple[tuple[int, int, float, int], ...]:
    """Average linkage (UPGMA), in the form of SciPy's `linkage(..., "average")`: merges by rising distance.

    Args:
        distances_CC: symmetric.

    Returns:
        C - 1 times (cluster, cluster, distance, size); the merge k makes cluster C + k.
    """
    count = len(distances_CC)
    left = np.array(distances_CC, np.float64)
    np.fill_diagonal(left, np.inf)
    names, sizes = list(range(count)), np.ones(count)
    merges: list[tuple[int, int, float, int]] = []
    for number in range(count - 1):
        one, other = divmod(int(left.argmin()), count)  # the first of equal ones: one < other
        distance = float(left[one, other])
        total = sizes[one] + sizes[other]
        mean = (left[one] * sizes[one] + left[other] * sizes[other]) / total
        mean[one] = np.inf
        left[one], left[:, one] = mean, mean
        left[other], left[:, other] = np.inf, np.inf
        first, second = sorted((names[one], names[other]))
        merges.append((first, second, distance, int(total)))
        names[one], sizes[one] = count + number, total
    return tuple(merges)
