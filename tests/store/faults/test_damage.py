"""Damaged and forged stores: one flipped bit, cut files, false records. Always a clear error, never wrong values."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from softlabel.errors import StoreCorruptError, StoreError
from softlabel.store.encodings import Head
from softlabel.store.open import open_store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from tests.support.documents import Documents, make_samples, make_token_run
from tests.support.shared_data import ROOT
from tests.support.stores import FORMATS, Samples, make_run, read_files, write_head_store, write_store

HEAD = Head(width=4, hidden="float16")
both_kinds = pytest.mark.parametrize("kind", ["images", "tokens"])


def write_every_kind_of_file(root: Path, format: str, kind: str) -> None:
    """A store with a root, a segment, shards and a file that they share."""
    if kind == "images":
        write_head_store(root, make_run(format, samples=40, encoding=HEAD))
    else:
        run = make_token_run(format, samples=40, classes=20)
        with Committer.open(root, run) as committer:
            committer.add_extra("tokenizer", json.dumps({"model": {"vocab": {"a": 0}}}).encode(), "json")
        write_store(root, run, Documents.of(run))


@pytest.mark.parametrize("format", FORMATS)
@both_kinds
def test_every_flipped_bit_is_found_and_named(tmp_path: Path, format: str, kind: str) -> None:
    root = tmp_path / "s"
    write_every_kind_of_file(root, format, kind)
    assert verify_store(root).ok
    whole = read_files(root)
    rng = np.random.default_rng(7)
    names = sorted(whole)
    hit = set()
    for turn in range(200):
        name = names[turn % len(names)] if turn < 100 else str(rng.choice(names))
        raw = bytearray(whole[name])
        position, bit = int(rng.integers(len(raw))), int(rng.integers(8))
        raw[position] ^= 1 << bit
        (root / name).write_bytes(raw)
        try:
            problems = verify_store(root).problems
        except StoreError as error:
            problems = (str(error),)
        assert any(name in problem for problem in problems), (name, position, bit, problems)
        with pytest.raises(StoreError):
            open_store(root, verify="full")
        (root / name).write_bytes(whole[name])
        hit.add(name.split("/")[0])
    assert hit == {"manifest.json", "segments", "shards", "extra"}
    assert verify_store(root).ok


@pytest.mark.parametrize("format", FORMATS)
@both_kinds
def test_cut_and_grown_files_are_found_by_a_cheap_open(tmp_path: Path, format: str, kind: str) -> None:
    root = tmp_path / "s"
    write_every_kind_of_file(root, format, kind)
    for name, raw in read_files(root).items():
        for wrong in (raw[:-1], raw[: len(raw) // 2], b"", raw + b"x"):
            (root / name).write_bytes(wrong)
            with pytest.raises(StoreError, match=name.split("-")[0]):
                open_store(root, verify="sizes")
        (root / name).unlink()
        with pytest.raises(StoreError):
            open_store(root, verify="sizes")
        (root / name).write_bytes(raw)
    open_store(root, verify="full")


@pytest.mark.parametrize("format", FORMATS)
def test_verified_once_until_a_file_changes(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTLABEL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "s"
    write_head_store(root, make_run(format, samples=40, encoding=HEAD))
    open_store(root)
    (note,) = (tmp_path / "cache" / "verified").iterdir()
    before = note.stat().st_mtime_ns
    open_store(root, verify="once")
    assert note.stat().st_mtime_ns == before, "verified again though nothing had changed"
    for name, whole in read_files(root).items():
        times = os.stat(root / name).st_atime_ns, os.stat(root / name).st_mtime_ns
        raw = bytearray(whole)
        raw[len(raw) // 3] ^= 4
        (root / name).write_bytes(raw)
        os.utime(root / name, ns=times)  # the change leaves no trace in its time
        for options in ({}, {"verify": "full"}, {"verify": "once"}):
            with pytest.raises(StoreError, match=name.split("-")[0]):
                open_store(root, **options)
        (root / name).write_bytes(whole)
        open_store(root, verify="once")
    # Another store in its place, or a cache that cannot be read, is nothing that was verified.
    assert note.stat().st_mtime_ns != before
    note.write_bytes(b"{")
    open_store(root, verify="once")
    assert len(note.read_bytes()) > 10


def resign(root: Path, change: Any) -> None:
    """Let a hostile hand change the manifest and make its checksum right again."""
    path = root / "manifest.json"
    value = json.loads(path.read_text())
    del value["checksum"]
    change(value)
    body = json.dumps(value, indent=1).removesuffix("\n}")
    raw = f'{body},\n "checksum": "{"0" * 32}"\n}}\n'.encode()
    path.write_bytes(raw[:-36] + xxhash.xxh3_128_hexdigest(raw).encode() + raw[-4:])


def resign_record(root: Path, change: Any) -> None:
    """Change the first record of the first segment, with every hash above it made right again."""
    old = next((root / "segments").iterdir())
    value = json.loads(old.read_bytes())
    change(value["shards"][0])
    raw = json.dumps(value).encode()
    digest = xxhash.xxh3_128_hexdigest(raw)
    name = f"segments/00000-{digest}.json"
    (root / name).write_bytes(raw)
    ref = {"file": name, "shards": len(value["shards"]), "bytes": len(raw), "xxh3": digest}
    resign(root, lambda one: one.update(segments=[ref]))


def test_hostile_manifests(tmp_path: Path) -> None:
    root = tmp_path / "s"
    write_store(root, make_run())
    whole = read_files(root)
    seg = "segments/00000-" + "0" * 32 + ".json"
    changes = [
        lambda v: v.update(run=[]),
        lambda v: v.update(totals="many"),
        lambda v: v["run"].update(num_classes="7"),
        lambda v: v["run"].update(num_classes=0),
        lambda v: v["run"].update(num_classes=2**40),
        lambda v: v["run"].update(temperature=True),
        lambda v: v["run"].update(temperature=0),
        lambda v: v["run"].update(shard_rows=0),
        lambda v: v["run"].update(members=[]),
        lambda v: v["run"].update(format="pickle"),
        lambda v: v["run"]["encoding"].update(name="pickle"),
        lambda v: v["run"]["dataset"].update(rows=-5),
        lambda v: v["run"]["views"].update(count=2**62),
        lambda v: v["run"]["dataset"].update(rows=2**62),
        lambda v: v["run"].update(surprise=1),
        lambda v: v.pop("run"),
        lambda v: v.update(segments=[{"file": "../../etc/passwd", "shards": 1, "bytes": 1, "xxh3": "0" * 32}]),
        lambda v: v.update(segments=[{"file": seg, "shards": 1, "bytes": 2**40, "xxh3": "0" * 32}]),
        lambda v: v.update(segments=[{"file": seg, "shards": 1, "bytes": 5, "xxh3": "0" * 32}]),
        lambda v: v.update(format="something-else"),
    ]
    for change in changes:
        (root / "manifest.json").write_bytes(whole["manifest.json"])
        resign(root, change)
        with pytest.raises(StoreError, match=r"manifest\.json|segments"):
            open_store(root).take([0])
        assert verify_store(root).problems
    for raw in (b"", b"{}", b"\x00" * 5000, b"[" * 100_000, os.urandom(3000), b"null\n", b'{"a":NaN}'):
        (root / "manifest.json").write_bytes(raw)
        with pytest.raises(StoreCorruptError, match=r"manifest\.json"):
            open_store(root)
    (root / "manifest.json").write_bytes(whole["manifest.json"])
    names = [
        "../outside.parquet",
        "/etc/passwd",
        "shards/../../outside.parquet",
        "shards/00000-" + "g" * 32 + ".parquet",
        "shards/00000-" + "0" * 32 + ".parquet\x00",
        "shards/00001-" + "0" * 32 + ".parquet",
        "shards\\00000-" + "0" * 32 + ".parquet",
    ]
    for name in names:
        resign_record(root, lambda one, name=name: one.update(file=name))
        with pytest.raises(StoreCorruptError, match="segments"):
            open_store(root)
        for key in ("rows", "bytes"):
            resign_record(root, lambda one, key=key: one.update({key: -1}))
            with pytest.raises(StoreCorruptError):
                open_store(root)
    assert not (tmp_path / "outside.parquet").exists()


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    root, secret = tmp_path / "s", tmp_path / "secret"
    write_store(root, make_run())
    shard = next((root / "shards").iterdir())
    secret.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(secret)
    for call in (open_store, lambda path: open_store(path, verify="full")):
        with pytest.raises(StoreCorruptError, match="link"):
            call(root)
    assert any("link" in problem for problem in verify_store(root).problems)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(StoreCorruptError, match="device"):
        open_store(root)
    shard.unlink()
    shard.write_bytes(secret.read_bytes())
    open_store(root, verify="full")
    manifest = root / "manifest.json"
    manifest.rename(tmp_path / "elsewhere")
    manifest.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreCorruptError, match="link"):
        open_store(root)
    manifest.unlink()
    (tmp_path / "elsewhere").rename(manifest)
    (root / "shards").rename(tmp_path / "shards")
    (root / "shards").symlink_to(tmp_path / "shards")
    with pytest.raises(StoreCorruptError, match="link"):
        open_store(root)
    with pytest.raises(StoreError, match="link"):
        Committer.open(root, make_run())


def test_a_manifest_of_a_hundred_megabytes(tmp_path: Path) -> None:
    root = tmp_path / "s"
    write_store(root, make_run())
    with open(root / "manifest.json", "ab") as file:
        file.truncate(100 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StoreCorruptError, match="at most"):
        open_store(root)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def lying_parquet(identity: bytes, table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"softlabel": identity.decode()})
    return sink.getvalue()


def hostile_shards(format: str, good: bytes) -> list[bytes]:
    rng = np.random.default_rng(3)
    wrong = [b"", b"PAR1", os.urandom(5000), b"PAR1" + os.urandom(500) + b"PAR1", good[: len(good) // 2]]
    for _ in range(150):  # damage that would pass if only the hash were right
        raw = bytearray(good)
        for position in rng.integers(0, len(raw), int(rng.integers(1, 40))):
            raw[position] = int(rng.integers(256))
        wrong.append(bytes(raw))
    for edge in range(1, 60):  # footers and superblocks are at the edges
        for position in (edge, len(good) - edge):
            raw = bytearray(good)
            raw[position] ^= 0xFF
            wrong.append(bytes(raw))
    if format == "parquet":
        file = pq.ParquetFile(io.BytesIO(good))
        identity, table = file.metadata.metadata[b"softlabel"], file.read()
        changed = json.loads(identity)
        wrong.append(lying_parquet(json.dumps({**changed, "rows": 10**12, "stop": 10**12}).encode(), table))
        wrong.append(lying_parquet(identity, table.slice(1)))
        wrong.append(lying_parquet(identity, table.drop_columns(["label"])))
        wrong.append(lying_parquet(identity, table, compression="zstd"))
        wrong.append(lying_parquet(b"{}", table))
        column = {**changed["columns"][0], "width": 2**31 - 1}
        wrong.append(lying_parquet(json.dumps({**changed, "columns": [column]}).encode(), table))
    return wrong


def hostile_hdf5(good: bytes, folder: Path) -> list[bytes]:
    def edited(change: Any) -> bytes:
        path = folder / "edit.h5"
        path.write_bytes(good)
        with h5py.File(path, "r+") as file:
            change(file)
        return path.read_bytes()

    def swap(name: str, **how: Any) -> Any:
        def change(file: h5py.File) -> None:
            del file[name]
            file.create_dataset(name, **how)

        return change

    def link(file: h5py.File) -> None:
        del file["logits"]
        file["logits"] = h5py.ExternalLink("/etc/passwd", "/")

    def outside(file: h5py.File) -> None:
        del file["logits"]
        file.create_dataset("logits", (16, 7), "<f2", external=[("/etc/passwd", 0, 224)])

    def soft(file: h5py.File) -> None:
        del file["logits"]
        file["logits"] = h5py.SoftLink("/logits")

    return [
        edited(link),
        edited(outside),
        edited(soft),
        edited(swap("logits", shape=(10**9, 7), dtype="<f2", chunks=(1, 7))),
        edited(swap("logits", shape=(16, 7), dtype="<f2", chunks=(1, 7), compression="gzip")),
        edited(swap("logits", shape=(16, 7), dtype="<f4")),
        edited(swap("key_offsets", data=np.arange(17)[::-1] * 10**9)),
        edited(lambda file: file.attrs.__delitem__("softlabel")),
        edited(lambda file: file.attrs.__setitem__("softlabel", 3)),
        edited(lambda file: file.create_group("more")),
    ]


def read_hostile(root: str, format: str, shards: list[bytes], errors: Any) -> None:
    """In a process of its own with little memory: a crash or a blow-up ends it."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    silent = []
    expected = None
    for number, raw in enumerate([None, *shards]):
        if raw is not None:
            digest = xxhash.xxh3_128_hexdigest(raw)
            suffix = "parquet" if format == "parquet" else "h5"
            name = f"shards/00000-{digest}.{suffix}"
            (Path(root) / name).write_bytes(raw)
            resign_record(Path(root), lambda one, n=name, r=raw, d=digest: one.update(file=n, bytes=len(r), xxh3=d))
        try:
            store = open_store(root)
            rows = store.take(range(len(store)))
            found = (rows.keys, rows.labels.tolist(), rows.columns["logits"].tobytes())
            for _ in store.stream():
                pass
            expected = expected or found
            if found != expected and verify_store(root).ok:
                silent.append(number)  # allowed: with right hashes other values are simply other labels
        except StoreError:
            pass
        except BaseException as error:
            errors.put(f"{number}: {type(error).__name__}: {error}")
    errors.put("done")


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("parquet", "images"),
        ("hdf5", "tokens"),
        pytest.param("hdf5", "images", marks=pytest.mark.slow),
        pytest.param("parquet", "tokens", marks=pytest.mark.slow),
    ],
)
def test_hostile_shards_with_right_hashes(tmp_path: Path, format: str, kind: str) -> None:
    root = tmp_path / "s"
    write_store(root, *make_samples(kind, format, classes=7))
    good = next(path for path in (root / "shards").iterdir() if path.name.startswith("00000-")).read_bytes()
    shards = hostile_shards(format, good) + (hostile_hdf5(good, tmp_path) if format == "hdf5" else [])
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    process = context.Process(target=read_hostile, args=(str(root), format, shards, errors))
    process.start()
    found = []
    while (one := errors.get()) != "done":
        found.append(one)
    process.join()
    assert process.exitcode == 0
    assert not found


