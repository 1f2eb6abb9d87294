"""The students of a run: one, or every combination of the options that were given several values."""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from softlabel.common.spec import parse_spec
from softlabel.training.config import GRID, TrainConfig

_SHORT = {"lr": "lr", "weight_decay": "decay", "label_smoothing": "smooth", "temperature": "T"} | {
    "soft_weight": "soft",
    "hard_weight": "hard",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """One student of a run, every value resolved.

    Attributes:
        name: what distinguishes it from the others of its run, in logs and as its folder.
        out: its run folder.
        student: its SPEC.
        temperature: of the soft term; None: that of the store.
        shared: the settings that it has in common with the others.
    """

    name: str
    out: str
    student: str
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    label_smoothing: float
    temperature: float | None
    soft_weight: float
    hard_weight: float
    shared: TrainConfig

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the weights become; a run is resumed only if they are the same."""
        return self.shared.shared_identity() | {name: getattr(self, name) for name in GRID}


def students_of(config: TrainConfig) -> list[StudentConfig]:
    """Every student that a configuration asks for."""
    several = [name for name in GRID if len(config.values(name)) > 1]
    found: list[StudentConfig] = []
    # `hard` is what was given: the default of the hard weight follows from the soft weight.
    for values in itertools.product(*(config.values(name) for name in GRID)):
        given = dict(zip(GRID, values, strict=True))
        resolved = _resolve(given, with_store=config.labels is not None)
        named = [name for name in several if not (name == "temperature" and resolved["soft_weight"] == 0)]
        name = "-".join(_part(part, given[part]) for part in named) or _part("student", given["student"])
        student = StudentConfig(name=name, out=config.out, shared=config, **resolved)
        # Without a soft term there is no temperature, and one student stands for all of them.
        if all(student.identity() != other.identity() for other in found):
            found.append(student)
    if len(found) == 1:
        return found
    return [_placed(student, found[:number]) for number, student in enumerate(found)]


def _resolve(given: dict[str, Any], *, with_store: bool) -> dict[str, Any]:
    soft = given["soft_weight"] if given["soft_weight"] is not None else (0.9 if with_store else 0.0)
    hard = given["hard_weight"] if given["hard_weight"] is not None else (0.1 if soft > 0 else 1.0)
    lr = given["lr"] if given["lr"] is not None else {"sgd": 0.1, "adamw": 1e-3}[given["optimizer"]]
    temperature = given["temperature"] if soft > 0 else None
    return given | {"soft_weight": soft, "hard_weight": hard, "lr": lr, "temperature": temperature}


def _part(option: str, value: Any) -> str:
    """What a value adds to a name: resnet8, T4, soft0.9."""
    if option == "student":
        # The last part of a path or of a Python name says most.
        name = re.split(r"[/:]", parse_spec(value).name.rstrip("/"))[-1]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".") or "student"
    return str(value) if option == "optimizer" else f"{_SHORT[option]}{value:g}"


def _placed(student: StudentConfig, earlier: list[StudentConfig]) -> StudentConfig:
    """With a folder of its own: names that are equal get a number."""
    same = sum(other.name == student.name for other in earlier)
    name = f"{student.name}-{same + 1}" if same else student.name
    return replace(student, name=name, out=str(Path(student.shared.out) / name))
