"""Labelling with compiled teachers on a CUDA device: python -m tests.benchmarks.bench_compile_gpu

resnet50 at 224, bf16, batch 256, images decoded in RAM, against the bare forward pass of the same compiled network.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from tests.benchmarks.accelerator import Bench, run_benchmark
from tests.benchmarks.bench_generate_gpu import ONE, SIDE, InMemory, Teachers, steady_rate

COMPILED = "generate --compile resnet50 / bare compiled forward"
FIGURES = (COMPILED,)


def measure(bench: Bench) -> None:
    if not bench.cuda:  # inductor would compile for the CPU, for minutes
        return
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    try:
        teachers = Teachers(bench, work, ONE, f"resize=none&crop={SIDE}")
        bare = teachers.bare_rate([torch.compile(model) for model in teachers.models])

        def generate(images: int) -> float:
            return teachers.generate(InMemory(images), work / "store", compile=True)

        generate(512)  # compiles, so that neither of the two runs below does
        rate, whole = steady_rate(generate, 2560, 12800)
        bench.report(
            COMPILED, rate / bare, goal=0.95, note=f"{rate:,.0f} of {bare:,.0f} images/s; whole run {whole:,.0f}"
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
