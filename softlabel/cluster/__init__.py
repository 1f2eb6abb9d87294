"""Generation past one machine, on Dask: which worker labels which shard, and what happens when one of them dies.

    plan minus manifest -> window of shards in flight -> label_one on a worker -> record -> commit (here, nowhere else)

Dask is trusted with placement and with telling us that a worker is gone; the store carries correctness. Requests and
records travel, arrays and models never do. A shard may run twice or late: it is published under the hash of its bytes,
and the first record of a shard wins.

Of Dask's ways these are met here: a dead worker's shards are all blamed for its death (`KilledWorker`), so each of them
is tried again alone in a fresh process before it is called bad; results of a lost scheduler never arrive, so its health
is asked for beside waiting for them; resource limits switch off the scheduler's queue, so none are used; the nanny's
MALLOC_TRIM_THRESHOLD_ freezes the C library's limits, which workers therefore set themselves (see `allocator`).
"""

import functools
import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from softlabel.cluster.connect import connected
from softlabel.cluster.dispatch import Drive
from softlabel.cluster.modules import upload_modules
from softlabel.common.places import absolute_root
from softlabel.errors import DataError
from softlabel.generation.deployment import Deployment
from softlabel.generation.job import Job
from softlabel.generation.run import Counts, Label
from softlabel.generation.worker import Outcome, Request
from softlabel.store.manifest import ShardPlan
from softlabel.store.writer import Committer

log = logging.getLogger("softlabel")


def on_cluster(deployment: Deployment, out: str | os.PathLike[str], job: Job, device: str) -> Label:
    """What labels a store's missing shards on a cluster, for `label_missing`."""

    def label(committer: Committer, missing: Sequence[ShardPlan], bar: "tqdm[Any]") -> Counts:
        committer.publish()
        request = Request(
            session=uuid.uuid4().hex,
            out=absolute_root(out),
            run=job.run.fingerprint(),
            data=str(job.recorded["data"]),
            teachers=tuple(job.recorded["teachers"]),
            device=device,
            on_bad_image=job.labeller.on_bad_image,
            threads=job.labeller.tuning.threads,
            members_in_turn=job.labeller.tuning.members_in_turn,
        )
        counts = Counts()

        def keys(number: int) -> str:
            plan = job.run.shard(number)
            return job.labeller.source.digest(plan.start, plan.stop)

        def commit(outcomes: Sequence[Outcome]) -> None:
            records = [outcome.record for outcome in outcomes if outcome.record is not None]
            committer.commit(*records)
            for outcome, record in zip(outcomes, records, strict=True):
                counts.shards += 1
                counts.good += record.rows
                counts.images += record.rows + len(record.bad)
                counts.first_bad = counts.first_bad or (record.bad[0] if record.bad else None)
                counts.correct, counts.labelled = counts.correct + outcome.correct, counts.labelled + outcome.labelled

        with connected(deployment) as client:
            if client.dashboard_link:
                log.info("dashboard: %s", client.dashboard_link)
            upload_modules(client, request.teachers)
            refill = None
            if deployment.cluster == "slurm":  # a job that ends by its walltime leaves nobody in its place
                refill = functools.partial(client.cluster.scale, deployment.workers)
            drive = Drive(client, request, keys, commit, limit=deployment.shard_seconds, refill=refill, bar=bar)
            failed = drive.run([plan.number for plan in missing])
        if failed:
            listed = "; ".join(f"shard {one.number}: {one.error}" for one in failed[:3])
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise DataError(
                f"{out}: {len(failed)} of {len(missing)} shards could not be labelled, the others are kept: {listed}"
                f"{more}; mend them and run the same command again"
            )
        return counts

    return label
