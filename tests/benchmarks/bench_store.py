"""The store against raw pyarrow, h5py and numpy on the same files: `python -m tests.benchmarks.bench_store`.

C = 1000, float16, 100,000 rows (200 MB), files in the page cache, medians of interleaved runs. Each line prints the
ratio that the store reaches and the one that it must reach.
"""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from softlabel.common.keys import Keys
from softlabel.store.formats.base import Rows
from softlabel.store.key_index import KeyIndex
from softlabel.store.manifest import DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from tests.benchmarks.timing import interleaved

ROWS, CLASSES, SHARD_ROWS, GROUP = 100_000, 1000, 16_384, 4096
REPEATS = 7
failures: list[str] = []


def report(what: str, reached: float, goal: float, note: str = "") -> None:
    verdict = "ok" if reached >= goal else "BELOW"
    if reached < goal:
        failures.append(what)
    print(f"{what:<58} {reached:6.2f}  (at least {goal:.2f})  {verdict}  {note}", flush=True)


def run_of(format: str, rows: int = ROWS, shard_rows: int = SHARD_ROWS) -> Run:
    member = Member(spec="zoo:resnet8", sha256="0" * 64, num_classes=CLASSES)
    info = DatasetInfo(kind="parquet", rows=rows, fingerprint="f" * 32)
    return Run(
        format=format, num_classes=CLASSES, temperature=4.0, members=(member,), dataset=info, shard_rows=shard_rows
    )  # type: ignore[arg-type]


def data() -> tuple[list[str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (ROWS, CLASSES)).astype(np.float16)
    logits -= logits.max(axis=1, keepdims=True)
    keys = [f"train/n{number % 1000:08d}/image-{number:08d}.JPEG" for number in range(ROWS)]
    return keys, np.arange(ROWS) % CLASSES, logits


def write(root: Path, format: str, keys: list[str], labels: np.ndarray, logits: np.ndarray) -> None:
    run = run_of(format)
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            part = slice(plan.start, plan.stop)
            rows = Rows(keys=keys[part], labels=labels[part], columns={"logits": logits[part]})
            committer.commit(write_shard(root, run, plan, rows))
        committer.finish()


def touch(array: np.ndarray) -> int:
    """What a consumer does at least: read every byte."""
    return int(array.reshape(-1).view(np.uint64).max())


def raw_parquet(files: list[Path], columns: list[str]) -> int:
    """The best measured way: memory map, row group by row group, no threads, a view on the buffer."""
    seen = 0
    for path in files:
        file = pq.ParquetFile(pa.memory_map(str(path)), pre_buffer=False)
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=columns, use_threads=False)
            for chunk in table.column("logits").chunks:
                flat = np.frombuffer(chunk.buffers()[1], np.float16, len(chunk) * CLASSES, chunk.offset * 2 * CLASSES)
                seen += touch(flat.reshape(-1, CLASSES))
    return seen


def raw_hdf5(files: list[Path]) -> int:
    seen = 0
    buffer = np.empty((GROUP, CLASSES), np.float16)
    for path in files:
        with h5py.File(path, "r") as file:
            dataset = file["logits"]
            for start in range(0, len(dataset), GROUP):
                count = min(GROUP, len(dataset) - start)
                dataset.read_direct(buffer, np.s_[start : start + count], np.s_[:count])
                seen += touch(buffer[:count])
    return seen


def streamed(root: Path, columns: list[str] | None) -> int:
    return sum(touch(part.columns["logits"]) for part in open_store(root).stream(columns))


def bench_stream(folder: Path) -> None:
    roots = {name: folder / name for name in ("parquet", "hdf5")}
    files = {name: sorted((root / "shards").iterdir()) for name, root in roots.items()}
    everything = ["key", "label", "content", "logits"]
    seconds = interleaved(
        {
            "raw parquet": lambda: raw_parquet(files["parquet"], ["logits"]),
            "our parquet": lambda: streamed(roots["parquet"], ["logits"]),
            "raw parquet, all": lambda: raw_parquet(files["parquet"], everything),
            "our parquet, all": lambda: streamed(roots["parquet"], None),
            "raw hdf5": lambda: raw_hdf5(files["hdf5"]),
            "our hdf5": lambda: streamed(roots["hdf5"], ["logits"]),
        },
        REPEATS,
    )
    size = ROWS * CLASSES * 2 / 1e9
    for name, words in (
        ("parquet", "pyarrow"),
        ("parquet, all", "pyarrow, every column"),
        ("hdf5", "h5py read_direct"),
    ):
        ratio = seconds[f"raw {name}"] / seconds[f"our {name}"]
        report(f"stream {name.split(',')[0]} / raw {words}", ratio, 0.90, f"{size / seconds[f'our {name}']:.1f} GB/s")


