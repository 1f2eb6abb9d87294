"""Writers that are killed and disks that are full: nothing is lost, nothing is done twice, nothing is left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from softlabel.errors import StoreError
from softlabel.store.open import open_store
from softlabel.store.writer import Committer, write_shard
from tests.support.shared_data import ROOT
from tests.support.stores import FORMATS, Samples, make_run, write_store


@pytest.mark.parametrize(
    ("kind", "format", "pace", "steps"),
    [
        ("images", "parquet", 0, 60),
        pytest.param("images", "hdf5", 0, 60, marks=pytest.mark.slow),
        pytest.param("images", "parquet", 1, 45, marks=pytest.mark.slow),
        ("images", "hdf5", 1, 45),
        ("tokens", "parquet", 1, 45),
    ],
)
def test_killed_at_every_step(tmp_path: Path, kind: str, format: str, pace: int, steps: int) -> None:
    """SIGKILL at every single file system call of a writer; see crash_writer.py for what is checked after each.

    pace 0: every shard is recorded at once; 1: records reach the disk together.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.faults.crash_writer", str(tmp_path), kind, format, str(pace)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["deaths"] > steps
    assert found["states"] == ["absent", "complete", "incomplete"]
    assert found["adopted"] > 0, "no kill fell between publishing and recording a shard"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_full_disk(small_disk: Path, format: str) -> None:
    """Whatever room is left, a full disk is one clear error, and with more room the same run finishes."""
    run = make_run(format, samples=4096, classes=200, shard_rows=512)
    samples = Samples.of(run)
    filler, root = small_disk / "filler", small_disk / "s"
    whole = 0
    for free in (0, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 150_000, 1 << 18, 1 << 19):
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - free)))
        with pytest.raises(StoreError, match="the disk is full; finished shards are kept"):
            write_store(root, run, samples)
        filler.unlink()
        if (root / "manifest.json").exists():
            half = open_store(root, verify="full", allow_incomplete=True)
            assert len(half) >= whole, "a finished shard was lost"
            whole = len(half)
    assert 0 < whole < 4096
    write_store(root, run, samples)
    assert not list(root.rglob(".tmp-*"))
    found = open_store(root, verify="full").take(range(4096)).columns["logits"]
    np.testing.assert_array_equal(found, samples.logits[0].astype(np.float16))


LIMITED = """
import resource, sys
from pathlib import Path
from softlabel.errors import StoreError
from tests.support.stores import make_run, write_store
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_store(Path(sys.argv[1]), make_run(sys.argv[2], samples=400, classes=100, shard_rows=200))
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_size_limit(tmp_path: Path, format: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "s"), format],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write: a file is too large; finished shards are kept" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not list((tmp_path / "s").rglob(".tmp-*"))
    write_store(tmp_path / "s", make_run(format, samples=400, classes=100, shard_rows=200))


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_commit_can_be_tried_again(small_disk: Path, format: str) -> None:
    """The committer's memory does not run ahead of the disk."""
    run = make_run(format, samples=64)
    samples = Samples.of(run)
    root, filler = small_disk / "s", small_disk / "filler"
    with Committer.open(root, run) as committer:
        records = [write_shard(root, run, plan, *samples.rows(plan)) for plan in committer.missing()]
        room = os.statvfs(small_disk)
        filler.write_bytes(bytes(room.f_bavail * room.f_bsize))
        with pytest.raises(StoreError, match="disk is full"):
            committer.commit(*records)
        assert len(committer.missing()) == 4
        filler.unlink()
        assert committer.commit(*records) == 4
        committer.finish()
    assert len(open_store(root, verify="full")) == 64
