"""Steps of the trainer, from the loader to the optimiser: hard labels, cached soft labels, or the teacher on line."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import softlabel
from softlabel.inputs.base import Inputs
from softlabel.loader import SoftLabelLoader
from softlabel.loss import DenseTarget
from softlabel.models import build_model
from softlabel.models.teacher import Teacher, student_preprocessing
from softlabel.training.distributed import Ranks
from softlabel.training.graphed_steps import GraphedSteps
from softlabel.training.grid import students_of
from softlabel.training.row_student import RowStudent
from softlabel.training.static_step import capture_graph
from softlabel.training.step import Counts, RowStep, cut, prepare, without_filler
from softlabel.views import CropFlip

TEMPERATURE = 4.0


def build_graphs(student: RowStudent, ranks: Ranks) -> GraphedSteps:
    """What makes the steps of a student, or of a stack with it, as its settings say."""
    return GraphedSteps(student.shared, ranks, [student], capture_graph if ranks.device.type == "cuda" else _run_as_is)


def _run_as_is(begin: object, warm_up: object, run: Callable[[], None], device: object) -> Callable[[], None]:
    return run


def build_steps(
    data: object,
    labels: str,
    teacher: Teacher | None,
    student: str,
    *,
    classes: int,
    batch: int,
    count: int,
    precision: str,
    device: str,
    cache_device: str | None = None,
    step: Literal["eager", "graph"] = "eager",
) -> dict[str, Callable[[], None]]:
    """What makes `count` steps of an epoch: "hard", "soft" and, with a teacher, "online". Images and labels are in
    memory already, or images on `cache_device`; with `step` "graph" a step is a CUDA graph, on a CPU what it holds.
    """
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
    for kind, store in (("hard", None), ("soft", labels), *([("online", labels)] if teacher is not None else [])):
        config = softlabel.TrainConfig(data="unused", student=student, out="unused", labels=store, step=step)
        students[kind] = RowStudent(
            students_of(config)[0],
            build_model(student, num_classes=classes),
            preprocessing,
            ranks=ranks,
            precision=precision,
            temperature=TEMPERATURE,
            steps=count,
        )

    graphs = {kind: build_graphs(one, ranks) for kind, one in students.items()}

    def works(kind: str) -> Iterator[RowStep]:
        loader = loaders["soft" if kind == "soft" else "hard"]
        loader.set_epoch(0)
        for step, images in zip(range(count), loader, strict=False):
            made, counts_B = without_filler(images)
            parts = cut(made, counts_B, 1)
            made = made.to(ranks.device, non_blocking=True)
            if kind == "online":
                assert teacher is not None
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
            for left in graphs[kind].advance([student], work):
                left.advance(work, alone=True)

    for loader in loaders.values():
        for _ in loader:  # fills the cache
            pass
    return {kind: lambda kind=kind: run(kind) for kind in students}  # type: ignore[misc]
