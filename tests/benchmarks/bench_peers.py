"""Labels as peers store and read them against this store at equal content: `python -m tests.benchmarks.bench_peers`.

10,000 rows of 1000 classes, the 10 or 100 largest or all of them, one `crop-flip` view each; files on a local disk, in
the page cache, one thread. The formats are written from what their projects publish, by code of this file:

records   TinyViT (microsoft/Cream, `TinyViT/data/augmentation/manager.py`): per epoch a file of records, each a seed
          int32, k float16 probabilities and k int16 classes; the keys are lines of a text file beside it. A row is one
          seek and one read. Of all classes: the seed and C float16 numbers.
pickles   FKD (szq0214/FKD, `FKD_SLG/generate_soft_label.py`): `torch.save` of [coordinates, flips, labels] in a file
          for each image; labels are float32 (crops, 2, k), classes above probabilities, or (crops, C).
cache     torchdistill (`torchdistill/datasets/util.py`): `torch.save` of a teacher's outputs of a sample, float32, in
          DIRECTORY/last four digits/number.pt. It keeps all classes, and nothing of the view.
lists     a table in Parquet as data sets are published: key, list<float16>, list<int16>, seed; zstd.

Ours has the key, the hard label, the content hash, the box, the flip and the digest of the view, and the tail. Read is
an epoch of shuffled batches of 256 into tensors that the loss takes, files opened within it. Loss is one batch of 256 x
1000, forward and backward, in CPU time, each side in a loop of its own, its lower quartile: for peers the even spread
of the rest and -(p log q).sum() as in TinyViT, `F.kl_div` as in torchdistill; ours with the soft part alone at T = 1,
and with hard part at T = 4. A ratio is peer / ours: above 1, ours is cheaper. `files` or `loss` as an argument measures
that part alone.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loader.target import make_target
from softlabel.loss import DenseTarget, Target, distillation_loss
from softlabel.store.columns import Columns
from softlabel.store.encodings import Encoding, Float16, TopK
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Run
from softlabel.store.open import open_store
from softlabel.store.writer import Committer, write_shard
from softlabel.views.policy import view_policy
from tests.benchmarks.figures import report as report_figure
from tests.support.loss_cases import make_top_k_target
from tests.support.stores import make_run

ROWS, CLASSES, BATCH, TEMPERATURES = 10_000, 1000, 256, (1.0, 4.0)
NARROW_BYTES = 64.0  # of one of our rows of 10 classes
missed: list[str] = []


def report(name: str, value: float, **settings: Any) -> None:
    if report_figure(name, value, **settings).standing == "missed":
        missed.append(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """keys: N strings; order: the rows of an epoch, shuffled; scaled: logits minus their maximum float16 (N, C); probs
    float16 and index int16 (N, K), the largest classes, or probs (N, C) and no index; kept: K, None for all classes."""

    keys: list[str]
    order: np.ndarray[Any, Any]
    scaled: np.ndarray[Any, Any]
    probs: np.ndarray[Any, Any]
    index: np.ndarray[Any, Any] | None
    kept: int | None

    def batches(self) -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, ROWS, BATCH):
            yield self.order[start : start + BATCH]


def draw_labels(kept: int | None) -> Labels:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (ROWS, CLASSES)).astype(np.float32))
    scaled = logits - logits.amax(1, keepdim=True)
    probs, index = scaled.softmax(1), None
    if kept is not None:
        probs, index = probs.topk(kept, dim=1)
    return Labels(
        keys=[str(row) for row in range(ROWS)],
        order=rng.permutation(ROWS),
        scaled=scaled.numpy(),
        probs=probs.half().numpy(),
        index=None if index is None else index.short().numpy(),
        kept=kept,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How labels are written into a folder, and read for one epoch; reading gives how many rows were seen."""

    write: Callable[[Path, Labels], None]
    read: Callable[[Path, Labels], int]


