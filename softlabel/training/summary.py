"""What a run prints: before it begins, and when it is over."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softlabel.errors import UsageError
from softlabel.training import run_folder
from softlabel.training.distributed import Ranks
from softlabel.training.losses import LOSSES
from softlabel.training.metrics import EpochMetrics
from softlabel.training.student import Student
from softlabel.training.task import Loader, Task

log = logging.getLogger("softlabel")

RESULTS = "results.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentResult:
    """What became of one student.

    Attributes:
        name: of its settings, where there are several.
        out: its run folder; ``run:OUT`` is its SPEC.
        history: every epoch of the run, also those before it was resumed.
        resumed_from: epochs that were done before this call.
        already_done: the folder held this very run, finished; nothing was done.
        failure: why it was given up; None if it was not.
    """

    name: str
    out: str
    history: tuple[EpochMetrics, ...]
    resumed_from: int = 0
    already_done: bool = False
    failure: str | None = None

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch with the highest evaluation accuracy, or mAP, or the lowest perplexity."""
        measured = [epoch for epoch in self.history if epoch.score is not None]
        return max(measured, key=lambda epoch: epoch.score or 0.0, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        out: the run folder, or the folder of the students' run folders.
        students: one for each, in the order of the settings.
        seconds: wall time of this call.
    """

    out: str
    students: tuple[StudentResult, ...]
    seconds: float

    @property
    def student(self) -> StudentResult:
        """The only student.

        Raises:
            UsageError: there are several.
        """
        if len(self.students) != 1:
            raise UsageError(f"{self.out}: expected one student, found {len(self.students)}; look at each of .students")
        return self.students[0]

    @property
    def history(self) -> tuple[EpochMetrics, ...]:
        """Of the only student."""
        return self.student.history

    @property
    def resumed_from(self) -> int:
        """Of the only student."""
        return self.student.resumed_from

    @property
    def already_done(self) -> bool:
        """Whether nothing was left to do, for any student."""
        return all(student.already_done for student in self.students)

    def table(self) -> str:
        """The students side by side, as text."""
        rows = [_row(student) for student in self.students]
        columns = [name for name in rows[0] if any(row[name] for row in rows)]
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
        lines = ["  ".join(f"{name:<{widths[name]}}" for name in columns)]
        lines += ["  ".join(f"{row[name]:<{widths[name]}}" for name in columns) for row in rows]
        lines += [f"{student.name}: given up: {student.failure}" for student in self.students if student.failure]
        return "\n".join(line.rstrip() for line in lines)


def _row(student: StudentResult) -> dict[str, str]:
    last = student.history[-1] if student.history else None
    best = student.best.headline if student.best is not None else None

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    return {
        "student": student.name,
        "state": "failed" if student.failure is not None else "done",
        "epochs": str(last.epoch) if last is not None else "0",
        "accuracy": number(last.eval_accuracy if last is not None else None),
        "mAP": number(last.eval_map if last is not None else None),
        "perplexity": number(last.eval_perplexity if last is not None else None),
        "best": number(best[1] if best is not None else None),
        "agreement": number(last.teacher_agreement if last is not None else None),
        "loss": number(last.loss if last is not None else None),
        "soft": number(last.soft_loss if last is not None else None),
        "hard": number(last.hard_loss if last is not None else None),
    }


def write_summary(folder: Path, students: Sequence[StudentResult]) -> None:
    """The table as `results.csv`."""
    text = io.StringIO()
    rows = [_row(student) | {"out": student.out, "failure": student.failure or ""} for student in students]
    # Figures that some kinds of students alone have are a column where a student has them.
    columns = [name for name in rows[0] if name not in ("mAP", "perplexity") or any(row[name] for row in rows)]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run_folder.write_atomically(folder / RESULTS, text.getvalue().encode())


def _describe_terms(student: Student) -> str:
    """The loss of a student in words."""
    config = student.config
    beside = "" if config.embedding_loss == "none" else f", {config.embedding_loss} weight {config.embedding_weight:g}"
    beside += f", difference weight {config.difference_weight:g}" if config.difference_weight else ""
    if not config.soft_weight:
        return f"{'no soft term' if beside else 'not used'}, hard weight {config.hard_weight:g}{beside}"
    named = "" if config.loss == "kd" else f"loss {config.loss}, "
    fixed = LOSSES[config.loss].fixed
    temperature = f"T = {', '.join(f'{one:g}' for one in fixed or (student.temperature,))}"
    rises = ""
    if config.soft_warmup:
        epochs = config.shared.epochs
        reached = min(epochs / config.soft_warmup, 1.0)
        short = f", of which this run of {epochs} reaches {reached:.0%}" if reached < 1 else ""
        rises = f" (rises over the first {config.soft_warmup:g} epochs{short})"
    weights = f"soft weight {config.soft_weight:g}{rises}, hard weight {config.hard_weight:g}{beside}"
    return f"{named}{temperature}, {weights}"


def announce(ranks: Ranks, task: Task, loader: Loader, students: Sequence[Student]) -> None:
    """Say what is about to happen."""
    together = f", {ranks.world_size} processes" if ranks.several else ""
    for student in students:
        parameters = sum(p.numel() for p in student.model.parameters())
        named = f"{student.config.name}: " if len(students) > 1 else ""
        log.info(
            "%sstudent %s: %s parameters, %s, %s%s",
            named,
            student.config.student,
            f"{parameters:,}",
            ranks.device,
            student.precision,
            together,
        )
    for line in task.describe_data(loader):
        log.info("%s", line)
    if loader.store is not None:
        terms = {_describe_terms(student) for student in students}
        log.info("labels %s: %s", loader.store.path, "; ".join(sorted(terms)))
        for line in task.describe_labels(loader):
            log.info("%s", line)
    for count, what in (
        (loader.dataset.skipped_bad, task.unusable),
        (loader.dataset.skipped_missing, "samples that have no row in the store"),
    ):
        if count:
            log.info("left out: %s %s", f"{count:,}", what)
    for student in students:
        if student.epoch or student.step:
            named = f"{student.config.name}: " if len(students) > 1 else ""
            log.info("%sresuming after epoch %d, step %d of %d", named, student.epoch, student.step, student.steps)
