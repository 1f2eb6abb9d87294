"""Whole batches made by worker processes, with errors that arrive as they were raised."""

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from softlabel.dataset.worker_init import begin_worker
from softlabel.errors import SoftLabelError
from softlabel.loader.batch import BatchRequest
from softlabel.loader.dataloader_internals import end_workers, worker_processes
from softlabel.loader.epochs import Plan


class Pinnable(Protocol):
    """A batch."""

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory."""
        ...


B = TypeVar("B", bound=Pinnable)
B_co = TypeVar("B_co", bound=Pinnable, covariant=True)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way out of a worker process, which would otherwise arrive wrapped into a traceback's text."""

    error: SoftLabelError


class BatchDataset(Protocol[B_co]):
    """Makes whole batches on request."""

    def __getitems__(self, wanted: BatchRequest) -> B_co: ...


class BatchMaker(Generic[B]):
    """Batches of a plan, in its order, made by so many processes; by this one where there are 0.

    Args:
        pin_memory: make them in page-locked memory, where there is a GPU.
        ahead: make one ahead in a thread, if there are no processes: while the training loop waits for a GPU or
            launches its work. A batch is mostly copying, which other threads do not wait for.
    """

    def __init__(self, dataset: BatchDataset[B], plan: Plan, *, workers: int, pin_memory: bool, ahead: bool) -> None:
        self._plan, self._guarded = plan, _Guarded(dataset)
        self._ahead, self.pin_memory = ahead, pin_memory and torch.cuda.is_available()
        # Its own generator: workers are seeded from it, and the global one stays as the training loop left it.
        self._batches: DataLoader[Any] = DataLoader(
            self._guarded,
            batch_sampler=plan,
            collate_fn=as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=begin_worker,
            # Forked workers share the cache of decoded images.
            multiprocessing_context="fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None,
        )

    def __iter__(self) -> Iterator[B | Failure]:
        if self._batches.num_workers:
            yield from self._batches
            return
        # A DataLoader without workers would only take time.
        if not self._ahead:
            yield from map(self._make, self._plan)
            return
        requests = iter(self._plan)
        with ThreadPoolExecutor(1, "softlabel-batch", initializer=_use_device, initargs=(_find_device(),)) as thread:
            pending = [thread.submit(self._make, one) for one in itertools.islice(requests, 1)]
            try:
                while pending:
                    made = pending.pop().result()
                    pending += [thread.submit(self._make, one) for one in itertools.islice(requests, 1)]
                    yield made
            finally:
                for one in pending:
                    one.cancel()

    def _make(self, request: BatchRequest) -> B | Failure:
        made = self._guarded.__getitems__(request)
        return made.pin_memory() if self.pin_memory and not isinstance(made, Failure) else made

    def death(self, error: Exception) -> str | None:
        """What to say of a worker that has died, which shows as this error; None: no worker has died.

        Raises:
            RuntimeError: of torch's signal handler, that a worker has died, meanwhile.
        """
        workers = worker_processes(self._batches)
        if isinstance(error, OSError | EOFError):
            # The connection breaks an instant before the process is known to be dead.
            for worker in workers:
                worker.join(timeout=0.5)
        if "DataLoader worker" in str(error) or any(worker.exitcode not in (None, 0) for worker in workers):
            return (str(error) or type(error).__name__).splitlines()[0]
        return None

    def close(self) -> None:
        """End the worker processes; the next iteration starts others."""
        end_workers(self._batches)


class _Guarded(Dataset[B]):
    """Hands errors over as values; see `Failure`."""

    def __init__(self, dataset: BatchDataset[B]) -> None:
        self.dataset = dataset

    def __getitems__(self, request: BatchRequest) -> B | Failure:
        try:
            return self.dataset.__getitems__(request)
        except SoftLabelError as error:
            return Failure(error)


def _find_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _use_device(number: int | None) -> None:
    """Pin for the same device in another thread, which would take memory on the first one otherwise."""
    if number is not None:
        torch.cuda.set_device(number)


def as_it_is(batch: Any) -> Any:
    """The collate function of whole batches."""
    return batch
