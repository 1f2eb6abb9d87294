"""Decoding JPEG files of 500 x 375 beside a CUDA device: python -m tests.benchmarks.bench_decode_gpu

PIL in as many processes as there are cores, decoding alone, and nvJPEG through torchvision, where its build has it.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from tests.benchmarks.accelerator import Bench, run_benchmark
from tests.benchmarks.bench_generate_gpu import Decoded, write_jpegs

PIL_RATE, DEVICE_RATE = "decode, resize and crop by PIL, all cores, images/s", "decode by nvJPEG / by PIL on all cores"


def measure(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        count = bench.pick(8192, 8)
        paths = write_jpegs(Path(folder) / "jpegs", count)
        cores = (os.cpu_count() or 1) if bench.cuda else 0
        loader = DataLoader(Decoded(paths), batch_size=bench.pick(64, 2), num_workers=cores)
        rate = count / bench.seconds(lambda: [None for _ in loader])
        bench.report(PIL_RATE, rate, note=f"{cores} processes")
        if not bench.cuda:
            return
        encoded = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths[:512]]

        def decode() -> None:
            for start in range(0, len(encoded), 64):
                decode_jpeg(encoded[start : start + 64], mode=ImageReadMode.RGB, device=bench.device)

        try:
            decode()
        except (RuntimeError, ValueError) as error:
            bench.report(DEVICE_RATE, None, note=f"not in this build of torchvision: {str(error).splitlines()[0][:80]}")
            return
        on_device = len(encoded) / bench.seconds(decode)
        bench.report(DEVICE_RATE, on_device / rate, note=f"{on_device:,.0f} images/s")


FIGURES = (PIL_RATE, DEVICE_RATE)

if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
