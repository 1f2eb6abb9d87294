"""Generation end to end against its parts: PIL decode alone plus the teacher's bare forward alone, in the same run.

python -m tests.benchmarks.bench_generate [--images 10000] [--repeats 3]
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

import softlabel
from softlabel.models import build_model
from tests.benchmarks.timing import interleaved

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shared = Path(os.environ.get("SOFTLABEL_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not shared.is_dir():
        sys.exit(f"{shared}: no such folder; set SOFTLABEL_DATA to the folder with cifar10-jpeg and cifar10-resnets")
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    table = pq.read_table(shared / "cifar10-jpeg" / "train.parquet").slice(0, options.images)
    pq.write_table(table, work / "images.parquet")
    encoded = [image["bytes"] for image in table["image"].to_pylist()]
    teacher = f"zoo:resnet20@{shared / 'cifar10-resnets' / 'resnet20-jpeg.safetensors'}"
    model = build_model(teacher).eval().to(memory_format=torch.channels_last)

    def decode() -> Tensor:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    batches = [
        (part.float() / 255 - 0.45).contiguous(memory_format=torch.channels_last) for part in decode().split(BATCH)
    ]

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def generate() -> None:
        shutil.rmtree(work / "store", ignore_errors=True)
        softlabel.generate(
            work / "images.parquet",
            teachers=[teacher],
            out=work / "store",
            batch_size=BATCH,
            preflight=False,
            progress=False,
        )

    seconds = interleaved({"decode": decode, "forward": forward, "generate": generate}, options.repeats)
    shutil.rmtree(work)
    parts = seconds["decode"] + seconds["forward"]
    rate = options.images / seconds["generate"]
    print(f"{options.images} CIFAR JPEG images, resnet20, batch {BATCH}, {torch.get_num_threads()} threads")
    print(f"decode alone {seconds['decode']:.2f} s, bare forward alone {seconds['forward']:.2f} s")
    print(f"generate end to end {seconds['generate']:.2f} s ({rate:,.0f} images/s)")
    print(f"generate / (decode + forward) = {seconds['generate'] / parts:.3f}   (goal: at most 1.10)")


if __name__ == "__main__":
    main()
