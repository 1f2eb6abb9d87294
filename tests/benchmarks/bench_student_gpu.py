"""Steps of a student on a CUDA device: python -m tests.benchmarks.bench_student_gpu

resnet20 on images of CIFAR's size that are kept and augmented on the device, with eager steps and with steps as CUDA
graphs, beside a bare loop over tensors that lie there. Then resnet18 at 224, bf16, batch 256, images decoded in RAM:
steps from cached labels beside steps with hard labels alone and beside steps that run the teacher, resnet152, for every
batch.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from softlabel.models import build_model
from softlabel.models.teacher import load_teacher
from tests.benchmarks.accelerator import Bench, run_benchmark
from tests.benchmarks.bench_generate_gpu import SIDE, InMemory
from tests.benchmarks.student_steps import TEMPERATURE, build_steps
from tests.support.stores import draw_logits, write_logits

CLASSES = 1000
SOFT_HARD = "student step, cached soft labels / hard labels (resnet18, 224)"
SOFT_ONLINE = "student step, cached labels / teacher on line (resnet152)"
WAITING = "student step, hard labels / bare step on the device"
ON_DEVICE_HARD = "the same with --cache device, cached soft labels / hard labels"
ON_DEVICE_ONLINE = "the same with --cache device, cached labels / teacher on line"
ON_DEVICE = "bare loop over device tensors / student with --cache device, hard labels (resnet20, 32)"
AS_GRAPH = "bare loop over device tensors / the same with --step graph"
GRAPH_EAGER = "student step with --step graph / eager (resnet20, 32, --cache device, soft labels)"


class Labelled(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: int) -> None:
        self.images = InMemory(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index][0], index % CLASSES


class Small(Dataset[tuple[Tensor, int]]):
    """Random images of 32 x 32 pixels."""

    def __init__(self, images: int) -> None:
        self.images_NCHW = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images_NCHW[index], index % CLASSES


def bare_step(bench: Bench, student: str, batch: int, count: int, side: int = SIDE) -> float:
    """Seconds of `count` plain training steps of the student over one batch that lies on the device."""
    model = build_model(student, num_classes=CLASSES).to(bench.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    images = torch.randn(batch, 3, side, side, device=bench.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=bench.device)

    def steps() -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(bench.device.type, dtype=torch.bfloat16):
                logits = model(images)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    steps()
    return bench.seconds(steps)


def measure(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        measure_small(bench, folder)
    if not bench.has_time(SOFT_HARD, 30):
        return
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        measure_large(bench, Path(folder))


def measure_large(bench: Bench, folder: Path) -> None:
    """Steps of resnet18 at 224 with labels from a store and with its teacher on line."""
    batch, count = bench.pick(256, 2), bench.pick(8, 2)
    names = ("resnet18", "resnet152") if bench.cuda else ("resnet18", "resnet18")
    student, data = f"torchvision:{names[0]}?resize=none&crop={SIDE}", Labelled(batch * count)
    torch.manual_seed(0)
    path = folder / "teacher.pt"
    torch.save(build_model(f"torchvision:{names[1]}", num_classes=CLASSES).state_dict(), path)
    spec = f"torchvision:{names[1]}@{path}?resize=none&crop={SIDE}"
    teacher = load_teacher(spec, device=bench.device, precision="bf16", num_classes=CLASSES)
    keys = [str(number) for number in range(len(data))]
    write_logits(folder / "store", keys, draw_logits(len(data), CLASSES), temperature=TEMPERATURE)

    def build(**settings: Any) -> dict[str, Callable[[], None]]:
        return build_steps(
            data,
            str(folder / "store"),
            teacher,
            student,
            classes=CLASSES,
            batch=batch,
            count=count,
            precision="bf16",
            device=str(bench.device),
            **settings,
        )

    ms = {name: 1e3 * value / count for name, value in bench.in_turn(build(), repeats=3).items()}
    note = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    bench.report(SOFT_HARD, ms["soft"] / ms["hard"], goal=1.02, bound="at most", note=note)
    bench.report(SOFT_ONLINE, ms["soft"] / ms["online"], goal=0.35, bound="at most")
    bare = 1e3 * bare_step(bench, student, batch, count) / count
    bench.report(WAITING, ms["hard"] / bare, note=f"bare {bare:.1f} ms: what the loader and the copies add")
    if not bench.has_time(ON_DEVICE_ONLINE, 20):
        return
    sides = build(cache_device=str(bench.device))
    ms = {name: 1e3 * value / count for name, value in bench.in_turn(sides, repeats=3).items()}
    note = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    bench.report(ON_DEVICE_HARD, ms["soft"] / ms["hard"], goal=1.02, bound="at most", note=note)
    bench.report(ON_DEVICE_ONLINE, ms["soft"] / ms["online"], goal=0.35, bound="at most")


def measure_small(bench: Bench, folder: str) -> None:
    """Steps of a small student whose images never leave the device."""
    batch, count = bench.pick(256, 2), bench.pick(32, 4)
    data = Small(batch * count)
    keys = [str(number) for number in range(len(data))]
    write_logits(Path(folder) / "small", keys, draw_logits(len(data), CLASSES), temperature=TEMPERATURE)
    student = "zoo:resnet20"
    device = str(bench.device)
    sides: dict[str, Callable[[], None]] = {}
    for step in ("eager", "graph"):
        made = build_steps(
            data,
            str(Path(folder) / "small"),
            None,
            student,
            classes=CLASSES,
            batch=batch,
            count=count,
            precision="bf16",
            device=device,
            cache_device=device,
            step=step,
        )
        sides |= {f"{kind}, {step}": make for kind, make in made.items()}
    ms = {name: 1e3 * value / count for name, value in bench.in_turn(sides).items()}
    bare = 1e3 * bare_step(bench, student, batch, count, side=32) / count
    for name, kind in ((ON_DEVICE, "hard, eager"), (AS_GRAPH, "hard, graph")):
        bench.report(name, bare / ms[kind], goal=0.95, note=f"{ms[kind]:.2f} ms a step, bare {bare:.2f} ms")
    note = f"{ms['soft, graph']:.2f} of {ms['soft, eager']:.2f} ms"
    bench.report(GRAPH_EAGER, ms["soft, graph"] / ms["soft, eager"], note=note)


FIGURES = (ON_DEVICE, AS_GRAPH, GRAPH_EAGER, SOFT_HARD, SOFT_ONLINE, WAITING, ON_DEVICE_HARD, ON_DEVICE_ONLINE)

if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
