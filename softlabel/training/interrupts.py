"""Ctrl-C and SIGTERM between steps."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn


class Interrupts:
    """Turns Ctrl-C and SIGTERM into a flag that is looked at between steps; a second one interrupts at once.

    Only the main thread may do that; elsewhere signals stay as they are.
    """

    def __init__(self) -> None:
        self.pending = False
        self._number: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending, self._number = True, signal.Signals(number)

    def end(self) -> NoReturn:
        """End as the signal would have ended what was running before; another process's signal ends like Ctrl-C.

        Raises:
            KeyboardInterrupt: always, or what the handler from before raises.
        """
        handler = self._before.get(self._number) if self._number is not None else None
        if callable(handler):
            handler(self._number, None)
        raise KeyboardInterrupt
