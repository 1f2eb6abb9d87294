"""Sources that wrap another one: a part of it, another order (for a dataset that grows), or a lock for threads."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, is_labelled
from softlabel.dataset.folds import ChosenSource
from softlabel.dataset.source import FileStamp, Source, runs, span
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE, Sample


class PartSource(Source):
    """Samples `start` to `stop` of another source, with or without its labels."""

    def __init__(self, base: Source, start: int = 0, stop: int | None = None, *, ignore_labels: bool = False) -> None:
        self.base = base
        self.start, self.stop = span(start, stop, len(base))
        self.ignore_labels = ignore_labels
        self.copy_attributes(base)
        self.lengths = None if base.lengths is None else base.lengths[self.start : self.stop]
        self.class_names = None if ignore_labels else base.class_names
        self.label_width = None if ignore_labels else base.label_width
        whole = len(self) == len(base) and not ignore_labels  # then labels, which may be costly to read, need no check
        self.has_labels = base.has_labels and (whole or bool(is_labelled(self.labels()).any()))

    def __len__(self) -> int:
        return self.stop - self.start

    def stamp(self) -> tuple[FileStamp, ...] | None:
        return self.base.stamp()

    def count_labelled(self) -> int | None:
        return super().count_labelled() if self.base.count_labelled() is not None else None

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        return self.base.keys(self.start + start, self.start + stop)

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        start, stop = span(start, stop, len(self))
        return self.base.key_table(self.start + start, self.start + stop)

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
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
    """The samples of another source in the order of `order_N`, unique indices int64 (N,)."""

    def __init__(self, base: Source, order_N: NDArray[np.int64]) -> None:
        self.base, self.order_N = base, order_N
        self.copy_attributes(base)
        self.lengths = None if base.lengths is None else base.lengths[order_N]

    def __len__(self) -> int:
        return len(self.order_N)

    def stamp(self) -> tuple[FileStamp, ...] | None:
        return self.base.stamp()

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        # In runs of consecutive samples, which a source reads at once.
        found: list[str] = []
        for first, last in runs(self.order_N[start:stop]):
            found += self.base.keys(first, last)
        return found

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        return self.base.labels()[self.order_N[start:stop]]

    def count_labelled(self) -> int | None:
        return super().count_labelled() if self.base.count_labelled() is not None else None

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return self.base.read(self.order_N[np.asarray(indices, dtype=np.int64)])


class LockedSource(Source):
    """A source that several threads share: one at a time reads."""

    def __init__(self, source: Source) -> None:
        self._source, self._reading = source, threading.Lock()
        self.copy_attributes(source)
        self.lengths = source.lengths

    def __len__(self) -> int:
        return len(self._source)

    def stamp(self) -> tuple[FileStamp, ...] | None:
        return self._source.stamp()

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        with self._reading:
            return self._source.keys(start, stop)

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        with self._reading:
            return self._source.labels(start, stop)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        with self._reading:
            return self._source.read(indices)


def require_samples(source: Source) -> None:
    """Check that a source is not empty.

    Raises:
        SpecError: its options select no sample.
        DataError: the data has no sample.
    """
    if len(source):
        return
    if isinstance(source, ChosenSource) and len(source.base):
        raise SpecError(
            f"{source.name}: expected at least one sample, found none: fold= and labelled= select none of "
            f"{len(source.base):,}; use fewer folds, or data with hard labels"
        )
    whole = source
    while isinstance(whole, PartSource):
        whole = whole.base
    if len(whole):
        raise SpecError(
            f"{source.name}: expected at least one sample, found none: rows= selects none of {len(whole):,}; give "
            "START:STOP with START < STOP"
        )
    raise DataError(f"{source.name}: expected at least one sample, found none; check the data")
