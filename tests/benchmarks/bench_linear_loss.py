"""The fused linear and distillation loss on the CPU against logits of all rows.

python -m tests.benchmarks.bench_linear_loss [--rows 4096] [--classes 50257] [--width 768] [--repeats 3]

Forward and backward to hidden states and matrix, float32, one thread. "two steps" is `distillation_loss` of `F.linear`,
the package's own loss, whose gradient of the logits is the only (N, C) buffer beside them; "plain torch" is what one
writes by hand. The sides take turns; a ratio is one of medians of CPU time, which other programs on the machine disturb
least. Memory is the peak of a process of its own (VmHWM) minus what it had before the step, labels and inputs included
in that.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss import (
    DenseTarget,
    HeadTarget,
    SampledTarget,
    TopKTarget,
    distillation_loss,
    linear_distillation_loss,
)
from tests.benchmarks.figures import report
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import ROOT

TEMPERATURE, KEPT = 1.0, 32
KD = {"temperature": TEMPERATURE, "soft_weight": 0.9, "hard_weight": 0.1}
TARGETS = ("topk", "sampled", "head", "dense")
Step = Callable[[], Tensor]


def make_target(kind: str, rows: int, classes: int, width: int, generator: torch.Generator) -> object:
    if kind == "head":
        weight_CD = torch.randn(classes, width, generator=generator) / width**0.5
        return HeadTarget(hidden=torch.randn(rows, width, generator=generator).half(), weight=weight_CD)
    if kind == "dense":
        scaled_NC = torch.empty(rows, classes, dtype=torch.float16)
        for row in scaled_NC.split(256):
            row.copy_(torch.randn(row.shape, generator=generator) * 3)
        return DenseTarget(scaled_logits=scaled_NC, temperature=TEMPERATURE, retemperable=True)
    # Distinct in a row: a run of classes from a random one on.
    index_NK = torch.randint(0, classes - KEPT, (rows, 1), generator=generator) + torch.arange(KEPT)
    if kind == "sampled":
        weight_NK = torch.full((rows, KEPT), 1.0 / KEPT)
        return SampledTarget(index=index_NK, weight=weight_NK, temperature=TEMPERATURE, num_classes=classes)
    return TopKTarget(
        index=index_NK,
        value=-torch.rand(rows, KEPT, generator=generator).cumsum(1).half(),
        tail=torch.full((rows, 1), -1.0),
        tail_temperatures=(TEMPERATURE,),
        temperature=TEMPERATURE,
        num_classes=classes,
    )


class Case:
    """The inputs of one target, and the steps that use them."""

    def __init__(self, kind: str, rows: int, classes: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden_ND = torch.randn(rows, width, generator=generator).requires_grad_()
        self.weight_CD = (torch.randn(classes, width, generator=generator) / width**0.5).requires_grad_()
        self.labels_N = torch.randint(0, classes, (rows,), generator=generator)
        self.target = make_target(kind, rows, classes, width, generator)
        self.sides: dict[str, Step] = {"fused": self.fused, "two steps": self.two_steps}
        if kind == "dense":
            self.sides["plain torch"] = self.plain_torch

    def fused(self) -> Tensor:
        return linear_distillation_loss(self.hidden_ND, self.weight_CD, None, self.target, self.labels_N, **KD)

    def two_steps(self) -> Tensor:
        return distillation_loss(F.linear(self.hidden_ND, self.weight_CD), self.target, self.labels_N, **KD)

    def plain_torch(self) -> Tensor:
        logits_NC = F.linear(self.hidden_ND, self.weight_CD)
        p_NC = F.softmax(self.target.scaled_logits.float(), dim=1)
        soft = F.kl_div(F.log_softmax(logits_NC / TEMPERATURE, dim=1), p_NC, reduction="batchmean")
        return 0.1 * F.cross_entropy(logits_NC, self.labels_N) + 0.9 * TEMPERATURE**2 * soft

    def run(self, side: str) -> None:
        self.hidden_ND.grad = self.weight_CD.grad = None
        self.sides[side]().backward()


def read_memory(name: str) -> int:
    """Bytes of VmHWM (the peak) or VmRSS (now)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def print_peak(kind: str, side: str, sizes: tuple[int, int, int]) -> None:
    """Peak extra memory of one step in bytes; libraries are loaded by a small one before."""
    Case(kind, 8, 1000, 16).run(side)
    case = Case(kind, *sizes)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = read_memory("VmRSS")
    case.run(side)
    print(read_memory("VmHWM") - before)


def measure_peak(kind: str, side: str, sizes: tuple[int, int, int]) -> int:
    names = ("--rows", "--classes", "--width")
    numbers = [text for name, size in zip(names, sizes, strict=True) for text in (name, str(size))]
    command = [sys.executable, "-m", "tests.benchmarks.bench_linear_loss", "--peak", kind, side, *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument(
        "--peak", nargs=2, metavar=("TARGET", "SIDE"), help="measure this one's memory here, print bytes"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (options.rows, options.classes, options.width)
    if options.peak:
        print_peak(*options.peak, sizes)
        return
    print(f"torch {torch.__version__}, one thread, N = {sizes[0]}, C = {sizes[1]}, D = {sizes[2]}")
    for kind in options.targets:
        case = Case(kind, *sizes)
        sides = {side: lambda side=side, case=case: case.run(side) for side in case.sides}
        seconds = interleaved(sides, options.repeats, clock=time.process_time)
        peaks = {side: measure_peak(kind, side, sizes) for side in case.sides}
        for side in list(case.sides)[1:]:
            report(
                f"linear loss, {kind}: peak memory of {side}",
                peaks["fused"] / peaks[side],
                goal=0.25,
                bound="at most",
                note=f"{peaks['fused'] / 1e6:,.0f} of {peaks[side] / 1e6:,.0f} MB",
            )
            report(
                f"linear loss, {kind}: time of {side}",
                seconds["fused"] / seconds[side],
                goal=1.1,
                bound="at most",
                note=f"{seconds['fused']:.2f} of {seconds[side]:.2f} s",
            )


if __name__ == "__main__":
    main()
