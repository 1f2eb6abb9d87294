"""Figures of a benchmark: printed with their goals as they are measured, and kept as JSON lines.

A runner sets SOFTLABEL_FIGURES to a file; every figure is appended to it at once, so that a benchmark that is stopped
loses only what it had not measured yet.
"""

import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

Goal = Literal["at least", "at most"]
STANDINGS = ("met", "missed", "measured", "unmeasured")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number.

    Attributes:
        name: what was measured, against what.
        value: the number; None: not measured, for the reason in `note`.
        goal: the number that it should reach; None: it is only reported.
        bound: on which side of the goal it should lie.
        note: absolute numbers behind a ratio, or the reason why there is none.
    """

    name: str
    value: float | None
    goal: float | None = None
    bound: Goal = "at least"
    note: str = ""

    @property
    def standing(self) -> str:
        """`met`, `missed`, `measured` (there is no goal) or `unmeasured`."""
        if self.value is None:
            return "unmeasured"
        if self.goal is None:
            return "measured"
        met = self.value >= self.goal if self.bound == "at least" else self.value <= self.goal
        return "met" if met else "missed"

    def line(self) -> str:
        value = "-" if self.value is None else f"{self.value:.3f}"
        goal = "" if self.goal is None else f"{self.bound} {self.goal:g}"
        flag = {"missed": " MISSED", "unmeasured": " unmeasured"}.get(self.standing, "")
        return f"{self.name:<62} {value:>9}  {goal:<14}{flag}{'  ' if self.note else ''}{self.note}".rstrip()


def report(
    name: str, value: float | None, *, goal: float | None = None, bound: Goal = "at least", note: str = ""
) -> Figure:
    """Print a figure, append it to the runner's file if there is one, and return it."""
    figure = Figure(name=name, value=value, goal=goal, bound=bound, note=note)
    print(figure.line(), flush=True)
    if (path := os.environ.get("SOFTLABEL_FIGURES")) is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figure)) + "\n")
    return figure


def read_figures(path: str | os.PathLike[str]) -> list[Figure]:
    """The figures that a benchmark has reported so far."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [Figure(**json.loads(line)) for line in file]
