"""Dispatch shards to a cluster: a window of requests in flight; shards of dead workers are retried alone."""

import contextlib
import dataclasses
import functools
import logging
import queue
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from softlabel.cluster.client_internals import cancel, gather, worker_states
from softlabel.errors import ClusterLostError, DataError, StoreError, UsageError, one_line
from softlabel.generation.progress import Progress
from softlabel.generation.worker import Outcome, Request, label_alone, label_one

log = logging.getLogger("softlabel")

Work = Callable[[Request, int, str, float, str], Outcome]

WINDOW = 1.75  # shards in flight per worker, which labels one at a time, so that the next one is ready
BUNDLE_SECONDS = 0.5  # minimal work in flight per worker, for short shards
MOST_IN_BUNDLE = 100
ALONE_TRIES = 3  # tries of a shard in a separate process
TRIES = 4  # tries of a shard after storage errors or lost workers
BREAK_AFTER = 8  # failures before the first success, or of storage since the last, after which the run stops
PAUSED_SECONDS = 120.0  # timeout while all workers are paused
REFILL_SECONDS = 30.0  # interval of requests to replace lost workers
LOST_SECONDS = 30.0  # timeout without an answer of the scheduler
ANSWER_SECONDS = 8.0  # timeout of a scheduler call
ASK_SECONDS = 5.0  # interval of cluster checks
FIRST_LIMIT = 3600.0  # timeout of a shard before three are done
LEAST_LIMIT = 120.0
SLOW = 3.0  # times the median duration of a straggler, which an idle worker repeats


@dataclass(slots=True)
class _Flight:
    """A shard in flight: how often it was tried, and the futures that may return its outcome."""

    number: int
    tries: int = 0
    deaths: int = 0
    alone: bool = False
    why: str = "it was lost in transit"
    since: float = 0.0
    copies: list[Future] = field(default_factory=list)


