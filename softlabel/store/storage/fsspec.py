"""Storage on an object store, through fsspec: `s3://bucket/labels`, `gs://...`, `memory://...`.

Objects are written atomically: first the shard under its content-hashed name, then the segment, then manifest.json,
which is the commit point. The lease is an object that is created only if absent and renewed while its holder lives; one
that was not renewed for STALE_SECONDS belongs to a dead run and can be taken.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from softlabel.errors import StoreCorruptError, StoreError, StoreLockedError
from softlabel.store.storage.base import TEMPORARY, Folder

LOCK_NAME = ".lock"
RENEW_SECONDS = 20.0
STALE_SECONDS = 90.0


class RemoteLease:
    """The lease object of one store, renewed by a thread.

    Raises:
        StoreLockedError: another run holds it.
    """

    def __init__(self, folder: "RemoteFolder") -> None:
        self._folder = folder
        self._token = uuid.uuid4().hex
        if not folder.create_object(LOCK_NAME, self._encode_holder()):
            found = self._read_holder()
            if found is not None and time.time() - found.get("at", 0) < STALE_SECONDS:
                raise StoreLockedError(
                    f"{folder}: {found.get('holder', 'another run')} is writing to this store; wait until it ends "
                    f"(a run that was killed frees it after {STALE_SECONDS:.0f} s), or choose another folder"
                )
            folder.write(LOCK_NAME, self._encode_holder())
            time.sleep(0.5)  # if two runs take a stale lease at once, the later one has it
            self.check()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="softlabel-lease", daemon=True)
        self._thread.start()

    def _encode_holder(self) -> bytes:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"holder": holder, "token": self._token, "at": time.time()}).encode()

    def _read_holder(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._folder.read(LOCK_NAME, 10_000))
        except (FileNotFoundError, ValueError, StoreError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("at"), int | float) else None

    def check(self) -> None:
        """Check that the lease is still held.

        Raises:
            StoreLockedError: another run took it, because this process was suspended too long.
        """
        found = self._read_holder()
        if found is None or found.get("token") != self._token:
            raise StoreLockedError(f"{self._folder}: another run took the lease; this run stops writing")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # the next commit reports the error
                self.check()
                self._folder.write(LOCK_NAME, self._encode_holder())

    def release(self) -> None:
        """Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join(timeout=RENEW_SECONDS)
            with contextlib.suppress(Exception):
                self.check()
                self._folder.remove(LOCK_NAME)


class RemoteFolder(Folder):
    """A store's folder behind a URL.

    Raises:
        StoreError: the URL cannot be opened.
    """

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, self._base = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{url}: cannot be opened: {error}") from None
        self._base = self._base.rstrip("/")
        self._lease: RemoteLease | None = None
        self.root = Path(self.url)

    def __str__(self) -> str:
        return self.url

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _object_path(self, name: str) -> str:
        return f"{self._base}/{name.removeprefix('./')}"

    def check_root(self) -> None:
        pass

    def create(self) -> None:
        pass  # objects need no folders

    def lease(self) -> RemoteLease:
        with _translate_errors(self.url, writing=True):
            self._lease = RemoteLease(self)
        return self._lease

    def read(self, name: str, limit: int) -> bytes:
        size = self.size(name)
        if size > limit:
            raise StoreCorruptError(f"{self.where(name)}: expected at most {limit} bytes, found {size}")
        with _translate_errors(self.where(name)):
            raw: bytes = self._fs.cat_file(self._object_path(name))
        return raw

    def size(self, name: str) -> int:
        with _translate_errors(self.where(name)):
            self._fs.invalidate_cache()
            info = self._fs.info(self._object_path(name))
        if info["type"] != "file":
            raise FileNotFoundError(self.where(name))
        return int(info["size"])

    def sizes(self, subfolder: str) -> dict[str, int]:
        folder = self._object_path(subfolder).removesuffix("/.")
        try:
            with _translate_errors(self.where(subfolder)):
                self._fs.invalidate_cache()
                found = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {
            f"{subfolder}/{one['name'].rsplit('/', 1)[-1]}": int(one["size"] or 0) if one["type"] == "file" else -1
            for one in found
            if one["name"].strip("/") != folder.strip("/")
        }

    def temporary(self, subfolder: str) -> Path:
        return Path(tempfile.gettempdir()) / f"{TEMPORARY}softlabel-{os.getpid()}-{uuid.uuid4().hex}"

    def publish(self, temporary: Path, name: str, xxh3: str) -> None:
        with _translate_errors(self.where(name), writing=True):
            size = temporary.stat().st_size
            try:
                there = self.size(name) == size
            except FileNotFoundError:
                there = False
            if there:
                with self.local(name) as path:
                    there = path.read_bytes() == temporary.read_bytes()
            if not there:
                self._fs.put_file(str(temporary), self._object_path(name))
        temporary.unlink(missing_ok=True)

    def publish_bytes(self, name: str, data: bytes, xxh3: str) -> None:
        self.write(name, data)

    def replace(self, name: str, data: bytes) -> None:
        if self._lease is not None:
            self._lease.check()
        self.write(name, data)

    def write(self, name: str, data: bytes) -> None:
        with _translate_errors(self.where(name), writing=True):
            self._fs.pipe_file(self._object_path(name), data)

    def create_object(self, name: str, data: bytes) -> bool:
        """Write an object if its name is free; return whether it was written."""
        with _translate_errors(self.where(name), writing=True):
            try:
                self._fs.pipe_file(self._object_path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if "precondition" in str(error).lower() or "412" in str(error):
                    return False
                raise
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _translate_errors(self.where(name), writing=True):
            self._fs.rm_file(self._object_path(name))

    def make(self, subfolder: str) -> None:
        pass

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        path = self.temporary("")
        try:
            with _translate_errors(self.where(name)):
                self._fs.get_file(self._object_path(name), str(path))
            yield path
        except StoreCorruptError as error:  # replace the name of the copy
            raise StoreCorruptError(str(error).replace(str(path), self.where(name))) from None
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _translate_errors(where: str, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of a file system's library into StoreError; FileNotFoundError and FileExistsError pass."""
    what = "written" if writing else "read"
    after = "; finished files are kept" if writing else "; it need not be damaged"
    try:
        yield
    except (StoreError, FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise StoreError(f"{where}: cannot be {what}: access denied: {error}{after}") from None
    except Exception as error:
        raise StoreError(
            f"{where}: cannot be {what}: {type(error).__name__}: {str(error)[:300]}{after}: check endpoint, network "
            "and credentials, and rerun the command"
        ) from error
