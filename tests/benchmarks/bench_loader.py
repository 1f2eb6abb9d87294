"""The loader against numpy, a clock and the kernel's accounts: `python -m tests.benchmarks.bench_loader [PART ...]`.

0  rows per second, images and labels in RAM (C = 1000, float16), against numpy gathers of the same rows
1  seconds to the first batch of a store of 1,280,000 rows, its cache warm
2  what a worker more costs in memory, while the labels are mapped
3  images of 224 pixels, in RAM, cropped and mirrored, beside gathers of the same images

Medians of interleaved runs where two things are compared. Each line prints what is reached and what must be.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from torch.utils.data import Dataset

from softlabel.loader import SoftLabelLoader
from softlabel.store.open import open_store
from softlabel.views import CropFlip
from tests.benchmarks.timing import interleaved
from tests.support.datasets import make_jpeg
from tests.support.stores import draw_logits, write_logits

CLASSES, BATCH, REPEATS, SHARD = 1000, 256, 7, 16_384
failures: list[str] = []


def report(what: str, reached: float, goal: float, *, at_most: bool = False, note: str = "") -> None:
    good = reached <= goal if at_most else reached >= goal
    if not good:
        failures.append(what)
    bound = "at most" if at_most else "at least"
    print(f"{what:<66} {reached:8.2f}  ({bound} {goal:g})  {'ok' if good else 'BELOW'}  {note}", flush=True)


class InMemory(Dataset[np.ndarray]):
    """Decoded square images."""

    def __init__(self, rows: int, side: int = 32) -> None:
        self.images_NHWC = np.random.default_rng(1).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images_NHWC[index]


def bench_rows(folder: Path) -> None:
    rows, steps = 50_000, 150
    data, logits = InMemory(rows), draw_logits(rows, CLASSES).astype(np.float16)
    write_logits(folder / "small", [str(row) for row in range(rows)], logits, shard_rows=SHARD)
    loader = SoftLabelLoader(data, open_store(folder / "small"), batch_size=BATCH, ignore_labels=True)
    for _ in loader:  # decodes every image once
        pass
    images_NCHW = np.ascontiguousarray(data.images_NHWC.transpose(0, 3, 1, 2))
    picks = [np.random.default_rng(step).permutation(rows)[:BATCH] for step in range(steps)]

    def ours() -> int:
        loader.set_epoch(3)
        seen = 0
        for _, batch in zip(range(steps), loader, strict=False):
            seen += int(batch.inputs[0, 0, 0, 0]) + batch.target.scaled_logits.shape[0]
        return seen

    def numpy_alone() -> int:
        seen = 0
        # As in any training loop, a batch lives until the next one is there.
        for batch in ((images_NCHW[pick], logits[pick]) for pick in picks):
            seen += int(batch[0][0, 0, 0, 0]) + batch[1].shape[0]
        return seen

    seconds = interleaved({"numpy": numpy_alone, "ours": ours}, REPEATS)
    note = f"{steps * BATCH / seconds['ours']:,.0f} rows/s, {1e3 * seconds['ours'] / steps:.2f} ms a batch of {BATCH}"
    report("loader / numpy gathers of the same rows", seconds["numpy"] / seconds["ours"], 0.6, note=note)


ROWS = 1_280_000

FIRST = """
import sys, time
import torch, numpy, pyarrow.parquet  # what a training script has imported anyway
from softlabel.loader import SoftLabelLoader
started = time.perf_counter()
loader = SoftLabelLoader(sys.argv[1], sys.argv[2], batch_size=256)
batch = next(iter(loader))
print(time.perf_counter() - started)
"""

# Proportional set size counts a page that n processes share as 1/n of a page for each of them.
MEMORY = """
import os, re, sys
import numpy
from softlabel.loader import SoftLabelLoader
from softlabel.store.open import open_store

class Images:  # that cost nothing themselves
    def __len__(self):
        return 1_280_000

    def __getitem__(self, index):
        return numpy.zeros((2, 2, 3), numpy.uint8)

def key(index):
    return f"train/n{index % 1000:08d}/image-{index:08d}.JPEG"

def pss(pid):
    return int(re.search(r"^Pss: +([0-9]+)", open(f"/proc/{pid}/smaps_rollup").read(), re.M)[1]) / 1024