def bench_take(folder: Path, logits: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    stores = {
        "parquet in RAM": open_store(folder / "parquet"),
        "parquet, mapped cache": open_store(folder / "parquet", memory=64 << 20),
        "hdf5 in place": open_store(folder / "hdf5"),
    }
    picks = [rng.integers(0, ROWS, 256) for _ in range(200)]

    def gather() -> None:
        for rows in picks:
            logits[rows]

    def taken(store: Store) -> Callable[[], None]:
        def run() -> None:
            for rows in picks:
                store.take(rows)

        return run

    seconds = interleaved({"numpy": gather, **{name: taken(store) for name, store in stores.items()}}, REPEATS)
    for name in stores:
        each = seconds[name] / len(picks)
        ratio = seconds["numpy"] / seconds[name]
        report(f"take 256 rows, {name} / numpy gather", ratio, 0.5, f"{each * 1e3:.3f} ms (at most 2 ms)")


def bench_write(folder: Path, keys: list[str], labels: np.ndarray, logits: np.ndarray) -> None:
    run = run_of("parquet")
    schema = pq.ParquetFile(next((folder / "parquet" / "shards").iterdir())).schema_arrow
    target = folder / "raw"

    def raw() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for plan in run.plan():
            path = target / f"{plan.number}.parquet"
            options = {"compression": "none", "use_dictionary": ["view", "label"], "write_statistics": False}
            with pq.ParquetWriter(path, schema, store_schema=False, data_page_size=1 << 18, **options) as writer:
                for start in range(plan.start, plan.stop, GROUP):
                    rows = slice(start, min(start + GROUP, plan.stop))
                    count = rows.stop - rows.start
                    arrays = [
                        pa.array(keys[rows], pa.string()),
                        pa.array(np.zeros(count, np.int32)),
                        pa.array(labels[rows]),
                        pa.nulls(count, pa.uint64()),
                        pa.Array.from_buffers(schema.field("logits").type, count, [None, pa.py_buffer(logits[rows])]),
                    ]
                    writer.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=GROUP)
            with open(path, "rb") as file:
                xxhash.xxh3_128_hexdigest(memoryview(np.memmap(path, np.uint8, "r")))
                os.fsync(file.fileno())

    def ours() -> None:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        write(folder / "ours", "parquet", keys, labels, logits)

    seconds = interleaved({"raw": raw, "ours": ours}, REPEATS)
    note = f"{ROWS * CLASSES * 2 / 1e9 / seconds['ours']:.2f} GB/s"
    report("write parquet / raw pyarrow + xxh3 + fsync", seconds["raw"] / seconds["ours"], 0.85, note)


def bench_verify(folder: Path) -> None:
    """Against reading the files and hashing them, in one thread and in as many as `verify` takes: it is parallel."""
    workers = os.cpu_count() or 1
    for format in ("parquet", "hdf5"):
        files = sorted((folder / format / "shards").iterdir())

        def hashed(path: Path) -> str:
            block = bytearray(1 << 20)  # faster than smaller and larger ones
            digest = xxhash.xxh3_128()
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(block):
                    digest.update(memoryview(block)[:count])
            return digest.hexdigest()

        def threaded(files: list[Path] = files, hashed: Callable[[Path], str] = hashed) -> None:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(hashed, files))

        root = folder / format
        sides: dict[str, Callable[[], object]] = {
            "raw": lambda files=files, hashed=hashed: [hashed(path) for path in files],
            "raw, threads": threaded,
            "ours": lambda root=root: verify_store(root),
            "ours, one thread": lambda root=root: verify_store(root, threads=1),
        }
        seconds = interleaved(sides, REPEATS)
        ratio, equal = seconds["raw"] / seconds["ours"], seconds["raw, threads"] / seconds["ours"]
        single = seconds["raw"] / seconds["ours, one thread"]
        note = f"{seconds['ours'] * 1e3:.0f} ms; both in {workers} threads {equal:.2f}, both in one {single:.2f}"
        report(f"verify {format} / reading the files plus xxh3", ratio, 0.8, note)


def bench_lookup() -> None:
    count, asked = 1_280_000, 100_000
    names = [f"train/n{number % 1000:08d}/image-{number:08d}.JPEG" for number in range(count)]
    keys = Keys.of(names)
    views = np.zeros(count, np.int32)
    started = time.perf_counter()
    index = KeyIndex(keys, views, where="bench")
    build = time.perf_counter() - started
    rng = np.random.default_rng(0)
    wanted = rng.permutation(count)[:asked]
    query = [names[row] for row in wanted]
    seconds = interleaved({"lookup": lambda: index(Keys.of(query), 0, views)}, REPEATS)["lookup"]
    np.testing.assert_array_equal(index(Keys.of(query), 0, views), wanted)
    report("lookup of 100,000 keys in 1,280,000: 0.2 s / it", 0.2 / seconds, 1, f"{seconds:.3f} s")
    report("index of 1,280,000 keys: 3 s / it", 3 / build, 1, f"{build:.2f} s, {index.nbytes / count:.0f} bytes a row")


