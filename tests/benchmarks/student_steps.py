"""Steps of the trainer, from the loader to the optimiser: hard labels, cached soft labels, or the teacher on line."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import softlabel
from softlabel.inputs.base import Inputs
from softlabel.loader import SoftLabelLoader
from softlabel.loss import DenseTarget
from softlabel.models import build_model
from softlabel.models.teacher import Teacher, student_preprocessing
from softlabel.training.distributed import Ranks
from softlabel.training.grid import students_of
from softlabel.training.row_student import RowStudent
from softlabel.training.step import Counts, RowStep, cut, prepare, without_filler
from softlabel.views import CropFlip

TEMPERATURE = 4.0


def build_steps(
    data: object,
    labels: str,
    teacher: Teacher,
    student: str,
    *,
    classes: int,
    batch: int,
    count: int,
    precision: str,
    device: str,
    cache_device: str | None = None,
) -> dict[str, Callable[[], None]]:
    """What makes `count` steps of an epoch: "hard", "soft" and "online". Images and labels are in memory already, or
    images on `cache_device`."""
    preprocessing = student_preprocessing(student)
    ranks = Ranks(device)
    common: dict[str, Any] = {
        "batch_size": batch,
        "tail": "drop",
        "preprocessing": preprocessing,
        "augment": CropFlip(),
        "cache_device": cache_device,
    }
    loaders = {"hard": SoftLabelLoader(data, **common), "soft": SoftLabelLoader(data, labels, **common)}  # type: ignore[arg-type]
    students = {}
    for kind, store in (("hard", None), ("soft", labels), ("online", labels)):
        config = softlabel.TrainConfig(data="unused", student=student, out="unused", labels=store)
        students[kind] = RowStudent(
            students_of(config)[0],
            build_model(student, num_classes=classes),
            preprocessing,
            ranks=ranks,
            precision=precision,
            temperature=TEMPERATURE,
            steps=count,
        )

    def works(kind: str) -> Iterator[RowStep]:
        loader = loaders["soft" if kind == "soft" else "hard"]
        loader.set_epoch(0)
        for step, images in zip(range(count), loader, strict=False):
            made, counts_B = without_filler(images)
            parts = cut(made, counts_B, 1)
            made = made.to(ranks.device, non_blocking=True)
            if kind == "online":
                logits_BC = teacher.logits(Inputs.single(made.inputs))
                target = DenseTarget(scaled_logits=logits_BC / TEMPERATURE, temperature=TEMPERATURE, retemperable=True)
                made = replace(made, target=target)
            soft = 0 if made.target is None else batch
            whole = Counts(rows=batch, soft=soft, hard=batch, both=soft, units=batch)
            yield prepare(made, parts, whole, [preprocessing], epoch=0, step=step, with_teacher=kind != "hard")

    def run(kind: str) -> None:
        student = students[kind]
        student.epoch = student.step = 0
        for work in works(kind):
            student.advance(work, alone=True)

    for loader in loaders.values():
        for _ in loader:  # fills the cache
            pass
    return {kind: lambda kind=kind: run(kind) for kind in students}  # type: ignore[misc]
