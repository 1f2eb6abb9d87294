"""Failures of a real cluster, a process for the scheduler, the client and each worker: rows equal those of one process,
only the sample at fault is listed, and every error names a remedy."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

import softlabel
from tests.support.clusters import (
    assert_same_rows,
    list_shards,
    make_cluster_environment,
    make_generate_command,
    make_teacher_spec,
    start_cluster,
    wait_until,
    write_jpeg_dataset,
)

pytest.importorskip("distributed", reason="dask is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
RESUME = 75


def run(command: list[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=make_cluster_environment(), capture_output=True, text=True, check=False, timeout=250
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, env=make_cluster_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_shards_that_kill_their_workers_beside_ten_good_ones(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 120, white=(35, 82))  # shards 3 and 8 of twelve
    options = ["--data", data, "--teacher", make_teacher_spec(harm="kill"), "--shard-rows", 10, "--batch-size", 10]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = run(make_generate_command(*options, "--out", tmp_path / "store", "--scheduler", dask.address), code=1)
    error = done.stderr.strip().splitlines()[-1]
    assert "2 of 12 shards could not be labelled" in error
    assert "shard 3: kills its process (SIGKILL)" in error
    assert "shard 8: kills its process (SIGKILL)" in error
    with softlabel.open_store(tmp_path / "store", allow_incomplete=True) as store:
        assert [record.number for record in store.shards] == [n for n in range(12) if n not in (3, 8)]
        innocent = list(store.keys)
        ours = store.take(store.lookup(innocent))
    assert len(innocent) == 100
    harmless = [str(word).replace("harm=kill", "harm=none") for word in options]
    run(make_generate_command(*harmless, "--out", tmp_path / "whole"))
    with softlabel.open_store(tmp_path / "whole") as whole:
        theirs = whole.take(whole.lookup(innocent))
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.scaled_logits, theirs.scaled_logits)


def test_a_worker_whose_device_is_lost(tmp_path: Path) -> None:
    """It fails every shard that it gets, and fast: none of them is to blame."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 160, white=(35,))
    marks = tmp_path / "marks"
    marks.mkdir()
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10]
    broken = make_teacher_spec(harm="break", marks=marks, seconds=0.3)
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = run(
            make_generate_command(
                *options, "--teacher", broken, "--out", tmp_path / "store", "--scheduler", dask.address
            )
        )
    assert "illegal memory access" in done.stderr
    assert len(list(marks.glob("broken-*"))) == 1
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_a_worker_killed_three_times_in_one_shard(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 80, white=(25,))
    marks = tmp_path / "marks"
    marks.mkdir()
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10]
    deadly = make_teacher_spec(harm="once", times=3, marks=marks)
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = run(
            make_generate_command(
                *options, "--teacher", deadly, "--out", tmp_path / "store", "--scheduler", dask.address
            )
        )
    assert "complete, 80 rows" in done.stdout
    assert len(list(marks.glob("killed-*"))) == 3
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


PRELOAD = """
import os, signal
marker, point = {marker!r}, {point!r}
def dying(name, before):
    real = getattr(os, name)
    def call(*arguments, **options):
        if any(".tmp-" in str(part) for part in arguments) or name == "fsync":
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return real(*arguments, **options)
            if not before:
                real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)
points = {{"before fsync": ("fsync", True), "before publishing": ("link", True), "before returning": ("link", False)}}
dying(*points[point])
"""