def bench_open(folder: Path) -> None:
    run, root = run_of("parquet", rows=10_000, shard_rows=1), folder / "many"
    logits = np.zeros((1, CLASSES), np.float16)
    with Committer.open(root, run) as committer:
        plans = iter(committer.missing())
        while batch := [plan for _, plan in zip(range(500), plans, strict=False)]:
            rows = [Rows(keys=[f"image-{plan.number:08d}.jpg"], columns={"logits": logits}) for plan in batch]
            records = [write_shard(root, run, plan, one) for plan, one in zip(batch, rows, strict=True)]
            committer.commit(*records)
        committer.finish()
    seconds = interleaved({"open": lambda: open_store(root, verify="sizes")}, REPEATS)["open"]
    report("open a store of 10,000 shards: 0.5 s / it", 0.5 / seconds, 1, f"{seconds:.3f} s")


def bench_topk(folder: Path) -> None:
    """1,000,000 rows of top-k 32 (136 MB) into the loss's tensors: uint16 ids, float16 values, float32 tails."""
    from softlabel.loader.target import make_target
    from softlabel.store.encodings import TopK

    count, kept, root = 1_000_000, 32, folder / "topk"
    rng = np.random.default_rng(0)
    run = run_of("parquet", rows=count, shard_rows=1 << 17)
    run = dataclasses.replace(run, encoding=TopK(k=kept, temperatures=(4.0,)))
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            size = plan.stop - plan.start
            columns = {
                "index": rng.permuted(np.tile(np.arange(kept, dtype="<u2") * 31, (size, 1)), axis=1),
                "value": -np.sort(rng.random((size, kept)), axis=1).astype("<f2"),
                "tail": rng.random((size, 1)).astype("<f4"),
            }
            columns["value"][:, 0] = 0
            keys = [f"image-{index:08d}" for index in range(plan.start, plan.stop)]
            committer.commit(write_shard(root, run, plan, Rows(keys=keys, columns=columns)))
        committer.finish()
    files = sorted((root / "shards").iterdir())
    names = ["index", "value", "tail"]
    types = {"index": np.uint16, "value": np.float16, "tail": np.float32}

    def raw() -> int:
        seen = 0
        for path in files:
            file = pq.ParquetFile(pa.memory_map(str(path)), pre_buffer=False)
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=names, use_threads=False)
                for name in names:
                    for chunk in table.column(name).chunks:
                        size = chunk.type.byte_width // np.dtype(types[name]).itemsize
                        flat = np.frombuffer(chunk.buffers()[1], types[name], len(chunk) * size)
                        seen += len(flat.reshape(-1, size))
        return seen

    def ours() -> int:
        seen = 0
        for part in open_store(root).stream(names):
            seen += len(make_target(run, part.columns))
        return seen

    seconds = interleaved({"raw": raw, "ours": ours}, REPEATS)
    ratio = seconds["raw"] / seconds["ours"]
    report("top-k 32 to loss-ready tensors / the same bytes by pyarrow", ratio, 0.80, f"{seconds['ours'] * 1e3:.0f} ms")


PEAK = """
import sys
import h5py
from softlabel.store.open import open_store

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before, seen = status("VmRSS"), 0
for part in open_store(sys.argv[1]).stream():
    seen += int(part.columns["logits"].view("u8").max() > 0)
print((status("VmHWM") - before) / 1024)
"""


def bench_memory(folder: Path, keys: list[str], labels: np.ndarray, logits: np.ndarray) -> None:
    """One shard of 800 MB: the worst case for a reader that would hold or map a shard whole."""
    for format in ("parquet", "hdf5"):
        root = folder / f"one-{format}"
        run = run_of(format, rows=4 * ROWS, shard_rows=4 * ROWS)
        rows = Rows(
            keys=[f"{turn}/{key}" for turn in range(4) for key in keys], columns={"logits": np.tile(logits, (4, 1))}
        )
        with Committer.open(root, run) as committer:
            committer.commit(write_shard(root, run, committer.missing()[0], rows))
            committer.finish()
        del rows
        done = subprocess.run([sys.executable, "-c", PEAK, str(root)], capture_output=True, text=True, check=True)
        peak = float(done.stdout)
        report(f"stream one {format} shard of 800 MB: 300 MB / peak memory", 300 / max(peak, 1), 1, f"{peak:.0f} MB")
        shutil.rmtree(root)


def steps(folder: Path) -> Iterator[Callable[[], None]]:
    keys, labels, logits = data()
    for format in ("parquet", "hdf5"):
        write(folder / format, format, keys, labels, logits)
    yield lambda: bench_stream(folder)
    yield lambda: bench_take(folder, logits)
    yield lambda: bench_write(folder, keys, labels, logits)
    yield lambda: bench_verify(folder)
    yield bench_lookup
    yield lambda: bench_open(folder)
    yield lambda: bench_memory(folder, keys, labels, logits)
    yield lambda: bench_topk(folder)


def main() -> None:
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        os.environ["SOFTLABEL_CACHE"] = f"{name}/cache"
        for number, step in enumerate(steps(Path(name))):
            if not chosen or str(number) in chosen:
                step()
    print(f"peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if failures:
        sys.exit(f"below the goal: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
