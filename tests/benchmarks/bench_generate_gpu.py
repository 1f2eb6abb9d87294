"""Labelling on a CUDA device: python -m tests.benchmarks.bench_generate_gpu

Teachers at 224, bf16, channels last, batch 256. The rate of `generate` is that of its steady state: what it labels more
in a long run than in a short one, over what it takes longer; loading, opening and starting processes fall out. It is
held against the bare forward pass of the same networks over one batch on the device, and, from JPEG files of 500 x 375,
against the slower of that and of decoding alone by as many processes. A network that costs nothing shows how many
images the host feeds at most.
"""

import io
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import softlabel
from softlabel.models import build_model
from tests.benchmarks.accelerator import Bench, run_benchmark

SIDE, DISTINCT = 224, 512
ONE = ("resnet50",)
THREE = ("vit_b_16", "resnet50", "convnext_tiny")
RAM, IDLE = "generate resnet50, images in RAM / bare forward", "generate resnet50: idle share of the device"
HOST = "generate with a network of no cost, images in RAM / bare forward of resnet50"
ENSEMBLE = "generate of 3 architectures / sum of bare forwards (time)"
FILES = "generate resnet50 from JPEG files / slower of decoding and forward"


class InMemory(Dataset[tuple[Tensor, int]]):
    """Decoded images, a few distinct ones over and over."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(
            0, 256, (min(DISTINCT, images), 3, SIDE, SIDE), dtype=torch.uint8, generator=generator
        )
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index % len(self.pixels)], 0


class Decoded(Dataset[Tensor]):
    """JPEG files as a plain PIL pipeline decodes and shapes them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            width, height = image.size
            scale = 256 / min(width, height)
            shaped = image.convert("RGB").resize(
                (round(width * scale), round(height * scale)), Image.Resampling.BILINEAR
            )
        left, top = (shaped.width - SIDE) // 2, (shaped.height - SIDE) // 2
        return torch.from_numpy(np.array(shaped.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1)


def write_jpegs(folder: Path, count: int) -> list[Path]:
    """`count` files of 500 x 375, at most 256 distinct ones (links to one another)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if number >= 256:
            os.link(paths[number % 256], path)
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noise = rng.normal(0, 6, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        path.write_bytes(buffer.getvalue())
    return paths


class Teachers:
    """Networks with random weights: as files for `generate`, and on the device for the bare forward pass."""

    def __init__(self, bench: Bench, work: Path, names: Sequence[str], options: str) -> None:
        self.bench, self.batch = bench, bench.pick(256, 2)
        names = names if not bench.dry_run else tuple("resnet18" for _ in names)
        self.specs, self.models = [], []
        for number, name in enumerate(names):
            torch.manual_seed(number)
            model = build_model(f"torchvision:{name}").eval()
            path = work / f"{name}-{number}.pt"
            torch.save(model.state_dict(), path)
            self.specs.append(f"torchvision:{name}@{path}?{options}")
            self.models.append(model.to(bench.device, memory_format=torch.channels_last))

    def bare_rate(self, models: Sequence[nn.Module] | None = None) -> float:
        """Images a second of the forward passes alone, one after the other, over one batch on the device."""
        models = self.models if models is None else models
        images = torch.randn(self.batch, 3, SIDE, SIDE, device=self.bench.device)
        images = images.contiguous(memory_format=torch.channels_last)
        passes = self.bench.pick(20, 1)

        def forward() -> None:
            with torch.inference_mode(), torch.autocast(self.bench.device.type, dtype=torch.bfloat16):
                for _ in range(passes):
                    for model in models:
                        model(images)

        forward()
        return passes * self.batch / statistics.median(self.bench.seconds(forward) for _ in range(3))

    def generate(self, data: object, out: Path, **options: Any) -> float:
        """Seconds of labelling, opening and loading left out."""
        shutil.rmtree(out, ignore_errors=True)
        summary = softlabel.generate(
            data,
            teachers=self.specs,
            out=out,
            device=str(self.bench.device),
            precision="bf16",
            batch_size=self.batch,
            preflight=False,
            progress=False,
            **options,
        )
        return summary.seconds


def steady_rate(run: Callable[[int], float], short: int, long: int) -> tuple[float, float]:
    """Images a second between a short and a long run, and of the long run as a whole."""
    first, second = run(short), run(long)
    return (long - short) / max(second - first, 1e-9), long / second


def measure_in_memory(bench: Bench, work: Path, teachers: Teachers, bare: float) -> None:
    short, long = bench.pick(5120, 4), bench.pick(25600, 8)
    if not bench.has_time(RAM, 30):
        return
    rate, whole = steady_rate(lambda images: teachers.generate(InMemory(images), work / "store"), short, long)
    bench.report(RAM, rate / bare, goal=0.95, note=f"{rate:,.0f} of {bare:,.0f} images/s; whole run {whole:,.0f}")


def build_pooled() -> nn.Module:
    """The mean of each channel, and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


def measure_host(bench: Bench, work: Path, bare: float) -> None:
    short, long = bench.pick(5120, 4), bench.pick(25600, 8)
    if not bench.has_time(HOST, 12):
        return
    teachers = Teachers(bench, work, (), "")
    teachers.specs = [
        f"python:tests.benchmarks.bench_generate_gpu:build_pooled?resize=none&crop={SIDE}&mean=0.5&std=0.5"
    ]
    rate, whole = steady_rate(lambda images: teachers.generate(InMemory(images), work / "store"), short, long)
    bench.report(HOST, rate / bare, note=f"{rate:,.0f} images/s; whole run {whole:,.0f}")


def measure_idle(bench: Bench, work: Path, teachers: Teachers) -> None:
    if not bench.cuda or not bench.has_time(IDLE, 20):
        return
    share = idle_share(lambda: teachers.generate(InMemory(10240), work / "store"))
    bench.report(IDLE, share, goal=0.05, bound="at most")


def measure_ensemble(bench: Bench, work: Path) -> None:
    if not bench.has_time(ENSEMBLE, 30):
        return
    teachers = Teachers(bench, work, THREE, f"resize=none&crop={SIDE}")
    bare = teachers.bare_rate()
    short, long = bench.pick(2560, 4), bench.pick(10240, 8)
    rate, whole = steady_rate(lambda images: teachers.generate(InMemory(images), work / "store"), short, long)
    note = f"{rate:,.0f} of {bare:,.0f} images/s; whole run {whole:,.0f}"
    bench.report(ENSEMBLE, bare / rate, goal=1.03, bound="at most", note=note)


def measure_files(bench: Bench, work: Path, bare: float) -> None:
    if not bench.has_time(FILES, 45):
        return
    short, long = bench.pick(4096, 4), bench.pick(16384, 8)
    workers = min(os.cpu_count() or 1, 16) if bench.cuda else 0
    paths = write_jpegs(work / "jpegs", long)
    few = work / "few"
    few.mkdir()
    for path in paths[:short]:
        os.link(path, few / path.name)
    teachers = Teachers(bench, work, ONE, f"resize=256&crop={SIDE}")
    folders = {short: few, long: work / "jpegs"}
    options = {"workers": workers, "ignore_labels": True}
    rate, whole = steady_rate(lambda images: teachers.generate(folders[images], work / "store", **options), short, long)

    def decode(count: int) -> float:
        loader = DataLoader(Decoded(paths[:count]), batch_size=64 if bench.cuda else 2, num_workers=workers)
        return bench.seconds(lambda: [None for _ in loader])

    decoding, _ = steady_rate(decode, short, long)
    limits = f"decoding {decoding:,.0f} in {workers} processes, forward {bare:,.0f}"
    note = f"{rate:,.0f} images/s; {limits}; whole run {whole:,.0f}"
    bench.report(FILES, rate / min(decoding, bare), goal=0.90, note=note)


def idle_share(generate: Callable[[], object]) -> float:
    """Of the time between the first and the last kernel of the middle of a run, the share in which none ran."""
    from torch.profiler import ProfilerActivity, profile

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
    lower, upper = first + 0.3 * (last - first), first + 0.9 * (last - first)
    busy, until = 0.0, lower
    for start, end in spans:
        start, end = max(start, until), min(end, upper)
        if end > start:
            busy, until = busy + end - start, end
    return float(1 - busy / (upper - lower))


def measure(bench: Bench) -> None:
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    try:
        teachers = Teachers(bench, work, ONE, f"resize=none&crop={SIDE}")
        bare = teachers.bare_rate()
        measure_in_memory(bench, work, teachers, bare)
        measure_host(bench, work, bare)
        measure_idle(bench, work, teachers)
        measure_ensemble(bench, work)
        measure_files(bench, work, bare)
    finally:
        shutil.rmtree(work, ignore_errors=True)


FIGURES = (RAM, HOST, IDLE, ENSEMBLE, FILES)

if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