def write_records(folder: Path, labels: Labels) -> None:
    with (
        open(folder / "rank0-keys.txt", "w", encoding="utf-8") as keys,
        open(folder / "rank0-values.bin", "wb") as file,
    ):
        for row, key in enumerate(labels.keys):
            keys.write(key + "\n")
            file.write(np.int32(row).tobytes() + labels.probs[row].tobytes())
            if labels.index is not None:
                file.write(labels.index[row].tobytes())


def read_records(folder: Path, labels: Labels) -> int:
    places = {key: row for row, key in enumerate((folder / "rank0-keys.txt").read_text(encoding="utf-8").split())}
    width, seen = labels.probs.shape[1], 0
    size = 4 + (2 if labels.kept is None else 4) * width
    with open(folder / "rank0-values.bin", "rb") as file:
        for rows in labels.batches():
            values, classes = [], []
            for row in rows:
                file.seek(size * places[labels.keys[row]])
                record = file.read(size)
                values.append(np.frombuffer(record, np.float16, width, 4))
                if labels.kept is not None:
                    classes.append(np.frombuffer(record, np.int16, width, 4 + 2 * width))
            seen += len(torch.from_numpy(np.stack(values)))
            if classes:
                torch.from_numpy(np.stack(classes))
    return seen


def write_pickles(folder: Path, labels: Labels) -> None:
    coordinates, flips = np.zeros((1, 4), np.float32), np.zeros(1, bool)
    for row, key in enumerate(labels.keys):
        output = labels.probs[row].astype(np.float32)[None]
        if labels.index is not None:
            output = np.stack([labels.index[row].astype(np.float32), output[0]])[None]
        torch.save([coordinates, flips, output], folder / f"{key}.tar")


def read_pickles(folder: Path, labels: Labels) -> int:
    seen = 0
    for rows in labels.batches():
        states = [torch.load(folder / f"{labels.keys[row]}.tar", weights_only=False) for row in rows]
        seen += len(torch.from_numpy(np.concatenate([state[2] for state in states])))
    return seen


def cached_path(folder: Path, row: int) -> Path:
    digits = f"{row:04d}"
    return folder / digits[-4:] / f"{digits}.pt"


def write_cache(folder: Path, labels: Labels) -> None:
    for row in range(ROWS):
        path = cached_path(folder, row)
        path.parent.mkdir(exist_ok=True)
        output = torch.from_numpy(labels.probs[row].astype(np.float32))
        torch.save({"extracted_outputs": {"fc": {"output": output}}}, path)


def read_cache(folder: Path, labels: Labels) -> int:
    seen = 0
    for rows in labels.batches():
        cached = [torch.load(cached_path(folder, int(row)))["extracted_outputs"]["fc"]["output"] for row in rows]
        seen += len(torch.stack(cached))
    return seen


def write_lists(folder: Path, labels: Labels) -> None:
    columns: dict[str, Any] = {"key": labels.keys, "seed": np.arange(ROWS, dtype=np.int32)}
    for name, array in (("probs", labels.probs), ("index", labels.index)):
        if array is not None:
            offsets = np.arange(ROWS + 1, dtype=np.int32) * array.shape[1]
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1)))
    pq.write_table(pa.table(columns), folder / "labels.parquet", compression="zstd", row_group_size=1000)


def read_lists(folder: Path, labels: Labels) -> int:
    table, seen = pq.read_table(folder / "labels.parquet", use_threads=False).combine_chunks(), 0
    for rows in labels.batches():
        part = table.take(rows).combine_chunks()
        for name in ("probs", "index")[: 1 if labels.kept is None else 2]:
            flat = part[name].chunk(0).flatten().to_numpy(zero_copy_only=False)
            values = torch.from_numpy(flat.reshape(len(rows), -1).copy())
            seen += len(values) if name == "probs" else 0
    return seen


