"""Which Dask cluster labels a dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from softlabel.errors import UsageError

ClusterKind = Literal["local", "slurm", "kubernetes", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A Dask cluster that runs already, or is started for the run.

    Attributes:
        scheduler: address of a running one, such as ``tcp://10.0.0.1:8786``.
        cluster: ``local`` starts processes on this machine; ``slurm``, ``kubernetes`` and ``cuda`` use dask-jobqueue,
            dask-kubernetes and dask-cuda.
        cluster_workers: number of workers to start; None: one for each core (local) or GPU (cuda) of this machine, or
            as in `cluster_options` (kubernetes); required for slurm.
        cluster_options: further arguments of the cluster's class.
        shard_seconds: timeout of a shard, after which its worker is ended; None: 20 times the median, at least two
            minutes, and an hour until three shards are done.

    Raises:
        UsageError: not exactly one of `scheduler` and `cluster` is given, or a value does not fit.
    """

    scheduler: str | None = None
    cluster: ClusterKind | None = None
    cluster_workers: int | None = None
    cluster_options: Mapping[str, Any] = field(default_factory=dict)
    shard_seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.scheduler is None) == (self.cluster is None):
            raise UsageError("deployment: expected either the address of a scheduler or a kind of cluster")
        if self.cluster_workers is not None and self.cluster_workers < 1:
            raise UsageError(f"cluster_workers: expected at least 1, found {self.cluster_workers}")
        if self.shard_seconds is not None and not 0 < self.shard_seconds < float("inf"):
            raise UsageError(f"shard_seconds: expected a number above 0, found {self.shard_seconds}")
        if self.scheduler is not None and (self.cluster_workers is not None or self.cluster_options):
            raise UsageError("cluster_workers and cluster_options are only for a cluster that the run starts")
