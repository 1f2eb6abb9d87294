"""Whole batches made by worker processes, with errors that arrive as they were raised."""

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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

    def runs_user_code(self, wanted: BatchRequest) -> bool:
        """Whether a batch needs a dataset of the user's, which may belong to a thread, or draw random numbers."""
        ...


class BatchMaker(Generic[B]):
    """Batches of a plan, in its order, made by so many processes; by this one where there are 0.

    Args:
        pin_memory: make them in page-locked memory, where there is a GPU.
        ahead: make one ahead in a thread, if there are no processes: while the training loop waits for a GPU or
            launches its work. A batch is mostly copying, which other threads do not wait for. One that needs a dataset
            of the user's is made by the loop's own thread, when it is its turn.
    """

    def __init__(self, dataset: BatchDataset[B], plan: Plan, *, workers: int, pin_memory: bool, ahead: bool) -> None:
        self._plan, self._guarded = plan, _Guarded(dataset)
        self._ahead, self.pin_memory = ahead, pin_memory and torch.cuda.is_available()
        # An iteration that was left may still be in its thread.
        self._one_at_a_time = threading.Lock()
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
        thread = ThreadPoolExecutor(1, "softlabel-batch", initializer=_use_device, initargs=(_find_device(),))
        try:
            pending: deque[Callable[[], B | Failure]] = deque()
            for request in self._plan:
                if self._guarded.dataset.runs_user_code(request):
                    pending.append(partial(self._make, request))
                else:
                    pending.append(thread.submit(self._make, request).result)
                if len(pending) > 1:
                    yield pending.popleft()()
            while pending:
                yield pending.popleft()()
        finally:
            # Not waited for: an iteration may end in the garbage collector, within any thread, or by Ctrl-C.
            thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, request: BatchRequest) -> B | Failure:
        with self._one_at_a_time:
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
