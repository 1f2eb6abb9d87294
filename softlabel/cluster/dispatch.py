"""Shards through a cluster: a window of requests out, outcomes back, dead workers' shards again and alone."""

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

WINDOW = 1.75  # shards in flight for each worker, which labels one at a time: the next one is there when one ends
BUNDLE_SECONDS = 0.5  # of work in flight for each worker at least, where shards are shorter
MOST_IN_BUNDLE = 100
ALONE_TRIES = 3  # processes of its own that a shard may take with it
TRIES = 4  # where storage fails, or a worker is lost without a shard being blamed
BREAK_AFTER = 8  # failures before the first success, or of storage since the last one: it is not these shards
PAUSED_SECONDS = 120.0  # in which no worker takes anything
REFILL_SECONDS = 30.0  # between two times that lost workers are asked for anew
LOST_SECONDS = 30.0  # without a sign of the scheduler
ANSWER_SECONDS = 8.0  # for the scheduler to say something
ASK_SECONDS = 5.0  # between two looks at the cluster
FIRST_LIMIT = 3600.0  # a shard's seconds while nothing is known about their length
LEAST_LIMIT = 120.0
SLOW = 3.0  # times the median: a straggler, which an idle worker may do as well


@dataclass(slots=True)
class _Flight:
    """A shard on its way: how often it was tried, and the futures that may bring its outcome."""

    number: int
    tries: int = 0
    deaths: int = 0
    alone: bool = False
    why: str = "it was lost on its way"
    since: float = 0.0
    copies: list[Future] = field(default_factory=list)


