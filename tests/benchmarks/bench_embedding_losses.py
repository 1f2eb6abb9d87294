"""What a loss on embeddings adds to a step of resnet8: 50,000 samples of 32x32 pixels, one thread, CPU time.

python -m tests.benchmarks.bench_embedding_losses [--batch 256] [--steps 3] [--repeats 7] [--widths 64 512]

A step is that of the trainer without its loader: forward, soft and hard loss at T = 4, the loss on embeddings, backward
and update, all sides in turn; that of crd draws its negatives too. The teacher's embeddings are random: those of a
resnet56 are 64 wide, of a resnet34 for ImageNet 512; maps of attention are those of a CIFAR ResNet.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from softlabel import TrainConfig
from softlabel.dataset import open_source
from softlabel.store.encodings import Head
from softlabel.store.features import Attention, Features
from softlabel.store.open import open_store
from softlabel.training.distributed import Ranks
from softlabel.training.embedding_losses import EMBEDDING_LOSSES
from softlabel.training.grid import students_of
from softlabel.training.row_task import RowTask
from softlabel.training.step import RowStep
from tests.benchmarks.timing import interleaved
from tests.support.stores import Samples, make_run, write_store

SAMPLES, CLASSES = 50_000, 10


class Noise(Dataset[tuple[Tensor, int]]):
    """Random images, 256 of them over and over."""

    def __init__(self) -> None:
        self._images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index % 256], index % CLASSES


def write_embeddings(root: Path, width: int) -> None:
    """A store of encoding head."""
    rng = np.random.default_rng(0)
    sizes = (32, 16, 8)
    attention = Attention(heights=sizes, widths=sizes, modules=(("layer1", "layer2", "layer3"),))
    maps_S = rng.random(attention.width).astype(np.float16)
    run = make_run(
        samples=SAMPLES,
        classes=CLASSES,
        encoding=Head(width=width, hidden="float16"),
        features=Features(attention=attention),
        shard_rows=SAMPLES,
    )
    head = {"weight": rng.normal(size=(CLASSES, width)), "bias": np.zeros(CLASSES)}
    samples = Samples(
        keys=[str(number) for number in range(SAMPLES)],
        labels=np.arange(SAMPLES) % CLASSES,
        content=np.zeros(SAMPLES, np.uint64),
        logits=np.zeros((1, 1, CLASSES), np.float32),
        columns={
            "hidden": np.maximum(rng.normal(size=(1, SAMPLES, width)), 0).astype(np.float16),
            "attention": np.broadcast_to(maps_S, (1, SAMPLES, attention.width)),
        },
    )
    extra = {"head": safetensors.numpy.save({name: one.astype(np.float32) for name, one in head.items()})}
    write_store(root, run, samples, extra=extra, fidelity=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--losses", nargs="+", default=list(EMBEDDING_LOSSES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["none", *options.losses]
    for width in options.widths:
        with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
            write_embeddings(Path(folder) / "store", width)
            sides = build_steps(Path(folder), names, options.batch, options.steps)
            ms = {
                name: 1e3 * seconds / options.steps
                for name, seconds in interleaved(sides, options.repeats, clock=time.process_time).items()
            }
        print(f"resnet8, batch {options.batch}, teacher's embedding {width} wide: {ms['none']:.1f} ms a step")
        for name in names[1:]:
            print(f"  {name:<7} +{ms[name] - ms['none']:6.2f} ms   x {ms[name] / ms['none']:.3f}")


def build_steps(folder: Path, names: list[str], batch: int, steps: int) -> dict[str, Callable[[], None]]:
    """What makes so many steps of a student with each loss."""
    config = TrainConfig(
        data="noise",
        labels=str(folder / "store"),
        student="zoo:resnet8",
        out=str(folder / "out"),
        embedding_loss=names,  # type: ignore[arg-type]
        batch_size=batch,
        soft_weight=0.9,
        hard_weight=0.1,
        device="cpu",
    )
    ranks, source = Ranks("cpu"), open_source(Noise())
    task = RowTask(config, students_of(config), source, open_store(folder / "store"), "fp32", report=False)
    loader = task.open_loader(ranks, 0, None)
    students = [task.make_student(number, ranks=ranks, temperature=4.0, steps=steps) for number in range(len(names))]
    batches = [batch for _, batch in zip(range(steps), loader, strict=False)]

    def prepare(names_of: list[str]) -> list[RowStep]:
        chosen = [student for student in students if student.config.embedding_loss in names_of]
        made = []
        for number, one in enumerate(batches):
            whole, parts = task.cut(one)
            made.append(task.prepare(whole, parts, parts[0][1], chosen, epoch=0, step=number))
        return made

    ready = prepare(names)

    def run(number: int) -> None:
        student = students[number]
        student.epoch = student.step = 0
        for place, work in enumerate(ready):
            if student.config.embedding_loss == "crd":
                assert task._draws is not None
                task._draws.draw(0, place)
            student.advance(work, alone=True)

    return {name: lambda number=number: run(number) for number, name in enumerate(names)}  # type: ignore[misc]


if __name__ == "__main__":
    main()
