"""The engine room of stage 1: decode, shape, ask the members, combine, encode, one shard at a time.

    source -> decode -> geometry of each member -> teachers -> combine -> encode -> rows of a shard

The unit of work is one shard. `label_shard` is idempotent: the same shard of the same run gives the same rows wherever
and whenever it is computed, because batches are laid from the shard's own start and are always padded to one shape.

Legend: B batch, C classes, H height, M members, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from softlabel.dataset import IGNORE, Source
from softlabel.encoding import FidelityMeter, encode, encode_hidden
from softlabel.errors import DataError, TeacherError
from softlabel.head import Head
from softlabel.intake import DecodedBatch, Intake, Span
from softlabel.labels import combine
from softlabel.store.index import Hasher
from softlabel.store.keys import Keys
from softlabel.store.manifest import BadRow, Fidelity, Run, ShardPlan
from softlabel.store.shard import Rows
from softlabel.teacher import Teacher
from softlabel.views import Views

BadImagePolicy = Literal["skip", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledShard:
    """The rows of one shard, ready to be written."""

    plan: ShardPlan
    rows: Rows
    bad: tuple[BadRow, ...]
    fidelity: Fidelity | None
    correct: int
    labelled: int


class Labeller:
    """The loaded members and how they become labels: all that a shard needs beside its plan."""

    def __init__(
        self,
        source: Source,
        teachers: Sequence[Teacher],
        run: Run,
        *,
        batch_size: int,
        on_bad_image: BadImagePolicy = "skip",
    ) -> None:
        self.source, self.teachers, self.run = source, tuple(teachers), run
        self.batch_size, self.on_bad_image = min(batch_size, run.shard_rows), on_bad_image
        self.head = Head.of(self.teachers[0], run.members[0].calibration) if run.encoding.name == "head" else None
        self.first_member = 0  # the number in the store of the first of these members, where they join others
        shapes = [teacher.preprocessing for teacher in self.teachers]
        # Members with the same geometry share one tensor; normalisation differs and happens on the device.
        keys = [p.shape for p in shapes]
        unique = list(dict.fromkeys(keys))
        geometries = tuple(shapes[keys.index(key)] for key in unique)
        self.intake = Intake(source=source, geometries=geometries, views=Views.of(run))
        self.geometry_of = tuple(unique.index(key) for key in keys)

    def spans(self, plan: ShardPlan) -> list[Span]:
        """The samples of a shard's batches, from the shard's own start."""
        return [
            Span(view=plan.view, start=start, stop=min(start + self.batch_size, plan.stop))
            for start in range(plan.start, plan.stop, self.batch_size)
        ]

    def decoded(self, plans: Sequence[ShardPlan], workers: int) -> Iterator[DecodedBatch]:
        """The decoded batches of shards, in order."""
        return self.intake.stream([span for plan in plans for span in self.spans(plan)], workers=workers)

    def scaled_logits(self, batch: DecodedBatch) -> Tensor:
        """Combined scaled logits, float32, on the device: (len(batch.keys), C), or (.., M, C) where members are kept.

        Raises:
            TeacherError: a member's logits are not numbers.
        """
        kept = len(batch.keys)
        padded = self._padded(batch)
        logits_MBC = []
        for teacher, geometry in zip(self.teachers, self.geometry_of, strict=True):
            logits_BC = teacher.logits(padded[geometry])[:kept]
            _check_logits(logits_BC, teacher, batch.keys)
            logits_MBC.append(logits_BC)
        return self._combine(logits_MBC)

    def hidden(self, batch: DecodedBatch) -> tuple[Tensor, Tensor]:
        """Scaled logits (B, C) and the input of the teacher's last linear layer (B, D), both float32."""
        assert self.head is not None
        logits_BC, hidden_BD = self.head.logits(self._padded(batch)[0])
        kept = len(batch.keys)
        _check_logits(logits_BC[:kept], self.teachers[0], batch.keys)
        return self._combine([logits_BC[:kept]]), hidden_BD[:kept]

    def _padded(self, batch: DecodedBatch) -> list[Tensor]:
        # The constant shape keeps labels independent of where a shard ends, and compiled teachers compiled once.
        return [_pad(images_BCHW, self.batch_size) for images_BCHW in batch.images]

    def _combine(self, logits_MBC: Sequence[Tensor]) -> Tensor:
        rule, weights = self.run.combine.rule, self.run.combine.weights
        calibration = [member.calibration for member in self.run.members]
        return combine(
            logits_MBC, rule=rule, temperature=self.run.temperature, weights=weights, calibration=calibration
        )


