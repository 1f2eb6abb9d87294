"""What a cluster wrote is a store like any other, on a full disk and on an object store whose puts fail, too."""

import http.client
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

import softlabel
from softlabel.generation.worker import Request, label_one
from softlabel.store.manifest import ShardRecord
from softlabel.store.writer import Committer
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
from tests.support.commands import run_softlabel
from tests.support.datasets import make_jpeg, write_parquet

pytest.importorskip("distributed", reason="dask is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def run(
    command: list[str], code: int = 0, cwd: Path | None = None, **more: object
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command, env=make_cluster_environment(**more), capture_output=True, text=True, check=False, timeout=250, cwd=cwd
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_a_local_run_is_finished_on_a_cluster_and_maintained(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 120)
    options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
    run(make_generate_command(*options, "--out", tmp_path / "whole"))
    here = tmp_path / "here"
    # A store that one machine began: what it has of the whole one, and no more.
    shutil.copytree(tmp_path / "whole", here)
    for shard in list_shards(here)[5:]:
        shard.unlink()
    for name in ("manifest.json", "segments"):
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = run(make_generate_command(*options, "--out", here, "--scheduler", dask.address))
        assert "7 shards written" in done.stdout
        assert_same_rows(here, tmp_path / "whole")
        again = run(make_generate_command(*options, "--out", here, "--scheduler", dask.address))
        assert "already complete" in again.stdout
        second = write_jpeg_dataset(tmp_path / "second.parquet", 40)
        other = ["--data", f"{second}?key=index", *options[2:]]
        run(make_generate_command(*other, "--out", tmp_path / "second", "--scheduler", dask.address))
    run_softlabel("verify", here, "--data", data)
    # One flipped bit, found and relabelled by one machine.
    victim = list_shards(here)[3]
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    victim.write_bytes(raw)
    assert victim.name in run_softlabel("verify", here, code=3).stdout
    run([sys.executable, "-m", "softlabel", "repair", str(here)])
    assert_same_rows(here, tmp_path / "whole")
    run_softlabel("merge", here, tmp_path / "second", "--out", tmp_path / "merged")
    with softlabel.open_store(tmp_path / "merged", verify="full") as merged:
        assert len(merged) == 160


def test_data_that_changed_between_two_runs_on_the_same_workers(tmp_path: Path) -> None:
    """Same file, same keys, other images: what a worker keeps from a run is for that run."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 40)
    options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
    with start_cluster(tmp_path / "dask", workers=1) as dask:
        run(make_generate_command(*options, "--out", tmp_path / "store", "--scheduler", dask.address))
        shutil.rmtree(tmp_path / "store")
        write_parquet(data, [make_jpeg(1000 + number) for number in range(40)], labels=[3] * 40)
        run(make_generate_command(*options, "--out", tmp_path / "store", "--scheduler", dask.address))
    run(make_generate_command(*options, "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")
    run_softlabel("verify", tmp_path / "store", "--data", data)


def test_a_store_that_grows_by_samples_and_by_views(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 40)
    options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
    options += ["--augment", "crop-flip"]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        for more in ((), ("--grow",), ("--views", 2)):
            if more == ("--grow",):
                write_jpeg_dataset(data, 65)
            placed = [(tmp_path / "store", "--scheduler", dask.address), (tmp_path / "whole",)]
            for out, *where in placed:
                run(make_generate_command(*options, "--out", out, *more, *where))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")
    with softlabel.open_store(tmp_path / "store") as store:
        assert len(store) == 130


def test_relative_paths_mean_those_of_the_client(tmp_path: Path) -> None:
    """Workers have a working directory of their own, and the words for several files are made absolute as well."""
    for number in range(2):
        write_jpeg_dataset(tmp_path / f"part-{number}.parquet", 20)
        part = tmp_path / f"part-{number}.parquet"
        images = [make_jpeg(100 * number + image) for image in range(20)]
        write_parquet(part, images, keys=[f"{number}-{image}" for image in range(20)], labels=[1] * 20)
    (tmp_path / "digits").mkdir()
    options = ["--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10, "--no-preflight"]
    with start_cluster(tmp_path / "dask", workers=1) as dask:
        for name, source in (("braces", "part-{0..1}.parquet"), ("glob", "part-*.parquet")):
            placed = ["--data", source, "--out", name, "--scheduler", dask.address]
            assert "complete, 40 rows" in run(make_generate_command(*options, *placed), cwd=tmp_path).stdout
        digits = ["--data", "digits?rows=0:30", "--ignore-labels", "--out", "of-digits", "--scheduler", dask.address]
        assert "complete, 30 rows" in run(make_generate_command(*options, *digits), cwd=tmp_path).stdout


def test_a_teacher_is_loaded_once_by_each_worker(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 120)
    marks = tmp_path / "marks"
    marks.mkdir()
    options = ["--data", data, "--teacher", make_teacher_spec(marks=marks, seconds=0.2), "--shard-rows", 5]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        run(
            make_generate_command(*options, "--batch-size", 5, "--out", tmp_path / "store", "--scheduler", dask.address)
        )
    loads = [path.name.split("-")[1] for path in marks.glob("loaded-*")]
    assert sorted(loads) == sorted(set(loads)), "a process loaded its teacher twice"
    assert len(loads) == 3, "two workers and the client, which knows the store's identity by it"


def test_two_attempts_at_a_shard_with_other_bytes(tmp_path: Path) -> None:
    """The first record wins; the late file stays beside it, unlisted, and is collected at the end."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 30, white=(12,))
    teacher = make_teacher_spec(harm="noise")
    store = tmp_path / "store"
    options = ["--data", data, "--teacher", teacher, "--shard-rows", 10, "--batch-size", 10]
    run(make_generate_command(*options, "--out", tmp_path / "other"))
    with softlabel.open_store(tmp_path / "other") as other:
        planned = other.run
    with Committer.open(store, planned, {"data": str(data), "teachers": [teacher], "batch_size": 10}) as committer:
        request = Request(
            session="one",
            out=str(store),
            run=planned.fingerprint(),
            data=str(data),
            teachers=(teacher,),
            device="cpu",
        )
        source = softlabel.open_source(data)
        keys = [source.digest(start, start + 10) for start in (0, 10, 20)]
        records: list[ShardRecord] = []
        for number in range(3):
            record = label_one(request, number, keys[number], 0.0).record
            assert record is not None
            records.append(record)
        program = "import sys; from softlabel.generation.worker import main; sys.exit(main())"
        from softlabel.store.strict_json import dumps, to_json

        asked = dumps(to_json(request)).decode()
        late = run([sys.executable, "-c", program, asked, "1", keys[1]])
        assert records[1].xxh3 not in late.stdout, "two processes were to answer with other bytes"
        assert len(list_shards(store)) == 4
        committer.commit(*records)
        committer.finish()
    assert len(list_shards(store)) == 3
    with softlabel.open_store(store, verify="full") as opened:
        assert [record.xxh3 for record in opened.shards] == [record.xxh3 for record in records]
        assert len(opened) == 30


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        data = write_jpeg_dataset(tmp_path / "data.parquet", 400)
        options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
        filler = disk / "filler"
        filler.write_bytes(bytes(80 * 1024))
        with start_cluster(tmp_path / "dask", workers=2) as dask:
            placed = ["--out", disk / "store", "--scheduler", dask.address]
            done = run(make_generate_command(*options, *placed), code=1)
            assert "disk is full" in done.stderr.strip().splitlines()[-1]
            assert list_shards(disk / "store")
            subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
            filler.unlink()
            assert "complete, 400 rows" in run(make_generate_command(*options, *placed)).stdout
        run(make_generate_command(*options, "--out", tmp_path / "whole"))
        assert_same_rows(disk / "store", tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_truncated_input_file(tmp_path: Path) -> None:
    """One image of a folder is cut in the middle, one Parquet file is: listed by name, and refused by name."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        (images / f"{number:03d}.jpg").write_bytes(make_jpeg(number))
    cut = images / "017.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    options = ["--data", images, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
    table = write_jpeg_dataset(tmp_path / "data.parquet", 40)
    table.write_bytes(table.read_bytes()[:-100])
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        done = run(make_generate_command(*options, "--out", tmp_path / "store", "--scheduler", dask.address))
        assert "1 bad image" in done.stdout
        other = ["--data", table, *options[2:], "--out", tmp_path / "none", "--scheduler", dask.address]
        refused = run(make_generate_command(*other), code=1)
    assert "data.parquet" in refused.stderr
    with softlabel.open_store(tmp_path / "store", verify="full") as store:
        assert list(store.bad) == ["017.jpg"]
        assert len(store) == 39
    run(make_generate_command(*options, "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_a_worker_that_sees_other_data(tmp_path: Path) -> None:
    """A file of as many rows lies in its place, as on a host whose copy is stale: no row of it gets into the store."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 60)
    stale = tmp_path / "stale.parquet"
    images = [make_jpeg(number) for number in range(60)]
    write_parquet(stale, images, keys=[f"old-{number}" for number in range(60)], labels=[0] * 60)
    namespace = ["unshare", "--mount", "sh", "-c", f'mount --bind "{stale}" "{data}" && exec "$@"', "sh"]
    tried = subprocess.run([*namespace, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"cannot make a mount namespace here: {tried.stderr.strip()}")
    options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
    with start_cluster(tmp_path / "dask", workers=0) as dask:
        dask.worker(within=namespace)
        done = run(make_generate_command(*options, "--out", tmp_path / "store", "--scheduler", dask.address), code=1)
    error = done.stderr.strip().splitlines()[-1]
    assert re.search(r"keys of samples \d+ to \d+ differ from those where the run began", error)
    assert "(worker tcp://127.0.0.1:" in error
    with softlabel.open_store(tmp_path / "store", allow_incomplete=True) as store:
        assert len(store) == 0
    run(make_generate_command(*options, "--out", tmp_path / "store"))
    with softlabel.open_store(tmp_path / "store", verify="full") as store:
        assert store.keys.to_list() == [f"image-{number:05d}.jpg" for number in range(60)]


SLURM = {
    # What SLURM does, on this machine: the script becomes a process group, whose number is the job's.
    "sbatch": 'cp "$1" "{jobs}-$$.sh"\nsetsid sh "{jobs}-$$.sh" > "{jobs}-$$.log" 2>&1 &\n'
    'echo $! >> {jobs}\necho "Submitted batch job $!"\n',
    "scancel": 'for job; do kill -9 -- "-$job"; done\n',
}


def test_workers_that_slurm_starts(tmp_path: Path) -> None:
    """dask-jobqueue's own scripts and calls, with stand-ins for two commands; each worker has two of Dask's threads."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text("#!/bin/sh\n" + text.replace("{jobs}", str(tmp_path / "jobs")))
        (commands / name).chmod(0o755)
    settings = tmp_path / "slurm.yaml"
    words = {"cores": 2, "processes": 1, "memory": "4GB", "interface": "lo", "log_directory": str(tmp_path / "logs")}
    settings.write_text("".join(f"{name}: {value}\n" for name, value in words.items()))
    data = write_jpeg_dataset(tmp_path / "data.parquet", 120)
    marks = tmp_path / "marks"
    marks.mkdir()
    options = ["--data", data, "--shard-rows", 10, "--batch-size", 10, "--no-preflight"]
    slurm = ["--cluster", "slurm", "--cluster-workers", 2, "--cluster-options", settings]
    teacher = make_teacher_spec(marks=marks, seconds=0.5)
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    command = make_generate_command(*options, "--teacher", teacher, "--out", tmp_path / "store", *slurm)
    environment = make_cluster_environment(PATH=path, DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT="2s")
    client = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Both jobs end in the middle, as at their walltime, and others take their place.
    wait_until(lambda: len(list_shards(tmp_path / "store")) >= 2)
    for job in (tmp_path / "jobs").read_text().split():
        os.killpg(int(job), signal.SIGKILL)
    out, error = client.communicate(timeout=200)
    assert client.returncode == 0, error
    assert "complete, 120 rows" in out
    assert len((tmp_path / "jobs").read_text().split()) == 4
    loads = [path.name.split("-")[1] for path in marks.glob("loaded-*")]
    assert sorted(loads) == sorted(set(loads)), "a process loaded its teacher twice"
    (commands / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gpus' >&2\nexit 1\n")
    placed = make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "none", *slurm)
    assert "invalid partition specified: gpus" in run(placed, code=2, PATH=path).stderr.strip().splitlines()[-1]
    run(make_generate_command(*options, "--teacher", make_teacher_spec(), "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_a_bad_image_stops_the_run_if_asked_to(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(60):
        (images / f"{number:03d}.jpg").write_bytes(make_jpeg(number))
    (images / "017.jpg").write_bytes(b"no image")
    options = ["--data", images, "--teacher", make_teacher_spec(seconds=0.2), "--shard-rows", 5, "--batch-size", 5]
    with start_cluster(tmp_path / "dask", workers=2) as dask:
        placed = ["--out", tmp_path / "store", "--scheduler", dask.address, "--on-bad-image", "error"]
        done = run(make_generate_command(*options, *placed, "--no-preflight"), code=1)
        assert "sample '017.jpg'" in done.stderr.strip().splitlines()[-1]
        there = len(list_shards(tmp_path / "store"))
        assert there < 11, "it went on to the end"
        (images / "017.jpg").write_bytes(make_jpeg(17))
        assert "complete, 60 rows" in run(make_generate_command(*options, *placed)).stdout
    run(make_generate_command(*options, "--out", tmp_path / "whole"))
    assert_same_rows(tmp_path / "store", tmp_path / "whole")


def test_threads_are_those_of_the_workers(tmp_path: Path) -> None:
    """Lanes of a worker label side by side, as many as it has threads; Dask's nanny gives it one otherwise."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 80)
    with start_cluster(tmp_path / "dask", workers=1) as dask:
        for threads, lanes in (((), 1), (("--threads", 2), 2)):
            marks = tmp_path / f"marks-{lanes}"
            marks.mkdir()
            spec = make_teacher_spec(marks=marks, seconds=0.2)
            options = ["--data", data, "--teacher", spec, "--shard-rows", 40, "--batch-size", 10, "--no-preflight"]
            store = tmp_path / f"store-{lanes}"
            run(make_generate_command(*options, "--out", store, "--scheduler", dask.address, *threads))
            assert len(list(marks.glob("thread-softlabel-lane_*"))) == lanes
    assert_same_rows(tmp_path / "store-1", tmp_path / "store-2")


def test_names_the_remedy_for_what_is_not_there(tmp_path: Path) -> None:
    data = write_jpeg_dataset(tmp_path / "data.parquet", 8)
    options = ["--data", data, "--teacher", make_teacher_spec(), "--out", tmp_path / "store"]
    done = run(make_generate_command(*options, "--scheduler", "tcp://127.0.0.1:9"), code=2)
    assert "expected a Dask scheduler, found nothing that answers" in done.stderr
    for address in ("nonsense://127.0.0.1:9", "tls://127.0.0.1:9"):
        done = run(make_generate_command(*options, "--scheduler", address), code=2)
        assert "expected an address such as" in done.stderr
    done = run(make_generate_command(*options, "--cluster", "slurm"), code=2)
    assert "--cluster-workers" in done.stderr
    if importlib.util.find_spec("dask_kubernetes") is None:
        done = run(make_generate_command(*options, "--cluster", "kubernetes"), code=2)
        assert "pip install 'softlabel[kubernetes]'" in done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("n_workerz: 3\n")
    done = run(make_generate_command(*options, "--cluster", "local", "--cluster-options", wrong), code=2)
    assert "n_workerz" in done.stderr.strip().splitlines()[-1]
    assert "--cluster-options" in done.stderr.strip().splitlines()[-1]
    done = run(make_generate_command(*options, "--shard-seconds", 5), code=2)
    assert "--cluster" in done.stderr


@contextmanager
def failing_puts(host: str, port: int, failures: int) -> Iterator[str]:
    """A server before the object store that refuses the first puts of shards as an overloaded one does."""
    left = [failures]
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fails = self.command == "PUT" and "/shards/" in self.path and left[0] > 0
                left[0] -= fails
            if fails:
                self._answer(503, [], b"<Error><Code>ServiceUnavailable</Code><Message>later</Message></Error>")
                return
            there = http.client.HTTPConnection(host, port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            there.request(self.command, self.path, body, {**headers, "Host": f"{host}:{port}"})
            answer = there.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read())
            there.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            length = None
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value
                elif name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
        assert left[0] <= 0, "not all failures were asked for"
    finally:
        server.shutdown()
        server.server_close()


def test_an_object_store_whose_puts_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with failing_puts(host, port, failures=12) as endpoint:
            keys = {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_DEFAULT_REGION": "us-east-1",
                "SOFTLABEL_CACHE": str(tmp_path / "cache"),
            }
            for name, value in keys.items():
                monkeypatch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            bucket = f"labels-{uuid.uuid4().hex}"
            fsspec.filesystem("s3").mkdir(bucket)
            data = write_jpeg_dataset(tmp_path / "data.parquet", 60)
            options = ["--data", data, "--teacher", make_teacher_spec(), "--shard-rows", 10, "--batch-size", 10]
            url = f"s3://{bucket}/labels"
            with start_cluster(tmp_path / "dask", workers=2, **keys) as dask:
                done = run(make_generate_command(*options, "--out", url, "--scheduler", dask.address))
            assert "complete, 60 rows" in done.stdout
            run(make_generate_command(*options, "--out", tmp_path / "whole"))
            with softlabel.open_store(url, verify="full") as ours, softlabel.open_store(tmp_path / "whole") as theirs:
                rows = np.arange(60)
                assert list(ours.take(rows).keys) == list(theirs.take(rows).keys)
                np.testing.assert_array_equal(ours.take(rows).scaled_logits, theirs.take(rows).scaled_logits)
            assert run_softlabel("verify", url).returncode == 0
    finally:
        server.stop()


def test_a_teacher_in_a_module_beside_the_client(tmp_path: Path) -> None:
    """Workers have another working folder, and nothing installed that is called like it."""
    data = write_jpeg_dataset(tmp_path / "data.parquet", 30)
    here = tmp_path / "here"
    here.mkdir()
    (here / "own_nets.py").write_text("from tests.support.clusters import Teacher as net\n")
    options = [
        "--data",
        data,
        "--teacher",
        make_teacher_spec().replace("tests.support.clusters:Teacher", "own_nets:net"),
    ]
    run(make_generate_command(*options, "--shard-rows", 10, "--out", tmp_path / "alone"), cwd=here)
    with start_cluster(tmp_path / "dask", workers=1) as dask:
        done = run(
            make_generate_command(
                *options, "--shard-rows", 10, "--out", tmp_path / "there", "--scheduler", dask.address
            ),
            cwd=here,
        )
    assert f"{here / 'own_nets.py'}: uploaded to the workers" in done.stderr
    assert_same_rows(tmp_path / "there", tmp_path / "alone")
