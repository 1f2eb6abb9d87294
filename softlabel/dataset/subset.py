"""Parts of a source, and a source in another order, which lets a dataset grow behind the samples labelled before."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.dataset.source import Source, runs, span
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE, Sample


class PartSource(Source):
    """Samples start to stop of another source, with or without its labels."""

    def __init__(self, base: Source, start: int = 0, stop: int | None = None, *, ignore_labels: bool = False) -> None:
        self.base = base
        self.start, self.stop = span(start, stop, len(base))
        self.ignore_labels = ignore_labels
        self.kind, self.name = base.kind, base.name
        self.class_names = None if ignore_labels else base.class_names
        self.findings, self.decoding, self.inputs = base.findings, base.decoding, base.inputs
        self.has_labels = base.has_labels and bool((self.labels() != IGNORE).any())

    def __len__(self) -> int:
        return self.stop - self.start

    def count_labelled(self) -> int | None:
        return super().count_labelled() if self.base.count_labelled() is not None else None

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        return self.base.keys(self.start + start, self.start + stop)

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        start, stop = span(start, stop, len(self))
        return self.base.key_table(self.start + start, self.start + stop)

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        start, stop = span(start, stop, len(self))
        if self.ignore_labels:
            return np.full(stop - start, IGNORE, dtype=np.int64)
        return self.base.labels(self.start + start, self.start + stop)

    def blocks(self) -> list[tuple[int, int]]:
        cut = [(max(first, self.start), min(last, self.stop)) for first, last in self.base.blocks()]
        return [(first - self.start, last - self.start) for first, last in cut if first < last]

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        samples = self.base.read(np.asarray(indices, dtype=np.int64) + self.start)
        if self.ignore_labels:
            return [replace(sample, label=IGNORE) for sample in samples]
        return samples


class ReorderedSource(Source):
    """The samples of another source in the order of `order_N`, int64 indices into it, each at most once."""

    def __init__(self, base: Source, order_N: NDArray[np.int64]) -> None:
        self.base, self.order_N = base, order_N
        self.kind, self.name = base.kind, base.name
        self.decoding, self.inputs = base.decoding, base.inputs
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


class LockedSource(Source):
    """The same source for several threads, of which one at a time reads."""

    def __init__(self, source: Source) -> None:
        self._source, self._reading = source, threading.Lock()
        self.kind, self.name = source.kind, source.name
        self.decoding, self.inputs = source.decoding, source.inputs
        self.class_names, self.has_labels, self.findings = source.class_names, source.has_labels, source.findings

    def __len__(self) -> int:
        return len(self._source)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        with self._reading:
            return self._source.keys(start, stop)

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        with self._reading:
            return self._source.labels(start, stop)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        with self._reading:
            return self._source.read(indices)


def require_samples(source: Source) -> None:
    """Raises SpecError where ``rows=`` leaves no sample, DataError where there is none at all."""
    if len(source):
        return
    whole = source
    while isinstance(whole, PartSource):
        whole = whole.base
    if len(whole):
        raise SpecError(
            f"{source.name}: expected at least one sample, found none: rows= takes none of its {len(whole):,}; give "
            "START:STOP with START < STOP"
        )
    raise DataError(f"{source.name}: expected at least one sample, found none; give data that has some")