class Dispatcher:
    """Labels shards on a cluster, in one call of `run`.

    Args:
        client: of the cluster.
        request: for the workers.
        keys: returns the digest of a shard's keys, which a worker compares with those that it reads.
        commit: receives outcomes of published shards; called only in this thread.
        limit: timeout of a shard in seconds; None: 20 times the median, at least two minutes.
        work, alone: function that a worker runs, and the one for a shard whose worker died.
        refill: requests workers to replace lost ones.
        progress: advanced by committed rows.
    """

    def __init__(
        self,
        client: Client,
        request: Request,
        keys: Callable[[int], str | int],
        commit: Callable[[Sequence[Outcome]], object],
        *,
        limit: float | None = None,
        work: Work = label_one,
        alone: Work = label_alone,
        refill: Callable[[], object] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.client, self.request, self.keys, self.commit = client, request, keys, commit
        self.limit, self.work, self.alone, self.refill = limit, work, alone, refill
        self.progress = progress or Progress()
        self.done = 0
        self.failed: list[Outcome] = []
        self._waiting: deque[_Flight] = deque()
        self._in_flight: dict[int, _Flight] = {}
        self._arrived: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._later: list[tuple[float, _Flight]] = []
        self._seconds: deque[float] = deque(maxlen=201)
        self._rates: dict[str, float] = {}
        self._workers = 1
        self._seen = self._asked = time.monotonic()
        self._names = 0  # number of tasks sent
        self._refused = 0  # storage failures since the last success
        self._paused: float | None = None  # time since which all workers are paused
        self._refilled = time.monotonic()

    def run(self, numbers: Sequence[int]) -> list[Outcome]:
        """Label shards.

        Returns:
            The failed shards with their errors.

        Raises:
            ClusterLostError: the scheduler is gone; committed shards stay.
            UsageError: Dask has paused all workers.
            DataError, StoreError: no shard succeeds; or a worker has other data or teachers, or a bad image with
                `on_bad_image="error"`.
        """
        self._waiting.extend(_Flight(number) for number in numbers)
        self._check_cluster(force=True)
        try:
            while self._waiting or self._in_flight or self._later:
                self._launch()
                self._process(self._receive())
                self._check_cluster()
                self._copy_stragglers()
        finally:
            left = [future for flight in self._in_flight.values() for future in flight.copies]
            if left and self.client.status == "running":
                with contextlib.suppress(Exception):
                    cancel(self.client, left, timeout=5)
        assert self.done + len(self.failed) == len(numbers)
        return self.failed

    def _launch(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove(entry)
            self._waiting.appendleft(entry[1])
        room = self._choose_window() - len(self._in_flight)
        going = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for flight in going:
            flight.tries += 1
            self._in_flight[flight.number] = flight
        for alone in (False, True):
            self._submit([flight for flight in going if flight.alone == alone])

    def _choose_window(self) -> int:
        # Very short shards are sent in bundles to reduce overhead.
        usual = statistics.median(self._seconds) if len(self._seconds) >= 3 else BUNDLE_SECONDS
        bundle = min(MOST_IN_BUNDLE, max(1.0, BUNDLE_SECONDS / max(usual, 1e-6)))
        return max(2, round(WINDOW * self._workers * bundle))

    def _submit(self, flights: Sequence[_Flight]) -> None:
        """Submit flights of one kind in one message."""
        if not flights:
            return
        alone = flights[0].alone
        keys = [self.keys(flight.number) for flight in flights]
        names = []
        for flight in flights:
            self._names += 1
            flight.since = time.monotonic()
            names.append(f"softlabel-{self.request.session}-{flight.number}-{self._names}")
        try:
            futures = self.client.map(
                _on_worker,
                [flight.number for flight in flights],
                keys,
                key=names,
                pure=False,
                retries=0,
                priority=10 if alone else 0,
                work=self.alone if alone else self.work,
                request=self.request,
                limit=self._choose_limit(),
            )
        except Exception as error:
            if isinstance(error, OSError) or self.client.status != "running":
                raise self._make_lost_error(error) from error
            raise
        for flight, future in zip(flights, futures, strict=True):
            flight.copies.append(future)
            future.add_done_callback(functools.partial(self._arrive, flight.number))

    def _arrive(self, number: int, future: Future) -> None:
        self._arrived.put((number, future))

    def _choose_limit(self) -> float:
        if self.limit is not None:
            return self.limit
        if len(self._seconds) < 3:
            return FIRST_LIMIT
        return max(LEAST_LIMIT, 20 * statistics.median(self._seconds))

    def _copy_stragglers(self) -> None:
        """At the end, let idle workers repeat slow shards; the first outcome counts."""
        if self._waiting or self._later or len(self._seconds) < 3 or len(self._in_flight) >= self._workers:
            return
        slow = SLOW * statistics.median(self._seconds) + 5
        for flight in self._in_flight.values():
            if len(flight.copies) == 1 and not flight.alone and time.monotonic() - flight.since > slow:
                log.info("shard %d is slow; another worker labels it too", flight.number)
                self._submit([flight])

    def _receive(self) -> list[tuple[int, Future]]:
        """Return futures that completed, after waiting up to a second for the first."""
        arrived = []
        with contextlib.suppress(queue.Empty):
            arrived.append(self._arrived.get(timeout=1.0))
            if len(self._in_flight) > 2 * WINDOW * self._workers:
                time.sleep(BUNDLE_SECONDS / 4)  # they come in bundles
            while True:
                arrived.append(self._arrived.get_nowait())
        return [(number, future) for number, future in arrived if number in self._in_flight]

    def _process(self, arrived: Sequence[tuple[int, Future]]) -> None:
        # Read each status once: it may change while others are fetched.
        good: list[tuple[int, Future]] = []
        others: list[tuple[int, Future]] = []
        for number, future in arrived:
            (good if future.status == "finished" else others).append((number, future))
        outcomes = self._gather([future for _, future in good])
        published, rows = [], 0
        for (number, future), outcome in zip(good, outcomes, strict=True):
            if outcome is None:  # its worker died before the result was fetched
                self._handle_lost(number, future)
            elif (flight := self._in_flight.get(number)) is not None:
                self._seconds.append(outcome.seconds)
                if outcome.record is None:
                    self._handle_failure(flight, outcome)
                    continue
                del self._in_flight[number]
                published.append(outcome)
                count = outcome.record.rows + len(outcome.record.bad)
                rows += count
                self._rates[outcome.worker] = count / max(outcome.seconds, 1e-9)
        for number, future in others:
            self._handle_lost(number, future)
        if published:
            self.commit(published)
            self.done += len(published)
            self._refused = 0
            self._report(rows)

    def _gather(self, futures: Sequence[Future]) -> list[Outcome | None]:
        if not futures:
            return []
        try:
            return gather(self.client, futures, timeout=ANSWER_SECONDS)
        except Exception as error:
            log.debug("gather: %s", error)
        if not self._check_cluster(force=True):
            return [None] * len(futures)
        # A worker was lost with its results; fetch those of the others.
        return [self._fetch_one(future) for future in futures]

    def _fetch_one(self, future: Future) -> Outcome | None:
        try:
            outcome: Outcome = future.result(timeout=ANSWER_SECONDS)
        except Exception as error:
            log.debug("gather: %s", error)
            return None
        return outcome

    def _handle_lost(self, number: int, future: Future) -> None:
        """Handle a future without an outcome: its worker died, Dask lost or cancelled it, or our code raised."""
        flight = self._in_flight.get(number)
        if flight is None or future not in flight.copies:
            return
        flight.copies.remove(future)
        if future.status == "error":
            error = future.exception(timeout=ANSWER_SECONDS)
            assert error is not None, "the future's status is error"
            flight.why = "its worker died" if isinstance(error, KilledWorker) else one_line(error, with_type=True)
            flight.deaths += 1
            self._isolate(flight, flight.why)
        if flight.copies:
            return  # another copy is in flight
        del self._in_flight[number]
        if flight.deaths > ALONE_TRIES or flight.tries > TRIES + ALONE_TRIES:
            self._give_up(Outcome(number=number, error=f"{flight.why}, {flight.tries} times"))
        else:
            self._waiting.appendleft(flight)

    def _handle_failure(self, flight: _Flight, outcome: Outcome) -> None:
        if outcome.fatal:
            raise DataError(f"{outcome.error} (worker {outcome.worker})")
        del self._in_flight[flight.number]
        flight.copies.clear()
        if outcome.died and flight.deaths < ALONE_TRIES:
            flight.deaths += 1
            self._waiting.appendleft(flight)
        elif outcome.transient and flight.tries < TRIES:
            self._later.append((time.monotonic() + 2.0**flight.tries / 2, flight))
        elif not (outcome.transient or flight.alone):
            self._isolate(flight, outcome.error)
            self._waiting.appendleft(flight)
        else:
            self._give_up(outcome)

    def _isolate(self, flight: _Flight, why: str) -> None:
        """Retry a shard in a separate process, to distinguish its fault from a worker's (e.g. a broken device)."""
        flight.alone = True
        log.warning("shard %d: %s; retrying it alone in a separate process", flight.number, why)

    def _give_up(self, outcome: Outcome) -> None:
        self.failed.append(outcome)
        log.warning("shard %d: %s", outcome.number, outcome.error)
        if outcome.transient:
            self._refused += 1
        enough = min(BREAK_AFTER, 2 * max(1, self._workers) + 1)
        if self._refused >= enough:
            raise StoreError(f"no shard can be stored; shard {outcome.number}: {outcome.error}")
        if not self.done and len(self.failed) >= enough:
            raise DataError(f"no shard succeeds; shard {outcome.number}: {outcome.error}")

    def _check_cluster(self, *, force: bool = False) -> bool:
        """Check the cluster at intervals; return whether the scheduler answered the last check."""
        now = time.monotonic()
        if not force and now - self._asked < ASK_SECONDS:
            return self._seen >= self._asked
        self._asked = now
        try:
            workers = worker_states(self.client, timeout=ANSWER_SECONDS)
        except Exception as error:
            if now - self._seen > LOST_SECONDS or self.client.status == "closed":
                raise self._make_lost_error(error) from error
            return False
        self._seen = time.monotonic()
        if not workers and self._workers:
            log.info("waiting for workers")
        self._workers = sum(status == "running" for status in workers.values())
        self._check_paused(workers)
        if self.refill is not None and now - self._refilled > REFILL_SECONDS:
            self._refilled = now
            self.refill()
        self._rates = {worker: rate for worker, rate in self._rates.items() if worker in workers}
        return True

    def _check_paused(self, workers: dict[str, str]) -> None:
        """Raise UsageError if all workers stay paused: Dask pauses a worker near its memory limit."""
        if self._workers or "paused" not in workers.values():
            self._paused = None
            return
        now = time.monotonic()
        remedy = "start workers with '--memory-limit 0', or with more memory"
        if self._paused is None:
            self._paused = now
            log.warning("Dask has paused all %d workers, which are near their memory limit; %s", len(workers), remedy)
        elif now - self._paused > PAUSED_SECONDS:
            raise UsageError(f"all {len(workers)} workers are paused near their memory limit; {remedy}")

    def _make_lost_error(self, error: BaseException) -> ClusterLostError:
        return ClusterLostError(
            f"the scheduler is gone ({type(error).__name__}); committed shards are kept: rerun the command"
        )

    def _report(self, rows: int) -> None:
        note = f"{self._workers} workers"
        if self._rates:
            slowest = min(self._rates, key=self._rates.__getitem__)
            usual = statistics.median(self._rates.values())
            note += f", {usual:,.0f} rows/s each, slowest {self._rates[slowest]:,.0f}"
        self.progress.count(rows, note)


def _on_worker(number: int, keys: str, *, work: Work, request: Request, limit: float) -> Outcome:
    from distributed import get_worker

    try:
        name = get_worker().address
    except ValueError:
        name = ""
    return dataclasses.replace(work(request, number, keys, limit, name), worker=name)