BUILD = """
import os, sys
from softlabel.store.open import open_store
store = open_store(sys.argv[1], memory=1000)
rows = store.take(range(0, len(store), 3))
print(len(rows), int(rows.columns["logits"].view("u2").astype("u8").sum()), len(rows.keys[5]))
"""


def test_cache_of_two_builders_at_once_and_its_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(samples=3000, classes=50, shard_rows=256)
    samples = write_store(tmp_path / "s", run)
    monkeypatch.setenv("SOFTLABEL_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", BUILD, str(tmp_path / "s")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in both}
    expected = samples.logits[0, ::3].astype(np.float16)
    assert said == {f"1000 {int(expected.view(np.uint16).astype(np.uint64).sum())} {len(samples.keys[15])}\n"}
    entries = sorted(path for path in (tmp_path / "cache").rglob("*.bin"))
    assert [path.name for path in entries] == ["content.bin", "key.bin", "key_offsets.bin", "label.bin", "logits.bin"]
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
    built = {path: path.stat().st_mtime_ns for path in entries}
    store = open_store(tmp_path / "s", memory=1000)
    np.testing.assert_array_equal(store.take(range(3000)).columns["logits"], samples.logits[0].astype(np.float16))
    np.testing.assert_array_equal(store.lookup(samples.keys), np.arange(3000))
    assert {path: path.stat().st_mtime_ns for path in entries} == built
    # A flipped bit in the cache is not believed: the store is decoded again.
    logits = entries[-1]
    raw = bytearray(logits.read_bytes())
    raw[12345] ^= 1
    logits.write_bytes(raw)
    again = open_store(tmp_path / "s", memory=1000).take(range(3000))
    np.testing.assert_array_equal(again.columns["logits"], samples.logits[0].astype(np.float16))
    assert Samples.of(run).keys == again.keys


