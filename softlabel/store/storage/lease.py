"""The lease on a local store: flock on `.lock`, released by the operating system when the process dies.

A forked child (a data loader's worker) inherits the descriptor and would keep the lease after its parent is killed, so
children close it at once.
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
    """The held lease of a store.

    Raises:
        StoreLockedError: another committer has it; names the holder.
        StoreError: the file system has no locks.
    """

    def __init__(self, root: Path) -> None:
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
            os.close(self._handle)  # the previous holder removed the file between open and lock
        with contextlib.suppress(OSError):  # names the holder for others; a full disk must not fail here
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
        """Idempotent. Removes the lock file while it is locked, so that a lock on a removed file is detected."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class NoLease:
    """A placeholder where the disk is read-only, which is enough for a finished store."""

    def __init__(self, refused: OSError) -> None:
        self.refused = refused

    def release(self) -> None:
        """Do nothing."""


def _close_in_child() -> None:
    for lease in list(_held):
        lease._close()


os.register_at_fork(after_in_child=_close_in_child)
