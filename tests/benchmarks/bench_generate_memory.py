"""Peak memory of `generate` over 10,000,000 synthetic samples against 10,000: what grows with the dataset?

python -m tests.benchmarks.bench_generate_memory [--rows 10000000]

Keys are computed, images are one pixel each, the teacher's logits are constant: everything but the loop, the store and
what is kept of the keys costs nothing. Each size runs in a process of its own, whose peak resident memory is read.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import softlabel
from softlabel.inputs.base import Sample
from tests.support.shared_data import ROOT

CLASSES, SHARD_ROWS, BATCH = 4, 16_384, 4_096
TEACHER = "python:tests.benchmarks.bench_generate_memory:Constant?mean=0&std=1&crop=1&resize=1"


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, CLASSES)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        constant_BC: Tensor = self.linear(torch.zeros(len(images_BCHW), 3))
        return constant_BC


class Synthetic(softlabel.Source):
    """So many samples; sample n has key n in words of ten digits."""

    kind, name, has_labels = "dataset", "synthetic", True
    _pixel = np.zeros((1, 1, 3), np.uint8)

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        stop = self.rows if stop is None else min(stop, self.rows)
        return [f"{number:010d}" for number in range(start, stop)]

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        stop = self.rows if stop is None else min(stop, self.rows)
        return np.arange(start, stop, dtype=np.int64) % CLASSES

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return [Sample(key=f"{n:010d}", raw=self._pixel, label=n % CLASSES) for n in np.asarray(indices).tolist()]


def one(rows: int) -> None:
    """Label so many samples; print the peak resident memory in bytes and the seconds."""
    out = tempfile.mkdtemp(prefix="softlabel-bench-")
    started = time.perf_counter()
    softlabel.generate(
        Synthetic(rows), teachers=[TEACHER], out=out, batch_size=BATCH, shard_rows=SHARD_ROWS, progress=False
    )
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--one", type=int, help="run this size here and print its peak")
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    peaks = []
    for rows in (10_000, 10 * SHARD_ROWS, options.rows):
        command = [sys.executable, "-m", "tests.benchmarks.bench_generate_memory", "--one", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peak, seconds = (float(number) for number in done.stdout.split())
        peaks.append(peak)
        print(f"{rows:>12,} samples: peak {peak / 1e6:,.0f} MB, {seconds:,.0f} s", flush=True)
    print(f"{options.rows:,} against 10,000: {(peaks[-1] - peaks[0]) / 1e6:+,.0f} MB   (goal: at most 50)")
    print(f"{options.rows:,} against {10 * SHARD_ROWS:,}: {(peaks[-1] - peaks[1]) / 1e6:+,.0f} MB")


if __name__ == "__main__":
    main()
