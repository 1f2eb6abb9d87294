"""From a source to whole batches of pixels: read, decode, make the view, shape it for every member.

    source -> decode -> view -> geometry of each member -> uint8 batch

What a view of a sample is depends on (seed, key, view) alone, never on the batch that it is made in.

Legend: B batch, H height, W width.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softlabel.dataset import Source
from softlabel.dataset.subset import LockedSource
from softlabel.dataset.worker_init import begin_worker
from softlabel.errors import DataError, SoftLabelError, one_line
from softlabel.inputs.base import Inputs, InputTransform
from softlabel.inputs.batch import collate_samples, decode_samples
from softlabel.store.manifest import BadRow
from softlabel.views import Made, Views, stacked

_THREADS = min(8, os.cpu_count() or 1)  # that decode where no processes do


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The samples of one batch: `view` of the samples `start` to `stop` of the source."""

    view: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedBatch:
    """Up to B samples, decoded and collated for every distinct transform among the members.

    `columns` are the store's that describe the views.
    """

    keys: list[str]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    content: np.ndarray[Any, np.dtype[np.uint64]]
    inputs: tuple[Inputs, ...]
    bad: tuple[BadRow, ...]
    columns: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputReader:
    """What turns samples of a source into batches, in this process or in workers.

    Attributes:
        transforms: the distinct ones among the members; a batch comes as inputs for each.
        views: how views are made; None: a view is the image as it is.
    """

    source: Source
    transforms: tuple[InputTransform, ...]
    views: Views | None = None

    def batch(self, indices: Sequence[int], *, view: int = 0) -> DecodedBatch:
        """Read, decode and shape these samples; what cannot be decoded is listed as bad.

        Raises:
            DataError: images of different sizes for a teacher that takes them as they are.
        """
        samples = self.source.read(indices)
        decoded = decode_samples(samples, self.source.inputs, name=self.source.name)
        reasons = dict(decoded.failed)  # place among the samples -> why it has no row
        there = list(decoded.items)
        made = self._views(list(decoded.items.values()), [samples[place].key for place in there], view)
        reasons |= {there[place]: reason for place, reason in made.failed.items()}
        there = [place for place in there if place not in reasons]
        inputs, misshapen = collate_samples(
            made.images,
            [samples[place].key for place in there],
            self.transforms,
            network="teacher",
            fixed=self.views is not None and self.views.policy.fixed,
        )
        reasons |= {there[number]: reason for number, reason in misshapen.items()}
        shapely = [number for number in range(len(there)) if number not in misshapen]
        kept = [samples[there[number]] for number in shapely]
        return DecodedBatch(
            keys=[sample.key for sample in kept],
            labels=np.array([sample.label for sample in kept], dtype=np.int64),
            content=decoded.content[[there[number] for number in shapely]],
            inputs=inputs,
            bad=tuple(
                BadRow(index=int(indices[place]), key=samples[place].key, reason=reasons[place])
                for place in sorted(reasons)
            ),
            columns={name: column[shapely] for name, column in made.columns.items()},
        )

    def _views(self, images: list[Tensor], keys: list[str], view: int) -> Made:
        if self.views is None or not images:
            return Made(images=images, columns={}, failed={})
        return self.views.make(stacked(images), keys, view=view, read=self._decoded)

    def _decoded(self, indices: Sequence[int]) -> tuple[list[str], list[Tensor | None]]:
        """Keys and images of samples that others are mixed with; None where one cannot be decoded."""
        samples = self.source.read(indices)
        images = decode_samples(samples, self.source.inputs, name=self.source.name).items
        return [sample.key for sample in samples], [images.get(place) for place in range(len(samples))]

    def read(self, span: Span) -> DecodedBatch:
        return self.batch(range(span.start, span.stop), view=span.view)

    def one_at_a_time(self) -> "InputReader":
        """The same for several threads; one at a time reads, as a user's source need not be safe for threads."""
        return replace(self, source=LockedSource(self.source))

    def stream(self, spans: Iterable[Span], *, workers: int) -> Generator[DecodedBatch, None, None]:
        """The batches of these spans, in order, made ahead by worker processes, or by threads where there are none.

        Raises:
            DataError: a worker process was killed; or see `batch`.
        """
        if not workers:
            yield from _ahead(self.one_at_a_time().read, spans)
            return
        loader = DataLoader(
            _Spans(self),
            sampler=spans,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=False,
            worker_init_fn=begin_worker,
        )
        with _own_child_signals(), _worker_deaths_reported():
            batches = iter(loader)
            _ignore_children()
            for batch in batches:
                if isinstance(batch, SoftLabelError):
                    raise batch
                yield batch


class _Spans(Dataset[DecodedBatch | SoftLabelError]):
    """Span -> its batch: what the worker processes run. The sampler yields spans, so that no list of them is held."""

    def __init__(self, reader: InputReader) -> None:
        self.reader = reader

    def __getitem__(self, span: Span) -> DecodedBatch | SoftLabelError:
        try:
            return self.reader.read(span)
        except SoftLabelError as error:  # handed over as it is: PyTorch would put a traceback into its message
            return error.with_traceback(None)


@contextmanager
def _own_child_signals() -> Iterator[None]:
    """Put back the handler of SIGCHLD that was there before, unless a worker died: torch's would still raise for it."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _handle_children(before)
        raise
    else:
        _handle_children(before)


def _ignore_children() -> None:
    """Take away the handler of SIGCHLD that a DataLoader sets, this one or one of the caller's: it raises wherever the
    program is, such as in the release of a lease. Waiting for a batch reports a death within seconds anyway."""
    handler = signal.getsignal(signal.SIGCHLD)
    if str(getattr(handler, "__module__", "")).startswith("torch."):
        _handle_children(signal.SIG_DFL)


def _handle_children(handler: Any) -> None:
    # Only the main thread can set handlers, PyTorch's loader too.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _worker_deaths_reported() -> Iterator[None]:
    """Turn what PyTorch raises when a worker process was killed into a DataError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # A batch that its worker could not hand over any more breaks off as a connection does. What a worker itself
        # raises is told as "Caught ...".
        if str(error).startswith("Caught ") or (isinstance(error, RuntimeError) and "worker (pid" not in str(error)):
            raise
        raise DataError(
            f"a decoding process died ({one_line(error)}), perhaps because memory ran out; what "
            "was committed stays: run the same command again, with fewer --workers"
        ) from error


def _ahead(make: Callable[[Span], DecodedBatch], spans: Iterable[Span]) -> Iterator[DecodedBatch]:
    """The batches in order, made by threads (decoding leaves the interpreter alone) while the ones before are used;
    what they raise is raised here."""
    before = torch.get_num_threads()
    pending: deque[Future[DecodedBatch]] = deque()
    # One thread each: a resize in each of them must not ask for every core.
    pool = ThreadPoolExecutor(_THREADS, "softlabel-decode", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for span in spans:
            pending.append(pool.submit(make, span))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _as_it_is(batch: Any) -> Any:
    return batch
