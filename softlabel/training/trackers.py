"""Where metrics go beside `metrics.csv`: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

from softlabel.errors import UsageError
from softlabel.training import run_folder
from softlabel.training.config import TrainConfig
from softlabel.training.metrics import EpochMetrics
from softlabel.training.student import Student


class Tracker(Protocol):
    """One student's curves somewhere."""

    def write(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers that a run wants, for each of its students.

    Args:
        students: none for a process that does not write.

    Raises:
        UsageError: the tracker's package is not installed.
    """

    def __init__(self, config: TrainConfig, students: Sequence[Student]) -> None:
        self._stack = contextlib.ExitStack()
        self._of: dict[int, list[Tracker]] = {}
        with contextlib.ExitStack() as stack:
            for student in students:
                mine: list[Tracker] = []
                if config.tensorboard:
                    mine.append(_Board(student.folder / run_folder.BOARD, resume_step=student.steps_done))
                if config.tracker is not None:
                    mine.append(_WandB(student) if config.tracker == "wandb" else _MLflow(student))
                for tracker in mine:
                    stack.callback(tracker.close)
                self._of[id(student)] = mine
            self._stack = stack.pop_all()

    def write(self, student: Student, metrics: EpochMetrics) -> None:
        values = {
            name.replace("eval_", "eval/"): float(value)
            for name, value in asdict(metrics).items()
            if name not in ("epoch", "step") and value is not None and math.isfinite(value)
        }
        for tracker in self._of.get(id(student), []):
            tracker.write(values, metrics.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Board:
    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports

        # What a killed run wrote after its last checkpoint is hidden.
        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, student: Student) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _absent("wandb") from error
        known = _known_id(student.folder, "wandb")
        # Project, entity and mode are what its environment variables say.
        self._run: Any = wandb.init(
            id=known,
            name=student.config.name,
            dir=str(student.folder),
            config=student.config.identity(),
            resume="allow",
            reinit="create_new",  # the students of a pass are open side by side
        )
        _keep_id(student.folder, "wandb", self._run.id)

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, student: Student) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise _absent("mlflow") from error
        self._client: Any = MlflowClient()
        self._id = _known_id(student.folder, "mlflow")
        if self._id is None:
            run = self._client.create_run(self._experiment(), run_name=student.config.name)
            self._id = run.info.run_id
            for name, value in student.config.identity().items():
                self._client.log_param(self._id, name, value)
            _keep_id(student.folder, "mlflow", self._id)

    def _experiment(self) -> str:
        """What MLflow's own environment variables name, or its default experiment."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if name is None:
            return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _absent(name: str) -> UsageError:
    return UsageError(
        f"--tracker {name}: the package {name} is not installed; pip install 'softlabel[{name}]', or leave it out"
    )


def _known_id(folder: Path, tracker: str) -> str | None:
    try:
        found = json.loads((folder / run_folder.TRACKER).read_text(encoding="utf-8")).get(tracker)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _keep_id(folder: Path, tracker: str, identifier: str | None) -> None:
    run_folder.write_atomically(folder / run_folder.TRACKER, json.dumps({tracker: identifier}).encode() + b"\n")
