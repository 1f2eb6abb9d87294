"""Generation end to end against its parts: decode alone, the teachers' bare forward alone, raw shard writing alone.

python -m tests.benchmarks.bench_generate [--images 10000] [--repeats 3] [--only one four free features]
"""

import argparse
import functools
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

import softlabel
from softlabel.models import build_model
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data

BATCH = 256
CLASSES = 1000


class Free(nn.Module):
    """A teacher that costs nothing: one row of logits for every image."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.row: Tensor
        self.register_buffer("row", torch.randn(1, CLASSES, generator=torch.Generator().manual_seed(0)) * 4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.row.expand(len(images_BCHW), -1)


def free() -> Free:
    return Free()


class Parts:
    """One dataset, and the ways to spend time on it."""

    def __init__(self, shared: Path, work: Path, images: int) -> None:
        self.work, self.resnets, self.count = work, shared / "cifar10-resnets", images
        table = pq.read_table(shared / "cifar10-jpeg" / "train.parquet").slice(0, images)
        pq.write_table(table, work / "images.parquet")
        self.encoded = [image["bytes"] for image in table["image"].to_pylist()]
        self.batches = [
            (part.float() / 255 - 0.45).contiguous(memory_format=torch.channels_last)
            for part in self.decode().split(BATCH)
        ]
        self.rows = np.random.default_rng(0).standard_normal((images, CLASSES)).astype(np.float16)

    def decode(self) -> Tensor:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in self.encoded])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def forward(self, model: nn.Module) -> None:
        with torch.inference_mode():
            for batch in self.batches:
                model(batch)

    def write(self) -> None:
        values = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * CLASSES), len(self.rows), [None, pa.py_buffer(self.rows)]
        )
        path = self.work / "raw.parquet"
        pq.write_table(
            pa.table({"logits": values}), path, compression="none", use_dictionary=False, write_statistics=False
        )
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def generate(
        self, teachers: list[str], *, ignore_labels: bool = False, workers: int | None = None, also: Any = None
    ) -> None:
        shutil.rmtree(self.work / "store", ignore_errors=True)
        softlabel.generate(
            self.work / "images.parquet",
            teachers=teachers,
            out=self.work / "store",
            batch_size=BATCH,
            ignore_labels=ignore_labels,
            workers=workers,
            also=also,
            preflight=False,  # two more batches, whatever the size of the dataset
            progress=False,
        )

    def resnet20(self, number: int) -> str:
        return f"zoo:resnet20@{self.resnets / 'resnet20-jpeg.safetensors'}?mean=0.{45 + number}"


def one(parts: Parts, repeats: int) -> None:
    teacher = parts.resnet20(0)
    model = build_model(teacher.partition("?")[0]).eval().to(memory_format=torch.channels_last)
    sides = {"decode": parts.decode, "forward": lambda: parts.forward(model)}
    seconds = interleaved({**sides, "generate": lambda: parts.generate([teacher])}, repeats)
    whole = seconds["decode"] + seconds["forward"]
    print(f"one teacher: decode {seconds['decode']:.2f} s, bare forward {seconds['forward']:.2f} s, ", end="")
    print(f"generate {seconds['generate']:.2f} s ({parts.count / seconds['generate']:,.0f} images/s)")
    print(f"  generate / (decode + forward) = {seconds['generate'] / whole:.3f}   (goal: at most 1.05)")


def four(parts: Parts, repeats: int) -> None:
    teachers = [parts.resnet20(number) for number in range(4)]
    models = [build_model(t.partition("?")[0]).eval().to(memory_format=torch.channels_last) for t in teachers]

    def forward() -> None:
        for model in models:
            parts.forward(model)

    sides = {"decode": parts.decode, "forward": forward, "generate": lambda: parts.generate(teachers)}
    seconds = interleaved(sides, repeats)
    ratio = seconds["generate"] / (seconds["decode"] + seconds["forward"])
    print(f"four members: bare forwards {seconds['forward']:.2f} s, generate {seconds['generate']:.2f} s")
    print(f"  generate / (one decode + four forwards) = {ratio:.3f}   (goal: at most 1.05)")


def costless(parts: Parts, repeats: int) -> None:
    teacher = "python:tests.benchmarks.bench_generate:free"
    sides: dict[str, Callable[[], object]] = {"decode": parts.decode, "write": parts.write}
    # Decoding is all there is to do here: a run that waits for data says so and names --workers.
    for name, workers in (("generate", None), ("generate --workers 2", 2)):
        sides[name] = functools.partial(parts.generate, [teacher], ignore_labels=True, workers=workers)
    seconds = interleaved(sides, repeats)
    parts_alone = seconds["decode"] + seconds["write"]
    print(f"free teacher, C = {CLASSES}: decode {seconds['decode']:.2f} s, raw writing {seconds['write']:.2f} s")
    for name in list(sides)[2:]:
        print(f"  {name} {seconds[name]:.2f} s")
        print(f"  rows/s of {name} / of decode + writing = {parts_alone / seconds[name]:.3f}   (goal: at least 0.85)")


def features(parts: Parts, repeats: int) -> None:
    teacher = parts.resnet20(0)
    sides = {
        "logits alone": None,
        "--also embedding": ["embedding"],
        "--also embedding attention": ["embedding", "attention"],
    }
    runs = {name: functools.partial(parts.generate, [teacher], also=also) for name, also in sides.items()}
    # CPU time of all threads: the machine is shared.
    seconds = interleaved(runs, repeats, clock=time.process_time)
    print(f"one teacher, logits alone: {seconds['logits alone']:.2f} CPU seconds")
    for name in list(sides)[1:]:
        goal = "   (goal: at most 1.03)" if name == "--also embedding" else ""
        print(f"  {name} / logits alone = {seconds[name] / seconds['logits alone']:.3f}{goal}")


PARTS = {"one": one, "four": four, "free": costless, "features": features}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    shared = require_shared_data()
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    print(f"{options.images} CIFAR JPEG images, resnet20, batch {BATCH}, {torch.get_num_threads()} threads")
    try:
        parts = Parts(shared, work, options.images)
        for name in options.only:
            PARTS[name](parts, options.repeats)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
