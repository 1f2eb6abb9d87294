"""A few numbers for each row of a store, from all its classes: what the sections of a report are made of.

Legend: R rows, C classes, M members, W elements of a column in one row.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.report.probabilities import LOG2_E, LabelReader
from softlabel.store.columns import Array

F32 = NDArray[np.float32]
TOP = 5  # of the top-5 accuracy
# Numbers of a slice: few enough for the cache, and enough that the calls themselves take no time.
_SLICE = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """Of each row of a softmax over the classes, at `LabelReader.judged`.

    Attributes:
        top: the most probable class, int32 (R,); of equal ones the first.
        p_top: its probability, float32 (R,).
        p_label: probability of the hard label, float32 (R,); NaN without one. Equal to `p_top` to the bit where the
            label is the most probable class.
        in_top5: whether fewer than five classes are more probable than the hard label, bool (R,).
    """

    top: NDArray[np.int32]
    p_top: F32
    p_label: F32
    in_top5: NDArray[np.bool_]

    @classmethod
    def empty(cls, rows: int) -> Self:
        return cls(
            top=np.zeros(rows, np.int32),
            p_top=np.zeros(rows, np.float32),
            p_label=np.full(rows, np.nan, np.float32),
            in_top5=np.zeros(rows, np.bool_),
        )

    def part(self, rows: slice) -> Self:
        """A view on some of the rows."""
        return replace(self, **{one.name: getattr(self, one.name)[rows] for one in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedSigmoids:
    """Of independent sigmoids, at `LabelReader.judged`.

    Attributes:
        non_finite: rows of which a probability is not a number.
        known, right: over the rows, for each class, how many hard labels are known, and of these on which the
            probability is on the label's side of 0.5: int64 (C,).
        p_label: sum over the known ones of the probability of what the label says, float64 (C,).
    """

    non_finite: int
    known: NDArray[np.int64]
    right: NDArray[np.int64]
    p_label: NDArray[np.float64]


class Judge:
    """Judges rows of a store; several threads may share one."""

    def __init__(self, reader: LabelReader) -> None:
        self._reader = reader
        self._step = max(1, _SLICE // (reader.members * reader.run.num_classes))
        # Each thread uses its own memory again: fresh pages for every slice would cost more than the arithmetic.
        self._scratch = threading.local()

    def softmax(self, columns: Mapping[str, Array], labels_R: NDArray[np.int64]) -> Judged:
        """Judge rows of a softmax over the classes.

        Args:
            columns: of the encoding, (R, W).
            labels_R: hard labels, negative for none.
        """
        found = Judged.empty(len(labels_R))
        judge_slice = self._judge_one if self._reader.members == 1 else self._judge_members
        for cut, part in self._slices(columns, len(labels_R)):
            judge_slice(part, labels_R[cut], found.part(cut))
        found.p_label[labels_R < 0] = np.nan
        return found

    def probabilities(self, columns: Mapping[str, Array], rows: int) -> Iterator[F32]:
        """Yield the probabilities of consecutive rows of a softmax, (R, C): to the bit those that `softmax` judges.

        They lie in memory that the next ones use again.
        """
        for cut, part in self._slices(columns, rows):
            if self._reader.members > 1:
                yield self._reader.read_probabilities(part, self._reader.judged).clamp_max_(1.0).numpy()
            else:
                bits, _ = self._read_bits(part, cut.stop - cut.start)
                powers_RC, sum_R = _raise(bits)
                yield np.divide(powers_RC, sum_R[:, None], dtype=np.float32)

    def _read_bits(self, columns: Mapping[str, Array], rows: int) -> tuple[Tensor, NDArray[np.int64]]:
        """Logits to the base 2 less the highest one, (R, C), in this thread's memory, and the most probable class."""
        bits = self._borrow(rows)[0]
        # To the base 2: exp2 is much faster than exp.
        self._reader.read_logits(columns, self._reader.judged, unit=LOG2_E, out=bits[:, None])
        bits_RC = bits.numpy()
        top_R = bits_RC.argmax(axis=1)
        highest_R = bits_RC[np.arange(rows), top_R]
        if highest_R.any():
            with np.errstate(invalid="ignore"):  # +inf, of a damaged store, becomes NaN
                bits_RC -= highest_R[:, None]
        return bits, top_R

    def _judge_one(self, columns: Mapping[str, Array], labels_R: NDArray[np.int64], found: Judged) -> None:
        bits, top_R = self._read_bits(columns, len(labels_R))
        _find_top5(bits, labels_R, top_R, found, scratch=self._borrow(len(labels_R))[1])
        powers_RC, sum_R = _raise(bits)
        rows_R = np.arange(len(labels_R))
        found.top[:] = top_R
        found.p_top[:] = powers_RC[rows_R, top_R] / sum_R
        found.p_label[:] = powers_RC[rows_R, np.maximum(labels_R, 0)] / sum_R

    def _judge_members(self, columns: Mapping[str, Array], labels_R: NDArray[np.int64], found: Judged) -> None:
        p = self._reader.read_probabilities(columns, self._reader.judged).clamp_max_(1.0)
        p_RC, rows_R = p.numpy(), np.arange(len(labels_R))
        top_R = p_RC.argmax(axis=1)
        found.top[:] = top_R
        found.p_top[:] = p_RC[rows_R, top_R]
        found.p_label[:] = p_RC[rows_R, np.maximum(labels_R, 0)]
        _find_top5(p, labels_R, top_R, found, scratch=torch.empty_like(p))

    def _borrow(self, rows: int) -> list[Tensor]:
        """Two float32 (rows, C) tensors in this thread's memory."""
        if not hasattr(self._scratch, "tensors"):
            shape = (self._step, self._reader.run.num_classes)
            self._scratch.tensors = [torch.empty(shape) for _ in range(2)]
        return [one[:rows] for one in self._scratch.tensors]

    def _slices(self, columns: Mapping[str, Array], rows: int) -> Iterator[tuple[slice, dict[str, Array]]]:
        """Cut columns (R, W) into parts that are worked on within the cache."""
        for start in range(0, rows, self._step):
            cut = slice(start, min(start + self._step, rows))
            yield cut, {name: columns[name][cut] for name in self._reader.columns}

    def sigmoids(self, columns: Mapping[str, Array], labels_RC: NDArray[Any]) -> JudgedSigmoids:
        """Judge rows of independent sigmoids.

        Args:
            columns: of the encoding, (R, W).
            labels_RC: 1, 0, or -1 where unknown, int8.
        """
        classes = self._reader.run.num_classes
        known_C, right_C, p_label_C = np.zeros(classes, np.int64), np.zeros(classes, np.int64), np.zeros(classes)
        non_finite = 0
        for cut, part in self._slices(columns, len(labels_RC)):
            p_RC = self._reader.read_probabilities(part, self._reader.judged).numpy()
            non_finite += int(np.isnan(p_RC).any(axis=1).sum())
            is_known_RC, is_on_RC = labels_RC[cut] >= 0, labels_RC[cut] == 1
            known_C += is_known_RC.sum(axis=0)
            right_C += (is_known_RC & ((p_RC > 0.5) == is_on_RC)).sum(axis=0)
            p_label_C += np.where(is_known_RC, np.where(is_on_RC, p_RC, 1 - p_RC), 0.0).sum(axis=0, dtype=np.float64)
        return JudgedSigmoids(non_finite=non_finite, known=known_C, right=right_C, p_label=p_label_C)


def _raise(bits: Tensor) -> tuple[F32, F32]:
    """2 to these powers (R, C), in their place, and the sum of each row (R,)."""
    powers = bits.exp2_()
    return powers.numpy(), powers.sum(dim=1).numpy()


def _find_top5(
    order: Tensor, labels_R: NDArray[np.int64], top_R: NDArray[np.int64], found: Judged, *, scratch: Tensor
) -> None:
    """`order` (R, C) rises with the probability."""
    found.in_top5[:] = labels_R == top_R
    if len(others := np.flatnonzero((labels_R >= 0) & ~found.in_top5)):
        chosen_RC = scratch[: len(others)]
        torch.index_select(order, 0, torch.from_numpy(others), out=chosen_RC)
        of_label_R1 = chosen_RC.gather(1, torch.from_numpy(labels_R[others])[:, None])
        # As numbers rather than truth values, which torch adds up slowly.
        above_RC = torch.gt(chosen_RC, of_label_R1, out=chosen_RC)
        found.in_top5[others] = above_RC.sum(dim=1).numpy() < TOP
