"""A store of tokens against raw pyarrow, h5py and numpy: `python -m tests.benchmarks.bench_token_store`.

5,000 documents of 20 to 380 tokens (1,000,000), top-k 32 of 32,000 classes, 139 bytes a token; files in the page cache,
medians of interleaved runs. P labelled positions, W elements of a column.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from softlabel.store.encodings import TopK
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.token_rows import TokenRun
from softlabel.store.writer import Committer, write_shard
from tests.benchmarks.bench_store import failures, report
from tests.benchmarks.timing import interleaved

DOCUMENTS, CLASSES, KEPT, SHARD_ROWS, REPEATS = 5_000, 32_000, 32, 2_048, 7
LABELS = {"index": "<u2", "value": "<f2", "tail": "<f4"}


def write(root: Path, format: str, scale: int = 1) -> None:
    run = Run(
        format=format,  # type: ignore[arg-type]
        num_classes=CLASSES,
        temperature=1.0,
        encoding=TopK(k=KEPT, temperatures=(1.0,)),
        members=(Member(spec="lm:bench", sha256="0" * 64, num_classes=CLASSES),),
        dataset=DatasetInfo(kind="json", rows=DOCUMENTS * scale, fingerprint="f" * 32, has_labels=False),
        input="tokens",
        shard_rows=SHARD_ROWS if scale == 1 else DOCUMENTS * scale,
        tokens=TokenRun(tokenizer="ab" * 32, max_length=380),
    )
    rng = np.random.default_rng(0)
    lengths_N = rng.integers(20, 381, DOCUMENTS * scale)
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            lengths_B = lengths_N[plan.start : plan.stop]
            count = int(lengths_B.sum())
            ids = rng.integers(0, CLASSES, count).astype("<u2")
            values = -np.sort(rng.random((count, KEPT), np.float32), axis=1).astype("<f2")
            values[:, 0] = 0
            columns = {
                "index": (np.arange(KEPT) * 31 + rng.integers(0, 9000, (count, 1))).astype("<u2"),
                "value": values,
                "tail": rng.random((count, 1)).astype("<f4"),
                "length": lengths_B[:, None].astype("<i4"),
                "positions": lengths_B[:, None].astype("<i4"),
                "tokens": ids[:, None],
                "mask": np.ones((count, 1), "u1"),
            }
            documents = np.split(ids.astype("<i4"), np.cumsum(lengths_B)[:-1])
            content = np.array([xxhash.xxh3_64_intdigest(one.data) for one in documents], np.uint64)
            keys = [f"document-{number:08d}" for number in range(plan.start, plan.stop)]
            committer.commit(write_shard(root, run, plan, Rows(keys=keys, content=content, columns=columns)))
        committer.finish()


def touch(arrays: Iterable[np.ndarray]) -> int:
    """What a consumer does at least: read every byte."""
    flat = [array.reshape(-1).view(np.uint8) for array in arrays]
    return sum(int(one[: len(one) // 8 * 8].view(np.uint64).max()) for one in flat)


def read_parquet(files: list[Path], names: list[str]) -> int:
    """The best measured way: memory map, row group by row group, no threads, a view on each buffer."""
    seen = 0
    for path in files:
        file = pq.ParquetFile(pa.memory_map(str(path)), pre_buffer=False)
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=names, use_threads=False)
            buffers = [chunk.buffers()[-1] for name in LABELS for chunk in table.column(name).chunks]
            seen += touch(np.frombuffer(buffer, np.uint8) for buffer in buffers)
    return seen


def read_hdf5(files: list[Path], names: list[str]) -> int:
    seen = 0
    for path in files:
        with h5py.File(path, "r") as file:
            step = (8 << 20) // sum(file[name].dtype.itemsize * file[name].shape[1] for name in names)
            buffers = {name: np.empty((step, file[name].shape[1]), file[name].dtype) for name in names}
            for start in range(0, len(file["index"]), step):
                count = min(step, len(file["index"]) - start)
                for name in names:
                    file[name].read_direct(buffers[name], np.s_[start : start + count], np.s_[:count])
                seen += touch(buffers[name][:count] for name in LABELS)
    return seen


def stream(root: Path, names: list[str] | None) -> int:
    return sum(touch(part.columns[name] for name in LABELS) for part in open_store(root, verify="none").stream(names))


def bench_stream(folder: Path, size: float) -> None:
    files = {format: sorted((folder / format / "shards").iterdir()) for format in ("parquet", "hdf5")}
    tokens = [*LABELS, "tokens", "mask"]
    every = ["key", "label", "content", *tokens, "length", "positions"]
    sides = {
        "raw parquet": lambda: read_parquet(files["parquet"], [*LABELS, "positions"]),
        "our parquet": lambda: stream(folder / "parquet", list(LABELS)),
        "raw parquet, all": lambda: read_parquet(files["parquet"], every),
        "our parquet, all": lambda: stream(folder / "parquet", None),
        "raw hdf5": lambda: read_hdf5(files["hdf5"], tokens),
        "our hdf5": lambda: stream(folder / "hdf5", tokens),
    }
    seconds = interleaved(sides, REPEATS)
    for name, words in (
        ("parquet", "pyarrow"),
        ("parquet, all", "pyarrow, every column"),
        ("hdf5", "h5py read_direct"),
    ):
        ratio = seconds[f"raw {name}"] / seconds[f"our {name}"]
        note = f"{size / seconds[f'our {name}']:.1f} GB/s"
        report(f"stream tokens {name.split(',')[0]} / raw {words}", ratio, 0.85, note)


def bench_take(folder: Path) -> None:
    """Documents in random order, against copying each document's slices of arrays in memory."""
    rng = np.random.default_rng(1)
    picks = [rng.integers(0, DOCUMENTS, 64) for _ in range(20)]
    whole = open_store(folder / "parquet").take(range(DOCUMENTS), list(LABELS))
    offsets = whole.spans.offsets["position"]

    def copy() -> None:
        for rows in picks:
            for name in LABELS:
                np.concatenate([whole.columns[name][offsets[row] : offsets[row + 1]] for row in rows])

    stores = {"parquet in RAM": open_store(folder / "parquet"), "hdf5 in place": open_store(folder / "hdf5")}

    def take(store: Store) -> None:
        for rows in picks:
            store.take(rows, list(LABELS))

    sides = {name: lambda store=store: take(store) for name, store in stores.items()}
    seconds = interleaved({"numpy": copy, **sides}, REPEATS)
    for name in stores:
        note = f"{seconds[name] / len(picks) * 1e3:.2f} ms"
        report(f"take 64 documents, {name} / numpy slices", seconds["numpy"] / seconds[name], 0.5, note)


PEAK = """
import sys
import h5py
from softlabel.store.open import open_store

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before, seen = status("VmRSS"), 0
for part in open_store(sys.argv[1], verify="none").stream():
    seen += int(part.columns["value"].view("u8").max() > 0)
print((status("VmHWM") - before) / 1024)
"""


def bench_memory(folder: Path) -> None:
    """One shard of 560 MB."""
    for format in ("parquet", "hdf5"):
        write(folder / f"one-{format}", format, scale=4)
        command = [sys.executable, "-c", PEAK, str(folder / f"one-{format}")]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        report(f"stream one {format} shard of 560 MB: 200 MB / peak memory", 200 / max(peak, 1), 1, f"{peak:.0f} MB")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ["SOFTLABEL_CACHE"] = f"{name}/cache"
        folder = Path(name)
        for format in ("parquet", "hdf5"):
            write(folder / format, format)
        size = sum(path.stat().st_size for path in (folder / "hdf5" / "shards").iterdir()) / 1e9
        bench_stream(folder, size)
        bench_take(folder)
        bench_memory(folder)
    if failures:
        sys.exit(f"below the goal: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
