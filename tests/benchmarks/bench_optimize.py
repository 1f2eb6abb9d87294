"""`generate --optimize` in CPU time an image, against decoding and the eager forward pass in one thread.

python -m tests.benchmarks.bench_optimize [--repeats 3] [--only resnet20 resnet18 vit]

A side is timed without loading the teacher; "once" is what its graph adds to loading. CPU time of the whole process, so
that threads and other processes do not blur it; sides in turn, median and least of the repeats.
"""

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from softlabel.generation.config import GenerateConfig
from softlabel.generation.run import open_run
from softlabel.models import build_model
from tests.benchmarks.timing import interleaved
from tests.support.datasets import write_parquet
from tests.support.shared_data import require_shared_data

MODES = ("none", "folded", "compiled")
# name -> (SPEC without checkpoint, side of the images, images, batch)
TEACHERS = {
    "resnet20": ("zoo:resnet20", 32, 1024, 256),
    "resnet18": ("torchvision:resnet18", 224, 64, 64),
    "vit": ("torchvision:vit_b_16", 224, 8, 8),
}


def measure_cpu() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Case:
    """A teacher with its images."""

    def __init__(self, name: str, shared: Path, work: Path) -> None:
        self.spec, self.side, self.count, self.batch = TEACHERS[name]
        self.work = work
        table = pq.read_table(shared / "cifar10-jpeg" / "train.parquet").slice(0, self.count)
        encoded = [image["bytes"] for image in table["image"].to_pylist()]
        self.encoded = encoded if self.side == 32 else [enlarge(data, self.side) for data in encoded]
        self.data = write_parquet(work / f"{name}.parquet", self.encoded)
        checkpoint = work / f"{name}.safetensors"
        if name == "resnet20":
            shutil.copy(shared / "cifar10-resnets" / "resnet20-jpeg.safetensors", checkpoint)
        else:
            save_file(make_weights(self.spec), checkpoint)
        self.teacher = f"{self.spec}@{checkpoint}?resize={self.side}&crop={self.side}"
        self.batches = [self.normalize(part) for part in self.decode().split(self.batch)]

    def decode(self) -> Tensor:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in self.encoded])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW.float() / 255 - 0.45) / 0.23

    def forward(self, layout: torch.memory_format) -> Callable[[], None]:
        model = build_model(self.teacher.partition("?")[0]).eval().to(memory_format=layout)  # type: ignore[call-overload]
        batches = [batch.contiguous(memory_format=layout) for batch in self.batches]

        def run() -> None:
            with torch.inference_mode():
                for batch in batches:
                    model(batch)

        return run

    def generate(self, optimize: Any) -> tuple[float, float]:
        """CPU seconds of loading, and of labelling."""
        out = self.work / "store"
        shutil.rmtree(out, ignore_errors=True)
        config = GenerateConfig(batch_size=self.batch, threads=1, workers=0, optimize=optimize)
        started = measure_cpu()
        with open_run(self.data, teachers=[self.teacher], out=out, config=config) as run:
            loaded, begun = measure_cpu(), time.process_time()
            run.label(progress=False)
            return loaded - started, time.process_time() - begun


def enlarge(data: bytes, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_weights(spec: str) -> dict[str, Tensor]:
    """Random weights, with batch norms that have statistics."""
    torch.manual_seed(0)
    model: nn.Module = build_model(spec, num_classes=1000)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            torch.nn.init.normal_(norm.running_mean, std=0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def compare(name: str, case: Case, repeats: int) -> None:
    layouts = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    forwards = {layout: case.forward(format) for layout, format in layouts.items()}
    bare: dict[str, list[float]] = {side: [] for side in ("decode", *layouts)}
    labelling: dict[str, list[float]] = {mode: [] for mode in MODES}
    loading: dict[str, list[float]] = {mode: [] for mode in MODES}
    modes = [mode for mode in MODES if mode != "folded" or name != "vit"]  # which has no batch norm
    for _ in range(repeats):
        found = interleaved({"decode": case.decode, **forwards}, 1, clock=time.process_time)
        for side, seconds in found.items():
            bare[side].append(seconds)
        for mode in modes:
            loaded, labelled = case.generate(mode)
            loading[mode].append(loaded)
            labelling[mode].append(labelled)
    each = 1e3 / case.count
    shown = ", ".join(f"{side} {statistics.median(seconds) * each:.2f}" for side, seconds in bare.items())
    print(f"{name}, {case.count} images of {case.side} px, batch {case.batch}: CPU ms an image: {shown}")
    for mode in modes:
        parts = []
        for layout in layouts:
            whole = [decode + forward for decode, forward in zip(bare["decode"], bare[layout], strict=True)]
            ratio = statistics.median(labelling[mode]) / statistics.median(whole)
            parts.append(f"{ratio:.3f} of {layout} (least {min(labelling[mode]) / min(whole):.3f})")
        once = statistics.median(loading[mode]) - statistics.median(loading["none"])
        print(
            f"  generate --optimize {mode:<9} {statistics.median(labelling[mode]) * each:.2f} ms = "
            f"{', '.join(parts)}; once {once:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(TEACHERS), default=list(TEACHERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared = require_shared_data()
    print("generate / (decode + eager forward in one thread), CPU time an image (goal: at most 0.75; 0.98 at worst)")
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    try:
        for name in options.only:
            compare(name, Case(name, shared, work), options.repeats)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
