"""What is used of torch's internals (2.9 to 2.14): a DataLoader has no public way to end its workers or to see them."""

from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader


def worker_processes(loader: DataLoader[Any]) -> Sequence[BaseProcess]:
    """The processes of the last iteration; none where there are no workers, or it has not begun."""
    iterator = loader._iterator
    return () if iterator is None else iterator._workers  # type: ignore[attr-defined]


def end_workers(loader: DataLoader[Any]) -> None:
    """End the persistent workers; the next iteration starts others."""
    iterator = loader._iterator
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()  # type: ignore[attr-defined]