def label_shard(plan: ShardPlan, labeller: Labeller, batches: Iterator[DecodedBatch] | None = None) -> LabelledShard:
    """Label one shard. Idempotent: depends on the plan and the labeller alone.

    Args:
        batches: the shard's decoded batches, where a caller decodes ahead of several shards; decoded here if absent.
    """
    batches = labeller.decoded([plan], workers=0) if batches is None else batches
    run = labeller.run
    fidelity = FidelityMeter(temperature=run.temperature, encoding=run.encoding)
    parts: list[DecodedBatch] = []
    columns: list[dict[str, Tensor]] = []
    correct = labelled = 0
    for _ in labeller.spans(plan):
        batch = next(batches)
        parts.append(batch)
        if batch.bad and labeller.on_bad_image == "error":
            first = batch.bad[0]
            raise DataError(
                f"image {first.key!r}: {first.reason}; mend it, or let it be skipped with --on-bad-image skip"
            )
        if not batch.keys:
            continue
        if labeller.head is not None:
            scaled_logits, hidden_BD = labeller.hidden(batch)
            encoded = encode_hidden(hidden_BD, run.encoding)
            fidelity.add(scaled_logits, encoded, (labeller.head.weight, labeller.head.bias))
        else:
            scaled_logits = labeller.scaled_logits(batch)
            flat_RC = scaled_logits.reshape(-1, run.num_classes)  # R is B, or B * M where members are kept apart
            seeds_R = _row_seeds(labeller, plan, batch.keys).to(flat_RC.device)
            encoded = encode(flat_RC, run.encoding, temperature=run.temperature, seeds_R=seeds_R)
            fidelity.add(flat_RC, encoded)
        columns.append({name: column.reshape(len(batch.keys), -1).cpu() for name, column in encoded.items()})
        mixed_BC = scaled_logits.mean(dim=1) if run.kept else scaled_logits
        top_B = mixed_BC.argmax(dim=-1).cpu().numpy()
        correct += int((top_B == batch.labels).sum())
        labelled += int((batch.labels != IGNORE).sum())
    if not columns:  # every image of the shard is bad
        columns.append({column.name: torch.empty(0, column.width) for column in run.label_columns})
    keys = [key for part in parts for key in part.keys]
    rows = Rows(
        keys=keys,
        labels=np.concatenate([part.labels for part in parts]),
        content=np.concatenate([part.content for part in parts]),
        columns={
            c.name: torch.cat([part[c.name] for part in columns]).numpy().astype(c.numpy, copy=False)
            for c in run.label_columns
        }
        | {
            c.name: np.concatenate(
                [np.empty((0, c.width), c.numpy), *(part.columns[c.name] for part in parts if part.keys)]
            )
            for c in run.view_columns
        },
    )
    return LabelledShard(
        plan=plan,
        rows=rows,
        bad=tuple(row for part in parts for row in part.bad),
        fidelity=fidelity.result(),
        correct=correct,
        labelled=labelled,
    )


def _row_seeds(labeller: Labeller, plan: ShardPlan, keys: Sequence[str]) -> Tensor:
    """int64 (R,): what is drawn for a row follows from (seed, key, view, member) and from nothing else."""
    run = labeller.run
    hashes_B = Hasher(run.views.seed)(Keys.of(keys), plan.view).view(np.int64)
    members_M = labeller.first_member + np.arange(run.members_stored, dtype=np.int64)
    return torch.from_numpy((hashes_B[:, None] + members_M).reshape(-1))


def _pad(images_BCHW: Tensor, batch_size: int) -> Tensor:
    short = batch_size - len(images_BCHW)
    return torch.cat([images_BCHW, images_BCHW.new_zeros(short, *images_BCHW.shape[1:])]) if short else images_BCHW


def _check_logits(logits_BC: Tensor, teacher: Teacher, keys: Sequence[str]) -> None:
    # -inf masks a class and is allowed; a row needs one class that is a number.
    wrong_B = (logits_BC.isnan() | logits_BC.isposinf()).any(dim=-1) | logits_BC.isneginf().all(dim=-1)
    if wrong_B.any():
        row = int(wrong_B.nonzero()[0])
        raise TeacherError(
            f"teacher {teacher.spec.text}: the logits of image {keys[row]!r} are not finite "
            f"({int(wrong_B.sum())} of {len(keys)} in its batch); check the checkpoint, or use --precision fp32"
        )
