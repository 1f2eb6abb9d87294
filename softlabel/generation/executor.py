"""Executors label the shards of a run, in this process or elsewhere."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Protocol

from softlabel.generation.assemble import LabelledShard
from softlabel.generation.job import Job
from softlabel.generation.pipeline import label_shards
from softlabel.generation.progress import Progress
from softlabel.store.manifest import ShardPlan
from softlabel.store.writer import Committer, write_shard

# One shard is written and one waits while the next is computed; more would only hold memory.
WRITES_IN_FLIGHT = 2


class Executor(Protocol):
    """Labels shards and commits them.

    Attributes:
        in_process: whether it labels in this process; if not, data and teachers must be names that others can open.
    """

    in_process: bool

    def label(self, job: Job, committer: Committer, missing: Sequence[ShardPlan], progress: Progress) -> None:
        """Label and commit the missing shards, and report them to `progress`.

        Raises:
            DataError: some could not be labelled; the others are committed.
        """


class LocalExecutor:
    """Labels in this process; a thread writes and commits."""

    in_process = True

    def label(self, job: Job, committer: Committer, missing: Sequence[ShardPlan], progress: Progress) -> None:
        """Label shards as `Executor.label`; an error in writing is raised at the next shard, or at the end."""
        shards = label_shards(missing, job.labeller, workers=job.workers, progress=progress)
        with closing(shards), _open_writer(committer) as writer:
            for labelled in shards:
                shard = self.complete(labelled)
                with progress.spend("writing"):
                    writer.write(shard)
                progress.add_shard(
                    rows=len(shard.rows.keys),
                    bad=shard.bad,
                    correct=shard.correct,
                    labelled=shard.labelled,
                    truncated=shard.truncated,
                )

    def complete(self, shard: LabelledShard) -> LabelledShard:
        """Return the shard to write; a subclass may add to it."""
        return shard


class _Writer:
    """Writes shards in a thread, with at most `WRITES_IN_FLIGHT` pending."""

    def __init__(self, committer: Committer, pool: ThreadPoolExecutor) -> None:
        self._committer, self._pool = committer, pool
        self._pending: list[Future[None]] = []

    def write(self, shard: LabelledShard) -> None:
        while len(self._pending) >= WRITES_IN_FLIGHT or (self._pending and self._pending[0].done()):
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(self._publish, shard))

    def finish(self) -> None:
        for future in self._pending:
            future.result()

    def _publish(self, shard: LabelledShard) -> None:
        committer = self._committer
        record = write_shard(committer.url, committer.run, shard.plan, shard.rows, shard.bad, fidelity=shard.fidelity)
        committer.commit(record)


@contextmanager
def _open_writer(committer: Committer) -> Iterator[_Writer]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabel-writer") as pool:
        writer = _Writer(committer, pool)
        yield writer
        writer.finish()
