"""What is used of distributed's internals (2026.8): its public calls have no time limit.

`Client.gather` waits without an end for a scheduler that is gone; `callback_timeout` of the coroutines ends the wait.
"""

from collections.abc import Sequence
from typing import Any

from distributed import Client, Future


def gather(client: Client, futures: Sequence[Future], *, timeout: float) -> list[Any]:
    """The results of finished futures. Raises what distributed raises where one of them, or the scheduler, is lost."""
    return list(client.sync(client._gather, futures, callback_timeout=timeout))


def cancel(client: Client, futures: Sequence[Future], *, timeout: float) -> None:
    """Cancel futures, as far as the scheduler answers in time."""
    client.sync(client._cancel, futures, callback_timeout=timeout)


def worker_states(client: Client, *, timeout: float) -> dict[str, str]:
    """Address -> status ("running", "paused", ...) of every worker, as the scheduler knows them."""
    found: dict[str, str] = client.sync(client._run_on_scheduler, _list_states, callback_timeout=timeout)
    return found


def _list_states(dask_scheduler: Any) -> dict[str, str]:
    return {address: worker.status.name for address, worker in dask_scheduler.workers.items()}
