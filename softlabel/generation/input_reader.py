"""Read a source as batches of network inputs.

    source -> decode -> view -> shape of each member -> batch

The view of a sample depends only on (seed, key, view), never on its batch.

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

from softlabel.common.multi_hot import Labels, stack_labels
from softlabel.dataset import Source
from softlabel.dataset.subset import LockedSource
from softlabel.dataset.worker_init import begin_worker
from softlabel.errors import DataError, SoftLabelError, one_line
from softlabel.inputs.base import Inputs, InputTransform
from softlabel.inputs.batch import collate_samples, decode_samples
from softlabel.store.manifest import BadRow
from softlabel.views import Made, Views, stacked

_THREADS = min(8, os.cpu_count() or 1)  # decoding threads if there are no decoding processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One batch: `view` of the samples `start` to `stop` of the source."""

    view: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedBatch:
    """Up to B samples, decoded and collated for every distinct transform among the members.

    `labels` are class numbers or multi-hot, as the source has them. `columns` are the store's that describe the views.
    `truncated` samples are longer than a member takes. `pairs` are the inputs of the noisy copies that a view policy
    shows beside each view (`NoisePairStep.make`).
    """

    keys: list[str]
    labels: Labels
    content: np.ndarray[Any, np.dtype[np.uint64]]
    inputs: tuple[Inputs, ...]
    bad: tuple[BadRow, ...]
    columns: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    truncated: int = 0
    pairs: tuple[tuple[Inputs, ...], ...] = ()

    def with_copies(self) -> "list[DecodedBatch]":
        """The batch, then one like it of each noisy copy of its samples."""
        return [self, *(replace(self, inputs=inputs, pairs=()) for inputs in self.pairs)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputReader:
    """Turns samples of a source into batches, in this process or in workers.

    Attributes:
        source: the source.
        transforms: the distinct transforms of the members; a batch has inputs for each.
        views: makes the views; None: a view is the unchanged image.
    """

    source: Source
    transforms: tuple[InputTransform, ...]
    views: Views | None = None

    def batch(self, indices: Sequence[int], *, view: int = 0) -> DecodedBatch:
        """Read, decode and shape samples; those that cannot be decoded are listed as bad.

        Args:
            indices: of the samples.
            view: number of the view.

        Raises:
            DataError: images have different sizes, and a teacher does not resize them.
        """
        samples = self.source.read(indices)
        decoded = decode_samples(samples, self.source.inputs, name=self.source.name)
        reasons = dict(decoded.failed)  # place among the samples -> why it has no row
        there = list(decoded.items)
        made = self._make_views(list(decoded.items.values()), [samples[place].key for place in there], view)
        reasons |= {there[place]: reason for place, reason in made.failed.items()}
        there = [place for place in there if place not in reasons]
        keys = [samples[place].key for place in there]
        fixed = self.views is not None and self.views.policy.fixed
        inputs, misshapen = collate_samples(made.images, keys, self.transforms, network="teacher", fixed=fixed)
        # Of the sizes of the views, so that the same ones are misshapen.
        copies = [
            collate_samples(images, keys, self.transforms, network="teacher", fixed=fixed)[0] for images in made.pairs
        ]
        reasons |= {there[number]: reason for number, reason in misshapen.items()}
        shapely = [number for number in range(len(there)) if number not in misshapen]
        kept = [samples[there[number]] for number in shapely]
        return DecodedBatch(
            keys=[sample.key for sample in kept],
            labels=stack_labels([sample.label for sample in kept], self.source.label_width),
            content=decoded.content[[there[number] for number in shapely]],
            inputs=self._cut(inputs),
            bad=tuple(
                BadRow(index=int(indices[place]), key=samples[place].key, reason=reasons[place])
                for place in sorted(reasons)
            ),
            columns={name: column[shapely] for name, column in made.columns.items()},
            truncated=max((one.truncated for one in inputs), default=0),
            pairs=tuple(map(self._cut, copies)),
        )

    def _cut(self, inputs: Sequence[Inputs]) -> tuple[Inputs, ...]:
        return tuple(one.cut(batch) for one, batch in zip(self.transforms, inputs, strict=False))

    def _make_views(self, images: list[Tensor], keys: list[str], view: int) -> Made:
        if self.views is None or not images:
            return Made(images=images, columns={}, failed={})
        return self.views.make(stacked(images), keys, view=view, read=self._read_partners)

    def _read_partners(self, indices: Sequence[int]) -> tuple[list[str], list[Tensor | None]]:
        """Return keys and images of samples to mix with; None for an image that cannot be decoded."""
        samples = self.source.read(indices)
        images = decode_samples(samples, self.source.inputs, name=self.source.name).items
        return [sample.key for sample in samples], [images.get(place) for place in range(len(samples))]

    def read(self, span: Span) -> DecodedBatch:
        return self.batch(range(span.start, span.stop), view=span.view)

    def one_at_a_time(self) -> "InputReader":
        """Return a reader for several threads that lets one at a time read the source, which may not be thread-safe."""
        return replace(self, source=LockedSource(self.source))

    def stream(self, spans: Iterable[Span], *, workers: int) -> Generator[DecodedBatch, None, None]:
        """Yield the batches of spans, in order, prepared by worker processes, or by threads with `workers=0`.

        Raises:
            DataError: a worker process was killed; or as `batch`.
        """
        if not workers:
            yield from _read_ahead(self.one_at_a_time().read, spans)
            return
        loader = DataLoader(
            _Spans(self),
            sampler=spans,
            batch_size=None,
            num_workers=workers,
            collate_fn=_return_unchanged,
            pin_memory=False,
            worker_init_fn=begin_worker,
        )
        with _restoring_child_handler(), _reporting_dead_workers():
            batches = iter(loader)
            _remove_child_handler()
            for batch in batches:
                if isinstance(batch, SoftLabelError):
                    raise batch
                yield batch


class _Spans(Dataset[DecodedBatch | SoftLabelError]):
    """Maps a span to its batch in a worker process; the sampler yields spans, so that no list is kept."""

    def __init__(self, reader: InputReader) -> None:
        self.reader = reader

    def __getitem__(self, span: Span) -> DecodedBatch | SoftLabelError:
        try:
            return self.reader.read(span)
        except SoftLabelError as error:  # returned, because PyTorch would add a traceback to its message
            return error.with_traceback(None)


@contextmanager
def _restoring_child_handler() -> Iterator[None]:
    """Restore the handler of SIGCHLD after the block, unless a worker died: torch's handler would raise for it."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _set_child_handler(before)
        raise
    else:
        _set_child_handler(before)


def _remove_child_handler() -> None:
    """Remove the SIGCHLD handler of a DataLoader: it raises anywhere, for example while a lease is released.

    Waiting for a batch reports a dead worker within seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if str(getattr(handler, "__module__", "")).startswith("torch."):
        _set_child_handler(signal.SIG_DFL)


def _set_child_handler(handler: Any) -> None:
    # Only the main thread can set handlers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _reporting_dead_workers() -> Iterator[None]:
    """Turn PyTorch's error about a killed worker process into a DataError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # A worker that dies during a transfer breaks the connection; an error raised in a worker begins with "Caught".
        if str(error).startswith("Caught ") or (isinstance(error, RuntimeError) and "worker (pid" not in str(error)):
            raise
        raise DataError(
            f"a decoding process died ({one_line(error)}); it may have run out of memory: rerun the command with fewer "
            "--workers, committed shards are kept"
        ) from error


def _read_ahead(make: Callable[[Span], DecodedBatch], spans: Iterable[Span]) -> Iterator[DecodedBatch]:
    """Yield batches in order, prepared ahead by threads (decoding releases the interpreter lock)."""
    before = torch.get_num_threads()
    pending: deque[Future[DecodedBatch]] = deque()
    # One torch thread each, so that resizing does not use all cores in every thread.
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


def _return_unchanged(batch: Any) -> Any:
    return batch
