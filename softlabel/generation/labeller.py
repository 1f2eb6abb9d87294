"""The engine room of stage 1: decode, shape, ask the members, combine, encode, one shard at a time.

    source -> decode -> geometry of each member -> teachers -> combine -> encode -> rows of a shard

The unit of work is one shard. `label_shard` is idempotent: the same shard of the same run gives the same rows wherever
and whenever it is computed, because batches are laid from the shard's own start and are always padded to one shape.

What a `Lane` does to a batch ends with tensors on their way to main memory: nothing here waits for a device, and what
has to be looked at (are the logits numbers?) is looked at when they have arrived, in `assemble`.

Legend: B batch, C classes, H height, M members, R rows (B, or B * M where members are kept apart), W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.device import Tuning
from softlabel.common.hashing import Hasher
from softlabel.common.keys import Keys
from softlabel.dataset import Source
from softlabel.errors import DataError, TeacherError
from softlabel.generation.ensemble import Members
from softlabel.generation.input_reader import DecodedBatch, Intake, Span
from softlabel.generation.timing import PaceMeter
from softlabel.generation.transfer import Download
from softlabel.inputs.base import IGNORE
from softlabel.labels.combine import combine
from softlabel.labels.encode import FidelityMeter, encode, encode_hidden
from softlabel.models.head import Head
from softlabel.models.teacher import Teacher
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, Fidelity, Run, ShardPlan
from softlabel.views import Views

BadImagePolicy = Literal["skip", "error"]

# What members in turn may keep of decoded images, so that a move of weights pays for many batches.
_KEPT_BYTES = 1 << 29
_SIDE = 256  # of an image whose size only decoding tells


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
    """The loaded members and how they become labels: all that a shard needs beside its plan.

    Attributes:
        batch_size: samples a forward pass, always; halved where memory runs out.
        first_member: the number in the store of the first of these members, where they join others.
    """

    def __init__(
        self,
        source: Source,
        members: Members | Sequence[Teacher],
        run: Run,
        *,
        batch_size: int,
        on_bad_image: BadImagePolicy = "skip",
        tuning: Tuning | None = None,
    ) -> None:
        self.members = members if isinstance(members, Members) else Members(members)
        self.source, self.teachers, self.run = source, self.members.teachers, run
        self.batch_size, self.on_bad_image = batch_size, on_bad_image
        self.tuning = Tuning() if tuning is None else tuning
        self.first_member = 0
        self.intake = Intake(source=source, geometries=self.members.geometries, views=Views.of(run))
        self.lane = Lane(self, self.members)

    @property
    def head(self) -> Head | None:
        return self.lane.head

    def spans(self, plan: ShardPlan) -> Iterator[Span]:
        """The samples of a shard's batches, from the shard's own start."""
        for start in range(plan.start, plan.stop, self.batch_size):
            yield Span(view=plan.view, start=start, stop=min(start + self.batch_size, plan.stop))

    def decoded(self, plans: Sequence[ShardPlan], workers: int) -> Iterator[DecodedBatch]:
        """The decoded batches of shards, in order."""
        return self.intake.stream((span for plan in plans for span in self.spans(plan)), workers=workers)

    def batches_together(self) -> int:
        """How many batches a lane takes at once: one, or what bounded memory holds where members take turns."""
        if not self.members.in_turn:
            return 1
        pixels = sum((geometry.crop or geometry.resize or _SIDE) ** 2 for geometry in self.intake.geometries)
        return max(1, _KEPT_BYTES // (self.batch_size * 3 * pixels))

    def scaled_logits(self, batch: DecodedBatch) -> Tensor:
        """Combined scaled logits, float32, on the device: (len(batch.keys), C), or (.., M, C) where members are kept.

        Raises:
            TeacherError: a member's logits are not numbers.
        """
        (logits_MBC,) = self.lane.logits([batch])
        self.check(_wrong(logits_MBC).cpu().numpy(), batch.keys)
        return self.combine(logits_MBC)

    def hidden(self, batch: DecodedBatch) -> tuple[Tensor, Tensor]:
        """Scaled logits (B, C) and the input of the teacher's last linear layer (B, D), both float32.

        Raises:
            TeacherError: the logits are not numbers.
            UsageError: the last linear layer does not explain them.
        """
        assert self.head is not None
        logits_BC, hidden_BD = self.lane.hidden(batch)
        self.check(_wrong([logits_BC]).cpu().numpy(), batch.keys)
        if not self.head.explains(logits_BC, hidden_BD):
            self.head.refuse()
        return self.combine([logits_BC]), hidden_BD

    def combine(self, logits_MBC: Sequence[Tensor]) -> Tensor:
        rule, weights = self.run.combine.rule, self.run.combine.weights
        calibration = [member.calibration for member in self.run.members]
        return combine(
            logits_MBC, rule=rule, temperature=self.run.temperature, weights=weights, calibration=calibration
        )

    def check(self, wrong_MB: NDArray[np.bool_], keys: Sequence[str]) -> None:
        """Raises TeacherError for the first member with a wrong row."""
        for wrong_B, teacher in zip(wrong_MB, self.teachers, strict=True):
            if wrong_B.any():
                raise TeacherError(
                    f"teacher {teacher.spec.text}: the logits of image {keys[int(wrong_B.argmax())]!r} are not finite "
                    f"({int(wrong_B.sum())} of {len(keys)} in its batch); check the checkpoint, or use --precision fp32"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLabels:
    """A batch after a lane: who is in it, and what is on its way to main memory (nothing, if all images are bad)."""

    keys: list[str]
    labels: NDArray[np.int64]
    content: NDArray[np.uint64]
    bad: tuple[BadRow, ...]
    views: dict[str, NDArray[Any]]
    columns: Download | None
    checks: Download | None


class Lane:
    """What takes batches from pixels to columns, one after the other. Several lanes share weights and nothing else."""

    def __init__(self, labeller: Labeller, members: Members) -> None:
        self.labeller, self.members = labeller, members
        run = labeller.run
        self.head = Head.of(members.teachers[0], run.members[0].calibration) if run.encoding.name == "head" else None

    def label(self, plan: ShardPlan, batches: Sequence[DecodedBatch], meter: PaceMeter) -> list[BatchLabels]:
        """Label batches of one shard."""
        full = [batch for batch in batches if batch.keys]
        hidden: list[Tensor | None] = [None] * len(full)
        with meter.spend("forward"):
            if self.head is None:
                answers = self.logits(full)
            else:
                heard = [self.hidden(batch) for batch in full]
                answers, hidden = [[logits_BC] for logits_BC, _ in heard], [hidden_BD for _, hidden_BD in heard]
        with meter.spend("encoding"), torch.inference_mode():
            encoded = iter([self._encode(plan, *each) for each in zip(full, answers, hidden, strict=True)])
            return [next(encoded) if batch.keys else _labelled(batch, None, None) for batch in batches]

    def logits(self, batches: Sequence[DecodedBatch]) -> list[list[Tensor]]:
        """Of each batch and member, float32 (len(batch.keys), C)."""
        answers = self.members.logits([self._padded(batch) for batch in batches])
        return [
            [logits_BC[: len(batch.keys)] for logits_BC in logits_MBC]
            for batch, logits_MBC in zip(batches, answers, strict=True)
        ]

    def hidden(self, batch: DecodedBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and hidden (B, D), float32."""
        assert self.head is not None
        logits_BC, hidden_BD = self.head.logits(self.members.upload(self._padded(batch))[0])
        return logits_BC[: len(batch.keys)], hidden_BD[: len(batch.keys)]

    def _padded(self, batch: DecodedBatch) -> list[Tensor]:
        # The constant shape keeps labels independent of where a shard ends, and compiled teachers compiled once.
        return [_pad(images_BCHW, self.labeller.batch_size) for images_BCHW in batch.images]

    def _encode(
        self, plan: ShardPlan, batch: DecodedBatch, logits_MBC: list[Tensor], hidden_BD: Tensor | None
    ) -> BatchLabels:
        run = self.labeller.run
        scaled_logits = self.labeller.combine(logits_MBC)
        flat_RC = scaled_logits.reshape(-1, run.num_classes)
        meter = FidelityMeter(temperature=run.temperature, encoding=run.encoding)
        checks = {"wrong": _wrong(logits_MBC)}
        if hidden_BD is not None:
            assert self.head is not None
            columns = encode_hidden(hidden_BD, run.encoding)
            checks["nats"] = meter.measure(flat_RC, columns, (self.head.weight, self.head.bias))
            checks["explained"] = self.head.explains(logits_MBC[0], hidden_BD)
        else:
            seeds_R = self._row_seeds(plan, batch.keys, flat_RC.device) if run.encoding.name == "sampled" else None
            columns = encode(flat_RC, run.encoding, temperature=run.temperature, seeds_R=seeds_R)
            checks["nats"] = meter.measure(flat_RC, columns)
        if batch.labels.max() != IGNORE:
            mixed_BC = scaled_logits.mean(dim=1) if run.kept else scaled_logits
            checks["top"] = mixed_BC.argmax(dim=-1)
        rows = {name: column.reshape(len(batch.keys), -1) for name, column in columns.items()}
        return _labelled(batch, Download(rows), Download(checks))

    def _row_seeds(self, plan: ShardPlan, keys: Sequence[str], device: torch.device) -> Tensor:
        """int64 (R,): what is drawn for a row follows from (seed, key, view, member) and from nothing else."""
        run = self.labeller.run
        hashes_B = Hasher(run.views.seed)(Keys.of(keys), plan.view).view(np.int64)
        members_M = self.labeller.first_member + np.arange(run.members_stored, dtype=np.int64)
        return torch.from_numpy((hashes_B[:, None] + members_M).reshape(-1)).to(device, non_blocking=True)


