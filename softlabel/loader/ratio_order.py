"""The order of several groups of samples that are mixed by a ratio, such as 1 labelled image for 7 unlabelled ones.

Legend: N samples, G groups of them, W the sum of the ratio's numbers.

The samples go round in cycles of W places, spread evenly: group i has its number of them in every cycle, and so, up to
one, its part of every batch and of every rank's part of a batch. Each group has an endless sequence of its own, pass
after pass over its samples, each pass in a new order. A place of an epoch is a place of the cycles, so this is a pure
function of (seed, epoch, sizes, ratio), as the order of one group is.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from softlabel.common.random import stream_key
from softlabel.dataset import Source
from softlabel.dataset.concat import SeveralSources
from softlabel.errors import DataError, UsageError
from softlabel.loader.order import EpochOrder, check_positions

Int64s = NDArray[np.int64]
_OF_A_GROUP = 3  # part of a key that keeps the orders of groups independent


class RatioOrder:
    """Which sample stands at which position of which epoch; an epoch ends where the first group has been seen once.

    Args:
        edges: int64 (G + 1,), rising from 0 to N: group i is the samples edges[i] to edges[i + 1].
        ratio: G whole numbers of at least 1.
        seed: any integer.
        shuffle: False gives every group in its own order.
    """

    def __init__(self, edges: Int64s, ratio: Sequence[int], *, seed: int = 0, shuffle: bool = True) -> None:
        sizes = np.diff(edges)
        if len(sizes) != len(ratio) or min(ratio) < 1 or not (sizes > 0).all():
            raise ValueError(f"ratio: expected a number of at least 1 for each of {sizes.tolist()}, found {ratio}")
        common = math.gcd(*ratio)
        self._parts = np.array(ratio, dtype=np.int64) // common
        self._edges = np.asarray(edges, dtype=np.int64)
        # Place j of group i lies at (j + 1/2) / parts[i] of the cycle.
        where = [(np.arange(part) + 0.5) / part for part in self._parts]
        order = np.argsort(np.concatenate(where), kind="stable")
        self._group_W = np.repeat(np.arange(len(ratio)), self._parts)[order]
        self._turn_W = np.concatenate([np.arange(part) for part in self._parts])[order]
        self._orders = [
            EpochOrder(size=int(size), seed=int(stream_key(seed, _OF_A_GROUP, number)), shuffle=shuffle)
            for number, size in enumerate(sizes)
        ]
        self.cycles = max(int((sizes // self._parts).min()), 1)
        self.size = self.cycles * len(self._group_W)
        self.shuffle = shuffle

    @property
    def name(self) -> str:
        """Which order this is; orders of another name are other orders."""
        how = "shuffled" if self.shuffle else "in order"
        return f"{how}, groups of {[order.size for order in self._orders]} mixed {self._parts.tolist()}"

    def count(self, epoch: int) -> int:
        """Positions of an epoch."""
        return self.size

    def at(self, epoch: int, positions: Int64s) -> Int64s:
        """The samples at these positions of an epoch.

        Args:
            epoch: from 0.
            positions: int64, any shape, each in 0..size-1.
        """
        check_positions(positions, self.size)
        cycle, place = np.divmod(positions.astype(np.int64).ravel(), len(self._group_W))
        group = self._group_W[place]
        turn = (epoch * self.cycles + cycle) * self._parts[group] + self._turn_W[place]
        samples = np.empty_like(turn)
        for number, order in enumerate(self._orders):
            mine = np.flatnonzero(group == number)
            passes, places = np.divmod(turn[mine], order.size)
            for one in np.unique(passes).tolist():
                chosen = passes == one
                samples[mine[chosen]] = self._edges[number] + order.at(one, places[chosen])
        reshaped: Int64s = samples.reshape(positions.shape)
        return reshaped


def ratio_order(source: Source, samples: Int64s, ratio: Sequence[int], *, seed: int, shuffle: bool) -> RatioOrder:
    """The order of a source of several, of which some samples were kept.

    Args:
        samples: int64, rising: the samples of the source that are left.

    Raises:
        UsageError: not one number for each source.
        DataError: a source of which no sample is left.
    """
    sources = source.sources if isinstance(source, SeveralSources) else (source,)
    if len(ratio) != len(sources) or len(sources) < 2 or min(ratio) < 1:
        raise UsageError(
            f"source_ratio: expected a whole number of at least 1 for each of {len(sources)} sources, found "
            f"{list(ratio)}"
        )
    assert isinstance(source, SeveralSources)
    edges = np.searchsorted(samples, source.edges)
    for number, one in enumerate(sources):
        if edges[number] == edges[number + 1]:
            raise DataError(f"{one.name}: none of its {len(one)} samples is left to train on; leave it out")
    return RatioOrder(edges, ratio, seed=seed, shuffle=shuffle)