workers = int(sys.argv[2])
settings = {"batch_size": 256, "workers": workers, "cache_mb": 0, "key_fn": key, "ignore_labels": True}
loader = SoftLabelLoader(Images(), open_store(sys.argv[1]), **settings)
for number, batch in zip(range(600), loader):  # as many pages of labels whatever the number of workers
    batch.target.scaled_logits.sum()
children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
print(sum(pss(pid) for pid in [os.getpid(), *children]))
loader.close()
"""


def run(code: str, *arguments: object) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def write_large(folder: Path) -> tuple[Path, Path]:
    """1,280,000 small images in row groups of 1000, as Hugging Face writes them, and their store (2.6 GB)."""
    keys = [f"train/n{row % 1000:08d}/image-{row:08d}.JPEG" for row in range(ROWS)]
    images = [make_jpeg(number) for number in range(64)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    noted = {"image": {"_type": "Image"}, "label": {"names": [str(c) for c in range(CLASSES)], "_type": "ClassLabel"}}
    schema = pa.schema([("image", kind), ("label", pa.int64())]).with_metadata(
        {"huggingface": json.dumps({"info": {"features": noted}})}
    )
    data = folder / "train.parquet"
    with pq.ParquetWriter(data, schema, compression="zstd") as writer:
        for start in range(0, ROWS, 10_000):
            rows = range(start, start + 10_000)
            column = pa.array([{"bytes": images[row % 64], "path": keys[row]} for row in rows], kind)
            labels = pa.array(np.arange(start, start + 10_000) % CLASSES)
            writer.write_table(pa.table({"image": column, "label": labels}, schema=schema), row_group_size=1000)
    hashes = np.array([xxhash.xxh3_64_intdigest(image) for image in images], dtype=np.uint64)
    content = hashes[np.arange(ROWS) % 64]
    write_logits(folder / "large", keys, draw_logits(SHARD, CLASSES), content=content, shard_rows=SHARD)
    return data, folder / "large"


def bench_first(folder: Path) -> None:
    data, store = write_large(folder)
    run(FIRST, data, store)  # decodes the store into its cache
    seconds = float(np.median([run(FIRST, data, store) for _ in range(5)]))
    report("seconds to the first batch, 1,280,000 rows, warm cache", seconds, 2.0, at_most=True)


def bench_views(folder: Path) -> None:
    rows, steps = 2048, 16
    data = InMemory(rows, side=224)
    loader = SoftLabelLoader(data, batch_size=128, augment=CropFlip(), ignore_labels=True)
    for _ in loader:  # decodes every image once
        pass
    images_NCHW = np.ascontiguousarray(data.images_NHWC.transpose(0, 3, 1, 2))
    order = np.random.default_rng(0).permutation(rows)

    def ours() -> int:
        loader.set_epoch(3)
        return sum(int(batch.inputs[0, 0, 9, 9]) for batch in loader)

    def numpy_alone() -> int:
        batches = (images_NCHW[order[start : start + 128]] for start in range(0, rows, 128))
        return sum(int(batch[0, 0, 9, 9]) for batch in batches)

    seconds = interleaved({"numpy": numpy_alone, "ours": ours}, REPEATS)
    note = f"{rows / seconds['ours']:,.0f} images/s, {1e3 * seconds['ours'] / steps:.1f} ms a batch of 128"
    report("cropped and mirrored at 224 / gathers", seconds["numpy"] / seconds["ours"], 0.2, note=note)


def bench_memory(folder: Path) -> None:
    store = folder / "large"
    if not store.exists():
        write_large(folder)
    size = {workers: run(MEMORY, store, workers) for workers in (1, 3)}
    labels = ROWS * CLASSES * 2 / (1 << 20)
    more = (size[3] - size[1]) / 2
    report(
        "memory of one more worker / the mapped labels",
        more / labels,
        0.05,
        at_most=True,
        note=f"{more:.0f} of {labels:.0f} MB",
    )


def main() -> None:
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        os.environ["SOFTLABEL_CACHE"] = f"{name}/cache"
        parts: list[Callable[[Path], None]] = [bench_rows, bench_first, bench_memory, bench_views]
        for number, part in enumerate(parts):
            if not chosen or str(number) in chosen:
                part(Path(name))
    if failures:
        sys.exit(f"below the goal: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
