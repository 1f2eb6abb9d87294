"""The rows of a shard from its labelled batches, checked and joined."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.common.multi_hot import MULTI_HOT, to_multi_hot
from softlabel.errors import DataError
from softlabel.generation.batch_labels import BatchLabels
from softlabel.generation.features import check_storable
from softlabel.generation.labeller import Labeller
from softlabel.generation.progress import Progress
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.fidelity import Fidelity
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, Run, ShardPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledShard:
    """The rows of one shard, ready to write; `correct` of `labelled` rows match their hard label.

    Of independent sigmoids the known labels of each class are counted instead of rows.
    """

    plan: ShardPlan
    rows: Rows
    bad: tuple[BadRow, ...]
    fidelity: Fidelity | None
    correct: int
    labelled: int
    truncated: int = 0


def assemble(plan: ShardPlan, labeller: Labeller, batches: Iterator[BatchLabels], progress: Progress) -> LabelledShard:
    """Wait for the batches of a shard, check and join them.

    Raises:
        TeacherError, UsageError: as `Lane.scaled_logits` and `Lane.hidden`.
        DataError: a sample is bad and `on_bad_image` is ``error``.
    """
    run = labeller.run
    fidelity = FidelityMeter(temperature=run.temperature, encoding=run.encoding, activation=run.activation)
    parts: list[BatchLabels] = []
    gathered = _Columns(run, plan.stop - plan.start)
    correct = labelled = 0
    for part in batches:
        parts.append(part)
        if part.bad and labeller.on_bad_image == "error":
            first = part.bad[0]
            raise DataError(f"sample {first.key!r}: {first.reason}; fix it, or skip it with --on-bad-image skip")
        if part.columns is None or part.checks is None:
            continue
        with progress.spend("forward"):  # the host waits for a GPU here
            arrived, checks = part.columns.get(), part.checks.get()
        if "wrong" in checks:
            labeller.lane.check_finite(checks["wrong"], part.keys)
        if "unstorable" in checks:
            check_storable(checks["unstorable"], part.keys)
        if labeller.lane.head is not None and "explained" in checks and not checks["explained"][0]:
            labeller.lane.head.refuse()
        sigmoid = run.activation == "sigmoid"
        labels = to_multi_hot(part.labels, run.num_classes) if sigmoid else part.labels
        with progress.spend("encoding"):
            gathered.add(arrived | part.beside | {MULTI_HOT: labels}, len(part.keys))
        if "nats" in checks:
            fidelity.add_measured(checks["nats"])
        if "known" in checks:  # counted where the answers are
            correct, labelled = correct + int(checks["right"]), labelled + int(checks["known"])
        if run.encoding.labels:
            labelled += int((labels >= 0).sum())
        if "top" in checks:
            correct += int((checks["top"] == labels).sum())
    rows = Rows(
        keys=[key for part in parts for key in part.keys],
        labels=None if run.activation == "sigmoid" else np.concatenate([part.labels for part in parts]),
        content=np.concatenate([part.content for part in parts]),
        columns=gathered.get(),
    )
    return LabelledShard(
        plan=plan,
        rows=rows,
        bad=tuple(row for part in parts for row in part.bad),
        fidelity=fidelity.result(),
        correct=correct,
        labelled=labelled,
        truncated=sum(part.truncated for part in parts),
    )


class _Columns:
    """The columns of a shard, batch after batch."""

    def __init__(self, run: Run, rows: int) -> None:
        # Whole columns where their size is known: joining parts at the end would copy them again.
        self._whole = {
            column.name: np.empty((rows, column.width), column.numpy) for column in run.columns if column.per == "row"
        }
        self._ragged = {column.name: column for column in run.columns if column.per != "row"}
        self._parts: dict[str, list[NDArray[Any]]] = {
            name: [np.empty((0, column.width), column.numpy)] for name, column in self._ragged.items()
        }
        self._rows = 0

    def add(self, columns: Mapping[str, NDArray[Any]], rows: int) -> None:
        for name, values in columns.items():
            if name in self._whole:
                self._whole[name][self._rows : self._rows + rows] = values
            elif name in self._parts:
                self._parts[name].append(values.astype(self._ragged[name].numpy, copy=False))
        self._rows += rows

    def get(self) -> dict[str, NDArray[Any]]:
        whole = {name: column[: self._rows] for name, column in self._whole.items()}
        return whole | {name: np.concatenate(parts) for name, parts in self._parts.items()}
