"""Internals of distributed that we use (2026.8): its public calls have no timeout.

`Client.gather` waits forever for a scheduler that is gone; `callback_timeout` of the coroutines ends the wait.
"""

from collections.abc import Sequence
from typing import Any

from distributed import Client, Future


def gather(client: Client, futures: Sequence[Future], *, timeout: float) -> list[Any]:
    """Return the results of finished futures; raises errors of distributed if one of them or the scheduler is lost."""
    return list(client.sync(client._gather, futures, callback_timeout=timeout))


def cancel(client: Client, futures: Sequence[Future], *, timeout: float) -> None:
    """Cancel futures if the scheduler answers in time."""
    client.sync(client._cancel, futures, callback_timeout=timeout)


def worker_states(client: Client, *, timeout: float) -> dict[str, str]:
    """Return address -> status ("running", "paused", ...) of every worker known to the scheduler."""
    found: dict[str, str] = client.sync(client._run_on_scheduler, _list_states, callback_timeout=timeout)
    return found


def _list_states(dask_scheduler: Any) -> dict[str, str]:
    return {address: worker.status.name for address, worker in dask_scheduler.workers.items()}
