"""The card and its two limits, which other figures are held against: python -m tests.benchmarks.bench_limits_gpu

A copy of 2 GiB on the device, counting bytes read and written, and a bf16 matrix product of random numbers of 8192 a
side. Clocks are left as they are.
"""

from tests.benchmarks.accelerator import Bench, run_benchmark

COPY, PRODUCT = "copy on the device, TB/s", "bf16 matrix product, TFLOP/s"
FIGURES = (COPY, PRODUCT)


def measure(bench: Bench) -> None:
    bench.report(COPY, bench.copy_bandwidth() / 1e12, note=bench.card())
    bench.report(PRODUCT, bench.matrix_rate() / 1e12)


if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