def our_run(kept: int | None) -> Run:
    encoding: Encoding = Float16() if kept is None else TopK(k=kept, temperatures=(1.0,))
    run = make_run(samples=ROWS, classes=CLASSES, temperature=1.0, encoding=encoding, shard_rows=ROWS)
    return dataclasses.replace(run, views=view_policy("crop-flip", count=1, seed=0))


def our_columns(labels: Labels) -> Columns:
    rng = np.random.default_rng(1)
    views = {
        "view_box": np.column_stack([rng.integers(-4, 5, (ROWS, 2)), np.full((ROWS, 2), 224)]).astype(np.int32),
        "view_flip": rng.integers(0, 2, (ROWS, 1)).astype(np.uint8),
        "view_xxh3": rng.integers(1, 2**64, (ROWS, 1), dtype=np.uint64),
    }
    if labels.index is None:
        return {"logits": labels.scaled.astype(np.float16), **views}
    index = torch.from_numpy(labels.index).long()
    scaled = torch.from_numpy(labels.scaled)
    tail = scaled.scatter(1, index, -torch.inf).logsumexp(1, keepdim=True)
    value = scaled.gather(1, index).half().numpy()
    return {"index": labels.index.astype(np.uint16), "value": value, "tail": tail.numpy(), **views}


def write_ours(folder: Path, labels: Labels) -> None:
    rng, run = np.random.default_rng(2), our_run(labels.kept)
    hashes, classes = rng.integers(1, 2**64, ROWS, dtype=np.uint64), rng.integers(0, CLASSES, ROWS)
    rows = Rows(keys=labels.keys, labels=classes, content=hashes, columns=our_columns(labels))
    with Committer.open(folder / "store", run) as committer:
        for plan in committer.missing():
            committer.commit(write_shard(folder / "store", run, plan, rows))
        committer.finish()


def read_ours(folder: Path, labels: Labels) -> int:
    """As the loader does: rows by key once, then whole batches."""
    store, seen = open_store(folder / "store"), 0
    names = [column.name for column in store.run.label_columns]
    for rows in labels.batches():
        seen += len(make_target(store.run, store.take(rows, names).columns))
    return seen


SIDES = {
    "ours": Side(write=write_ours, read=read_ours),
    "records": Side(write=write_records, read=read_records),
    "pickles": Side(write=write_pickles, read=read_pickles),
    "cache": Side(write=write_cache, read=read_cache),
    "lists": Side(write=write_lists, read=read_lists),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    bytes_a_row: float
    files: int
    write: float
    read: float


def measure(side: Side, labels: Labels, folder: Path) -> Costs:
    """Seconds are the least of three, in which other programs on the machine take the smallest part."""
    writes, reads = [], []
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        started = time.perf_counter()
        side.write(folder, labels)
        writes.append(time.perf_counter() - started)
    for _ in range(3):
        started = time.perf_counter()
        seen = side.read(folder, labels)
        reads.append(time.perf_counter() - started)
        assert seen == ROWS
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder)
    return Costs(bytes_a_row=size / ROWS, files=len(files), write=min(writes), read=min(reads))


def compare_files(name: str, labels: Labels, folder: Path) -> None:
    # torchdistill keeps whole outputs alone.
    sides = {key: side for key, side in SIDES.items() if key != "cache" or labels.kept is None}
    costs = {key: measure(side, labels, folder / key) for key, side in sides.items()}
    own = costs["ours"]
    seconds = f"write {own.write:.3f} s, read {own.read:.3f} s"
    print(f"{name}: ours {own.bytes_a_row:.1f} bytes a row, {own.files} files, {seconds}")
    if labels.kept == 10:
        report(f"{name}: bytes of one of our rows", own.bytes_a_row, goal=NARROW_BYTES, bound="at most")
    for key, cost in costs.items():
        if key == "ours":
            continue
        note = f"{cost.bytes_a_row:.1f} bytes, {cost.files} files"
        report(f"{name}: bytes, {key} / ours", cost.bytes_a_row / own.bytes_a_row, note=note)
        report(f"{name}: write, {key} / ours", cost.write / own.write, note=f"{cost.write:.3f} s")
        report(f"{name}: shuffled read, {key} / ours", cost.read / own.read, note=f"{cost.read:.3f} s")


