"""Generation on Dask against the plain loop, and what the scheduler and the client cost a shard.

python -m tests.benchmarks.bench_cluster [--images 6000] [--repeats 3] [--shards 10000]
"""

import argparse
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch
from distributed import Client

import softlabel
from softlabel.cluster.connect import connected
from softlabel.cluster.deployment import Deployment
from softlabel.cluster.dispatch import Dispatcher
from softlabel.generation.pipeline import label_shard
from softlabel.generation.reload import config_of, reload_job
from softlabel.generation.worker import Outcome, Request, label_one
from softlabel.store.manifest import ShardRecord, shard_file
from softlabel.store.open import open_store
from softlabel.store.strict_json import dumps, to_json
from softlabel.store.writer import write_shard
from tests.support.clusters import make_teacher_spec, start_cluster, write_jpeg_dataset
from tests.support.shared_data import require_shared_data

SHARD = 250


def nothing(request: Request, number: int, keys: str, seconds: float, worker: str) -> Outcome:
    """A shard that costs nothing, with a record as long as a real one."""
    xxh3 = f"{number:032x}"
    record = ShardRecord(
        number=number,
        file=shard_file(number, xxh3, "parquet"),
        rows=16384,
        bytes=33_000_000,
        xxh3=xxh3,
        first_key=f"train/{number:08d}-first.jpg",
        last_key=f"train/{number:08d}-last.jpg",
    )
    return Outcome(number=number, record=record, correct=1, labelled=2)


def per_image(shared: Path, folder: Path, images: int, repeats: int) -> None:
    """CPU time of an image on two workers of one thread and in a loop of one thread, in turns.

    The ratio is to a loop that keeps freed memory as workers do, so that it is what Dask costs. A process keeps it from
    its first `label_one` on; the loop is timed before, too.
    """
    torch.set_num_threads(1)
    table = pq.read_table(shared / "cifar10-jpeg" / "train.parquet").slice(0, images)
    data = str(folder / "images.parquet")
    pq.write_table(table, data)
    teacher = f"zoo:resnet20@{shared / 'cifar10-resnets' / 'resnet20-jpeg.safetensors'}"
    out = str(folder / "store")
    softlabel.generate(data, teachers=[teacher], out=out, shard_rows=SHARD, batch_size=SHARD, workers=0, progress=False)
    with open_store(out) as store:
        manifest = store.manifest
    request = Request(
        session="bench", out=out, run=manifest.run.fingerprint(), data=data, teachers=(teacher,), device="cpu"
    )
    job = reload_job(manifest, out, replace(config_of(manifest), workers=0, device="cpu"))
    numbers = range(manifest.run.shard_count)

    def keys(number: int) -> str:
        plan = manifest.run.shard(number)
        return job.labeller.source.digest(plan.start, plan.stop)

    def loop() -> float:
        before = time.process_time()
        for number in numbers:
            plan = manifest.run.shard(number)
            shard = label_shard(plan, job.labeller)
            write_shard(out, manifest.run, plan, shard.rows, shard.bad, fidelity=shard.fidelity)
        return time.process_time() - before

    unset = interleaved({"loop": loop}, repeats)["loop"]
    print(f"a request has {len(pickle.dumps((label_one, request, 1, keys(0), 1.0)))} bytes", end=", ")
    print(f"an outcome {len(pickle.dumps(label_one(request, 0, keys(0), 0.0)))} (a record as JSON {record_bytes(out)})")

    def spread(client: Client) -> float:
        workers = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        before = [process.cpu_times() for process in workers]
        assert not Dispatcher(client, request, keys, lambda outcomes: None).run(list(numbers))
        after = [process.cpu_times() for process in workers]
        return sum(b.user + b.system - a.user - a.system for a, b in zip(before, after, strict=True))

    def by_hand(turn: int) -> float:
        with (
            start_cluster(folder / f"dask-{turn}", workers=2) as dask,
            Client(dask.address, set_as_default=False) as client,
        ):
            client.wait_for_workers(2)
            return [spread(client) for _ in range(3)][-1]

    def started() -> float:
        with connected(Deployment(cluster="local", cluster_workers=2)) as client:
            return [spread(client) for _ in range(3)][-1]

    # One after the other: a scheduler that idles in this process or beside it would count as the loop's.
    loop()
    turns = [(loop(), started(), by_hand(turn)) for turn in range(repeats)]
    plain, *others = (statistics.median(side) for side in zip(*turns, strict=True))
    print("CPU time of an image, one thread each:")
    print(f"  {'plain loop, not keeping memory':<32}{1000 * unset / images:.2f} ms")
    print(f"  {'plain loop':<32}{1000 * plain / images:.2f} ms")
    for name, value in zip(("--cluster local --workers 2", "two workers by hand"), others, strict=True):
        each = 1000 * value / images
        print(f"  {name:<32}{each:.2f} ms   {value / plain:.3f} of the plain loop   (goal: at most 1.10)")