@pytest.mark.parametrize("point", ["before fsync", "before publishing", "before returning"])
def test_a_worker_killed_at_a_point_of_publishing(tmp_path: Path, point: str) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 60)
    preload = tmp_path / "preload.py"
    preload.write_text(PRELOAD.format(marker=str(tmp_path / "killed"), point=point))
    options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
    with start_cluster(tmp_path / "dask", workers=2, DASK_DISTRIBUTED__WORKER__PRELOAD=preload) as dask:
        run(make_generate_command(*options, "--out", tmp_path / "store", "--scheduler", dask.address))
    assert (tmp_path / "killed").exists()
    run(make_generate_command(*options, "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")
    assert len(list_shards(tmp_path / "store")) == 6
    assert not list((tmp_path / "store").rglob("*.tmp-*"))


def test_workers_killed_at_random(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 300)
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10]
    slow = make_teacher_spec(seconds=0.15)
    rng = random.Random(3)
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        client = start(
            make_generate_command(*options, "--teacher", slow, "--out", tmp_path / "store", "--scheduler", dask.address)
        )
        for goal in (2, 8, 14):
            wait_until(lambda goal=goal: len(list_shards(tmp_path / "store")) >= goal or client.poll() is not None)
            wait_until(lambda: dask.working() or client.poll() is not None)
            time.sleep(rng.random() * 0.3)
            for pid in dask.working()[:1]:
                os.kill(pid, signal.SIGKILL)
        out, error = client.communicate(timeout=200)
    assert client.returncode == 0, error
    assert "complete, 300 rows" in out
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_the_client_killed_at_ten_random_instants(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 600)
    options = ["--data", data, "--shard-rows", 5, "--batch-size", 5]
    marks = tmp_path / "marks"
    marks.mkdir()
    command = [*options, "--teacher", make_teacher_spec(seconds=0.02, marks=marks), "--no-preflight"]
    rng = random.Random(4)
    store, window = (
        tmp_path / "store",
        8,
    )  # shards that two workers have, that Dask has sent them, and that are arriving
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = 0
        for _ in range(10):
            client = start(make_generate_command(*command, "--out", store, "--scheduler", dask.address))
            goal = min(len(list_shards(store)) + rng.randint(0, 8), 119)
            wait_until(lambda goal=goal: len(list_shards(store)) >= goal)
            time.sleep(rng.random() * 0.2)
            client.kill()
            client.communicate()
            assert len(list_shards(store)) >= done
            done = len(list_shards(store))
        run(make_generate_command(*command, "--out", store, "--scheduler", dask.address))
    again = len(list(marks.glob("call-*"))) - 120
    assert 0 <= again <= 10 * window, f"{again} shards were done again"
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(store, tmp_path / "whole")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_scheduler_lost(tmp_path: Path, how: signal.Signals) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 400)
    options = ["--data", data, "--shard-rows", 5, "--batch-size", 5]
    command = [*options, "--teacher", make_teacher_spec(seconds=0.3), "--out", tmp_path / "store"]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        client = start(make_generate_command(*command, "--scheduler", dask.address))
        wait_until(lambda: len(list_shards(tmp_path / "store")) >= 4)
        dask.scheduler.send_signal(how)
        lost = time.monotonic()
        _, error = client.communicate(timeout=100)
        assert time.monotonic() - lost < 60
    assert client.returncode == RESUME, error
    assert "rerun the command" in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    kept = len(list_shards(tmp_path / "store"))
    assert kept >= 4
    # On one machine, without a cluster: the store is the same.
    run(make_generate_command(*command))
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


