"""Where a run is labelled when it is not in this process, and names that mean the same to every process of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from softlabel.errors import UsageError

ClusterKind = Literal["local", "slurm", "kubernetes", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A Dask cluster: one that runs already, or one that lives as long as the run.

    Attributes:
        scheduler: address of a running one, such as ``tcp://10.0.0.1:8786``.
        cluster: ``local`` starts processes on this machine; ``slurm``, ``kubernetes`` and ``cuda`` use dask-jobqueue,
            dask-kubernetes and dask-cuda.
        workers: how many of a cluster's workers; None: one for each core of this machine, or what `options` say.
        options: further arguments of the cluster's class.
        shard_seconds: after which a shard counts as hung and its worker is ended; None: 20 times what shards take, at
            least two minutes.
    """

    scheduler: str | None = None
    cluster: ClusterKind | None = None
    workers: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    shard_seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.scheduler is None) == (self.cluster is None):
            raise UsageError("deployment: expected the address of a scheduler or a kind of cluster, one of the two")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers: expected at least 1 on a cluster, found {self.workers}")
        if self.shard_seconds is not None and not 0 < self.shard_seconds < float("inf"):
            raise UsageError(f"shard_seconds: expected a number above 0, found {self.shard_seconds}")
        if self.scheduler is not None and (self.workers is not None or self.options):
            raise UsageError("workers and cluster options belong to a cluster that is started, not to --scheduler")


def absolute(text: str) -> str:
    """A SOURCE or SPEC whose local paths are absolute: workers have working directories of their own."""
    head, mark, tail = text.partition("?")
    if os.path.exists(text):
        return os.path.abspath(text)
    if os.path.exists(head):
        head = os.path.abspath(head)
    else:
        kind, colon, name = head.partition(":")
        place, at, checkpoint = head.partition("@")
        if at and os.path.exists(checkpoint):
            head = f"{place}@{os.path.abspath(checkpoint)}"
        elif colon and os.path.exists(name):
            head = f"{kind}:{os.path.abspath(name)}"
    options = [part.partition("=") for part in tail.split("&")] if tail else []
    joined = "&".join(
        f"{key}{equals}{os.path.abspath(value) if key == 'root' or value.endswith('.npy') else value}"
        for key, equals, value in options
    )
    return f"{head}{mark}{joined}"


def absolute_root(out: str | os.PathLike[str]) -> str:
    """A store's folder as every worker reaches it; URLs stay."""
    text = os.fspath(out)
    return text if "://" in text else os.path.abspath(text)
