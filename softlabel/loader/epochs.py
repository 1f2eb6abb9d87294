"""Where a loader is in its epochs, and what it asks for there; also for frameworks that set the epoch or skip batches.

Legend: S rows of a rank's share.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from softlabel.loader.batch import BatchRequest
from softlabel.loader.ranks import Int64s, RankShare

# Working out an order costs a hundred calls of numpy, however short it is.
_STEPS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point of an epoch.

    Attributes:
        epoch: from 0.
        sample: of the epoch, over all ranks: how many were handed out.
        begun: an iteration has handed out a batch of the epoch, so that the next one is of the epoch after it. False
            where the epoch or the state was set from outside.
    """

    epoch: int = 0
    sample: int = 0
    begun: bool = False


class Order(Protocol):
    """Which sample stands at which position of which epoch."""

    @property
    def name(self) -> str:
        """Which order this is; orders of another name are other orders."""
        ...

    def count(self, epoch: int) -> int:
        """Positions of an epoch."""
        ...

    def at(self, epoch: int, positions: Int64s) -> Int64s:
        """The samples at these positions of an epoch."""
        ...


class Plan(Sampler[Any]):
    """This rank's requests of one epoch, from position `start` on."""

    def __init__(self, order: Order, shares: RankShare) -> None:
        self.order, self.shares = order, shares
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.shares.left(self.start)

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, shares, sample, left = self.epoch, self.shares, self.start, len(self)
        while left:
            steps = min(_STEPS_AT_ONCE, left)
            cuts = list(shares.cut(sample, steps))
            samples = self.order.at(epoch, np.concatenate([cut.places for cut in cuts]))
            first = 0
            for cut in cuts:
                stop = first + len(cut.places)
                yield BatchRequest(positions=samples[first:stop], view=epoch, counted=cut.counted)
                first = stop
            sample, left = shares.after(sample, steps), left - steps


class EpochSampler(Sampler[Any]):
    """A loader's order, as frameworks look for it in `DataLoader.sampler` and `DataLoader.batch_sampler`.

    Lightning sets the epoch through it. The `skip_first_batches` of accelerate, and so a resumed Trainer, makes a plain
    DataLoader of it and of the loader's dataset; its batches count as handed out by the loader.

    Args:
        batches: batches in a whole epoch.
        set_epoch: what the framework's epoch goes to.
        requests: the requests of an iteration, which begins now.
    """

    def __init__(
        self, batches: int, set_epoch: Callable[[int], None], requests: Callable[[], Iterator[BatchRequest]]
    ) -> None:
        self._batches, self._set_epoch, self._requests = batches, set_epoch, requests

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._requests()

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch: from its start, unless a loaded state says where in it to go on."""
        self._set_epoch(epoch)
