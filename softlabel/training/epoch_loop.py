"""A pass: epochs of batches that are decoded, augmented and joined to their labels once, for all students.

Every student goes its own way from its own checkpoint. The pass begins where the last of them is and hands each batch
to the students whose next step it is, so that students that were stopped at different steps end at the same one.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from softlabel.evaluation.metrics import Evaluation
from softlabel.models.precision import ieee_float32
from softlabel.training import run_folder
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.graphed_steps import GraphedSteps
from softlabel.training.interrupts import Interrupts
from softlabel.training.metrics import write_csv
from softlabel.training.parallel_students import ParallelStudents
from softlabel.training.stacked_students import StackedStudents
from softlabel.training.step import Counts, Step
from softlabel.training.student import Student
from softlabel.training.task import Loader, Task
from softlabel.training.trackers import Trackers

log = logging.getLogger("softlabel")

_COUNTED = tuple(field.name for field in fields(Counts))


Review = Callable[[Sequence[Student]], None]


class Pass:
    """Students in training.

    Args:
        students: those that are not finished; resumed from their checkpoints already.
        review: called with the students in training before the first step and after every epoch; a `failure` that it
            sets ends a student.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        task: Task,
        loader: Loader,
        eval_loader: Loader | None,
        students: Sequence[Student],
        review: Review | None = None,
    ) -> None:
        self._review = review
        self.config, self.ranks, self.task, self.loader, self.eval_loader = config, ranks, task, loader, eval_loader
        self.students = students
        self._active = [student for student in students if student.failure is None]
        self._graphs = GraphedSteps(config, ranks, self._active)
        self._stacks = StackedStudents(config, ranks, self._active, self._graphs)
        self._saved = time.perf_counter()

    def run(self) -> None:
        """All that is left to do. Raises KeyboardInterrupt after saving where every student is."""
        units, steps = self.task.count_units(self.loader), len(self.loader)
        for student in list(self._active):
            if student.is_done:
                self._publish(student)
        if not self._active:
            return
        epoch, step = min(student.place for student in self._active)
        shown = self.config.progress if self.ranks.is_first else False
        bar = tqdm(
            total=self.config.epochs * units,
            initial=epoch * units + step * units // steps,
            unit=self.task.unit,
            unit_scale=True,
            desc=self.students[0].config.student if len(self.students) == 1 else f"{len(self.students)} students",
            disable=None if shown is None else not shown,
        )
        with (
            bar,
            ieee_float32(),
            logging_redirect_tqdm(),
            Trackers(self.config, self._active if self.ranks.is_first else []) as trackers,
            Interrupts() as interrupts,
            ParallelStudents(self._at_once()) as workers,
        ):
            self._write_metrics()
            self._end_reviewed()
            while self._active:
                epoch, step = min(student.place for student in self._active)
                self._epoch(epoch, step, workers, bar, interrupts)
                self._finish_epoch(epoch, trackers)
                if self._active and self.ranks.sum([interrupts.pending])[0]:
                    interrupts.end()

    def _at_once(self) -> int:
        """How many students make a step at the same time; between processes each step is agreed on, one at a time."""
        if self.ranks.device.type != "cpu" or self.ranks.several:
            return 1
        asked = self.config.students_at_once
        return min(len(self._active), torch.get_num_threads() if asked is None else asked)

    # ---- an epoch ----

    def _epoch(
        self, epoch: int, step: int, workers: ParallelStudents, bar: "tqdm[Any]", interrupts: Interrupts
    ) -> None:
        self.loader.set_epoch(epoch, step)
        steps = len(self.loader)
        for student in self._active:
            student.steps = steps if student.epoch == epoch else student.steps
        last = time.perf_counter()
        for batch in self.loader:
            work, stop, due = self._work(batch, epoch, step, interrupts)
            here = [student for student in self._active if student.epoch == epoch]
            here = self._graphs.advance(self._stacks.advance(here, work, workers), work)
            if here:
                workers.advance(here, work)
            step += 1
            if stop or due or step == steps:
                workers.drain()
            now = time.perf_counter()
            for student in self._active:
                student.seconds += now - last if student.epoch == epoch else 0.0
            last = now
            bar.update(work.whole.units)
            self._give_up()
            if step == steps or not self._active:
                break
            if stop:
                self._save(self._active)
                log.info("interrupted after step %d of epoch %d; saved", step, epoch + 1)
                interrupts.end()
            if due:
                for student in self._active:
                    student.look()
                self._give_up()
                self._save(self._active)
                self._saved = time.perf_counter()
        workers.drain()

    def _work(self, batch: Any, epoch: int, step: int, interrupts: Interrupts) -> tuple[Step, bool, bool]:
        """The step for all students; whether to stop after it, and whether to save: what any process says, all do."""
        batch, parts = self.task.cut(batch)
        due = time.perf_counter() - self._saved > 60 * self.config.checkpoint_minutes
        totals = [sum(getattr(counts, name) for _, counts in parts) for name in _COUNTED]
        *totals, stop, save = self.ranks.sum([*totals, interrupts.pending, due])
        whole = Counts(**dict(zip(_COUNTED, map(int, totals), strict=True)))
        moved = batch.to(self.ranks.device, non_blocking=True)
        work = self.task.prepare(moved, parts, whole, self._active, epoch=epoch, step=step)
        return work, bool(stop), bool(save)

    def _give_up(self) -> None:
        """Go on without the students whose loss is not a number any more."""
        for student in list(self._active):
            if student.failure is not None:
                self._active.remove(student)
                if self.ranks.is_first:
                    run_folder.write_failure(student.folder, student.failure)
                if len(self.students) > 1:
                    log.warning("%s is given up: %s", student.config.name, student.failure)

    def _finish_epoch(self, epoch: int, trackers: Trackers) -> None:
        ended = [student for student in self._active if student.place == (epoch, student.steps)]
        for student in ended:
            student.look()
        self._give_up()
        ended = [student for student in ended if student.failure is None]
        due = (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs
        started = time.perf_counter()
        found = self._evaluate(ended) if due else {}
        seconds = time.perf_counter() - started
        for student in ended:
            metrics = student.finish_epoch(found.get(id(student)), seconds)
            named = f"{student.config.name}: " if len(self.students) > 1 else ""
            if self.ranks.is_first:
                # Before the checkpoint that says that the epoch is over.
                student.keep_if_asked(self.task.num_classes, self.task.activation)
                log.info("%s%s", named, metrics.line(self.config.epochs, self.task.unit))
                trackers.write(student, metrics)
        self._save(ended)
        self._write_metrics()
        self._end_reviewed()
        for student in ended:
            if student.is_done and student.failure is None:
                self._publish(student)

    def _end_reviewed(self) -> None:
        if self._review is not None:
            self._review(self._active)
            self._give_up()

    def _evaluate(self, students: Sequence[Student]) -> dict[int, Evaluation]:
        """Measure students in one pass over the evaluation data, each sample once over all processes."""
        loader = self.eval_loader
        if loader is None or not students:
            return {}
        measurements = {}
        for student in students:
            self.ranks.broadcast_buffers(student.evaluated)
            measurements[id(student)] = self.task.measure(student, loader)
        loader.set_epoch(0)
        for batch in loader:
            moved = batch.to(self.ranks.device, non_blocking=True)
            for measurement in measurements.values():
                measurement.add(moved)
        return {name: measurement.result(self.ranks.sum_tensor) for name, measurement in measurements.items()}

    # ---- files ----

    def _save(self, students: Sequence[Student]) -> None:
        for student in students:
            student.save()

    def _write_metrics(self) -> None:
        if self.ranks.is_first:
            for student in self.students:
                write_csv(student.folder / run_folder.METRICS, student.history)

    def _publish(self, student: Student) -> None:
        self._active.remove(student)
        if self.ranks.is_first:
            student.publish(self.task.num_classes, self.task.activation)


@contextlib.contextmanager
def closing_loader(loader: Loader, ranks: Ranks) -> Iterator[None]:
    """End the loader's workers afterwards, and say clearly when one of them, or another process, has died."""
    with contextlib.closing(loader):
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            loader.raise_if_worker_died(error)
            ranks.explain(error)
            raise
