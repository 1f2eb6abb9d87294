"""A client of the cluster that a run asks for: one that runs already, or one that is started for it."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import dask
from distributed import Client, LocalCluster

from softlabel.deployment import ClusterKind, Deployment
from softlabel.errors import UsageError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextlib.contextmanager
def connected(deployment: Deployment) -> Iterator[Client]:
    """A client of a running scheduler, or of a cluster that lives as long as the block.

    Raises:
        UsageError: no scheduler answers there, or the package of this kind of cluster is absent.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        where: Any = deployment.scheduler
        if deployment.cluster is not None:
            stack.enter_context(dask.config.set(_settings()))
            where = stack.enter_context(_cluster(deployment.cluster, deployment.workers, dict(deployment.options)))
        try:
            client = stack.enter_context(Client(where, timeout="20s", set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            raise UsageError(
                f"--scheduler {deployment.scheduler}: no scheduler answers there ({type(error).__name__}); "
                "start one with 'dask scheduler', or check the address"
            ) from None
        yield client


def _settings() -> dict[str, Any]:
    """Dask's settings for clusters that we start, where the user has not set them."""
    wanted: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 0,  # the first death says enough: we retry alone
        "distributed.scheduler.worker-ttl": "60s",
        "distributed.worker.memory.target": False,  # nothing of ours lies in Dask's memory: spilling cannot help
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        # Its looks at the stack, a hundred a second, would be what a worker does most beside labelling.
        "distributed.worker.profile.interval": "100ms",
    }
    return {name: value for name, value in wanted.items() if not _set_by_user(name)}


def _set_by_user(name: str) -> bool:
    """Whether an environment variable says otherwise: DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL for worker-ttl."""
    return f"DASK_{name.replace('.', '__').replace('-', '_').upper()}" in {key.upper() for key in os.environ}


@contextlib.contextmanager
def _cluster(kind: ClusterKind, workers: int | None, options: dict[str, Any]) -> Iterator[Any]:
    if kind == "local":
        cores = os.cpu_count() or 1
        count = workers or cores
        threads = max(1, cores // count)
        with dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": threads for name in _THREADS}):
            settings = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
            settings = {**settings, "silence_logs": logging.CRITICAL, **options}
            with _made(kind, LocalCluster, settings) as made:
                yield made
        return
    package, place, name = {
        "slurm": ("dask-jobqueue", "dask_jobqueue", "SLURMCluster"),
        "kubernetes": ("dask-kubernetes", "dask_kubernetes.operator", "KubeCluster"),
        "cuda": ("dask-cuda", "dask_cuda", "LocalCUDACluster"),
    }[kind]
    try:
        module = __import__(place, fromlist=[name])
    except ImportError as error:
        raise UsageError(
            f"--cluster {kind}: needs the package {package} ({error}); pip install 'softlabel[{kind}]'"
        ) from None
    if kind == "cuda" and workers is not None:
        options = {"n_workers": workers, **options}
    with _made(kind, getattr(module, name), options) as made:
        if kind != "cuda" and workers is not None:
            made.scale(workers)
        yield made


def _made(kind: ClusterKind, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """A cluster of somebody else's class. What it says about its arguments, in words of its own, is for the user.

    Raises:
        UsageError: it cannot be made so.
    """
    try:
        return make(**options)
    except Exception as error:
        first: BaseException = error  # "Nanny failed to start" is the end of a chain that begins with the reason
        while (before := first.__cause__ or first.__context__) is not None:
            first = before
        reason = " ".join(str(first).split())[:300] or type(first).__name__
        raise UsageError(
            f"--cluster {kind}: cannot be started: {reason}; its arguments are those in the file of --cluster-options"
        ) from error
