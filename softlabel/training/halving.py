"""Successive halving (Jamieson and Talwalkar 2016) of the students of one pass.

After some epochs only the best of them go on. With `reduction` 3 a third of the students is left after a ninth of the
epochs, a ninth of them after a third, and these are trained to the end.
"""

from collections.abc import Sequence

from softlabel.training.student import Student

HALVED = "halved"  # begins the reason why a student was ended


class Halving:
    """Ends students that are not among the best.

    Args:
        students: how many begin.
        epochs: of the students that are trained to the end.
        reduction: one in so many goes on; 1: all do.

    Attributes:
        rungs: epoch after which students end -> how many go on.
    """

    def __init__(self, students: int, epochs: int, reduction: int) -> None:
        self.rungs: dict[int, int] = {}
        ends: list[int] = []
        left = students
        while reduction > 1 and left > 1 and (end := (ends or [epochs])[-1] // reduction) >= 1:
            ends.append(end)
            left //= reduction
        for number, end in enumerate(reversed(ends), 1):
            self.rungs[end] = max(1, students // reduction**number)

    def __call__(self, students: Sequence[Student]) -> None:
        """Give up the students that do not go on, among those in training.

        What it does follows from their evaluations alone, so that a pass that was interrupted ends the same ones.
        """
        for epoch, kept in self.rungs.items():
            running = [one for one in students if one.failure is None]
            if not running or min(one.epoch for one in running) < epoch:
                return
            ranked = sorted(running, key=lambda one: one.history[epoch - 1].score or 0.0, reverse=True)
            for one in ranked[kept:]:
                score = one.history[epoch - 1].score
                shown = "not measured" if score is None else f"{score:.4f}"
                one.failure = f"{HALVED} after epoch {epoch}: accuracy {shown}, not among the best {kept}"
