"""The students of a run: one, or every combination of the options that were given several values."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from softlabel.common.spec import parse_spec
from softlabel.models.options import FEATURE_OPTIONS, without_options
from softlabel.training.config import GRID, TrainConfig, is_later_default
from softlabel.training.embedding_losses import EMBEDDING_LOSSES, EmbeddingLossName
from softlabel.training.losses import LOSSES, LossName

_SHORT = {"lr": "lr", "weight_decay": "decay", "label_smoothing": "smooth", "temperature": "T"} | {
    "soft_weight": "soft",
    "soft_warmup": "warmup",
    "hard_weight": "hard",
    "embedding_weight": "embed",
    "difference_weight": "diff",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """One student of a run, every value resolved.

    Attributes:
        name: what distinguishes it from the others of its run, in logs and as its folder.
        out: its run folder.
        student: its SPEC.
        loss: its soft term, see `LOSSES`.
        temperature: of the soft term; None: that of the store, or those of a loss that has its own.
        soft_warmup: epochs over which the weight of the soft term rises; 0: none.
        embedding_loss: on its embedding, see `EMBEDDING_LOSSES`.
        embedding_weight: of that; 0: there is none.
        difference_weight: of the differences of its logits along noise; 0: there is no such term.
        shared: the settings that it has in common with the others.
    """

    name: str
    out: str
    student: str
    optimizer: Literal["sgd", "adamw", "dot"]
    lr: float
    weight_decay: float
    label_smoothing: float
    loss: LossName
    temperature: float | None
    soft_weight: float
    soft_warmup: float
    hard_weight: float
    embedding_loss: EmbeddingLossName
    embedding_weight: float
    difference_weight: float
    shared: TrainConfig

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the weights become; a run is resumed only if they are the same."""
        own = {name: getattr(self, name) for name in GRID}
        return self.shared.shared_identity() | {n: value for n, value in own.items() if not is_later_default(n, value)}

    @property
    def network(self) -> str:
        """Its SPEC without where its embedding is taken."""
        return without_options(parse_spec(self.student), FEATURE_OPTIONS).text

    def list_options(self) -> dict[str, Any]:
        """Its options, with which it is made by itself."""
        own = {name: getattr(self, name) for name in GRID}
        if self.embedding_loss == "none":
            own["embedding_weight"] = None
        if self.embedding_loss == "none" or not EMBEDDING_LOSSES[self.embedding_loss].projects:
            own["embedding_projector"] = None
        return own

    def find_soft_weight(self, epoch: int) -> float:
        """The weight of the soft term in an epoch, from 0."""
        return self.soft_weight * min((epoch + 1) / self.soft_warmup, 1.0) if self.soft_warmup else self.soft_weight


def students_of(config: TrainConfig) -> list[StudentConfig]:
    """Every student that a configuration asks for."""
    several = [name for name in GRID if len(config.values(name)) > 1]
    found: list[StudentConfig] = []
    # `hard` is what was given: the default of the hard weight follows from the soft weight.
    for values in itertools.product(*(config.values(name) for name in GRID)):
        given = dict(zip(GRID, values, strict=True))
        resolved = _resolve(given, with_store=config.labels is not None)
        unused = _list_unused(resolved)
        named = [name for name in several if name not in unused]
        name = "-".join(_part(part, given[part]) for part in named) or _part("student", given["student"])
        student = StudentConfig(name=name, out=config.out, shared=config, **resolved)
        # Without a soft term there is no temperature, and one student stands for all of them.
        if all(student.identity() != other.identity() for other in found):
            found.append(student)
    if len(found) == 1:
        return found
    return [_placed(student, found[:number]) for number, student in enumerate(found)]


def fill_presets(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """What stands for options of the loss that were not given.

    Returns:
        Option -> value, where all students have one; and a line for each student where they differ.
    """
    students = students_of(config)
    options = ["temperature", "soft_weight", "soft_warmup", "hard_weight"]
    options += [] if config.embedding_loss == "none" else ["embedding_weight"]
    names = [name for name in options if getattr(config, name) is None]
    found = {name: list(dict.fromkeys(getattr(one, name) for one in students)) for name in names}
    common = {name: values[0] for name, values in found.items() if len(values) == 1}
    if len(common) == len(names):
        return common, []
    differing = [name for name in names if name not in common]
    lines = [
        f"{one.name}: {', '.join(f'{name} {_write_preset(getattr(one, name))}' for name in differing)}"
        for one in students
    ]
    return common, lines


def _write_preset(value: float | None) -> str:
    return "of the store or of the loss" if value is None else f"{value:g}"


def _resolve(given: dict[str, Any], *, with_store: bool) -> dict[str, Any]:
    preset = LOSSES[given["loss"]]
    embedding = EMBEDDING_LOSSES.get(given["embedding_loss"])
    usual = preset.soft_weight if embedding is None or embedding.soft_weight is None else embedding.soft_weight
    soft = given["soft_weight"] if given["soft_weight"] is not None else (usual if with_store else 0.0)
    defaults = {"soft_weight": soft, "lr": {"sgd": 0.1, "dot": 0.1, "adamw": 1e-3}[given["optimizer"]]}
    if soft > 0:
        defaults |= {"hard_weight": preset.hard_weight, "soft_warmup": preset.soft_warmup}
        defaults |= {"temperature": preset.temperature}
    else:
        defaults["hard_weight"] = 1.0
    if embedding is not None:
        defaults["embedding_weight"] = embedding.weight
        if embedding.hard_weight is not None:
            defaults["hard_weight"] = embedding.hard_weight
    resolved = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    none = {"loss": "kd", "temperature": None, "soft_warmup": 0.0, "embedding_weight": 0.0}
    return resolved | {name: none[name] for name in _list_unused(resolved)}


def _list_unused(resolved: Mapping[str, Any]) -> tuple[str, ...]:
    """Options that say nothing about a student."""
    unused = () if resolved["embedding_loss"] != "none" else ("embedding_weight",)
    if resolved["soft_weight"] == 0:
        return ("loss", "temperature", "soft_warmup", *unused)
    return ("temperature", *unused) if LOSSES[resolved["loss"]].fixed else unused


def _part(option: str, value: Any) -> str:
    """What a value adds to a name: resnet8, T4, soft0.9."""
    if option == "student":
        # The last part of a path or of a Python name says most.
        name = re.split(r"[/:]", parse_spec(value).name.rstrip("/"))[-1]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".") or "student"
    return str(value) if option in ("optimizer", "loss", "embedding_loss") else f"{_SHORT[option]}{value:g}"


def _placed(student: StudentConfig, earlier: list[StudentConfig]) -> StudentConfig:
    """With a folder of its own: names that are equal get a number."""
    same = sum(other.name == student.name for other in earlier)
    name = f"{student.name}-{same + 1}" if same else student.name
    return replace(student, name=name, out=str(Path(student.shared.out) / name))