def record_bytes(out: str) -> int:
    with open_store(out) as store:
        return len(dumps(to_json(store.shards[0])))


def interleaved(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each side, taken in turns, after one turn that warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            seconds = side()
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def per_shard(folder: Path, shards: int) -> None:
    """What the scheduler and the client spend on a shard that costs nothing, with a real committer's records kept."""
    request = Request(
        session="b" * 32,
        out="/nowhere/at/all",
        run="0" * 32,
        data="/data/images/train",
        teachers=("zoo:resnet20@a.th",),
    )
    with start_cluster(folder / "dask", workers=2) as dask, Client(dask.address, set_as_default=False) as client:
        client.wait_for_workers(2)
        kept: dict[int, ShardRecord] = {}

        def commit(outcomes: Sequence[Outcome]) -> None:
            kept.update((one.number, one.record) for one in outcomes if one.record is not None)

        assert not Dispatcher(client, request, lambda number: "0" * 32, commit, work=nothing).run(range(1000))
        kept.clear()
        scheduler, me = psutil.Process(dask.scheduler.pid), psutil.Process()
        memory, ours, theirs = me.memory_info().rss, time.process_time(), scheduler.cpu_times()
        started = time.perf_counter()
        assert not Dispatcher(client, request, lambda number: "0" * 32, commit, work=nothing).run(range(shards))
        seconds = time.perf_counter() - started
        now = scheduler.cpu_times()
        spent = now.user + now.system - theirs.user - theirs.system
        print(f"{shards:,} no-op shards in {seconds:.1f} s")
        print(f"scheduler CPU a shard {1000 * spent / shards:.2f} ms   (goal: at most 2)")
        print(f"client CPU a shard {1000 * (time.process_time() - ours) / shards:.2f} ms   (goal: at most 1)")
        print(f"client memory grew by {(me.memory_info().rss - memory) / 1e6:.1f} MB   (goal: at most 25)")
        assert len(kept) == shards


def finished(folder: Path, shards: int) -> None:
    """The same call on a finished store of many shards: nothing is run, on a cluster none would be started."""
    data = str(write_jpeg_dataset(folder / "many.parquet", shards))
    options: dict[str, Any] = {"teachers": [make_teacher_spec()], "shard_rows": 1, "device": "cpu", "progress": False}
    softlabel.generate(data, out=folder / "many", **options)
    started = time.perf_counter()
    summary = softlabel.generate(data, out=folder / "many", **options)
    seconds = time.perf_counter() - started
    assert summary.shards_written == 0
    print(f"the same call on a finished store of {shards:,} shards: {seconds:.2f} s, 0 shards run   (goal: under 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        per_shard(Path(folder), options.shards)
        finished(Path(folder), options.shards)
        per_image(require_shared_data(), Path(folder), options.images, options.repeats)


if __name__ == "__main__":
    main()
