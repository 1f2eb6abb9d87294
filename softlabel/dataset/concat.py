"""Concatenation of sources, for example of labelled and unlabelled data."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, stack_labels
from softlabel.dataset.source import FileStamp, Source, check_keys, span
from softlabel.errors import MismatchError
from softlabel.inputs.base import AS_USUAL, Sample


class SeveralSources(Source):
    """The samples of several sources, in turn.

    Several sources may have the same key: a labelled image may also be among the unlabelled ones. Sources without class
    names use those of the others.

    Raises:
        MismatchError: two sources have other classes or another kind of samples.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.kind = self.sources[0].kind if len({source.kind for source in sources}) == 1 else "several"
        self.name = " + ".join(source.name for source in sources)
        # Each sample has its decoding; a store records the first unusual one.
        self.decoding = next((one.decoding for one in sources if one.decoding != AS_USUAL), AS_USUAL)
        self.inputs = sources[0].inputs
        if other := next((one for one in sources if one.inputs != self.inputs), None):
            raise MismatchError(
                f"{other.name}: expected samples of kind {self.inputs.name} as in {sources[0].name}, found "
                f"{other.inputs.name}; train on data of one kind"
            )
        self.has_labels = any(source.has_labels for source in sources)
        labelled = [source for source in sources if source.has_labels]
        for source in labelled[1:]:
            if source.label_width != labelled[0].label_width:
                raise MismatchError(
                    f"labels: {source.name} has {_describe_labels(source)}, and {labelled[0].name} "
                    f"{_describe_labels(labelled[0])}; data that is trained on together has labels of one kind"
                )
        self.label_width = labelled[0].label_width if labelled else None
        named = [source for source in sources if source.class_names is not None]
        for source in named[1:]:
            if source.class_names != named[0].class_names:
                raise MismatchError(
                    f"{source.name}: classes: expected {list(named[0].class_names or ())[:5]}... as {named[0].name}, "
                    f"found {list(source.class_names or ())[:5]}...; train on data with the same classes in the same "
                    "order"
                )
        self.class_names = named[0].class_names if named else None
        # int64 (sources + 1,): source i is the samples edges[i] to edges[i + 1].
        self.edges = np.cumsum([0, *(len(source) for source in sources)])

        lengths = [one.lengths for one in sources if one.lengths is not None]
        self.lengths = np.concatenate(lengths) if len(lengths) == len(sources) else None

    def __len__(self) -> int:
        return int(self.edges[-1])

    def stamp(self) -> tuple[FileStamp, ...] | None:
        stamps = [source.stamp() for source in self.sources]
        known = [stamp for stamp in stamps if stamp is not None]
        return tuple(one for stamp in known for one in stamp) if len(known) == len(stamps) else None

    def parts(self) -> tuple[Source, ...]:
        return tuple(part for source in self.sources for part in source.parts())

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return [key for source, first, last in self._split_range(start, stop) for key in source.keys(first, last)]

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        return Keys.join([source.key_table(first, last) for source, first, last in self._split_range(start, stop)])

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        width = self.label_width
        parts: list[Labels] = [stack_labels([], width)]
        for source, first, last in self._split_range(start, stop):
            labels = source.labels(first, last)
            parts.append(labels if width == source.label_width else stack_labels(labels.tolist(), width))
        return np.concatenate(parts)

    def highest_label(self) -> int:
        return max(source.highest_label() for source in self.sources)

    def blocks(self) -> list[tuple[int, int]]:
        starts = zip(self.sources, self.edges.tolist(), strict=False)
        return [(edge + first, edge + last) for source, edge in starts for first, last in source.blocks()]

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        wanted = np.asarray(indices, dtype=np.int64)
        number_B = np.searchsorted(self.edges, wanted, side="right") - 1
        found: dict[int, Sample] = {}
        for number in np.unique(number_B).tolist():
            places = np.flatnonzero(number_B == number)
            samples = self.sources[number].read(wanted[places] - self.edges[number])
            found |= dict(zip(places.tolist(), samples, strict=True))
        return [found[place] for place in range(len(wanted))]

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = check_keys(self, unique=False)
        return self._fingerprint

    def _split_range(self, start: int, stop: int | None) -> list[tuple[Source, int, int]]:
        """Return (source, first, last) of the samples in a range."""
        start, stop = span(start, stop, len(self))
        parts = []
        for source, edge in zip(self.sources, self.edges.tolist(), strict=False):
            first, last = max(start - edge, 0), min(stop - edge, len(source))
            if first < last:
                parts.append((source, first, last))
        return parts


def _describe_labels(source: Source) -> str:
    return "class numbers" if source.label_width is None else f"labels of {source.label_width} classes at once"
