"""A store behind an fsspec URL: the same values, the manifest put last, one writer at a time."""

import contextlib
import json
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from softlabel.cli.main import main
from softlabel.errors import StoreError, StoreIncompleteError, StoreLockedError, StoreNotFoundError
from softlabel.store.open import open_store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from tests.support.datasets import write_dataset
from tests.support.stores import FORMATS, Samples, make_run, write_store
from tests.support.teachers import write_teacher


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "memory":
        yield f"memory://labels-{uuid.uuid4().hex}"
        return
    with s3_server(monkeypatch) as (url, _):
        yield url


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL of a store's place on a server, and what stops the server."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("ENDPOINT_URL", f"http://{host}:{port}"),
            ("ACCESS_KEY_ID", "x"),
            ("DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        s3fs.S3FileSystem.clear_instance_cache()  # one that knows this server's port
        name = f"labels-{uuid.uuid4().hex}"
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}/cifar", server.stop
    finally:
        server.stop()


@pytest.mark.parametrize("lost", ["server", "credentials"])
def test_what_cannot_be_reached_is_not_damaged(
    lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server(monkeypatch) as (url, stop):
        write_store(url, make_run())  # type: ignore[arg-type]
        assert main(["verify", url]) == 0
        capsys.readouterr()
        if lost == "server":
            stop()
        else:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        fsspec.filesystem("s3").clear_instance_cache()
        monkeypatch.setattr(fsspec.filesystem("s3"), "retries", 1)
        for command in ("verify", "repair", "inspect"):
            assert main([command, url]) == 1
            output = "".join(capsys.readouterr())
            assert f"softlabel: {url}/manifest.json: cannot be read: " in output
            assert "check endpoint, network and credentials" in output
            for word in ("DAMAGED", f"damaged: {url}", "remove", "move it"):
                assert word not in output


def test_a_missing_bucket_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.parquet", 4)
    given = ["--data", "data.parquet", "--teacher", write_teacher(tmp_path / "w.safetensors"), "--batch-size", "4"]
    with s3_server(monkeypatch):
        assert main(["generate", *given, "--out", "s3://nobody-made-this/labels"]) == 1
    output = capsys.readouterr().err
    assert "s3://nobody-made-this/labels: cannot write: " in output
    assert "create the folder or bucket first" in output
    assert "free some space" not in output


@pytest.mark.parametrize("format", FORMATS)
def test_written_and_read_behind_a_url(
    bucket: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTLABEL_CACHE", str(tmp_path / "cache"))
    run = make_run(format, views=2)
    with pytest.raises(StoreNotFoundError):
        open_store(bucket)
    samples = write_store(bucket, run, bad=(3,))  # type: ignore[arg-type]
    good = [index for index in range(50) if index != 3]
    for memory in (1 << 20, 100):
        store = open_store(bucket, verify="full", memory=memory)
        for view in range(2):
            rows = store.take(store.lookup([samples.keys[index] for index in good], view=view))
            np.testing.assert_array_equal(rows.columns["logits"], samples.logits[view][good].astype(np.float16))
        assert sum(len(part) for part in pickle.loads(pickle.dumps(store)).stream()) == 98
    write_store(tmp_path / "local", run, bad=(3,))
    assert [one.xxh3 for one in open_store(tmp_path / "local").shards] == [
        one.xxh3 for one in open_store(bucket).shards
    ]
    fs, base = fsspec.core.url_to_fs(bucket)
    fs.invalidate_cache()
    assert not [name for name in fs.find(base) if ".lock" in name or ".tmp" in name]


def test_resume_orphans_and_damage(bucket: str) -> None:
    run = make_run()
    samples = Samples.of(run)
    with Committer.open(bucket, run) as committer:
        plans = committer.missing()
        committer.commit(write_shard(bucket, run, plans[0], *samples.rows(plans[0])))
        orphan = write_shard(bucket, run, plans[1], *samples.rows(plans[1]))
        with pytest.raises(StoreLockedError, match="is writing to this store"):
            Committer.open(bucket, run)
    with pytest.raises(StoreIncompleteError):
        open_store(bucket)
    with Committer.open(bucket, run) as committer:
        assert [plan.number for plan in committer.missing()] == [2, 3]
        for plan in committer.missing():
            committer.commit(write_shard(bucket, run, plan, *samples.rows(plan)))
        committer.finish()
    assert verify_store(bucket).ok
    fs, base = fsspec.core.url_to_fs(bucket)
    name = f"{base}/{orphan.file}"
    raw = bytearray(fs.cat_file(name))
    raw[100] ^= 4
    fs.pipe_file(name, bytes(raw))
    problems = verify_store(bucket).problems
    assert len(problems) == 1
    assert orphan.file in problems[0]
    fs.pipe_file(name, bytes(raw[:-1]))
    with pytest.raises(StoreError, match=orphan.file):
        open_store(bucket)


def test_a_stale_lease_is_taken_and_its_holder_stops(bucket: str) -> None:
    run = make_run()
    samples = Samples.of(run)
    fs, base = fsspec.core.url_to_fs(bucket)
    dead = Committer.open(bucket, run)
    old = json.loads(fs.cat_file(f"{base}/.lock"))
    fs.pipe_file(f"{base}/.lock", json.dumps({**old, "at": time.time() - 1000}).encode())
    with Committer.open(bucket, run) as committer:
        plan = committer.missing()[0]
        record = write_shard(bucket, run, plan, *samples.rows(plan))
        with pytest.raises(StoreLockedError, match="took the lease"):
            dead.commit(record)
        dead.close()
        committer.commit(record)
        with pytest.raises(StoreLockedError):
            Committer.open(bucket, run)
    assert open_store(bucket, allow_incomplete=True).manifest.totals.shards == 1
