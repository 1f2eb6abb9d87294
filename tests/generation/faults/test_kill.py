"""kill -9 while `softlabel generate` runs: the same command finishes the store, and nothing done is done again."""

import json
import random
import time
from pathlib import Path

import numpy as np

from softlabel import open_store
from tests.support.commands import run_softlabel
from tests.support.datasets import write_dataset
from tests.support.processes import start_softlabel
from tests.support.teachers import write_teacher

ROWS, SHARD_ROWS, KILLS = 1400, 20, 10


def published(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("[0-9]*.parquet"))


def recorded(store: Path) -> dict[str, tuple[int, int]]:
    """The shards that the manifest lists, with what would change if one were written again."""
    root = store / "manifest.json"
    if not root.exists():
        return {}
    segments = [json.loads((store / ref["file"]).read_text()) for ref in json.loads(root.read_text())["segments"]]
    files = [store / shard["file"] for segment in segments for shard in segment["shards"]]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_killed_ten_times(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", ROWS)
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    store, whole = tmp_path / "store", tmp_path / "whole"

    def command(out: Path) -> list[object]:
        options = ["--data", data, "--teacher", teacher, "--out", out, "--shard-rows", SHARD_ROWS, "--batch-size", 20]
        return ["generate", *options, "--no-preflight"]

    rng = random.Random(20)
    done: dict[str, tuple[int, int]] = {}
    for _ in range(KILLS):
        process = start_softlabel(*command(store))
        # Let it come a random way: to a number of published shards, and then a moment further into whatever it does.
        goal = len(published(store)) + rng.randint(0, 6)
        while process.poll() is None and len(published(store)) < goal:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        assert process.poll() is None, f"ended before it was killed: {process.communicate()}"
        process.kill()
        process.communicate()
        now = recorded(store)
        assert {name: now.get(name) for name in done} == done, "a finished shard was computed again or lost"
        done = now
    assert done, "no shard was ever finished before a kill"

    last = run_softlabel(*command(store))
    assert f"complete, {ROWS:,} rows" in last.stdout
    now = recorded(store)
    assert {name: now[name] for name in done} == done
    written = [int(word) for word in last.stdout.split("shards written")[0].split()[-1:]]
    assert written[0] <= ROWS // SHARD_ROWS - len(done)

    left = [path.name for path in store.rglob("*") if path.is_file()]
    assert len(published(store)) == ROWS // SHARD_ROWS
    assert not [name for name in left if "tmp" in name or name.startswith(".")], left

    run_softlabel(*command(whole))
    everything = np.arange(ROWS)
    ours = open_store(store, verify="full").take(everything)
    theirs = open_store(whole, verify="full").take(everything)
    assert list(ours.keys) == list(theirs.keys)
    assert len(set(ours.keys)) == ROWS
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.scaled_logits, theirs.scaled_logits)


def test_two_at_once(tmp_path: Path) -> None:
    """The second one ends with one line that says so; the store of the first is complete."""
    data = write_dataset(tmp_path / "data.parquet", 600)
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    store, whole = tmp_path / "store", tmp_path / "whole"
    options = ["--data", data, "--teacher", teacher, "--shard-rows", SHARD_ROWS, "--batch-size", 20]
    both = [start_softlabel("generate", *options, "--out", store) for _ in range(2)]
    said = [process.communicate() for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2]), said
    for process, (out, err) in zip(both, said, strict=True):
        if process.returncode:
            line = err.strip().splitlines()[-1]
            assert "is writing to this store; wait until it ends" in line
            assert str(store) in line
            assert "Traceback" not in err
        else:
            assert "complete, 600 rows" in out
    assert not [path for path in store.rglob("*") if path.name.startswith(".")]
    run_softlabel("generate", *options, "--out", whole)
    ours = open_store(store, verify="full").take(np.arange(600))
    theirs = open_store(whole, verify="full").take(np.arange(600))
    assert ours.keys == theirs.keys
    np.testing.assert_array_equal(ours.scaled_logits, theirs.scaled_logits)
    assert {path.name for path in (store / "shards").iterdir()} == {path.name for path in (whole / "shards").iterdir()}
