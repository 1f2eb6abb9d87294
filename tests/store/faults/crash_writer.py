"""A process that writes a store and kills itself with SIGKILL at the n-th thing that it asks of the file system.

`python -m tests.store.faults.crash_writer FOLDER KIND FORMAT PACE` writes FOLDER/whole undisturbed, then for n = 1, 2,
... FOLDER/n in a forked child that dies at n, until a child lives to the end. After each death a reader looks, and the
run is resumed. KIND: images or tokens. PACE: seconds that records may wait for others. Prints what it saw as JSON. Its
own process, because it forks, and a test process has threads.
"""

import json
import os
import signal
import sys
from pathlib import Path

import h5py  # noqa: F401  imported once, before the forks

from softlabel.errors import StoreIncompleteError, StoreNotFoundError
from softlabel.store import writer
from softlabel.store.manifest import Run
from softlabel.store.open import open_store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer
from tests.support.documents import Documents, make_samples
from tests.support.stores import Samples, read_files, write_store

EVENTS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.scandir"}


def dying_child(root: Path, run: Run, samples: Samples | Documents, at: int) -> bool:
    """Write in a child that dies at its `at`-th event under `root`; whether it lived to the end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(root) in str(arguments):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        write_store(root, run, samples)
    finally:
        os._exit(0)


def main(folder: Path, kind: str, format: str) -> None:
    run, samples = make_samples(kind, format, samples=7, shard_rows=3)
    write_store(folder / "whole", run, samples)
    expected = {name: data for name, data in read_files(folder / "whole").items() if name != "manifest.json"}
    deaths, states, adopted = 0, set(), 0
    while not dying_child(folder / str(deaths + 1), run, samples, deaths + 1):
        deaths += 1
        root = folder / str(deaths)
        try:
            store = open_store(root, verify="full")
            assert store.take(range(len(store))).keys == samples.keys
            states.add("complete")
        except StoreNotFoundError:
            states.add("absent")
        except StoreIncompleteError:
            states.add("incomplete")
            half = open_store(root, verify="full", allow_incomplete=True)
            assert half.take(range(len(half))).keys == samples.keys[: len(half)]
        published = {path.name: path.stat().st_ino for path in (root / "shards").glob("[0-9]*")}
        with Committer.open(root, run) as committer:
            adopted += committer.manifest.totals.shards - committer.resumed
            again = {run.shard(plan.number).number for plan in committer.missing()}
            assert not again & {int(name[:5]) for name in published}, "a whole shard would be computed again"
        write_store(root, run, samples)
        now = {path.name: path.stat().st_ino for path in (root / "shards").iterdir()}
        assert all(now[name] == inode for name, inode in published.items()), "a finished shard was written again"
        assert verify_store(root).ok
        found = read_files(root)
        found.pop("manifest.json")
        assert found == expected, (deaths, sorted(found), sorted(expected))
    print(json.dumps({"deaths": deaths, "states": sorted(states), "adopted": adopted}))


if __name__ == "__main__":
    writer.COMMIT_SECONDS = float(sys.argv[4])
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
