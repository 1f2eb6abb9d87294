"""The steps of several students, one after another or several at a time.

On the CPU a small student does not keep all cores busy: every operation of it is cut into as many pieces as there are
cores, and each waits for the slowest piece. Students are independent, so as many of them as there are cores make their
steps at the same time, each on its own core. Torch gives the interpreter free during an operation, so threads do.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from softlabel.training.step import Step
from softlabel.training.student import Student

# Steps that are on their way at a time: enough that students of different sizes wait for each other rarely.
_AHEAD = 3


class ParallelStudents:
    """Makes the steps of students.

    Args:
        at_once: how many students make a step at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._known: set[int] = set()
        self._last: dict[int, Future[None]] = {}
        self._under_way: deque[list[Future[None]]] = deque()

    def advance(self, students: Sequence[Student], work: Step) -> None:
        """Make a step of each student, or begin to; what goes wrong is raised here, at the next step or by `drain`."""
        if not self._may_share(students):
            self.drain()
            for student in students:
                student.advance(work, alone=True)
            # Once it has made a step, it is known whether a student draws random numbers.
            self._known |= {id(student) for student in students}
            return
        if self._pool is None:
            each = max(1, self._threads // self._at_once)
            self._pool = ThreadPoolExecutor(
                self._at_once,
                thread_name_prefix="softlabel-student",
                initializer=torch.set_num_threads,
                initargs=(each,),
            )
        futures = []
        for student in students:
            # In the order of the queue the step before is begun earlier, so that waiting for it cannot be for ever.
            before = self._last.get(id(student))
            self._last[id(student)] = future = self._pool.submit(_advance, student, work, before)
            futures.append(future)
        self._under_way.append(futures)
        while len(self._under_way) > _AHEAD:
            self._wait()

    def drain(self) -> None:
        """Wait until every step is made."""
        while self._under_way:
            self._wait()
        self._last.clear()

    def _may_share(self, students: Sequence[Student]) -> bool:
        if self._at_once == 1 or len(students) == 1:
            return False
        # The generator of random numbers is one for all threads.
        return all(id(s) in self._known and not s.draws_random_numbers for s in students)

    def _wait(self) -> None:
        for future in self._under_way.popleft():
            future.result()

    def __enter__(self) -> "ParallelStudents":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._threads)  # what the threads have set is the default of threads to come


def _advance(student: Student, work: Step, before: "Future[None] | None") -> None:
    if before is not None:
        before.result()
    student.advance(work, alone=False)
