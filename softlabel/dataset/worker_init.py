"""What a process that reads samples for another one does when it begins."""

import sys
from types import TracebackType


def begin_worker(number: int) -> None:
    """The ``worker_init_fn`` of a `DataLoader`: be silent about a reader that went away.

    A reader that ends (Ctrl-C, SIGTERM, an error) while a batch is handed over breaks the connection; the thread that
    hands it over would print a traceback below the reader's own last line. Why it ended is the reader's to say.
    """
    report = sys.excepthook

    def report_all_but_lost_readers(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            report(kind, error, trace)

    sys.excepthook = report_all_but_lost_readers
