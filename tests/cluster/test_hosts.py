"""Several hosts for real: a scheduler and two workers in network namespaces of their own; one of them loses its network
in the middle of a shard and gets it back."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.clusters import (
    assert_same_rows,
    list_shards,
    make_cluster_environment,
    make_generate_command,
    make_teacher_spec,
    wait_until,
    write_jpeg_dataset,
)

pytest.importorskip("distributed", reason="dask is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

BRIDGE, NET = "softbr0", "10.77.0"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def hosts(names: list[str]) -> Iterator[None]:
    """Network namespaces on one bridge, the n-th at 10.77.0.n; skipped where they cannot be made."""
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"cannot make network namespaces here: {error}")
    made: list[str] = []
    try:
        ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(names, 1):
            ip("netns", "add", name)
            made.append(name)
            ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"v{name}", "master", BRIDGE)
            ip("link", "set", f"v{name}", "up")
            ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot make network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)


def test_a_network_cut_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 200)
    options = ["--data", data, "--shard-rows", 5, "--batch-size", 5, "--out", tmp_path / "store"]
    teacher = make_teacher_spec(seconds=0.5)
    environment = make_cluster_environment(
        DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=0, DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="15s"
    )
    started: list[subprocess.Popen[bytes]] = []

    def within(host: str, *command: object) -> "subprocess.Popen[bytes]":
        log = open(tmp_path / f"{host}-{len(started)}.log", "wb")  # noqa: SIM115
        words = ["ip", "netns", "exec", host, *map(str, command)]
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        started.append(process)
        return process

    with hosts(["slboss", "slone", "sltwo"]):
        try:
            dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", f"{NET}.1", "--port", 8786]
            within("slboss", *dask, "--no-dashboard")
            for number, host in ((2, "slone"), (3, "sltwo")):
                worker = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://{NET}.1:8786"]
                within(host, *worker, "--host", f"{NET}.{number}", "--nthreads", 1, "--no-dashboard")
            client = within(
                "slboss", *make_generate_command(*options, "--teacher", teacher, "--scheduler", f"tcp://{NET}.1:8786")
            )
            wait_until(lambda: len(list_shards(tmp_path / "store")) >= 4)
            ip("link", "set", "vsltwo", "down")
            time.sleep(20)
            ip("link", "set", "vsltwo", "up")
            assert client.wait(timeout=200) == 0, (tmp_path / "slboss-3.log").read_text()
        finally:
            for process in started:
                for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                    child.kill()
                process.kill()
                process.wait()
    log = (tmp_path / "slboss-3.log").read_text()
    assert "complete, 200 rows" in log
    assert "its worker died" in log or "another worker labels it too" in log
    whole = ["--data", data, "--shard-rows", 5, "--batch-size", 5, "--out", tmp_path / "whole"]
    subprocess.run(
        make_generate_command(*whole, "--teacher", make_teacher_spec()), env=make_cluster_environment(), check=True
    )
    assert_same_rows(tmp_path / "store", tmp_path / "whole")