class Drive:
    """Brings shards through a cluster: one call of `run`.

    Args:
        client: of the cluster.
        request: what a worker must know.
        keys: the digest of a shard's keys, which a worker compares with those that it reads.
        commit: takes the outcomes of published shards; called in this thread alone, with those that arrived together.
        limit: seconds after which a shard counts as hung; None: 20 times the usual, at least two minutes.
        work, alone: what a worker runs, and what it runs for a shard whose worker died.
        refill: asks for workers in the place of lost ones; called now and then.
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
        self._flying: dict[int, _Flight] = {}
        self._arrived: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._later: list[tuple[float, _Flight]] = []
        self._seconds: deque[float] = deque(maxlen=201)
        self._rates: dict[str, float] = {}
        self._workers = 1
        self._seen = self._asked = time.monotonic()
        self._names = 0  # of tasks that were sent
        self._refused = 0  # failures of storage since the last success
        self._paused: float | None = None  # since when no worker takes anything
        self._refilled = time.monotonic()

    def run(self, numbers: Sequence[int]) -> list[Outcome]:
        """Label these shards; returns those that could not be, each with its reason.

        Raises:
            ClusterLostError: the scheduler is gone; what was committed stays.
            UsageError: Dask has paused all workers.
            DataError, StoreError: nothing succeeds, for the reason of the first failures; or a worker has other data
                or teachers, or a bad image, where that stops the run.
        """
        self._waiting.extend(_Flight(number) for number in numbers)
        self._ask(force=True)
        try:
            while self._waiting or self._flying or self._later:
                self._launch()
                self._settle(self._landed())
                self._ask()
                self._second_copies()
        finally:
            left = [future for flight in self._flying.values() for future in flight.copies]
            if left and self.client.status == "running":
                with contextlib.suppress(Exception):
                    cancel(self.client, left, timeout=5)
        assert self.done + len(self.failed) == len(numbers)
        return self.failed

    # ---- out ----

    def _launch(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove(entry)
            self._waiting.appendleft(entry[1])
        room = self._window() - len(self._flying)
        going = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for flight in going:
            flight.tries += 1
            self._flying[flight.number] = flight
        for alone in (False, True):
            self._submit([flight for flight in going if flight.alone == alone])

    def _window(self) -> int:
        # Shards of a moment come and go in bundles, or talking about them would take longer than they do.
        usual = statistics.median(self._seconds) if len(self._seconds) >= 3 else BUNDLE_SECONDS
        bundle = min(MOST_IN_BUNDLE, max(1.0, BUNDLE_SECONDS / max(usual, 1e-6)))
        return max(2, round(WINDOW * self._workers * bundle))

    def _submit(self, flights: Sequence[_Flight]) -> None:
        """Send flights of one kind off, in one message."""
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
                limit=self._limit(),
            )
        except Exception as error:
            if isinstance(error, OSError) or self.client.status != "running":
                raise self._lost(error) from error
            raise
        for flight, future in zip(flights, futures, strict=True):
            flight.copies.append(future)
            future.add_done_callback(functools.partial(self._arrive, flight.number))

    def _arrive(self, number: int, future: Future) -> None:
        self._arrived.put((number, future))

    def _limit(self) -> float:
        if self.limit is not None:
            return self.limit
        if len(self._seconds) < 3:
            return FIRST_LIMIT
        return max(LEAST_LIMIT, 20 * statistics.median(self._seconds))

    def _second_copies(self) -> None:
        """At the end, let idle workers do again what others are slow with; the first to end counts."""
        if self._waiting or self._later or len(self._seconds) < 3 or len(self._flying) >= self._workers:
            return
        slow = SLOW * statistics.median(self._seconds) + 5
        for flight in self._flying.values():
            if len(flight.copies) == 1 and not flight.alone and time.monotonic() - flight.since > slow:
                log.info("shard %d is slow; another worker does it as well", flight.number)
                self._submit([flight])

    # ---- back ----

    def _landed(self) -> list[tuple[int, Future]]:
        """What arrived since, after waiting up to a second for the first."""
        landed = []
        with contextlib.suppress(queue.Empty):
            landed.append(self._arrived.get(timeout=1.0))
            if len(self._flying) > 2 * WINDOW * self._workers:
                time.sleep(BUNDLE_SECONDS / 4)  # they come in bundles
            while True:
                landed.append(self._arrived.get_nowait())
        return [(number, future) for number, future in landed if number in self._flying]

    def _settle(self, landed: Sequence[tuple[int, Future]]) -> None:
        # Looked at once: Dask may find a lost result again while others are fetched.
        good: list[tuple[int, Future]] = []
        others: list[tuple[int, Future]] = []
        for number, future in landed:
            (good if future.status == "finished" else others).append((number, future))
        outcomes = self._gather([future for _, future in good])
        published, rows = [], 0
        for (number, future), outcome in zip(good, outcomes, strict=True):
            if outcome is None:  # its worker died between the answer and our question
                self._gone(number, future)
            elif (flight := self._flying.get(number)) is not None:
                self._seconds.append(outcome.seconds)
                if outcome.record is None:
                    self._failed(flight, outcome)
                    continue
                del self._flying[number]
                published.append(outcome)
                count = outcome.record.rows + len(outcome.record.bad)
                rows += count
                self._rates[outcome.worker] = count / max(outcome.seconds, 1e-9)
        for number, future in others:
            self._gone(number, future)
        if published:
            self.commit(published)
            self.done += len(published)
            self._refused = 0
            self._show(rows)

    def _gather(self, futures: Sequence[Future]) -> list[Outcome | None]:
        if not futures:
            return []
        try:
            return gather(self.client, futures, timeout=ANSWER_SECONDS)
        except Exception as error:
            log.debug("gather: %s", error)
        if not self._ask(force=True):
            return [None] * len(futures)
        # Some worker took its answers with it; those of the others are still there.
        return [self._one(future) for future in futures]

    def _one(self, future: Future) -> Outcome | None:
        try:
            outcome: Outcome = future.result(timeout=ANSWER_SECONDS)
        except Exception as error:
            log.debug("gather: %s", error)
            return None
        return outcome

    def _gone(self, number: int, future: Future) -> None:
        """A future without an outcome: its worker died, or Dask lost or cancelled it, or our code raised there."""
        flight = self._flying.get(number)
        if flight is None or future not in flight.copies:
            return
        flight.copies.remove(future)
        if future.status == "error":
            error = future.exception(timeout=ANSWER_SECONDS)
            assert error is not None, "the future's status is error"
            flight.why = "its worker died" if isinstance(error, KilledWorker) else one_line(error, with_type=True)
            flight.deaths += 1
            self._alone_from_now(flight, flight.why)
        if flight.copies:
            return  # another copy is on its way
        del self._flying[number]
        if flight.deaths > ALONE_TRIES or flight.tries > TRIES + ALONE_TRIES:
            self._failed_for_good(Outcome(number=number, error=f"{flight.why}, {flight.tries} times"))
        else:
            self._waiting.appendleft(flight)

    def _failed(self, flight: _Flight, outcome: Outcome) -> None:
        if outcome.fatal:
            raise DataError(f"{outcome.error} (worker {outcome.worker})")
        del self._flying[flight.number]
        flight.copies.clear()
        if outcome.died and flight.deaths < ALONE_TRIES:
            flight.deaths += 1
            self._waiting.appendleft(flight)
        elif outcome.transient and flight.tries < TRIES:
            self._later.append((time.monotonic() + 2.0**flight.tries / 2, flight))
        elif not (outcome.transient or flight.alone):
            self._alone_from_now(flight, outcome.error)
            self._waiting.appendleft(flight)
        else:
            self._failed_for_good(outcome)

    def _alone_from_now(self, flight: _Flight, why: str) -> None:
        """A worker's fault, a broken device say, looks like the shard's until the shard fails without that worker."""
        flight.alone = True
        log.warning("shard %d: %s; it is tried again alone in a process of its own", flight.number, why)

    def _failed_for_good(self, outcome: Outcome) -> None:
        self.failed.append(outcome)
        log.warning("shard %d: %s", outcome.number, outcome.error)
        if outcome.transient:
            self._refused += 1
        enough = min(BREAK_AFTER, 2 * max(1, self._workers) + 1)
        if self._refused >= enough:
            raise StoreError(f"no shard can be stored any more; shard {outcome.number}: {outcome.error}")
        if not self.done and len(self.failed) >= enough:
            raise DataError(f"no shard succeeds; shard {outcome.number}: {outcome.error}")

    # ---- the cluster's health ----

    def _ask(self, *, force: bool = False) -> bool:
        """Look at the cluster now and then; whether the scheduler answered when it was last asked."""
        now = time.monotonic()
        if not force and now - self._asked < ASK_SECONDS:
            return self._seen >= self._asked
        self._asked = now
        try:
            workers = worker_states(self.client, timeout=ANSWER_SECONDS)
        except Exception as error:
            if now - self._seen > LOST_SECONDS or self.client.status == "closed":
                raise self._lost(error) from error
            return False
        self._seen = time.monotonic()
        if not workers and self._workers:
            log.info("waiting for workers")
        self._workers = sum(status == "running" for status in workers.values())
        self._look_for_paused(workers)
        if self.refill is not None and now - self._refilled > REFILL_SECONDS:
            self._refilled = now
            self.refill()
        self._rates = {worker: rate for worker, rate in self._rates.items() if worker in workers}
        return True

    def _look_for_paused(self, workers: dict[str, str]) -> None:
        """Dask gives no task to a worker above a share of its memory limit, and a teacher's memory never falls."""
        if self._workers or "paused" not in workers.values():
            self._paused = None
            return
        now = time.monotonic()
        remedy = "start workers with '--memory-limit 0', or with more memory"
        if self._paused is None:
            self._paused = now
            log.warning("Dask has paused all %d workers, whose memory is near their limit; %s", len(workers), remedy)
        elif now - self._paused > PAUSED_SECONDS:
            raise UsageError(f"all {len(workers)} workers are paused, their memory is near their limit; {remedy}")

    def _lost(self, error: BaseException) -> ClusterLostError:
        return ClusterLostError(
            f"the scheduler is gone ({type(error).__name__}); what was committed is kept: run the same command again"
        )

    def _show(self, rows: int) -> None:
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
