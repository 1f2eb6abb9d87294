"""Parquet and tar files behind URLs: few requests, bounded memory, clear refusals; and from there to a student."""

import csv
import functools
import http.server
import io
import os
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import softlabel.dataset.storage_fsspec as remote
from softlabel.dataset import open_source
from softlabel.errors import DataError, SpecError
from softlabel.generation.generate import generate
from softlabel.training import TrainConfig, train
from tests.support.commands import run_softlabel
from tests.support.datasets import add_tar_member, make_jpeg, write_dataset
from tests.support.s3 import serve_s3
from tests.support.teachers import write_teacher


class Counted(MemoryFileSystem):  # type: ignore[misc]
    """A file system in memory that notes what was asked of it, as an object store would bill it."""

    protocol = "counted"
    store: dict[str, Any] = {}  # noqa: RUF012
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        assert start is not None
        assert end is not None, "no file is read as a whole"
        Counted.asked.append((path.rpartition("/")[2], start, end))
        return bytes(super().cat_file(path, start=start, end=end, **options))

    def _open(self, *arguments: Any, **options: Any) -> Any:
        return super()._open(*arguments, **options)


fsspec.register_implementation("counted", Counted, clobber=True)


@pytest.fixture
def counted() -> str:
    Counted.store.clear()
    Counted.asked.clear()
    return f"counted://{uuid.uuid4().hex}"


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    Counted.asked.clear()
    return url


