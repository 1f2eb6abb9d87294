"""The order of an epoch: a pure function of (seed, epoch, N), so that any step can be reached without the steps before.

Legend: N samples, K blocks of them. A position is a place in the epoch's sequence, a sample an index into the dataset.

The map position -> sample is a keyed bijection of 0..N-1: a Feistel network over Z_a x Z_b, a * b the smallest such
rectangle that holds N, with cycle walking (what lands outside 0..N-1 walks on until inside; fewer than one in
sqrt(N) does). There is no table of N numbers: a batch costs its own size, at any point of any epoch.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from softlabel.common.random import UInt64s, mix64_in_place, stream_key

Int64s = NDArray[np.int64]


# Enough for N = 3, where a round is the least of a shuffle; for a large N six would do.
_ROUNDS = 12

_HALF = np.uint64(32)


# Parts of a key that keep the order of blocks and that of samples independent.
_OF_BLOCKS, _OF_A_WINDOW = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """Which sample stands at which position of which epoch.

    Attributes:
        size: N, at least 1.
        seed: any integer.
        shuffle: False gives 0, 1, ..., N-1 in every epoch.
    """

    size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 sample to put into an order, found {self.size}")

    @property
    def name(self) -> str:
        """Which kind of order this is; orders of another name are other orders."""
        return "shuffled" if self.shuffle else "in order"

    def count(self, epoch: int) -> int:
        """Positions of an epoch."""
        return self.size

    def samples(self, epoch: int, start: int = 0, stop: int | None = None) -> Int64s:
        """The samples at positions start to stop (default: the end) of an epoch, int64."""
        stop = self.size if stop is None else min(stop, self.size)
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))

    def at(self, epoch: int, positions: Int64s) -> Int64s:
        """The samples at these positions of an epoch.

        Args:
            epoch: from 0.
            positions: int64, any shape, each in 0..N-1.
        """
        check_positions(positions, self.size)
        if not self.shuffle:
            return positions.astype(np.int64)
        rows = math.isqrt(self.size - 1) + 1  # a: ceil of the square root
        columns = -(-self.size // rows)  # b
        round_keys = [stream_key(self.seed, epoch, self.size, number) for number in range(_ROUNDS)]
        places = _feistel(positions.astype(np.uint64).ravel(), rows, columns, round_keys)
        outside = np.flatnonzero(places >= self.size)
        while outside.size:
            places[outside] = _feistel(places[outside], rows, columns, round_keys)
            outside = outside[places[outside] >= self.size]
        return places.astype(np.int64).reshape(positions.shape)


def check_positions(positions: Int64s, size: int) -> None:
    """Raises IndexError where a position is not among 0 to size - 1."""
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise IndexError(f"position: expected 0 to {size - 1}, found {positions.min()} to {positions.max()}")


def _feistel(places: UInt64s, rows: int, columns: int, round_keys: list[np.uint64]) -> UInt64s:
    """A keyed bijection of 0..rows*columns-1: turn every row by a hash of its number, then every column, and so on."""
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = places // b, places % b
    hashed, spare = np.empty_like(left), np.empty_like(left)
    for number, round_key in enumerate(round_keys):
        turned, by, limit = (left, right, a) if number % 2 == 0 else (right, left, b)
        mix64_in_place(np.bitwise_xor(by, round_key, out=hashed), spare)
        # Below the limit: the upper 32 bits scaled, which a rectangle of up to 2^64 places allows.
        np.right_shift(hashed, _HALF, out=hashed)
        np.multiply(hashed, limit, out=hashed)
        np.right_shift(hashed, _HALF, out=hashed)
        np.add(turned, hashed, out=turned)
        # The sum modulo the limit: below zero, unsigned, is huge. Division is slow.
        np.minimum(turned, np.subtract(turned, limit, out=spare), out=turned)
    return left * b + right


class BlockOrder:
    """An order for data that can only be read a block at a time: a pure function of (seed, epoch, blocks, window).

    The blocks are shuffled, cut into windows of about `window` blocks, and the samples of each window are shuffled as
    a whole. Whoever reads holds one window (two, with the next one read ahead) and reads every block once an epoch.

    How good a shuffle that is: a sample is as likely to stand anywhere in the epoch (exactly where blocks are equally
    large), each order of the blocks and of a window's samples is as likely, and windows and epochs are independent. But
    neighbours come from the same block with probability (b - 1) / (w * b - 1), about 1 / w, for w blocks of b samples,
    where a full shuffle has about b / N: with data that is sorted by class, a batch sees the classes of w blocks.

    Args:
        edges: int64 (K + 1,), rising from 0 to N: block k is the samples edges[k] to edges[k + 1].
        seed: any integer.
        window: blocks that are shuffled together, at least 1.
        shuffle: False gives 0, 1, ..., N-1 in every epoch, and windows of neighbouring blocks.
    """

    def __init__(self, edges: Int64s, *, seed: int = 0, window: int = 8, shuffle: bool = True) -> None:
        edges = np.unique(np.asarray(edges, dtype=np.int64))  # without empty blocks
        if len(edges) < 2 or edges[0] != 0:
            raise ValueError(f"edges: expected to rise from 0 to at least 1, found {edges[:3].tolist()}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 block, found {window}")
        self.edges, self.seed, self.window, self.shuffle = edges, seed, window, shuffle
        self.size = int(edges[-1])
        self._blocks = EpochOrder(size=len(edges) - 1, seed=int(stream_key(seed, _OF_BLOCKS)), shuffle=shuffle)
        count = -(-self._blocks.size // window)
        # Windows differ by one block at most: a last one of a single block would hardly be shuffled.
        self._cuts = np.arange(count + 1) * self._blocks.size // count
        self._known: tuple[int, _Layout] | None = None

    @property
    def name(self) -> str:
        """Which order this is; orders of another name are other orders."""
        how = "shuffled" if self.shuffle else "in order"
        return f"{how}, {len(self.edges) - 1} blocks in {len(self._cuts) - 1} windows"

    def count(self, epoch: int) -> int:
        """Positions of an epoch."""
        return self.size

    def windows(self, epoch: int) -> Int64s:
        """int64 (windows + 1,): window w is the positions windows[w] to windows[w + 1] of the epoch."""
        return self._layout(epoch).positions[self._cuts]

    def at(self, epoch: int, positions: Int64s) -> Int64s:
        """The samples at these positions of an epoch.

        Args:
            epoch: from 0.
            positions: int64, any shape, each in 0..N-1.
        """
        check_positions(positions, self.size)
        layout, windows = self._layout(epoch), self.windows(epoch)
        places = positions.astype(np.int64).ravel()
        if self.shuffle:
            numbers = np.searchsorted(windows, places, side="right") - 1
            for number in np.unique(numbers).tolist():
                inside, start = numbers == number, windows[number]
                seed = int(stream_key(self.seed, _OF_A_WINDOW, number))
                within = EpochOrder(size=int(windows[number + 1] - start), seed=seed)
                places[inside] = start + within.at(epoch, places[inside] - start)
        block = np.searchsorted(layout.positions, places, side="right") - 1
        return (self.edges[layout.blocks[block]] + places - layout.positions[block]).reshape(positions.shape)

    def _layout(self, epoch: int) -> "_Layout":
        """The order of the blocks costs their number, once an epoch."""
        if self._known is None or self._known[0] != epoch:
            blocks = self._blocks.samples(epoch)
            sizes = np.diff(self.edges)[blocks]
            self._known = epoch, _Layout(blocks=blocks, positions=np.concatenate([[0], np.cumsum(sizes)]))
        return self._known[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """One epoch: `blocks` in their order, `positions` where each of them begins before its window is shuffled."""

    blocks: Int64s
    positions: Int64s