@pytest.mark.parametrize("nanny", ["--nanny", "--no-nanny"])
def test_a_worker_stopped_past_its_ttl_and_back(tmp_path: Path, nanny: str) -> None:
    """With a nanny, a fresh process may be in its place by then; without one it comes back and goes on."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 120)
    options = ["--data", data, "--shard-rows", 5, "--batch-size", 5]
    command = [*options, "--teacher", make_teacher_spec(seconds=0.5), "--out", tmp_path / "store"]
    with start_cluster(tmp_path / "dask", workers=1, ttl="6s") as dask:
        second = dask.worker(nanny)
        client = start(make_generate_command(*command, "--scheduler", dask.address))
        wait_until(lambda: len(list_shards(tmp_path / "store")) >= 4)
        stopped = psutil.Process(second.pid)
        if nanny == "--nanny":
            stopped = next(one for one in stopped.children() if one.pid in dask.working())
        stopped.suspend()
        time.sleep(12)
        with suppress(psutil.NoSuchProcess):
            stopped.resume()
        out, error = client.communicate(timeout=200)
    assert client.returncode == 0, error
    assert "complete, 120 rows" in out
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_a_hung_shard_is_ended_by_its_watchdog(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 60, white=(25,))
    marks = tmp_path / "marks"
    marks.mkdir()
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10]
    hanging = make_teacher_spec(harm="hang", marks=marks)
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        placed = ["--out", tmp_path / "store", "--scheduler", dask.address, "--shard-seconds", 4]
        done = run(make_generate_command(*options, "--teacher", hanging, *placed))
    assert "complete, 60 rows" in done.stdout
    assert list(marks.glob("hung-*"))
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_a_slow_shard_at_the_end_is_done_by_a_second_worker(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 60, white=(55,))  # the last of six shards
    marks = tmp_path / "marks"
    marks.mkdir()
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10]
    hanging = make_teacher_spec(harm="hang", marks=marks)
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = run(
            make_generate_command(
                *options, "--teacher", hanging, "--out", tmp_path / "store", "--scheduler", dask.address
            )
        )
    assert "shard 5 is slow; another worker labels it too" in done.stderr
    assert "complete, 60 rows" in done.stdout
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_scaled_down_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 120)
    options = ["--data", data, "--shard-rows", 5, "--batch-size", 5]
    command = [*options, "--teacher", make_teacher_spec(seconds=0.4), "--out", tmp_path / "store"]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        client = start(make_generate_command(*command, "--scheduler", dask.address))
        wait_until(lambda: len(list_shards(tmp_path / "store")) >= 3)
        dask.processes[1].send_signal(signal.SIGTERM)  # a nanny that is asked to end closes its worker
        out, error = client.communicate(timeout=200)
    assert client.returncode == 0, error
    assert "complete, 120 rows" in out
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_a_worker_over_its_memory(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 60, white=(25,))
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10]
    with start_cluster(tmp_path / "dask", workers=0) as dask:
        for _ in range(2):
            dask.worker("--memory-limit", "1600MB")  # torch and a teacher take half of it
        hungry = make_teacher_spec(harm="memory")
        done = run(
            make_generate_command(
                *options, "--teacher", hungry, "--out", tmp_path / "store", "--scheduler", dask.address
            )
        )
    assert "its worker died" in done.stderr
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_workers_that_dask_pauses(tmp_path: Path) -> None:
    """At 80% of its limit a worker gets nothing more, and a teacher keeps its memory: a warning, then an error."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 60)
    options = ["--data", data, "--teacher", make_teacher_spec(seconds=0.2), "--shard-rows", 5, "--batch-size", 5]
    with start_cluster(tmp_path / "dask", workers=0) as dask:
        dask.worker("--memory-limit", 0)
        run(make_generate_command(*options, "--out", tmp_path / "whole", "--scheduler", dask.address))
        taken = psutil.Process(dask.working()[0]).memory_info().rss
    with start_cluster(tmp_path / "again", workers=0) as dask:
        dask.worker("--memory-limit", int(taken / 0.87))
        placed = ["--out", tmp_path / "store", "--scheduler", dask.address, "--no-preflight"]
        done = run(make_generate_command(*options, *placed), code=2)
    assert "Dask has paused all 1 workers" in done.stderr
    assert "--memory-limit 0" in done.stderr.strip().splitlines()[-1]
    run(make_generate_command(*options, "--out", tmp_path / "store"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_two_clients_on_one_store(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 100)
    options = ["--data", data, "--shard-rows", 5, "--batch-size", 5]
    command = [*options, "--teacher", make_teacher_spec(seconds=1.5), "--out", tmp_path / "store"]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        first = start(make_generate_command(*command, "--scheduler", dask.address))
        wait_until(lambda: len(list_shards(tmp_path / "store")) >= 2)
        second = run(make_generate_command(*command, "--scheduler", dask.address), code=2)
        assert "is writing to this store" in second.stderr
        _, error = first.communicate(timeout=200)
        assert first.returncode == 0, error
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")
