"""What a step of a student costs with each `--loss`, beside the distillation loss, on the CPU.

python -m tests.benchmarks.bench_losses [--repeats 9] [--student zoo:resnet8] [--classes 10 100] [--batch 256]

Prints CPU time of a step on CIFAR JPEG images that are decoded already: medians of interleaved runs, float32, one
thread.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import softlabel
from softlabel.loader import SoftLabelLoader
from softlabel.models import build_model
from softlabel.models.teacher import student_preprocessing
from softlabel.training.distributed import Ranks
from softlabel.training.grid import students_of
from softlabel.training.losses import LOSSES
from softlabel.training.row_student import RowStudent
from softlabel.training.step import RowStep, cut, prepare, without_filler
from softlabel.views import CropFlip
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data
from tests.support.stores import draw_logits, write_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--student", default="zoo:resnet8")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    data = f"{require_shared_data() / 'cifar10-jpeg' / 'train.parquet'}?rows=0:{options.batch}"
    for classes in options.classes:
        with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
            sides = build_sides(data, Path(folder) / "store", options.student, classes, options.batch)
            found = interleaved(sides, options.repeats, clock=time.process_time)
        for name, seconds in found.items():
            print(
                f"{options.student}, {classes} classes, batch {options.batch}, {name}: {1e3 * seconds:.1f} ms, "
                f"{seconds / found['kd']:.3f} of kd",
                flush=True,
            )


def build_sides(data: str, store: Path, spec: str, classes: int, batch: int) -> dict[str, Callable[[], None]]:
    """What makes a step, of each loss."""
    source = softlabel.open_source(data, ignore_labels=classes != 10)  # its own labels are of 10 classes
    write_logits(store, source.keys(), draw_logits(len(source), classes), temperature=4.0)
    ranks, preprocessing = Ranks("cpu"), student_preprocessing(spec)
    loader = SoftLabelLoader(source, str(store), batch_size=batch, preprocessing=preprocessing, augment=CropFlip())
    made, counts_B = without_filler(next(iter(loader)))
    parts = cut(made, counts_B, 1)
    work = prepare(made, parts, parts[0][1], [preprocessing], epoch=0, step=0, with_teacher=True)
    config = softlabel.TrainConfig(data="unused", student=spec, out="unused", labels="unused", loss=list(LOSSES))

    def run(student: RowStudent, work: RowStep) -> None:
        student.step = 0
        student.advance(work, alone=True)

    sides = {}
    for one in students_of(config):
        student = RowStudent(
            one,
            build_model(spec, num_classes=classes),
            preprocessing,
            ranks=ranks,
            precision="fp32",
            temperature=one.temperature or 4.0,
            steps=1,
        )
        sides[one.loss] = partial(run, student, work)
    return sides  # type: ignore[return-value]


if __name__ == "__main__":
    main()
