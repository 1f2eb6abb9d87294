"""Students of one architecture as one network, beside the same students in turn, on the CPU.

python -m tests.benchmarks.bench_stacked [--repeats 5] [--students 4 16]

Prints CPU time of a step of all students on CIFAR JPEG images that are decoded already, medians of interleaved runs:
resnet8 and a plain CNN of two layers at 32 and at 16 pixels, an MLP at 32 and at 8, batch 128, float32, one thread.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch

import softlabel
from tests.benchmarks.stack_steps import build_stack_sides
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data
from tests.support.stores import draw_logits, write_logits

BATCH, COUNT = 128, 2
MLP = "python:tests.benchmarks.stack_steps:build_mlp"
NETWORKS = {
    "resnet8, 32 x 32": "zoo:resnet8",
    "resnet8, 16 x 16": "zoo:resnet8?resize=16&crop=16",
    "cnn2, 32 x 32": "zoo:cnn2",
    "cnn2, 16 x 16": "zoo:cnn2?resize=16&crop=16",
    "MLP, 3072-64-10": f"{MLP}?resize=32&crop=32",
    "MLP, 192-64-10": f"{MLP}?resize=8&crop=8&pixels=8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--students", type=int, nargs="+", default=[4, 16])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = f"{require_shared_data() / 'cifar10-jpeg' / 'train.parquet'}?rows=0:{BATCH * COUNT}"
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        source = softlabel.open_source(data)
        write_logits(Path(folder) / "store", source.keys(), draw_logits(len(source), 10), temperature=4.0)
        for name, spec in NETWORKS.items():
            for students in options.students:
                sides = build_stack_sides(
                    *(data, str(Path(folder) / "store"), spec, students),
                    classes=10,
                    batch=BATCH,
                    count=COUNT,
                    precision="fp32",
                    device="cpu",
                )
                del sides["graph"]
                found = interleaved(sides, options.repeats, clock=time.process_time)
                ms = {side: 1e3 * seconds / COUNT for side, seconds in found.items()}
                print(
                    f"{name}, {students} students: one {ms['one']:.1f} ms, in turn {ms['in turn']:.1f}, stacked "
                    f"{ms['stacked']:.1f}; stacked / in turn = {ms['stacked'] / ms['in turn']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
