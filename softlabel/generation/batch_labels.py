"""What a lane has made of a batch, on its way to the rows of a shard."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.common.multi_hot import Labels
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.transfer import Download
from softlabel.store.manifest import BadRow


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLabels:
    """A labelled batch whose columns and checks are being copied to main memory; None if all samples are bad.

    `beside` are the columns that teachers do not answer.
    """

    keys: list[str]
    labels: Labels
    content: NDArray[np.uint64]
    bad: tuple[BadRow, ...]
    beside: dict[str, NDArray[Any]]
    columns: Download | None
    checks: Download | None
    truncated: int = 0


def make_labels(
    batch: DecodedBatch,
    answers: Download | None,
    checks: Download | None,
    *,
    columns: dict[str, NDArray[Any]] | None = None,
) -> BatchLabels:
    """A batch and what the teachers answered; `columns` are those beside the answers, by default those of its views."""
    return BatchLabels(
        keys=batch.keys,
        labels=batch.labels,
        content=batch.content,
        bad=batch.bad,
        beside=batch.columns if columns is None else columns,
        columns=answers,
        checks=checks,
        truncated=batch.truncated,
    )