def tar_of(images: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in images.items():
            add_tar_member(archive, name, data)
    return buffer.getvalue()


def taken() -> tuple[int, int]:
    """Requests and bytes since the last call."""
    found = len(Counted.asked), sum(stop - start for _, start, stop in Counted.asked)
    Counted.asked.clear()
    return found


def test_a_tar_is_read_by_ranges(counted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "AHEAD", 1 << 20)
    images = {f"{i:04d}.jpg": os.urandom(200_000) for i in range(40)}
    data = tar_of(images)
    put(f"{counted}/b.tar", tar_of({f"{i}.jpg": bytes(10) for i in range(3)}))
    source = open_source(put(f"{counted}/a.tar", data))
    requests, size = taken()
    # Members that are smaller than what one reads ahead are read through, in order and once.
    assert requests <= 25
    assert size <= 1.1 * len(data)
    (one,) = source.read([17])
    assert (one.raw, taken()) == (images["0017.jpg"], (1, 200_000))
    found = source.read([30, 3, 31, 3])
    assert [sample.raw for sample in found] == [images[f"{i:04d}.jpg"] for i in (30, 3, 31, 3)]
    assert taken()[0] == 2
    # In order: few requests, each byte about once, and never more than a window ahead.
    for start in range(0, 40, 2):
        assert [sample.raw for sample in source.read([start, start + 1])] == list(images.values())[start : start + 2]
        assert all(stop - start <= 1 << 20 for _, start, stop in Counted.asked)
    requests, size = taken()
    assert requests <= 12
    assert size <= 1.2 * len(data)


def test_large_members_are_stepped_over(counted: str) -> None:
    images = {f"{i}.png": bytes(3 << 20) for i in range(6)}
    source = open_source(put(f"{counted}/a.tar", tar_of(images)))
    requests, size = taken()
    assert len(source) == 6
    assert requests <= 16
    assert size <= 1 << 20


def test_small_images_come_many_at_a_time(counted: str) -> None:
    images = {f"{i:04d}.jpg": make_jpeg(i) for i in range(500)}
    source = open_source(put(f"{counted}/a.tar", tar_of(images)))
    assert taken()[0] <= 5
    for start in range(0, 500, 10):
        assert [s.raw for s in source.read(range(start, start + 10))] == list(images.values())[start : start + 10]
    assert taken()[0] <= 5


def test_a_row_group_is_one_request_a_column(counted: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a.parquet", 300)
    pq.write_table(pq.read_table(path), path, row_group_size=50, compression="none")
    source = open_source(put(f"{counted}/a.parquet", path.read_bytes()))
    taken()
    group = pq.read_metadata(path).row_group(3)
    (sample,) = source.read([160])
    assert sample.raw == make_jpeg(160)
    requests, size = taken()
    assert requests <= 2
    assert size <= group.total_byte_size + (64 << 10)
    source.read(range(150, 200))
    assert taken() == (0, 0)


def test_many_footers_at_once(counted: str, tmp_path: Path) -> None:
    for number in range(20):
        path = write_dataset(tmp_path / f"{number:02d}.parquet", 3, seed=number)
        table = pq.read_table(path)
        keys = [{"bytes": row["bytes"], "path": f"{number}/{i}"} for i, row in enumerate(table["image"].to_pylist())]
        pq.write_table(table.set_column(0, "image", [keys]), path)
        put(f"{counted}/{number:02d}.parquet", path.read_bytes())
    source = open_source(f"{counted}?rows=0:60")
    assert source.keys() == [f"{number}/{i}" for number in range(20) for i in range(3)]
    assert [sample.raw for sample in source.read([4, 59])] == [make_jpeg(1_000_001), make_jpeg(19_000_002)]


@pytest.mark.parametrize(
    ("where", "reason"),
    {
        "memory://nothing-here": "expected a file or folder, found nothing",
        "memory://nothing-here/a.parquet": "expected a file or folder, found nothing",
        "memory://nothing-here/{0..3}.tar": "expected a file or folder, found nothing",
        "memory://nothing-here/*.tar": r"no file matches \*\.tar|found nothing there",
        "{bucket}/*.pq": r"no file matches \*\.pq",
        "{bucket}?files=*.pq": "no Parquet or tar file matches",
        "{bucket}/a.json": r"expected .parquet or .tar files, .*; found a \.json file",
        "{bucket}/a.npy": "download it first",
        "{bucket}/pictures": "pack them into tar shards",
        "unheard-of://bucket/a.tar": "unheard-of",
        "absent://bucket/a.tar": "needs a package that is not installed: .*no_such_package",
        "memory://{a,b}": "the bucket or host cannot be part of a pattern",
        "pipe:cat a.tar": "no such file or folder",
    }.items(),
)
def test_what_is_not_there(where: str, reason: str, tmp_path: Path) -> None:
    fsspec.register_implementation("absent", "no_such_package.FS", errtxt="install no_such_package", clobber=True)
    bucket = f"memory://{uuid.uuid4().hex}"
    put(f"{bucket}/a.json", b"{}")
    put(f"{bucket}/pictures/a.jpg", make_jpeg(1))
    with pytest.raises(SpecError, match=reason):
        open_source(where.replace("{bucket}", bucket))


def test_a_damaged_file_is_named() -> None:
    bucket = f"memory://{uuid.uuid4().hex}"
    data = tar_of({"a.jpg": make_jpeg(1), "b.jpg": make_jpeg(2)})
    put(f"{bucket}/cut.tar", data[:1500])
    with pytest.raises(DataError, match=rf"{bucket}/cut\.tar: expected a tar file, found a damaged"):
        open_source(f"{bucket}/cut.tar")
    put(f"{bucket}/text.parquet", b"text")
    with pytest.raises(DataError, match=rf"{bucket}/text\.parquet: expected a Parquet file"):
        open_source(f"{bucket}/text.parquet")
    source = open_source(put(f"{bucket}/a.tar", data))
    fsspec.filesystem("memory").rm(f"{bucket}/a.tar".partition(":/")[2])
    with pytest.raises(DataError, match=rf"{bucket}/a\.tar: cannot be read: FileNotFoundError"):
        source.read([0])


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    """Python's own web server, which knows no ranges."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_server_without_ranges_or_without_a_list(plain_server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    (tmp_path / "a.tar").write_bytes(tar_of({f"{i}.jpg": os.urandom(5000) for i in range(900)}))
    with pytest.raises(DataError, match=r"a\.tar: .*the server does not serve ranges"):
        open_source(f"{plain_server}/a.tar")
    with pytest.raises(SpecError, match="a web server has no complete, ordered list of files"):
        open_source(f"{plain_server}/*.tar")
    with pytest.raises(SpecError, match="found nothing"):
        open_source(f"{plain_server}/b.tar")
    with pytest.raises(SpecError, match="cannot be reached"):
        open_source("http://127.0.0.1:9/b.tar")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    yield from serve_s3()


def test_from_s3_to_a_student(s3: str, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    local = write_dataset(tmp_path / "a.parquet", 40)
    rows = pq.read_table(local).to_pylist()
    for number in range(2):
        part = rows[number * 20 : number * 20 + 20]
        members = {}
        for row in part:
            members[row["image"]["path"]] = row["image"]["bytes"]
            members[row["image"]["path"].replace(".jpg", ".cls")] = b"%d" % row["label"]
        put(f"{s3}/tars/{number}.tar", tar_of(members))
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / "tars" / f"{number}.tar").write_bytes(tar_of(members))
    put(f"{s3}/a.parquet", local.read_bytes())
    options = {"teachers": [teacher], "batch_size": 16, "shard_rows": 16}
    generate(local, out=tmp_path / "local", workers=0, **options)
    generate(f"{s3}/tars/{{0..1}}.tar", out=tmp_path / "tar", workers=2, **options)
    command = ["generate", "--data", f"{s3}/a.parquet", "--out", tmp_path / "far", "--teacher", teacher]
    run_softlabel(*command, "--batch-size", 16, "--shard-rows", 16, "--workers", 2)
    tables = {out: pq.read_table(sorted((tmp_path / out).rglob("*.parquet"))[0]) for out in ("local", "far", "tar")}
    assert tables["far"].equals(tables["local"])
    assert tables["tar"]["logits"].equals(tables["local"]["logits"])
    assert tables["tar"]["content"].equals(tables["local"]["content"])
    assert tables["tar"]["key"].to_pylist() == [key[:-4] for key in tables["local"]["key"].to_pylist()]
    losses = []
    for data, run in ((f"{s3}/tars", "far"), (str(tmp_path / "tars"), "here")):
        config = TrainConfig(
            data=data,
            labels=str(tmp_path / "tar"),
            student="zoo:resnet8?num_classes=4",
            out=str(tmp_path / f"run-{run}"),
            epochs=1,
            batch_size=8,
            workers=2 if run == "far" else 0,
        )
        with open(Path(train(config).out) / "metrics.csv", newline="") as file:
            losses.append([(row["loss"], row["soft_loss"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1]


def test_the_command_line_refuses_with_code_2(s3: str, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    for where in (f"{s3}/nothing.parquet", tmp_path / "a.tar.gz"):
        (tmp_path / "a.tar.gz").write_bytes(b"")
        done = run_softlabel("generate", "--data", where, "--teacher", teacher, "--out", tmp_path / "out", code=2)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert str(where).partition("://")[2] in done.stderr
