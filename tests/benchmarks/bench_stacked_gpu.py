"""Steps of 16 students of one pass on a CUDA device: python -m tests.benchmarks.bench_stacked_gpu

resnet8 at 32, float32, batch 128, batches on the device: 16 students as one network, eagerly and as one CUDA graph, and
in turn, beside one student.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tests.benchmarks.accelerator import Bench, run_benchmark
from tests.benchmarks.stack_steps import build_stack_sides
from tests.support.stores import draw_logits, write_logits

CLASSES, SIDE = 10, 32
STACKED = "16 students of one pass, stacked / one student (resnet8, 32)"
AS_GRAPH = "16 students of one pass, stacked with --step graph / one student"
IN_TURN = "16 students of one pass, in turn / one student"


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, count: int) -> None:
        torch.manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % CLASSES


def measure(bench: Bench) -> None:
    batch, count, students = bench.pick(128, 4), bench.pick(10, 3), bench.pick(16, 4)
    data = _Images(batch * count)
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        keys = [str(number) for number in range(len(data))]
        write_logits(Path(folder) / "store", keys, draw_logits(len(data), CLASSES), temperature=4.0)
        sides = build_stack_sides(
            *(data, str(Path(folder) / "store"), "zoo:resnet8", students),
            classes=CLASSES,
            batch=batch,
            count=count,
            precision="fp32",
            device=str(bench.device),
        )
    ms = {name: 1e3 * value / count for name, value in bench.in_turn(sides).items()}
    note = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    bench.report(STACKED, ms["stacked"] / ms["one"], goal=3.0, bound="at most", note=note)
    bench.report(AS_GRAPH, ms["graph"] / ms["one"], goal=3.0, bound="at most")
    bench.report(IN_TURN, ms["in turn"] / ms["one"])


FIGURES = (STACKED, AS_GRAPH, IN_TURN)

if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
