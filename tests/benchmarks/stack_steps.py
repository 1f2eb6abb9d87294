"""Steps of several students of one architecture: one of them, all in turn, and all as one network."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

import softlabel
from softlabel.loader import SoftLabelLoader
from softlabel.models import build_model
from softlabel.models.teacher import student_preprocessing
from softlabel.training.distributed import Ranks
from softlabel.training.grid import students_of
from softlabel.training.row_student import RowStudent
from softlabel.training.stack import Stack
from softlabel.training.step import Counts, RowStep, cut, prepare, without_filler
from softlabel.views import CropFlip
from tests.benchmarks.student_steps import build_graphs


def build_mlp(num_classes: int, pixels: int = 32) -> nn.Module:
    """Two linear layers over the pixels of a square image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * int(pixels) ** 2, 64), nn.ReLU(), nn.Linear(64, num_classes))


def build_stack_sides(
    data: Any,
    labels: str,
    spec: str,
    students: int,
    *,
    classes: int,
    batch: int,
    count: int,
    precision: str,
    device: str,
) -> dict[str, Callable[[], None]]:
    """What makes `count` steps: "one", "in turn", "stacked", and "graph", which is the stack as one CUDA graph. Their
    batches lie on the device already.

    Args:
        data: a SOURCE or Dataset.
        labels: the store.
        spec: the SPEC of the students.
        students: how many, a multiple of 4: four temperatures, and as many learning rates as that takes.
        classes: of the store.
        batch: samples a step.
        count: steps.
        precision: fp32 or bf16.
        device: cpu or cuda.
    """
    ranks, preprocessing = Ranks(device), student_preprocessing(spec)
    loader = SoftLabelLoader(
        data, labels, batch_size=batch, tail="drop", preprocessing=preprocessing, augment=CropFlip()
    )
    loader.set_epoch(0)
    works: list[RowStep] = []
    for step, images in zip(range(count), loader, strict=False):
        made, counts_B = without_filler(images)
        parts, whole = cut(made, counts_B, 1), Counts(rows=batch, soft=batch, hard=batch, both=batch, units=batch)
        moved = made.to(ranks.device)
        works.append(prepare(moved, parts, whole, [preprocessing], epoch=0, step=step, with_teacher=True))

    def make(number: int, step: Literal["eager", "graph"] = "eager") -> list[RowStudent]:
        config = softlabel.TrainConfig(
            data="unused",
            student=spec,
            out="unused",
            labels=labels,
            temperature=[1.0, 2.0, 4.0, 8.0] if number > 1 else 4.0,
            lr=[0.01 * (1 + factor) for factor in range(max(number // 4, 1))],
            step=step,
        )
        return [
            RowStudent(
                one,
                build_model(spec, num_classes=classes),
                preprocessing,
                ranks=ranks,
                precision=precision,
                temperature=one.temperature or 4.0,
                steps=count,
            )
            for one in students_of(config)
        ]

    one, in_turn, stacked, graphed = make(1), make(students), make(students), make(students, "graph")
    assert len(in_turn) == students
    stack, other = Stack(stacked), Stack(graphed)
    graphs = build_graphs(graphed[0], ranks)

    def run_in_turn(those: list[RowStudent]) -> None:
        for work in works:
            for student in those:
                student.step = work.step
                student.advance(work, alone=True)

    def run_stacked() -> None:
        for work in works:
            for student in stacked:
                student.step = work.step
            stack.advance(work)

    def run_graphed() -> None:
        for work in works:
            for student in graphed:
                student.step = work.step
            graphs.advance_stack(other, work)

    return {
        "graph": run_graphed,
        "one": lambda: run_in_turn(one),
        "in turn": lambda: run_in_turn(in_turn),
        "stacked": run_stacked,
    }
