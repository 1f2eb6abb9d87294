"""What a search of settings is: its options, what its students share, and the settings that are the defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from softlabel.common.multi_hot import is_labelled
from softlabel.common.spec import parse_spec
from softlabel.dataset import open_source
from softlabel.dataset.folds import Choice
from softlabel.errors import DataError, UsageError
from softlabel.labels.combine import retemperable
from softlabel.models import names_language_model
from softlabel.store.open import open_store
from softlabel.training.config import TrainConfig
from softlabel.training.grid import students_of
from softlabel.training.losses import LOSSES, LossName
from softlabel.training.search_space import RANGES, SearchSpace, parse_range

# Options of `TrainConfig` that `tune` searches, gives itself, or has no use for.
_OTHERS = {"data", "eval_data", "student", "out", "labels", "loss", *RANGES} | {
    *("select", "patience", "keep_epochs", "eval_every", "mixup", "ignore_labels", "source_ratio", "streaming"),
    *("pack", "pad", "batch_tokens", "sync_batchnorm", "tensorboard", "tracker", "overwrite"),
}
TRAINING = tuple(field.name for field in fields(TrainConfig) if field.name not in _OTHERS)
_RATES = {"sgd": "0.01:0.5", "adamw": "0.0001:0.01"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """What is searched, and how.

    lr, temperature, soft_weight and hard_weight are ranges LO:HI, or one number that is not searched.

    Attributes:
        data: a SOURCE with hard labels.
        labels: the store with the teacher's soft labels for it.
        student: a SPEC.
        out: folder of the search.
        loss: losses to choose from, see 'softlabel train --help'.
        lr: the highest learning rate; absent: 0.01:0.5 for sgd, 0.0001:0.01 for adamw.
        temperature: of the soft term, for losses that take one; absent: 1:10.
        soft_weight: of the soft term.
        hard_weight: of the hard term.
        passes: over the data, one after the other; each learns from those before it. More of them continue a search.
        students: of each pass; the first of the first pass have the defaults of each loss.
        reduction: one in so many students goes on after 1/reduction of the epochs, and so on; 1: all do.
        held_out: one in so many samples is held out for the choice, by a hash of its key.
    """

    data: str
    labels: str
    student: str
    out: str
    loss: LossName | list[LossName] = "kd"
    lr: str | None = None
    temperature: str | None = None
    soft_weight: str = "0.1:10"
    hard_weight: str = "0:1"
    passes: int = 3
    students: int = 9
    reduction: int = 3
    held_out: int = 10

    def __post_init__(self) -> None:
        least = {"passes": 1, "students": 2, "reduction": 1, "held_out": 2}
        for name, value in least.items():
            if (given := getattr(self, name)) < value:
                raise UsageError(f"{name}: expected a number of at least {value}, found {given}")
        object.__setattr__(self, "out", os.path.expanduser(self.out))

    @property
    def losses(self) -> tuple[LossName, ...]:
        return tuple(self.loss) if isinstance(self.loss, list) else (self.loss,)


def plan_search(config: TuneConfig, training: Mapping[str, Any]) -> tuple[TrainConfig, SearchSpace]:
    """Check a request.

    Args:
        config: of the search.
        training: options of `TRAINING`.

    Returns:
        What all students share, and what is searched.

    Raises:
        UsageError, DataError, StoreError: as `tune`.
    """
    if names_language_model(parse_spec(config.student)):
        raise UsageError(
            f"student {config.student}: expected a classifier, found a language model; compare few by hand"
        )
    source = open_source(config.data)
    if not is_labelled(source.labels()).any():
        raise DataError(f"{source.name}: no sample has a hard label; tune measures accuracy on those that it holds out")
    part = Choice(fold=1, folds=config.held_out)
    shared = TrainConfig(
        data=replace(part, outside=True).name(config.data),
        eval_data=part.name(config.data),
        student=config.student,
        out=config.out,
        labels=config.labels,
        tensorboard=False,
        **training,
    )
    assert isinstance(shared.optimizer, str) or shared.optimizer is None, "options of tune have one value"
    given = {name: getattr(config, name) for name in RANGES}
    given["lr"] = given["lr"] or _RATES[shared.optimizer or "sgd"]
    if given["temperature"] is not None and all(LOSSES[loss].fixed for loss in config.losses):
        raise UsageError(
            f"temperature: loss {' '.join(config.losses)} has temperatures of its own, found {config.temperature}; "
            "leave --temperature out"
        )
    given["temperature"] = given["temperature"] or "1:10"
    space = SearchSpace(losses=config.losses, ranges={name: parse_range(name, value) for name, value in given.items()})
    temperatures = space.ranges["temperature"]
    run = open_store(config.labels).run
    rule = (shared.combine or "probs") if run.kept else run.combine.rule
    exact = retemperable(rule, len(run.members))
    if not exact and temperatures.low < temperatures.high:
        raise UsageError(
            f"temperature: the labels of {config.labels} are means of probabilities, which have one temperature, found "
            f"{temperatures.low:g}:{temperatures.high:g}; give --temperature {run.temperature:g}"
            + (", or --combine logits" if run.kept else "")
        )
    return shared, space


def list_defaults(shared: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """Return the settings that `softlabel train` would take for each loss."""
    temperature = open_store(config.labels).run.temperature
    found = []
    for loss in config.losses:
        (student,) = students_of(replace(shared, loss=loss))
        settings: dict[str, Any] = {"loss": loss} | {name: getattr(student, name) for name in RANGES}
        if settings["temperature"] is None and not LOSSES[loss].fixed:
            settings["temperature"] = temperature
        found.append(settings)
    return found