def spread_probs(probs_BK: Tensor, index_BK: Tensor | None) -> Tensor:
    """What a peer does with kept probabilities: the rest of them evenly over the other classes."""
    if index_BK is None:
        return probs_BK.float()
    kept_BK = probs_BK.float()
    rest_B1 = (1 - kept_BK.sum(1, keepdim=True)) / (CLASSES - kept_BK.shape[1])
    return rest_B1.expand(-1, CLASSES).clone().scatter_(1, index_BK.long(), kept_BK)


def our_target(labels: Labels) -> Target:
    scaled_BC = torch.from_numpy(labels.scaled[:BATCH])
    if labels.kept is None:
        return DenseTarget(scaled_logits=scaled_BC.half(), temperature=1.0, retemperable=True)
    # Tails at both temperatures, which a store of `--temperatures 1 4` has.
    target = make_top_k_target(scaled_BC, labels.kept, TEMPERATURES)
    return dataclasses.replace(target, index=target.index.to(torch.uint16))


def quartiles(steps: Mapping[str, Callable[[], Tensor]], leaf: Tensor) -> dict[str, float]:
    """Lower quartile of the CPU milliseconds of forward and backward: each side in loops of its own that warm up first,
    the loops in turn, and the least over these, in which other programs take the smallest part."""
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(8):
        for name, step in steps.items():
            seconds = []
            for number in range(80):
                leaf.grad = None
                started = time.thread_time()
                step().backward()
                if number >= 20:
                    seconds.append(time.thread_time() - started)
            least[name] = min(least[name], 1e3 * float(np.quantile(seconds, 0.25)))
    return least


def compare_losses(name: str, labels: Labels) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(BATCH, CLASSES, generator=generator).requires_grad_()
    classes_B = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    probs_BK = torch.from_numpy(labels.probs[:BATCH])
    index_BK = None if labels.index is None else torch.from_numpy(labels.index[:BATCH])
    target = our_target(labels)

    def product() -> Tensor:
        return torch.sum(-spread_probs(probs_BK, index_BK) * F.log_softmax(logits_BC, dim=-1), dim=-1).mean()

    def divergence() -> Tensor:
        spread_BC = spread_probs(probs_BK, index_BK)
        return F.kl_div(F.log_softmax(logits_BC, dim=1), spread_BC, reduction="batchmean")

    def soft() -> Tensor:
        return distillation_loss(logits_BC, target, temperature=1.0, soft_weight=1.0, hard_weight=0.0)

    def both() -> Tensor:
        return distillation_loss(logits_BC, target, classes_B, temperature=4.0, soft_weight=0.9, hard_weight=0.1)

    peers, ours = {"product": product, "kl_div": divergence}, {"soft, T = 1": soft, "hard and soft, T = 4": both}
    least = quartiles({**peers, **ours}, logits_BC)
    for key in peers:
        for part in ours:
            milliseconds, own = least[key], least[part]
            # The peers' losses have neither a temperature nor a hard part.
            goal = None if labels.kept is None else 1.0 if "T = 1" in part else 1 / 1.3
            note = f"{milliseconds:.2f} / {own:.2f} ms"
            report(f"{name}: loss, {key} / ours, {part}", milliseconds / own, goal=goal, note=note)


def main() -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    chosen = sys.argv[1:] or ["files", "loss"]
    with tempfile.TemporaryDirectory() as name:
        os.environ["SOFTLABEL_CACHE"] = f"{name}/cache"
        for title, kept in (("k = 10", 10), ("k = 100", 100), ("all", None)):
            labels = draw_labels(kept)
            if "files" in chosen:
                compare_files(title, labels, Path(name))
            if "loss" in chosen:
                compare_losses(title, labels)
    if missed:
        sys.exit(f"below the goal: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
