"""Labelling on a CUDA device against the bare forward pass: resnet50 at 224, bf16, images that lie decoded in RAM.

python -m tests.benchmarks.bench_generate_gpu [--images 25600] [--repeats 3]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import softlabel
from softlabel.models import build_model
from tests.benchmarks.timing import interleaved

BATCH, SIDE, DISTINCT = 256, 224, 512


class InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded images, a few distinct ones over and over."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (DISTINCT, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index % DISTINCT], 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=25_600)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("generate / bare forward, resnet50 224 bf16: unmeasured, no CUDA device   (goal: at least 0.95)")
        print("idle share of the device: unmeasured, no CUDA device   (goal: at most 5%)")
        return
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    torch.manual_seed(0)
    torch.save(build_model("torchvision:resnet50").state_dict(), work / "resnet50.pt")
    teacher = f"torchvision:resnet50@{work / 'resnet50.pt'}?resize=none&crop={SIDE}"
    model = build_model(teacher).eval().to("cuda", memory_format=torch.channels_last)
    data = InMemory(options.images)
    batch = torch.randn(BATCH, 3, SIDE, SIDE, device="cuda").contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(options.images // BATCH):
                model(batch)
        torch.cuda.synchronize()

    def generate() -> None:
        shutil.rmtree(work / "store", ignore_errors=True)
        softlabel.generate(
            data,
            teachers=[teacher],
            out=work / "store",
            device="cuda",
            precision="bf16",
            batch_size=BATCH,
            preflight=False,
            progress=False,
        )

    seconds = interleaved({"forward": forward, "generate": generate}, options.repeats)
    print(f"generate / bare forward = {seconds['forward'] / seconds['generate']:.3f}   (goal: at least 0.95)")
    print(f"idle share of the device = {_idle(generate):.1%}   (goal: at most 5%)")
    shutil.rmtree(work)


def _idle(generate: object) -> float:
    """Of the time between the first and the last kernel of the middle of a run, the share in which none ran."""
    from torch.profiler import ProfilerActivity, profile

    assert callable(generate)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        generate()
        torch.cuda.synchronize()
    spans = np.array(
        sorted(
            (event.time_range.start, event.time_range.end)
            for event in found.events() or []
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
    )
    first, last = spans[0, 0], spans[:, 1].max()
    lower, upper = first + 0.1 * (last - first), first + 0.9 * (last - first)
    busy, until = 0.0, lower
    for start, end in spans:
        start, end = max(start, until), min(end, upper)
        if end > start:
            busy, until = busy + end - start, end
    return float(1 - busy / (upper - lower))


if __name__ == "__main__":
    main()
