"""A folder of exported files, one for each shard, that the same command completes after an interruption."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from softlabel.common.atomic_file import write_atomically
from softlabel.convert.plain_columns import bar_of
from softlabel.errors import MismatchError, StoreError
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.storage.base import TEMPORARY, sync, writing

# Metadata, options and state of the export. Readers of Parquet folders ignore names with a leading underscore.
ABOUT = "_softlabel-export.json"
_EARLIER = "softlabel-export.json"  # its name in earlier versions
_STATE = ("complete", "left_out")

# Writes the rows from start to stop into a file, reports how many it has done, and returns how many it left out.
WriteShard = Callable[[Path, int, int, Callable[[int], object]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Result of an export: files written by this call, bytes of all files, rows without a place in the format."""

    files: int
    bytes: int
    left_out: int = 0


def write_folder(
    store: Store,
    out: Path,
    write: WriteShard,
    *,
    suffix: str,
    about: Mapping[str, Any],
    progress: bool | None,
    options: Mapping[str, Any] | None,
) -> Written:
    """Write `data/train-*` of a folder, or what is missing of it.

    Args:
        store: a finished one; every byte of it is checked first.
        out: the folder.
        write: writes one file.
        suffix: of the files.
        about: identifies the export.
        progress: as in `export_store`.
        options: as in `export_store`.

    Raises:
        MismatchError: `out` holds something else.
        StoreError: the store cannot be read, or the disk cannot be written.
    """
    about = json.loads(json.dumps(about))
    data = out / "data"
    state = _read_state(out, about)
    if not state.get("complete"):
        open_store(store.url, verify="full").close()
    left_out = dict(state.get("left_out", {}))
    records = store.shards
    written = size = row = 0
    with writing(out), bar_of(len(store), progress) as bar:
        if not state:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / ABOUT, _encode(about, options, complete=False))
        data.mkdir(exist_ok=True)
        for number, record in enumerate(records):
            path = data / f"train-{number:05d}-of-{len(records):05d}.{suffix}"
            if not path.exists():
                temporary = data / f"{TEMPORARY}{uuid.uuid4().hex}"
                try:
                    if (left := write(temporary, row, row + record.rows, bar.update)) != left_out.get(path.name, 0):
                        # Before the file is there: whatever ends this process, the count of every file is known.
                        left_out[path.name] = left
                        write_atomically(out / ABOUT, _encode(about, options, complete=False, left_out=left_out))
                    sync(temporary)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
                written += 1
            row += record.rows
            size += path.stat().st_size
        if not state.get("complete"):
            sync(data)
            for temporary in data.glob(f"{TEMPORARY}*"):
                temporary.unlink()
            write_atomically(out / ABOUT, _encode(about, options, complete=True, left_out=left_out))
            (out / _EARLIER).unlink(missing_ok=True)
    return Written(files=written, bytes=size, left_out=sum(left_out.values()))


def _read_state(out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an export of this store in this folder, empty for none."""
    path = out / (_EARLIER if (out / _EARLIER).exists() else ABOUT)
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.pop("checksum", None) not in (None, _compute_checksum(found)):
            raise ValueError("its checksum does not match")
    except (FileNotFoundError, NotADirectoryError):
        if out.exists() and (not out.is_dir() or any(not one.name.startswith(TEMPORARY) for one in out.iterdir())):
            raise MismatchError(
                f"{out}: expected a new or empty folder, found something else; choose another"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; remove the folder and export again") from None
    state = {name: found.pop(name) for name in _STATE if name in found} if isinstance(found, dict) else {}
    if not isinstance(found, dict) or {**found, "options": None} != {**about, "options": None}:
        raise MismatchError(
            f"{out}: expected an export of store {about['store_id']}{_name_format(about)}, found another; choose "
            "another folder"
        )
    return {"complete": False, **state}


def _name_format(about: Mapping[str, Any]) -> str:
    return f" --to {about['to']}" if "to" in about else ""


def _encode(
    about: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    *,
    complete: bool,
    left_out: Mapping[str, int] | None = None,
) -> bytes:
    content = {**about, "options": None if options is None else dict(options), "complete": complete}
    if left_out:
        content["left_out"] = dict(left_out)
    return (json.dumps({**content, "checksum": _compute_checksum(content)}, indent=1) + "\n").encode()


def _compute_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
