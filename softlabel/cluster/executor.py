"""Generation past one machine, on Dask: which worker labels which shard, and what happens when one of them dies.

    plan minus manifest -> window of shards in flight -> label_one on a worker -> record -> commit (here, nowhere else)

Dask is trusted with placement and with telling us that a worker is gone; the store carries correctness. Requests and
records travel, arrays and models never do. A shard may run twice or late: it is published under the hash of its bytes,
and the first record of a shard wins.

Of Dask's ways these are met here: a dead worker's shards are all blamed for its death (`KilledWorker`), so each of them
is tried again alone in a fresh process before it is called bad; results of a lost scheduler never arrive, so its health
is asked for beside waiting for them; resource limits switch off the scheduler's queue, so none are used; the nanny's
MALLOC_TRIM_THRESHOLD_ freezes the C library's limits, which workers therefore set themselves (see `generation.malloc`).
"""

import functools
import logging
import uuid
from collections.abc import Sequence

from softlabel.cluster.connect import connected
from softlabel.cluster.deployment import Deployment
from softlabel.cluster.dispatch import Drive
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
            UsageError: the cluster cannot be started or reached, or takes no work.
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
                progress.add_shard(rows=record.rows, bad=record.bad, correct=outcome.correct, labelled=outcome.labelled)

        with connected(deployment) as client:
            if client.dashboard_link:
                log.info("dashboard: %s", client.dashboard_link)
            upload_modules(client, request.teachers)
            refill = None
            if deployment.cluster == "slurm":  # a job that ends by its walltime leaves nobody in its place
                refill = functools.partial(client.cluster.scale, deployment.cluster_workers)
            drive = Drive(
                client, request, keys, commit, limit=deployment.shard_seconds, refill=refill, progress=progress
            )
            failed = drive.run([plan.number for plan in missing])
        if failed:
            listed = "; ".join(f"shard {one.number}: {one.error}" for one in failed[:3])
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise DataError(
                f"{committer.url}: {len(failed)} of {len(missing)} shards could not be labelled, the others are kept: "
                f"{listed}{more}; fix them and rerun the command"
            )