@pytest.mark.parametrize("format", ["parquet", "hdf5"])
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, 0.5, "no zero"])
def test_verify_names_the_row_of_wrong_logits_under_a_right_hash(tmp_path: Path, format: str, wrong: object) -> None:
    run, root = make_run(format), tmp_path / "s"
    samples = Samples.of(run)
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            rows, bad = samples.rows(plan)
            if plan.number == 2:
                if wrong == "no zero":
                    rows.columns["logits"][5] -= np.float16(1)
                else:
                    rows.columns["logits"][5, 1] = wrong
                record = write_shard(root, run, plan, rows, bad)
                damaged = record.file
            else:
                record = write_shard(root, run, plan, rows, bad)
            committer.commit(record)
        committer.finish()
    (problem,) = verify_store(root).problems
    assert damaged in problem
    assert "row 5 of a block" in problem


UNREADABLE = """
import sys
from pathlib import Path
from softlabel.cli.main import main
for root in sys.argv[1:]:
    for name in ("manifest.json", "segments", "shards", "shards/*"):
        paths = list(Path(root).glob(name))
        modes = [path.stat().st_mode for path in paths]
        for path in paths:
            path.chmod(0)
        assert main(["verify", root]) == 1, name
        for path, mode in zip(paths, modes):
            path.chmod(mode)
"""


def test_what_may_not_be_read_is_not_damaged(tmp_path: Path) -> None:
    """In a process that file permissions hold for, which they do not for root."""
    powers = "-dac_override,-dac_read_search"
    as_user = ["setpriv", f"--inh-caps={powers}", f"--bounding-set={powers}"] if os.geteuid() == 0 else []
    if as_user and shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    for format in FORMATS:
        write_store(tmp_path / format, make_run(format))
    code = [sys.executable, "-c", UNREADABLE, *(str(tmp_path / format) for format in FORMATS)]
    done = subprocess.run([*as_user, *code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * 4
    for line in lines:
        assert "cannot be read: Permission denied; it need not be damaged" in line
