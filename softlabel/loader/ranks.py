"""How an epoch is cut into global batches, and a global batch into the shares of ranks.

Legend: N samples of an epoch, B rows of a global batch, W ranks, S rows of a share.

A global batch is a range of positions of the epoch, the same on all ranks: it starts at a multiple of B after the place
where the epoch was entered. Rank r of W takes the rows r * B // W to (r + 1) * B // W of it, next to each other. All
shares of a batch have ceil(B / W) rows; one that has fewer of its own is filled up with copies of them, of weight 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softlabel.errors import UsageError

Tail = Literal["keep", "drop", "pad"]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank does of one global batch.

    Attributes:
        places: int64 (S,), positions of the epoch.
        counted: how many of them count, the first ones; None: no rank has filler in this batch.
    """

    places: Int64s
    counted: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """The batches of an epoch, as one of W ranks sees them.

    Attributes:
        samples: N.
        batch_size: B, over all ranks.
        tail: of samples that fill no batch: ``keep`` gives a smaller batch (one rank only), ``drop`` leaves them out
            of the epoch unless they are all there is, ``pad`` fills the batch up with rows of weight 0.

    Raises:
        UsageError: numbers that make no sense, or ``keep`` with several ranks, which would get different batches.
    """

    samples: int
    batch_size: int
    tail: Tail = "keep"
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, found {self.batch_size}")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"rank and world_size: expected 0 <= rank < world_size, found {self.rank} and {self.world_size}"
            )
        if self.tail not in ("keep", "drop", "pad"):
            raise UsageError(f"tail: expected 'keep', 'drop' or 'pad', found {self.tail!r}")
        if self.batch_size < self.world_size:
            raise UsageError(
                f"batch_size: expected at least one row for each of {self.world_size} ranks, found {self.batch_size}; "
                "it is the number of rows over all ranks"
            )
        if self.tail == "keep" and self.world_size > 1:
            raise UsageError(
                f"tail: 'keep' would give {self.world_size} ranks different batches; choose 'drop', or 'pad' with "
                "rows of weight 0"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch; the same on every rank."""
        return self.left(0)

    def left(self, sample: int) -> int:
        """Batches from this position of the epoch to its end."""
        left = self.samples - sample
        # A tail that is all there is stays: an epoch has at least one step.
        drops = self.tail == "drop" and self.samples >= self.batch_size
        return left // self.batch_size if drops else -(-left // self.batch_size)

    def after(self, sample: int, batches: int) -> int:
        """The position after so many batches from position `sample` on."""
        return min(sample + batches * self.batch_size, self.samples)

    def cut(self, sample: int, batches: int) -> Iterator[Share]:
        """This rank's share of the `batches` batches from position `sample` on."""
        for number in range(batches):
            first = sample + number * self.batch_size
            yield self._share(first, min(self.batch_size, self.samples - first))

    def _share(self, first: int, count: int) -> Share:
        """Of a batch of `count` rows that starts at position `first`."""
        start = first + self.rank * count // self.world_size
        stop = first + (self.rank + 1) * count // self.world_size
        own = np.arange(start, stop, dtype=np.int64)
        # The size of a full batch wherever rows of weight 0 are allowed: compiled students see one shape.
        rows = count if self.world_size == 1 and self.tail != "pad" else -(-self.batch_size // self.world_size)
        if rows * self.world_size == count:
            return Share(places=own, counted=None)
        filled = np.resize(own, rows) if len(own) else np.full(rows, first, dtype=np.int64)
        return Share(places=filled, counted=len(own))
