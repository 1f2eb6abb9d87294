"""Overlap decoding, computing, copying and writing of batches.

On a CPU a few lanes run in parallel, each decoding and labelling batches with few threads. A GPU has one lane, which
only launches work: processes decode, a thread copies batches to page-locked memory, and results are awaited two batches
later.
"""

import contextlib
import itertools
import logging
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from softlabel.common.device import out_of_memory
from softlabel.errors import TeacherError, one_line
from softlabel.generation.assemble import LabelledShard, assemble
from softlabel.generation.batch_labels import BatchLabels
from softlabel.generation.input_reader import DecodedBatch, Span
from softlabel.generation.labeller import Labeller, Lane
from softlabel.generation.progress import Progress
from softlabel.generation.transfer import pin
from softlabel.models.precision import ieee_float32
from softlabel.store.manifest import ShardPlan

T = TypeVar("T")

log = logging.getLogger("softlabel")

_AHEAD = 2  # batches per lane that are done or pending


def label_shard(plan: ShardPlan, labeller: Labeller) -> LabelledShard:
    """Label one shard. Idempotent: depends only on the plan and the labeller."""
    (shard,) = label_shards([plan], labeller)
    return shard


def label_shards(
    plans: Iterable[ShardPlan], labeller: Labeller, *, workers: int = 0, progress: Progress | None = None
) -> Generator[LabelledShard, None, None]:
    """Label shards, in order. If memory runs out, the batch size is halved and the shard restarted.

    Args:
        plans: of the shards.
        labeller: reads and labels.
        workers: decoding processes.
        progress: counts images and times.

    Raises:
        TeacherError: one image does not fit into memory, or as `Lane.scaled_logits`.
        DataError: an image is bad and `on_bad_image` is ``error``, or a decoding process died.
    """
    left, progress = deque(plans), progress or Progress()
    while left:
        try:
            for shard in _label_overlapped(tuple(left), labeller, workers, progress):
                left.popleft()
                yield shard
        except Exception as error:
            if not out_of_memory(error):
                raise
            labeller = _halve_batch(labeller, error)


def fit_batch(labeller: Labeller, compute: Callable[[Labeller], T]) -> tuple[Labeller, T]:
    """Return the labeller whose batches fit in memory, halving them as needed, and the result of `compute` with it.

    Raises:
        TeacherError: one image does not fit into memory.
    """
    while True:
        try:
            return labeller, compute(labeller)
        except Exception as error:
            if not out_of_memory(error):
                raise
            labeller = _halve_batch(labeller, error)


def _halve_batch(labeller: Labeller, error: Exception) -> Labeller:
    before = labeller.batch_size
    if before == 1:
        raise TeacherError(
            "out of memory with a single sample; use --precision bf16, a smaller input size, or a device with more "
            f"memory ({one_line(error)})"
        ) from error
    if labeller.members.device.type == "cuda":
        torch.cuda.empty_cache()
    log.warning("out of memory with batches of %d: continuing with %d", before, before // 2)
    return labeller.with_batch_size(before // 2)


def _label_overlapped(
    plans: Sequence[ShardPlan], labeller: Labeller, workers: int, progress: Progress
) -> Iterator[LabelledShard]:
    work = (
        (plan, group) for plan in plans for group in _iter_groups(labeller.spans(plan), labeller.batches_together(plan))
    )
    answers = _run_lanes(work, labeller, workers, progress)
    counted = 0  # images of an unfinished shard

    def of_shard(rows: int) -> Iterator[BatchLabels]:
        nonlocal counted
        while counted < rows:
            batch = next(answers)
            images = len(batch.keys) + len(batch.bad)
            progress.count(images)
            counted += images
            yield batch

    try:
        with ieee_float32(), contextlib.closing(answers):
            for plan in plans:
                shard = assemble(plan, labeller, of_shard(plan.stop - plan.start), progress)
                counted = 0
                yield shard
    finally:
        if counted:
            progress.count(-counted)


def _iter_groups(spans: Iterator[Span], size: int) -> Iterator[tuple[Span, ...]]:
    while group := tuple(itertools.islice(spans, size)):
        yield group


def _run_lanes(
    work: Iterator[tuple[ShardPlan, tuple[Span, ...]]], labeller: Labeller, workers: int, progress: Progress
) -> Generator[BatchLabels, None, None]:
    """Yield labelled batches in order, a bounded number ahead of the caller."""
    # Lanes of a CPU decode their own batches, so that cores are never idle.
    inside = workers == 0 and labeller.members.device.type == "cpu"
    reader = labeller.reader.one_at_a_time()
    lanes, threads = _make_lanes(labeller)
    count = lanes.qsize()

    def run(plan: ShardPlan, spans: tuple[Span, ...], ready: list[Future[DecodedBatch]] | None) -> list[BatchLabels]:
        lane = lanes.get()
        try:
            with progress.spend("waiting"):
                batches = [reader.read(span) for span in spans] if ready is None else [one.result() for one in ready]
            return lane.label(plan, batches, progress)
        finally:
            lanes.put(lane)

    ours, theirs = (work, iter(())) if inside else itertools.tee(work)
    before = torch.get_num_threads()
    pending: deque[Future[list[BatchLabels]]] = deque()
    pool = ThreadPoolExecutor(count, "softlabel-lane", initializer=torch.set_num_threads, initargs=(threads,))
    pins = ThreadPoolExecutor(1, "softlabel-pin", initializer=torch.set_num_threads, initargs=(1,))
    stream = labeller.reader.stream((span for _, spans in theirs for span in spans), workers=workers)
    try:
        for plan, spans in ours:
            ready = None
            if not inside:
                with progress.spend("waiting"):
                    ready = [pins.submit(_pin_batch, next(stream), labeller) for _ in spans]
            pending.append(pool.submit(run, plan, spans, ready))
            if len(pending) > _AHEAD * count:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        pins.shutdown(cancel_futures=True)
        stream.close()
        torch.set_num_threads(before)


def _pin_batch(batch: DecodedBatch, labeller: Labeller) -> DecodedBatch:
    """Copy a batch to page-locked memory for a GPU, or, where many are held at once, out of the memory that a process
    shares: each of its tensors holds a file descriptor."""
    if labeller.members.in_turn or labeller.members.has_buckets:
        return replace(batch, inputs=tuple(inputs.map(torch.clone) for inputs in batch.inputs))
    if labeller.members.device.type == "cpu":
        return batch
    return replace(batch, inputs=pin(batch.inputs))


def _make_lanes(labeller: Labeller) -> "tuple[queue.SimpleQueue[Lane], int]":
    """Return the lanes, and the threads per lane."""
    count, threads = labeller.tuning.lanes(labeller.members.device)
    lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    lanes.put(labeller.lane)
    if not labeller.members.in_turn:
        try:
            copies = [labeller.lane.with_replicas() for _ in range(count - 1)]
        except Exception as error:  # user code may raise anything when deep-copied
            log.info("one lane: a teacher cannot be copied (%s)", type(error).__name__)
            copies = []
        for lane in copies:
            lanes.put(lane)
    return lanes, count * threads // lanes.qsize()
