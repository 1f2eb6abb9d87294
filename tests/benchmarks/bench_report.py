"""A report of a large store against reading it: `python -m tests.benchmarks.bench_report [--rows N]`.

C = 1000, float16, files in the page cache, medians of interleaved runs; and 50,000 rows of 10 classes. The pass is what
reads every row; the whole is `measure_store`, with what it computes from its sample of 50,000 rows.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from softlabel.report.agreement import AgreementMeter
from softlabel.report.coverage import CoverageMeter
from softlabel.report.measure import measure_store
from softlabel.report.noise import NoiseMeter
from softlabel.report.probabilities import LabelReader
from softlabel.report.store_pass import run_pass
from softlabel.report.views import ViewMeter
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.writer import Committer, write_shard
from tests.benchmarks.figures import report
from tests.benchmarks.timing import interleaved

SHARD_ROWS = 16_384


def write(root: Path, rows: int, classes: int) -> None:
    """Write a store of a teacher that is right on about two thirds; a tenth of the labels are wrong."""
    member = Member(spec="zoo:resnet8", sha256="0" * 64, num_classes=classes)
    info = DatasetInfo(kind="parquet", rows=rows, fingerprint="f" * 32)
    run = Run(
        format="parquet",
        num_classes=classes,
        temperature=4.0,
        members=(member,),
        dataset=info,
        shard_rows=SHARD_ROWS,
    )
    rng = np.random.default_rng(0)
    true = rng.integers(0, classes, SHARD_ROWS)
    logits = rng.normal(0, 2, (SHARD_ROWS, classes)).astype(np.float16)
    logits[np.arange(SHARD_ROWS), true] += np.float16(8)
    logits -= logits.max(axis=1, keepdims=True)
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            count = plan.stop - plan.start
            wrong = rng.random(count) < 0.1
            part = Rows(
                keys=[f"train/n{at % 1000:08d}/image-{at:08d}.JPEG" for at in range(plan.start, plan.stop)],
                labels=np.where(wrong, rng.integers(0, classes, count), true[:count]),
                content=rng.integers(1, 2**63, count, dtype=np.uint64),
                columns={"logits": logits[:count]},
            )
            committer.commit(write_shard(root, run, plan, part))
        committer.finish()


def stream(root: Path) -> int:
    """Read every byte, as a consumer does at least."""
    with open_store(root) as store:
        return sum(int(part.columns["logits"].reshape(-1).view(np.uint64).max()) for part in store.stream())


def read_pass(root: Path) -> int:
    with open_store(root) as store:
        reader = LabelReader(store)
        meters = [AgreementMeter(reader), NoiseMeter(store, reader), CoverageMeter(store), ViewMeter(store.run)]
        return len(run_pass(store, reader, meters, progress=False))


def measure(root: Path) -> None:
    with open_store(root) as store:
        measure_store(store, progress=False)


PEAK = """
import sys
from softlabel.report.measure import measure_store
from softlabel.store.open import open_store

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before = status("VmRSS")
measure_store(open_store(sys.argv[1]), progress=False)
print((status("VmHWM") - before) / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "large"
        write(root, asked.rows, asked.classes)
        size = f"{asked.rows:,} x {asked.classes:,}"
        sides = {"stream": lambda: stream(root), "pass": lambda: read_pass(root), "whole": lambda: measure(root)}
        seconds = interleaved(sides, asked.repeats)
        words = ", ".join(f"{side} {value:.2f} s" for side, value in seconds.items())
        report(f"stream / pass of a report, {size}", seconds["stream"] / seconds["pass"], goal=0.5, note=words)
        report(f"stream / report of a store, {size}", seconds["stream"] / seconds["whole"])
        done = subprocess.run([sys.executable, "-c", PEAK, str(root)], capture_output=True, text=True, check=True)
        report(f"peak memory over the import, MB, {size}", float(done.stdout), goal=1000, bound="at most")
        write(Path(name) / "small", 50_000, 10)
        started = time.perf_counter()
        measure(Path(name) / "small")
        report("report of 50,000 x 10, s", time.perf_counter() - started, goal=10, bound="at most")


if __name__ == "__main__":
    main()
