"""What the students of a run learn from, and what depends on it: samples with one label each, or documents.

task = RowTask(...) or TokenTask(...)
task.open_loader(...), task.open_eval_loader(...)       what a pass reads
task.make_student(number, ...)                          what it trains
task.cut(batch) and task.prepare(...)                   what a step is
task.measure(student, loader)                           how it is evaluated
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.dataset import Source
from softlabel.errors import UsageError
from softlabel.evaluation.metrics import Evaluation
from softlabel.labels.combine import Combination
from softlabel.loader import SoftLabelLoader
from softlabel.loader.token_loader import TokenLoader
from softlabel.models.precision import Precision
from softlabel.store.reader import Store
from softlabel.training import run_folder
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.grid import StudentConfig
from softlabel.training.losses import LOSSES
from softlabel.training.step import Counts, Step
from softlabel.training.student import Student

Loader = SoftLabelLoader | TokenLoader


class Measuring(Protocol):
    """What batch by batch measures a student; see `softlabel.evaluation.evaluate.Measurement`."""

    def add(self, batch: Any) -> object: ...

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Evaluation: ...


class Task(ABC):
    """See the module.

    Args:
        config: of the run.
        configs: of its students.
        source: of the samples.
        store: of the labels; None: hard labels alone.
        precision: fp32, bf16 or fp16.
        report: whether to log what the data are.

    Attributes:
        source: of the samples as they are trained on.
        num_classes: of all students.
        unit: of bars and of the log.
        unusable: what the samples are that a loader leaves out for what they hold (`skipped_bad`), for the log.
    """

    unusable: ClassVar[str] = "samples that could not be read when the store was made"

    source: Source
    num_classes: int
    unit: str

    def __init__(
        self,
        config: TrainConfig,
        configs: Sequence[StudentConfig],
        source: Source,
        store: Store | None,
        precision: Precision,
        *,
        report: bool,
    ) -> None:
        self.config, self.configs, self.source, self.store = config, configs, source, store
        self.precision, self.report = precision, report

    def identity(self) -> dict[str, Any]:
        """What decides what the weights become beside the settings: a run goes on only if all of it is the same."""
        store = self.store
        return {
            "precision": self.precision,
            "classes": self.num_classes,
            run_folder.DATA_KEYS: self.source.fingerprint(),
            **self._identify_samples(),
            "store": None if store is None else store.manifest.store_id,
            # With samples that have no row, those that got one since would move all others.
            **(
                {}
                if store is None or self.config.missing == "error"
                else {"samples of the store": store.run.dataset.rows}
            ),
        }

    @abstractmethod
    def _identify_samples(self) -> dict[str, Any]:
        """What `identity` says of the samples beside their keys."""

    def count_views(self) -> int | None:
        """How many views of the store this pass uses; None where its rows are no views."""
        return None

    @abstractmethod
    def open_loader(self, ranks: Ranks, workers: int, views: int | None) -> Loader:
        """What a pass is of.

        Args:
            views: what `count_views` said.
        """

    @abstractmethod
    def open_eval_loader(self, data: Any, ranks: Ranks, workers: int) -> AbstractContextManager[Loader | None]:
        """What students are measured on; None for nothing. `data` takes the place of what the config names."""

    @abstractmethod
    def make_student(self, number: int, *, ranks: Ranks, temperature: float, steps: int) -> Student:
        """The student of `configs[number]`; `temperature` is that of the labels, where its config has none."""

    @abstractmethod
    def count_units(self, loader: Loader) -> int:
        """Units of an epoch, for the bar."""

    @abstractmethod
    def describe_data(self, loader: Loader) -> list[str]:
        """What is to be said of the data, a line each."""

    def describe_labels(self, loader: Loader) -> list[str]:
        """What is to be said of the labels of a store."""
        return []

    @abstractmethod
    def cut(self, batch: Any) -> tuple[Any, tuple[tuple[Any, Counts], ...]]:
        """A batch on the CPU, ready for a step, and its parts with what counts in each."""

    @abstractmethod
    def prepare(
        self,
        batch: Any,
        parts: tuple[tuple[Any, Counts], ...],
        whole: Counts,
        students: Sequence[Student],
        *,
        epoch: int,
        step: int,
    ) -> Step:
        """The step of a batch that is on the device, once for all students."""

    @abstractmethod
    def measure(self, student: Student, loader: Loader) -> Measuring:
        """What measures a student, in eval mode, on the batches of `open_eval_loader`."""

    @property
    def activation(self) -> Activation:
        """Of the students' outputs."""
        return "softmax"

    @property
    def combination(self) -> Combination | None:
        """How the members of a store that keeps them apart become one teacher.

        Raises:
            UsageError: it was asked for without such a store, or one average cannot serve all students.
        """
        return choose_combination(self.config, self.configs, self.store)


def choose_combination(
    config: TrainConfig, configs: Sequence[StudentConfig], store: Store | None
) -> Combination | None:
    """See `Task.combination`."""
    asked = config.combine is not None or config.weights is not None
    if store is None or not store.run.kept:
        if asked:
            raise UsageError(
                "combine, weights: only the members of a store that keeps them apart can be combined; "
                "generate with --combine keep"
            )
        return None
    weights = None if config.weights is None else tuple(config.weights)
    rule = config.combine or "probs"
    if rule == "random":
        return Combination(rule=rule, weights=weights)
    temperatures = list(dict.fromkeys(_find_temperature(one) for one in configs if one.soft_weight > 0)) or [None]
    if len(temperatures) == 1:
        return Combination(rule=rule, weights=weights, temperature=temperatures[0])
    if rule == "probs":
        raise UsageError(
            "combine: probabilities are averaged at one temperature, and students of one pass share the average; use "
            f"--combine logits, or train the temperatures {_write_temperatures(temperatures)} apart"
        )
    return Combination(rule=rule, weights=weights)  # the mean of logits re-tempers exactly


def _find_temperature(config: StudentConfig) -> float | None:
    """At which a student needs the average; None: at that of the store."""
    fixed = LOSSES[config.loss].fixed
    return fixed[0] if len(fixed) == 1 else config.temperature


def _write_temperatures(temperatures: Sequence[float | None]) -> str:
    return ", ".join("that of the store" if one is None else f"{one:g}" for one in temperatures)
