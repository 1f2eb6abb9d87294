"""What benchmarks of a CUDA device share: options, timing by events, and the two limits that the card sets.

Without a CUDA device they report every figure as unmeasured; with `--dry-run` they run on the CPU with tiny sizes,
which shows that the code works and measures nothing.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tests.benchmarks.figures import Goal, report
from tests.benchmarks.timing import interleaved

Step = Callable[[], object]
_FLUSHED_BYTES = 2**28  # written between two timed runs, so that nothing is found in the L2 cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How a benchmark runs.

    Attributes:
        device: what it measures; the CPU in a dry run.
        dry_run: tiny sizes, no goals.
        deadline: `time.monotonic()` after which no further figure is begun.
    """

    device: torch.device
    dry_run: bool
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: int, tiny: int) -> int:
        """A size: the full one, or the tiny one of a dry run."""
        return tiny if self.dry_run else full

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether a part that takes about this long still fits; reports it as unmeasured where it does not."""
        if self.dry_run or time.monotonic() + seconds <= self.deadline:
            return True
        report(name, None, note=f"no time left (takes about {seconds:.0f} s)")
        return False

    def report(
        self, name: str, value: float | None, *, goal: float | None = None, bound: Goal = "at least", note: str = ""
    ) -> None:
        """Report a figure; a dry run keeps the names and drops the goals, which its numbers say nothing about."""
        if self.dry_run:
            report(name, value, note=note)
        else:
            report(name, value, goal=goal, bound=bound, note=note)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, sides: Mapping[str, Step], *, repeats: int = 15, warmup: int = 3) -> dict[str, float]:
        """Median milliseconds of each side on the device, in turns, each after the L2 cache was overwritten."""
        repeats, warmup = (1, 0) if self.dry_run else (repeats, warmup)
        flushed = torch.empty(self.pick(_FLUSHED_BYTES, 4), dtype=torch.int8, device=self.device)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            for _ in range(warmup):
                side()
        for _ in range(repeats):
            for name, side in sides.items():
                flushed.zero_()
                times[name].append(self._time(side))
        return {name: statistics.median(values) for name, values in times.items()}

    def _time(self, side: Step) -> float:
        if not self.cuda:
            started = time.perf_counter()
            side()
            return 1e3 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        side()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def seconds(self, side: Step) -> float:
        """Seconds on the wall until the device has done it."""
        self.synchronize()
        started = time.perf_counter()
        side()
        self.synchronize()
        return time.perf_counter() - started

    def in_turn(self, sides: Mapping[str, Step], repeats: int = 5) -> dict[str, float]:
        """Median seconds of each side, run in turn, until the device has done it."""
        return interleaved(
            {name: functools.partial(self.seconds, side) for name, side in sides.items()}, self.pick(repeats, 1)
        )

    def copy_bandwidth(self) -> float:
        """Bytes a second of a copy on the device, read and written."""
        source = torch.ones(self.pick(2**31, 2**16), dtype=torch.int8, device=self.device)
        sink = torch.empty_like(source)
        return 2 * source.numel() / (1e-3 * self.milliseconds({"copy": lambda: sink.copy_(source)})["copy"])

    def matrix_rate(self) -> float:
        """Operations a second of a bf16 matrix product of random numbers."""
        side = self.pick(8192, 64)
        left, right = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        return 2 * side**3 / (1e-3 * self.milliseconds({"product": lambda: left @ right})["product"])

    def card(self) -> str:
        """The device in words."""
        if not self.cuda:
            return "CPU (dry run: nothing here is a measurement)"
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}"


def run_benchmark(doc: str | None, measure: Callable[[Bench], None], unmeasured: tuple[str, ...]) -> None:
    """The `main` of a benchmark: parse its options, then measure, or say that there is no device.

    Args:
        doc: the module's docstring.
        measure: reports the figures.
        unmeasured: names of the figures, for a machine without a CUDA device.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no figure after that long")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: shows that the code works")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        for name in unmeasured:
            report(name, None, note="no CUDA device")
        return
    device = torch.device("cpu" if options.dry_run else "cuda")
    bench = Bench(device=device, dry_run=options.dry_run, deadline=time.monotonic() + options.seconds)
    print(bench.card(), file=sys.stderr)
    measure(bench)
