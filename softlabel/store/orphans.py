"""Shards in a store's folder that no segment records, left by a killed run or a lost segment."""

from collections.abc import Collection

from softlabel.errors import StoreCorruptError
from softlabel.store.formats.base import ShardIdentity
from softlabel.store.formats.registry import open_shard
from softlabel.store.manifest import SHARD_FILE, Run, ShardRecord, shard_file
from softlabel.store.storage.base import Folder, file_xxh3


def find_orphans(folder: Folder, run: Run, recorded: Collection[int]) -> list[ShardRecord]:
    """Return records, sorted by number, of the unrecorded shards that are intact and match the plan of this run."""
    found: dict[int, ShardRecord] = {}
    for name, size in sorted(folder.sizes("shards").items()):
        named = SHARD_FILE.fullmatch(name)
        if not named or size < 0 or int(named[1]) in recorded or int(named[1]) in found:
            continue
        identity = _read_identity(folder, run, name, named[2])
        number = int(named[1])
        if identity is None or identity.number != number or number >= run.shard_count:
            continue
        if identity.belongs(run, run.shard(number)):
            found[number] = identity.record(name, size, named[2])
    return [found[number] for number in sorted(found)]


def has_content(folder: Folder, name: str, data: bytes) -> bool:
    """Whether a small file of a store has these bytes."""
    try:
        return folder.read(name, len(data)) == data
    except (FileNotFoundError, StoreCorruptError):
        return False


def _read_identity(folder: Folder, run: Run, name: str, xxh3: str) -> ShardIdentity | None:
    """Read the identity of an orphan; None if it is damaged or of another format."""
    if shard_file(0, xxh3, run.format).rsplit(".")[-1] != name.rsplit(".")[-1]:
        return None
    with folder.local(name) as path:
        if file_xxh3(path) != xxh3:
            return None
        try:
            shard = open_shard(path, run.format)
        except StoreCorruptError:
            return None
        shard.close()
    return shard.identity
