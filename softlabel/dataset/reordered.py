"""A source in another order: what lets a dataset grow without moving the samples that were labelled before."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel.dataset.base import Sample, Source, runs, span


class ReorderedSource(Source):
    """The samples of another source in the order of `order_N`, int64 indices into it, each at most once."""

    def __init__(self, base: Source, order_N: NDArray[np.int64]) -> None:
        self.base, self.order_N = base, order_N
        self.kind, self.name = base.kind, base.name
        self.decoding = base.decoding
        self.class_names, self.has_labels, self.findings = base.class_names, base.has_labels, base.findings

    def __len__(self) -> int:
        return len(self.order_N)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        # By runs of neighbours, which most of a grown dataset is: a source reads those at once.
        found: list[str] = []
        for first, last in runs(self.order_N[start:stop]):
            found += self.base.keys(first, last)
        return found

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        start, stop = span(start, stop, len(self))
        return self.base.labels()[self.order_N[start:stop]]

    def count_labelled(self) -> int | None:
        return super().count_labelled() if self.base.count_labelled() is not None else None

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return self.base.read(self.order_N[np.asarray(indices, dtype=np.int64)])
