"""Label shards: run the members on decoded batches, combine and encode their logits.

    source -> decode -> geometry of each member -> teachers -> combine -> encode -> rows of a shard

The unit of work is one shard. `label_shard` is idempotent: a shard of a run has the same rows wherever it is computed,
because batches start at the shard's start and are always padded to one shape.

A `Lane` starts the copies to main memory and does not wait for the device; `assemble` waits for them and checks the
logits.

Legend: B batch, C classes, H height, M members, R rows (B, or B * M where members are kept apart), W width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.common.device import Tuning
from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, is_labelled
from softlabel.dataset import Source
from softlabel.errors import TeacherError
from softlabel.generation.batch_labels import BatchLabels, make_labels
from softlabel.generation.buckets import Piece, count_bytes, count_pass_rows, cut_into_pieces, put_back
from softlabel.generation.config import BadImagePolicy
from softlabel.generation.ensemble import Members
from softlabel.generation.features import (
    BatchAnswers,
    Capture,
    Probe,
    Taken,
    encode_features,
    make_probes,
    watch_all,
)
from softlabel.generation.input_reader import DecodedBatch, InputReader, Span
from softlabel.generation.progress import Progress
from softlabel.generation.transfer import Download
from softlabel.inputs.base import IGNORE, Inputs
from softlabel.labels.combine import average_members, combine
from softlabel.labels.encodings import encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.labels.row_seeds import make_row_seeds
from softlabel.models.head import Head
from softlabel.models.teacher import Teacher
from softlabel.store.encodings import LastLayer
from softlabel.store.manifest import Run, ShardPlan
from softlabel.store.view_columns import DIFFERENCE

# Bytes of decoded images that members in turn label at once, to amortise moving the weights.
_KEPT_BYTES = 1 << 29
_MOST_REGROUPED = 1 << 15  # samples of a window


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Computes columns from batches of samples, one at a time. Lanes share only weights.

    Attributes:
        run: how logits are combined and encoded.
        members: the teachers.
        batch_size: samples per forward pass.
        first_member: number in the store of the first of these members.
        head: the last layer, if the encoding stores its input.
        probes: of each member, if rows have features.
    """

    run: Run
    members: Members
    batch_size: int
    first_member: int = 0
    head: Head | None = None
    probes: tuple[Probe, ...] = ()

    @classmethod
    def of(cls, run: Run, members: Members, *, batch_size: int, first_member: int = 0) -> Self:
        """Create a lane.

        Raises:
            UsageError: encoding ``head`` does not fit the teacher.
        """
        head = Head.of(members.teachers[0], run.members[0].calibration) if run.encoding.from_hidden else None
        return cls(
            run=run,
            members=members,
            batch_size=batch_size,
            first_member=first_member,
            head=head,
            probes=make_probes(members.teachers, run.features, members.device),
        )

    def with_replicas(self) -> Self:
        """Return a lane for another thread, with copies of the networks that share their weights."""
        members = self.members.replica()
        return self.of(self.run, members, batch_size=self.batch_size, first_member=self.first_member)

    def label(self, plan: ShardPlan, batches: Sequence[DecodedBatch], progress: Progress) -> list[BatchLabels]:
        """Label batches of one shard."""
        own = [batch for batch in batches if batch.keys]
        with progress.spend("forward"):
            answers = self.answer_with_copies(own)
        with progress.spend("encoding"), torch.inference_mode():
            encoded = iter([self._encode(plan, *each) for each in zip(own, answers, strict=True)])
            return [next(encoded) if batch.keys else make_labels(batch, None, None) for batch in batches]

    def answer_with_copies(self, batches: Sequence[DecodedBatch]) -> list[BatchAnswers]:
        """What the members answer to each batch, and to the noisy copies of its samples."""
        found = self.answers([one for batch in batches for one in batch.with_copies()])
        each = 1 + 2 * self.run.views.directions
        return [
            replace(found[first], copies=tuple(one.logits for one in found[first + 1 : first + each]))
            for first in range(0, len(found), each)
        ]

    def answers(self, batches: Sequence[DecodedBatch]) -> list[BatchAnswers]:
        """What the members answer to each batch, and what is taken on the way."""
        hidden: list[Tensor | None] = [None] * len(batches)
        with watch_all(self.probes) as captures:
            if self.head is None:
                logits = self._compute_logits(batches)
            else:
                captured = self._compute_hidden(batches)
                logits, hidden = [[logits_BC] for logits_BC, _ in captured], [hidden_BD for _, hidden_BD in captured]
        taken = [self._take(batches, number, capture) for number, capture in enumerate(captures)]
        return [
            BatchAnswers(logits=logits_MBC, hidden=hidden_BD, features=tuple(one[place] for one in taken))
            for place, (logits_MBC, hidden_BD) in enumerate(zip(logits, hidden, strict=True))
        ]

    def _take(self, batches: Sequence[DecodedBatch], number: int, capture: Capture) -> list[Taken]:
        """The features that a member has given to each batch."""
        subject, sizes = self.members.teachers[number].spec.text, [len(batch.keys) for batch in batches]
        if not self.members.has_buckets:
            passes = capture.of_passes(subject, len(batches))
            return [
                {name: found[:size] for name, found in taken.items()} for taken, size in zip(passes, sizes, strict=True)
            ]
        pieces = self._cut_into_pieces(batches, self.members.transform_of[number])
        passes = capture.of_passes(subject, len(pieces))
        back = {name: put_back([taken[name] for taken in passes], pieces, sizes) for name in capture.names}
        return [{name: found[place] for name, found in back.items()} for place in range(len(batches))]

    def logits(self, batches: Sequence[DecodedBatch]) -> list[list[Tensor]]:
        """Return logits of each batch and member, float32 (len(batch.keys), C); the features where rows have nothing
        else."""
        if self.run.encoding.labels:
            return self._compute_logits(batches)
        return [
            [probe.show(taken) for probe, taken in zip(self.probes, one.features, strict=True)]
            for one in self.answers(batches)
        ]

    def _compute_logits(self, batches: Sequence[DecodedBatch]) -> list[list[Tensor]]:
        if not batches:
            return []
        if self.members.has_buckets:
            return self._logits_in_buckets(batches)
        answers = self.members.logits([self._pad(batch) for batch in batches])
        return [
            [logits_BC[: len(batch.keys)] for logits_BC in logits_MBC]
            for batch, logits_MBC in zip(batches, answers, strict=True)
        ]

    def _logits_in_buckets(self, batches: Sequence[DecodedBatch]) -> list[list[Tensor]]:
        columns: dict[int, list[Tensor]] = {}  # number of the member -> of each batch
        for number in range(len(self.members.transforms)):
            pieces = self._cut_into_pieces(batches, number)
            answers = self.members.answers(number, [piece.inputs for piece in pieces])
            sizes = [len(batch.keys) for batch in batches]
            columns |= {member: put_back(found, pieces, sizes) for member, found in answers.items()}
        return [[columns[member][place] for member in sorted(columns)] for place in range(len(batches))]

    def pass_rows(self, bucket: int) -> int:
        """Return how many samples of a length make a forward pass."""
        return count_pass_rows(self.members.device, self.batch_size, bucket)

    def share_filled(self, batch: DecodedBatch) -> float:
        """Of what is computed for a batch alone, the share that is its samples': long runs fill nearly all of it."""
        if not self.members.has_buckets:
            return 1.0
        numbers = range(len(self.members.transforms))
        pieces = [piece for number in numbers for piece in self._cut_into_pieces([batch], number)]
        computed = [len(piece.inputs) * piece.bucket for piece in pieces]
        return sum(piece.filled * size for piece, size in zip(pieces, computed, strict=True)) / sum(computed)

    def _cut_into_pieces(self, batches: Sequence[DecodedBatch], number: int) -> list[Piece]:
        inputs = [batch.inputs[number] for batch in batches]
        return cut_into_pieces(self.members.transforms[number], inputs, self.pass_rows) if inputs else []

    def scaled_logits(self, *batches: DecodedBatch) -> list[Tensor]:
        """Return combined scaled logits float32 (B, C), or (B, M, C) if members are kept, of each batch, on the device.

        Raises:
            TeacherError: a member's logits are not finite.
        """
        found = self.logits(batches)
        for batch, logits_MBC in zip(batches, found, strict=True):
            self.check_finite(find_wrong(logits_MBC, self.run.activation).cpu().numpy(), batch.keys)
        return [self.combine(logits_MBC) for logits_MBC in found]

    def hard_labels(self, batch: DecodedBatch) -> Labels:
        """What the answers to a batch are compared with: its labels, none where answers are no logits."""
        return batch.labels if self.run.encoding.labels else np.full(len(batch.keys), IGNORE)

    def hidden(self, batch: DecodedBatch) -> tuple[Tensor, Tensor]:
        """Return scaled logits (B, C) and the input of the teacher's last linear layer (B, D), both float32.

        Raises:
            TeacherError: the logits are not finite.
            UsageError: they are not the output of the last linear layer.
        """
        assert self.head is not None
        ((logits_BC, hidden_BD),) = self._compute_hidden([batch])
        self.check_finite(find_wrong([logits_BC], self.run.activation).cpu().numpy(), batch.keys)
        if not self.head.explains(logits_BC, hidden_BD):
            self.head.refuse()
        return self.combine([logits_BC]), hidden_BD

    def combine(self, logits_MBC: Sequence[Tensor]) -> Tensor:
        """Combine M logits (B, C) to scaled logits (B, C), or (B, M, C) if members are kept."""
        rule, weights = self.run.combine.rule, self.run.combine.weights
        calibration = [member.calibration for member in self.run.members]
        return combine(
            logits_MBC,
            rule=rule,
            temperature=self.run.temperature,
            weights=weights,
            calibration=calibration,
            activation=self.run.activation,
        )

    @property
    def answer(self) -> str:
        """What rows have of teachers, in a sentence."""
        return "logits" if self.run.encoding.labels else "features"

    def check_finite(self, wrong_MB: NDArray[np.bool_], keys: Sequence[str]) -> None:
        """Check rows bool (M, B) that are not finite.

        Raises:
            TeacherError: names the first member with such a row.
        """
        for wrong_B, teacher in zip(wrong_MB, self.members.teachers, strict=True):
            if wrong_B.any():
                raise TeacherError(
                    f"teacher {teacher.spec.text}: the {self.answer} of sample {keys[int(wrong_B.argmax())]!r} are not "
                    f"finite ({int(wrong_B.sum())} of {len(keys)} in its batch); check the checkpoint, or use "
                    "--precision fp32"
                )

    def _compute_hidden(self, batches: Sequence[DecodedBatch]) -> list[tuple[Tensor, Tensor]]:
        assert self.head is not None
        sizes = [len(batch.keys) for batch in batches]
        if self.members.has_buckets:
            pieces = self._cut_into_pieces(batches, 0)
            found = [self.head.logits(*self.members.upload([piece.inputs])) for piece in pieces]
            sides = [put_back(side, pieces, sizes) for side in zip(*found, strict=True)]
            return list(zip(*sides, strict=True))
        found = [self.head.logits(*self.members.upload(self._pad(batch))) for batch in batches]
        return [(logits[:size], hidden[:size]) for (logits, hidden), size in zip(found, sizes, strict=True)]

    def _pad(self, batch: DecodedBatch) -> list[Inputs]:
        # A constant shape keeps labels independent of a shard's end, and compiles teachers only once.
        return [inputs.padded(self.batch_size) for inputs in batch.inputs]

    def _encode(self, plan: ShardPlan, batch: DecodedBatch, answers: BatchAnswers) -> BatchLabels:
        run, rows, checks = self.run, dict[str, Tensor](), dict[str, Tensor]()
        if run.encoding.labels:
            rows, checks = self._encode_labels(plan, batch, answers)
        if run.features is not None:
            columns, checks["unstorable"] = encode_features(run.features, self.probes, answers.features)
            rows |= columns
        return make_labels(batch, Download(rows), Download(checks))

    def _encode_labels(
        self, plan: ShardPlan, batch: DecodedBatch, answers: BatchAnswers
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The encoding's columns, and what is checked of them."""
        run, logits_MBC, hidden_BD = self.run, answers.logits, answers.hidden
        scaled_logits = self.combine(logits_MBC)
        flat_RC = scaled_logits.reshape(-1, run.num_classes)
        meter = FidelityMeter(temperature=run.temperature, encoding=run.encoding, activation=run.activation)
        checks = {"wrong": find_wrong(logits_MBC, run.activation)}
        seeds_R = self._row_seeds(plan, batch.keys, flat_RC.device) if run.encoding.drawn else None
        columns = encode(flat_RC, run.encoding, temperature=run.temperature, seeds_R=seeds_R, hidden_RD=hidden_BD)
        checks["nats"] = meter.measure(
            flat_RC, columns, None if self.head is None else (self.head.weight, self.head.bias)
        )
        if self.head is not None and hidden_BD is not None:
            checks["explained"] = self.head.explains(logits_MBC[0], hidden_BD)
        if is_labelled(batch.labels).any():
            mixed_BC = average_members(scaled_logits, run.activation) if run.kept else scaled_logits
            checks["top"] = mixed_BC.argmax(dim=-1) if run.activation == "softmax" else mixed_BC > 0
        if answers.copies:
            columns[DIFFERENCE] = self.halve_differences(answers.copies)
            # Rows are refused by name where a difference is not finite: of a copy's logits, or of a class ruled out.
            checks["wrong"] |= ~columns[DIFFERENCE].isfinite().all(dim=1)
        return {name: column.reshape(len(batch.keys), -1) for name, column in columns.items()}, checks

    def halve_differences(self, copies: Sequence[list[Tensor]]) -> Tensor:
        """Half the differences of the logits of noisy copies at temperature 1, centred: float16 (B, K C)."""
        scaled = [self.combine(logits_MBC) for logits_MBC in copies]
        pairs = zip(scaled[::2], scaled[1::2], strict=True)
        halved = [(plus_BC - minus_BC) * (self.run.temperature / 2) for plus_BC, minus_BC in pairs]
        return torch.cat([one - one.mean(dim=1, keepdim=True) for one in halved], dim=1).half()

    def _row_seeds(self, plan: ShardPlan, keys: Sequence[str], device: torch.device) -> Tensor:
        """Return seeds of random draws, int64 (R,), a function of (seed, key, view, member)."""
        members = range(self.first_member, self.first_member + self.run.members_stored)
        seeds_R = make_row_seeds(Keys.of(keys), plan.view, seed=self.run.views.seed, members=members)
        return torch.from_numpy(seeds_R).to(device, non_blocking=True)


def describe_last_layer(teacher: Teacher, calibration: float) -> LastLayer:
    """What encoding head records of a teacher's last layer. Raises UsageError where there is none."""
    head = Head.of(teacher, calibration)
    return LastLayer(width=head.width, softcap=head.softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeller:
    """Reads and labels the samples of shards.

    Attributes:
        reader: reads, decodes and shapes.
        lane: the first lane; others are copied from it while shards are labelled.
        on_bad_image: whether an image that cannot be decoded is skipped, or stops the run.
        tuning: how the machine is used.
    """

    reader: InputReader
    lane: Lane
    on_bad_image: BadImagePolicy = "skip"
    tuning: Tuning

    @property
    def run(self) -> Run:
        return self.lane.run

    @property
    def source(self) -> Source:
        return self.reader.source

    @property
    def members(self) -> Members:
        return self.lane.members

    @property
    def teachers(self) -> Sequence[Teacher]:
        return self.lane.members.teachers

    @property
    def batch_size(self) -> int:
        return self.lane.batch_size

    def with_batch_size(self, batch_size: int) -> Self:
        """Return a labeller with another batch size; labels agree up to rounding."""
        return replace(self, lane=replace(self.lane, batch_size=batch_size))

    def spans(self, plan: ShardPlan) -> Iterator[Span]:
        """Yield the spans of a shard's batches, from the shard's start."""
        for start in range(plan.start, plan.stop, self.batch_size):
            yield Span(view=plan.view, start=start, stop=min(start + self.batch_size, plan.stop))

    def batches_together(self, plan: ShardPlan) -> int:
        """Return how many batches of a shard a lane labels at once: one, or as many as fit in memory if members run in
        turn or samples are regrouped by length."""
        if not (self.members.has_buckets or self.members.in_turn):
            return 1
        sample_bytes = sum(map(count_bytes, self.reader.transforms))
        if (tokens := self.run.tokens) is not None:  # the answers of a window are kept too, one for each position
            sample_bytes += tokens.max_length * sum(column.row_bytes for column in self.run.label_columns)
        fitting = max(1, _KEPT_BYTES // (self.batch_size * sample_bytes))
        if self.members.has_buckets:
            # Equal windows for the lanes, as large as possible: each length of a window has one batch that is not full.
            rows, (lanes, _) = plan.stop - plan.start, self.tuning.lanes(self.members.device)
            windows = lanes * math.ceil(rows / min(_MOST_REGROUPED, fitting * self.batch_size))
            return math.ceil(rows / (self.batch_size * windows))
        return fitting


def find_wrong(logits_MBC: Sequence[Tensor], activation: Activation) -> Tensor:
    """Return bool (M, B), on the device, whether a row has NaN, +inf, or only -inf; of independent sigmoids any inf."""
    if activation == "sigmoid":
        return torch.stack([~logits_BC.isfinite().all(dim=-1) for logits_BC in logits_MBC])
    # -inf masks a class and is allowed. The maximum is NaN, +inf or -inf exactly in these cases.
    return torch.stack([~logits_BC.amax(dim=-1).isfinite() for logits_BC in logits_MBC])
