"""A client of the cluster that a run asks for: one that runs already, or one that is started for it."""

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
    """A client of a running scheduler, or of a cluster that lives as long as the block.

    Raises:
        UsageError: no scheduler answers there, or a cluster of this kind cannot be started: its package is absent, its
            options are wrong, or it takes no jobs.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        where: Any = deployment.scheduler
        if deployment.cluster is not None:
            stack.enter_context(dask.config.set(_settings()))
            where = stack.enter_context(
                _cluster(deployment.cluster, deployment.cluster_workers, dict(deployment.cluster_options))
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
    """Enter a context whose end, whatever Dask raises there, is not the end of a run that is done."""
    value = context.__enter__()

    def leave(*error: Any) -> None:
        try:
            context.__exit__(*error)
        except Exception as raised:
            log.debug("closing %s: %s", type(value).__name__, raised)

    stack.push(leave)
    return value


def _check_address(address: str) -> None:
    """Raises UsageError for one that a client cannot even try: it would be left half made, and complain at the end."""
    scheme = address.partition("://")[0] if "://" in address else "tcp"
    try:
        get_backend(scheme)
        if scheme in ("tls", "wss") and Security().get_connection_args("client")["ssl_context"] is None:
            raise ValueError("there are none")
    except Exception as error:
        raise UsageError(
            f"--scheduler {address}: expected an address such as tcp://10.0.0.1:8786, and for tls:// Dask's settings "
            f"of certificates ({one_line(error)})"
        ) from None


def _check_scheduler(address: str) -> None:
    """Raises UsageError unless a scheduler answers: a client would wait for ever for the answer of something else."""
    name = "distributed.comm.timeouts.connect"
    seconds = parse_timedelta(dask.config.get(name)) if _set_by_user(name) else _ANSWER_SECONDS

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return str((await there.identity())["type"])

    with ThreadPoolExecutor(1) as pool:  # this thread may have a loop that runs already, as in a notebook
        try:
            kind = pool.submit(lambda: asyncio.run(asyncio.wait_for(ask(), seconds))).result()
        except TimeoutError:
            kind = f"nothing that answers as one within {seconds:g} s"
        except Exception as error:
            kind = f"none that answers ({one_line(error, with_type=True)})"
    if kind != "Scheduler":
        raise UsageError(
            f"--scheduler {address}: expected a Dask scheduler there, found {kind}; the scheduler's port is 8786 where "
            "nothing else was asked for, 8787 is that of its dashboard; start one with 'dask scheduler'"
        )


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
    """Whether an environment variable, a file or a program says otherwise than Dask itself."""
    own = dask.config.merge(*dask.config.defaults)
    return bool(dask.config.get(name, None) != dask.config.get(name, None, config=own))


@contextlib.contextmanager
def _cluster(kind: ClusterKind, workers: int | None, options: dict[str, Any]) -> Iterator[Any]:
    if kind == "local":
        cores = os.cpu_count() or 1
        count = workers or cores
        threads = max(1, cores // count)
        with dask.config.set({f"distributed.nanny.pre-spawn-environ.{name}": threads for name in _THREADS}):
            settings = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
            settings = {**settings, "silence_logs": logging.CRITICAL, **options}
            with _no_ctrl_c():
                local = _made(kind, LocalCluster, settings)
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
        raise UsageError("--cluster slurm: there is no 'sbatch' here; run this where jobs can be submitted")
    with contextlib.ExitStack() as stack:
        made = _enter(stack, _made(kind, getattr(module, name), options))
        if kind != "cuda" and workers is not None:
            _scale(kind, made, workers)
        yield made


def _scale(kind: ClusterKind, made: Any, workers: int) -> None:
    """Ask for workers. Raises UsageError where that is refused at once, by SLURM for a queue that is not there, say."""
    for name in ("tornado.application", "asyncio"):  # a refusal would be told there too, as tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    made.scale(workers)
    if kind != "slurm":
        return

    async def refused() -> None:
        await made._correct_state()
        for job in made.workers.values():
            if job.status == Status.created:  # it was not taken; asked once more, it says why
                await job

    _made(kind, lambda: made.sync(refused), {})


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C: a terminal sends it to all, and ending them is ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
        raise UsageError(
            f"--cluster {kind}: cannot be started: {one_line(first)}; its arguments come from the file of "
            "--cluster-options"
        ) from error
