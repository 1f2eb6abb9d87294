"""What a report says about students: their curves, and how they compare with the teacher.

Legend: C classes.
"""

from dataclasses import dataclass
from typing import Literal

from softlabel.report.figures import Example, Reliability

CornerName = Literal["both right", "teacher alone right", "student alone right", "both wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """Rows of one corner of student against teacher: how many, and at most 24 of them."""

    name: CornerName
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A student on some data.

    Attributes:
        run: its folder.
        data: the SOURCE.
        held_out: whether the student was trained on none of the samples; None where that is not known.
        trained_on: on how many of them it was trained; None where that is not known.
        by_keys: how many of these are known by equal keys alone, as no content hashes could be compared.
        of_eval_data: whether the samples are of the evaluation data; of the labelled data otherwise. Equal keys may be
            different samples in the two.
        samples: on which the student was measured.
    """

    run: str
    data: str
    held_out: bool | None
    trained_on: int | None
    by_keys: int
    of_eval_data: bool
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Compared):
    """A student against the teacher on some data. Without labels of the teacher for that data, what needs them is None
    or empty, and the section has a note with the command that makes them.

    Attributes:
        non_finite: samples that the student answers with numbers that are not finite. Where there is one, its accuracy,
            agreement and divergence are NaN, and what is about its single answers is None or empty.
        with_teacher: those of them that have a row in the store, to which the figures about the teacher refer.
        accuracy: of the student, on samples with a hard label.
        teacher_accuracy: on samples with a hard label and a row.
        agreement: share of samples with the same most probable class.
        divergence: mean KL(teacher || student) in nats at the store's temperature.
        joint: 20 x 20 counts: p_teacher(label) by rows, p_student(label) by columns, equal bins from 0 to 1.
        class_agreement: C, the samples grouped by hard label; by the teacher's most probable class where none has one.
        class_divergence: C, of the same groups.
        divergence_by_entropy: mean KL in ten bins of equal width of the teacher's entropy over 0 to ln C.
        student, teacher: calibration of both.
        corners: four; `Example.score` is -|p_teacher(label) - p_student(label)|.
    """

    non_finite: int
    with_teacher: int
    accuracy: float | None
    teacher_accuracy: float | None
    agreement: float | None
    divergence: float | None
    joint: tuple[tuple[int, ...], ...] | None
    class_agreement: tuple[float | None, ...]
    class_divergence: tuple[float | None, ...]
    divergence_by_entropy: tuple[float | None, ...]
    student: Reliability | None
    teacher: Reliability | None
    corners: tuple[Corner, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """A run: its settings in words, its last evaluation and its curves.

    Attributes:
        settings: name -> value of the options that differ between the runs, or that matter.
        final: name of a metric -> its value at the epoch whose weights the student has.
        curves: name of a metric -> (epoch, value) of each epoch that has it.
    """

    run: str
    settings: dict[str, str]
    final: dict[str, float]
    curves: dict[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Students over two settings, all else equal: `values[row][column]` of the metric, the best of several, None where
    there is none."""

    metric: str
    row_setting: str
    rows: tuple[str, ...]
    column_setting: str
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Students:
    """Runs, how they compare with the teacher (empty without --data or --eval-data), and a grid if they are one."""

    runs: tuple[RunFacts, ...]
    comparisons: tuple[Comparison, ...]
    grid: Grid | None
    notes: tuple[str, ...]  # what could not be measured, and why
