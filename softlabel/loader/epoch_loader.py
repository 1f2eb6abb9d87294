"""The iteration of a loader: epochs that follow from (seed, epoch, step) and resume at any step, on any ranks.

Legend: S rows of a rank's share.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Generic

from softlabel.dataset import Source
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.labels.combine import Combination
from softlabel.loader.batch import BatchRequest
from softlabel.loader.epochs import EpochSampler, Order, Place, Plan
from softlabel.loader.ranks import RankShare
from softlabel.loader.workers import B, BatchDataset, BatchMaker, Failure, as_it_is
from softlabel.store.reader import Store


class EpochLoader(ABC, Generic[B]):
    """Batches of one epoch after another; what a batch is, its dataset says.

    Args:
        source: of the samples, for messages.
        store: of the labels; None: hard labels only.
        dataset: makes whole batches.
        order: of every epoch.
        shares: how an epoch is cut into batches and these into the shares of ranks.
        seed: of the order.
        workers: processes that make batches; 0: this one.
        pin_memory: hand out batches in page-locked memory.
        ahead: make the next batch in a thread, see `BatchMaker`.
        combine: how the members of a store that keeps them become one teacher.
    """

    def __init__(
        self,
        *,
        source: Source,
        store: Store | None,
        dataset: BatchDataset[B],
        order: Order,
        shares: RankShare,
        seed: int,
        workers: int,
        pin_memory: bool,
        ahead: bool,
        combine: Combination | None,
    ) -> None:
        self.source, self.store, self.dataset, self.seed = source, store, dataset, seed
        self._order, self._shares, self._combination = order, shares, combine
        self._plan = Plan(order, self._shares_of(0))
        self._place = Place()
        self._live: object = None
        self._workers, self._pin, self._ahead = workers, pin_memory, ahead
        self._batches = self._new_batches()

    @abstractmethod
    def _identity(self) -> dict[str, int | str]:
        """What a state must have in common with this loader to be loaded into it."""

    def _shares_of(self, epoch: int) -> RankShare:
        """How this epoch is cut."""
        return replace(self._shares, samples=self._order.count(epoch))

    def _complete(self, batch: B, epoch: int, start: int, stop: int) -> B:
        """The batch of the positions start to stop as it is handed out."""
        return batch

    def _check_state(self, state: Mapping[str, int | str]) -> None:
        """Raise MismatchError for a state of another loader that deserves a remedy of its own."""

    def _refuse_skipping(self) -> None:
        """Raise UsageError where a framework cannot skip batches by itself."""

    def _new_batches(self) -> BatchMaker[B]:
        return BatchMaker(self.dataset, self._plan, workers=self._workers, pin_memory=self._pin, ahead=self._ahead)

    def __len__(self) -> int:
        """Batches in the whole epoch that comes next; the same on every rank."""
        return len(self._shares_of(self._place.epoch))

    @property
    def num_samples(self) -> int:
        """Samples in an epoch over all ranks, those of a dropped tail included."""
        return self._order.count(self._place.epoch)

    @property
    def epoch(self) -> int:
        """The epoch that is being iterated, or comes next."""
        return self._place.epoch

    @property
    def temperature(self) -> float:
        """The temperature of the labels, at which the loss needs no conversion; 1 without a store."""
        if self._combination is not None and self._combination.temperature is not None:
            return self._combination.temperature
        return self.store.run.temperature if self.store is not None else 1.0

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be this epoch, from this step on. Reads nothing, wherever it is."""
        steps = len(self._shares_of(max(epoch, 0)))
        if epoch < 0 or not 0 <= step <= steps:
            raise UsageError(f"epoch and step: expected step 0 to {steps} of epoch 0 or later, found {epoch}, {step}")
        self._enter(epoch, self._shares_of(epoch).after(0, step))

    def _enter(self, epoch: int, sample: int) -> None:
        self._place, self._live = Place(epoch=epoch, sample=sample), None

    def __iter__(self) -> Iterator[B]:
        """The batches of one epoch: the next one, unless `set_epoch` or `load_state_dict` has said which.

        Which epoch it is shows at the first batch: frameworks set it after they have asked for an iterator.

        Raises:
            UsageError: this iteration goes on after a newer one, or `set_epoch`, has taken its place.
        """
        live = self._begin()
        epoch, start, left = self._plan.epoch, self._plan.start, len(self._plan)
        shares = self._plan.shares
        try:
            for done, batch in enumerate(self._batches, 1):
                if isinstance(batch, Failure):
                    self.close()  # the garbage collector would wait 5 seconds for the worker processes
                    raise batch.error
                sample = shares.after(start, done)
                batch = self._complete(batch, epoch, shares.after(start, done - 1), sample)
                self._place = Place(epoch=epoch, sample=sample, begun=True)
                yield batch
                if self._live is not live:
                    if done == left:
                        return
                    raise UsageError(
                        f"loader: this iteration of epoch {epoch} was ended after {done} of {left} batches by a newer "
                        "one, or by set_epoch; iterate once at a time, or use a second loader"
                    )
        except (RuntimeError, OSError, EOFError) as error:
            self.raise_if_worker_died(error)
            raise
        self.set_epoch(epoch + 1)

    def _begin(self) -> object:
        """Let a new iteration take the place of the one before; returns its identity."""
        if self._place.begun:
            self._enter(self._place.epoch + 1, 0)
        self._plan.epoch, self._plan.start = self._place.epoch, self._place.sample
        self._plan.shares = self._shares_of(self._plan.epoch)
        self._live = object()
        return self._live

    # ---- what frameworks look for ----

    @property
    def sampler(self) -> EpochSampler:
        """For Lightning, which calls its `set_epoch`."""
        return EpochSampler(len(self), self._set_epoch_from_outside, self._requests)

    @property
    def batch_sampler(self) -> EpochSampler:
        """For `skip_first_batches` of accelerate."""
        return self.sampler

    @property
    def collate_fn(self) -> Callable[[Any], Any]:
        """The identity: `dataset` gives whole batches."""
        return as_it_is

    @property
    def prefetch_factor(self) -> None:
        """For `skip_first_batches`, whose DataLoader has no worker processes."""
        return None

    def _set_epoch_from_outside(self, epoch: int) -> None:
        place = self._place
        if place.epoch != epoch or place.begun:
            self.set_epoch(epoch)

    def _requests(self) -> Iterator[BatchRequest]:
        self._refuse_skipping()
        live = self._begin()
        epoch, start = self._plan.epoch, self._plan.start
        for done, request in enumerate(self._plan, 1):
            self._place = Place(epoch=epoch, sample=self._plan.shares.after(start, done), begun=True)
            yield request
            if self._live is not live:
                return

    def __getstate__(self) -> dict[str, Any]:
        """Without worker processes and iterations: a copy makes its own, and goes on with the rest of the epoch."""
        return {**self.__dict__, "_batches": None, "_live": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # What moves on with the epochs is a copy's own, also where the data is shared.
        shares = self._shares_of(self._place.epoch)
        self._plan = Plan(self._order, shares)
        at_the_end = not shares.left(self._place.sample)
        self._place = replace(self._place, begun=self._place.begun and at_the_end)
        self._batches = self._new_batches()

    def state_dict(self) -> dict[str, int | str]:
        """Where the iteration is, after the last batch that was handed out; plain numbers and strings.

        Every rank has the same state: `sample` counts those of all of them.
        """
        return {"epoch": self._place.epoch, "sample": self._place.sample, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue where `state_dict` was called: with the next sample of the epoch, whatever the batch size, the
        number of ranks and the number of workers were and are. Where nothing is left of that epoch, the next one
        begins.

        Raises:
            MismatchError: the state is of another seed, dataset size, store, order or number of views.
        """
        mine = self.state_dict()
        self._check_state(state)
        different = [
            f"{name}: {state.get(name)!r} in the state, {value!r} here"
            for name, value in mine.items()
            if name not in ("epoch", "sample") and state.get(name) != value
        ]
        if different:
            raise MismatchError(f"loader state of another loader: {'; '.join(different)}")
        epoch, sample = state.get("epoch"), state.get("sample")
        last = self._order.count(epoch) if isinstance(epoch, int) and epoch >= 0 else 0
        if not (isinstance(epoch, int) and isinstance(sample, int) and epoch >= 0 and 0 <= sample <= last):
            raise MismatchError(
                f"loader state: expected sample 0 to {last} of epoch 0 or later, found {sample!r} of {epoch!r}"
            )
        if self._shares_of(epoch).left(sample):
            self._enter(epoch, sample)
        else:
            self._enter(epoch + 1, 0)

    def raise_if_worker_died(self, error: Exception) -> None:
        """The death of a worker process shows as a RuntimeError wherever the main process happens to be, or as a broken
        connection: make one clear error of it.

        Raises:
            DataError: a worker has died.
        """
        try:
            reason = self._batches.death(error)
        except RuntimeError as death:  # of torch's signal handler, which may raise anywhere after a connection broke
            reason = self._batches.death(death)
        if reason is not None:
            # Until it is forgotten, the dead worker is reported again whenever any child process ends.
            with contextlib.suppress(RuntimeError):
                self.close()
            raise DataError(
                f"{self.source.name}: a loader process died ({reason}); it may have run out of memory: use fewer "
                "workers"
            ) from error

    def close(self) -> None:
        """End the worker processes and the reading of labels. A loader can be iterated again afterwards."""
        self._batches.close()
