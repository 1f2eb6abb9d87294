"""Generation on a Dask cluster.

    plan minus manifest -> window of shards in flight -> label_one on a worker -> record -> commit (only here)

Dask places tasks and reports lost workers; the store guarantees correctness. Only requests and records are sent, never
arrays or models. A shard may run twice or late: it is published under its content hash, and the first record wins.

Properties of Dask that the code depends on: it blames all shards of a dead worker for its death (`KilledWorker`), so
each is retried alone in a separate process; results of a lost scheduler never arrive, so its health is polled; resource
limits disable the scheduler's queue, so none are set; the nanny sets MALLOC_TRIM_THRESHOLD_, which freezes the C
library's limits, so workers set them (see `generation.malloc`).
"""

import functools
import logging
import uuid
from collections.abc import Sequence

from softlabel.cluster.connect import connected
from softlabel.cluster.deployment import Deployment
from softlabel.cluster.dispatch import Dispatcher
from softlabel.cluster.modules import upload_modules
from softlabel.common.places import absolute_root
from softlabel.errors import DataError
from softlabel.generation.job import Job
from softlabel.generation.progress import Progress
from softlabel.generation.worker import Outcome, Request
from softlabel.store.manifest import ShardPlan
from softlabel.store.writer import Committer

log = logging.getLogger("softlabel")


class DaskExecutor:
    """Labels shards on the workers of a Dask cluster; an `Executor` for `softlabel.generate`."""

    in_process = False

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    def label(self, job: Job, committer: Committer, missing: Sequence[ShardPlan], progress: Progress) -> None:
        """See `Executor.label`.

        Raises:
            DataError: some shards could not be labelled; the others are committed.
            ClusterLostError: the scheduler is gone.
            UsageError: the cluster cannot be started or reached, or all workers are paused.
        """
        committer.publish()
        deployment = self.deployment
        request = Request(
            session=uuid.uuid4().hex,
            out=absolute_root(committer.url),
            run=job.run.fingerprint(),
            data=str(job.recorded["data"]),
            teachers=tuple(job.recorded["teachers"]),
            device=job.config.device,
            on_bad_image=job.config.on_bad_image,
            threads=job.config.threads,
            members_in_turn=job.config.members_in_turn,
        )

        def keys(number: int) -> str:
            plan = job.run.shard(number)
            return job.labeller.source.digest(plan.start, plan.stop)

        def commit(outcomes: Sequence[Outcome]) -> None:
            records = [outcome.record for outcome in outcomes if outcome.record is not None]
            committer.commit(*records)
            for outcome, record in zip(outcomes, records, strict=True):
                progress.add_shard(
                    rows=record.rows,
                    bad=record.bad,
                    correct=outcome.correct,
                    labelled=outcome.labelled,
                    truncated=outcome.truncated,
                )

        with connected(deployment) as client:
            if client.dashboard_link:
                log.info("dashboard: %s", client.dashboard_link)
            upload_modules(client, request.teachers)
            refill = None
            if deployment.cluster == "slurm":  # jobs that reach their walltime are not replaced
                refill = functools.partial(client.cluster.scale, deployment.cluster_workers)
            dispatcher = Dispatcher(
                client, request, keys, commit, limit=deployment.shard_seconds, refill=refill, progress=progress
            )
            failed = dispatcher.run([plan.number for plan in missing])
        if failed:
            listed = "; ".join(f"shard {one.number}: {one.error}" for one in failed[:3])
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise DataError(
                f"{committer.url}: {len(failed)} of {len(missing)} shards could not be labelled, the others are kept: "
                f"{listed}{more}; fix them and rerun the command"
            )
