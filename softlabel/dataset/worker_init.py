"""Initialisation of worker processes that read samples."""

import sys
from types import TracebackType


def begin_worker(number: int) -> None:
    """The ``worker_init_fn`` of a `DataLoader`: suppress tracebacks about a lost connection to the main process.

    If the main process ends (Ctrl-C, SIGTERM, an error) during the transfer of a batch, it reports the reason itself.
    """
    report = sys.excepthook

    def report_all_but_lost_readers(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            report(kind, error, trace)

    sys.excepthook = report_all_but_lost_readers
