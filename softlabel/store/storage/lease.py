"""The lease on a store: one committer at a time, released by the operating system when its process dies.

flock on `.lock` in the store's folder. A forked child (a data loader's worker) inherits the descriptor and would keep
the lease alive after its parent was killed, so children close it at once.
"""

import contextlib
import fcntl
import os
import socket
import time
import weakref
from pathlib import Path

from softlabel.errors import StoreError, StoreLockedError

LOCK_NAME = ".lock"
_held: "weakref.WeakSet[FileLease]" = weakref.WeakSet()


class FileLease:
    def __init__(self, root: Path) -> None:
        """Take the lease. Raises StoreLockedError, naming the holder, when another committer has it."""
        self.path = root / LOCK_NAME
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._handle, 200, 0).decode(errors="replace").strip() or "another run"
                os.close(self._handle)
                raise StoreLockedError(
                    f"{root}: {holder} is writing to this store; wait until it ends, or choose another folder"
                ) from None
            except OSError as error:
                os.close(self._handle)
                raise StoreError(
                    f"{root}: this file system cannot lock files ({error}); write to another one"
                ) from None
            if self._is_current():
                break
            os.close(self._handle)  # the holder before us removed the file between our open and our lock
        with contextlib.suppress(OSError):  # a courtesy to whoever finds it locked; a full disk must not keep it locked
            os.ftruncate(self._handle, 0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()} since {started}".encode(), 0)
        _held.add(self)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Idempotent. The lock file goes while the lock is held, so nobody can lock a removed file unnoticed."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class NoLease:
    """What stands for the lease where nothing can be written: a finished store is good there, and nothing else is."""

    def __init__(self, refused: OSError) -> None:
        self.refused = refused

    def release(self) -> None:
        """There is nothing to release."""


def _close_in_child() -> None:
    for lease in list(_held):
        lease._close()


os.register_at_fork(after_in_child=_close_in_child)
