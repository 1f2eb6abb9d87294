"""Connect to a running cluster, or start one for the run."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
from dask.utils import parse_timedelta
from distributed import Client, LocalCluster
from distributed.comm.registry import get_backend
from distributed.core import Status, rpc
from distributed.security import Security

from softlabel.cluster.deployment import ClusterKind, Deployment
from softlabel.errors import UsageError, one_line

log = logging.getLogger("softlabel")

_ANSWER_SECONDS = 20.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextlib.contextmanager
def connected(deployment: Deployment) -> Iterator[Client]:
    """Provide a client of a running scheduler, or of a cluster started for the block.

    Raises:
        UsageError: the scheduler does not answer, or the cluster cannot be started: its package is missing, its options
            are wrong, or it refuses jobs.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        where: Any = deployment.scheduler
        if deployment.cluster is not None:
            stack.enter_context(dask.config.set(_make_settings()))
            where = stack.enter_context(
                _start_cluster(deployment.cluster, deployment.cluster_workers, dict(deployment.cluster_options))
            )
        if deployment.scheduler is not None:
            _check_address(deployment.scheduler)
            _check_scheduler(deployment.scheduler)
        try:
            client = _enter(stack, Client(where, timeout="20s", set_as_default=False))
        except Exception as error:
            asked = f"--scheduler {deployment.scheduler}" if deployment.scheduler else f"--cluster {deployment.cluster}"
            raise UsageError(
                f"{asked}: no scheduler answers there ({one_line(error, with_type=True)}); "
                "start one with 'dask scheduler', or check the address"
            ) from None
        yield client


def _enter(stack: contextlib.ExitStack, context: Any) -> Any:
    """Enter a context and log errors that Dask raises when it ends: they must not fail a finished run."""
    value = context.__enter__()

    def leave(*error: Any) -> None:
        try:
            context.__exit__(*error)
        except Exception as raised:
            log.debug("closing %s: %s", type(value).__name__, raised)

    stack.push(leave)
    return value


def _check_address(address: str) -> None:
    """Raise UsageError for an invalid address: it would leave a half-made client that logs errors at exit."""
    scheme = address.partition("://")[0] if "://" in address else "tcp"
    try:
        get_backend(scheme)
        if scheme in ("tls", "wss") and Security().get_connection_args("client")["ssl_context"] is None:
            raise ValueError("no certificates")
    except Exception as error:
        raise UsageError(
            f"--scheduler {address}: expected an address such as tcp://10.0.0.1:8786, and for tls:// certificates in "
            f"Dask's settings ({one_line(error)})"
        ) from None


def _check_scheduler(address: str) -> None:
    """Raise UsageError unless a scheduler answers: a client would wait forever for another service."""
    name = "distributed.comm.timeouts.connect"
    seconds = parse_timedelta(dask.config.get(name)) if _is_set_by_user(name) else _ANSWER_SECONDS

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return str((await there.identity())["type"])

    with ThreadPoolExecutor(1) as pool:  # this thread may have a running loop, as in a notebook
        try:
            kind = pool.submit(lambda: asyncio.run(asyncio.wait_for(ask(), seconds))).result()
        except TimeoutError:
            kind = f"no answer within {seconds:g} s"
        except Exception as error:
            kind = f"no answer ({one_line(error, with_type=True)})"
    if kind != "Scheduler":
        raise UsageError(
            f"--scheduler {address}: expected a Dask scheduler, found {kind}; its default port is 8786, that of its "
            "dashboard 8787; start one with 'dask scheduler'"
        )


def _make_settings() -> dict[str, Any]:
    """Return Dask's settings for clusters that we start, except those that the user has set."""
    wanted: dict[str, Any] = {
        "distributed.scheduler.allowed-failures": 0,  # we retry shards in separate processes ourselves
        "distributed.scheduler.worker-ttl": "60s",
        "distributed.worker.memory.target": False,  # our data is not in Dask's memory: spilling cannot help
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        # By default it samples the stack a hundred times a second.
        "distributed.worker.profile.interval": "100ms",
    }
    return {name: value for name, value in wanted.items() if not _is_set_by_user(name)}


def _is_set_by_user(name: str) -> bool:
    """Whether the user has changed a setting from Dask's default."""
    own = dask.config.merge(*dask.config.defaults)
    return bool(dask.config.get(name, None) != dask.config.get(name, None, config=own))


@contextlib.contextmanager
def _start_cluster(kind: ClusterKind, workers: int | None, options: dict[str, Any]) -> Iterator[Any]:
    if kind == "local":
        cores = os.cpu_count() or 1
        count = workers or cores
        threads = max(1, cores // count)
        with dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": threads for name in _THREADS}):
            settings = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
            settings = {**settings, "silence_logs": logging.CRITICAL, **options}
            with _ignore_ctrl_c():
                local = _create(kind, LocalCluster, settings)
            with contextlib.ExitStack() as stack:
                yield _enter(stack, local)
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
    if kind == "slurm" and workers is None:
        raise UsageError("--cluster slurm: expected --cluster-workers, the number of workers to start, not given")
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UsageError("--cluster slurm: command 'sbatch' not found; run this where jobs can be submitted")
    with contextlib.ExitStack() as stack:
        made = _enter(stack, _create(kind, getattr(module, name), options))
        if kind != "cuda" and workers is not None:
            _scale(kind, made, workers)
        yield made


def _scale(kind: ClusterKind, made: Any, workers: int) -> None:
    """Request workers; raise UsageError if SLURM refuses a job at once, for example because of an unknown queue."""
    for name in ("tornado.application", "asyncio"):  # they would log a refusal with tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    made.scale(workers)
    if kind != "slurm":
        return

    async def refused() -> None:
        await made._correct_state()
        for job in made.workers.values():
            if job.status == Status.created:  # it was refused; awaiting it raises the reason
                await job

    _create(kind, lambda: made.sync(refused), {})


@contextlib.contextmanager
def _ignore_ctrl_c() -> Iterator[None]:
    """Let processes started in the block ignore Ctrl-C, which a terminal sends to all of them; we end them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _create(kind: ClusterKind, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Create a cluster and raise UsageError with the reason if that fails."""
    try:
        return make(**options)
    except Exception as error:
        first: BaseException = error  # the reason is the first of a chain that ends in "Nanny failed to start"
        while (before := first.__cause__ or first.__context__) is not None:
            first = before
        raise UsageError(
            f"--cluster {kind}: cannot be started: {one_line(first)}; check the arguments in --cluster-options"
        ) from error