def assemble(plan: ShardPlan, labeller: Labeller, batches: Iterator[BatchLabels], meter: PaceMeter) -> LabelledShard:
    """Put a shard together from its batches, which are waited for and looked at one by one.

    Raises:
        TeacherError, UsageError: see `Labeller.scaled_logits` and `hidden`.
        DataError: a bad image, where that stops the run.
    """
    run = labeller.run
    fidelity = FidelityMeter(temperature=run.temperature, encoding=run.encoding)
    parts: list[BatchLabels] = []
    # Whole columns from the start: joining the parts at the end would copy every one a second time.
    columns: dict[str, NDArray[Any]] = {
        column.name: np.empty((plan.stop - plan.start, column.width), column.numpy) for column in run.columns
    }
    correct = labelled = at = 0
    for part in batches:
        parts.append(part)
        if part.bad and labeller.on_bad_image == "error":
            first = part.bad[0]
            raise DataError(
                f"image {first.key!r}: {first.reason}; mend it, or let it be skipped with --on-bad-image skip"
            )
        if part.columns is None or part.checks is None:
            continue
        with meter.spend("forward"):  # beside a GPU, this is where the host waits for it
            arrived, checks = part.columns.get(), part.checks.get()
        labeller.check(checks["wrong"], part.keys)
        if labeller.head is not None and not checks["explained"][0]:
            labeller.head.refuse()
        with meter.spend("encoding"):
            for name, values in (arrived | part.views).items():
                columns[name][at : at + len(part.keys)] = values
        at += len(part.keys)
        fidelity.add_measured(checks["nats"])
        labelled += int((part.labels != IGNORE).sum())
        if "top" in checks:
            correct += int((checks["top"] == part.labels).sum())
    rows = Rows(
        keys=[key for part in parts for key in part.keys],
        labels=np.concatenate([part.labels for part in parts]),
        content=np.concatenate([part.content for part in parts]),
        columns={name: column[:at] for name, column in columns.items()},
    )
    return LabelledShard(
        plan=plan,
        rows=rows,
        bad=tuple(row for part in parts for row in part.bad),
        fidelity=fidelity.result(),
        correct=correct,
        labelled=labelled,
    )


def _labelled(batch: DecodedBatch, columns: Download | None, checks: Download | None) -> BatchLabels:
    return BatchLabels(
        keys=batch.keys,
        labels=batch.labels,
        content=batch.content,
        bad=batch.bad,
        views=batch.columns,
        columns=columns,
        checks=checks,
    )


def _pad(images_BCHW: Tensor, batch_size: int) -> Tensor:
    if len(images_BCHW) == batch_size:
        return images_BCHW
    # Filled in the layout of the whole batches: another one could take another way through the network.
    whole_BCHW = torch.zeros((batch_size, *images_BCHW.shape[1:]), dtype=images_BCHW.dtype)
    whole_BCHW = whole_BCHW.contiguous(memory_format=torch.channels_last)
    whole_BCHW[: len(images_BCHW)] = images_BCHW
    return whole_BCHW


def _wrong(logits_MBC: Sequence[Tensor]) -> Tensor:
    """bool (M, B), on the device: rows that are not numbers."""
    # -inf masks a class and is allowed; a row needs one class that is a number. The maximum tells all of it: NaN
    # spreads into it, +inf is it, and it is -inf where every class is masked.
    return torch.stack([~logits_BC.amax(dim=-1).isfinite() for logits_BC in logits_MBC])
