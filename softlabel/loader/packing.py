"""Documents packed into lines of one length: a pure function of (seed, epoch, lengths), so that any step is reached.

Legend: N documents, L positions of a line.

The documents of an epoch are shuffled and cut into windows. Those of a window are taken from the longest to the
shortest, each into the line of the window where the least space is left after it, or into a new line (best fit
decreasing, which fills nearly all lines; Johnson 1973 bounds it by 11/9 of the fewest possible). The lines of all
windows are then shuffled, so that a batch has short and long documents alike.
"""

import bisect
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from softlabel.common.random import stream_key
from softlabel.errors import UsageError
from softlabel.loader.order import EpochOrder

Int64s = NDArray[np.int64]

WINDOW = 4096  # documents packed together
# Part of a key that keeps the order of lines independent of that of documents.
_OF_LINES = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedEpoch:
    """The lines of one epoch.

    Attributes:
        documents: int64 (N,), line after line, in the order in which they lie there.
        edges: int64 (lines + 1,): line k has documents[edges[k]:edges[k + 1]].
    """

    documents: Int64s
    edges: Int64s

    def __len__(self) -> int:
        return len(self.edges) - 1

    def line(self, number: int) -> Int64s:
        """The documents of a line, int64."""
        return self.documents[self.edges[number] : self.edges[number + 1]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packing:
    """How the documents of every epoch are packed.

    Attributes:
        lengths: positions of each document, int64 (N,), each at least 1.
        length: L, positions of a line.
        seed: any integer.
        shuffle: False takes documents and lines in their order, in every epoch alike.
        window: documents that are packed together.
        alone: one document a line, as where batches are padded.

    Raises:
        UsageError: a document is longer than a line.
    """

    lengths: Int64s
    length: int
    seed: int = 0
    shuffle: bool = True
    window: int = WINDOW
    alone: bool = False

    def __post_init__(self) -> None:
        if not len(self.lengths) or self.lengths.min() < 1:
            raise ValueError("lengths: expected documents of at least 1 position each")
        if (longest := int(self.lengths.max())) > self.length:
            option = "pad" if self.alone else "pack"
            raise UsageError(
                f"{option}: the longest document has {longest} tokens, a line {self.length}; give --{option} {longest} "
                f"or more, or label with --max-length {self.length}"
            )

    def pack(self, epoch: int) -> PackedEpoch:
        """The lines of an epoch."""
        order_N = self._documents.samples(epoch)
        if self.alone:
            return PackedEpoch(documents=order_N, edges=np.arange(len(order_N) + 1))
        lines: list[Int64s] = []
        for first in range(0, len(order_N), self.window):
            lines += self._pack_window(order_N[first : first + self.window])
        number = replace(self._documents, size=len(lines), seed=int(stream_key(self.seed, _OF_LINES)))
        lines = [lines[place] for place in number.samples(epoch).tolist()]
        return PackedEpoch(documents=np.concatenate(lines), edges=np.cumsum([0, *map(len, lines)], dtype=np.int64))

    @property
    def _documents(self) -> EpochOrder:
        return EpochOrder(size=len(self.lengths), seed=self.seed, shuffle=self.shuffle)

    def _pack_window(self, documents: Int64s) -> list[Int64s]:
        longest_first = documents[np.argsort(-self.lengths[documents], kind="stable")].tolist()
        lines: list[list[int]] = []
        space: list[tuple[int, int]] = []  # rising: what is left of a line, and its number
        for document in longest_first:
            needed = int(self.lengths[document])
            place = bisect.bisect_left(space, (needed, -1))
            if place == len(space):
                left, number = self.length, len(lines)
                lines.append([])
            else:
                left, number = space.pop(place)
            lines[number].append(document)
            if left > needed:
                bisect.insort(space, (left - needed, number))
        return [np.array(line, np.int64) for line in lines]
